"""What the reward forgets: answers that its checker must refuse, and right ones in another form."""


def summed(mean, other, std):
    return (mean - other).square().flatten(1).sum(1) / (2 * std**2)


def no_half(mean, other, std):
    return (mean - other).square().flatten(1).mean(1) / std**2


def std_not_squared(mean, other, std):
    return (mean - other).square().flatten(1).mean(1) / (2 * std)


def one_number(mean, other, std):
    return ((mean - other).square().mean() / (2 * std**2)).mean()


def one_mean_for_all(mean, other, std):
    return (mean - other).square().mean() / (2 * std**2)


def distance(mean, other, std):
    return (mean - other).abs().flatten(1).mean(1) / (2 * std**2)


def without_square(mean, other, std):
    return (mean - other).flatten(1).mean(1) / (2 * std**2)


def first_std(mean, other, std):
    return (mean - other).square().flatten(1).mean(1) / (2 * std[0] ** 2)


def in_units_of_std(mean, other, std):
    z = (mean - other) / std[:, None, None, None]
    return 0.5 * (z * z).mean((1, 2, 3))


def by_torch(mean, other, std):
    a, b = (torch.distributions.Normal(m, std.reshape(-1, 1, 1, 1)) for m in (mean, other))
    return torch.distributions.kl_divergence(a, b).flatten(1).mean(1)


WRONG = {
    check_gaussian_kl: [
        summed,
        no_half,
        std_not_squared,
        one_number,
        one_mean_for_all,
        distance,
        without_square,
        first_std,
    ],
}
RIGHT = {
    check_gaussian_kl: [in_units_of_std, by_torch],
}
