"""Normalising rewards: the whole batch, or prompt by prompt with a buffer.

Run: python -m pytest tests/test_advantages.py -n 0
"""

import numpy as np
import pytest
import torch

from ddpo_tutorial.advantages import PerPromptStatTracker, as_array, group_advantages, standardise
from ddpo_tutorial.checks import check_rewards
from ddpo_tutorial.prompts import draw_prompts


def numbers(n, seed=0):
    return np.random.default_rng(seed).normal(5, 2, n)


def test_standardise_is_the_z_score():
    "Variance for standard deviation, or the unbiased one, which is NaN for a single sample."
    values = numbers(50)
    np.testing.assert_allclose(
        standardise(values), (values - values.mean()) / values.std(), rtol=1e-5
    )
    np.testing.assert_allclose(standardise(values, np.array([1.0, 3.0])), values - 2, rtol=1e-5)


def test_few_rewards_use_the_batch():
    "Statistics of a handful of rewards are noise."
    prompts = ['a'] * 3 + ['b'] * 3
    rewards = numbers(6)
    tracker = PerPromptStatTracker(buffer_size=8, min_count=4)
    np.testing.assert_allclose(tracker.update(prompts, rewards), standardise(rewards))
    assert tracker.active == 0


def test_many_rewards_use_their_prompts():
    "An easy prompt must not get all the praise: each prompt has mean 0 and sd 1."
    prompts = np.array(['easy', 'hard'] * 20)
    rewards = numbers(40) + 100 * (prompts == 'easy')
    tracker = PerPromptStatTracker(buffer_size=20, min_count=16)
    advantages = tracker.update(list(prompts), rewards)
    for prompt in ('easy', 'hard'):
        own = advantages[prompts == prompt]
        assert abs(own.mean()) < 1e-9 and abs(own.std() - 1) < 1e-5
    assert tracker.active == 1
    batch = standardise(rewards)  # the fault
    assert batch[prompts == 'easy'].mean() > 0.9


def test_branches_mix():
    "One prompt's branch used for all."
    prompts = ['a'] * 4 + ['b']
    rewards = numbers(5)
    tracker = PerPromptStatTracker(buffer_size=8, min_count=4)
    advantages = tracker.update(prompts, rewards)
    np.testing.assert_allclose(advantages[:4], standardise(rewards[:4]))
    np.testing.assert_allclose(advantages[4], standardise(rewards)[4])
    assert tracker.active == 0.8


def test_threshold_is_min_count():
    "Off by one: exactly min_count rewards are enough."
    tracker = PerPromptStatTracker(buffer_size=4, min_count=4)
    active = []
    for i in range(5):
        tracker.update(['a'], [float(i)])
        active.append(tracker.active)
    assert active == [0, 0, 0, 1, 1]


def test_buffer_forgets():
    "A buffer that grows for ever judges today's samples by the first epoch's."
    tracker = PerPromptStatTracker(buffer_size=3, min_count=1)
    rewards = numbers(10)
    for reward in rewards:
        tracker.update(['a'], [reward])
    assert tracker.stats()['a'] == pytest.approx(
        dict(mean=rewards[-3:].mean(), std=rewards[-3:].std(), count=3)
    )


def test_per_prompt_branch_is_mostly_off_with_published_settings():
    """The published defaults: 397 prompts and 128 samples an epoch hardly ever reach min_count; 45
    and 256 do."""

    def share(num_prompts, samples, epochs=50):
        tracker = PerPromptStatTracker(32, 16)
        rng = np.random.default_rng(0)
        active = []
        for _ in range(epochs):
            prompts = draw_prompts([str(i) for i in range(num_prompts)], samples, rng)
            tracker.update(prompts, np.zeros(samples))
            active.append(tracker.active)
        return np.array(active)

    few = share(397, 128)
    many = share(45, 256)
    assert 0.10 < few.mean() < 0.18 and 40 <= np.argmax(few >= 0.5) <= 48
    assert many.mean() > 0.93 and many[5:].mean() > 0.99


