"""A pipeline of Stable Diffusion v1.4's exact shape with random weights: no download needed"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddpo_tutorial.pipelines import prepare_pipeline


def sd_networks(
    image_size: int = 512,  # pixels a side, a multiple of 64
) -> dict:  # unet, vae, text_encoder; random weights, from torch's global generator
    "The networks of CompVis/stable-diffusion-v1-4 from its published configuration."
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        projection_dim=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        hidden_act='quick_gelu',
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=image_size,
        down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4,
    )
    unet = UNet2DConditionModel(
        sample_size=image_size // 8, cross_attention_dim=768, attention_head_dim=8
    )
    return dict(unet=unet, vae=vae, text_encoder=CLIPTextModel(text))


def clip_tokenizer() -> CLIPTokenizer:  # 49,408 tokens, 77 a prompt
    "The tokenizer of Stable Diffusion, which is CLIP's; its vocabulary comes with open_clip."
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    names = {'<start_of_text>': '<|startoftext|>', '<end_of_text>': '<|endoftext|>'}
    vocabulary = {names.get(word, word): i for word, i in theirs.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(theirs.bpe_ranks), model_max_length=77)


def sd_shaped_pipeline(
    image_size: int = 512,  # pixels a side, a multiple of 64
    device: str | torch.device = 'cpu',  # where it is built
    dtype: torch.dtype = torch.float32,  # of all weights
    seed: int = 0,  # of the weights
) -> StableDiffusionPipeline:  # as from `load_pipeline`, with random weights: it draws noise
    "Takes the memory and the time of the real one."
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        networks = sd_networks(image_size)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule='scaled_linear',
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        **networks,
        tokenizer=clip_tokenizer(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return prepare_pipeline(pipe, device, dtype)
