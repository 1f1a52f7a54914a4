"""Checkpoints: answers that its checkers must refuse, and right ones in another form."""


def all_since_the_last(k, m):
    return k * m


def whole_epochs_only(k, m):
    return (k - 1) * m / 2


def half_an_epoch(k, m):
    return m / 2


def in_epochs(k, m):
    return k / 2


def one_epoch_more(k, m):
    return (k + 1) * m / 2


def mean_of_many(k, m):
    return torch.linspace(0, k * m, 1001, dtype=torch.float64).mean()


def weights_of(path):
    return torch.load(path, weights_only=True)['weights']


def with_tolerance(a, b):
    x = weights_of(a)
    y = weights_of(b)
    if x.keys() != y.keys():
        return False
    return all(x[n].shape == y[n].shape and torch.allclose(x[n], y[n]) for n in x)


def names_of_the_first(a, b):
    x = weights_of(a)
    y = weights_of(b)
    return all(n in y and torch.equal(x[n], y[n]) for n in x)


def shared_names(a, b):
    x = weights_of(a)
    y = weights_of(b)
    return all(torch.equal(x[n], y[n]) for n in x.keys() & y.keys())


def in_order_of_the_file(a, b):
    x = weights_of(a)
    y = weights_of(b)
    pairs = zip(x.values(), y.values())
    return len(x) == len(y) and all(torch.equal(v, w) for v, w in pairs)


def in_order_with_names(a, b):
    x = weights_of(a)
    y = weights_of(b)
    return list(x) == list(y) and all(torch.equal(x[n], y[n]) for n in x)


def bytes_of_the_files(a, b):
    return a.read_bytes() == b.read_bytes()


def broadcast(a, b):
    x = weights_of(a)
    y = weights_of(b)
    return x.keys() == y.keys() and all((x[n] == y[n]).all() for n in x)


def sums(a, b):
    x = weights_of(a)
    y = weights_of(b)
    totals = [sum(weight.sum() for weight in file.values()) for file in (x, y)]
    return x.keys() == y.keys() and totals[0] == totals[1]


def only_the_first(a, b):
    x = weights_of(a)
    y = weights_of(b)
    n = sorted(x)[-1]
    return x.keys() == y.keys() and torch.equal(x[n], y[n])


def dictionaries(a, b):
    return weights_of(a) == weights_of(b)


def lists_of(path):
    return {name: weight.tolist() for name, weight in weights_of(path).items()}


def by_lists(a, b):
    return torch.tensor(lists_of(a) == lists_of(b))


def in_a_loop(a, b):
    x = weights_of(a)
    y = weights_of(b)
    if set(x) != set(y):
        return False
    for name in x:
        if x[name].shape != y[name].shape or (x[name] != y[name]).any():
            return False
    return True


WRONG = {
    check_expected_loss: [
        all_since_the_last,
        whole_epochs_only,
        half_an_epoch,
        in_epochs,
        one_epoch_more,
    ],
    check_same_weights: [
        with_tolerance,
        names_of_the_first,
        shared_names,
        in_order_of_the_file,
        in_order_with_names,
        bytes_of_the_files,
        broadcast,
        sums,
        only_the_first,
        dictionaries,
    ],
}
RIGHT = {
    check_expected_loss: [mean_of_many],
    check_same_weights: [by_lists, in_a_loop],
}
