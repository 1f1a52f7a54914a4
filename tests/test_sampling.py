"""The DDIM chain against diffusers and torch.distributions, and rescoring against what was stored"""
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from torch import nn
from torch.distributions import Normal

from ddpo_tutorial.pipelines import Context, encode_prompts
from ddpo_tutorial.sampling import (check_scheduler, clean_and_noise, gaussian_log_prob, make_generators, make_schedule,
                                    per_sample, predict, rescore, sample, step_mean)
from helpers import (PREDICTION_TYPES, PROMPTS, SD_SCHEDULE, all_pairs, calls_of, generator, gradients, micro_pipeline,
                     rescore_all, sample_some, set_scheduler)

SETTINGS = [dict(), dict(set_alpha_to_one=True), dict(steps_offset=0), dict(set_alpha_to_one=True, steps_offset=0),
            dict(timestep_spacing='trailing')]
SETTING_NAMES = ['sd', 'alpha to one', 'no offset', 'ends in std 0', 'trailing']

def ddim(**changes): return DDIMScheduler(**SD_SCHEDULE | changes)

def noise(*shape, seed=0): return torch.randn(shape, generator=generator(seed))

# the schedule and the mean, against diffusers

@pytest.mark.parametrize('num_steps', [1, 3, 7, 10, 50])
@pytest.mark.parametrize('eta', [.5, 1.])
@pytest.mark.parametrize('settings', SETTINGS, ids=SETTING_NAMES)
def test_pitfall_02_std_is_diffusers(settings, eta, num_steps):
    "The previous timestep clamped at 0, so that set_alpha_to_one is ignored; step numbers that do not divide 1000."
    scheduler = ddim(**settings)
    schedule = make_schedule(scheduler, num_steps, eta)
    scheduler.set_timesteps(num_steps)
    assert torch.equal(schedule.timesteps, scheduler.timesteps)
    previous = torch.cat([scheduler.timesteps[1:], torch.tensor([-1])]) # timesteps - 1000 // T, where T divides 1000
    variances = [scheduler._get_variance(t, p).clamp(min=0) for t, p in zip(scheduler.timesteps, previous)]
    torch.testing.assert_close(schedule.std, eta * torch.stack(variances).sqrt(), rtol=1e-4, atol=1e-6)
    if settings.get('set_alpha_to_one'):
        clamped = scheduler.alphas_cumprod[previous.clamp(min=0)] # the fault
        assert (schedule.alpha_prev - clamped)[-1] > 1e-4

@pytest.mark.parametrize('prediction_type', PREDICTION_TYPES)
@pytest.mark.parametrize('eta', [0., .5, 1.])
@pytest.mark.parametrize('settings', SETTINGS, ids=SETTING_NAMES)
def test_pitfall_12_mean_is_diffusers(settings, eta, prediction_type):
    "A v-prediction or sample model read as if it predicted noise; any other slip in the mean."
    scheduler = ddim(prediction_type=prediction_type, **settings)
    num_steps = 8 if scheduler.config.timestep_spacing == 'trailing' else 7 # there, diffusers lands beside the next start
    schedule = make_schedule(scheduler, num_steps, eta)
    scheduler.set_timesteps(num_steps)
    x, output = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1)
    for i, t in enumerate(scheduler.timesteps):
        wanted = scheduler.step(output, t, x, eta=eta, variance_noise=torch.zeros_like(x)).prev_sample
        torch.testing.assert_close(step_mean(schedule, i, x, output, prediction_type), wanted, rtol=1e-4, atol=1e-4)

def test_prediction_types_differ():
    "The oracle above could not tell the types apart if they agreed."
    schedule, x, output = make_schedule(ddim(), 7), noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1)
    means = [step_mean(schedule, 3, x, output, kind) for kind in PREDICTION_TYPES]
    assert all((a - b).abs().max() > .1 for a, b in [(means[0], means[1]), (means[1], means[2]), (means[0], means[2])])

