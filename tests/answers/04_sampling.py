"""Lesson 04: answers that its checkers must refuse, and right ones in another form."""


# ---- loudness_of_v
def of_epsilon(alpha, alpha_prev, std):
    return ((1 - alpha_prev - std**2).sqrt() - alpha_prev.sqrt() * (1 - alpha).sqrt() / alpha.sqrt()).abs() / std


def with_its_sign(alpha, alpha_prev, std):
    return (alpha.sqrt() * (1 - alpha_prev - std**2).sqrt() - alpha_prev.sqrt() * (1 - alpha).sqrt()) / std


def not_over_std(alpha, alpha_prev, std): return with_its_sign(alpha, alpha_prev, std).abs() * std
def over_the_variance(alpha, alpha_prev, std): return with_its_sign(alpha, alpha_prev, std).abs() / std
def through_clean_alone(alpha, alpha_prev, std): return alpha_prev.sqrt() * (1 - alpha).sqrt() / std


def parts_added(alpha, alpha_prev, std):
    return (alpha.sqrt() * (1 - alpha_prev - std**2).sqrt() + alpha_prev.sqrt() * (1 - alpha).sqrt()) / std


def divided_by_the_root(alpha, alpha_prev, std): return of_epsilon(alpha, alpha_prev, std) / alpha.sqrt()


def without_the_variance(alpha, alpha_prev, std):
    return (alpha.sqrt() * (1 - alpha_prev).sqrt() - alpha_prev.sqrt() * (1 - alpha).sqrt()).abs() / std


def largest_only(alpha, alpha_prev, std): return with_its_sign(alpha, alpha_prev, std).abs().max()


def loud_by_step_mean(alpha, alpha_prev, std):
    chain = schedule._replace(alpha=alpha, alpha_prev=alpha_prev, std=std)
    ones = torch.ones(len(std), 1, 1, 1)
    return step_mean(chain, torch.arange(len(std)), 0 * ones, ones, 'v_prediction').abs().flatten() / std


def loud_in_numpy(alpha, alpha_prev, std):
    alpha, alpha_prev, std = (np.asarray(v, dtype=np.float64) for v in (alpha, alpha_prev, std))
    return abs(np.sqrt(alpha * (1 - alpha_prev - std**2)) - np.sqrt(alpha_prev * (1 - alpha))) / std


def loud_in_a_list(alpha, alpha_prev, std):
    return [loud_in_numpy(*numbers).item() for numbers in zip(alpha, alpha_prev, std)]


# ---- step_kl
def forgot_the_square(old, new, std): return ((old - new)**2 / (2 * std)).flatten(1).mean(1)
def forgot_the_half(old, new, std): return ((old - new)**2 / std**2).flatten(1).mean(1)
def summed(old, new, std): return ((old - new)**2 / (2 * std**2)).flatten(1).sum(1)
def mean_of_everything(old, new, std): return ((old - new)**2 / (2 * std**2)).mean()
def not_averaged(old, new, std): return (old - new)**2 / (2 * std**2)
def not_squared(old, new, std): return ((new - old) / std).flatten(1).mean(1)
def sizes_of_moves(old, new, std): return ((new - old).abs() / (2 * std)).flatten(1).mean(1)
def mean_before_the_square(old, new, std): return ((new - old) / std).flatten(1).mean(1)**2 / 2


def kl_by_torch(old, new, std):
    return torch.distributions.kl_divergence(Normal(old, std), Normal(new, std)).flatten(1).mean(1).numpy()


