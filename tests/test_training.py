"""The loop: collect, accumulate, update, train, evaluate.

Run: python -m pytest tests/test_training.py -n 0
"""

import copy
import math
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    PREDICTION_TYPES,
    PROMPTS,
    all_pairs,
    brightness,
    calls_of,
    generator,
    gradients,
    micro_pipeline,
    set_scheduler,
    trainable_copy,
    weights,
    without_time,
)
from torch import nn
from torch.distributions import Normal

from ddpo_tutorial import training
from ddpo_tutorial.advantages import PerPromptStatTracker, group_advantages
from ddpo_tutorial.configs import Config, load_config
from ddpo_tutorial.pipelines import add_lora, decode_latents
from ddpo_tutorial.prompts import draw_prompts, fill_template, simple_animals
from ddpo_tutorial.rewards import WeightedSum, jpeg_incompressibility, tiny_aesthetic
from ddpo_tutorial.sampling import rescore
from ddpo_tutorial.schedules import make_schedule
from ddpo_tutorial.training import (
    accumulate,
    clipped_loss,
    collect,
    doubt_about,
    epoch_rng,
    evaluate,
    join_batches,
    metrics_row,
    new_state,
    plan_updates,
    policy_for,
    sample_batch,
    score_function_loss,
    train,
    train_epochs,
    update,
)

SMALL = Config(
    num_epochs=2,
    samples_per_epoch=5,
    sample_batch_size=2,
    num_inference_steps=3,
    updates_per_epoch=3,
    minibatch_size=4,
    learning_rate=1e-3,
    buffer_size=8,
    min_count=2,
)
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, 0.3, -0.1])
OFF = torch.amp.GradScaler('cpu', enabled=False)


def epoch_of(pipe, config=SMALL):
    "A policy, and a batch that it sampled, with advantages."
    policy = policy_for(config, pipe)
    return policy, collect(config, policy, brightness, PROMPTS)._replace(advantages=ADVANTAGES)


def part_of(policy, numbers, config=SMALL):
    "Some of an epoch's pictures, as a process has them, with their advantages."
    batch = collect(config, policy, brightness, [PROMPTS[n] for n in numbers], numbers)
    return batch._replace(advantages=ADVANTAGES[numbers])


def run(config=SMALL, pipe=None, reward=brightness, **kwargs):
    "Train a micro pipeline; the rows and the pipeline."
    pipe = pipe or micro_pipeline()
    return without_time(train(config, pipe, reward, PROMPTS, **kwargs)), pipe


def sgd(config, pipe, lr):
    "A state whose optimizer takes plain steps, so that a step shows its gradient."
    state = new_state(config, pipe)
    state.optimizer = torch.optim.SGD([p for p in pipe.unet.parameters() if p.requires_grad], lr=lr)
    return state


def test_sizes():
    "The arithmetic of batch sizes, for numbers that do not divide."
    sizes = Config(
        num_epochs=4,
        samples_per_epoch=10,
        num_inference_steps=6,
        num_inner_epochs=2,
        updates_per_epoch=4,
    ).sizes()
    assert sizes == dict(
        images=40, updates=32, pairs_per_epoch=60, samples_per_update=2.5, pairs_per_update=15
    )


# a picture is a function of seed, epoch, number and the weights


@pytest.mark.parametrize('pictures', [16, pytest.param(64, marks=pytest.mark.slow)])
def test_evaluate_does_not_depend_on_the_batch_size(tiny, pictures, capsys):
    """The shipped model, in batches of 1, 4 and all: the noise of a picture must not come from its
    neighbours'. What is left is rounding, which ten guided steps make larger: most pixels stay
    within 1e-5, a few of 64 pictures reach 2e-5."""
    prompts, reward = (fill_template(simple_animals()) * 2)[:pictures], tiny_aesthetic()
    one, four, whole = (
        evaluate(Config(sample_batch_size=n), tiny, reward, prompts) for n in (1, 4, pictures)
    )
    for other in (one, four):
        off = (other.images - whole.images).abs()
        scores_off = (other.rewards - whole.rewards).abs()
        with capsys.disabled():
            print(
                f' pixels {off.max():.1e}, scores {scores_off.max():.1e}',
                end='',
            )
        assert off.max() < 5e-5 and (off > 1e-5).float().mean() < 1e-4
        torch.testing.assert_close(other.rewards, whole.rewards, rtol=0, atol=1e-5)


@pytest.mark.parametrize('numbers', [[3], [1, 3], [3, 1, 0]])
def test_a_picture_does_not_depend_on_what_is_sampled_beside_it(micro, numbers):
    policy, whole = epoch_of(micro)
    some = part_of(policy, numbers)
    torch.testing.assert_close(some.images, whole.images[numbers], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        some.trajectory.latents, whole.trajectory.latents[:, numbers], rtol=0, atol=1e-5
    )


def test_seed_epoch_and_number_all_count(micro):
    "Two pictures of one prompt, two epochs, two seeds: four pictures."
    config, prompts = replace(SMALL, sample_batch_size=9), ['a cat'] * 2
    cases = (config, 0), (config, 1), (replace(config, seed=1), 0)
    pictures = torch.cat(
        [
            collect(c, policy_for(c, micro), brightness, prompts, epoch=epoch).images
            for c, epoch in cases
        ]
    )
    assert all(
        not torch.allclose(pictures[i], pictures[j], atol=1e-3) for i in range(6) for j in range(i)
    )


@pytest.mark.parametrize('size', [1, 5, 100])
def test_sample_batch_size_does_not_change_training(size):
    "A matter of memory only; by now AdamW has seen the gradient's rounding."
    rows, other = run()[0], run(replace(SMALL, sample_batch_size=size))[0]
    assert other[0]['reward_mean'] == pytest.approx(rows[0]['reward_mean'], abs=1e-5)
    assert other[1]['reward_mean'] == pytest.approx(rows[1]['reward_mean'], abs=1e-3)


# groups and windows

GROUPS = replace(
    SMALL, samples_per_epoch=6, group_size=3, shared_noise=True, window_start=1, window_size=1
)


@pytest.mark.parametrize('size', [1, 2, 6])
def test_a_group_shares_its_first_noise_and_nothing_else(micro, size):
    "In any batch size; the noise of a group is no picture's own, nor another group's or epoch's."
    prompts = ['a cat'] * 3 + ['a fox'] * 3

    def latents(config, epoch=0):
        return collect(
            config, policy_for(config, micro), brightness, prompts, epoch=epoch
        ).trajectory.latents

    x, alone = (
        latents(replace(GROUPS, sample_batch_size=size)),
        latents(replace(GROUPS, shared_noise=False)),
    )
    for first in (x[0, :3], x[0, 3:], x[1, :3]):
        assert (first - first[0]).abs().max() <= 1e-5  # step 0 is not random
    assert len({round(v.item(), 4) for v in x[2, :, 0, 0, 0]}) == 6
    others = [*alone[0], *latents(GROUPS, 1)[0]]
    assert all(
        (first - other).abs().max() > 0.1
        for first, rest in ((x[0, 0], x[0, 3]), (x[0, 3], x[0, 0]))
        for other in [*others, rest]
    )


