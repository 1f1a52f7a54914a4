"""What is refused before it can go wrong in silence: pictures, rewards, pairs. Prompts are in
test_pipelines.py.

Run: python -m pytest tests/test_checks.py -n 0
"""

import numpy as np
import pytest
import torch
from helpers import brightness, generator

from ddpo_tutorial.checks import (
    check_config,
    check_images,
    check_names,
    check_pairs,
    check_rewards,
    check_trained,
)
from ddpo_tutorial.configs import Config
from ddpo_tutorial.predictors import Offloaded
from ddpo_tutorial.rewards import WeightedSum, score

PAIR = ['a cat', 'an owl']


def pictures(n=2):
    return torch.rand(n, 3, 64, 64, generator=generator())


def spoilt(value):
    "Two pictures, the second one not finite."
    return torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), value)])


def ramp(low, high):
    return torch.linspace(low, high, 384).view(2, 3, 8, 8)


OVERFLOWED = "'an owl' is not finite.*VAE decoder overflowed: decode in float32"
BAD_IMAGES = {
    'uint8': (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, r'uint8.*\[0, 1\].*255'),
    'list': ([[0.0]], TypeError, 'images is list; expected floats'),
    'array': (np.zeros((2, 3, 8, 8)), TypeError, 'images is float64; expected floats'),
    'no batch': (
        torch.zeros(3, 8, 8),
        ValueError,
        r'\(3, 8, 8\) for 2 prompts; expected \(2, 3, H, W\)',
    ),
    'channels last': (
        torch.zeros(2, 8, 8, 3),
        ValueError,
        r'\(2, 8, 8, 3\).*expected \(2, 3, H, W\)',
    ),
    'one channel': (torch.zeros(2, 1, 8, 8), ValueError, r'\(2, 1, 8, 8\) for 2 prompts'),
    'one too many': (
        torch.zeros(3, 3, 8, 8),
        ValueError,
        r'\(3, 3, 8, 8\) for 2 prompts; .*one image a prompt',
    ),
    '-1 to 1': (ramp(-1, 1), ValueError, r'from -1 to 1; expected \[0, 1\].*images / 2 \+ 0.5'),
    '0 to 255': (ramp(0, 255), ValueError, r'from 0 to 255; expected \[0, 1\]'),
    'nan': (spoilt(float('nan')), ValueError, OVERFLOWED),
    'inf': (spoilt(float('inf')), ValueError, OVERFLOWED),
}


