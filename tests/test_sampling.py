"""The DDIM chain against diffusers and torch.distributions, and rescoring against what was stored.

Run: python -m pytest tests/test_sampling.py -n 0
"""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from helpers import (
    PREDICTION_TYPES,
    PROMPTS,
    SD_SCHEDULE,
    all_pairs,
    calls_of,
    generator,
    gradients,
    micro_pipeline,
    rescore_all,
    sample_some,
    set_scheduler,
)
from torch import nn
from torch.distributions import Normal

from ddpo_tutorial.advantages import PerPromptStatTracker, standardise
from ddpo_tutorial.configs import Config
from ddpo_tutorial.pipelines import encode_prompts
from ddpo_tutorial.sampling import (
    Context,
    DDIMPolicy,
    clean_and_noise,
    gaussian_log_prob,
    make_generators,
    make_policy,
    per_sample,
    predict,
    rescore,
    sample,
    step_mean,
)
from ddpo_tutorial.schedules import make_schedule
from ddpo_tutorial.training import Batch, State, clipped_loss, score_function_loss, update

SETTINGS = {
    'sd': dict(),
    'alpha to one': dict(set_alpha_to_one=True),
    'no offset': dict(steps_offset=0),
    'ends in std 0': dict(set_alpha_to_one=True, steps_offset=0),
    'trailing': dict(timestep_spacing='trailing'),
}


def ddim(**changes):
    return DDIMScheduler(**SD_SCHEDULE | changes)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def off_by(policy, trajectory):
    "The largest difference between stored and rescored log-probs."
    with torch.no_grad():
        again = rescore_all(policy, trajectory).view_as(trajectory.log_probs)
    return (again - trajectory.log_probs).abs().max().item()


# the mean, against diffusers


@pytest.mark.parametrize('prediction_type', PREDICTION_TYPES)
@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('settings', SETTINGS.values(), ids=SETTINGS)
def test_mean_is_diffusers(settings, eta, prediction_type):
    "A v-prediction or sample model read as if it predicted noise; any other slip in the mean."
    scheduler = ddim(prediction_type=prediction_type, **settings)
    trailing = scheduler.config.timestep_spacing == 'trailing'
    num_steps = 8 if trailing else 7  # with 7, diffusers lands beside the next start
    schedule = make_schedule(scheduler, num_steps, eta)
    scheduler.set_timesteps(num_steps)
    x = noise(2, 4, 8, 8)
    output = noise(2, 4, 8, 8, seed=1)
    for i, t in enumerate(scheduler.timesteps):
        step = scheduler.step(output, t, x, eta=eta, variance_noise=torch.zeros_like(x))
        ours = step_mean(schedule, i, x, output)
        torch.testing.assert_close(ours, step.prev_sample, rtol=1e-4, atol=1e-4)


def test_prediction_types_differ():
    "The oracle above could not tell the types apart if they agreed."
    x = noise(1, 4, 8, 8)
    output = noise(1, 4, 8, 8, seed=1)
    schedules = [make_schedule(ddim(prediction_type=kind), 7) for kind in PREDICTION_TYPES]
    a, b, c = (step_mean(schedule, 3, x, output) for schedule in schedules)
    assert all((one - other).abs().max() > 0.1 for one, other in [(a, b), (b, c), (a, c)])


@pytest.mark.parametrize('prediction_type', PREDICTION_TYPES)
def test_clean_and_noise_mix_to_x(prediction_type):
    "x = sqrt(alpha) x0 + sqrt(1 - alpha) eps, whatever the model says."
    alpha = torch.tensor(0.3)
    x = noise(2, 4, 8, 8)
    clean, eps = clean_and_noise(x, noise(2, 4, 8, 8, seed=1), alpha, prediction_type)
    mixed = alpha.sqrt() * clean + (1 - alpha).sqrt() * eps
    torch.testing.assert_close(mixed, x, rtol=0, atol=1e-5)


def test_a_batch_of_many_timesteps():
    "Each sample must get its own coefficients."
    schedule = make_schedule(ddim(), 5)
    steps = torch.tensor([3, 0, 4, 3])
    x = noise(4, 4, 8, 8)
    output = noise(4, 4, 8, 8, seed=1)
    together = step_mean(schedule, steps, x, output)
    alone = [step_mean(schedule, int(s), x[[i]], output[[i]]) for i, s in enumerate(steps)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)
    scheduler = ddim()
    scheduler.set_timesteps(5)
    with pytest.raises(Exception):  # the fault: diffusers' step takes one timestep
        scheduler.step(output, scheduler.timesteps[steps], x)