@pytest.mark.parametrize('size', [1, 4, 100])
def test_batch_sizes_do_not_change_a_run_of_groups(size):
    rows = run(GROUPS)[0]
    other = run(replace(GROUPS, sample_batch_size=size, minibatch_size=size))[0]
    for a, b in zip(rows, other):
        assert b['reward_mean'] == pytest.approx(a['reward_mean'], abs=1e-3)


def test_an_epoch_of_groups(micro):
    "Each prompt as often as a group is large, next to each other, compared with its group alone."
    epochs = []
    train(
        replace(GROUPS, samples_per_epoch=12),
        micro,
        lambda i, p: torch.tensor([float(len(x)) for x in p]) + brightness(i, p),
        ['a cat', 'a hippopotamus'],
        on_epoch=lambda epoch: epochs.append(
            (epoch.batch.prompts, epoch.rewards, epoch.advantages, epoch.row)
        ),
    )
    for prompts, rewards, advantages, row in epochs:
        assert all(prompts[i] == prompts[i - i % 3] for i in range(12)) and row['per_prompt'] == 1
        np.testing.assert_allclose(advantages, group_advantages(prompts, rewards, 3))
    assert epochs[0][0] != epochs[1][0] or len(set(epochs[0][0])) == 2


@pytest.mark.parametrize('window', [(0, 1), (1, 1), (1, 2), (2, 0)])
def test_one_update_of_a_window_by_hand(micro, window):
    "The random steps alone, their mean as the loss."
    config = replace(
        SMALL, updates_per_epoch=1, max_grad_norm=1e9, window_start=window[0], window_size=window[1]
    )
    _, batch = epoch_of(micro, config)
    pipe, by_hand = trainable_copy(micro), trainable_copy(micro)
    assert sorted(
        {s for p in plan_updates(config, epoch_rng(0, 0)) for s in p[:, 0].tolist()}
    ) == list(config.random_steps)
    before = weights(pipe.unet)
    (found,) = update(
        config, policy_for(config, pipe), sgd(config, pipe, 1.0), batch, epoch_rng(0, 0)
    )
    steps, rows = torch.cartesian_prod(torch.tensor(config.random_steps), torch.arange(5)).T
    log_probs = rescore(policy_for(config, by_hand), batch.trajectory, steps, rows)
    (-(ADVANTAGES[rows] * (log_probs - log_probs.detach()).exp()).mean()).backward()
    wanted = -gradients(by_hand.unet)
    torch.testing.assert_close(
        weights(pipe.unet) - before, wanted, rtol=0, atol=2e-3 * wanted.abs().max().item() + 1e-7
    )
    assert found['ratio'] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    'changes',
    [
        dict(window_start=2),
        dict(group_size=5),
        dict(group_size=5, shared_noise=True, window_size=1),
    ],
)
def test_evaluation_is_the_same_for_every_way_to_train(micro, changes):
    "All steps random, each picture with its own noise: runs can be compared."
    plain, other = (
        evaluate(c, micro, brightness, PROMPTS) for c in (SMALL, replace(SMALL, **changes))
    )
    assert torch.equal(plain.images, other.images)


