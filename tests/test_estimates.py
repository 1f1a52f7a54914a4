"""What a run needs, counted without a card: against real memory, real forward passes, by hand.

Run: python -m pytest tests/test_estimates.py -n 0
"""

from dataclasses import replace
from itertools import accumulate as accumulate_sums

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import PROMPTS, brightness, micro_pipeline, trainable_copy
from sd_shape import sd_networks
from torch.profiler import ProfilerActivity, profile

from ddpo_tutorial.command import main
from ddpo_tutorial.configs import Config, load_config
from ddpo_tutorial.estimates import (
    PRICE,
    RATE,
    SCORERS,
    SD_REST,
    SD_UNET,
    describe_needs,
    memory_bytes,
    saved_bytes,
)
from ddpo_tutorial.pipelines import add_lora, save_memory
from ddpo_tutorial.training import evaluate, train


def on_meta(config, lora=0, dtype=torch.float32):
    "A UNet of a shape, without memory."
    with torch.device('meta'):
        pipe = torch.nn.ModuleDict(dict(unet=UNet2DConditionModel.from_config(config))).eval()
    return add_lora(pipe.to(dtype), lora).unet if lora else pipe.unet


# activations


def forward(unet, rows):
    "A forward pass that keeps what a backward pass needs."
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    return unet(
        torch.randn(rows, 4, size, size), torch.full((rows,), 500), torch.randn(rows, 77, width)
    ).sample