def test_per_sample_shapes():
    "(N,) times (N, C, H, W) would broadcast along the width."
    values = torch.arange(5.0)
    assert per_sample(values, 3).shape == per_sample(values, torch.tensor(3)).shape == ()
    assert per_sample(values, torch.tensor([3, 1])).shape == (2, 1, 1, 1)


# the sampler, against diffusers' own pipeline


def by_diffusers(pipe, prompts, policy, eta, **more):
    "The latents that diffusers' own pipeline makes."
    settings = dict(
        num_inference_steps=len(policy.random),
        guidance_scale=policy.guidance_scale,
        eta=eta,
        output_type='latent',
    )
    return pipe(prompts, **settings, **more).images


@pytest.mark.parametrize('guidance_scale', [1.0, 3.0])
@pytest.mark.parametrize('eta', [0.0, 1.0])
@pytest.mark.parametrize('prediction_type', PREDICTION_TYPES)
def test_same_noise_is_diffusers_own_ddim(micro, prediction_type, eta, guidance_scale):
    "The whole chain: first noise, prompts, guidance, order of the noise, last step."
    set_scheduler(micro, prediction_type=prediction_type)
    policy, trajectory = sample_some(micro, 7, guidance_scale, eta)
    ours = trajectory.latents[-1]
    theirs = by_diffusers(micro, PROMPTS, policy, eta, generator=make_generators(range(5)))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_shipped_model_samples_like_diffusers(tiny):
    "The same on the model of the package, with the first noise given."
    first = noise(2, 4, 16, 16)
    policy = make_policy(tiny, 4, guidance_scale=3.0)
    context = encode_prompts(tiny, PROMPTS[:2])
    ours = sample(policy, context, make_generators(range(2), seed=1), first).latents[-1]
    given = dict(latents=first, generator=make_generators(range(2), seed=1))
    theirs = by_diffusers(tiny, PROMPTS[:2], policy, eta=1.0, **given)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_trajectory_holds_the_whole_path(micro):
    "Shapes, precision, the given noise first, the prompts beside it, no gradient kept."
    context = encode_prompts(micro, PROMPTS)
    first = noise(5, 4, 8, 8)
    policy = make_policy(micro, 3, guidance_scale=2.0)
    trajectory = sample(policy, context, make_generators(range(5)), first)
    latents, log_probs = trajectory.latents, trajectory.log_probs
    assert latents.shape == (4, 5, 4, 8, 8) and log_probs.shape == (3, 5)
    assert policy.schedule.timesteps.tolist() == [667, 334, 1]
    assert torch.equal(latents[0], first) and trajectory.context is context
    assert {x.dtype for x in (latents, log_probs)} == {torch.float32}
    assert not latents.requires_grad and not log_probs.requires_grad