@pytest.mark.parametrize('prediction_type', PREDICTION_TYPES)
def test_clean_and_noise_mix_to_x(prediction_type):
    "x = sqrt(alpha) x0 + sqrt(1 - alpha) eps, whatever the model says."
    alpha, x = torch.tensor(.3), noise(2, 4, 8, 8)
    clean, eps = clean_and_noise(x, noise(2, 4, 8, 8, seed=1), alpha, prediction_type)
    torch.testing.assert_close(alpha.sqrt() * clean + (1 - alpha).sqrt() * eps, x, rtol=0, atol=1e-5)

def test_pitfall_09_steps_of_many_timesteps():
    "A batch of different timesteps: each sample must get its own coefficients."
    schedule, steps = make_schedule(ddim(), 5), torch.tensor([3, 0, 4, 3])
    x, output = noise(4, 4, 8, 8), noise(4, 4, 8, 8, seed=1)
    together = step_mean(schedule, steps, x, output)
    alone = torch.cat([step_mean(schedule, int(s), x[i:i + 1], output[i:i + 1]) for i, s in enumerate(steps)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    scheduler = ddim()
    scheduler.set_timesteps(5)
    with pytest.raises(Exception): # the fault: diffusers' step takes one timestep
        scheduler.step(output, scheduler.timesteps[steps], x)

def test_per_sample_shapes():
    "(N,) times (N, C, H, W) would broadcast along the width."
    values = torch.arange(5.)
    assert per_sample(values, 3).shape == per_sample(values, torch.tensor(3)).shape == ()
    assert per_sample(values, torch.tensor([3, 1])).shape == (2, 1, 1, 1)

# the sampler, against diffusers' own pipeline

def by_diffusers(pipe, prompts, num_steps, guidance_scale, eta, **more):
    "The latents that diffusers' own pipeline makes."
    return pipe(prompts, num_inference_steps=num_steps, guidance_scale=guidance_scale, eta=eta, output_type='latent',
                **more).images

@pytest.mark.parametrize('guidance_scale', [1., 3.])
@pytest.mark.parametrize('eta', [0., 1.])
@pytest.mark.parametrize('prediction_type', PREDICTION_TYPES)
def test_same_noise_is_diffusers_own_ddim(micro, prediction_type, eta, guidance_scale):
    "The whole chain: first noise, prompts, guidance, order of the noise, last step."
    set_scheduler(micro, prediction_type=prediction_type)
    ours = sample(micro, encode_prompts(micro, PROMPTS), make_generators(range(5)), 7, guidance_scale, eta).latents[-1]
    theirs = by_diffusers(micro, PROMPTS, 7, guidance_scale, eta, generator=make_generators(range(5)))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())

def test_shipped_model_samples_like_diffusers(tiny):
    "The same on the model of the package, with the first noise given."
    first, context = noise(2, 4, 16, 16), encode_prompts(tiny, PROMPTS[:2])
    ours = sample(tiny, context, make_generators(range(2), seed=1), 4, 3., 1., first).latents[-1]
    theirs = by_diffusers(tiny, PROMPTS[:2], 4, 3., 1., latents=first, generator=make_generators(range(2), seed=1))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

def test_trajectory_holds_the_whole_path(micro):
    "Shapes, precision, the given noise first, no gradient kept."
    context, first = encode_prompts(micro, PROMPTS), noise(5, 4, 8, 8)
    trajectory = sample(micro, context, make_generators(range(5)), 3, 2., latents=first)
    assert trajectory.latents.shape == (4, 5, 4, 8, 8) and trajectory.log_probs.shape == (3, 5)
    assert trajectory.timesteps.tolist() == [667, 334, 1]
    assert torch.equal(trajectory.latents[0], first)
    assert {x.dtype for x in (trajectory.latents, trajectory.log_probs)} == {torch.float32}
    assert not trajectory.latents.requires_grad and not trajectory.log_probs.requires_grad

def test_sampling_is_reproducible_and_leaves_no_trace(micro):
    "Randomness from the global generator, or a scheduler changed on the way."
    before = (copy.deepcopy(micro.scheduler.__dict__), torch.get_rng_state())
    first, again, other = (sample_some(micro, seed=seed)[1].latents for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert torch.equal(before[1], torch.get_rng_state())
    assert str(before[0]) == str(micro.scheduler.__dict__)

def test_noise_is_standard_normal(micro):
    "Steps must be drawn from the Gaussian they are scored by."
    _, trajectory, _ = sample_some(micro, prompts=['a cat'] * 40)
    wanted = Normal(0., 1.).entropy().item() + make_schedule(micro.scheduler, 4).std.log()
    torch.testing.assert_close(-trajectory.log_probs.mean(1), wanted, rtol=0, atol=4 * (.5 / (40 * 256))**.5)

def test_eta_zero_is_deterministic(micro):
    "Without noise there is nothing to score, and the generator does not matter after the first noise."
    first, context = noise(5, 4, 8, 8), encode_prompts(micro, PROMPTS)
    a, b = (sample(micro, context, make_generators(range(5), seed), 4, 2., 0., first) for seed in (0, 1))
    assert torch.equal(a.latents, b.latents) and a.log_probs is None

# a picture is a function of (seed, epoch, its number)

def latents_of(pipe, numbers, num_steps=3, seed=0, epoch=0):
    "The trajectory's latents of some numbers; a number has its prompt, too."
    context = encode_prompts(pipe, [PROMPTS[n] for n in numbers])
    return sample(pipe, context, make_generators(numbers, seed, epoch), num_steps, 2.).latents

@pytest.mark.parametrize('name', ['micro', 'tiny'])
@pytest.mark.parametrize('numbers', [[3], [4, 2, 0, 1, 3], [1, 1, 3, 1]],
                         ids=['alone', 'another order', 'other neighbours'])
def test_a_picture_does_not_know_its_neighbours(request, name, numbers):
    "One generator for a batch: another batch size, another order, and every picture is another one."
    pipe = request.getfixturevalue(name)
    together = latents_of(pipe, range(5))
    torch.testing.assert_close(latents_of(pipe, numbers), together[:, numbers], rtol=0, atol=1e-5)
    assert (together[:, 0] - together[:, 2]).abs().max() > .1 # one prompt, two numbers

def test_every_number_has_noise_of_its_own():
    "Seed, epoch and number added up or run together: (0, 1, 0) and (0, 0, 1) would share their noise; zeros lost, too."
    triples = [(seed, epoch, n) for seed in (0, 1, 2**32) for epoch in (0, 1, 10) for n in (0, 1, 10, 100)]
    drawn = {triple: torch.randn(8, generator=make_generators([triple[2]], *triple[:2])[0]) for triple in triples}
    assert len({tuple(x.tolist()) for x in drawn.values()}) == len(triples)
    again, = make_generators(np.array([100]), seed=2**32, epoch=10)
    assert torch.equal(torch.randn(8, generator=again), drawn[2**32, 10, 100])

@pytest.mark.parametrize('generators', [make_generators(range(4)), make_generators(range(6)), generator(), None, []],
                         ids=['too few', 'too many', 'bare', 'none', 'empty'])
def test_wrong_generators(micro, generators):
    "A bare generator would be shared by the batch, and too few of them raise something unreadable in diffusers."
    with pytest.raises(ValueError, match=r'generators is .*; expected a list of 5, one a prompt: make_generators'):
        sample(micro, encode_prompts(micro, PROMPTS), generators, 2, 2.)

def test_first_noise_of_another_shape(micro):
    "Noise for four pictures beside five prompts."
    with pytest.raises(ValueError, match=r'latents has shape \(4, 4, 8, 8\); expected \(5, 4, 8, 8\)'):
        sample(micro, encode_prompts(micro, PROMPTS), make_generators(range(5)), 2, 2., latents=noise(4, 4, 8, 8))

# log-probabilities

@pytest.mark.parametrize('std', [torch.tensor(.7), torch.tensor([.02, .5, 2.]).view(3, 1, 1, 1)], ids=['one', 'each'])
def test_log_prob_is_torch_distributions(std):
    "A slip in the density; value and gradient against torch.distributions.Normal."
    x, mean = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1).requires_grad_()
    ours, oracle = gaussian_log_prob(x, mean, std), Normal(mean, std).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(ours, oracle)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), mean)[0] for y in (ours, oracle)))

