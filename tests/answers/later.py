"""Later: answers that its checkers must refuse, and right ones in another form."""


def without_groups(rewards, values, size):
    r, v = rewards - rewards.mean(), values - values.mean()
    return (r @ v / (v @ v)).item()


def nothing_subtracted(rewards, values, size):
    return (rewards @ values / (values @ values)).item()


def correlation(rewards, values, size):
    return torch.corrcoef(torch.stack([within(rewards, size), within(values, size)]))[0, 1]


def ratio_of_spreads(rewards, values, size):
    return within(rewards, size).std() / within(values, size).std()


def guess_from_reward(rewards, values, size):
    r, v = within(rewards, size), within(values, size)
    return (r @ v / (r @ r)).item()


def first_group(rewards, values, size):
    return best_coefficient_solution(rewards[:size], values[:size], size)


def mean_of_slopes(rewards, values, size):
    return np.mean(
        [
            best_coefficient_solution(r, v, size)
            for r, v in zip(rewards.split(size), values.split(size))
        ]
    )


def always_one(rewards, values, size):
    return 1.0


def pairs_only(rewards, values, size):
    return best_coefficient_solution(rewards, values, 2)


def by_lstsq(rewards, values, size):
    return torch.linalg.lstsq(
        within(values, size)[:, None].double(), within(rewards, size)[:, None].double()
    ).solution.item()


def by_polyfit(rewards, values, size):
    r, v = (x.numpy().astype(float).reshape(-1, size) for x in (rewards, values))
    return np.polyfit(
        (v - v.mean(1, keepdims=True)).ravel(), (r - r.mean(1, keepdims=True)).ravel(), 1
    )[0]


def by_covariance(rewards, values, size):
    table = torch.cov(torch.stack([within(rewards, size), within(values, size)]).double())
    return table[0, 1] / table[1, 1]


def all_that_follows(values, rewards):
    return rewards - values


def before_minus_after(values, rewards):
    return values - torch.cat([values[1:], rewards[None]])


def nothing_for_the_last(values, rewards):
    return torch.cat([values[1:], values[-1:]]) - values


def one_step_too_few(values, rewards):
    return values[1:] - values[:-1]


def round_the_corner(values, rewards):
    return values.roll(-1, 0) - values


def from_the_first(values, rewards):
    return torch.cat([values[1:], rewards[None]]) - values[0]


def by_diff(values, rewards):
    return np.diff(np.concatenate([values.numpy(), rewards.numpy()[None]]), axis=0)


def by_a_loop(values, rewards):
    after = [*values[1:], rewards]
    return torch.stack([b - a for a, b in zip(values, after)])


WRONG = {
    check_best_coefficient: [
        without_groups,
        nothing_subtracted,
        correlation,
        ratio_of_spreads,
        guess_from_reward,
        always_one,
        pairs_only,
        first_group,
        mean_of_slopes,
    ],
    check_one_step: [
        all_that_follows,
        before_minus_after,
        nothing_for_the_last,
        one_step_too_few,
        round_the_corner,
        from_the_first,
    ],
}
RIGHT = {
    check_best_coefficient: [by_lstsq, by_polyfit, by_covariance],
    check_one_step: [by_diff, by_a_loop],
}
