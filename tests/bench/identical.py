"""Identical work: our sampling and training against TRL's; first that the results are the same, then how long they take

Both sides have the same weights, noise, trajectory and minibatches.
"""
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ddpo_tutorial.configs import Config
from ddpo_tutorial.pipelines import Context, encode_prompts
from ddpo_tutorial.ppo import ppo_loss
from ddpo_tutorial.sampling import Trajectory, gaussian_log_prob, make_generators, make_schedule, rescore, sample, step_mean
from ddpo_tutorial.training import Batch, State, accumulate, clip_gradients, new_state

from timing import compare, give_back, print_row
from trl_side import make_trainer, trl_losses, trl_sample, trl_samples, trl_update


class Disagreement(Exception):
    "Two sides that should do the same do not: timing them would mean nothing."


def check_same(
    what: str, # in words, for the table
    ours: torch.Tensor, # any shape
    theirs: torch.Tensor, # the same
    rtol: float = 1e-5, # relative
    atol: float = 1e-5, # absolute
) -> dict: # what, the largest difference, and the tolerance
    "Raises Disagreement unless two tensors are equal within |difference| <= atol + rtol |theirs|."
    difference = (ours.double() - theirs.double()).abs()
    if ours.shape != theirs.shape or not (difference <= atol + rtol * theirs.double().abs()).all():
        raise Disagreement(f'{what}: ours and TRL differ by up to {difference.max().item():.3g}; '
                           f'expected at most {atol:g} + {rtol:g} x value. Nothing was timed.')
    largest = dict(largest_difference=difference.max().item(), largest_value=theirs.abs().max().item())
    return dict(what=what, **largest, rtol=rtol, atol=atol)


@contextmanager
def full_precision():
    "Float32 products without TF32, for the checks; afterwards as it was."
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    try: yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Twins(NamedTuple):
    "Both sides on the same weights, and the same data for both."
    config: Config # an epoch of one minibatch and one update
    ours: object # StableDiffusionPipeline
    trainer: object # TRL's DDPOTrainer, around a second pipeline with the same weights
    context: Context # text (B, L, D), empty (1, L, D)
    noise: torch.Tensor # (B, C, H, W)


def make_twins(
    settings, # of the run
    batch: int, # samples in the minibatch
) -> Twins: # float32 on both sides
    "Two pipelines with equal weights, one for each side."
    config = Config(samples_per_epoch=batch, sample_batch_size=batch, minibatch_size=batch, updates_per_epoch=1,
                    num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale, dtype='float32')
    ours, theirs = settings.pipeline(), settings.pipeline()
    context = encode_prompts(ours, settings.prompts(batch))
    side = ours.unet.config.sample_size
    noise = torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(7)).to(ours.device)
    return Twins(config, ours, make_trainer(theirs, config, batch), context, noise)


def our_sample(
    twins: Twins, # the sides
    generators: list[torch.Generator] | None = None, # one a sample; by default as the package's loop has them
) -> Trajectory: # of the minibatch
    "Our sampler from the shared noise."
    config, generators = twins.config, generators or make_generators(range(len(twins.noise)))
    return sample(twins.ours, twins.context, generators, config.num_inference_steps, config.guidance_scale, config.eta, twins.noise)


class OurTraining(NamedTuple):
    "What our update needs, made once."
    state: State # its optimizer is AdamW
    schedule: object # of the trajectory
    batch: Batch # the samples
    advantages: torch.Tensor # (B,)
    pairs: torch.Tensor # (T*B, 2): step by step, as TRL goes through them


def our_training(
    twins: Twins, # the sides
    trajectory: Trajectory, # to train on
    advantages: torch.Tensor, # (B,)
) -> OurTraining: # ready
    "The minibatches TRL has: all samples of one timestep, one timestep after the other."
    schedule = make_schedule(twins.ours.scheduler, twins.config.num_inference_steps, twins.config.eta, twins.ours.device)
    batch = Batch([], list(range(len(advantages))), twins.context, trajectory, None)
    pairs = torch.cartesian_prod(torch.arange(len(trajectory.timesteps)), torch.arange(len(advantages)))
    return OurTraining(new_state(twins.config, twins.ours), schedule, batch, advantages, pairs)