def kl_row_by_row(old, new, std):
    stds = std.flatten().tolist() * (len(old) // std.numel())
    return [float(((o - n)**2).mean() / (2 * s**2)) for o, n, s in zip(old, new, stds)]


# ---- recover_noise
@torch.no_grad()
def noise_of(pipe, context, schedule, trajectory, guidance_scale, shift=0, scale=True):
    x, steps = trajectory.latents, range(len(schedule.std))
    outputs = [predict(pipe.unet, x[i], schedule.timesteps[max(i - shift, 0)], context, guidance_scale) for i in steps]
    z = torch.stack([x[i + 1] - step_mean(schedule, i, x[i], outputs[i]) for i in steps])
    return z / schedule.std.view(-1, 1, 1, 1, 1) if scale else z


def not_divided(*args): return noise_of(*args, scale=False)
def a_timestep_late(*args): return noise_of(*args, shift=1)
def without_guidance(pipe, context, schedule, trajectory, _): return noise_of(pipe, context, schedule, trajectory, 1.)
def of_the_lesson(pipe, context, schedule, trajectory, _): return noise_of(pipe, context, schedule, trajectory, 3.)
def other_sign(*args): return -noise_of(*args)
def of_one_sample(*args): return noise_of(*args)[:, :1]
def lessons_chain(pipe, context, _, trajectory, scale): return noise_of(pipe, context, schedule, trajectory, scale)


def latents_step_by_step(pipe, context, schedule, trajectory, scale):
    return trajectory.latents.diff(dim=0) / schedule.std.view(-1, 1, 1, 1, 1)


def drawn_again(pipe, context, schedule, trajectory, scale):
    generators = make_generators(range(trajectory.latents.shape[1]))
    return torch.stack([randn_tensor(trajectory.latents[0].shape, generators) for _ in trajectory.latents])[1:]


def noise_in_numpy(*args): return noise_of(*args).numpy()
def noise_in_a_list(*args): return list(noise_of(*args))


def noise_all_at_once(pipe, context, schedule, trajectory, guidance_scale):
    steps, rows = all_pairs(trajectory)
    words = Context(context.text[rows], context.empty)
    before, after = trajectory.latents[:-1].flatten(0, 1), trajectory.latents[1:].flatten(0, 1)
    output = predict(pipe.unet, before, schedule.timesteps[steps], words, guidance_scale)
    z = (after - step_mean(schedule, steps, before, output)) / per_sample(schedule.std, steps)
    return z.view(trajectory.latents[1:].shape)


# ---- cost_of_half
def deviations(pipe, context, schedule, trajectory, guidance_scale, change):
    rounded = trajectory._replace(latents=change(trajectory.latents))
    return (rescore_all(pipe, context, schedule, rounded, guidance_scale) - trajectory.log_probs).exp() - 1


def to_half(x): return x.half().float()
def nothing_rounded(*args): return deviations(*args, lambda x: x).abs().mean(1)
def in_bfloat16(*args): return deviations(*args, lambda x: x.bfloat16().float()).abs().mean(1)
def signs_kept(*args): return deviations(*args, to_half).mean(1)
def mean_then_size(*args): return deviations(*args, to_half).mean(1).abs()
def the_worst_sample(*args): return deviations(*args, to_half).abs().amax(1)
def over_the_steps(*args): return deviations(*args, to_half).abs().mean(0)
def ratio_itself(*args): return (1 + deviations(*args, to_half)).mean(1)


def log_probs_rounded(pipe, context, schedule, trajectory, guidance_scale):
    return (trajectory.log_probs.half().float() - trajectory.log_probs).exp().sub(1).abs().mean(1)


def half_by_numpy(x): return torch.tensor(x.numpy().astype(np.float16).astype(np.float32))
def cost_in_numpy(*args): return deviations(*args, half_by_numpy).abs().mean(1).numpy()


def cost_step_by_step(pipe, context, schedule, trajectory, guidance_scale):
    x, costs = to_half(trajectory.latents), []
    for i in range(len(schedule.std)):
        steps = torch.full((x.shape[1],), i)
        with torch.no_grad(): again = rescore(pipe, context, schedule, steps, x[i], x[i + 1], guidance_scale)
        costs.append(float(((again - trajectory.log_probs[i]).exp() - 1).abs().mean()))
    return costs


WRONG = {
    check_loudness_of_v: [of_epsilon, with_its_sign, not_over_std, over_the_variance, through_clean_alone, parts_added,
                          divided_by_the_root, without_the_variance, largest_only],
    check_step_kl: [forgot_the_square, forgot_the_half, summed, mean_of_everything, not_averaged, not_squared, sizes_of_moves,
                    mean_before_the_square],
    check_recover_noise: [not_divided, a_timestep_late, without_guidance, of_the_lesson, other_sign, of_one_sample,
                          latents_step_by_step, lessons_chain, drawn_again],
    check_cost_of_half: [nothing_rounded, in_bfloat16, signs_kept, mean_then_size, the_worst_sample, over_the_steps,
                         ratio_itself, log_probs_rounded],
}
RIGHT = {
    check_loudness_of_v: [loud_by_step_mean, loud_in_numpy, loud_in_a_list],
    check_step_kl: [kl_by_torch, kl_row_by_row],
    check_recover_noise: [noise_in_numpy, noise_in_a_list, noise_all_at_once],
    check_cost_of_half: [cost_in_numpy, cost_step_by_step],
}
