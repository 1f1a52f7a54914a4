"""TRL 0.23.1's DDPOTrainer, used as it is: its pipeline class around a pipeline that is loaded
already, and our data in its form"""

import warnings

import torch
from accelerate import PartialState
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

from ddpo_tutorial.configs import Config
from ddpo_tutorial.sampling import Context, Trajectory

for library in (diffusers_logging, transformers_logging):
    library.set_verbosity_error()
warnings.filterwarnings('ignore', category=FutureWarning)
warnings.filterwarnings('ignore', category=DeprecationWarning)


class Pipeline(DefaultDDPOStableDiffusionPipeline):
    """TRL's own pipeline class; only loading is left out, and its progress bar, which would cost it
    time. The whole UNet is trained."""

    def __init__(
        self,
        pipe,  # StableDiffusionPipeline with a DDIM scheduler and clip_sample off
    ):
        self.sd_pipeline = pipe
        self.use_lora = False
        self.set_progress_bar_config()

    def set_progress_bar_config(self, *args, **kwargs):
        "No bar."
        self.sd_pipeline.set_progress_bar_config(disable=True)


def trl_config(
    config: Config,  # ours
    train_batch_size: int,  # samples a forward pass; gradients add up over timesteps
    device: torch.device,  # where it runs
) -> DDPOConfig:  # theirs
    """Our settings in TRL's names: the same updates an epoch, no trackers, no checkpoints on the
    way, float32."""
    samples = config.samples_per_epoch // config.updates_per_epoch
    return DDPOConfig(
        mixed_precision='no',
        log_with=None,
        save_freq=10**9,
        seed=config.seed,
        accelerator_kwargs=dict(cpu=device.type == 'cpu'),
        sample_num_steps=config.num_inference_steps,
        sample_eta=config.eta,
        sample_guidance_scale=config.guidance_scale,
        sample_batch_size=config.sample_batch_size,
        sample_num_batches_per_epoch=config.samples_per_epoch // config.sample_batch_size,
        train_batch_size=train_batch_size,
        train_gradient_accumulation_steps=samples // train_batch_size,
        train_num_inner_epochs=config.num_inner_epochs,
        train_learning_rate=config.learning_rate,
        train_adam_weight_decay=config.weight_decay,
        train_max_grad_norm=config.max_grad_norm,
        train_clip_range=config.clip_range,
        train_adv_clip_max=config.adv_clip_max,
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=config.buffer_size,
        per_prompt_stat_tracking_min_count=config.min_count,
    )


def make_trainer(
    pipe,  # StableDiffusionPipeline, float32
    config: Config,  # ours
    train_batch_size: int,  # samples a forward pass
    reward=None,  # reward(images, prompts) -> (B,); not needed to time sampling and training alone
    draw=None,  # () -> a prompt
) -> DDPOTrainer:  # theirs, on the pipeline's device
    """A trainer of TRL. `PartialState` must exist before, because its logger asks for it. Without
    trackers it can't call an image hook: it would look for the first one."""
    PartialState(cpu=pipe.device.type == 'cpu')

    def their_reward(images, prompts, metadata):
        return reward(images, list(prompts)), {}

    return DDPOTrainer(
        trl_config(config, train_batch_size, pipe.device),
        their_reward,
        lambda: (draw(), {}),
        Pipeline(pipe),
    )


def trl_sample(
    trainer: DDPOTrainer,  # theirs
    context: Context,  # text (B, L, D), empty (1, L, D)
    noise: torch.Tensor,  # (B, C, H, W) the first latents
) -> Trajectory:  # T steps of B samples
    "TRL's `pipeline_step`, without decoding; its result in our form."
    config = trainer.config
    with trainer.autocast():
        output = trainer.sd_pipeline(
            prompt_embeds=context.text,
            negative_prompt_embeds=context.empty.expand_as(context.text),
            latents=noise,
            num_inference_steps=config.sample_num_steps,
            guidance_scale=config.sample_guidance_scale,
            eta=config.sample_eta,
            output_type='latent',
        )
    return Trajectory(context, torch.stack(output.latents), torch.stack(output.log_probs))


def trl_samples(
    trajectory: Trajectory,  # T steps of B samples
    timesteps: torch.Tensor,  # (T,) of the schedule
    advantages: torch.Tensor,  # (B,)
) -> list[
    dict
]:  # one minibatch, as `_train_batched_samples` takes it: samples first, then timesteps
    "Our trajectory in the form in which TRL trains on it."
    context = trajectory.context
    latents = trajectory.latents.transpose(0, 1)
    return [
        dict(
            latents=latents[:, :-1].contiguous(),
            next_latents=latents[:, 1:].contiguous(),
            timesteps=timesteps.expand(len(latents), -1),
            log_probs=trajectory.log_probs.T.contiguous(),
            advantages=advantages,
            prompt_embeds=context.text,
            negative_prompt_embeds=context.empty.expand_as(context.text).contiguous(),
        )
    ]


def trl_losses(
    trainer: DDPOTrainer,  # theirs
    samples: dict,  # of `trl_samples`
) -> torch.Tensor:  # (T, 3): loss, approx_kl, clipfrac of every timestep
    "TRL's `calculate_loss`, timestep by timestep."
    embeds = torch.cat([samples['negative_prompt_embeds'], samples['prompt_embeds']])
    rows = []
    with torch.no_grad():
        for j in range(trainer.num_train_timesteps):
            given = (
                samples[k][:, j] for k in ('latents', 'timesteps', 'next_latents', 'log_probs')
            )
            rows.append(trainer.calculate_loss(*given, samples['advantages'], embeds))
    return torch.tensor(rows)


def trl_update(
    trainer: DDPOTrainer,  # theirs
    batches: list[dict],  # of `trl_samples`
) -> None:
    """TRL's training on these minibatches: a backward pass a timestep, then one clipped optimizer
    step."""
    trainer.sd_pipeline.unet.train()
    trainer._train_batched_samples(0, 0, 0, batches)