def our_update(
    twins: Twins, # the sides
    training: OurTraining, # of `our_training`
) -> None:
    """One update of ours, as in `training.update`, with the order of pairs given instead of drawn: gradients added up, norm
    clipped, one step."""
    state, schedule, batch, advantages, pairs = training
    state.optimizer.zero_grad()
    accumulate(twins.config, twins.ours, schedule, batch, advantages, pairs, state.scaler)
    clip_gradients(twins.config, state, 0)
    state.optimizer.step()


def our_losses(
    twins: Twins, # the sides
    training: OurTraining, # of `our_training`
) -> torch.Tensor: # (T, 3): loss, approx_kl, clipfrac of every timestep
    "Our `ppo_loss(rescore(...))`, timestep by timestep."
    config, (latents, _, old), rows = twins.config, training.batch.trajectory, []
    with torch.no_grad():
        for step, row in (part.T for part in training.pairs.to(latents.device).split(config.minibatch_size)):
            context = Context(twins.context.text[row], twins.context.empty)
            x, following = latents[step, row], latents[step + 1, row]
            new = rescore(twins.ours, context, training.schedule, step, x, following, config.guidance_scale)
            loss, stats = ppo_loss(new, old[step, row], training.advantages[row], config.clip_range, config.adv_clip_max)
            rows.append([loss, stats['approx_kl'], stats['clipfrac']])
    return torch.tensor(rows)


def some_advantages(
    batch: int, # samples
    device: torch.device, # where
) -> torch.Tensor: # (B,) of both signs, not cancelling in the mean
    "Advantages for checks and timings."
    return torch.linspace(-1, 2, batch, device=device) if batch > 1 else torch.ones(1, device=device)


def trl_one_by_one(
    twins: Twins, # the sides
) -> Trajectory: # of the minibatch
    "TRL's samples, drawn one by one: number n from the seed n. TRL draws from the global generator, ours from one a sample."
    parts = []
    for n, noise in enumerate(twins.noise.split(1)):
        torch.manual_seed(n)
        parts.append(trl_sample(twins.trainer, Context(twins.context.text[n:n + 1], twins.context.empty), noise))
    latents, log_probs = (torch.cat([getattr(p, name) for p in parts], 1) for name in ('latents', 'log_probs'))
    return Trajectory(latents, parts[0].timesteps, log_probs)


def check_sampling(
    twins: Twins, # the sides
) -> list[dict]: # of `check_same`
    "From the same first noise and random numbers the same trajectory; and the same log-prob for a transition that is given."
    device = twins.ours.device
    theirs = trl_one_by_one(twins)
    ours = our_sample(twins, [torch.Generator(device).manual_seed(n) for n in range(len(twins.noise))])
    schedule = make_schedule(twins.ours.scheduler, twins.config.num_inference_steps, twins.config.eta, device)
    output, pairs = torch.randn(theirs.latents[:-1].shape, generator=torch.Generator().manual_seed(2)).to(device), []
    for i, t in enumerate(schedule.timesteps):
        x, following = theirs.latents[i], theirs.latents[i + 1]
        how = dict(eta=twins.config.eta, prev_sample=following)
        given = twins.trainer.sd_pipeline.scheduler_step(output[i], t.expand(len(x)), x, **how).log_probs
        pairs.append((gaussian_log_prob(following, step_mean(schedule, i, x, output[i]), schedule.std[i]), given))
    return [check_same('latents of the trajectory', ours.latents, theirs.latents, atol=1e-3),
            check_same('log-probs of the trajectory', ours.log_probs, theirs.log_probs, atol=1e-4),
            check_same('log-probs of given transitions', *(torch.stack(p) for p in zip(*pairs)))]


