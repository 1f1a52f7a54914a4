"""Lesson 06: answers that its checkers must refuse, and right ones in another form."""


def passes(config, n):
    return replace(config, num_epochs=n).forward_passes


def paid(rate, price, budget):
    return budget / price * 3600 * rate


def looking_left_out(config, rate, price, budget):
    return int(paid(rate, price, budget) // (passes(config, 2) - passes(config, 1)))


def share_of_the_whole(config, rate, price, budget):
    return int(config.num_epochs * paid(rate, price, budget) / config.forward_passes)


def looking_every_epoch(config, rate, price, budget):
    return int(paid(rate, price, budget) // passes(config, 1))


def rounded(config, rate, price, budget):
    one, two = passes(config, 1), passes(config, 2)
    return max(0, round((paid(rate, price, budget) - 2 * one + two) / (two - one)))


def one_too_many(config, rate, price, budget):
    return epochs_for_solution(config, rate, price, budget) + 1


def in_seconds(config, rate, price, budget):
    return epochs_for_solution(config, rate, price, budget / 3600)


def without_the_rate(config, rate, price, budget):
    return epochs_for_solution(config, 1, price, budget)


def without_the_price(config, rate, price, budget):
    return epochs_for_solution(config, rate, 3600, budget)


def at_least_one_epoch(config, rate, price, budget):
    return max(1, epochs_for_solution(config, rate, price, budget))


def at_most_those_of_the_config(config, rate, price, budget):
    return min(config.num_epochs, epochs_for_solution(config, rate, price, budget))


def always_guided(config, rate, price, budget):
    return epochs_for_solution(replace(config, guidance_scale=2.0), rate, price, budget)


def as_a_fraction(config, rate, price, budget):
    one, two = passes(config, 1), passes(config, 2)
    return max(0, (paid(rate, price, budget) - 2 * one + two) / (two - one))


def one_after_the_other(config, rate, price, budget):
    epochs = 0
    while passes(config, epochs + 1) / rate / 3600 * price <= budget:
        epochs += 1
    return torch.tensor(epochs)


def room(one, two, gigabytes, free=0.9):
    first, second = sum(one.values()), sum(two.values())
    return (free * gigabytes * 1e9 - 2 * first + second) / (second - first)


def power_of_two(room):
    return 2 ** (int(room).bit_length() - 1) if room >= 1 else 0


def any_number(one, two, gigabytes):
    return max(0, int(room(one, two, gigabytes)))


def no_tenth(one, two, gigabytes):
    return power_of_two(room(one, two, gigabytes, free=1.0))


def at_least_one(one, two, gigabytes):
    return max(1, power_of_two(room(one, two, gigabytes)))


def next_power_up(one, two, gigabytes):
    return 2 * power_of_two(room(one, two, gigabytes))


def weights_again_for_each_pair(one, two, gigabytes):
    return power_of_two(0.9e9 * gigabytes / sum(one.values()))


def weights_for_nothing(one, two, gigabytes):
    return power_of_two(0.9e9 * gigabytes / (sum(two.values()) - sum(one.values())))


def all_activations_of_the_first(one, two, gigabytes):
    return power_of_two((0.9e9 * gigabytes - one['weights'] - one['moments']) / one['activations'])


def in_bytes(one, two, gigabytes):
    return power_of_two(room(one, two, gigabytes / 1e9))


def powers_from_two(one, two, gigabytes):
    return max((2**k for k in range(1, 12) if 2**k <= room(one, two, gigabytes)), default=0)


def minibatch_by_doubling(one, two, gigabytes):
    size = 0
    while max(1, 2 * size) <= room(one, two, gigabytes):
        size = max(1, 2 * size)
    return torch.tensor(float(size))


WRONG = {
    check_epochs_for: [
        looking_left_out,
        share_of_the_whole,
        looking_every_epoch,
        rounded,
        one_too_many,
        in_seconds,
        without_the_rate,
        without_the_price,
        at_least_one_epoch,
        at_most_those_of_the_config,
        always_guided,
        as_a_fraction,
    ],
    check_largest_minibatch: [
        any_number,
        no_tenth,
        at_least_one,
        next_power_up,
        weights_again_for_each_pair,
        weights_for_nothing,
        all_activations_of_the_first,
        in_bytes,
        powers_from_two,
    ],
}
RIGHT = {
    check_epochs_for: [one_after_the_other],
    check_largest_minibatch: [minibatch_by_doubling],
}