def test_sampling_is_reproducible_and_leaves_no_trace(micro):
    "Randomness from the global generator, or a scheduler changed on the way."
    scheduler = copy.deepcopy(micro.scheduler.__dict__)
    rng_state = torch.get_rng_state()
    first, again, other = (sample_some(micro, seed=seed)[1].latents for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert torch.equal(rng_state, torch.get_rng_state())
    assert str(scheduler) == str(micro.scheduler.__dict__)


def test_noise_is_standard_normal(micro):
    "Steps must be drawn from the Gaussian they are scored by."
    policy, trajectory = sample_some(micro, prompts=['a cat'] * 40)
    wanted = Normal(0.0, 1.0).entropy().item() + policy.schedule.std.log()
    tolerance = 4 * (0.5 / (40 * 256)) ** 0.5
    torch.testing.assert_close(-trajectory.log_probs.mean(1), wanted, rtol=0, atol=tolerance)


def test_eta_zero_is_deterministic(micro):
    "Without noise there is nothing to score, and only the first noise needs a generator."
    first = noise(5, 4, 8, 8)
    context = encode_prompts(micro, PROMPTS)
    policy = make_policy(micro, 4, guidance_scale=2.0, eta=0.0)
    a, b = (sample(policy, context, make_generators(range(5), seed), first) for seed in (0, 1))
    assert torch.equal(a.latents, b.latents)
    assert a.log_probs.shape == (4, 5) and (a.log_probs == 0).all()


# a picture is a function of (seed, epoch, its number)


def latents_of(pipe, numbers):
    "The trajectory's latents of some numbers; a number has its prompt, too."
    policy = make_policy(pipe, 3, guidance_scale=2.0)
    context = encode_prompts(pipe, [PROMPTS[n] for n in numbers])
    return sample(policy, context, make_generators(numbers)).latents


NEIGHBOURS = {'alone': [3], 'another order': [4, 2, 0, 1, 3], 'other neighbours': [1, 1, 3, 1]}


@pytest.mark.parametrize('name', ['micro', 'tiny'])
@pytest.mark.parametrize('numbers', NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_a_picture_does_not_know_its_neighbours(request, name, numbers):
    "One generator for a batch: another batch size, another order, and every picture is another."
    pipe = request.getfixturevalue(name)
    together = latents_of(pipe, range(5))
    alone = latents_of(pipe, numbers)
    torch.testing.assert_close(alone, together[:, numbers], rtol=0, atol=1e-5)
    assert (together[:, 0] - together[:, 2]).abs().max() > 0.1  # one prompt, two numbers


def test_every_number_has_noise_of_its_own():
    """Seed, epoch and number added up or run together: (0, 1, 0) and (0, 0, 1) would share their
    noise; zeros lost, too."""
    seeds = (0, 1, 2**32)
    triples = [(s, epoch, n) for s in seeds for epoch in (0, 1, 10) for n in (0, 1, 10, 100)]
    drawn = {}
    for seed, epoch, number in triples:
        (own,) = make_generators([number], seed, epoch)
        drawn[seed, epoch, number] = torch.randn(8, generator=own)
    assert len({tuple(x.tolist()) for x in drawn.values()}) == len(triples)
    (again,) = make_generators(np.array([100]), seed=2**32, epoch=10)
    assert torch.equal(torch.randn(8, generator=again), drawn[2**32, 10, 100])


WRONG_GENERATORS = {
    'too few': make_generators(range(4)),
    'too many': make_generators(range(6)),
    'bare': generator(),
    'none': None,
    'empty': [],
}


@pytest.mark.parametrize('generators', WRONG_GENERATORS.values(), ids=WRONG_GENERATORS)
def test_wrong_generators(micro, generators):
    """A bare generator would be shared by the batch, and too few of them raise something unreadable
    in diffusers."""
    policy = make_policy(micro, 2, guidance_scale=2.0)
    words = r'generators is .*; expected a list of 5, one a prompt: make_generators'
    with pytest.raises(ValueError, match=words):
        sample(policy, encode_prompts(micro, PROMPTS), generators)


@pytest.mark.parametrize('shape', [(4, 4, 8, 8), (4, 8, 8), (5, 4, 64), (5,), ()])
def test_first_noise_of_another_shape(micro, shape):
    "Noise for four pictures beside five prompts, or without a batch."
    policy = make_policy(micro, 2, guidance_scale=2.0)
    context = encode_prompts(micro, PROMPTS)
    found = ' x '.join(map(str, shape))
    with pytest.raises(ValueError, match=f'first holds {found}; expected 5 x C x H x W, one a'):
        sample(policy, context, make_generators(range(5)), first=noise(*shape))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_first_noise_in_another_precision(micro, dtype):
    "What is stored is float32."
    context = encode_prompts(micro, PROMPTS)
    first = noise(5, 4, 8, 8).to(dtype)
    trajectory = sample(make_policy(micro, 2, 1.0), context, make_generators(range(5)), first)
    assert trajectory.latents.dtype == torch.float32
    assert torch.equal(trajectory.latents[0], first.float())


@pytest.mark.parametrize('prompts', [['a cat'], 'a cat', ('a cat',), {'a cat': 1}], ids=str)
def test_prompts_in_place_of_a_context(micro, prompts):
    "What everybody tries first; it would end in an unreadable error of the UNet."
    policy = make_policy(micro, 2, guidance_scale=2.0)
    words = r'context is .*a cat.*; expected encoded prompts: encode_prompts\(pipe, prompts\)'
    with pytest.raises(TypeError, match=words):
        sample(policy, prompts, make_generators(range(1)))


def test_a_tensor_in_place_of_a_context(micro):
    "What a text encoder returns; the message does not hold all of its numbers."
    text = encode_prompts(micro, PROMPTS).text
    policy = make_policy(micro, 2, guidance_scale=2.0)
    with pytest.raises(TypeError, match='(?s)context is tensor.*expected encoded prompts') as found:
        sample(policy, text, make_generators(range(5)))
    assert len(str(found.value)) < 300


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_an_autocast_around_changes_nothing(micro, dtype):
    "The policy's precision is its own."
    policy = make_policy(micro, 2, guidance_scale=2.0, dtype=dtype)
    context = encode_prompts(micro, PROMPTS)
    alone = sample(policy, context, make_generators(range(5)))
    with torch.autocast('cpu', torch.float16):
        inside = sample(policy, context, make_generators(range(5)))
    assert torch.equal(alone.latents, inside.latents)
    assert torch.equal(alone.log_probs, inside.log_probs)


# log-probabilities

STDS = {'one': torch.tensor(0.7), 'each': torch.tensor([0.02, 0.5, 2.0]).view(3, 1, 1, 1)}


@pytest.mark.parametrize('std', STDS.values(), ids=STDS)
def test_log_prob_is_torch_distributions(std):
    "A slip in the density; value and gradient against torch.distributions.Normal."
    x = noise(3, 4, 8, 8)
    mean = noise(3, 4, 8, 8, seed=1).requires_grad_()
    ours = gaussian_log_prob(x, mean, std)
    oracle = Normal(mean, std).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(ours, oracle)
    our_gradient, theirs = (torch.autograd.grad(y.sum(), mean)[0] for y in (ours, oracle))
    torch.testing.assert_close(our_gradient, theirs)


def test_log_prob_is_a_mean_over_latent_dimensions():
    "A sum grows with the resolution, and overflows the ratio."
    x = noise(2, 4, 8, 8)
    mean = noise(2, 4, 8, 8, seed=1)
    std = torch.tensor(0.5)
    big_x = x.repeat(1, 1, 4, 4)
    big_mean = mean.repeat(1, 1, 4, 4)
    big = gaussian_log_prob(big_x, big_mean, std)
    torch.testing.assert_close(big, gaussian_log_prob(x, mean, std))

    def total(a, b):  # the fault
        return Normal(b, std).log_prob(a).sum((1, 2, 3))

    assert (total(big_x, big_mean) / total(x, mean) > 15).all()
    assert ((total(big_x, big_mean + 1) - total(big_x, big_mean)).exp() == 0).any()


def test_last_step_without_noise(micro):
    """A std of 0 gives infinite log-probs, or explosive ones where it is clamped.
    A deterministic step has log-prob 0 and no gradient."""
    set_scheduler(micro, steps_offset=0, set_alpha_to_one=True)
    policy, trajectory = sample_some(micro)
    std = policy.schedule.std
    assert std[-1] == 0 and (std[:-1] > 0).all()
    assert trajectory.log_probs.isfinite().all() and (trajectory.log_probs[-1] == 0).all()
    last = torch.full((5,), 3), torch.arange(5)
    rescore_all(policy, trajectory, last).sum().backward()
    assert (gradients(micro.unet) == 0).all()
    micro.unet.zero_grad()
    rescore_all(policy, trajectory).sum().backward()
    assert gradients(micro.unet).isfinite().all() and gradients(micro.unet).abs().sum() > 0


# rescoring


@pytest.mark.parametrize('prediction_type', PREDICTION_TYPES)
@pytest.mark.parametrize('guidance_scale', [1.0, 3.0])
@pytest.mark.parametrize('eta', [0.5, 1.0])
def test_rescoring_returns_the_stored_log_probs(micro, eta, guidance_scale, prediction_type):
    """The most valuable identity: sampling and training must agree on every step, in one batch of
    all timesteps."""
    set_scheduler(micro, prediction_type=prediction_type)
    assert off_by(*sample_some(micro, 4, guidance_scale, eta)) < 2e-5


@pytest.mark.parametrize('guidance_scale', [1.0, 2.0])
def test_rescoring_the_shipped_model(tiny, guidance_scale):
    "The same on the model of the package."
    assert off_by(*sample_some(tiny, 3, guidance_scale, prompts=PROMPTS[:2])) < 2e-5


def other_policy(policy, fault):
    "One that disagrees in one thing with the one that sampled."
    schedule = policy.schedule
    if fault == 'guidance':
        return replace(policy, guidance_scale=3.0)
    if fault == 'eta':
        return make_policy(policy.pipe, 4, policy.guidance_scale, eta=0.5)
    if fault == 'timestep':
        shifted = schedule._replace(timesteps=schedule.timesteps.roll(-1))
        return replace(policy, schedule=shifted)
    if fault == 'prediction type':
        return replace(policy, schedule=schedule._replace(prediction_type='v_prediction'))
    if fault == 'bfloat16':
        return replace(policy, dtype=torch.bfloat16)
    return policy


FAULTS = 'guidance, eta, timestep, prediction type, bfloat16, prompts, next latents, weights'


@pytest.mark.parametrize('fault', FAULTS.split(', '))
def test_rescoring_notices(micro, fault):
    "Each, forgotten or mixed up between sampling and training, must show in the log-probs."
    policy, trajectory = sample_some(micro)
    context, latents, log_probs = trajectory
    if fault == 'prompts':
        trajectory = trajectory._replace(context=context._replace(text=context.text.roll(1, 0)))
    if fault == 'next latents':
        latents[1:] = latents[1:].roll(1, 1)
    if fault == 'weights':
        micro.unet.conv_out.bias.data += 0.01
    assert off_by(other_policy(policy, fault), trajectory) > 1e-4


@pytest.mark.parametrize('guidance_scale', [1.0, 2.0])
def test_products_in_bfloat16_are_the_same_twice(micro, guidance_scale):
    "The policy enters autocast, in sampling and in rescoring; what is stored is float32."
    policy = make_policy(micro, 4, guidance_scale, dtype=torch.bfloat16)
    context = encode_prompts(micro, PROMPTS)
    trajectory = sample(policy, context, make_generators(range(5)))
    assert {x.dtype for x in trajectory[1:]} == {torch.float32}
    for step in range(4):  # batches as in sampling: in 16 bits other sizes round otherwise
        pairs = torch.full((5,), step), torch.arange(5)
        with torch.no_grad():
            again = rescore_all(policy, trajectory, pairs)
        torch.testing.assert_close(again, trajectory.log_probs[step], rtol=0, atol=2e-5)
    precise = sample_some(micro, 4, guidance_scale)[1]
    assert (trajectory.latents - precise.latents).abs().max() > 1e-4


def test_one_permutation_for_all(micro):
    "Shuffled pairs: latents, next latents, timesteps and log-probs in the same order."
    policy, trajectory = sample_some(micro)
    step, row = all_pairs(4, 5)[:, torch.randperm(20, generator=generator())]
    stored = trajectory.log_probs[step, row]
    with torch.no_grad():
        again = rescore(policy, trajectory, step, row)
        torch.testing.assert_close(again, stored, rtol=0, atol=2e-5)
        mixed = rescore(policy, trajectory, step.flip(0), row)  # the fault
    assert (mixed - stored).abs().max() > 0.01


def test_stored_latents_are_not_rounded(micro):
    """Scoring the float32 sample and storing it in half precision moves the last step's ratio
    beyond the clip range."""
    policy, trajectory = sample_some(micro)
    rounded = trajectory._replace(latents=trajectory.latents.half().float())

    def away(trajectory):
        with torch.no_grad():
            last = rescore_all(policy, trajectory).view(4, 5)[-1]
        return (last - trajectory.log_probs[-1]).exp().sub(1).abs().mean()

    assert away(trajectory) < 1e-5 and away(rounded) > 1e-4


def test_dropout_is_noticed():
    "A UNet in training mode rescores what another network sampled."
    pipe = micro_pipeline(dropout=0.2)
    policy, trajectory = sample_some(pipe)
    assert off_by(policy, trajectory) < 2e-5
    pipe.unet.train()  # the fault
    assert off_by(policy, trajectory) > 1e-3


@pytest.mark.parametrize('guidance_scale', [1.0, 2.0])
def test_rescored_gradient_is_autograds(micro, guidance_scale):
    """The gradient through mean and guidance, against diffusers' step and torch's Normal, one
    timestep at a time."""
    policy, trajectory = sample_some(micro, 3, guidance_scale)
    context, latents, _ = trajectory
    micro.scheduler.set_timesteps(3)
    rescore_all(policy, trajectory).sum().backward()
    ours = gradients(micro.unet)
    micro.unet.zero_grad()
    for i, t in enumerate(micro.scheduler.timesteps):
        x, following = latents[i : i + 2]
        texts = (context.text, context.empty.repeat(5, 1, 1))
        cond, uncond = (micro.unet(x, t, text).sample for text in texts)
        output = uncond + guidance_scale * (cond - uncond)
        silence = torch.zeros_like(x)
        mean = micro.scheduler.step(output, t, x, eta=1.0, variance_noise=silence).prev_sample
        log_prob = Normal(mean, policy.schedule.std[i]).log_prob(following)
        log_prob.mean((1, 2, 3)).sum().backward()
    theirs = gradients(micro.unet)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 * ours.abs().max().item())


def test_eta_zero_has_no_log_prob(micro):
    "Training without noise: an error, not a division by zero."
    policy, trajectory = sample_some(micro, eta=0.0)
    assert (trajectory.log_probs == 0).all()
    with pytest.raises(ValueError, match='No step.*eta=0.*none has a log-probability.*eta > 0'):
        rescore_all(policy, trajectory)


# guidance


class TextUNet(nn.Module):
    "Says weight times the mean of its text, so that guidance and its gradient are done by hand."

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, t, text):
        output = self.weight * text.mean((1, 2)).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=output.expand_as(x))


