"""Overhead: `sample` and `update` over the bare UNet calls they make"""
from dataclasses import replace

import numpy as np
import torch

from ddpo_tutorial.configs import Config
from ddpo_tutorial.pipelines import Context, encode_prompts
from ddpo_tutorial.sampling import make_generators, make_schedule, sample
from ddpo_tutorial.training import Batch, autocast, new_state, update

from timing import compare, print_row

STEPS = 4 # few, so that what an update does once weighs more


def bare_calls(
    pipe, # StableDiffusionPipeline
    config: Config, # its precision and guidance scale
    context: Context, # text (B, L, D), empty (1, L, D)
    latents: torch.Tensor, # (B, C, H, W)
    timesteps: list, # one a call
    backward: bool, # a backward pass after each call
) -> None:
    "The UNet on B pictures with guidance, once a timestep, and nothing else."
    both, x = torch.cat([context.empty.expand_as(context.text), context.text]), torch.cat([latents, latents])
    for t in timesteps:
        with torch.set_grad_enabled(backward), autocast(config, pipe): output = pipe.unet(x, t, both).sample
        if backward: output.float().mean().backward()


def overhead_rows(
    settings, # of the run
    batch: int, # pictures at once
) -> list[dict]: # of `compare`: sampling, updating
    """Ours and the bare calls. An update has as many minibatches as there are steps, each of `batch` pairs; it includes the
    clipping of the gradient and AdamW's step, which the bare calls have not."""
    pipe = settings.pipeline()
    config = Config(samples_per_epoch=batch, sample_batch_size=batch, minibatch_size=batch, updates_per_epoch=1,
                    num_inference_steps=STEPS, guidance_scale=settings.guidance_scale)
    context, schedule = encode_prompts(pipe, settings.prompts(batch)), make_schedule(pipe.scheduler, STEPS, 1., pipe.device)
    def ours_sampling():
        with autocast(config, pipe):
            return sample(pipe, context, make_generators(range(batch)), STEPS, settings.guidance_scale, config.eta)
    trajectory, advantages = ours_sampling(), torch.linspace(-1, 1, batch)
    state, samples = new_state(replace(config, learning_rate=1e-12), pipe), Batch([], list(range(batch)), context, trajectory, None)
    def ours_update(): update(config, pipe, state, samples, advantages, np.random.default_rng(0))
    def bare(backward): return lambda: bare_calls(pipe, config, context, trajectory.latents[0], schedule.timesteps, backward)
    return [compare(f'{name}, batch {batch}', ours, bare(backward), settings)
            for name, ours, backward in (('sample', ours_sampling, False), ('update', ours_update, True))]


def overhead_part(
    settings, # of the run
) -> list[dict]: # two rows a batch size
    "Batches of 16 and 64 pictures."
    rows = []
    for batch in (4,) if settings.quick else (16, 64):
        rows += overhead_rows(settings, batch)
        for row in rows[-2:]: print_row('overhead', row, 'bare calls / ours')
    return rows