def move_weights(
    *unets, # with equal weights
    size: float = .003, # relative to each tensor's standard deviation
) -> None:
    "Change all in the same way, so that ratios are not 1 and some are clipped."
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for same in zip(*(u.parameters() for u in unets)):
            change = size * torch.randn(same[0].shape, generator=generator)
            for p in same: p.add_(change.to(p) * (p.std() if p.numel() > 1 else 0.))


def all_weights(
    unet, # any module
) -> torch.Tensor: # one vector
    "A copy of all parameters."
    return torch.cat([p.detach().flatten() for p in unet.parameters()])


def check_training(
    twins: Twins, # the sides
) -> list[dict]: # of `check_same`
    """On the same trajectory the same losses under weights that have moved since; and the same weights after one update.
    AdamW's first step is close to the sign of the gradient: where the gradient is of the size of its rounding a single weight
    may differ, so their norm is checked besides."""
    trajectory, advantages = our_sample(twins), some_advantages(len(twins.noise), twins.ours.device)
    theirs, training = trl_samples(twins.context, trajectory, advantages), our_training(twins, trajectory, advantages)
    move_weights(twins.ours.unet, twins.trainer.sd_pipeline.unet)
    before = all_weights(twins.ours.unet)
    a, b = our_losses(twins, training), trl_losses(twins.trainer, theirs[0])
    loss = check_same('loss of every minibatch', a[:, 0], b[:, 0], atol=1e-7)
    loss |= dict(clipfrac=b[:, 2].mean().item(), approx_kl=b[:, 1].mean().item())
    our_update(twins, training)
    trl_update(twins.trainer, theirs)
    a, b = (all_weights(u) - before for u in (twins.ours.unet, twins.trainer.sd_pipeline.unet))
    share = ((a - b).norm() / b.norm()).item()
    change = check_same('change of the weights by one update', a, b, rtol=0, atol=.2 * twins.config.learning_rate)
    if share > 1e-3: raise Disagreement(f'The updates differ by {share:.2g} of their norm; expected at most 1e-3.')
    return [loss, change | dict(relative_norm_of_difference=share)]


def check_all(
    settings, # of the run
    batch: int = 4, # samples
) -> list[dict]: # of `check_same`
    "Everything that must be the same before anything is timed; in full float32. Raises Disagreement."
    twins = make_twins(settings, batch)
    with full_precision(): return check_sampling(twins) + check_training(twins)


def sampling_row(
    settings, # of the run
    batch: int, # samples
) -> dict: # of `compare`
    "One batch size."
    twins = make_twins(settings, batch)
    def theirs(): return trl_sample(twins.trainer, twins.context, twins.noise)
    return compare(f'batch {batch}', lambda: our_sample(twins), theirs, settings)


def training_row(
    settings, # of the run
    batch: int, # samples
) -> dict: # of `compare`
    "One batch size."
    twins = make_twins(settings, batch)
    trajectory, advantages = our_sample(twins), some_advantages(batch, twins.ours.device)
    twins.trainer.sd_pipeline.scheduler.set_timesteps(settings.steps, device=twins.ours.device)
    training, theirs = our_training(twins, trajectory, advantages), trl_samples(twins.context, trajectory, advantages)
    return compare(f'batch {batch}', lambda: our_update(twins, training), lambda: trl_update(twins.trainer, theirs), settings)


def rows_of(
    part: str, # 'sampling' or 'training'
    settings, # of the run
) -> list[dict]: # a row for each batch size
    """sampling: seconds to draw a trajectory with its log-probs from given noise and encoded prompts, without decoding.
    training: seconds of one update on a given trajectory: forward and backward for each timestep on the whole batch, norm
    clipped, one AdamW step."""
    rows = []
    for batch in settings.batch_sizes:
        rows.append(dict(sampling=sampling_row, training=training_row)[part](settings, batch))
        print_row(part, rows[-1])
        give_back()
    return rows
