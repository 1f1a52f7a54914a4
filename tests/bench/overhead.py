"Overhead: `sample` and `update` over the bare UNet calls they make"

from dataclasses import replace

import numpy as np
import torch
from timing import compare, print_row

from ddpo_tutorial.configs import Config
from ddpo_tutorial.pipelines import encode_prompts
from ddpo_tutorial.sampling import Context, DDIMPolicy, make_generators, sample
from ddpo_tutorial.training import Batch, new_state, policy_for, update

STEPS = 4  # few, so that what an update does once weighs more


def bare_calls(
    policy: DDIMPolicy,  # its UNet, precision and timesteps
    context: Context,  # of B prompts
    latents: torch.Tensor,  # (B, C, H, W)
    backward: bool,  # a backward pass after each call
) -> None:
    "The UNet on B pictures with guidance, once a timestep, and nothing else."
    unet = policy.pipe.unet
    device = policy.pipe.device.type
    both = torch.cat([context.empty.expand_as(context.text), context.text])
    x = torch.cat([latents, latents])
    for t in policy.schedule.timesteps:
        autocast = torch.autocast(device, policy.dtype, enabled=policy.dtype != torch.float32)
        with torch.set_grad_enabled(backward), autocast:
            output = unet(x, t, both).sample
        if backward:
            output.float().mean().backward()


def overhead_rows(
    settings,  # of the run
    batch: int,  # pictures at once
) -> list[dict]:  # of `compare`: sampling, updating
    """Ours and the bare calls. An update has as many minibatches as there are steps, each of
    `batch` pairs; it includes the clipping of the gradient and AdamW's step, which the bare calls
    have not."""
    pipe = settings.pipeline()
    config = Config(
        samples_per_epoch=batch,
        sample_batch_size=batch,
        minibatch_size=batch,
        updates_per_epoch=1,
        num_inference_steps=STEPS,
        guidance_scale=settings.guidance_scale,
    )
    policy = policy_for(config, pipe)
    prompts = settings.prompts(batch)
    context = encode_prompts(pipe, prompts)

    def ours_sampling():
        return sample(policy, context, make_generators(range(batch)))

    trajectory = ours_sampling()
    advantages = torch.linspace(-1, 1, batch, device=pipe.device)
    samples = Batch(prompts, list(range(batch)), trajectory, advantages=advantages)
    state = new_state(replace(config, learning_rate=1e-12), pipe)

    def ours_update():
        update(config, policy, state, samples, np.random.default_rng(0))

    def bare(backward):
        return lambda: bare_calls(policy, context, trajectory.latents[0], backward)

    sides = [('sample', ours_sampling, bare(False)), ('update', ours_update, bare(True))]
    return [compare(f'{name}, batch {batch}', ours, them, settings) for name, ours, them in sides]


def overhead_part(
    settings,  # of the run
) -> list[dict]:  # two rows a batch size
    "Batches of 16 and 64 pictures."
    rows = []
    for batch in (4,) if settings.quick else (16, 64):
        rows += overhead_rows(settings, batch)
        for row in rows[-2:]:
            print_row('overhead', row, 'bare calls / ours')
    return rows
