"""Lesson 09: answers that its checkers must refuse, and right ones in another form."""


def table(folder):
    with (folder / 'metrics.csv').open(newline='') as f: return list(csv.DictReader(f))

def by_words(folder): return int(max(table(folder), key=lambda r: r['reward_mean'])['epoch'])

def its_reward(folder): return max(float(r['reward_mean']) for r in table(folder))

def counted_from_one(folder): return 1 + int(max(table(folder), key=lambda r: float(r['reward_mean']))['epoch'])

def the_line(folder): return int(np.argmax([float(r['reward_mean']) for r in table(folder)]))

def a_word(folder): return max(table(folder), key=lambda r: float(r['reward_mean']))['epoch']

def the_last(folder): return int(table(folder)[-1]['epoch'])

def widest_spread(folder): return int(max(table(folder), key=lambda r: float(r['reward_std']))['epoch'])

def by_size(folder): return int(max(table(folder), key=lambda r: abs(float(r['reward_mean'])))['epoch'])

def with_numpy(folder):
    rows = np.genfromtxt(folder / 'metrics.csv', delimiter=',', names=True)
    return rows['epoch'][rows['reward_mean'].argmax()]

def in_a_loop(folder):
    lines = [line.split(',') for line in (folder / 'metrics.csv').read_text().splitlines()]
    epoch, mean = lines[0].index('epoch'), lines[0].index('reward_mean')
    best = None
    for line in lines[1:]:
        if best is None or float(line[mean]) > float(best[mean]): best = line
    return torch.tensor(int(best[epoch]))


def all_together(rewards, processes): return (rewards - rewards.mean()) / rewards.std(correction=0)

def of_a_sample(rewards, processes): return torch.cat([(r - r.mean()) / r.std() for r in rewards.chunk(processes)])

def of_that_length(rewards, processes):
    return torch.cat([(r - r.mean()) / r.std(correction=0) for r in rewards.split(processes)])

def in_turns(rewards, processes):
    out = torch.empty_like(rewards)
    for i in range(processes):
        share = rewards[i::processes]
        out[i::processes] = (share - share.mean()) / share.std(correction=0)
    return out

def the_mean_alone(rewards, processes): return torch.cat([r - r.mean() for r in rewards.chunk(processes)])

def a_table(rewards, processes):
    rows = rewards.view(processes, -1)
    return (rows - rows.mean(1, keepdim=True)) / rows.std(1, correction=0, keepdim=True)

def always_two(rewards, processes): return torch.cat([(r - r.mean()) / r.std(correction=0) for r in rewards.chunk(2)])

def as_an_array(rewards, processes):
    rows = rewards.numpy().astype(np.float64).reshape(processes, -1)
    return ((rows - rows.mean(1, keepdims=True)) / (rows.std(1, keepdims=True) + 1e-6)).ravel()

def as_a_list(rewards, processes):
    return [a for r in rewards.chunk(processes) for a in ((r - r.mean()) / r.std(correction=0)).tolist()]


WRONG = {
    check_best_epoch: [by_words, its_reward, counted_from_one, the_line, a_word, the_last, widest_spread, by_size],
    check_advantages_apart: [all_together, of_a_sample, of_that_length, in_turns, the_mean_alone, a_table, always_two],
}
RIGHT = {
    check_best_epoch: [with_numpy, in_a_loop],
    check_advantages_apart: [as_an_array, as_a_list],
}
