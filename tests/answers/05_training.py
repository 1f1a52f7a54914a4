"""Lesson 05: answers that its checkers must refuse, and right ones in another form."""


def one_choice_for_all(samples, num_steps, fraction, generator):
    steps = torch.randperm(num_steps, generator=generator)[: round(fraction * num_steps)]
    return torch.cartesian_prod(steps, samples)


def columns_swapped(samples, num_steps, fraction, generator):
    return some_pairs_solution(samples, num_steps, fraction, generator).flip(1)


def with_replacement(samples, num_steps, fraction, generator):
    count = round(fraction * num_steps)
    steps = torch.randint(num_steps, (len(samples), count), generator=generator)
    return torch.stack([steps.flatten(), samples.repeat_interleave(count)], 1)


def rounded_down(samples, num_steps, fraction, generator):
    count = int(fraction * num_steps)
    steps = torch.stack([torch.randperm(num_steps, generator=generator)[:count] for _ in samples])
    return torch.stack([steps.flatten(), samples.repeat_interleave(count)], 1)


def rows_for_numbers(samples, num_steps, fraction, generator):
    return some_pairs_solution(torch.arange(len(samples)), num_steps, fraction, generator)


def steps_from_one(samples, num_steps, fraction, generator):
    return some_pairs_solution(samples, num_steps, fraction, generator) + torch.tensor([1, 0])


def windows(samples, num_steps, fraction, generator):
    count = round(fraction * num_steps)
    starts = torch.randint(num_steps - count + 1, (len(samples), 1), generator=generator)
    return torch.stack(
        [(starts + torch.arange(count)).flatten(), samples.repeat_interleave(count)], 1
    )


def global_chance(samples, num_steps, fraction, generator):
    return some_pairs_solution(samples, num_steps, fraction, None)


def seed_of_its_own(samples, num_steps, fraction, generator):
    return some_pairs_solution(samples, num_steps, fraction, torch.Generator().manual_seed(0))


def numbers_not_repeated_in_step(samples, num_steps, fraction, generator):
    pairs = some_pairs_solution(samples, num_steps, fraction, generator)
    return torch.stack([pairs[:, 0], samples.repeat(len(pairs) // len(samples))], 1)


def by_sorting_noise(samples, num_steps, fraction, generator):
    order = torch.rand(len(samples), num_steps, generator=generator).argsort(1)[
        :, : round(fraction * num_steps)
    ]
    return torch.stack([order, samples[:, None].expand_as(order)], 2).flatten(0, 1)


def a_list_of_tuples(samples, num_steps, fraction, generator):
    pairs = []
    for number in samples.tolist():
        for step in torch.randperm(num_steps, generator=generator).tolist()[
            : round(fraction * num_steps)
        ]:
            pairs.append((step, number))
    return sorted(pairs)


def an_array(*args):
    return some_pairs_solution(*args).numpy()


def aesthetic_alone(images, prompts):
    return aesthetic(images, prompts)


def similarity_once(images, prompts):
    return aesthetic(images, prompts) + tiny_similarity()(images, prompts)


def wrong_term_weighted(images, prompts):
    return 5 * aesthetic(images, prompts) + tiny_similarity()(images, prompts)


def weighted_mean(images, prompts):
    return kind_reward_solution(images, prompts) / 6


def first_prompt_for_all(images, prompts):
    return aesthetic(images, prompts) + 5 * tiny_similarity()(images, [prompts[0]] * len(prompts))


def prompts_of_the_lesson(images, prompts):
    return aesthetic(images, prompts) + 5 * tiny_similarity()(images, batch.prompts[: len(images)])


def standardised(images, prompts):
    words = tiny_similarity()(images, prompts)
    return aesthetic(images, prompts) + 5 * (words - words.mean())


def one_number(images, prompts):
    return kind_reward_solution(images, prompts).mean()


def a_function(images, prompts):
    return aesthetic(images, prompts) + 5 * tiny_similarity()(images, prompts)


def a_sum_within(images, prompts):
    return WeightedSum(words=(5, tiny_similarity()), look=(1, aesthetic))(images, prompts)


def picture_by_picture(images, prompts):
    return torch.stack(
        [a_function(images[i : i + 1], prompts[i : i + 1])[0] for i in range(len(images))]
    ).double()


def doubled(config):
    return 2 if config.guidance_scale > 1 else 1


def no_backward(config):
    steps = config.num_inference_steps + len(config.random_steps) * config.num_inner_epochs
    return config.samples_per_epoch * steps * doubled(config)


def backward_counts_once(config):
    steps = config.num_inference_steps + 2 * len(config.random_steps) * config.num_inner_epochs
    return config.samples_per_epoch * steps * doubled(config)


def window_forgotten(config):
    steps = config.num_inference_steps * (1 + 3 * config.num_inner_epochs)
    return config.samples_per_epoch * steps * doubled(config)


def window_in_sampling_too(config):
    return (
        config.samples_per_epoch
        * len(config.random_steps)
        * (1 + 3 * config.num_inner_epochs)
        * doubled(config)
    )


def inner_epochs_forgotten(config):
    return forwards_solution(replace(config, num_inner_epochs=1))


def sampled_every_inner_epoch(config):
    return inner_epochs_forgotten(config) * config.num_inner_epochs


def guidance_forgotten(config):
    return forwards_solution(replace(config, guidance_scale=1.0))


def guidance_always(config):
    return forwards_solution(replace(config, guidance_scale=2.0))


def guidance_unless_one(config):
    return guidance_forgotten(config) * (2 if config.guidance_scale != 1 else 1)


def all_epochs(config):
    return forwards_solution(config) * config.num_epochs


def from_sizes(config):
    sampled = config.samples_per_epoch * config.num_inference_steps
    return (sampled + 3 * config.sizes()['pairs_per_epoch'] * config.num_inner_epochs) * doubled(
        config
    )


def by_counting(config):
    total = 0
    for _ in range(config.samples_per_epoch):
        for step in range(config.num_inference_steps):
            total += doubled(config)
            if step in config.random_steps:
                total += 3 * config.num_inner_epochs * doubled(config)
    return total


def a_tensor(config):
    return torch.tensor(float(forwards_solution(config)))


WRONG = {
    check_some_pairs: [
        one_choice_for_all,
        columns_swapped,
        with_replacement,
        rounded_down,
        rows_for_numbers,
        steps_from_one,
        windows,
        global_chance,
        seed_of_its_own,
        numbers_not_repeated_in_step,
    ],
    check_kind_reward: [
        aesthetic_alone,
        similarity_once,
        wrong_term_weighted,
        weighted_mean,
        first_prompt_for_all,
        prompts_of_the_lesson,
        standardised,
        one_number,
    ],
    check_forwards: [
        no_backward,
        backward_counts_once,
        window_forgotten,
        window_in_sampling_too,
        inner_epochs_forgotten,
        sampled_every_inner_epoch,
        guidance_forgotten,
        guidance_always,
        guidance_unless_one,
        all_epochs,
    ],
}
RIGHT = {
    check_some_pairs: [by_sorting_noise, a_list_of_tuples, an_array],
    check_kind_reward: [a_function, a_sum_within, picture_by_picture],
    check_forwards: [from_sizes, by_counting, a_tensor],
}
