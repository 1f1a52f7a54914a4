"""Reports: answers that its checkers must refuse, and right ones in another form."""

import csv

import numpy as np


def table(folder):
    with (folder / 'metrics.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def of_the_highest(folder, name):
    "The row of the largest number in a column, as words."
    return max(table(folder), key=lambda row: float(row[name]))


def by_words(folder):
    return int(max(table(folder), key=lambda row: row['reward_mean'])['epoch'])


def its_reward(folder):
    return max(float(row['reward_mean']) for row in table(folder))


def counted_from_one(folder):
    return 1 + int(of_the_highest(folder, 'reward_mean')['epoch'])


def the_line(folder):
    return int(np.argmax([float(row['reward_mean']) for row in table(folder)]))


def a_word(folder):
    return of_the_highest(folder, 'reward_mean')['epoch']


def the_last(folder):
    return int(table(folder)[-1]['epoch'])


def widest_spread(folder):
    return int(of_the_highest(folder, 'reward_std')['epoch'])


def by_size(folder):
    return int(max(table(folder), key=lambda row: abs(float(row['reward_mean'])))['epoch'])


def with_numpy(folder):
    rows = np.genfromtxt(folder / 'metrics.csv', delimiter=',', names=True)
    return rows['epoch'][rows['reward_mean'].argmax()]


def in_a_loop(folder):
    lines = [line.split(',') for line in (folder / 'metrics.csv').read_text().splitlines()]
    epoch = lines[0].index('epoch')
    mean = lines[0].index('reward_mean')
    best = None
    for line in lines[1:]:
        if best is None or float(line[mean]) > float(best[mean]):
            best = line
    return torch.tensor(int(best[epoch]))


WRONG = {
    check_best_epoch: [
        by_words,
        its_reward,
        counted_from_one,
        the_line,
        a_word,
        the_last,
        widest_spread,
        by_size,
    ],
}
RIGHT = {check_best_epoch: [with_numpy, in_a_loop]}