GUIDED = [(0.0, 6.0, 3.0), (1.0, 6.0, 3.0), (2.0, 10.0, 5.0), (5.0, 22.0, 11.0)]


@pytest.mark.parametrize('scale, value, gradient', GUIDED)
def test_guidance_and_its_gradient(scale, value, gradient):
    "The branches swapped, or the unconditional one detached: empty 1, text 3, weight 2."
    unet = TextUNet()
    x = noise(2, 4, 8, 8)
    context = Context(torch.full((2, 3, 4), 3.0), torch.ones(1, 3, 4))
    out = predict(unet, x, torch.tensor(5), context, scale)
    assert out.shape == x.shape and (out == value).all()
    found = torch.autograd.grad(out.mean(), unet.weight)[0].item()
    assert found == pytest.approx(gradient)
    assert scale <= 1 or 3 * scale != gradient  # the fault: detached


@pytest.mark.parametrize('guidance_scale, rows', [(0.0, 5), (1.0, 5), (1.5, 10)])
def test_no_guidance_costs_no_second_pass(micro, guidance_scale, rows):
    "At a scale of at most 1 the batch must not be doubled."
    calls = calls_of(micro.unet)
    policy, trajectory = sample_some(micro, 2, guidance_scale)
    with torch.no_grad():
        rescore_all(policy, trajectory)
    assert [len(x) for x in calls] == [rows, rows, 2 * rows]


