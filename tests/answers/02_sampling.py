"""The lesson on guidance: answers that its checkers must refuse, and right ones in another form."""


# ---- loudness_of_v
def of_epsilon(alpha, alpha_prev, std):
    return (
        (1 - alpha_prev - std**2).sqrt() - alpha_prev.sqrt() * (1 - alpha).sqrt() / alpha.sqrt()
    ).abs() / std


def with_its_sign(alpha, alpha_prev, std):
    return (
        alpha.sqrt() * (1 - alpha_prev - std**2).sqrt() - alpha_prev.sqrt() * (1 - alpha).sqrt()
    ) / std


def not_over_std(alpha, alpha_prev, std):
    return with_its_sign(alpha, alpha_prev, std).abs() * std


def over_the_variance(alpha, alpha_prev, std):
    return with_its_sign(alpha, alpha_prev, std).abs() / std


def through_clean_alone(alpha, alpha_prev, std):
    return alpha_prev.sqrt() * (1 - alpha).sqrt() / std


def parts_added(alpha, alpha_prev, std):
    return (
        alpha.sqrt() * (1 - alpha_prev - std**2).sqrt() + alpha_prev.sqrt() * (1 - alpha).sqrt()
    ) / std


def divided_by_the_root(alpha, alpha_prev, std):
    return of_epsilon(alpha, alpha_prev, std) / alpha.sqrt()


def without_the_variance(alpha, alpha_prev, std):
    return (
        alpha.sqrt() * (1 - alpha_prev).sqrt() - alpha_prev.sqrt() * (1 - alpha).sqrt()
    ).abs() / std


def largest_only(alpha, alpha_prev, std):
    return with_its_sign(alpha, alpha_prev, std).abs().max()


def loud_by_step_mean(alpha, alpha_prev, std):
    chain = Schedule(None, alpha, alpha_prev, std, None, 'v_prediction')
    ones = torch.ones(len(std), 1, 1, 1)
    return step_mean(chain, torch.arange(len(std)), 0 * ones, ones).abs().flatten() / std


def loud_in_numpy(alpha, alpha_prev, std):
    alpha, alpha_prev, std = (np.asarray(v, dtype=np.float64) for v in (alpha, alpha_prev, std))
    return abs(np.sqrt(alpha * (1 - alpha_prev - std**2)) - np.sqrt(alpha_prev * (1 - alpha))) / std


def loud_in_a_list(alpha, alpha_prev, std):
    return [loud_in_numpy(*numbers).item() for numbers in zip(alpha, alpha_prev, std)]


# ---- step_kl
def forgot_the_square(old, new, std):
    return ((old - new) ** 2 / (2 * std)).flatten(1).mean(1)


def forgot_the_half(old, new, std):
    return ((old - new) ** 2 / std**2).flatten(1).mean(1)


def summed(old, new, std):
    return ((old - new) ** 2 / (2 * std**2)).flatten(1).sum(1)


def mean_of_everything(old, new, std):
    return ((old - new) ** 2 / (2 * std**2)).mean()


def not_averaged(old, new, std):
    return (old - new) ** 2 / (2 * std**2)


def not_squared(old, new, std):
    return ((new - old) / std).flatten(1).mean(1)


def sizes_of_moves(old, new, std):
    return ((new - old).abs() / (2 * std)).flatten(1).mean(1)


def mean_before_the_square(old, new, std):
    return ((new - old) / std).flatten(1).mean(1) ** 2 / 2


def kl_by_torch(old, new, std):
    return (
        torch.distributions.kl_divergence(Normal(old, std), Normal(new, std))
        .flatten(1)
        .mean(1)
        .numpy()
    )