# collecting
@pytest.mark.parametrize('batch_size', [1, 2, 5, 100])
def test_batches_that_do_not_divide_stay_together(micro, batch_size):
    "Five samples in batches of two: what belongs to a picture stays together."
    policy, batch = epoch_of(micro, replace(SMALL, sample_batch_size=batch_size))
    context = batch.trajectory.context
    assert batch.prompts == PROMPTS and context.text.shape[0] == 5 and context.empty.shape[0] == 1
    assert batch.trajectory.latents.shape == (
        4,
        5,
        4,
        8,
        8,
    ) and batch.trajectory.log_probs.shape == (3, 5)
    with torch.no_grad():
        images = decode_latents(micro, batch.trajectory.latents[-1])
    torch.testing.assert_close(batch.images, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(epoch_of(micro)[1].images, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.rewards, brightness(images, PROMPTS))
    again = accumulate(SMALL, policy, batch, all_pairs(3, 5).T, OFF)
    assert again['approx_kl'] < 1e-10  # every sample is rescored under its own prompt


def test_numbers_and_epoch_have_defaults(micro):
    "The first pictures of the first epoch."
    policy, batch = epoch_of(micro)
    named = collect(SMALL, policy, brightness, PROMPTS, numbers=list(range(5)), epoch=0)
    assert batch.numbers == named.numbers == [0, 1, 2, 3, 4] and torch.equal(
        batch.images, named.images
    )
    assert epoch_of(micro, replace(SMALL, sample_batch_size=100))[1].numbers == batch.numbers


def test_reward_sees_each_picture_with_its_prompt(micro):
    "Prompts and images out of step."
    seen = []

    def reward(images, prompts):
        seen.append((len(images), prompts))
        return brightness(images, prompts)

    collect(SMALL, policy_for(SMALL, micro), reward, PROMPTS)
    assert seen == [(2, PROMPTS[:2]), (2, PROMPTS[2:4]), (1, PROMPTS[4:])]


def test_overlapped_rewards_change_nothing():
    "The same rows and weights."
    (rows, pipe), (other_rows, other) = (
        run(replace(SMALL, overlap_reward=overlap)) for overlap in (False, True)
    )
    assert rows == other_rows and torch.equal(weights(pipe.unet), weights(other.unet))


@pytest.mark.parametrize('overlap, size', [(False, 1), (True, 1), (True, 2), (True, 64)])
def test_overlapped_rewards_are_scored_while_the_next_batch_is_drawn(
    micro, monkeypatch, overlap, size
):
    """The first of two rewards waits until the second batch has begun. Without overlap that would
    be for ever; with it, there is a second batch at any size."""
    begun, in_time = [], []
    changed = threading.Condition()

    def noticed(*args, **kwargs):
        with changed:
            begun.append(args)
            changed.notify_all()
        return sample_batch(*args, **kwargs)

    def patient(images, prompts):
        with changed:
            in_time.append(changed.wait_for(lambda: len(begun) == 2, 60 if overlap else 0.1))
        return brightness(images, prompts)

    monkeypatch.setattr(training, 'sample_batch', noticed)
    config = replace(SMALL, sample_batch_size=size, overlap_reward=overlap)
    collect(config, policy_for(config, micro), patient, PROMPTS[:2])
    assert in_time == [overlap, True]


def test_an_overlapped_reward_may_fail(micro):
    "The error of the thread is the caller's."

    def fails(images, prompts):
        raise ConnectionError('no answer')

    with pytest.raises(ConnectionError, match='no answer'):
        run(replace(SMALL, overlap_reward=True), micro, fails)


HANGS = """
import time
from helpers import micro_pipeline
from ddpo_tutorial.configs import Config
from ddpo_tutorial.runs import Stop
from ddpo_tutorial.training import collect, policy_for

def hangs(images, prompts):
    print('asked', flush=True)
    time.sleep(10_000)

config = Config(num_inference_steps=2, overlap_reward={overlap})
with Stop():
    collect(config, policy_for(config, micro_pipeline()), hangs, ['a cat', 'an owl'])
"""


@pytest.mark.parametrize('overlap', [False, True])
def test_a_reward_that_hangs_is_left_by_two_interrupts(overlap):
    "Python waits for the threads of an executor, at its own end too: that took four."
    script = [sys.executable, '-c', HANGS.format(overlap=overlap)]
    here = Path(__file__).parent
    with subprocess.Popen(script, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout.readline() == b'asked\n'
        for _ in range(2):
            run.send_signal(signal.SIGINT)
            time.sleep(1.5)  # a second one within a second does not count
        try:
            _, said = run.communicate(timeout=120)
        finally:
            run.kill()
    assert said.rstrip().splitlines()[-1].startswith(b'KeyboardInterrupt')


@pytest.mark.parametrize('overlap', [False, True])
@pytest.mark.parametrize(
    'error', [StopIteration, GeneratorExit, StopAsyncIteration, KeyError, SystemExit]
)
def test_whatever_a_reward_raises_ends_the_run(micro, error, overlap):
    "By its name, and not in silence with fewer pictures or epochs."
    config = replace(SMALL, overlap_reward=overlap)
    calls = []

    def raises(images, prompts):
        calls.append(1)
        if len(calls) == 2:
            raise error('no more')
        return brightness(images, prompts)

    for function in (train, evaluate):
        calls.clear()
        with pytest.raises(Exception) as found:
            function(config, micro, raises, PROMPTS)
        assert error.__name__ in repr(found.value) and 'no more' in str(found.value)


def test_prompts_are_encoded_once_an_epoch(micro):
    "The text encoder called again for every minibatch, or for every batch of pictures."
    calls = calls_of(micro.text_encoder)
    run(replace(SMALL, minibatch_size=1), micro)
    assert len(calls) == SMALL.num_epochs


def test_join_is_the_inverse_of_splitting(micro):
    "The sample axis of latents and log-probs is the second."
    policy, whole = epoch_of(micro)
    parts = [part_of(policy, numbers) for numbers in ([0, 1], [2, 3, 4])]
    joined = join_batches(parts, whole.trajectory.context)
    assert joined.prompts == PROMPTS and joined.numbers == list(range(5))
    for part, rows in zip(parts, (slice(0, 2), slice(2, 5))):
        for name in ('latents', 'log_probs'):
            assert torch.equal(
                getattr(joined.trajectory, name)[:, rows], getattr(part.trajectory, name)
            )
        assert torch.equal(joined.rewards[rows], part.rewards)
        assert torch.equal(joined.trajectory.context.text[rows], part.trajectory.context.text)


# gradients


def oracle_loss(pipe, batch, config=SMALL):
    """REINFORCE by hand on a fresh batch: diffusers' step, torch's Normal, mean over samples and
    timesteps."""
    pipe.scheduler.set_timesteps(config.num_inference_steps)
    schedule, log_probs = make_schedule(pipe.scheduler, config.num_inference_steps, config.etas), []
    text, empty = batch.trajectory.context
    for i, t in enumerate(pipe.scheduler.timesteps):
        x, nxt = batch.trajectory.latents[i : i + 2]
        cond, uncond = (pipe.unet(x, t, c).sample for c in (text, empty.repeat(len(x), 1, 1)))
        output = uncond + config.guidance_scale * (cond - uncond)
        mean = pipe.scheduler.step(
            output, t, x, eta=config.eta, variance_noise=torch.zeros_like(x)
        ).prev_sample
        log_probs.append(Normal(mean, schedule.std[i]).log_prob(nxt).mean((1, 2, 3)))
    return -(batch.advantages * torch.stack(log_probs)).mean()


def accumulated(policy, batch, pairs, loss=clipped_loss, **changes):
    "The gradient that `accumulate` leaves, and what it returns."
    policy.pipe.unet.zero_grad()
    found = accumulate(replace(SMALL, **changes), policy, batch, pairs, OFF, loss)
    return gradients(policy.pipe.unet), found


@pytest.fixture
def fresh(micro):
    "A policy, its fresh batch, all pairs, and the oracle's gradient."
    policy, batch = epoch_of(micro)
    micro.unet.zero_grad()
    oracle_loss(micro, batch).backward()
    return policy, batch, all_pairs(3, 5).T, gradients(micro.unet)


@pytest.mark.parametrize('minibatch_size', [1, 4, 7, 15, 1000])
def test_any_minibatch_gives_the_same_gradient(fresh, minibatch_size):
    """Unequal last minibatches weighted like full ones, or a sum over timesteps: against autograd
    on the whole."""
    policy, batch, pairs, wanted = fresh
    gradient, stats = accumulated(policy, batch, pairs, minibatch_size=minibatch_size)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
    assert abs(stats['ratio'] - 1) < 1e-5 and stats['clipfrac'] == 0 and stats['approx_kl'] < 1e-10
    assert stats['loss'].item() == pytest.approx(-ADVANTAGES.mean().item(), abs=1e-5)


def test_equal_weight_for_unequal_minibatches_would_show(fresh):
    "The fault the test above guards against, put in: the mean of the minibatches' means."
    policy, batch, pairs, wanted = fresh
    parts = [accumulated(policy, batch, part)[0] for part in pairs.split(4)]
    assert (torch.stack(parts).mean(0) - wanted).abs().max() > 0.01 * wanted.abs().max()


def test_order_of_pairs_does_not_matter(fresh):
    "Shuffled pairs must carry their log-probs and advantages with them."
    policy, batch, pairs, wanted = fresh
    gradient, _ = accumulated(policy, batch, pairs[torch.randperm(15, generator=generator())])
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())


GAPS = [0, 2, 3]


def some_pairs(numbers):
    "Pairs of all steps and these numbers."
    return torch.cartesian_prod(torch.arange(3), torch.tensor(numbers))


@pytest.mark.parametrize('numbers', [[0, 1, 2, 3, 4], [0, 2], [3]])
def test_numbers_may_have_gaps(micro, numbers):
    """The place of a picture is not its number less the first number: its latents and its advantage
    are those of the same picture."""
    policy = policy_for(SMALL, micro)
    batch = part_of(policy, GAPS)
    gradient, found = accumulated(policy, batch, some_pairs(numbers))
    rows = [row for row, number in enumerate(GAPS) if number in numbers]
    mine = part_of(policy, [GAPS[row] for row in rows])
    micro.unet.zero_grad()
    (oracle_loss(micro, mine) * len(rows) / len(numbers)).backward()
    wanted = gradients(micro.unet)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
    assert found['ratio'] == pytest.approx(len(rows) / len(numbers), abs=1e-5)


def test_rows_by_distance_would_show(micro, monkeypatch):
    """The fault that the test above guards against, put in: it reads picture 3 in place of picture
    2, and nothing complains."""
    policy = policy_for(SMALL, micro)
    batch = part_of(policy, GAPS)
    wanted, _ = accumulated(policy, batch, some_pairs([0, 2]))
    monkeypatch.setattr(torch, 'searchsorted', lambda numbers, pictures: pictures - numbers[0])
    gradient, _ = accumulated(policy, batch, some_pairs([0, 2]))
    assert (gradient - wanted).abs().max() > 0.01 * wanted.abs().max()
    with pytest.raises(IndexError):
        accumulated(policy, batch, some_pairs([3]))


# losses


def own_loss(config, policy, batch, steps, rows):
    """The score function without advantages' signs, with two diagnostics of its own and without
    `approx_kl`."""
    log_probs = rescore(policy, batch.trajectory, steps, rows)
    found = dict(advantage=batch.advantages[rows].mean(), late=(steps > 0).float().mean())
    return -(batch.advantages[rows].abs() * log_probs).mean(), found


def test_what_a_loss_reports_becomes_columns(micro):
    """Under its own names and in its order, weighted by the size of the minibatches; nothing else
    is asked of a loss."""
    epochs = []
    config = replace(SMALL, updates_per_epoch=1)
    rows = train(config, micro, brightness, PROMPTS, loss=own_loss, on_epoch=epochs.append)
    updates = epochs[-1].state.updates
    assert (
        list(rows[0])
        == 'epoch reward_mean reward_std loss advantage late grad_norm per_prompt seconds'.split()
    )
    assert list(updates[0]) == 'epoch update loss advantage late grad_norm'.split()
    for epoch, step in zip(epochs, updates):
        assert step['advantage'] == pytest.approx(epoch.advantages.mean(), abs=1e-6)
        assert step['late'] == pytest.approx(2 / 3)
        assert all(
            epoch.row[name] == step[name] for name in ('loss', 'advantage', 'late', 'grad_norm')
        )
        assert type(step['advantage']) is float and step['grad_norm'] > 0


OURS = 'epoch update loss grad_norm skipped per_prompt seconds reward_mean reward_light'.split()


@pytest.mark.parametrize('name', OURS)
def test_what_a_loss_reports_writes_over_no_column(micro, name):
    "Refused at its first minibatch, when nothing has changed."

    def loss(*given):
        value, found = clipped_loss(*given)
        return value, found | {name: 0.0}

    before = weights(micro.unet)
    with pytest.raises(ValueError, match=f"'{name}' is the name of another metric.*another name"):
        train(SMALL, micro, WeightedSum(light=(1.0, brightness)), PROMPTS, loss=loss)
    assert torch.equal(weights(micro.unet), before)


@pytest.mark.parametrize('chosen', [{0}, {1, 2}, {2}])
def test_some_updates_may_report_what_others_do_not(micro, chosen):
    "The row has the mean of those that do."
    updates = []

    def loss(config, policy, batch, steps, rows):
        value, _ = clipped_loss(config, policy, batch, steps, rows)
        updates.append(len(updates))
        return value, dict(number=updates[-1]) if updates[-1] in chosen else {}

    (row,) = train(
        replace(SMALL, num_epochs=1, minibatch_size=99), micro, brightness, PROMPTS, loss
    )
    assert row['number'] == pytest.approx(sum(chosen) / len(chosen))


def test_first_gradient_of_the_score_function_is_the_clipped_ones(fresh):
    "At ratio 1 the two losses have different values and the same slope."
    policy, batch, pairs, wanted = fresh
    gradient, found = accumulated(policy, batch, pairs, score_function_loss)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
    assert list(found) == ['loss', 'approx_kl', 'clipfrac', 'ratio']
    assert found['loss'].item() == pytest.approx(
        -(ADVANTAGES * batch.trajectory.log_probs).mean().item(), rel=1e-4
    )


def test_the_configs_loss_is_trained_with_unless_another_is_given():
    rows, pipe = run()
    reinforce = replace(SMALL, loss='reinforce')
    named, named_pipe = run(reinforce)
    given, given_pipe = run(loss=score_function_loss)
    assert named == given and torch.equal(weights(named_pipe.unet), weights(given_pipe.unet))
    assert not torch.equal(weights(named_pipe.unet), weights(pipe.unet))
    wins, wins_pipe = run(reinforce, loss=clipped_loss)
    assert wins == rows and torch.equal(weights(wins_pipe.unet), weights(pipe.unet))


@pytest.mark.parametrize('prediction_type', PREDICTION_TYPES)
@pytest.mark.parametrize('guidance_scale', [1.0, 2.0])
@pytest.mark.parametrize('eta', [0.5, 1.0])
def test_first_ratio_is_one(micro, eta, guidance_scale, prediction_type):
    """Before the first update every ratio is 1 and nothing is clipped. The allowance is float32's
    rounding when pairs are grouped otherwise than in sampling: it counts in units of the step's
    standard deviation, which at eta=0.5 is half as large. A ratio that is wrong is off by 1e-4 and
    more."""
    set_scheduler(micro, prediction_type=prediction_type)
    config = replace(
        SMALL, eta=eta, guidance_scale=guidance_scale, updates_per_epoch=1, num_epochs=1
    )
    policy, batch = epoch_of(micro, config)
    ratios = [
        accumulate(config, policy, batch, pair[None], OFF)['ratio'] for pair in all_pairs(3, 5).T
    ]
    assert (torch.stack(ratios) - 1).abs().max() <= 5e-6
    micro.unet.zero_grad()
    row = run(config, micro)[0][0]
    assert row['clipfrac'] == 0 and abs(row['ratio'] - 1) <= 1e-6 and row['approx_kl'] < 1e-11


def test_one_update_never_clips(micro):
    "With one update an epoch the clip range does not matter; with more it does."

    def end(n, clip):
        return weights(
            run(replace(SMALL, updates_per_epoch=n, num_inner_epochs=n, clip_range=clip))[1].unet
        )

    ends = {(n, clip): end(n, clip) for n in (1, 3) for clip in (1e-4, 9.0)}
    assert torch.equal(ends[1, 1e-4], ends[1, 9.0])
    assert not torch.equal(ends[3, 1e-4], ends[3, 9.0])


# updates


@pytest.mark.parametrize('updates, inner', [(1, 1), (2, 1), (3, 2), (5, 1)])
def test_each_pair_is_used_once_an_inner_epoch(updates, inner):
    "Samples lost or used twice where the sizes do not divide: 5 samples in 2 or 3 updates."
    config = replace(SMALL, updates_per_epoch=updates, num_inner_epochs=inner)
    seen, wanted = (
        list(plan_updates(config, epoch_rng(0, 0))),
        sorted(map(tuple, all_pairs(3, 5).T.tolist())),
    )
    assert len(seen) == updates * inner
    for i in range(inner):
        assert (
            sorted(map(tuple, torch.cat(seen[i * updates : (i + 1) * updates]).tolist())) == wanted
        )
    assert all(
        len(set(pairs[:, 1].tolist())) * 3 == len(pairs) for pairs in seen
    )  # a sample's timesteps stay together
    if inner > 1:
        assert not all(torch.equal(a, b) for a, b in zip(seen[:updates], seen[updates:]))


def test_the_plan_is_a_function_of_seed_and_epoch():
    """Other samples in other updates, and other prompts, for another seed or epoch; the same for
    the same."""
    plans = {
        key: torch.cat(list(plan_updates(SMALL, epoch_rng(*key)))).tolist()
        for key in ((0, 0), (0, 1), (1, 0), (1, 1))
    }
    drawn = {key: tuple(draw_prompts(PROMPTS * 9, 20, epoch_rng(*key))) for key in plans}
    assert torch.cat(list(plan_updates(SMALL, epoch_rng(1, 1)))).tolist() == plans[1, 1]
    assert len({str(p) for p in plans.values()}) == len(set(drawn.values())) == 4


def test_the_gradients_of_the_parts_add_up(fresh):
    """What several processes rely on: each takes the pairs of its own pictures, with shares of the
    whole."""
    policy, _, pairs, wanted = fresh
    found = [
        accumulated(policy, part_of(policy, numbers), pairs) for numbers in ([0, 1], [2, 3, 4])
    ]
    torch.testing.assert_close(
        found[0][0] + found[1][0], wanted, rtol=0, atol=1e-3 * wanted.abs().max().item()
    )
    assert found[0][1]['ratio'] + found[1][1]['ratio'] == pytest.approx(1, abs=1e-5)


def test_a_part_without_pairs_adds_nothing(micro):
    "With few samples a process may have none in an update."
    policy = policy_for(SMALL, micro)
    micro.unet.zero_grad()
    found = accumulate(SMALL, policy, part_of(policy, [0, 1]), torch.tensor([[0, 3], [1, 4]]), OFF)
    assert found == {} and all(p.grad is None for p in micro.unet.parameters())


@pytest.mark.parametrize('max_norm', [1e-3, 1e9])
def test_one_update_by_hand(fresh, max_norm):
    """The whole step against autograd, torch's clip and torch's SGD: gradient clip forgotten or
    misplaced, learning rate lost."""
    policy, batch, _, _ = fresh
    pipe = policy.pipe
    config = replace(SMALL, updates_per_epoch=1, max_grad_norm=max_norm, weight_decay=0.1)
    by_hand = trainable_copy(pipe)
    for p in (pipe, by_hand):
        p.unet.zero_grad()
    (stats,) = update(config, policy, sgd(config, pipe, 0.1), batch, epoch_rng(0, 0))
    oracle_loss(by_hand, batch).backward()
    norm = nn.utils.clip_grad_norm_(by_hand.unet.parameters(), max_norm).item()
    before = weights(by_hand.unet)
    torch.optim.SGD(by_hand.unet.parameters(), lr=0.1).step()
    assert stats['grad_norm'] == pytest.approx(norm, rel=1e-3)
    moved, wanted = weights(pipe.unet) - before, weights(by_hand.unet) - before
    torch.testing.assert_close(moved, wanted, rtol=0, atol=2e-3 * wanted.abs().max().item() + 1e-7)
    assert moved.norm().item() == pytest.approx(0.1 * min(norm, max_norm), rel=0.02)


def test_optimizer_has_the_configs_numbers(micro):
    "A learning rate or weight decay that never arrives; frozen weights that are trained after all."
    micro.unet.requires_grad_(False)
    micro.unet.conv_out.requires_grad_(True)
    (group,) = new_state(
        replace(SMALL, learning_rate=0.3, weight_decay=0.2), micro
    ).optimizer.param_groups
    assert (group['lr'], group['weight_decay'], len(group['params'])) == (0.3, 0.2, 2)


def test_old_gradients_do_not_count(micro):
    """Gradients left on the UNet by something else (an interrupted update, a gradient looked at)
    must not enter the first update."""
    clean, dirty = copy.deepcopy(micro.unet), micro
    for p in dirty.unet.parameters():
        p.grad = torch.ones_like(p)
    rows, _ = run(pipe=dirty)
    dirty_weights = weights(dirty.unet)
    micro.unet = clean
    assert run(pipe=micro)[0] == rows and torch.equal(weights(micro.unet), dirty_weights)


# training


def test_same_seed_same_rows():
    "Randomness that does not come from the seed; a seed that does not arrive."
    first, _ = run()
    torch.manual_seed(99)  # must not matter
    assert run()[0] == first
    other, _ = run(replace(SMALL, seed=1))
    assert all(a['reward_mean'] != b['reward_mean'] for a, b in zip(first, other))
    assert first[0]['reward_mean'] != first[1]['reward_mean']  # each epoch has noise of its own


@pytest.mark.parametrize('size', [1, 3, 100])
def test_minibatch_size_does_not_change_training(size):
    "A matter of memory only."
    rows, other = run()[0], run(replace(SMALL, minibatch_size=size))[0]
    for a, b in zip(rows, other):
        for name in ('reward_mean', 'loss'):
            assert b[name] == pytest.approx(a[name], abs=1e-3)


def test_row_holds_what_it_says(micro):
    "Names and values of the metrics, against the epoch that the callback sees."
    epochs = []
    rows = train(SMALL, micro, brightness, PROMPTS, on_epoch=epochs.append)
    assert [e.row for e in epochs] == rows and [row['epoch'] for row in rows] == [0, 1]
    rewards = ['reward_mean', 'reward_std']
    reported = ['loss', 'approx_kl', 'clipfrac', 'ratio', 'grad_norm']
    assert list(rows[0]) == ['epoch', *rewards, *reported, 'per_prompt', 'seconds']
    assert list(epochs[0].state.updates[0]) == ['epoch', 'update', *reported]
    for e in epochs:
        assert e.row['reward_mean'] == pytest.approx(e.batch.rewards.mean().item())
        assert e.row['reward_std'] == pytest.approx(e.batch.rewards.numpy().std(), rel=1e-4)
        assert all(type(v) in (int, float) and np.isfinite(v) for v in e.row.values())
        assert set(e.batch.prompts) <= set(PROMPTS) and len(e.batch.prompts) == 5


def test_every_update_is_noted(micro):
    "One row an optimizer step; the epoch's row is their mean."
    epochs = []
    train(SMALL, micro, brightness, PROMPTS, on_epoch=epochs.append)
    updates = epochs[-1].state.updates
    assert [(u['epoch'], u['update']) for u in updates] == [
        (e, u) for e in range(2) for u in range(3)
    ]
    for e in epochs:
        mine = [u for u in updates if u['epoch'] == e.row['epoch']]
        for name in ('loss', 'approx_kl', 'grad_norm'):
            assert e.row[name] == pytest.approx(np.mean([u[name] for u in mine]))


def test_train_goes_on_from_a_state(micro):
    "A loop that begins again at epoch 0, or makes a new optimizer."
    through = run(replace(SMALL, num_epochs=4))
    state = new_state(SMALL, micro)
    for epochs in (1, 2, 4):
        for epoch in train_epochs(
            replace(SMALL, num_epochs=epochs), micro, brightness, PROMPTS, state=state
        ):
            pass
    assert (
        epoch.state is state
        and without_time(state.rows) == through[0]
        and torch.equal(weights(micro.unet), weights(through[1].unet))
    )


@pytest.mark.parametrize('done', [1, 3])
def test_leaving_the_loop_and_going_on_is_one_go(micro, done):
    "To the bit: rows, updates and weights."
    config = replace(SMALL, num_epochs=4)
    whole = micro_pipeline()
    *_, last = train_epochs(config, whole, brightness, PROMPTS)
    for epoch in train_epochs(config, micro, brightness, PROMPTS):
        if epoch.row['epoch'] == done - 1:
            break
    assert len(epoch.state.rows) == done
    rows = [e.row for e in train_epochs(config, micro, brightness, PROMPTS, state=epoch.state)]
    assert [row['epoch'] for row in rows] == list(range(done, 4))
    assert (
        without_time(epoch.state.rows) == without_time(last.state.rows)
        and epoch.state.updates == last.state.updates
    )
    assert torch.equal(weights(micro.unet), weights(whole.unet))


@pytest.mark.parametrize('done', [1, 2, 3])
def test_on_epoch_ends_a_training_and_the_state_goes_on(micro, done):
    "What it returns else does not count."
    config = replace(SMALL, num_epochs=4)
    whole, whole_pipe = run(config, on_epoch=lambda epoch: 'nothing')
    epochs = []

    def on_epoch(epoch):
        epochs.append(epoch)
        return len(epochs) == done

    rows, _ = run(config, micro, on_epoch=on_epoch)
    state = epochs[-1].state
    assert len(rows) == len(epochs) == len(state.rows) == done
    for _ in train_epochs(config, micro, brightness, PROMPTS, state=state):
        pass
    assert without_time(state.rows) == whole
    assert torch.equal(weights(micro.unet), weights(whole_pipe.unet))


@pytest.mark.parametrize('function', [train, train_epochs])
def test_an_epoch_is_let_go_before_the_next(micro, function):
    "Its latents and pictures would be in memory beside those of the next."
    before, kept = [], []

    def reward(images, prompts):
        kept.extend(picture() is not None for picture in before)
        return brightness(images, prompts)

    def look(epoch):
        before.append(weakref.ref(epoch.batch.images))

    config = replace(SMALL, num_epochs=3)
    if function is train:
        train(config, micro, reward, PROMPTS, on_epoch=look)
    else:
        for epoch in train_epochs(config, micro, reward, PROMPTS):
            look(epoch)
            del epoch
    assert len(before) == 3 and kept and not any(kept)


def test_a_bar_is_shown_unless_there_is_on_epoch(micro, monkeypatch):
    "And never by the generator."
    shown = []

    class Bar:
        def __init__(self, epochs):
            assert len(epochs) == 2

        def update(self, done):
            shown.append(done)

    monkeypatch.setattr(training, 'progress_bar', Bar)
    monkeypatch.setattr(training, 'IN_NOTEBOOK', False)
    monkeypatch.setattr(sys, 'stdout', None)
    run(pipe=micro)  # nobody watches
    monkeypatch.undo()
    monkeypatch.setattr(training, 'progress_bar', Bar)
    monkeypatch.setattr(training, 'IN_NOTEBOOK', True)
    run(pipe=micro, on_epoch=lambda epoch: None)
    for _ in train_epochs(SMALL, micro, brightness, PROMPTS):
        pass
    assert shown == []
    run(pipe=micro)
    assert shown == [0, 1, 2]


def test_train_says_what_it_does_not_read(micro):
    "Its docstring names the settings that are for the command alone, and the columns of a row."
    read = set()

    class Watched(Config):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    small = {field.name: getattr(SMALL, field.name) for field in fields(SMALL)}
    config = Watched(**small)
    read.clear()
    (row, _) = train(config, micro, brightness, PROMPTS)
    *_, columns, settings = train.__doc__.split('\n\n')
    named = re.sub(r'\s', '', settings.split(':')[1]).rstrip('.').split(',')
    assert set(named) == set(small) - read
    assert all(re.search(rf'\b{name}\b', columns) for name in row)


def test_a_run_has_one_schedule_and_checks_once(micro, monkeypatch):
    """The chain is worked out once; prompts are checked when the run begins, and by the encoder
    once an epoch."""
    calls = []

    def counted(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    modules = {
        path: module for path, module in sys.modules.items() if path.startswith('ddpo_tutorial.')
    }
    for path, module in modules.items():
        for name in ('make_schedule', 'check_prompts'):
            if name in vars(module):
                monkeypatch.setattr(module, name, counted(f'{path}.{name}', vars(module)[name]))
    run(replace(SMALL, num_epochs=3), micro)
    counts = {name.removeprefix('ddpo_tutorial.'): calls.count(name) for name in calls}
    assert counts == {
        'sampling.make_schedule': 1,
        'training.check_prompts': 1,
        'pipelines.check_prompts': 3,
    }


@pytest.mark.parametrize('epochs', [0, 1])
def test_non_finite_update_is_not_taken(micro, epochs):
    "NaN must not reach the weights; the error names epoch and update and says what to do."
    state = new_state(SMALL, micro)
    if epochs:
        next(train_epochs(SMALL, micro, brightness, PROMPTS, state=state))
    policy, batch = epoch_of(micro)
    before = weights(micro.unet)
    next(micro.unet.parameters()).register_hook(lambda g: g * float('nan'))
    with pytest.raises(
        FloatingPointError,
        match=f'Epoch {epochs}, update 0: the gradient is not finite.*not taken.*learning_rate',
    ):
        update(SMALL, policy, state, batch, epoch_rng(0, 0))
    assert torch.equal(weights(micro.unet), before)


def with_state(pipe, state):
    "What `update` takes between a configuration and a generator."
    policy, batch = epoch_of(pipe)
    return policy, state, batch


def test_a_scaler_leaves_an_overflowing_step_out_until_that_is_hopeless(micro):
    """In float16 an overflow is the scaler's business: the step is left out and the scale halved. A
    scale of nearly 0 is an error."""
    state, before = new_state(SMALL, micro), weights(micro.unet)
    state.scaler = torch.amp.GradScaler('cpu', init_scale=8.0)
    handle = next(micro.unet.parameters()).register_hook(lambda g: g * float('inf'))
    one = replace(SMALL, updates_per_epoch=1)
    history = update(one, *with_state(micro, state), epoch_rng(0, 0))
    assert torch.equal(weights(micro.unet), before) and state.scaler.get_scale() == 4
    assert not math.isfinite(history[0]['grad_norm'])
    row = metrics_row(0, ADVANTAGES, {}, history)
    assert row['skipped'] == 1 and math.isnan(row['grad_norm'])
    state.scaler = torch.amp.GradScaler('cpu', init_scale=1e-5)
    with pytest.raises(FloatingPointError):
        update(SMALL, *with_state(micro, state), epoch_rng(0, 0))
    handle.remove()


@pytest.mark.parametrize('left_out', [0, 1, 2])
def test_a_row_says_how_many_updates_were_left_out(left_out):
    "And has the mean norm of the others; without such updates there is no column."
    norms = [1.0, 2.0, 6.0]
    norms[:left_out] = [math.inf, math.nan][:left_out]
    history = [dict(loss=0.5, grad_norm=norm) for norm in norms]
    row = metrics_row(0, ADVANTAGES, {}, history)
    assert row['grad_norm'] == sum(norms[left_out:]) / (3 - left_out) and row['loss'] == 0.5
    assert row.get('skipped', 'none') == (left_out or 'none')


def test_a_scaler_changes_nothing_else(micro):
    "Unscaled before the norm is clipped: with and without, the same step."
    ends = []
    for scaler in (OFF, torch.amp.GradScaler('cpu', init_scale=1024.0)):
        pipe = trainable_copy(micro)
        state = sgd(SMALL, pipe, 0.1)
        state.scaler = scaler
        update(SMALL, *with_state(pipe, state), epoch_rng(0, 0))
        ends.append(weights(pipe.unet) - weights(micro.unet))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-3 * ends[0].abs().max().item())


def test_gradients_switched_off_elsewhere_do_not_matter():
    "Some reward models switch them off for the whole program when they are imported."
    rows, pipe = run()
    with torch.no_grad():
        again, other = run()
    assert again == rows and torch.equal(weights(pipe.unet), weights(other.unet))


@pytest.fixture
def restored():
    "Global settings of PyTorch, as they were."
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)


