"""What the real model needs, without its weights: scaler, LoRA, memory savers, its exact shape.

Run: python -m pytest tests/test_stable_diffusion.py -n 0 --slow
"""

from dataclasses import replace

import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers import PROMPTS, all_pairs, brightness, micro_pipeline, sample_some
from sd_shape import clip_tokenizer, sd_networks, sd_shaped_pipeline

from ddpo_tutorial.configs import Config
from ddpo_tutorial.pipelines import add_lora, decode_latents, save_memory, save_trained
from ddpo_tutorial.predictors import Offloaded
from ddpo_tutorial.runs import load_all
from ddpo_tutorial.training import accumulate, collect, new_state, policy_for, train

SMALL = Config(
    num_epochs=1,
    samples_per_epoch=4,
    sample_batch_size=4,
    num_inference_steps=3,
    updates_per_epoch=2,
    minibatch_size=4,
    learning_rate=1e-2,
    buffer_size=8,
    min_count=2,
)


def copies(pipe, trained):
    "The weights that are trained, or those that are not."
    return {
        name: p.detach().clone()
        for name, p in pipe.unet.named_parameters()
        if p.requires_grad == trained
    }


def test_only_float16_has_a_scaler(micro):
    "Without one its gradients vanish; with one a step may be left out."
    scalers = [
        new_state(replace(SMALL, dtype=dtype), micro).scaler
        for dtype in ('auto', 'float32', 'bfloat16', 'float16')
    ]
    assert [scaler.is_enabled() for scaler in scalers] == [False, False, False, True]


def test_a_lora_is_trained_and_nothing_else(micro):
    "One update: every ratio is 1, each part of the LoRA moves, and no weight under it does."
    add_lora(micro)
    trained, frozen = copies(micro, True), copies(micro, False)
    for p in micro.unet.parameters():  # B is 0 at first, and A has no gradient then
        if p.requires_grad:
            p.data += 0.01
    (row,) = train(replace(SMALL, updates_per_epoch=1), micro, brightness, PROMPTS)
    assert abs(row['ratio'] - 1) < 1e-6 and row['clipfrac'] == 0
    assert all(torch.equal(p, frozen[name]) for name, p in copies(micro, False).items())
    assert not any(
        torch.allclose(p, trained[name] + 0.01, rtol=0, atol=1e-4)
        for name, p in copies(micro, True).items()
    )


# memory savers