def test_pitfall_01_mean_over_latent_dimensions():
    "A sum grows with the resolution, and overflows the ratio."
    one, std = (noise(2, 4, 8, 8, seed=s) for s in (0, 1)), torch.tensor(.5)
    x, mean = one
    big_x, big_mean = x.repeat(1, 1, 4, 4), mean.repeat(1, 1, 4, 4)
    torch.testing.assert_close(gaussian_log_prob(big_x, big_mean, std), gaussian_log_prob(x, mean, std))
    def total(a, b): return Normal(b, std).log_prob(a).sum((1, 2, 3)) # the fault
    assert (total(big_x, big_mean) / total(x, mean) > 15).all()
    assert ((total(big_x, big_mean + 1) - total(big_x, big_mean)).exp() == 0).any()

def test_pitfall_03_last_step_without_noise(micro):
    """A std of 0 gives infinite log-probs, or explosive ones where it is clamped.
    A deterministic step has log-prob 0 and no gradient."""
    set_scheduler(micro, steps_offset=0, set_alpha_to_one=True)
    context, trajectory, schedule = sample_some(micro)
    assert schedule.std[-1] == 0 and (schedule.std[:-1] > 0).all()
    assert trajectory.log_probs.isfinite().all() and (trajectory.log_probs[-1] == 0).all()
    last = torch.full((5,), 3), torch.arange(5)
    rescore_all(micro, context, trajectory, schedule, 2., last).sum().backward()
    assert (gradients(micro.unet) == 0).all()
    micro.unet.zero_grad()
    rescore_all(micro, context, trajectory, schedule, 2.).sum().backward()
    assert gradients(micro.unet).isfinite().all() and gradients(micro.unet).abs().sum() > 0

