"""How good the shipped models are, on fresh drawings and samples: the numbers of 01_tiny_models"""

import time

import torch

from ddpo_tutorial.drawings import critic, make_drawings
from ddpo_tutorial.pipelines import decode_latents, encode_prompts
from ddpo_tutorial.prompts import fill_template, tiny_animals
from ddpo_tutorial.rewards import tiny_aesthetic, tiny_similarity
from ddpo_tutorial.sampling import make_generators, make_policy, sample


def without_colour(images):
    "Is the picture grey: largest less smallest channel below 0.04 on average?"
    return (images.amax(1) - images.amin(1)).mean((1, 2)) < 0.04


def blue_around(images, width=6):
    "Is the outer frame blue: blue above green above red, and blue above red by 0.1?"
    frame = torch.ones(images.shape[-2:], dtype=torch.bool)
    frame[width:-width, width:-width] = False
    red, green, blue = images[..., frame].mean(-1).T
    return (blue > green) & (green > red) & (blue - red > 0.1)


def psnr(a, b):
    "Peak signal-to-noise ratio of images in [0, 1], in decibels."
    return -10 * (a - b).pow(2).mean((1, 2, 3)).log10()


def reconstruct(pipe, images):
    "Encode to the mean of the latents, and decode."
    latents = torch.cat([pipe.vae.encode(x * 2 - 1).latent_dist.mean for x in images.split(32)])
    return decode_latents(pipe, latents * pipe.vae.config.scaling_factor)


@torch.no_grad()
def measure_drawings(pipe, n=512):
    "The autoencoder, CLIP and the head on fresh drawings."
    world = make_drawings(n, seed=7)
    animals = tiny_animals()
    images = world['images'] / 255
    guess = tiny_similarity().classify(images, fill_template(animals))
    right = [animals[i] == a for i, a in zip(guess, world['animals'])]
    ranks = torch.stack(
        [x.argsort().argsort().double() for x in (tiny_aesthetic()(images), critic(images))]
    )
    return dict(
        psnr=psnr(images, reconstruct(pipe, images)).mean().item(),
        clip_top1=sum(right) / n,
        head_rank_correlation=ranks.corrcoef()[0, 1].item(),
    )


@torch.no_grad()
def paint(pipe, prompts, seed):
    "A picture a prompt, in 20 DDIM steps with eta 1."
    policy = make_policy(pipe, num_inference_steps=20, guidance_scale=5.0)
    generators = make_generators(range(len(prompts)), seed=seed)
    trajectory = sample(policy, encode_prompts(pipe, prompts), generators)
    return decode_latents(pipe, trajectory.latents[-1])


def measure_samples(pipe):
    """What the pipeline draws: every animal plain, every third as a sketch and on blue. The seconds
    that 16 pictures take are printed."""
    animals = tiny_animals()
    start = time.perf_counter()
    plain = paint(pipe, fill_template(animals), seed=0)
    print(f'16 pictures take {(time.perf_counter() - start) * 16 / len(animals):.1f} s')
    right = tiny_similarity().classify(plain, fill_template(animals)) == torch.arange(len(animals))
    sketches = paint(pipe, fill_template(animals[::3], 'a pencil sketch of {}'), seed=1)
    blues = paint(pipe, fill_template(animals[::3], '{} on a blue background'), seed=2)
    return dict(
        sample_top1=right.float().mean().item(),
        sketch_obeyed=without_colour(sketches).float().mean().item(),
        blue_obeyed=blue_around(blues).float().mean().item(),
    )
