"""The example of the page on exercises."""


def square(x):
    return x * x


def half(x):
    return x / 2


def added(x):
    return x + x


WRONG = {check_double: [square, half]}
RIGHT = {check_double: [added]}