@pytest.mark.parametrize(
    'rewards',
    [
        [1, 2, 3, 9],
        np.array([1, 2, 3, 9]),
        torch.tensor([1, 2, 3, 9]),
        torch.tensor([1.0, 2.0, 3.0, 9.0], requires_grad=True),
    ],
    ids=['list', 'int array', 'int tensor', 'tensor with gradient'],
)
def test_integers_are_not_truncated(rewards):
    "Advantages kept in the rewards' own integer type become 0, 1 and -1."
    advantages = PerPromptStatTracker().update(['a'] * 4, rewards)
    assert advantages.dtype == np.float64
    np.testing.assert_allclose(advantages, standardise(np.array([1.0, 2.0, 3.0, 9.0])))
    assert not np.allclose(advantages, advantages.astype(int))  # the fault


@pytest.mark.parametrize('kind', [list, tuple, np.array])
def test_plain_lists_of_prompts(kind):
    "Comparing a list with a string selects nothing and returns uninitialised memory."
    rewards = numbers(40)
    advantages = PerPromptStatTracker(20, 16).update(kind(['a', 'b'] * 20), rewards)
    for i in (0, 1):
        np.testing.assert_allclose(advantages[i::2], standardise(rewards[i::2]))


@pytest.mark.parametrize(
    'tracker', [PerPromptStatTracker(), PerPromptStatTracker(4, 1)], ids=['batch', 'per prompt']
)
@pytest.mark.parametrize('rewards', [[3.0], [2.0, 2.0, 2.0]], ids=['single', 'equal'])
def test_no_spread_gives_zero(tracker, rewards):
    "Division by a spread of zero, or by a NaN."
    tracker.buffers.clear()
    assert tracker.update(['a'] * len(rewards), rewards).tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize(
    'error, rewards, words',
    [
        (ValueError, torch.zeros(2, 1), r'\(2, 1\) for 2 prompts; expected \(2,\)'),
        (ValueError, [1.0], r'\(1,\) for 2 prompts; expected \(2,\)'),
        (TypeError, np.array(1.0), r'are a ndarray; expected.*2 numbers'),
        (TypeError, 1.0, r'are a float; expected.*2 numbers'),
        (ValueError, [1.0, float('nan')], "is nan for 'an owl'.*1 of 2.*expected finite"),
        (ValueError, np.array([np.inf, np.inf]), "is inf for 'a cat'.*2 of 2"),
    ],
)
def test_bad_rewards_are_refused_before_anything_is_remembered(error, rewards, words):
    """A trailing axis would be kept, a NaN would stay in the buffer: refused, before anything is
    remembered."""
    tracker = PerPromptStatTracker()
    with pytest.raises(error, match=words):
        tracker.update(['a cat', 'an owl'], rewards)
    with pytest.raises(error, match=words):
        check_rewards(rewards, ['a cat', 'an owl'])
    assert tracker.buffers == {}


def test_rewards_are_remembered_first():
    "Our choice: today's rewards count in their own mean, and the whole epoch comes at once."
    prompts = ['a'] * 8
    rewards = numbers(8)
    whole, halves = (PerPromptStatTracker(8, 4) for _ in range(2))
    np.testing.assert_allclose(whole.update(prompts, rewards), standardise(rewards))
    in_parts = np.concatenate(
        [halves.update(prompts[:4], rewards[:4]), halves.update(prompts[4:], rewards[4:])]
    )
    assert whole.stats() == halves.stats() and not np.allclose(in_parts, standardise(rewards))


WAYS = {
    'batch': lambda rewards: PerPromptStatTracker(8, 8).update(list('aabbcc'), rewards),
    'buffer': lambda rewards: PerPromptStatTracker(8, 2).update(list('aabbcc'), rewards),
    'groups': lambda rewards: group_advantages(list('aabbcc'), rewards, 2),
}


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
@pytest.mark.parametrize('unit', [1e-9, 1e-30, 1e-3, 1e9])
def test_units_drop_out(way, unit):
    "An eps of one size for all would leave advantages of 0 to rewards that are as small."
    rewards = numbers(6)
    np.testing.assert_allclose(way(rewards * unit), way(rewards), rtol=1e-4)


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
@pytest.mark.parametrize('value', [0.0, 1e-9, 0.1, 5.3, -1e-38, 1e9])
def test_equal_rewards_of_any_size_give_nothing(way, value):
    assert abs(way([value] * 6)).max() < 1e-8