# rescoring

@pytest.mark.parametrize('prediction_type', PREDICTION_TYPES)
@pytest.mark.parametrize('guidance_scale', [1., 3.])
@pytest.mark.parametrize('eta', [.5, 1.])
def test_rescoring_returns_the_stored_log_probs(micro, eta, guidance_scale, prediction_type):
    "The most valuable identity: sampling and training must agree on every step, in one batch of all timesteps."
    set_scheduler(micro, prediction_type=prediction_type)
    context, trajectory, schedule = sample_some(micro, 4, guidance_scale, eta)
    with torch.no_grad(): again = rescore_all(micro, context, trajectory, schedule, guidance_scale)
    torch.testing.assert_close(again.view(4, 5), trajectory.log_probs, rtol=0, atol=5e-6)

@pytest.mark.parametrize('guidance_scale', [1., 2.])
def test_rescoring_the_shipped_model(tiny, guidance_scale):
    "The same on the model of the package."
    context, trajectory, schedule = sample_some(tiny, 3, guidance_scale, prompts=PROMPTS[:2])
    with torch.no_grad(): again = rescore_all(tiny, context, trajectory, schedule, guidance_scale)
    torch.testing.assert_close(again.view(3, 2), trajectory.log_probs, rtol=0, atol=5e-6)

@pytest.mark.parametrize('fault', ['guidance', 'eta', 'prompts', 'next latents', 'weights'])
def test_rescoring_notices(micro, fault):
    "Each of these, forgotten or mixed up between sampling and training, must show in the log-probs."
    context, trajectory, schedule = sample_some(micro)
    guidance_scale = 2.
    if fault == 'guidance': guidance_scale = 3.
    if fault == 'eta': schedule = make_schedule(micro.scheduler, 4, .5)
    if fault == 'prompts': context = context._replace(text=context.text.roll(1, 0))
    if fault == 'next latents':
        trajectory.latents[1:] = trajectory.latents[1:].roll(1, 1)
    if fault == 'weights': micro.unet.conv_out.bias.data += .01
    with torch.no_grad(): again = rescore_all(micro, context, trajectory, schedule, guidance_scale)
    assert (again.view(4, 5) - trajectory.log_probs).abs().max() > 1e-4