# random steps in a window

WINDOWS = [
    [1.0, 1.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 1.0, 1.0, 0.0],
    [0.0, 0.5, 1.0, 0.0, 0.2],
    [0.0, 0.0, 0.0, 0.0, 1.0],
]


@pytest.mark.parametrize('etas', WINDOWS, ids=str)
@pytest.mark.parametrize('guidance_scale', [1.0, 2.0])
def test_steps_outside_the_window_are_no_actions(micro, etas, guidance_scale):
    """They are plain DDIM, without noise, log-prob and gradient; in it everything is as ever,
    rescoring above all."""
    policy, trajectory = sample_some(micro, 5, guidance_scale, etas)
    inside = torch.tensor(etas) > 0
    assert policy.random == inside.tolist()
    assert (trajectory.log_probs[inside] != 0).all() and (trajectory.log_probs[~inside] == 0).all()
    assert off_by(policy, trajectory) < 2e-5
    still = make_policy(micro, 5, guidance_scale, eta=0.0)
    for i in range(5):
        micro.unet.zero_grad()
        step = torch.full((5,), i), torch.arange(5)
        rescore_all(policy, trajectory, step).sum().backward()
        assert (gradients(micro.unet).abs().sum() > 0) == inside[i]
        with torch.no_grad():
            deterministic, _ = still.gaussian(i, trajectory.latents[i], trajectory.context)
        is_ddim = torch.allclose(trajectory.latents[i + 1], deterministic, atol=1e-5)
        assert is_ddim == (not inside[i])


