"""Start: answers that its checker must refuse, and right ones in another form."""


# ---- make_noisy
def without_roots(pipe, clean, t, noise):
    alpha = pipe.scheduler.alphas_cumprod[t]
    return alpha * clean + (1 - alpha) * noise


def alpha_of_one_step(pipe, clean, t, noise):
    alpha = pipe.scheduler.alphas[t]
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def places_changed(pipe, clean, t, noise):
    alpha = pipe.scheduler.alphas_cumprod[t]
    return alpha.sqrt() * noise + (1 - alpha).sqrt() * clean


def one_minus_the_root(pipe, clean, t, noise):
    root = pipe.scheduler.alphas_cumprod[t].sqrt()
    return root * clean + (1 - root) * noise


def root_of_one_only(pipe, clean, t, noise):
    alpha = pipe.scheduler.alphas_cumprod[t]
    return alpha.sqrt() * clean + (1 - alpha) * noise


def noise_added(pipe, clean, t, noise):
    return clean + (1 - pipe.scheduler.alphas_cumprod[t]).sqrt() * noise


def next_timestep(pipe, clean, t, noise):
    return with_floats(pipe, clean, t - 10, noise)


def one_picture(pipe, clean, t, noise):
    return with_floats(pipe, clean, t, noise)[:1].expand_as(clean)


def by_the_scheduler(pipe, clean, t, noise):
    return pipe.scheduler.add_noise(clean, noise, torch.full((len(clean),), t, device=clean.device))


def with_floats(pipe, clean, t, noise):
    alpha = pipe.scheduler.alphas_cumprod[t].item()
    return clean.double() * alpha**0.5 + noise.double() * (1 - alpha) ** 0.5


WRONG = {
    check_make_noisy: [
        without_roots,
        alpha_of_one_step,
        places_changed,
        one_minus_the_root,
        root_of_one_only,
        noise_added,
        next_timestep,
        one_picture,
    ],
}
RIGHT = {check_make_noisy: [by_the_scheduler, with_floats]}