def gradient_and_bytes(policy, batch):
    "The gradient of one update, and the bytes that autograd keeps for it."
    kept = []

    def keep(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    pipe = policy.pipe
    pipe.unet.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        accumulate(SMALL, policy, batch, all_pairs(3, 4).T, new_state(SMALL, pipe).scaler)
    return torch.cat([p.grad.flatten() for p in pipe.unet.parameters() if p.requires_grad]), sum(
        kept
    )


@pytest.mark.parametrize('lora', [False, True])
def test_gradient_checkpointing_keeps_less_and_changes_nothing(micro, lora):
    """In evaluation mode, as the loop has it; and for a LoRA, where the first layers ask for no
    gradient."""
    if lora:
        add_lora(micro)
    policy = policy_for(SMALL, micro)
    batch = collect(SMALL, policy, brightness, PROMPTS[:4])._replace(
        advantages=torch.tensor([1.0, -2.0, 0.5, 0.3])
    )
    plain, much = gradient_and_bytes(policy, batch)
    save_memory(micro, gradient_checkpointing=True)
    thrifty, little = gradient_and_bytes(policy, batch)
    torch.testing.assert_close(thrifty, plain, rtol=1e-4, atol=1e-6)
    assert plain.abs().max() > 1e-4 and little < 0.7 * much, (little, much)


def test_memory_savers_change_no_result(tmp_path):
    "A run with all of them is the run without; and they are on."
    micro_pipeline().save_pretrained(tmp_path)
    plain = replace(SMALL, model=str(tmp_path), reward='alignment', lora_rank=4)
    thrifty = replace(plain, gradient_checkpointing=True, vae_slicing=True, reward_on_cpu=True)
    (pipe, reward, _), (other, offloaded, _) = load_all(plain, 'cpu'), load_all(thrifty, 'cpu')
    assert other.unet.is_gradient_checkpointing and other.vae.use_slicing
    assert all(isinstance(term, Offloaded) for _, term in offloaded.terms.values())
    a, b = train(plain, pipe, reward, PROMPTS)[0], train(thrifty, other, offloaded, PROMPTS)[0]
    for name in set(a) - {'seconds'}:
        assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    assert a['grad_norm'] > 0 and {'reward_look', 'reward_words'} <= set(a)


# the exact shape


def test_networks_have_the_published_sizes():
    with torch.device('meta'):
        networks = sd_networks()
    sizes = {
        name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()
    }
    assert sizes == dict(unet=859_520_964, vae=83_653_863, text_encoder=123_060_480)
    assert (
        networks['unet'].config.sample_size == 64
        and networks['vae'].config.scaling_factor == 0.18215
    )


def test_tokenizer_is_clips():
    "Another vocabulary would be other words for the text encoder."
    texts = ['a photo of a hippopotamus, 4k!', '', 'Ein Bär']
    ours = clip_tokenizer()(
        texts, padding='max_length', max_length=77, truncation=True, return_tensors='pt'
    ).input_ids
    theirs = open_clip.get_tokenizer('ViT-L-14')(texts)
    for a, b in zip(ours.tolist(), theirs.tolist()):
        end = a.index(49407) + 1
        assert a[:end] == b[:end] and set(a[end:]) <= {
            49407
        }  # Stable Diffusion pads with the end token, open_clip with zeros


@pytest.fixture(scope='module')
def sd_shaped():
    "Stable Diffusion v1.4's exact shape, random weights, pictures of 64 pixels."
    return sd_shaped_pipeline(image_size=64)


SD_EPOCH = Config(
    num_epochs=1,
    samples_per_epoch=2,
    sample_batch_size=2,
    num_inference_steps=2,
    guidance_scale=5.0,
    updates_per_epoch=1,
    minibatch_size=1,
    learning_rate=3e-4,
    clip_range=1e-4,
    buffer_size=8,
    min_count=2,
)


def one_epoch(pipe):
    """An epoch of two samples and two steps: a finite gradient in every trained tensor, and ratio 1
    before the update."""
    seen, trained = {}, {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}

    def hook_of(name):
        def hook(p):
            seen[name] = seen.get(name, True) and bool(p.grad.isfinite().all())

        return hook

    hooks = [p.register_post_accumulate_grad_hook(hook_of(name)) for name, p in trained.items()]
    (row,) = train(SD_EPOCH, pipe, brightness, ['a cat', 'an owl'])
    for hook in hooks:
        hook.remove()
    assert set(seen) == set(trained) and all(seen.values())
    assert abs(row['ratio'] - 1) < 1e-5 and row['clipfrac'] == 0 and row['grad_norm'] > 0


def images_of(pipe):
    _, trajectory = sample_some(pipe)
    with torch.no_grad():
        return decode_latents(pipe, trajectory.latents[-1])


@pytest.mark.slow
def test_stable_diffusion_shaped_lora_epoch(tmp_path, sd_shaped):
    "And the same pictures after saving and reloading."
    pipe = add_lora(StableDiffusionPipeline(**sd_shaped.components, requires_safety_checker=False))
    one_epoch(pipe)
    images = images_of(pipe)
    save_trained(pipe, tmp_path)
    pipe.unload_lora_weights()
    assert not torch.equal(images_of(pipe), images)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(images_of(pipe), images, rtol=0, atol=1e-5)
    pipe.unload_lora_weights()


@pytest.mark.slow
def test_stable_diffusion_shaped_full_epoch(sd_shaped):
    "All 859,520,964 weights; needs about 16 GB of memory."
    sd_shaped.unet.requires_grad_(True)
    one_epoch(sd_shaped)