GLOBAL = {
    'float64': lambda: torch.set_default_dtype(torch.float64),
    'bfloat16': lambda: torch.set_default_dtype(torch.bfloat16),
    'no gradients': lambda: torch.set_grad_enabled(False),
    'deterministic': lambda: torch.use_deterministic_algorithms(True),
}


@pytest.mark.parametrize('groups', [False, True])
@pytest.mark.parametrize('setting', GLOBAL.values(), ids=GLOBAL)
def test_global_settings_change_nothing(restored, setting, groups):
    "Somebody else's, for their own model: noise of another dtype is other noise."
    config = replace(GROUPS if groups else SMALL, eta=0.3)
    rows, pipe = run(config, reward=jpeg_incompressibility)
    other = micro_pipeline()
    setting()
    again, _ = run(config, other, reward=jpeg_incompressibility)
    assert again == rows and torch.equal(weights(pipe.unet), weights(other.unet))


def test_the_default_device_is_not_ours(micro, restored):
    "Pictures and gradients; AdamW puts its own counter there, which `meta` cannot hold."
    policy, batch = epoch_of(micro)
    pairs = next(plan_updates(SMALL, epoch_rng(0, 0)))
    gradient, found = accumulated(policy, batch, pairs)
    torch.set_default_device('meta')
    again = sample_batch(SMALL, policy_for(SMALL, micro), batch.trajectory.context, batch, epoch=0)
    torch.testing.assert_close(again.images, batch.images, rtol=0, atol=1e-5)
    same = next(plan_updates(SMALL, epoch_rng(0, 0)))
    other, found_again = accumulated(policy, batch, same)
    assert torch.equal(other, gradient) and found_again == found
    assert torch.equal(training.gather(batch.rewards), batch.rewards)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('lora', [False, True])
