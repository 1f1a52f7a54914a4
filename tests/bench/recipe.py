"""The original tutorial's recipe, written afresh as the baseline: what it does and in which order,
nothing of its code

Float32 with TF32; one backward pass a timestep at batch 4; the prompts and as many empty ones
encoded again for every minibatch; gradient checkpointing; losses summed over the timesteps;
statistics updated for each sampling batch; fastprogress bars for batches and timesteps.
"""

import io
from contextlib import redirect_stdout
from dataclasses import replace

import numpy as np
import torch
from fastprogress.fastprogress import master_bar, progress_bar
from timing import compare

from ddpo_tutorial.configs import Config
from ddpo_tutorial.pipelines import decode_latents
from ddpo_tutorial.prompts import draw_prompts
from ddpo_tutorial.sampling import gaussian_log_prob
from ddpo_tutorial.training import State, accumulate, collect, new_state, policy_for, train


def recipe_config(
    settings,  # of the run
) -> Config:  # an epoch of the original settings; our side runs it with another minibatch size
    """The original's numbers: 128 samples in batches of 32, 50 steps, guidance 5, an update every 4
    samples; on a CPU fewer samples and steps."""
    numbers = settings.recipe
    return Config(
        num_epochs=1,
        samples_per_epoch=numbers['samples'],
        sample_batch_size=numbers['sample_batch_size'],
        num_inference_steps=numbers['steps'],
        guidance_scale=5.0,
        updates_per_epoch=numbers['samples'] // 4,
        learning_rate=5e-6,
        clip_range=1e-4,
        buffer_size=32,
        min_count=16,
    )


def encode_both(
    pipe,  # its tokenizer and text encoder
    prompts: list[str],  # N
) -> torch.Tensor:  # (2N, L, D): N times the empty prompt, then the prompts
    "Encode prompts and as many empty ones, whatever has been encoded before."
    tokens = pipe.tokenizer(
        [''] * len(prompts) + list(prompts),
        padding='max_length',
        truncation=True,
        return_tensors='pt',
    )
    with torch.no_grad():
        return pipe.text_encoder(tokens.input_ids.to(pipe.device))[0]


def guided(
    pipe,  # its UNet
    x: torch.Tensor,  # (N, C, H, W)
    t: torch.Tensor,  # () timestep
    embeds: torch.Tensor,  # (2N, L, D)
    scale: float,  # of guidance
) -> torch.Tensor:  # (N, C, H, W)
    "The UNet on a doubled batch."
    empty, text = pipe.unet(torch.cat([x, x]), t, embeds).sample.chunk(2)
    return empty + scale * (text - empty)


def transition(
    scheduler,  # DDIM, its timesteps set
    output: torch.Tensor,  # (N, C, H, W) of the UNet
    t: torch.Tensor,  # () timestep
    x: torch.Tensor,  # (N, C, H, W)
):  # mean (N, C, H, W) and standard deviation () of the next latents
    "The Gaussian of a DDIM step with eta = 1, from the library's scheduler."
    previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    std = scheduler._get_variance(t, previous).sqrt().to(x.device)
    return scheduler.step(
        output, t, x, eta=1.0, variance_noise=torch.zeros_like(x)
    ).prev_sample, std


@torch.no_grad()
def draw_batch(
    pipe,  # StableDiffusionPipeline
    prompts: list[str],  # N
    config: Config,  # steps and guidance
):  # latents (T+1, N, C, H, W), log-probs (T, N)
    "Sample one batch."
    embeds = encode_both(pipe, prompts)
    side = pipe.unet.config.sample_size
    x = torch.randn(len(prompts), pipe.unet.config.in_channels, side, side, device=pipe.device)
    latents = [x]
    log_probs = []
    for t in pipe.scheduler.timesteps:
        mean, std = transition(
            pipe.scheduler, guided(pipe, x, t, embeds, config.guidance_scale), t, x
        )
        x = mean + std * torch.randn_like(mean)
        latents.append(x)
        log_probs.append(gaussian_log_prob(x, mean, std))
    return torch.stack(latents), torch.stack(log_probs)