@pytest.mark.parametrize('eta', [0.0, 0.3, 1.0])
def test_a_number_for_each_step_samples_as_a_number_for_all(micro, eta):
    many, one = (sample_some(micro, 6, eta=e)[1].latents for e in ([eta] * 6, eta))
    assert torch.equal(many, one)


class OneWeight(nn.Module):
    "A UNet that says theta times x, for latents of one number."

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.as_tensor(theta))
        self.config = SimpleNamespace(sample_size=1, in_channels=1)

    def forward(self, x, t, text):
        return SimpleNamespace(sample=self.theta * x)


def exact_parts(schedule, theta):
    """d E[x_0^2] / d theta of a chain x -> m x + std z, a part for each step, by the recursion of
    its variance."""
    thetas = torch.full((len(schedule.std),), theta, requires_grad=True)
    variance = torch.tensor(1.0)
    one = torch.ones(1, 1, 1, 1)
    for i, std in enumerate(schedule.std):
        factor = step_mean(schedule, i, one, thetas[i] * one).sum()
        variance = factor**2 * variance + std**2
    return torch.autograd.grad(variance, thetas)[0]


ETAS = [[1.0] * 4, [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.7, 0.0]]


@pytest.mark.parametrize('etas', ETAS, ids=str)
def test_the_policy_gradient_is_exact_over_the_random_steps(etas, theta=0.5, n=40_000):
    """And over no other: sampled by `sample`, scored by `rescore`, against a chain whose gradient
    can be written down."""
    pipe = SimpleNamespace(unet=OneWeight(theta), scheduler=ddim(), device=torch.device('cpu'))
    policy = make_policy(pipe, 4, guidance_scale=1.0, eta=etas)
    context = Context(torch.zeros(n, 1, 1), torch.zeros(1, 1, 1))
    trajectory = sample(policy, context, make_generators(range(n)))
    # a weight for each pair, so that each has its gradient
    pipe.unet = OneWeight(torch.full((4 * n, 1, 1, 1), theta))
    log_probs = rescore_all(policy, trajectory)
    score = torch.autograd.grad(log_probs.sum(), pipe.unet.theta)[0].view(4, n).sum(0)
    rewards = trajectory.latents[-1].flatten() ** 2
    terms = (rewards - rewards.mean()) * score
    error = terms.std() / n**0.5
    parts = exact_parts(policy.schedule, theta)
    assert abs(terms.mean() - parts[torch.tensor(etas) > 0].sum()) < 4 * error
    if not all(etas):
        assert abs(terms.mean() - parts.sum()) > 2 * error


