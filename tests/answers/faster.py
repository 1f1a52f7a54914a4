"""Faster: answers that its checker must refuse, and right ones in another form."""


def larger_is_faster(a, b):
    return faster_solution(b, a)


def ties_lost(a, b):
    return np.mean([x < y for x in a for y in b])


def ties_won(a, b):
    return np.mean([x <= y for x in a for y in b])


def wins_not_share(a, b):
    return sum((x < y) + (x == y) / 2 for x in a for y in b)


def seed_by_seed(a, b):
    return np.mean([(x < y) + (x == y) / 2 for x, y in zip(a, b)])


def medians_only(a, b):
    return float(np.median(a) < np.median(b)) + (np.median(a) == np.median(b)) / 2


def means_only(a, b):
    return float(np.mean(a) < np.mean(b)) + (np.mean(a) == np.mean(b)) / 2


def over_the_first_list(a, b):
    return sum((x < y) + (x == y) / 2 for x in a for y in b) / len(a) ** 2


def sign_of_difference(a, b):
    with np.errstate(invalid='ignore'):
        differences = np.subtract.outer(np.array(b, float), np.array(a, float))
    return (np.sign(differences).mean() + 1) / 2


def infinite_left_out(a, b):
    won = [(x < y) + (x == y) / 2 for x in a for y in b if np.isfinite(x) and np.isfinite(y)]
    return np.mean(won) if won else 0.5


def table_of_all(a, b):
    a = np.array(a)[:, None]
    b = np.array(b)[None]
    return ((a < b) + 0.5 * (a == b)).mean()


def a_float32_tensor(a, b):
    a = torch.tensor(a, dtype=torch.float32)[:, None]
    b = torch.tensor(b, dtype=torch.float32)
    return (a < b).float().mean() + (a == b).float().mean() / 2


def by_two_loops(a, b):
    won = 0
    for x in a:
        for y in b:
            if x < y:
                won += 1
            elif x == y:
                won += 0.5
    return won / (len(a) * len(b))


WRONG = {
    check_faster: [
        larger_is_faster,
        ties_lost,
        ties_won,
        wins_not_share,
        seed_by_seed,
        medians_only,
        means_only,
        over_the_first_list,
        sign_of_difference,
        infinite_left_out,
    ]
}
RIGHT = {check_faster: [table_of_all, a_float32_tensor, by_two_loops]}