def draw_epoch(
    config: Config,  # sizes
    pipe,  # StableDiffusionPipeline
    reward,  # reward(images, prompts) -> (B,)
    prompts: list[str],  # to draw from
    state: State,  # its tracker is updated for each batch
    bar,  # a master_bar
):  # prompts, latents (T+1, B, C, H, W), log-probs (T, B), advantages (B,)
    "Sample, decode and score an epoch, a batch at a time."
    texts = []
    latents = []
    log_probs = []
    advantages = []
    rng = np.random.default_rng(config.seed)
    for _ in progress_bar(range(config.samples_per_epoch // config.sample_batch_size), parent=bar):
        batch = draw_prompts(prompts, config.sample_batch_size, rng)
        path, old = draw_batch(pipe, batch, config)
        with torch.no_grad():
            scores = reward(decode_latents(pipe, path[-1]), batch)
        advantages.append(torch.as_tensor(state.tracker.update(batch, scores), dtype=torch.float32))
        texts += batch
        latents.append(path)
        log_probs.append(old)
    return (
        texts,
        torch.cat(latents, 1),
        torch.cat(log_probs, 1),
        torch.cat(advantages).to(pipe.device),
    )


def add_gradients(
    config: Config,  # guidance, clip range
    pipe,  # StableDiffusionPipeline
    prompts: list[str],  # of the minibatch
    latents: torch.Tensor,  # (T+1, N, C, H, W)
    old: torch.Tensor,  # (T, N)
    advantages: torch.Tensor,  # (N,)
    bar=None,  # a master_bar
) -> None:
    """A minibatch: encode its prompts, then a forward and a backward pass for each timestep; the
    gradient is of the sum over timesteps."""
    embeds = encode_both(pipe, prompts)
    advantages = advantages.clamp(-config.adv_clip_max, config.adv_clip_max)
    steps = list(enumerate(pipe.scheduler.timesteps))
    for i, t in progress_bar(steps, parent=bar) if bar else steps:
        mean, std = transition(
            pipe.scheduler,
            guided(pipe, latents[i], t, embeds, config.guidance_scale),
            t,
            latents[i],
        )
        ratio = (gaussian_log_prob(latents[i + 1], mean, std) - old[i]).exp()
        clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
        torch.maximum(-advantages * ratio, -advantages * clipped).mean().backward()


def recipe_epoch(
    config: Config,  # of `recipe_config`
    pipe,  # float32, with gradient checkpointing
    reward,  # reward(images, prompts) -> (B,)
    prompts: list[str],  # to draw from
) -> None:
    "One epoch of the recipe, with its optimizer."
    state = new_state(config, pipe)
    pipe.scheduler.set_timesteps(config.num_inference_steps, device=pipe.device)
    with redirect_stdout(io.StringIO()):  # its bars, drawn but not shown
        bar = master_bar(range(1))
        for _ in bar:
            texts, latents, old, advantages = draw_epoch(config, pipe, reward, prompts, state, bar)
            for rows in torch.randperm(len(texts), device=pipe.device).split(4):
                some = [texts[i] for i in rows.tolist()]
                add_gradients(
                    config, pipe, some, latents[:, rows], old[:, rows], advantages[rows], bar
                )
                torch.nn.utils.clip_grad_norm_(pipe.unet.parameters(), config.max_grad_norm)
                state.optimizer.step()
                state.optimizer.zero_grad()


def brightness(
    images: torch.Tensor,  # (B, 3, H, W)
    prompts: list[str],  # B
) -> torch.Tensor:  # (B,)
    "A reward that costs nothing, so that both sides are measured without a predictor."
    return images.mean((1, 2, 3))


def gradient(
    unet,  # after backward
) -> torch.Tensor:  # one vector
    "A copy of all gradients."
    return torch.cat([p.grad.flatten() for p in unet.parameters()])


def check_recipe(
    settings,  # of the run
) -> list[dict]:  # one check
    """The recipe's gradient of a minibatch is T times ours, in float32: the same direction, the sum
    where we take the mean. Raises ValueError."""
    pipe = settings.pipeline()
    config = replace(recipe_config(settings), dtype='float32')
    texts = settings.prompts(4)
    policy = policy_for(config, pipe)
    advantages = torch.linspace(-1, 2, 4, device=pipe.device)
    batch = collect(config, policy, brightness, prompts=texts)._replace(advantages=advantages)
    pairs = torch.cartesian_prod(torch.arange(config.num_inference_steps), torch.arange(4))
    accumulate(config, policy, batch, pairs=pairs, scaler=new_state(config, pipe).scaler)
    ours = gradient(pipe.unet)
    pipe.unet.zero_grad()
    pipe.unet.enable_gradient_checkpointing()
    pipe.scheduler.set_timesteps(config.num_inference_steps, device=pipe.device)
    trajectory = batch.trajectory
    add_gradients(config, pipe, texts, trajectory.latents, trajectory.log_probs, advantages)
    theirs = gradient(pipe.unet) / config.num_inference_steps
    share = ((ours - theirs).norm() / theirs.norm()).item()
    if share > 1e-2:
        raise ValueError(
            f"Our gradient and the recipe's differ by {share:.2g} of their norm; "
            'expected at most 1e-2. Nothing was timed.'
        )
    return [
        dict(
            what="gradient of a minibatch, against the recipe's by T",
            relative_norm_of_difference=share,
        )
    ]


def minibatch_that_fits(
    settings,  # of the run
) -> int:  # pairs a forward pass
    "The default on a CPU; on CUDA what a large card holds without checkpointing at 512 pixels."
    return Config().minibatch_size if settings.device == 'cpu' else 16


def recipe_part(
    settings,  # of the run
) -> list[dict]:  # one row
    """Seconds of an epoch: sampling, decoding, training. Ours: the same samples, steps, updates and
    optimizer, products in the package's own precision, sizes that fit the device."""
    ours = settings.pipeline()
    theirs = settings.pipeline()
    prompts = settings.prompts(45)
    theirs.unet.enable_gradient_checkpointing()
    config = recipe_config(settings)
    our_config = replace(config, minibatch_size=minibatch_that_fits(settings))
    case = (
        f'epoch of {config.samples_per_epoch} samples, {config.num_inference_steps} steps, '
        f'{config.updates_per_epoch} updates'
    )

    def our_epoch():
        return train(our_config, ours, brightness, prompts=prompts)

    def their_epoch():
        return recipe_epoch(config, theirs, brightness, prompts)

    return [
        compare(case, our_epoch, their_epoch, settings)
        | dict(minibatch_size=our_config.minibatch_size)
    ]
