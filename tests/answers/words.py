"""Words: answers that its checker must refuse, and right ones in another form."""


def mean_of_ratios(new, old, real):
    return torch.where(real, (new - old).exp(), 0.0).sum(1) / real.sum(1)


def no_root(new, old, real):
    return torch.where(real, new - old, 0.0).sum(1).exp()


def fillers_too(new, old, real):
    return (new - old).mean(1).exp()


def by_the_width(new, old, real):
    return (torch.where(real, new - old, 0.0).sum(1) / real.shape[1]).exp()


def one_for_all_words(new, old, real):
    return (new - old)[real].mean().exp()


def old_to_new(new, old, real):
    return (torch.where(real, old - new, 0.0).sum(1) / real.sum(1)).exp()


def product_first(new, old, real):
    return torch.where(real, (new - old).exp(), 1.0).prod(1) ** (1 / real.sum(1))


def in_logs(new, old, real):
    return torch.where(real, new - old, 0.0).sum(1) / real.sum(1)


def a_word_at_a_time(new, old, real):
    return [
        float(np.exp(np.mean([a - b for a, b, r in zip(*rows) if r])))
        for rows in zip(new.tolist(), old.tolist(), real.tolist())
    ]


def in_float64(new, old, real):
    logs = (new.double() - old.double()) * real
    return torch.exp(logs.sum(1) / real.double().sum(1))


WRONG = {
    check_word_ratios: [
        mean_of_ratios,
        no_root,
        fillers_too,
        by_the_width,
        one_for_all_words,
        old_to_new,
        product_first,
        in_logs,
    ],
}
RIGHT = {
    check_word_ratios: [a_word_at_a_time, in_float64],
}
