"""Identical work: our sampling and training against TRL's; first that the results are the same,
then how long they take

Both sides have the same weights, noise, trajectory and minibatches.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from timing import compare, give_back, print_row
from trl_side import make_trainer, trl_losses, trl_sample, trl_samples, trl_update

from ddpo_tutorial.configs import Config
from ddpo_tutorial.pipelines import encode_prompts
from ddpo_tutorial.sampling import (
    Context,
    DDIMPolicy,
    Trajectory,
    gaussian_log_prob,
    make_generators,
    sample,
    step_mean,
)
from ddpo_tutorial.training import (
    Batch,
    State,
    accumulate,
    clip_gradients,
    clipped_loss,
    new_state,
    policy_for,
)


class Disagreement(Exception):
    "Two sides that should do the same do not: timing them would mean nothing."


def check_same(
    what: str,  # in words, for the table
    ours: torch.Tensor,  # any shape
    theirs: torch.Tensor,  # the same
    rtol: float = 1e-5,  # relative
    atol: float = 1e-5,  # absolute
) -> dict:  # what, the largest difference, and the tolerance
    "Raises Disagreement unless two tensors are equal within |difference| <= atol + rtol |theirs|."
    difference = (ours.double() - theirs.double()).abs()
    allowed = atol + rtol * theirs.double().abs()
    if ours.shape != theirs.shape or not (difference <= allowed).all():
        raise Disagreement(
            f'{what}: ours and TRL differ by up to {difference.max().item():.3g}; '
            f'expected at most {atol:g} + {rtol:g} x value. Nothing was timed.'
        )
    largest_value = theirs.abs().max().item()
    return dict(
        what=what,
        largest_difference=difference.max().item(),
        largest_value=largest_value,
        rtol=rtol,
        atol=atol,
    )


@contextmanager
def full_precision():
    "Float32 products without TF32, for the checks; afterwards as it was."
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Twins(NamedTuple):
    "Both sides on the same weights, and the same data for both."

    config: Config  # an epoch of one minibatch and one update
    policy: DDIMPolicy  # ours
    trainer: object  # TRL's DDPOTrainer, around a second pipeline with the same weights
    context: Context  # text (B, L, D), empty (1, L, D)
    noise: torch.Tensor  # (B, C, H, W)

    @property
    def device(self) -> torch.device:  # of both
        return self.policy.pipe.device

    @property
    def unets(self) -> list:  # ours and theirs
        return [self.policy.pipe.unet, self.trainer.sd_pipeline.unet]


def make_twins(
    settings,  # of the run
    batch: int,  # samples in the minibatch
) -> Twins:  # float32 on both sides
    "Two pipelines with equal weights, one for each side."
    config = Config(
        samples_per_epoch=batch,
        sample_batch_size=batch,
        minibatch_size=batch,
        updates_per_epoch=1,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        dtype='float32',
    )
    ours, theirs = settings.pipeline(), settings.pipeline()
    side = ours.unet.config.sample_size
    noise = torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(7))
    return Twins(
        config,
        policy=policy_for(config, ours),
        trainer=make_trainer(theirs, config, batch),
        context=encode_prompts(ours, settings.prompts(batch)),
        noise=noise.to(ours.device),
    )


def our_sample(
    twins: Twins,  # the sides
    generators: list[torch.Generator] | None = None,  # one a sample; else as the package's loop
) -> Trajectory:  # of the minibatch
    "Our sampler from the shared noise."
    generators = generators or make_generators(range(len(twins.noise)))
    return sample(twins.policy, twins.context, generators, twins.noise)


class OurTraining(NamedTuple):
    "What our update needs, made once."

    state: State  # its optimizer is AdamW
    batch: Batch  # the samples, with advantages
    pairs: torch.Tensor  # (T*B, 2): step by step, as TRL goes through them


def our_training(
    twins: Twins,  # the sides
    trajectory: Trajectory,  # to train on
    advantages: torch.Tensor,  # (B,)
) -> OurTraining:  # ready
    "The minibatches TRL has: all samples of one timestep, one timestep after the other."
    count = len(advantages)
    batch = Batch([], list(range(count)), trajectory, advantages=advantages)
    pairs = torch.cartesian_prod(torch.arange(len(twins.policy.random)), torch.arange(count))
    return OurTraining(new_state(twins.config, twins.policy.pipe), batch, pairs)


def our_update(
    twins: Twins,  # the sides
    training: OurTraining,  # of `our_training`
) -> None:
    """One update of ours, as in `training.update`, with the order of pairs given instead of drawn:
    gradients added up, norm clipped, one step."""
    state, batch, pairs = training
    state.optimizer.zero_grad()
    accumulate(twins.config, twins.policy, batch, pairs, state.scaler)
    clip_gradients(twins.config, state, 0)
    state.optimizer.step()


def our_losses(
    twins: Twins,  # the sides
    training: OurTraining,  # of `our_training`
) -> torch.Tensor:  # (T, 3): loss, approx_kl, clipfrac of every timestep
    "Our `clipped_loss`, timestep by timestep."
    pairs = training.pairs.to(twins.device)
    found = []
    with torch.no_grad():
        for part in pairs.split(twins.config.minibatch_size):
            steps, rows = part.T
            loss, stats = clipped_loss(twins.config, twins.policy, training.batch, steps, rows)
            found.append([loss, stats['approx_kl'], stats['clipfrac']])
    return torch.tensor(found)


def some_advantages(
    batch: int,  # samples
    device: torch.device,  # where
) -> torch.Tensor:  # (B,) of both signs, not cancelling in the mean
    "Advantages for checks and timings."
    return (
        torch.linspace(-1, 2, batch, device=device) if batch > 1 else torch.ones(1, device=device)
    )


def trl_one_by_one(
    twins: Twins,  # the sides
) -> Trajectory:  # of the minibatch
    """TRL's samples, drawn one by one: number n from the seed n. TRL draws from the global
    generator, ours from one a sample."""
    parts = []
    for n, noise in enumerate(twins.noise.split(1)):
        torch.manual_seed(n)
        parts.append(trl_sample(twins.trainer, twins.context.rows([n]), noise))
    latents = torch.cat([part.latents for part in parts], 1)
    log_probs = torch.cat([part.log_probs for part in parts], 1)
    return Trajectory(twins.context, latents, log_probs)


def check_sampling(
    twins: Twins,  # the sides
) -> list[dict]:  # of `check_same`
    """From the same first noise and random numbers the same trajectory; and the same log-prob for a
    transition that is given."""
    theirs = trl_one_by_one(twins)
    seeds = range(len(twins.noise))
    ours = our_sample(twins, [torch.Generator(twins.device).manual_seed(n) for n in seeds])
    before, after = theirs.latents[:-1], theirs.latents[1:]
    output = torch.randn(before.shape, generator=torch.Generator().manual_seed(2)).to(twins.device)
    schedule = twins.policy.schedule
    scheduler_step = twins.trainer.sd_pipeline.scheduler_step
    our_log_probs = []
    their_log_probs = []
    for i, t in enumerate(schedule.timesteps):
        mean = step_mean(schedule, i, before[i], output[i])
        our_log_probs.append(gaussian_log_prob(after[i], mean, schedule.std[i]))
        given = dict(eta=twins.config.eta, prev_sample=after[i])
        step = scheduler_step(output[i], t.expand(len(before[i])), before[i], **given)
        their_log_probs.append(step.log_probs)
    given_ones = torch.stack(our_log_probs), torch.stack(their_log_probs)
    return [
        check_same('latents of the trajectory', ours.latents, theirs.latents, atol=1e-3),
        check_same('log-probs of the trajectory', ours.log_probs, theirs.log_probs, atol=1e-4),
        check_same('log-probs of given transitions', *given_ones),
    ]


def move_weights(
    *unets,  # with equal weights
    size: float = 0.003,  # relative to each tensor's standard deviation
) -> None:
    "Change all in the same way, so that ratios are not 1 and some are clipped."
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for same in zip(*(u.parameters() for u in unets)):
            change = size * torch.randn(same[0].shape, generator=generator)
            for p in same:
                p.add_(change.to(p) * (p.std() if p.numel() > 1 else 0.0))


def all_weights(
    unet,  # any module
) -> torch.Tensor:  # one vector
    "A copy of all parameters."
    return torch.cat([p.detach().flatten() for p in unet.parameters()])


def check_training(
    twins: Twins,  # the sides
) -> list[dict]:  # of `check_same`
    """On the same trajectory the same losses under weights that have moved since; and the same
    weights after one update. AdamW's first step is close to the sign of the gradient: where the
    gradient is of the size of its rounding a single weight may differ, so their norm is checked
    besides."""
    trajectory = our_sample(twins)
    advantages = some_advantages(len(twins.noise), twins.device)
    theirs = trl_samples(trajectory, twins.policy.schedule.timesteps, advantages)
    training = our_training(twins, trajectory, advantages)
    move_weights(*twins.unets)
    before = all_weights(twins.unets[0])
    a = our_losses(twins, training)
    b = trl_losses(twins.trainer, theirs[0])
    loss = check_same('loss of every minibatch', a[:, 0], b[:, 0], atol=1e-7)
    loss |= dict(clipfrac=b[:, 2].mean().item(), approx_kl=b[:, 1].mean().item())
    our_update(twins, training)
    trl_update(twins.trainer, theirs)
    a, b = (all_weights(u) - before for u in twins.unets)
    share = ((a - b).norm() / b.norm()).item()
    atol = 0.2 * twins.config.learning_rate
    change = check_same('change of the weights by one update', a, b, rtol=0, atol=atol)
    if share > 1e-3:
        raise Disagreement(
            f'The updates differ by {share:.2g} of their norm; expected at most 1e-3.'
        )
    return [loss, change | dict(relative_norm_of_difference=share)]


def check_all(
    settings,  # of the run
    batch: int = 4,  # samples
) -> list[dict]:  # of `check_same`
    """Everything that must be the same before anything is timed; in full float32.
    Raises Disagreement."""
    twins = make_twins(settings, batch)
    with full_precision():
        return check_sampling(twins) + check_training(twins)


def sampling_row(
    settings,  # of the run
    batch: int,  # samples
) -> dict:  # of `compare`
    "One batch size."
    twins = make_twins(settings, batch)

    def ours():
        return our_sample(twins)

    def theirs():
        return trl_sample(twins.trainer, twins.context, twins.noise)

    return compare(f'batch {batch}', ours, theirs, settings)


def training_row(
    settings,  # of the run
    batch: int,  # samples
) -> dict:  # of `compare`
    "One batch size."
    twins = make_twins(settings, batch)
    trajectory = our_sample(twins)
    advantages = some_advantages(batch, twins.device)
    training = our_training(twins, trajectory, advantages)
    scheduler = twins.trainer.sd_pipeline.scheduler
    scheduler.set_timesteps(settings.steps, device=twins.device)
    samples = trl_samples(trajectory, twins.policy.schedule.timesteps, advantages)

    def ours():
        return our_update(twins, training)

    def theirs():
        return trl_update(twins.trainer, samples)

    return compare(f'batch {batch}', ours, theirs, settings)


def rows_of(
    part: str,  # 'sampling' or 'training'
    settings,  # of the run
) -> list[dict]:  # a row for each batch size
    """sampling: seconds to draw a trajectory with its log-probs from given noise and encoded
    prompts, without decoding.
    training: seconds of one update on a given trajectory: forward and backward for each timestep on
    the whole batch, norm clipped, one AdamW step."""
    rows = []
    for batch in settings.batch_sizes:
        rows.append(dict(sampling=sampling_row, training=training_row)[part](settings, batch))
        print_row(part, rows[-1])
        give_back()
    return rows
