"""The schedule of a chain against diffusers, and the schedulers and settings that are refused.

Run: python -m pytest tests/test_schedules.py -n 0
"""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from helpers import PREDICTION_TYPES, PROMPTS, SD_SCHEDULE

from ddpo_tutorial.pipelines import encode_prompts
from ddpo_tutorial.sampling import make_generators, make_policy, sample
from ddpo_tutorial.schedules import check_actions, check_scheduler, make_schedule

SETTINGS = {
    'sd': dict(),
    'alpha to one': dict(set_alpha_to_one=True),
    'no offset': dict(steps_offset=0),
    'ends in std 0': dict(set_alpha_to_one=True, steps_offset=0),
    'trailing': dict(timestep_spacing='trailing'),
}
each_setting = pytest.mark.parametrize('settings', SETTINGS.values(), ids=SETTINGS)


def ddim(**changes):
    return DDIMScheduler(**SD_SCHEDULE | changes)


@pytest.mark.parametrize('num_steps', [1, 3, 7, 10, 50])
@pytest.mark.parametrize('eta', [0.5, 1.0])
@each_setting
def test_std_is_diffusers(settings, eta, num_steps):
    """The previous timestep clamped at 0, so that set_alpha_to_one is ignored; step numbers that do
    not divide 1000."""
    scheduler = ddim(**settings)
    schedule = make_schedule(scheduler, num_steps, eta)
    scheduler.set_timesteps(num_steps)
    assert torch.equal(schedule.timesteps, scheduler.timesteps)
    # timesteps - 1000 // T, where T divides 1000
    previous = torch.cat([scheduler.timesteps[1:], torch.tensor([-1])])
    pairs = zip(scheduler.timesteps, previous)
    variances = torch.stack([scheduler._get_variance(t, p).clamp(min=0) for t, p in pairs])
    torch.testing.assert_close(schedule.std, eta * variances.sqrt(), rtol=1e-4, atol=1e-6)
    if settings.get('set_alpha_to_one'):
        clamped = scheduler.alphas_cumprod[previous.clamp(min=0)]  # the fault
        assert (schedule.alpha_prev - clamped)[-1] > 1e-4


def test_the_scheduler_is_left_as_it_is():
    "Its own number of steps belongs to whoever set it."
    scheduler = ddim()
    scheduler.set_timesteps(3)
    before = scheduler.timesteps.clone()
    make_schedule(scheduler, 7)
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps == 3


@pytest.mark.parametrize('prediction_type', PREDICTION_TYPES)
def test_the_kind_of_prediction_is_the_schedulers(prediction_type):
    schedule = make_schedule(ddim(prediction_type=prediction_type), 3)
    assert schedule.prediction_type == prediction_type


@pytest.mark.parametrize('eta', [0.0, 0.3, 1.0])
def test_a_number_for_each_step_is_a_number_for_all(eta):
    one = make_schedule(ddim(), 6, eta)
    many = make_schedule(ddim(), 6, [eta] * 6)
    assert all(torch.equal(a, b) for a, b in zip(one[:4], many[:4]))
    assert one.random == many.random == [eta > 0] * 6


def test_each_step_has_its_own_eta():
    schedule = make_schedule(ddim(), 4, [0.0, 0.5, 1.0, 0.0])
    whole = make_schedule(ddim(), 4)
    wanted = whole.std * torch.tensor([0.0, 0.5, 1.0, 0.0])
    torch.testing.assert_close(schedule.std, wanted)
    assert schedule.random == [False, True, True, False]


@pytest.mark.filterwarnings('error')
@each_setting
def test_a_random_step_of_std_zero_is_warned_of_and_refused(settings):
    "It would be missing from the gradient, except where the step goes nowhere."
    wanted = 'std 0.*missing from the gradient; expected set_alpha_to_one=False'
    if settings.get('set_alpha_to_one'):
        with pytest.warns(UserWarning, match=wanted):
            schedule = make_schedule(ddim(**settings), 5)
        assert schedule.std[-1] == 0 and schedule.alpha_prev[-1] != schedule.alpha[-1]
        with pytest.raises(ValueError, match=wanted):
            check_actions(schedule)
    else:
        check_actions(make_schedule(ddim(**settings), 5))
    # a step that is not meant to be random may have std 0
    check_actions(make_schedule(ddim(**settings), 5, [1.0] * 4 + [0.0]))