@pytest.mark.parametrize('images, error, words', BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_images_out_of_range(images, error, words):
    """Images in [-1, 1] or [0, 255] scored as if in [0, 1]; a decoder that overflowed, taken for a
    wrong range."""
    for function in (check_images, lambda images, prompts: score(brightness, images, prompts)):
        with pytest.raises(error, match=words):
            function(images, PAIR)


BAD_REWARDS = {
    '(B, 1)': (
        torch.zeros(2, 1),
        ValueError,
        r'shape \(2, 1\) for 2 prompts; expected \(2,\).*squeeze',
    ),
    'array (B, 1)': (
        np.zeros((2, 1)),
        ValueError,
        r'shape \(2, 1\) for 2 prompts; expected \(2,\)',
    ),
    'too many': (torch.zeros(3), ValueError, r'\(3,\) for 2 prompts; expected \(2,\)'),
    'list too short': ([1.0], ValueError, r'shape \(1,\) for 2 prompts; expected \(2,\)'),
    'one number': (
        torch.tensor(1.0),
        ValueError,
        r'\(\) for 2 prompts; expected \(2,\).*Average over pixels',
    ),
    'scores and info': (
        (torch.zeros(2), {}),
        TypeError,
        'are a tuple; expected.*return the scores alone',
    ),
    'scores and scores': ((torch.zeros(2), torch.zeros(2)), TypeError, 'return the scores alone'),
    'by prompt': ({'a cat': 1.0, 'an owl': 2.0}, TypeError, 'are a dict; expected a tensor'),
    'by number': ({0: 1.0, 1: 2.0}, TypeError, 'are a dict; expected a tensor'),
    'a set': ({1.0, 2.0}, TypeError, 'are a set; expected a tensor'),
    'words': (['1', '2'], TypeError, 'are a list; expected a tensor, array or list of 2 numbers'),
    'ragged': ([[1.0], [1.0, 2.0]], TypeError, 'are a list; expected'),
    'None': (None, TypeError, 'are a NoneType; expected a tensor, array or list of 2 numbers'),
    'nan': (
        torch.tensor([1.0, float('nan')]),
        ValueError,
        "nan for 'an owl'.*1 of 2 are not finite",
    ),
    'inf': (
        torch.tensor([float('-inf'), 1.0]),
        ValueError,
        "-inf for 'a cat'.*expected finite",
    ),
}


@pytest.mark.parametrize('rewards, error, words', BAD_REWARDS.values(), ids=BAD_REWARDS)
def test_bad_rewards(rewards, error, words):
    """Rewards that would be broadcast, or poison every advantage; the message names the type or the
    prompt."""

    def broken(images, prompts):
        return rewards

    for function in (
        lambda: check_rewards(rewards, PAIR),
        lambda: score(broken, pictures(), PAIR),
        lambda: WeightedSum(a=(1.0, broken))(pictures(), PAIR),
    ):
        with pytest.raises(error, match=words):
            function()


@pytest.mark.parametrize(
    'prompts, error, words',
    [([], ValueError, 'no prompts.*at least one'), ('ab', TypeError, "the string 'ab'.*a list")],
)
def test_rewards_of_no_prompts(prompts, error, words):
    with pytest.raises(error, match=words):
        check_rewards([1.0, 2.0], prompts)


GOOD_REWARDS = [
    [1.0, 2.0],
    [1, 2],
    (1.0, 2.0),
    (torch.tensor(1.0), np.float32(2)),
    [torch.tensor(1.0), torch.tensor(2.0)],
    np.array([2.0, 1.0])[::-1],
    np.array([1.0, 0.0, 2.0])[::2],
    np.array([1.0, 2.0]),
    np.array([1, 2]),
    torch.tensor([1, 2]),
    torch.tensor([1.0, 2.0]).half(),
    torch.tensor([1.0, 2.0]).double(),
    torch.tensor([1.0, 2.0], requires_grad=True),
]


@pytest.mark.parametrize(
    'rewards', GOOD_REWARDS, ids=lambda r: f'{type(r).__name__} {getattr(r, "dtype", type(r))}'
)
def test_rewards_that_are_taken(rewards):
    "Lists, arrays and whole numbers become a tensor: in double precision, and float32 as scores."
    checked = check_rewards(rewards, PAIR)
    assert checked.dtype == torch.float64
    assert checked.requires_grad == getattr(rewards, 'requires_grad', False)
    result = score(lambda images, prompts: rewards, pictures(), PAIR)
    assert result.dtype == torch.float32
    assert checked.tolist() == result.tolist() == [1.0, 2.0]


def test_nothing_of_the_callers_is_changed():
    "A reward function that works in place, alone and as a term of a sum."

    def careless(images, prompts):
        values = images.mean((1, 2, 3))
        images.zero_()
        prompts.clear()
        return values

    class Careless(torch.nn.Module):
        def forward(self, images, prompts):
            return careless(images, prompts)

    images = pictures()
    prompts = list(PAIR)
    total = WeightedSum(first=(1.0, careless), second=(1.0, brightness))
    for reward, wanted in ((careless, 1), (total, 2), (Offloaded(Careless()), 1)):
        rewards = score(reward, images, prompts)
        torch.testing.assert_close(rewards, wanted * pictures().mean((1, 2, 3)))
    assert torch.equal(images, pictures())
    assert prompts == PAIR


@pytest.mark.parametrize(
    'shapes',
    [((4, 1), (4,)), ((4,), (4, 1)), ((4,), (1,)), ((), ()), ((2, 4), (2, 4))],
)
def test_pairs_that_would_broadcast(shapes):
    "(4, 1) against (4,) makes 16 differences; the message names both and their shapes."
    new, old = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r'\(N,\) tensors of one length.*new.*old'):
        check_pairs(new=new, old=old)


def test_pairs_that_fit():
    check_pairs(a=torch.zeros(4), b=torch.zeros(4), c=torch.zeros(4))


@pytest.mark.parametrize('names, taken', [([], 'a|b'), ('cd', 'a|b'), (['aa', 'x_a'], 'a|b.*')])
def test_names_that_are_free(names, taken):
    check_names(names, taken)
    with pytest.raises(ValueError, match="'b' is the name of another metric"):
        check_names([*names, 'b'], taken)


@pytest.mark.parametrize('held', [[0, 1], [0, 1, 2, 3], [], [0, 1, 3]])
def test_an_optimizer_of_other_weights(held):
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    check_trained(torch.optim.AdamW(weights[:3]), weights[2::-1])
    optimizer = torch.optim.AdamW([weights[i] for i in held] or weights[3:])
    with pytest.raises(ValueError, match='other weights than the pipe'):
        check_trained(optimizer, weights[:3])


def test_a_config_is_a_config():
    check_config(Config())
    with pytest.raises(TypeError, match='config is .*Config.*; expected a Config'):
        check_config(Config)


def test_rewards_beyond_float32_are_refused():
    "They would be infinite as scores."
    with pytest.raises(ValueError, match='1e.39'):
        check_rewards([1e39, 1.0], PAIR)