# a policy that has nothing to do with diffusion

TARGET = torch.tensor([1.0, -0.5])
OFFSETS = torch.tensor([[0.4, 0.1], [-0.2, 0.5]])  # of two "prompts"
WEIGHT = [[0.6, -0.3], [0.2, 0.5]]


class LinearChain:
    "Three steps of two numbers, x -> weight x + text + std z: the members of a policy, no more."

    def __init__(self):
        self.weight = nn.Parameter(torch.tensor(WEIGHT))
        self.random = [True] * 3
        self.std = torch.tensor([0.8, 0.6, 0.5])

    def first_latents(self, generators):
        return randn_tensor((len(generators), 2, 1, 1), generators)

    def gaussian(self, steps, x, context):
        mean = x.flatten(1) @ self.weight.T + context.text[:, 0]
        return mean.view_as(x), per_sample(self.std, steps)


def expected_reward(chain):
    "-E|x - target|^2 of both prompts, with gradient, by the recursion of mean and covariance."
    total = 0.0
    for offset in OFFSETS:
        mean = torch.zeros(2)
        covariance = torch.eye(2)
        for std in chain.std:
            mean = chain.weight @ mean + offset
            covariance = chain.weight @ covariance @ chain.weight.T + std**2 * torch.eye(2)
        total = total - covariance.trace() - (mean - TARGET).square().sum()
    return total / len(OFFSETS)


