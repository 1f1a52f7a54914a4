"""Lesson 01: answers that its checkers must refuse, and right ones in another form."""

import numpy as np


# ---- symmetry
def up_and_down(images, prompts):
    return -(images - images.flip(-2)).abs().mean((1, 2, 3))


def eight_columns(images, prompts):
    return -(images[..., :8] - images[..., 8:16].flip(-1)).abs().mean((1, 2, 3))


def halves_of_odd_widths(images, prompts):
    half = images.shape[-1] // 2
    return -(images[..., :half] - images[..., half : 2 * half].flip(-1)).abs().mean((1, 2, 3))


def minus_forgotten(images, prompts):
    return (images - images.flip(-1)).abs().mean((1, 2, 3))


def squares(images, prompts):
    return -(images - images.flip(-1)).pow(2).mean((1, 2, 3))


def no_absolute_value(images, prompts):
    return -(images - images.flip(-1)).mean((1, 2, 3))


def summed(images, prompts):
    return -(images - images.flip(-1)).abs().sum((1, 2, 3))


def one_for_the_batch(images, prompts):
    return -(images - images.flip(-1)).abs().mean().expand(len(prompts))


def all_axes_flipped(images, prompts):
    return -(images - images.flip(-1, -2)).abs().mean((1, 2, 3))


def channels_kept(images, prompts):
    return -(images - images.flip(-1)).abs().mean((2, 3))


def as_numpy(images, prompts):
    pictures = images.numpy()
    return -np.abs(pictures - pictures[..., ::-1]).mean((1, 2, 3))


def column_by_column(images, prompts):
    width = images.shape[-1]
    apart = [(images[..., i] - images[..., width - 1 - i]).abs().mean((1, 2)) for i in range(width)]
    return (-sum(apart) / width).tolist()


# ---- named_colour
COLOURS = ('red', 'green', 'blue')


def named(prompts):
    return [[word in p.split() for word in COLOURS] for p in prompts]


def excess(images):
    means = images.mean((2, 3))
    return (3 * means - means.sum(1, keepdim=True)) / 2


def pick(values, chosen):
    return (values * torch.tensor(chosen, dtype=torch.float32)).sum(1)


def by_letters(images, prompts):
    return pick(excess(images), [[word in p for word in COLOURS] for p in prompts])


def between_spaces(images, prompts):
    return pick(excess(images), [[f' {word} ' in p for word in COLOURS] for p in prompts])


def blue_always(images, prompts):
    return excess(images)[:, 2]


def over_all_three(images, prompts):
    means = images.mean((2, 3))
    return pick(means - means.mean(1, keepdim=True), named(prompts))


def over_the_sum(images, prompts):
    means = images.mean((2, 3))
    return pick(2 * means - means.sum(1, keepdim=True), named(prompts))


def the_channel_alone(images, prompts):
    return pick(images.mean((2, 3)), named(prompts))


def blue_first(images, prompts):
    return pick(excess(images).flip(1), named(prompts))


def first_prompt_for_all(images, prompts):
    return pick(excess(images), named(prompts[:1] * len(prompts)))


def colour_of_the_batch(images, prompts):
    means = excess(images).mean(0, keepdim=True).expand(len(prompts), 3)
    return pick(means, named(prompts))


def one_by_one(images, prompts):
    rewards = []
    for image, prompt in zip(images, prompts):
        r, g, b = image.mean((1, 2)).tolist()
        of = {'red': r - (g + b) / 2, 'green': g - (r + b) / 2, 'blue': b - (r + g) / 2}
        rewards.append(sum(of.get(word, 0.0) for word in prompt.split()))
    return rewards


def in_float64(images, prompts):
    chosen = np.array(
        [[f' {word} ' in f' {p} ' for word in COLOURS] for p in prompts], dtype=np.float64
    )
    return (excess(images).double().numpy() * chosen).sum(1)


# ---- standardised
def by_batch(reward, images, prompts):
    reward(images, prompts)
    return lambda i, p: (reward(i, p) - reward(i, p).mean()) / reward(i, p).std()


def mean_only(reward, images, prompts):
    mean = reward(images, prompts).mean()
    return lambda i, p: reward(i, p) - mean


def variance_in_place_of_sd(reward, images, prompts):
    first = reward(images, prompts)
    return lambda i, p: (reward(i, p) - first.mean()) / first.var()


def sd_only(reward, images, prompts):
    first = reward(images, prompts)
    return lambda i, p: reward(i, p) / first.std()


def first_prompts_for_ever(reward, images, prompts):
    first = reward(images, prompts)
    return lambda i, p: (reward(i, prompts[:1] * len(p)) - first.mean()) / first.std()


def reference_again_each_time(reward, images, prompts):
    def new(i, p):
        first = reward(images, prompts)
        return (reward(i, p) - first.mean()) / first.std()

    return new


def two_first_calls(reward, images, prompts):
    mean, std = reward(images, prompts).mean(), reward(images, prompts).std()
    return lambda i, p: (reward(i, p) - mean) / std


def the_rewards_themselves(reward, images, prompts):
    first = reward(images, prompts)
    return (first - first.mean()) / first.std()


def divided_first(reward, images, prompts):
    first = reward(images, prompts)
    return lambda i, p: reward(i, p) / first.std() - first.mean()


def by_n(reward, images, prompts):
    first = np.asarray(reward(images, prompts))
    mean, std = first.mean(), first.std()
    return lambda i, p: [(float(r) - mean) / std for r in reward(i, p)]


class AsClass:
    def __init__(self, reward, images, prompts):
        self.reward, first = reward, score(reward, images, prompts).double()
        self.mean, self.std = first.mean(), first.std()

    def __call__(self, images, prompts):
        return (self.reward(images, prompts) - self.mean) / self.std


WRONG = {
    check_symmetry: [
        up_and_down,
        eight_columns,
        halves_of_odd_widths,
        minus_forgotten,
        squares,
        no_absolute_value,
        summed,
        one_for_the_batch,
        all_axes_flipped,
        channels_kept,
    ],
    check_named_colour: [
        by_letters,
        between_spaces,
        blue_always,
        over_all_three,
        over_the_sum,
        the_channel_alone,
        blue_first,
        first_prompt_for_all,
        colour_of_the_batch,
    ],
    check_standardised: [
        by_batch,
        mean_only,
        variance_in_place_of_sd,
        sd_only,
        first_prompts_for_ever,
        reference_again_each_time,
        two_first_calls,
        the_rewards_themselves,
        divided_first,
    ],
}
RIGHT = {
    check_symmetry: [as_numpy, column_by_column],
    check_named_colour: [one_by_one, in_float64],
    check_standardised: [by_n, AsClass],
}