def test_pitfall_24_one_permutation_for_all(micro):
    "Shuffled pairs: latents, next latents, timesteps and log-probs in the same order."
    context, trajectory, schedule = sample_some(micro)
    step, row = all_pairs(4, 5)[:, torch.randperm(20, generator=generator())]
    with torch.no_grad():
        again = rescore_all(micro, context, trajectory, schedule, 2., (step, row))
        torch.testing.assert_close(again, trajectory.log_probs[step, row], rtol=0, atol=5e-6)
        mixed = rescore_all(micro, context, trajectory, schedule, 2., (step.flip(0), row)) # the fault
    assert (mixed - trajectory.log_probs[step, row]).abs().max() > .01

def test_pitfall_07_stored_latents_are_not_rounded(micro):
    "Scoring the float32 sample and storing it in half precision moves the last step's ratio beyond the clip range."
    context, trajectory, schedule = sample_some(micro)
    rounded = trajectory._replace(latents=trajectory.latents.half().float())
    with torch.no_grad():
        exact, coarse = (rescore_all(micro, context, t, schedule, 2.).view(4, 5)[-1] for t in (trajectory, rounded))
    def away(log_probs): return (log_probs - trajectory.log_probs[-1]).exp().sub(1).abs().mean()
    assert away(exact) < 1e-5 and away(coarse) > 1e-4

def test_pitfall_11_dropout(micro):
    "A UNet in training mode rescores what another network sampled."
    pipe = micro_pipeline(dropout=.2)
    context, trajectory, schedule = sample_some(pipe)
    def away():
        return (rescore_all(pipe, context, trajectory, schedule, 2.).view(4, 5) - trajectory.log_probs).abs().max()
    assert away() < 5e-6
    pipe.unet.train() # the fault
    assert away() > 1e-3

@pytest.mark.parametrize('guidance_scale', [1., 2.])
def test_rescored_gradient_is_autograds(micro, guidance_scale):
    "The gradient through mean and guidance, against diffusers' step and torch's Normal, one timestep at a time."
    context, trajectory, schedule = sample_some(micro, 3, guidance_scale)
    micro.scheduler.set_timesteps(3)
    rescore_all(micro, context, trajectory, schedule, guidance_scale).sum().backward()
    ours = gradients(micro.unet)
    micro.unet.zero_grad()
    for i, t in enumerate(micro.scheduler.timesteps):
        x, nxt = trajectory.latents[i:i + 2]
        cond, uncond = (micro.unet(x, t, c).sample for c in (context.text, context.empty.repeat(5, 1, 1)))
        output, silence = uncond + guidance_scale * (cond - uncond), torch.zeros_like(x)
        mean = micro.scheduler.step(output, t, x, eta=1., variance_noise=silence).prev_sample
        Normal(mean, schedule.std[i]).log_prob(nxt).mean((1, 2, 3)).sum().backward()
    torch.testing.assert_close(ours, gradients(micro.unet), rtol=0, atol=1e-3 * ours.abs().max().item())

# guidance

class TextUNet(nn.Module):
    "Says weight times the mean of its text, so that guidance and its gradient can be done by hand."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.))

    def forward(self, x, t, text):
        return SimpleNamespace(sample=self.weight * text.mean((1, 2)).view(-1, 1, 1, 1).expand_as(x))

@pytest.mark.parametrize('scale, value, gradient', [(0., 6., 3.), (1., 6., 3.), (2., 10., 5.), (5., 22., 11.)])
def test_pitfall_10_guidance_and_its_gradient(scale, value, gradient):
    "The branches swapped, or the unconditional one detached: empty 1, text 3, weight 2."
    unet, x = TextUNet(), noise(2, 4, 8, 8)
    out = predict(unet, x, torch.tensor(5), (torch.full((2, 3, 4), 3.), torch.ones(1, 3, 4)), scale)
    assert out.shape == x.shape and (out == value).all()
    assert torch.autograd.grad(out.mean(), unet.weight)[0].item() == pytest.approx(gradient)
    assert scale <= 1 or 3 * scale != gradient # the fault: detached

