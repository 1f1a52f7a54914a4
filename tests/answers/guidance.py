"""Guidance: answers that its checkers must refuse, and right ones in another form."""


def slope_times_sd(x, slope, abar):
    return (x + (1 - abar).sqrt() * slope) / abar.sqrt()


def slope_subtracted(x, slope, abar):
    return (x - (1 - abar) * slope) / abar.sqrt()


def slope_as_noise(x, slope, abar):
    return (x - (1 - abar).sqrt() * slope) / abar.sqrt()


def not_divided(x, slope, abar):
    return x + (1 - abar) * slope


def divided_without_root(x, slope, abar):
    return (x + (1 - abar) * slope) / abar


def one_channel(x, slope, abar):
    return ((x + (1 - abar) * slope) / abar.sqrt())[:, :1]


def noise_first(x, slope, abar):
    return predicted_clean(x, -slope * (1 - abar) ** 0.5, abar)


def in_double(x, slope, abar):
    a = float(abar)
    return x.double() / a**0.5 + (1 - a) / a**0.5 * slope.double()


def our_scale(eps_empty, eps_cond, w):
    return eps_empty + w * (eps_cond - eps_empty)


def swapped(eps_empty, eps_cond, w):
    return (1 + w) * eps_empty - w * eps_cond


def weights_of_a_mean(eps_empty, eps_cond, w):
    return (1 - w) * eps_cond + w * eps_empty


def two_added(eps_empty, eps_cond, w):
    return (1 + w) * eps_cond + w * eps_empty


def from_ours(eps_empty, eps_cond, w):
    return eps_empty + (w + 1) * (eps_cond - eps_empty)


def from_the_prompt(eps_empty, eps_cond, w):
    return eps_cond + torch.tensor(w) * (eps_cond - eps_empty)


def at_predicted(
    x, t, context, reduce=torch.sum, power=0.5, eps_of=lambda x, t, c: cfg(x, t, c, SCALE)
):
    with torch.enable_grad():
        eps = eps_of(x, t, context).detach()
        x0 = predicted_clean(x, eps, abars[t]).detach().requires_grad_()
        reduce(predictor(decode_latents(pipe, x0))).backward()
    return eps, abars[t] ** power * x0.grad


def cut(x, t, context):
    return reward_gradient(x, t, context, through_unet=False)[:2]


def full(x, t, context):
    return reward_gradient(x, t, context)[:2]


def no_factor(x, t, context):
    return at_predicted(x, t, context, power=0)


def factor_twice(x, t, context):
    return at_predicted(x, t, context, power=1)


def mean_of_rewards(x, t, context):
    return at_predicted(x, t, context, reduce=torch.mean)


def wrong_sign_of_reward(x, t, context):
    return at_predicted(x, t, context, reduce=lambda r: -r.sum())


def prompt_only(x, t, context):
    return at_predicted(x, t, context, eps_of=lambda x, t, c: cfg(x, t, c, 1.0))


def gradient_alone(x, t, context):
    return at_predicted(x, t, context)[1]


def gradients_off(x, t, context):
    eps = cfg(x, t, context, SCALE)
    x0 = predicted_clean(x, eps, abars[t]).requires_grad_()
    return eps, abars[t].sqrt() * torch.autograd.grad(
        predictor(decode_latents(pipe, x0)).sum(), x0
    )[0]


def cut_times_abar(x, t, context):
    eps, grad, _ = reward_gradient(x, t, context, through_unet=False)
    return [eps, abars[t] * grad]


def one_at_a_time(x, t, context):
    parts = [at_predicted(x[i : i + 1], t, context.rows(slice(i, i + 1))) for i in range(len(x))]
    return tuple(torch.cat(part) for part in zip(*parts))


def less_mean_of_all(images, prompts=None):
    return images[:, 2].mean((1, 2)) - images.mean((1, 2, 3))


def less_red_only(images, prompts=None):
    return images[:, 2].mean((1, 2)) - images[:, 0].mean((1, 2))


def less_sum_of_others(images, prompts=None):
    return images[:, 2].mean((1, 2)) - images[:, :2].sum(1).mean((1, 2))


def blue_first(images, prompts=None):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def one_for_all(images, prompts=None):
    return images[:, 2].mean() - images[:, :2].mean()


def a_map(images, prompts=None):
    return images[:, 2] - images[:, :2].mean(1)


def brightest_blue(images, prompts=None):
    return images[:, 2].amax((1, 2)) - images[:, :2].mean((1, 2, 3))


def numbers(images, prompts=None):
    return torch.tensor([i[2].mean().item() - i[:2].mean().item() for i in images])


def three_means(images, prompts=None):
    red, green, blue = images.mean((2, 3)).unbind(1)
    return blue - (red + green) / 2


def picture_by_picture(images, prompts=None):
    return torch.stack([i[2].mean() - i[:2].mean() for i in images.double()])


WRONG = {
    check_clean_from_score: [
        slope_times_sd,
        slope_subtracted,
        slope_as_noise,
        not_divided,
        divided_without_root,
        one_channel,
    ],
    check_paper_guidance: [our_scale, swapped, weights_of_a_mean, two_added],
    check_cheap_gradient: [
        cut,
        full,
        no_factor,
        factor_twice,
        mean_of_rewards,
        wrong_sign_of_reward,
        prompt_only,
        gradient_alone,
        gradients_off,
    ],
    check_blueness: [
        less_mean_of_all,
        less_red_only,
        less_sum_of_others,
        blue_first,
        one_for_all,
        a_map,
        brightest_blue,
        numbers,
    ],
}
RIGHT = {
    check_clean_from_score: [noise_first, in_double],
    check_paper_guidance: [from_ours, from_the_prompt],
    check_cheap_gradient: [at_predicted, cut_times_abar, one_at_a_time],
    check_blueness: [three_means, picture_by_picture],
}
