"""Normalising rewards: the whole batch, or prompt by prompt with a buffer"""
import numpy as np
import pytest
import torch

from ddpo_tutorial.advantages import PerPromptStatTracker, group_advantages, as_rewards, standardise
from ddpo_tutorial.prompts import draw_prompts

def numbers(n, seed=0): return np.random.default_rng(seed).normal(5, 2, n)

def test_standardise_is_the_z_score():
    "Variance for standard deviation, or the unbiased one, which is NaN for a single sample."
    values = numbers(50)
    np.testing.assert_allclose(standardise(values), (values - values.mean()) / values.std(), rtol=1e-5)
    np.testing.assert_allclose(standardise(values, np.array([1., 3.])), values - 2, rtol=1e-5)

def test_few_rewards_use_the_batch():
    "Statistics of a handful of rewards are noise."
    prompts, rewards = ['a'] * 3 + ['b'] * 3, numbers(6)
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
    batch = standardise(rewards) # the fault
    assert batch[prompts == 'easy'].mean() > .9

def test_branches_mix():
    "One prompt's branch used for all."
    prompts, rewards = ['a'] * 4 + ['b'], numbers(5)
    tracker = PerPromptStatTracker(buffer_size=8, min_count=4)
    advantages = tracker.update(prompts, rewards)
    np.testing.assert_allclose(advantages[:4], standardise(rewards[:4]))
    np.testing.assert_allclose(advantages[4], standardise(rewards)[4])
    assert tracker.active == .8

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
    tracker, rewards = PerPromptStatTracker(buffer_size=3, min_count=1), numbers(10)
    for reward in rewards: tracker.update(['a'], [reward])
    assert tracker.stats()['a'] == pytest.approx(dict(mean=rewards[-3:].mean(), std=rewards[-3:].std(), count=3))

def test_pitfall_18_per_prompt_branch_is_mostly_off():
    "The published defaults: 397 prompts and 128 samples an epoch hardly ever reach min_count; 45 and 256 do."
    def share(num_prompts, samples, epochs=50):
        tracker, rng, active = PerPromptStatTracker(32, 16), np.random.default_rng(0), []
        for _ in range(epochs):
            prompts = draw_prompts([str(i) for i in range(num_prompts)], samples, rng)
            tracker.update(prompts, np.zeros(samples))
            active.append(tracker.active)
        return np.array(active)
    few, many = share(397, 128), share(45, 256)
    assert .10 < few.mean() < .18 and 40 <= np.argmax(few >= .5) <= 48
    assert many.mean() > .93 and many[5:].mean() > .99

@pytest.mark.parametrize('rewards', [
    [1, 2, 3, 9], np.array([1, 2, 3, 9]), torch.tensor([1, 2, 3, 9]),
    torch.tensor([1., 2., 3., 9.], requires_grad=True)],
    ids=['list', 'int array', 'int tensor', 'tensor with gradient'])
def test_pitfall_19_integers_are_not_truncated(rewards):
    "Advantages kept in the rewards' own integer type become 0, 1 and -1."
    advantages = PerPromptStatTracker().update(['a'] * 4, rewards)
    assert advantages.dtype == np.float64
    np.testing.assert_allclose(advantages, standardise(np.array([1., 2., 3., 9.])))
    assert not np.allclose(advantages, advantages.astype(int)) # the fault

@pytest.mark.parametrize('kind', [list, tuple, np.array])
def test_pitfall_19_plain_lists_of_prompts(kind):
    "Comparing a list with a string selects nothing and returns uninitialised memory."
    rewards = numbers(40)
    advantages = PerPromptStatTracker(20, 16).update(kind(['a', 'b'] * 20), rewards)
    for i in (0, 1): np.testing.assert_allclose(advantages[i::2], standardise(rewards[i::2]))

@pytest.mark.parametrize('tracker', [PerPromptStatTracker(), PerPromptStatTracker(4, 1)], ids=['batch', 'per prompt'])
@pytest.mark.parametrize('rewards', [[3.], [2., 2., 2.]], ids=['single', 'equal'])
def test_pitfall_19_no_spread_gives_zero(tracker, rewards):
    "Division by a spread of zero, or by a NaN."
    tracker.buffers.clear()
    assert tracker.update(['a'] * len(rewards), rewards).tolist() == [0.] * len(rewards)

@pytest.mark.parametrize('rewards, words', [
    (torch.zeros(2, 1), r'\(2, 1\) for 2 prompts; expected \(2,\)'),
    ([1.], r'\(1,\) for 2 prompts; expected \(2,\)'),
    (1., r'\(\) for 2 prompts'),
    ([1., float('nan')], "'an owl' is nan.*1 of 2.*Check the reward"),
    (np.array([np.inf, np.inf]), "'a cat' is inf.*2 of 2")])
def test_pitfall_19_bad_rewards(rewards, words):
    "A trailing axis would be kept, a NaN would stay in the buffer: refused, before anything is remembered."
    tracker = PerPromptStatTracker()
    with pytest.raises(ValueError, match=words): tracker.update(['a cat', 'an owl'], rewards)
    with pytest.raises(ValueError, match=words): as_rewards(['a cat', 'an owl'], rewards)
    assert tracker.buffers == {}

def test_pitfall_20_rewards_are_remembered_first():
    "Our choice: today's rewards count in their own mean, and the whole epoch comes at once."
    prompts, rewards = ['a'] * 8, numbers(8)
    whole, halves = (PerPromptStatTracker(8, 4) for _ in range(2))
    np.testing.assert_allclose(whole.update(prompts, rewards), standardise(rewards))
    in_parts = np.concatenate([halves.update(prompts[:4], rewards[:4]), halves.update(prompts[4:], rewards[4:])])
    assert whole.stats() == halves.stats() and not np.allclose(in_parts, standardise(rewards))

@pytest.mark.parametrize('buffer_size, min_count', [(0, 1), (4, 0), (4, 5)])
def test_bad_sizes(buffer_size, min_count):
    "A min_count above the buffer switches the per-prompt branch off for ever."
    words = f'min_count={min_count}, buffer_size={buffer_size}; expected 1 <= min_count <= buffer_size'
    with pytest.raises(ValueError, match=words): PerPromptStatTracker(buffer_size, min_count)

# groups

@pytest.mark.parametrize('size', [2, 3, 8])
@pytest.mark.parametrize('count', [1, 4])
def test_each_is_compared_with_the_others_of_its_group(size, count):
    "By a loop: the mean of the others (the scale takes its factor away), groups as neighbours, one scale for all."
    prompts, rewards = [f'animal {i // size}' for i in range(size * count)], numbers(size * count)
    found, wanted = group_advantages(prompts, rewards, size), []
    for i, reward in enumerate(rewards):
        others = [rewards[j] for j in range(len(rewards)) if j // size == i // size and j != i]
        wanted.append(reward - np.mean(others))
    np.testing.assert_allclose(found, np.array(wanted) / np.std(wanted), rtol=1e-4)
    np.testing.assert_allclose(group_advantages(prompts, torch.tensor(rewards), size), found)

def test_a_group_without_differences_stays_quiet():
    "The spread of each group by itself would make noise as loud as a signal; easy and hard prompts must not matter."
    prompts = ['a'] * 4 + ['b'] * 4
    rewards = np.array([1., 2., 3., 4., 90., 90.001, 90., 90.])
    found = group_advantages(prompts, rewards, 4)
    assert abs(found[4:]).max() < 1e-3 < .5 < abs(found[:4]).min()
    np.testing.assert_allclose(group_advantages(prompts, rewards + np.repeat([0., 500.], 4), 4), found, atol=1e-6)
