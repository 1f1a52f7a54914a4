"""PPO: answers that its checkers must refuse, and right ones in another form."""


def one_sigma_too_few(x, mean, log_std):
    z = (x - mean) / math.exp(log_std)
    return torch.stack([z, z**2 - 1], -1)


def wrong_way_from_the_mean(x, mean, log_std):
    z = (x - mean) / math.exp(log_std)
    return torch.stack([-z / math.exp(log_std), z**2 - 1], -1)


def for_sigma_itself(x, mean, log_std):
    std = math.exp(log_std)
    return torch.stack([(x - mean) / std**2, (x - mean) ** 2 / std**3 - 1 / std], -1)


def rows_for_columns(x, mean, log_std):
    std = math.exp(log_std)
    return torch.stack([(x - mean) / std**2, (x - mean) ** 2 / std**2 - 1])


def std_for_its_logarithm(x, mean, log_std):
    z = (x - mean) / log_std
    return torch.stack([z / log_std, z**2 - 1], -1)


def one_draw_at_a_time(x, mean, log_std):
    variance = math.exp(2 * log_std)
    return [[(float(v) - mean) / variance, (float(v) - mean) ** 2 / variance - 1] for v in x]


def in_float32(x, mean, log_std):
    z = (x.float() - mean) / math.exp(log_std)
    return torch.stack([z / math.exp(log_std), z**2 - 1], 1)


def mean_reward(scores, rewards):
    return rewards.mean()


def by_the_score(scores, rewards):
    return (scores * rewards).sum() / scores.sum()


def by_its_size(scores, rewards):
    return (scores.abs() * rewards).sum() / scores.abs().sum()


def not_divided(scores, rewards):
    return (scores**2 * rewards).mean()


def wrong_sign(scores, rewards):
    return -(scores**2 * rewards).sum() / (scores**2).sum()


def nothing_at_all(scores, rewards):
    return 0.0


def least_squares(scores, rewards):
    return np.linalg.lstsq(scores.numpy()[:, None], (scores * rewards).numpy(), rcond=None)[0]


def as_a_number(scores, rewards):
    weights = [score**2 for score in scores.tolist()]
    return sum(w * r for w, r in zip(weights, rewards.tolist())) / sum(weights)


def gradients(surrogate, advantages, eps=0.1):
    ratio = torch.tensor([1 + 2 * eps, 1.0, 1 - 2 * eps], requires_grad=True)
    return torch.autograd.grad(surrogate(ratio, advantages * torch.ones(3), eps).sum(), ratio)[
        0
    ].tolist()


def praised_ones_only(surrogate):
    return gradients(surrogate, 1.0) == [0.0, -1.0, -1.0]


def one_range_only(surrogate):
    return gradients(surrogate, 1.0, 0.2) == [0.0, -1.0, -1.0] and gradients(
        surrogate, -1.0, 0.2
    ) == [1.0, 1.0, 0.0]


def range_of_a_tenth_only(surrogate):
    return gradients(surrogate, 1.0) == [0.0, -1.0, -1.0] and gradients(surrogate, -1.0) == [
        1.0,
        1.0,
        0.0,
    ]


def ratio_one_only(surrogate):
    return surrogate(torch.ones(2), torch.tensor([1.0, -1.0]), 0.1).tolist() == [-1.0, 1.0]


def by_name(surrogate):
    return surrogate is clipped_surrogate


def without_a_return(surrogate):
    gradients(surrogate, 1.0)


def always_true(surrogate):
    return True


def by_values(surrogate):
    ratio = torch.tensor([2.0, 0.1, 1.0, 2.0, 0.1, 1.0])
    A = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    wanted = {0.1: [-1.1, -0.1, -1.0, 2.0, 0.9, 1.0], 0.5: [-1.5, -0.1, -1.0, 2.0, 0.5, 1.0]}
    return np.bool_(
        all(np.allclose(surrogate(ratio, A, eps), losses) for eps, losses in wanted.items())
    )


def with_a_tensor(surrogate):
    same = []
    for eps in (0.1, 0.4):
        ratio = torch.tensor([1 + 1.2 * eps, 1 + 0.8 * eps, 1 - 0.8 * eps, 1 - 1.2 * eps] * 2)
        ratio.requires_grad_()
        advantages = torch.tensor([1.0] * 4 + [-1.0] * 4)
        (gradient,) = torch.autograd.grad(surrogate(ratio, advantages, eps).sum(), ratio)
        same.append(gradient == torch.tensor([0.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 0.0]))
    return torch.stack(same).all()


def divided(full, D):
    return full / D


def its_logarithm(full, D):
    return math.log1p(full) / D


def the_ratio_itself(full, D):
    return (1 + full) ** (1 / D)


def root_of_the_increase(full, D):
    return full ** (1 / D)


def full_power(full, D):
    return (1 + full) ** min(D, 100) - 1


def a_root(full, D):
    return (1 + full) ** (1 / D) - 1


def float32_root(full, D):
    return torch.tensor(1.0 + full) ** (1 / D) - 1


def an_array(full, D):
    return np.expm1(np.log1p(np.array([full])) / D)[0]


def no_steps(approx_kl, T, D):
    return math.sqrt(1 + 2 * D**2 * approx_kl) - 1


def rule_alone(approx_kl, T, D):
    return T * D**2 * approx_kl


def D_once(approx_kl, T, D):
    return math.sqrt(1 + 2 * T * D * approx_kl) - 1


def divided_by_steps(approx_kl, T, D):
    return math.sqrt(1 + 2 * D**2 * approx_kl / T) - 1


def square_alone(approx_kl, T, D):
    return math.sqrt(2 * T * D**2 * approx_kl)


def as_a_tensor(approx_kl, T, D):
    return (1 + 2.0 * torch.tensor(approx_kl) * T * D**2).sqrt() - 1


def by_halving(approx_kl, T, D):
    low = 0.0
    high = 1e6
    for _ in range(80):
        k = (low + high) / 2
        low, high = (low, k) if k + k * k / 2 > T * D**2 * approx_kl else (k, high)
    return np.float64(low)


WRONG = {
    check_gaussian_score: [
        one_sigma_too_few,
        wrong_way_from_the_mean,
        for_sigma_itself,
        rows_for_columns,
        std_for_its_logarithm,
    ],
    check_best_constant: [
        mean_reward,
        by_the_score,
        by_its_size,
        not_divided,
        wrong_sign,
        nothing_at_all,
    ],
    check_examine: [
        praised_ones_only,
        one_range_only,
        range_of_a_tenth_only,
        ratio_one_only,
        by_name,
        without_a_return,
        always_true,
    ],
    check_clip_range_on_the_mean: [
        divided,
        its_logarithm,
        the_ratio_itself,
        root_of_the_increase,
        full_power,
    ],
    check_loud_step_nats: [no_steps, rule_alone, D_once, divided_by_steps, square_alone],
}
RIGHT = {
    check_gaussian_score: [one_draw_at_a_time, in_float32],
    check_best_constant: [least_squares, as_a_number],
    check_examine: [by_values, with_a_tensor],
    check_clip_range_on_the_mean: [a_root, float32_root, an_array],
    check_loud_step_nats: [as_a_tensor, by_halving],
}
