"""Small models and small functions that several test files use"""

import copy

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddpo_tutorial.pipelines import encode_prompts, tiny_folder
from ddpo_tutorial.sampling import make_generators, make_policy, rescore, sample

SD_SCHEDULE = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule='scaled_linear',
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
PREDICTION_TYPES = ['epsilon', 'v_prediction', 'sample']
PROMPTS = ['a cat', 'an owl', 'a cat', 'a horse', 'a fox']


def generator(seed=0):
    "A fresh CPU generator."
    return torch.Generator().manual_seed(seed)


def micro_unet(dropout=0.0):
    "A random UNet of two levels that reads 8x8 latents."
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
        dropout=dropout,
    )


def micro_vae():
    "A random VAE from 16x16 images to 8x8 latents; its scaling factor is not Stable Diffusion's."
    return AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.5,
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
    )


def micro_text_encoder():
    "A random CLIP text encoder, 16 wide, over the tiny tokenizer's ids."
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=362,
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=360,
            eos_token_id=361,
            pad_token_id=361,
        )
    )


def micro_pipeline(seed=0, dropout=0.0, **scheduler):
    "A random Stable Diffusion pipeline that makes 16x16 images in milliseconds."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusionPipeline(
            vae=micro_vae(),
            text_encoder=micro_text_encoder(),
            unet=micro_unet(dropout),
            tokenizer=CLIPTokenizer.from_pretrained(tiny_folder() / 'tokenizer'),
            scheduler=DDIMScheduler(**SD_SCHEDULE | scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(part is pipe.unet)
    return pipe


def trainable_copy(pipe):
    "A pipeline with a UNet of its own; the other parts are shared."
    parts = pipe.components | dict(unet=copy.deepcopy(pipe.unet))
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def picture(pipe):
    """A plain call of the pipeline: (1, 3, H, W). Its noise is drawn in 32 bits, because in 16
    some versions of PyTorch draw other numbers from the same seed."""
    pipe.set_progress_bar_config(disable=True)
    shape = 1, pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2
    noise = torch.randn(shape, generator=generator()).to(pipe.text_encoder.dtype)
    return pipe('a cat', num_inference_steps=5, latents=noise, output_type='pt').images.float()


def set_scheduler(pipe, **changes):
    "Give a pipeline a copy of its scheduler with some settings changed."
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
    return pipe


def moved(pipe):
    "A pipeline whose trained weights are no longer what they were, as after training."
    with torch.no_grad():
        for i, p in enumerate(p for p in pipe.unet.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn(p.shape, generator=generator(i)).to(p.dtype))
    return pipe


def weights(module):
    "A copy of all parameters in one vector."
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def gradients(module):
    "All gradients in one vector."
    return torch.cat([p.grad.flatten() for p in module.parameters()]).clone()


def calls_of(module):
    "A list that grows by the first argument of every call of a module."
    calls = []

    def remember(module, args, kwargs):
        calls.append(next(iter([*args, *kwargs.values()])))

    module.register_forward_pre_hook(remember, with_kwargs=True)
    return calls


def all_pairs(num_steps, num_samples):
    "Every (step, sample) pair, as two index tensors."
    return torch.cartesian_prod(torch.arange(num_steps), torch.arange(num_samples)).T


def rescore_all(policy, trajectory, pairs=None):
    "Rescore the pairs of a trajectory (if none are given, all) in one batch of mixed steps."
    steps, rows = all_pairs(*trajectory.log_probs.shape) if pairs is None else pairs
    return rescore(policy, trajectory, steps, rows)


def sample_some(pipe, num_steps=4, guidance_scale=2.0, eta=1.0, prompts=PROMPTS, seed=0):
    "A policy, and a trajectory that it sampled."
    policy = make_policy(pipe, num_steps, guidance_scale, eta)
    context = encode_prompts(pipe, prompts)
    return policy, sample(policy, context, make_generators(range(len(prompts)), seed))


def brightness(images, prompts):
    "A reward without a model: the mean of all pixels."
    return images.mean((1, 2, 3))


def without_time(rows):
    "Rows of metrics without the seconds, which are others at each run."
    return [{name: value for name, value in row.items() if name != 'seconds'} for row in rows]