def kl_row_by_row(old, new, std):
    stds = std.flatten().tolist() * (len(old) // std.numel())
    return [float(((o - n) ** 2).mean() / (2 * s**2)) for o, n, s in zip(old, new, stds)]


# ---- recover_noise
@torch.no_grad()
def noise_of(policy, trajectory, shift=0, scale=True):
    x = trajectory.latents
    schedule = policy.schedule
    noise = []
    for i in range(len(schedule.std)):
        t = schedule.timesteps[max(i - shift, 0)]
        output = predict(policy.pipe.unet, x[i], t, trajectory.context, policy.guidance_scale)
        z = x[i + 1] - step_mean(schedule, i, x[i], output)
        noise.append(z / schedule.std[i] if scale else z)
    return torch.stack(noise)


def not_divided(policy, trajectory):
    return noise_of(policy, trajectory, scale=False)


def a_timestep_late(policy, trajectory):
    return noise_of(policy, trajectory, shift=1)


def with_guidance(policy, scale):
    return DDIMPolicy(policy.pipe, policy.schedule, scale)


def without_guidance(policy, trajectory):
    return noise_of(with_guidance(policy, 1.0), trajectory)


def of_the_lesson(policy, trajectory):
    return noise_of(with_guidance(policy, 3.0), trajectory)


def lessons_chain(policy, trajectory):
    lesson = make_schedule(policy.pipe.scheduler, 10)
    return noise_of(DDIMPolicy(policy.pipe, lesson, policy.guidance_scale), trajectory)


def eta_of_the_lesson(policy, trajectory):
    lesson = make_schedule(policy.pipe.scheduler, 5)
    return noise_of(DDIMPolicy(policy.pipe, lesson, policy.guidance_scale), trajectory)


def other_sign(policy, trajectory):
    return -noise_of(policy, trajectory)


def of_one_sample(policy, trajectory):
    return noise_of(policy, trajectory)[:, :1]


def latents_step_by_step(policy, trajectory):
    return trajectory.latents.diff(dim=0) / policy.schedule.std.view(-1, 1, 1, 1, 1)


def drawn_again(policy, trajectory):
    generators = make_generators(range(trajectory.latents.shape[1]))
    shape = trajectory.latents[0].shape
    return torch.stack([randn_tensor(shape, generators) for _ in trajectory.latents])[1:]


def noise_in_numpy(policy, trajectory):
    return noise_of(policy, trajectory).numpy()


def noise_in_a_list(policy, trajectory):
    return list(noise_of(policy, trajectory))


def noise_all_at_once(policy, trajectory):
    steps, rows = all_pairs(trajectory)
    before = trajectory.latents[:-1].flatten(0, 1)
    after = trajectory.latents[1:].flatten(0, 1)
    mean, std = policy.gaussian(steps, before, trajectory.context.rows(rows))
    return ((after - mean) / std).view(trajectory.latents[1:].shape)


# ---- cost_of_half
def deviations(policy, trajectory, change):
    rounded = trajectory._replace(latents=change(trajectory.latents))
    return (rescore_all(policy, rounded) - trajectory.log_probs).exp() - 1


def to_half(x):
    return x.half().float()


def nothing_rounded(policy, trajectory):
    return deviations(policy, trajectory, lambda x: x).abs().mean(1)


def in_bfloat16(policy, trajectory):
    return deviations(policy, trajectory, lambda x: x.bfloat16().float()).abs().mean(1)


def signs_kept(policy, trajectory):
    return deviations(policy, trajectory, to_half).mean(1)


def mean_then_size(policy, trajectory):
    return deviations(policy, trajectory, to_half).mean(1).abs()


def the_worst_sample(policy, trajectory):
    return deviations(policy, trajectory, to_half).abs().amax(1)


def over_the_steps(policy, trajectory):
    return deviations(policy, trajectory, to_half).abs().mean(0)


def ratio_itself(policy, trajectory):
    return (1 + deviations(policy, trajectory, to_half)).mean(1)


def log_probs_rounded(policy, trajectory):
    rounded = trajectory.log_probs.half().float()
    return (rounded - trajectory.log_probs).exp().sub(1).abs().mean(1)


def half_by_numpy(x):
    return torch.tensor(x.numpy().astype(np.float16).astype(np.float32))


def cost_in_numpy(policy, trajectory):
    return deviations(policy, trajectory, half_by_numpy).abs().mean(1).numpy()


def cost_step_by_step(policy, trajectory):
    rounded = trajectory._replace(latents=to_half(trajectory.latents))
    rows = torch.arange(trajectory.latents.shape[1])
    costs = []
    for i in range(len(policy.random)):
        with torch.no_grad():
            again = rescore(policy, rounded, torch.full_like(rows, i), rows)
        costs.append(float(((again - trajectory.log_probs[i]).exp() - 1).abs().mean()))
    return costs


WRONG = {
    check_loudness_of_v: [
        of_epsilon,
        with_its_sign,
        not_over_std,
        over_the_variance,
        through_clean_alone,
        parts_added,
        divided_by_the_root,
        without_the_variance,
        largest_only,
    ],
    check_step_kl: [
        forgot_the_square,
        forgot_the_half,
        summed,
        mean_of_everything,
        not_averaged,
        not_squared,
        sizes_of_moves,
        mean_before_the_square,
    ],
    check_recover_noise: [
        not_divided,
        a_timestep_late,
        without_guidance,
        of_the_lesson,
        other_sign,
        of_one_sample,
        latents_step_by_step,
        lessons_chain,
        eta_of_the_lesson,
        drawn_again,
    ],
    check_cost_of_half: [
        nothing_rounded,
        in_bfloat16,
        signs_kept,
        mean_then_size,
        the_worst_sample,
        over_the_steps,
        ratio_itself,
        log_probs_rounded,
    ],
}
RIGHT = {
    check_loudness_of_v: [loud_by_step_mean, loud_in_numpy, loud_in_a_list],
    check_step_kl: [kl_by_torch, kl_row_by_row],
    check_recover_noise: [noise_in_numpy, noise_in_a_list, noise_all_at_once],
    check_cost_of_half: [cost_in_numpy, cost_step_by_step],
}