def test_products_in_16_bits(dtype, lora):
    """What a GPU does, on a CPU: the weights that are trained stay float32, first ratios are near
    1, and the model learns something."""
    config = replace(SMALL, dtype=dtype, updates_per_epoch=1, clip_range=9.0)
    pipe = micro_pipeline()
    if lora:
        pipe = add_lora(pipe.to(getattr(torch, dtype)))
    before = weights(pipe.unet)
    row, _ = run(config, pipe)[0]
    assert all(p.dtype == torch.float32 for p in pipe.unet.parameters() if p.requires_grad)
    assert abs(row['ratio'] - 1) < 1e-3 and not torch.equal(weights(pipe.unet), before)
    _, batch = epoch_of(pipe, config)
    assert (
        batch.trajectory.latents.dtype
        == batch.trajectory.log_probs.dtype
        == batch.images.dtype
        == torch.float32
    )


OTHERS = {
    'a new pipeline': lambda pipe: micro_pipeline(),
    'LoRA added after': add_lora,
    'frozen after': lambda pipe: (pipe.unet.conv_in.requires_grad_(False), pipe)[1],
    'a copy': trainable_copy,
}


@pytest.mark.parametrize('other', OTHERS.values(), ids=OTHERS)
def test_a_state_of_other_weights_is_refused(micro, other):
    "It would train nothing, or leave gradients to pile up, and say nothing."
    state = new_state(SMALL, micro)
    with pytest.raises(ValueError, match=r'other weights than the pipe.*new_state\(config, pipe\)'):
        train_epochs(SMALL, other(micro), brightness, PROMPTS, state=state)