def sampled_batch(chain, count, epoch, normalise):
    "Half of the pictures of each prompt, with their advantages."
    text = OFFSETS.repeat(count // 2, 1)[:, None]  # (count, 1, 2)
    context = Context(text, torch.zeros(1, 1, 2))
    trajectory = sample(chain, context, make_generators(range(count), epoch=epoch))
    rewards = -(trajectory.latents[-1].flatten(1) - TARGET).square().sum(1)
    advantages = normalise(rewards)
    prompts = ['left', 'right'] * (count // 2)
    return Batch(prompts, list(range(count)), trajectory, advantages=advantages)


def train_chain(chain, batch, learning_rate, loss, updates_per_epoch=1):
    "The tutorial's own update, with nothing clipped."
    count = len(batch.numbers)
    config = Config(
        num_inference_steps=3,
        samples_per_epoch=count,
        updates_per_epoch=updates_per_epoch,
        minibatch_size=3 * count // 2,
        clip_range=1e6,
        adv_clip_max=1e6,
        max_grad_norm=1e6,
    )
    optimizer = torch.optim.SGD([chain.weight], lr=learning_rate)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    state = State(optimizer, scaler, PerPromptStatTracker(), rows=[], updates=[])
    return update(config, chain, state, batch, np.random.default_rng(0), loss)


LOSSES = [clipped_loss, score_function_loss]
each_loss = pytest.mark.parametrize('loss', LOSSES, ids=lambda loss: loss.__name__)


@each_loss
def test_the_gradient_of_another_policy_is_exact(loss, count=1000, batches=30):
    """Of any object with three members: sampled, rescored and trained by the tutorial's functions.
    A loss is a mean over the three steps, and a log-prob one over the two numbers."""
    exact = torch.autograd.grad(expected_reward(chain := LinearChain()), chain.weight)[0] / 6
    found = []
    for epoch in range(batches):
        chain = LinearChain()
        batch = sampled_batch(chain, count, epoch, lambda rewards: rewards - rewards.mean())
        (row,) = train_chain(chain, batch, learning_rate=1.0, loss=loss)
        assert row['ratio'] == pytest.approx(1, abs=1e-5)
        found.append(chain.weight.detach() - torch.tensor(WEIGHT))
    found = torch.stack(found)
    error = found.std(0) / batches**0.5
    assert ((found.mean(0) - exact).abs() < 4 * error).all(), (found.mean(0), exact, error)
    assert (exact.abs() > 10 * error).any()  # so that a wrong sign or factor is seen


@each_loss
def test_another_policy_learns(loss):
    "Each of a few epochs of two updates raises the exact expected reward."
    chain = LinearChain()
    rewards = [expected_reward(chain).item()]
    for epoch in range(5):
        batch = sampled_batch(chain, 1000, epoch, standardise)
        train_chain(chain, batch, learning_rate=0.2, loss=loss, updates_per_epoch=2)
        rewards.append(expected_reward(chain).item())
    assert all(after > before for before, after in zip(rewards, rewards[1:])), rewards


# other shapes


def other_unet():
    "Three channels, twice as wide as high, and a text width that no other model here has."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=(8, 16),
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=4,
            cross_attention_dim=24,
            down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
            up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
        ).eval()


@pytest.mark.parametrize('first', [None, noise(2, 3, 8, 16, seed=2), noise(2, 3, 16, 8, seed=2)])
def test_other_latents_and_texts(first):
    "Nothing is fixed but what the UNet's configuration says; the first noise may have other sides."
    pipe = SimpleNamespace(unet=other_unet(), scheduler=ddim(), device=torch.device('cpu'))
    context = Context(noise(2, 5, 24), noise(1, 5, 24, seed=1))
    policy = make_policy(pipe, 3, guidance_scale=2.0)
    trajectory = sample(policy, context, make_generators(range(2)), first)
    shape = (2, 3, 8, 16) if first is None else first.shape
    assert trajectory.latents.shape == (4, *shape) and trajectory.log_probs.shape == (3, 2)
    assert first is None or torch.equal(trajectory.latents[0], first)
    assert off_by(policy, trajectory) < 2e-5


def test_a_policy_of_ones_own_schedule(micro):
    "The pieces fit together by hand, too."
    schedule = make_schedule(micro.scheduler, 3)
    by_hand = DDIMPolicy(micro, schedule, guidance_scale=2.0)
    context = encode_prompts(micro, PROMPTS)
    latents = sample(by_hand, context, make_generators(range(5))).latents
    assert torch.equal(latents, sample_some(micro, 3, guidance_scale=2.0)[1].latents)
