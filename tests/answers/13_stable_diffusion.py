"""Lesson 13: answers that its checkers must refuse, and right ones in another form."""


def passes_of(config, backward=2, looking=True, inner=True, window=True, epochs=True, evaluations=2):
    steps, trained = config.num_inference_steps, len(config.random_steps) if window else config.num_inference_steps
    rounds = config.num_inner_epochs if inner else 1
    epoch = config.samples_per_epoch * (steps + (1 + backward) * trained * rounds)
    epoch += looking * config.watch_images * steps
    return (config.num_epochs if epochs else 1) * epoch + looking * evaluations * config.eval_images * steps


def doubled(config): return 2 if config.guidance_scale > 1 else 1


def in_seconds(config, rate): return passes_of(config) * doubled(config) / rate


def times_the_rate(config, rate): return passes_of(config) * doubled(config) * rate / 3600


def backward_as_one(config, rate): return passes_of(config, backward=1) * doubled(config) / rate / 3600


def no_backward(config, rate): return passes_of(config, backward=0) * doubled(config) / rate / 3600


def nothing_looked_at(config, rate): return passes_of(config, looking=False) * doubled(config) / rate / 3600


def evaluated_once(config, rate): return passes_of(config, evaluations=1) * doubled(config) / rate / 3600


def evaluated_every_epoch(config, rate): return config.num_epochs * one_epoch_only(config, rate)


def one_inner_epoch(config, rate): return passes_of(config, inner=False) * doubled(config) / rate / 3600


def every_step_trained(config, rate): return passes_of(config, window=False) * doubled(config) / rate / 3600


def one_epoch_only(config, rate): return passes_of(config, epochs=False) * doubled(config) / rate / 3600


def always_guided(config, rate): return passes_of(config) * 2 / rate / 3600


def times_the_guidance(config, rate): return passes_of(config) * config.guidance_scale / rate / 3600


def guided_in_sampling_alone(config, rate):
    training = passes_of(config) - passes_of(config, backward=-1)
    return (passes_of(config, backward=-1) * doubled(config) + training) / rate / 3600


def hours_by_counting(config, rate):
    passes = sum(config.eval_images for _ in config.etas) * 2
    for _ in range(config.num_epochs):
        passes += config.watch_images * len(config.etas) + config.samples_per_epoch * len(config.etas)
        for _ in range(config.num_inner_epochs): passes += 3 * config.sizes()['pairs_per_epoch']
    return torch.tensor(passes * (1 + (config.guidance_scale > 1)) / (3600 * rate))


def room_of(config, gigabytes, free=.9, cpu=True, checkpointing=True):
    weights = lora / 1000 - (4 * CLIP / 1000 if cpu and config.reward_on_cpu else 0)
    return (free * gigabytes - weights) / (.3 if checkpointing and config.gradient_checkpointing else 2.1)


def power_of_two(room): return 2 ** (int(room).bit_length() - 1) if room >= 1 else 0


def any_number(config, gigabytes): return max(0, int(room_of(config, gigabytes)))


def no_tenth(config, gigabytes): return power_of_two(room_of(config, gigabytes, free=1.))


def clip_always_there(config, gigabytes): return power_of_two(room_of(config, gigabytes, cpu=False))


def no_checkpointing(config, gigabytes): return power_of_two(room_of(config, gigabytes, checkpointing=False))


def at_least_one(config, gigabytes): return max(1, power_of_two(room_of(config, gigabytes)))


def next_power_up(config, gigabytes): return 2 * power_of_two(room_of(config, gigabytes))


def that_of_the_file(config, gigabytes): return config.minibatch_size


def weights_for_nothing(config, gigabytes):
    return power_of_two(.9 * gigabytes / (.3 if config.gradient_checkpointing else 2.1))


def weights_in_thousandths(config, gigabytes): return power_of_two(.9 * gigabytes - lora)


def minibatch_by_doubling(config, gigabytes):
    size, room = 0, torch.tensor(room_of(config, gigabytes))
    while max(1, 2 * size) <= room: size = max(1, 2 * size)
    return torch.tensor(float(size))


WRONG = {
    check_hours: [in_seconds, times_the_rate, backward_as_one, no_backward, nothing_looked_at, evaluated_once,
                  evaluated_every_epoch, one_inner_epoch, every_step_trained, one_epoch_only, always_guided,
                  times_the_guidance, guided_in_sampling_alone],
    check_largest_minibatch: [any_number, no_tenth, clip_always_there, no_checkpointing, at_least_one, next_power_up,
                              that_of_the_file, weights_for_nothing, weights_in_thousandths],
}
RIGHT = {
    check_hours: [hours_by_counting],
    check_largest_minibatch: [minibatch_by_doubling],
}
