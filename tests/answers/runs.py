"""Runs: answers that its checkers must refuse, and right ones in another form."""


def standardised(rewards):
    return (rewards - rewards.mean()) / rewards.std(correction=0)


def all_together(rewards, processes):
    return standardised(rewards)


def of_a_sample(rewards, processes):
    shares = rewards.chunk(processes)
    return torch.cat([(share - share.mean()) / share.std() for share in shares])


def of_that_length(rewards, processes):
    return torch.cat([standardised(share) for share in rewards.split(processes)])


def in_turns(rewards, processes):
    out = torch.empty_like(rewards)
    for i in range(processes):
        out[i::processes] = standardised(rewards[i::processes])
    return out


def the_mean_alone(rewards, processes):
    return torch.cat([share - share.mean() for share in rewards.chunk(processes)])


def a_table(rewards, processes):
    rows = rewards.view(processes, -1)
    return (rows - rows.mean(1, keepdim=True)) / rows.std(1, correction=0, keepdim=True)


def always_two(rewards, processes):
    return torch.cat([standardised(share) for share in rewards.chunk(2)])


def as_an_array(rewards, processes):
    rows = rewards.numpy().astype(np.float64).reshape(processes, -1)
    return ((rows - rows.mean(1, keepdims=True)) / (rows.std(1, keepdims=True) + 1e-6)).ravel()


def as_a_list(rewards, processes):
    shares = rewards.chunk(processes)
    return [advantage for share in shares for advantage in standardised(share).tolist()]


WRONG = {
    check_advantages_apart: [
        all_together,
        of_a_sample,
        of_that_length,
        in_turns,
        the_mean_alone,
        a_table,
        always_two,
    ],
}
RIGHT = {check_advantages_apart: [as_an_array, as_a_list]}