@pytest.mark.parametrize('largest', [1.0, -1.0, 5.0, -3e5])
def test_eps_is_what_it_says_from_a_size_of_1_on(largest):
    "To the bit: 1e-6 beside the standard deviation."
    rewards = np.array([0.3, largest, 0.9])
    assert (standardise(rewards) == (rewards - rewards.mean()) / (rewards.std() + 1e-6)).all()
    differences = rewards[[0, 1]] - rewards[:2].mean()
    grouped = group_advantages(['a'] * 2, rewards[:2], 2)
    assert (grouped == differences / (differences.std() + 1e-6)).all()


@pytest.mark.parametrize('buffer_size, min_count', [(0, 1), (4, 0), (4, 5)])
def test_bad_sizes(buffer_size, min_count):
    "A min_count above the buffer switches the per-prompt branch off for ever."
    words = (
        f'min_count={min_count}, buffer_size={buffer_size}; expected 1 <= min_count <= buffer_size'
    )
    with pytest.raises(ValueError, match=words):
        PerPromptStatTracker(buffer_size, min_count)


# groups


@pytest.mark.parametrize('size', [2, 3, 8])
@pytest.mark.parametrize('count', [1, 4])
def test_each_is_compared_with_the_others_of_its_group(size, count):
    """By a loop: the mean of the others (the scale takes its factor away), groups as neighbours,
    one scale for all."""
    prompts = [f'animal {i // size}' for i in range(size * count)]
    rewards = numbers(size * count)
    found = group_advantages(prompts, rewards, size)
    wanted = []
    for i, reward in enumerate(rewards):
        others = [rewards[j] for j in range(len(rewards)) if j // size == i // size and j != i]
        wanted.append(reward - np.mean(others))
    np.testing.assert_allclose(found, np.array(wanted) / np.std(wanted), rtol=1e-4)
    np.testing.assert_allclose(group_advantages(prompts, torch.tensor(rewards), size), found)


def test_a_group_without_differences_stays_quiet():
    """The spread of each group by itself would make noise as loud as a signal; easy and hard
    prompts must not matter."""
    prompts = ['a'] * 4 + ['b'] * 4
    rewards = np.array([1.0, 2.0, 3.0, 4.0, 90.0, 90.001, 90.0, 90.0])
    found = group_advantages(prompts, rewards, 4)
    assert abs(found[4:]).max() < 1e-3 < 0.5 < abs(found[:4]).min()
    np.testing.assert_allclose(
        group_advantages(prompts, rewards + np.repeat([0.0, 500.0], 4), 4), found, atol=1e-6
    )


@pytest.mark.parametrize('kind', [list, tuple, np.array])
@pytest.mark.parametrize(
    'prompts, size',
    [
        ('aabb', 1),
        ('aabb', 0),
        ('aabb', -2),  # no groups
        ('aaaa', 3),
        ('aab', 2),
        ('aaa', 4),  # the last group is smaller
        ('abab', 2),
        ('aaab', 2),
        ('abbb', 4),  # different prompts in a group
    ],
)
def test_what_is_no_groups_is_refused(kind, prompts, size):
    "Pictures of other prompts would be compared; a size of 0 would end in a division by zero."
    words = f'size={size}; expected 2 or more, and {len(prompts)} prompts'
    with pytest.raises(ValueError, match=words):
        group_advantages(kind(list(prompts)), numbers(len(prompts)), size)


@pytest.mark.parametrize('kind', [list, tuple, np.array])
def test_one_prompt_may_have_several_groups(kind):
    "Equal neighbours are no fault: a prompt may be drawn twice in an epoch."
    found = group_advantages(kind(list('aaaabb')), [1.0, 3.0, 10.0, 12.0, 5.0, 7.0], 2)
    np.testing.assert_allclose(found, [-1, 1] * 3, rtol=1e-5)


def test_equal_rewards_are_warned_of():
    "Nothing can be learned from them, and no error says so."
    with pytest.warns(UserWarning, match='All 3 rewards are 2: there is nothing to learn'):
        assert as_array(['a', 'b', 'c'], [2, 2, 2]).tolist() == [2.0] * 3