def test_weights_in_16_bits_are_not_trained(micro):
    "AdamW's steps would be lost in their rounding."
    with pytest.raises(ValueError, match='bfloat16.*expected float32'):
        new_state(SMALL, micro.to(torch.bfloat16))


def test_the_tracker_gets_the_whole_epoch(micro):
    """Normalised batch by batch, identical rewards would get other advantages; and its memory must
    last over epochs."""
    epochs, tracker = [], PerPromptStatTracker(SMALL.buffer_size, SMALL.min_count)
    train(SMALL, micro, brightness, PROMPTS, on_epoch=epochs.append)
    for e in epochs:
        np.testing.assert_allclose(e.advantages, tracker.update(e.batch.prompts, e.batch.rewards))
        assert e.row['per_prompt'] == tracker.active
    assert epochs[-1].row['per_prompt'] > 0


FIRST = 'first ratios of an epoch are not 1.*token merging.*raise clip_range, or use float32'
LARGE = 'too large .*lower learning_rate'
DOUBTS = [
    (0, dict(clipfrac=0.0, ratio=1 + 1e-6, approx_kl=0.0), ''),
    (0, dict(clipfrac=0.01, ratio=1.0), FIRST),
    (0, dict(clipfrac=0.84, ratio=0.9), FIRST),
    (0, dict(ratio=0.9), FIRST),
    (1, dict(clipfrac=0.94, ratio=0.83, approx_kl=0.3), ''),
    (1, dict(clipfrac=1.0, ratio=1.0, approx_kl=0.0), LARGE),
    (2, dict(clipfrac=0.5, ratio=0.2), LARGE),
    (3, dict(approx_kl=1.6e11), LARGE),
    (0, dict(distance=5.0), ''),
]