@pytest.mark.parametrize('guidance_scale, rows', [(0., 5), (1., 5), (1.5, 10)])
def test_pitfall_10_no_guidance_costs_no_second_pass(micro, guidance_scale, rows):
    "At a scale of at most 1 the batch must not be doubled."
    calls = calls_of(micro.unet)
    context, trajectory, schedule = sample_some(micro, 2, guidance_scale)
    with torch.no_grad(): rescore_all(micro, context, trajectory, schedule, guidance_scale)
    assert [len(x) for x in calls] == [rows, rows, 2 * rows]

# random steps in a window

WINDOWS = [[1., 1., 0., 0., 0.], [0., 0., 1., 1., 0.], [0., .5, 1., 0., .2], [0., 0., 0., 0., 1.]]

@pytest.mark.parametrize('etas', WINDOWS, ids=str)
@pytest.mark.parametrize('guidance_scale', [1., 2.])
def test_steps_outside_the_window_are_no_actions(micro, etas, guidance_scale):
    "They are plain DDIM, without noise, log-prob and gradient; in it everything is as ever, rescoring above all."
    context, trajectory, schedule = sample_some(micro, 5, guidance_scale, etas)
    inside = torch.tensor(etas) > 0
    assert schedule.random == inside.tolist() and ((trajectory.log_probs != 0).all(1) == inside).all()
    again = rescore_all(micro, context, trajectory, schedule, guidance_scale)
    torch.testing.assert_close(again.detach().view(5, 5), trajectory.log_probs, rtol=0, atol=5e-6)
    still = make_schedule(micro.scheduler, 5, 0.)
    for i in range(5):
        micro.unet.zero_grad()
        step = torch.full((5,), i), torch.arange(5)
        rescore_all(micro, context, trajectory, schedule, guidance_scale, step).sum().backward()
        assert (gradients(micro.unet).abs().sum() > 0) == inside[i]
        with torch.no_grad():
            output = predict(micro.unet, trajectory.latents[i], schedule.timesteps[i], context, guidance_scale)
        ddim = step_mean(still, i, trajectory.latents[i], output)
        assert torch.allclose(trajectory.latents[i + 1], ddim, atol=1e-5) == (not inside[i])

@pytest.mark.parametrize('eta', [0., .3, 1.])
def test_a_number_for_each_step_is_a_number_for_all(micro, eta):
    one, many = make_schedule(micro.scheduler, 6, eta), make_schedule(micro.scheduler, 6, [eta] * 6)
    assert all(torch.equal(a, b) for a, b in zip(one[:4], many[:4])) and one.random == many.random
    assert torch.equal(sample_some(micro, 6, eta=[eta] * 6)[1].latents, sample_some(micro, 6, eta=eta)[1].latents)

class OneWeight(nn.Module):
    "A UNet that says theta times x, for latents of one number."
    def __init__(self, theta):
        super().__init__()
        self.theta, self.config = nn.Parameter(torch.as_tensor(theta)), SimpleNamespace(sample_size=1, in_channels=1)

    def forward(self, x, t, text): return SimpleNamespace(sample=self.theta * x)

def exact_parts(schedule, theta):
    "d E[x_0^2] / d theta of a chain x -> m x + std z, a part for each step, by the recursion of its variance."
    thetas, variance, one = torch.full((len(schedule.std),), theta, requires_grad=True), torch.tensor(1.), torch.ones(1, 1, 1, 1)
    for i, std in enumerate(schedule.std):
        variance = step_mean(schedule, i, one, thetas[i] * one).sum()**2 * variance + std**2
    return torch.autograd.grad(variance, thetas)[0]