def allocated(work):
    """The bytes that a call has allocated and not freed, by PyTorch's own bookkeeping; its result
    is among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = work()
    return sum(event.self_cpu_memory_usage for event in found.key_averages()) * (result is not None)


@pytest.mark.parametrize('rows', [2, 16])
@pytest.mark.parametrize('lora', [0, 8])
def test_count_is_what_a_forward_pass_really_allocates(tiny, lora, rows):
    "The tiny model's UNet on a CPU. Besides, there is the pass's output, a thousandth."
    pipe = trainable_copy(tiny)
    if lora:
        add_lora(pipe, lora)
    forward(pipe.unet, rows)
    real = allocated(lambda: forward(pipe.unet, rows))
    counted = saved_bytes(on_meta(tiny.unet.config, lora), torch.float32, rows)
    assert counted == pytest.approx(real, rel=0.005), (counted / 1e6, real / 1e6)
    assert counted != pytest.approx(
        saved_bytes(on_meta(tiny.unet.config, 8 - lora), torch.float32, rows), rel=0.1
    )


def peak(work):
    """The most that PyTorch had allocated at a time during a call, from the profiler's list of
    every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == '[memory]']
    return max(accumulate_sums(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('lora', [0, 8])
def test_count_is_about_the_peak_of_forward_and_backward(tiny, lora, checkpointing):
    """With gradient checkpointing the largest block comes on top; what lives for a moment is a
    tenth or so."""
    pipe = trainable_copy(tiny)
    if lora:
        add_lora(pipe, lora)
    unet = save_memory(pipe, checkpointing).unet

    def work():
        forward(unet, 16).square().mean().backward()

    work()
    counted = saved_bytes(on_meta(tiny.unet.config, lora), torch.float32, 16, checkpointing)
    assert 0.85 < peak(work) / counted < 1.15, (counted / 1e6, peak(work) / 1e6)


def test_checkpointing_keeps_less():
    """And the block that is computed again counts: without it, there would be less than half of
    this."""
    kept = [
        saved_bytes(on_meta(SD_UNET, 4), torch.float32, 2, checkpointing)
        for checkpointing in (False, True)
    ]
    assert kept[1] < 0.3 * kept[0]


def test_activations_grow_in_proportion_and_weights_do_not_count():
    """What the exercise of the last lesson builds on. In a full fine-tune autocast's 16-bit copy of
    the weights is kept once."""
    for rank, once in ((4, 0), (0, 2 * 859_520_964)):
        one, two, three = (
            memory_bytes(sd(lora_rank=rank, minibatch_size=n))['activations'] for n in (1, 2, 3)
        )
        assert three - two == pytest.approx(two - one, rel=0.01) and 2 * one - two == pytest.approx(
            once, rel=0.03, abs=0.01 * one
        )


# all parts


def sd(**changes):
    return load_config('sd-lora-16gb', **changes)


def test_parts_by_hand():
    """Stable Diffusion v1.4: 859,520,964 weights in the UNet, 206,714,343 in VAE and text encoder;
    797,184 in a LoRA of rank 4."""
    lora, full = memory_bytes(sd()), memory_bytes(load_config('sd-original'))
    assert (
        lora['weights'] == 2 * (859_520_964 + 206_714_343) + 4 * 797_184
        and lora['gradients'] == 4 * 797_184
    )
    assert (
        full['weights'] == 4 * (859_520_964 + 206_714_343) and full['gradients'] == 4 * 859_520_964
    )
    for parts in (lora, full):
        assert (
            parts['moments'] == 2 * parts['gradients'] and parts['reward'] == SCORERS['aesthetic']
        )
    assert memory_bytes(sd(dtype='float32'))['weights'] == 2 * lora['weights'] - 4 * 797_184
    assert (
        memory_bytes(sd(reward_on_cpu=True))['reward']
        == memory_bytes(sd(reward='compressibility'))['reward']
        == 0
    )


def test_constants_are_the_published_shape():
    "Against the test's own networks."
    with torch.device('meta'):
        networks, unet = sd_networks(), UNet2DConditionModel.from_config(SD_UNET)
    assert dict(unet.config) == dict(networks['unet'].config)
    assert SD_REST == sum(
        p.numel() for name in ('vae', 'text_encoder') for p in networks[name].parameters()
    )


def test_a_folder_has_its_own_shape(tmp_path):
    "Guidance doubles the rows; an update of few pairs has no larger minibatch."
    micro_pipeline().save_pretrained(tmp_path)
    config = Config(
        model=str(tmp_path),
        samples_per_epoch=4,
        updates_per_epoch=1,
        num_inference_steps=2,
        guidance_scale=1.0,
        buffer_size=8,
    )
    weights = sum(p.numel() for p in micro_pipeline().unet.parameters())
    assert memory_bytes(config)['gradients'] == 4 * weights
    kept = [
        memory_bytes(c)['activations']
        for c in (config, replace(config, guidance_scale=2.0), replace(config, minibatch_size=4))
    ]
    assert kept[1] > 1.8 * kept[0] and kept[0] > 1.5 * kept[2], kept
    assert memory_bytes(replace(config, minibatch_size=8))['activations'] == kept[0]


# time


def rows_of(pipe, work):
    "Pictures that went through the UNet during a call, a backward pass counted as two."
    seen = []

    def look(module, args, kwargs):
        seen.append(
            (3 if torch.is_grad_enabled() else 1) * len(next(iter([*args, *kwargs.values()])))
        )

    hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    work()
    hook.remove()
    return sum(seen)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(guidance_scale=1.0),
        dict(num_inner_epochs=2),
        dict(window_size=2),
        dict(group_size=2, shared_noise=True),
        dict(watch_images=3),
    ],
    ids=str,
)
def test_forward_passes_are_those_of_a_run(changes):
    config = Config(
        **dict(
            num_epochs=2,
            samples_per_epoch=6,
            updates_per_epoch=2,
            num_inference_steps=3,
            eval_images=5,
            watch_images=0,
            buffer_size=8,
        )
        | changes
    )
    pipe = micro_pipeline()

    def look(n):
        return evaluate(config, pipe, brightness, (PROMPTS * 2)[:n])

    def on_epoch(epoch):
        if config.watch_images:
            look(config.watch_images)

    def run():
        look(config.eval_images)
        train(config, pipe, brightness, PROMPTS, on_epoch=on_epoch)
        look(config.eval_images)

    assert config.forward_passes == rows_of(pipe, run)


# the command


def test_dry_run_says_the_same(capsys):
    "Of a model that nobody has downloaded, and of the tiny one."
    for name in ('sd-fast', 'tiny'):
        config = load_config(name)
        assert main(['--config', name, '--dry-run']) == 0
        said = capsys.readouterr().out
        assert said.endswith(describe_needs(config) + '\n')
        assert (
            f'{sum(memory_bytes(config).values()) / 1e9:.2f} GB' in said
            and f'{config.forward_passes:,} forward passes' in said
        )
        hours = config.forward_passes / RATE / 3600
        assert (f'{hours:.1f} hours at {RATE} a second, {hours * PRICE:.1f} at' in said) == (
            name == 'sd-fast'
        )