@pytest.mark.parametrize('number, reported, words', DOUBTS)
def test_what_is_doubtful(number, reported, words):
    "What shipped configurations show is not; a loss that reports nothing is not asked."
    assert re.search(words or '^$', doubt_about(dict(epoch=0, update=number, **reported)))


def merge_tokens(layer, inputs, output):
    "A hook with which a layer answers otherwise at each call."
    return output * torch.empty(()).uniform_(0.9, 1.1)


def doubts_of(config, pipe):
    "The texts of the warnings of a run, whose reward resets what Python has shown."

    def reward(images, prompts):
        with warnings.catch_warnings():
            return brightness(images, prompts)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        train(config, pipe, reward, PROMPTS)
    return [str(warning.message) for warning in caught]


CALM = replace(SMALL, num_epochs=3, learning_rate=1e-6)


def test_a_run_without_faults_warns_of_nothing(micro):
    assert doubts_of(CALM, micro) == []


def test_something_random_in_the_pipeline_is_said_once(micro):
    "Rescored by another network than sampled."
    micro.unet.conv_in.register_forward_hook(merge_tokens)
    (said,) = doubts_of(replace(CALM, learning_rate=1e-9, clip_range=0.1), micro)
    assert re.search(FIRST, said)


@pytest.mark.parametrize('changes', [dict(learning_rate=0.1), dict(eta=0.01, learning_rate=1e-3)])
def test_updates_that_are_too_large_are_said_once(micro, changes):
    said = doubts_of(replace(CALM, clip_range=9.0, **changes), micro)
    assert len(said) == len(set(said)) and any(re.search(LARGE, text) for text in said)


