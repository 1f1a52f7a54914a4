"""What a run needs, counted without a card: against real memory, real forward passes and numbers computed by hand"""
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile

from ddpo_tutorial import runs
from ddpo_tutorial.configs import Config, main, read_config
from ddpo_tutorial.pipelines import add_lora, compute_dtype, save_memory
from ddpo_tutorial.runs import SCORERS, SD_REST, SD_UNET, memory, needs, saved_bytes
from ddpo_tutorial.training import collect, epoch_rng, evaluate, new_state, train, update
from helpers import PROMPTS, brightness, micro_pipeline, trainable_copy
from sd_shape import sd_networks

sys.path.append(str(Path(__file__).parent / 'bench'))
from timing import peak_growth # noqa: E402

def on_meta(config, lora=0, dtype=torch.float32):
    "A UNet of a shape, without memory."
    with torch.device('meta'): pipe = torch.nn.ModuleDict(dict(unet=UNet2DConditionModel.from_config(config))).eval()
    return add_lora(pipe.to(dtype), lora).unet if lora else pipe.unet

# activations

def forward(unet, rows):
    "A forward pass that keeps what a backward pass needs."
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    return unet(torch.randn(rows, 4, size, size), torch.full((rows,), 500), torch.randn(rows, 77, width)).sample

def allocated(work):
    "The bytes that a call has allocated and not freed, by PyTorch's own bookkeeping; its result is among them."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found: result = work()
    return sum(event.self_cpu_memory_usage for event in found.key_averages()) * (result is not None)

@pytest.mark.parametrize('rows', [2, 16])
@pytest.mark.parametrize('lora', [0, 8])
def test_count_is_what_a_forward_pass_really_allocates(tiny, lora, rows):
    "The tiny model's UNet on a CPU. Besides, there is the pass's output, a thousandth."
    pipe = trainable_copy(tiny)
    if lora: add_lora(pipe, lora)
    forward(pipe.unet, rows)
    real = allocated(lambda: forward(pipe.unet, rows))
    counted = saved_bytes(on_meta(tiny.unet.config, lora), torch.float32, rows)
    assert counted == pytest.approx(real, rel=.005), (counted / 1e6, real / 1e6)
    assert counted != pytest.approx(saved_bytes(on_meta(tiny.unet.config, 8 - lora), torch.float32, rows), rel=.1)

@pytest.mark.parametrize('checkpointing', [False, True])
def test_count_against_the_memory_of_the_process_in_an_update(tiny, checkpointing):
    "Resident memory at its peak, forward and backward: what is counted, and a little that lives for a moment."
    config = Config(**read_config('tiny') | dict(dtype='float32', samples_per_epoch=128, updates_per_epoch=1, minibatch_size=128,
                                                 gradient_checkpointing=checkpointing))
    pipe = save_memory(add_lora(trainable_copy(tiny), config.lora_rank), checkpointing)
    batch, state = collect(config, pipe, brightness, PROMPTS[:1] * 128, list(range(128))), new_state(config, pipe)
    peak = peak_growth(lambda: update(config, pipe, state, batch, torch.linspace(-1, 1, 128), epoch_rng(0, 0)), 'cpu')
    counted = sum(memory(config).values()) - memory(config)['weights']
    print(checkpointing, counted / 1e6, peak / 1e6)
    assert .8 < peak / counted < 1.25, (counted / 1e6, peak / 1e6)