WRONG_SCHEDULERS = {
    'PNDM': (PNDMScheduler(), TypeError, 'PNDMScheduler; expected DDIMScheduler.*ddim_scheduler'),
    'Euler': (EulerDiscreteScheduler(), TypeError, 'EulerDiscreteScheduler; expected DDIM'),
    'linspace': (
        ddim(timestep_spacing='linspace'),
        ValueError,
        "linspace.*11347.*'leading' or 'trailing'",
    ),
    'clip_sample': (ddim(clip_sample=True), ValueError, 'clip_sample=True.*expected False'),
    'thresholding': (ddim(thresholding=True), ValueError, 'thresholding=True.*expected False'),
    'type': (
        ddim(prediction_type='flow'),
        ValueError,
        "'flow'; expected epsilon, v_prediction or sample",
    ),
}


@pytest.mark.parametrize('scheduler, error, words', WRONG_SCHEDULERS.values(), ids=WRONG_SCHEDULERS)
def test_schedulers_that_are_not_supported(micro, scheduler, error, words):
    "Never silently wrong: refused where the schedule is made, and so before sampling."
    micro.scheduler = scheduler
    with pytest.raises(error, match=words):
        check_scheduler(scheduler)
    with pytest.raises(error, match=words):
        make_schedule(scheduler, 2)
    with pytest.raises(error, match=words):
        make_policy(micro, 2, guidance_scale=2.0)


def betas(kind, **changes):
    "A scheduler with Stable Diffusion's noise schedule."
    names = ('beta_start', 'beta_end', 'beta_schedule')
    return kind(**{name: SD_SCHEDULE[name] for name in names}, **changes)


TO_BE_MENDED = {
    'PNDM': betas(PNDMScheduler),
    'PNDM, alpha to one': betas(PNDMScheduler, set_alpha_to_one=True, steps_offset=1),
    'Euler': betas(EulerDiscreteScheduler),
    'linspace': ddim(timestep_spacing='linspace', set_alpha_to_one=True),
    'clip_sample': ddim(clip_sample=True, set_alpha_to_one=True),
    'thresholding': ddim(thresholding=True),
    'alpha to one': ddim(set_alpha_to_one=True),
    'all of them': betas(DDIMScheduler, timestep_spacing='linspace'),
    'zero SNR': ddim(rescale_betas_zero_snr=True, timestep_spacing='trailing'),
}


@pytest.mark.filterwarnings('ignore:DDPO cannot train')
@pytest.mark.parametrize('steps', [1, 4, 10])
@pytest.mark.parametrize('scheduler', TO_BE_MENDED.values(), ids=TO_BE_MENDED)
def test_the_advice_works_as_it_is_printed(micro, scheduler, steps):
    "One advice, executed word for word, leads to a chain of which every step is an action."
    micro.scheduler = copy.deepcopy(scheduler)
    with pytest.raises((TypeError, ValueError)) as caught:
        check_actions(make_schedule(micro.scheduler, steps))
    exec(str(caught.value).partition('Run: ')[2], dict(pipe=micro))
    schedule = make_schedule(micro.scheduler, steps)
    check_actions(schedule)
    moves = schedule.alpha_prev != schedule.alpha
    assert (schedule.std[moves] > 0).all() and all(schedule.random)
    policy = make_policy(micro, steps, guidance_scale=2.0)
    sampled = sample(policy, encode_prompts(micro, PROMPTS), make_generators(range(len(PROMPTS))))
    assert sampled.latents.isfinite().all()


def test_pure_noise_says_nothing_to_an_epsilon_model():
    "Zero terminal SNR: x is the noise, and a prediction of it says nothing of the picture."
    settings = dict(rescale_betas_zero_snr=True, timestep_spacing='trailing')
    with pytest.raises(ValueError, match='timestep 999 nothing of the picture.*v_prediction'):
        make_schedule(ddim(**settings), 5)
    make_schedule(ddim(**settings, prediction_type='v_prediction'), 5)


BAD_NUMBERS = [
    (0, 1.0, 'num_inference_steps=0; expected a whole number from 1 to'),
    (1001, 1.0, 'num_inference_steps=1001; expected a whole number from 1 to'),
    (1000, 1.0, 'num_inference_steps=1000 with steps_offset=1 starts at timestep 1000'),
    (5, -0.1, 'eta=-0.1; expected 0'),
    (5, float('nan'), 'eta=nan'),
    (5, float('inf'), 'eta=inf'),
    (5, [1.0] * 4, 'eta=.*or 5 such numbers'),
]


@pytest.mark.parametrize('num_steps, eta, words', BAD_NUMBERS)
def test_bad_settings(num_steps, eta, words):
    "Numbers that make an empty chain, an index beyond the schedule, or NaN."
    with pytest.raises(ValueError, match=words):
        make_schedule(ddim(), num_steps, eta)