@pytest.mark.parametrize('was_training', [True, False])
def test_unet_stays_in_eval_mode(was_training):
    "Dropout between sampling and training: the first ratio would not be 1."
    pipe = micro_pipeline(dropout=0.2)
    pipe.unet.train(was_training)
    row = run(replace(SMALL, updates_per_epoch=1, num_epochs=1), pipe)[0][0]
    assert not any(m.training for m in pipe.unet.modules())
    assert abs(row['ratio'] - 1) < 1e-6 and row['clipfrac'] == 0


def test_only_the_unet_changes(micro):
    """VAE and text encoder get no gradient and keep their weights, even where they ask for
    gradients; the UNet's all move."""
    others = (micro.vae, micro.text_encoder)
    for part in others:
        part.requires_grad_(True)
    kept, before = (
        [weights(part) for part in others],
        [p.detach().clone() for p in micro.unet.parameters()],
    )
    run(pipe=micro)
    for part, old in zip(others, kept):
        assert torch.equal(weights(part), old) and all(p.grad is None for p in part.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, micro.unet.parameters()))


def test_shipped_model_trains(tiny):
    "The whole loop on the model of the package, with sizes that do not divide."
    pipe = trainable_copy(tiny)
    rows, _ = run(replace(SMALL, num_epochs=1, learning_rate=1e-5, updates_per_epoch=1), pipe)
    assert (
        rows[0]['clipfrac'] == 0 and abs(rows[0]['ratio'] - 1) < 1e-6 and rows[0]['grad_norm'] > 0
    )
    assert not torch.equal(weights(pipe.unet), weights(tiny.unet))


def bad_reward(result):
    "A reward that returns something wrong, or raises it."

    def reward(images, prompts):
        if isinstance(result, Exception):
            raise result
        return result(images, prompts)

    return reward


@pytest.mark.parametrize(
    'result, error, words',
    [
        (RuntimeError('the server is down'), RuntimeError, 'the server is down'),
        (lambda images, prompts: brightness(images, prompts)[:, None], ValueError, r'\(2, 1\)'),
        (lambda images, prompts: images.mean(), ValueError, r'shape \(\)'),
        (lambda images, prompts: brightness(images, prompts) / 0 * 0, ValueError, "nan for 'a "),
        (lambda images, prompts: brightness(images, prompts) / 0, ValueError, "inf for 'a "),
    ],
    ids=['raises', '(B,1)', 'scalar', 'nan', 'inf'],
)
@pytest.mark.parametrize('good_epochs', [0, 1])
def test_bad_reward_stops_before_any_change(micro, result, error, words, good_epochs):
    "A clear error, and the weights of the last whole epoch."
    calls, ends = [], [weights(micro.unet)]

    def reward(images, prompts):
        calls.append(1)
        return (
            brightness(images, prompts)
            if len(calls) <= 3 * good_epochs
            else bad_reward(result)(images, prompts)
        )

    with pytest.raises(error, match=words):
        train(
            SMALL,
            micro,
            reward,
            ['a cat', 'a dog'],
            on_epoch=lambda epoch: ends.append(weights(micro.unet)),
        )
    assert len(ends) == 1 + good_epochs and torch.equal(weights(micro.unet), ends[-1])


@pytest.mark.parametrize(
    'prompts, error, words',
    [
        ([], ValueError, 'no prompts'),
        ('a cat', TypeError, "the string 'a cat'"),
        ([1], TypeError, 'holds 1, a int'),
    ],
)
def test_bad_prompts(micro, prompts, error, words):
    "Nothing to draw from, or letters instead of prompts."
    for function in (train, evaluate):
        with pytest.raises(error, match=words):
            function(SMALL, micro, brightness, prompts)


@pytest.mark.parametrize('config', [dict(num_epochs=1), 'tiny', Config, None], ids=str)
@pytest.mark.parametrize('function', [train, train_epochs, evaluate])
def test_settings_that_are_no_config(micro, function, config):
    with pytest.raises(
        TypeError, match=r'config is .*expected a Config, e.g. load_config\("tiny"\)'
    ):
        function(config, micro, brightness, PROMPTS)


@pytest.mark.parametrize('kind', [list, tuple, np.array])
def test_sequences_of_prompts(micro, kind):
    found = evaluate(SMALL, micro, brightness, kind(PROMPTS))
    assert found.prompts == PROMPTS
    assert torch.equal(found.images, evaluate(SMALL, micro, brightness, PROMPTS).images)
    assert len(train(SMALL, micro, brightness, kind(PROMPTS))) == 2


def test_nothing_to_train(micro):
    "A frozen UNet would run for hours and learn nothing."
    micro.unet.requires_grad_(False)
    with pytest.raises(ValueError, match='none; expected float32'):
        run(pipe=micro)


# evaluation


def test_evaluation_is_reproducible_and_changes_nothing(micro):
    "Before and after must be the same prompts and the same noise."
    before = weights(micro.unet)
    first, again, other = (
        evaluate(SMALL, micro, brightness, PROMPTS, **kwargs) for kwargs in ({}, {}, dict(seed=5))
    )
    assert first.prompts == PROMPTS and first.images.shape == (5, 3, 16, 16)
    assert torch.equal(first.images, again.images) and torch.equal(first.rewards, again.rewards)
    assert not torch.allclose(first.images, other.images, atol=1e-3)
    assert torch.equal(before, weights(micro.unet)) and all(
        p.grad is None for p in micro.unet.parameters()
    )


def test_evaluation_does_not_touch_training(micro):
    "Looking at the model between epochs must not change the run."
    rows, _ = run()
    assert (
        run(pipe=micro, on_epoch=lambda epoch: evaluate(SMALL, micro, brightness, PROMPTS))[0]
        == rows
    )


def test_terms_of_a_sum_have_columns(micro):
    "Each term's mean, unweighted; the weighted sum is the reward."
    reward = WeightedSum(light=(2.0, brightness), size=(-0.5, jpeg_incompressibility))
    for row in train(SMALL, micro, reward, PROMPTS):
        assert row['reward_mean'] == pytest.approx(
            2 * row['reward_light'] - 0.5 * row['reward_size'], rel=1e-5
        )


# learning


@pytest.mark.slow
@pytest.mark.parametrize('name, epochs', [('tiny-original', 2), ('tiny', 4)])
def test_a_reward_rises(tiny, name, epochs):
    "With the sign of the loss, the advantages or the ratio wrong, the score would fall, or stay."
    config, reward, prompts = (
        load_config(name, num_epochs=epochs),
        tiny_aesthetic(),
        fill_template(simple_animals()),
    )
    pipe = trainable_copy(tiny)
    if config.lora_rank:
        add_lora(pipe, config.lora_rank)
    before = evaluate(Config(), pipe, reward, prompts).rewards
    train(config, pipe, reward, prompts)
    after = evaluate(Config(), pipe, reward, prompts).rewards
    assert (after - before).mean() > 0.4 * before.std()


@pytest.mark.parametrize('rank', [0, 2, 8])
def test_a_lora_that_is_not_there(micro, rank):
    "Settings for a LoRA would ruin a whole UNet: their learning rate is far larger."
    if rank:
        add_lora(micro, rank)
    words = rf'lora_rank=4, but .*{[rank] if rank else []} *; .*add_lora\(pipe, 4\)'
    with pytest.raises(ValueError, match=words.replace('[', r'\[', 1).replace(']', r'\]', 1)):
        new_state(replace(SMALL, lora_rank=4), micro)