@pytest.mark.parametrize('etas', [[1.] * 4, [0., 1., 1., 0.], [1., 0., 0., 1.], [0., 0., .7, 0.]], ids=str)
def test_the_policy_gradient_is_exact_over_the_random_steps(etas, theta=.5, n=40_000):
    "And over no other: sampled by `sample`, scored by `rescore`, against a chain whose gradient can be written down."
    pipe = SimpleNamespace(unet=OneWeight(theta), scheduler=ddim(), device=torch.device('cpu'))
    context, schedule = Context(torch.zeros(n, 1, 1), torch.zeros(1, 1, 1)), make_schedule(ddim(), 4, etas)
    x = sample(pipe, context, make_generators(range(n)), 4, 1., etas).latents
    step, row = torch.arange(4).repeat_interleave(n), torch.arange(n).repeat(4)
    pipe.unet = OneWeight(torch.full((4 * n, 1, 1, 1), theta)) # a weight for each pair, so that each has its gradient
    logs = rescore(pipe, Context(context.text[row], context.empty), schedule, step, x[step, row], x[step + 1, row], 1.)
    score, rewards = torch.autograd.grad(logs.sum(), pipe.unet.theta)[0].view(4, n).sum(0), x[-1].flatten()**2
    terms, parts = (rewards - rewards.mean()) * score, exact_parts(schedule, theta)
    assert abs(terms.mean() - parts[torch.tensor(etas) > 0].sum()) < 4 * terms.std() / n**.5
    if not all(etas): assert abs(terms.mean() - parts.sum()) > 2 * terms.std() / n**.5

# bad input

@pytest.mark.parametrize('scheduler, error, words', [
    (PNDMScheduler(), TypeError, 'PNDMScheduler; expected DDIMScheduler.*from_config'),
    (EulerDiscreteScheduler(), TypeError, 'EulerDiscreteScheduler; expected DDIMScheduler'),
    (ddim(timestep_spacing='linspace'), ValueError, "linspace.*11347.*'leading' or 'trailing'"),
    (ddim(clip_sample=True), ValueError, 'clip_sample=True.*set both to False'),
    (ddim(thresholding=True), ValueError, 'thresholding=True.*set both to False'),
    (ddim(prediction_type='flow'), ValueError, "'flow'; expected 'epsilon', 'v_prediction' or 'sample'")],
    ids=['PNDM', 'Euler', 'pitfall 4: linspace', 'pitfall 5: clip_sample', 'thresholding', 'pitfall 12: type'])
def test_pitfall_06_schedulers_that_are_not_supported(micro, scheduler, error, words):
    "Never silently wrong: refused where the schedule is made, and so in sampling too."
    micro.scheduler = scheduler
    context, generators = encode_prompts(micro, ['a cat']), make_generators([0])
    with pytest.raises(error, match=words): check_scheduler(scheduler)
    with pytest.raises(error, match=words): make_schedule(scheduler, 2)
    with pytest.raises(error, match=words): sample(micro, context, generators, 2, 2.)

@pytest.mark.parametrize('num_steps, eta, words', [
    (0, 1., 'num_inference_steps=0; expected a whole number from 1 to'),
    (1001, 1., 'num_inference_steps=1001; expected a whole number from 1 to'),
    (1000, 1., 'num_inference_steps=1000 with steps_offset=1 starts at timestep 1000'),
    (5, -.1, 'eta=-0.1; expected 0'), (5, float('nan'), 'eta=nan'), (5, float('inf'), 'eta=inf')])
def test_bad_settings(num_steps, eta, words):
    "Numbers that make an empty chain, an index beyond the schedule, or NaN."
    with pytest.raises(ValueError, match=words): make_schedule(ddim(), num_steps, eta)

def test_pitfall_06_eta_zero_has_no_log_prob(micro):
    "Training without noise: an error, not a division by zero."
    context, trajectory, _ = sample_some(micro)
    schedule = make_schedule(micro.scheduler, 4, 0.)
    with pytest.raises(ValueError, match='eta=0.*no log-probability.*eta > 0'):
        rescore_all(micro, context, trajectory, schedule, 2.)
