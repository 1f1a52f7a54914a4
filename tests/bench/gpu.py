"""What waits for a GPU, in one command that checks itself; README.md has the parts

Run: python tests/bench/gpu.py
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from recipe import brightness
from settings import describe, for_device
from timing import give_back, peak_growth, seconds_of

from ddpo_tutorial.configs import Config, load_config
from ddpo_tutorial.estimates import memory_bytes
from ddpo_tutorial.pipelines import add_lora, load_model, product_dtype, save_memory
from ddpo_tutorial.reports import gain_of, read_rows
from ddpo_tutorial.rewards import tiny_aesthetic
from ddpo_tutorial.sampling import rescore
from ddpo_tutorial.training import (
    collect,
    epoch_rng,
    evaluate,
    new_state,
    plan_updates,
    policy_for,
    train,
    update,
)

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
# scatter of the first log-ratios over the clip range, as in the last lesson
ALLOWED = dict(float32=0.02, bfloat16=0.5, float16=0.5)


def model_of(name, settings, **changes):  # Config, StableDiffusionPipeline
    """A shipped configuration and its model of `settings`, random or tiny, loaded as a run would
    load it."""
    config = load_config(name, **changes)
    if settings.model == 'tiny':
        savers = {k: getattr(config, k) for k in ('lora_rank', 'gradient_checkpointing')}
        config = load_config('tiny', **savers | dict(minibatch_size=16, dtype='float32') | changes)
    # the frozen weights of a LoRA need no more digits than they are multiplied with
    dtype = product_dtype(config, settings.device) if config.lora_rank else torch.float32
    pipe = settings.pipeline(dtype)
    if config.lora_rank:
        add_lora(pipe, config.lora_rank)
    return config, save_memory(pipe, config.gradient_checkpointing, config.vae_slicing)


def tiny_part(settings, folder) -> dict:
    """Does the tiny model learn in bfloat16 what it learns on a CPU in 32 bits? Seeds 0 to 2,
    measured as in lesson 05."""
    reward = tiny_aesthetic(settings.device)
    prompts = settings.prompts(45)
    look = Config(dtype='bfloat16')
    gains = []
    for seed in range(3):
        config = load_config('smoke' if settings.quick else 'tiny', seed=seed, dtype='bfloat16')
        pipe = load_model(config, settings.device)
        before = evaluate(look, pipe, reward, prompts[:8] if settings.quick else prompts * 2)
        train(config, pipe, reward, prompts)
        gains.append(gain_of(before, evaluate(look, pipe, reward, before.prompts))['gain_in_std'])
    stored = read_rows(ROOT / 'nbs' / 'results' / 'tiny_seeds.csv')
    cpu = [row['trained_gain_in_sd'] for row in stored]
    return dict(gains=gains, cpu=cpu, good=min(gains) >= 1 and statistics.median(gains) >= min(cpu))


def scatter_by_step(config, pipe, settings) -> list[float]:  # one a step
    """Root mean square of the log-ratios before any update, in training's mixed minibatches, over
    the clip range."""
    policy = policy_for(config, pipe)
    batch = collect(config, policy, brightness, settings.prompts(config.samples_per_epoch))
    squares = [[] for _ in config.etas]
    for pairs in plan_updates(config, epoch_rng(0, 0)):
        for minibatch in pairs.to(pipe.device).split(config.minibatch_size):
            steps, rows = minibatch.T  # number i is row i
            log_probs = rescore(policy, batch.trajectory, steps, rows).detach()
            log_ratio = log_probs - batch.trajectory.log_probs[steps, rows]
            for step, difference in zip(steps.tolist(), log_ratio.tolist()):
                squares[step].append(difference**2)
    return [statistics.mean(s) ** 0.5 / config.clip_range for s in squares]


def ratios_part(settings, folder) -> dict:
    "Is the ratio 1 before the first update, at every step and in every format?"
    found = {}
    every = dict(
        samples_per_epoch=4,
        updates_per_epoch=2,
        window_size=0,
        group_size=1,
        shared_noise=False,
        minibatch_size=4,
    )
    for dtype in ALLOWED:
        config, pipe = model_of('sd-lora-16gb', settings, dtype=dtype, **every)
        found[dtype] = scatter_by_step(config, pipe, settings)
        pipe = None
        give_back()
    overall = {
        dtype: statistics.mean(s**2 for s in scatter) ** 0.5 for dtype, scatter in found.items()
    }
    good = all(overall[dtype] <= allowed for dtype, allowed in ALLOWED.items())
    return dict(scatter=found, good=good)


def memory_part(settings, folder) -> dict:
    """An update's peak over the count of `--dry-run`; without the reward's network, which is not
    loaded here."""
    rows = {}
    names = ['sd-lora-8gb', 'sd-original'] + ([] if settings.quick else ['sd-lora-16gb', 'sd-fast'])
    for name in names:
        config, pipe = model_of(name, settings)
        # pictures that give two minibatches
        n = math.ceil(2 * config.minibatch_size / len(config.random_steps))
        short = replace(
            config,
            samples_per_epoch=n,
            updates_per_epoch=1,
            sample_batch_size=1,
            group_size=1,
            shared_noise=False,
        )
        policy = policy_for(short, pipe)
        state = new_state(short, pipe)
        batch = collect(short, policy, brightness, settings.prompts(n))
        batch = batch._replace(advantages=torch.linspace(-1, 1, n).to(pipe.device))
        parts = memory_bytes(config) | dict(reward=0)
        try:
            peak = peak_growth(
                lambda: update(short, policy, state, batch, epoch_rng(0, 0)), settings.device
            )
        except torch.OutOfMemoryError:
            peak = None
        if settings.device == 'cpu':
            parts['weights'] = 0  # what is measured there is what an update adds to them
        elif peak:
            peak = torch.cuda.max_memory_allocated()
        rows[name] = dict(
            parts, counted=sum(parts.values()), peak=peak, ratio=peak and peak / sum(parts.values())
        )
        pipe = policy = state = batch = None
        give_back()
    most = 1.25 if settings.device == 'cuda' else 4  # a CPU's libraries set much aside
    return dict(
        rows=rows, good=all(0.75 <= row['ratio'] <= most for row in rows.values() if row['peak'])
    )


def epoch_part(settings, folder) -> dict:
    """Minutes an epoch, from a part of its pictures; and the passes a second that the last lesson's
    table asks for."""
    rows = {}
    for name in ('sd-lora-16gb', 'sd-fast'):
        config, pipe = model_of(name, settings)
        short = replace(
            config, num_epochs=1, samples_per_epoch=4 if settings.quick else 32, updates_per_epoch=1
        )
        _, seconds = (
            seconds_of(
                lambda: train(short, pipe, brightness, settings.prompts(45)), settings.device
            )
            for _ in range(2)
        )
        rate = short.epoch_passes / seconds
        rows[name] = dict(minutes=config.epoch_passes / rate / 60, passes_a_second=rate)
        give_back()
    return dict(rows=rows, good=True)


def bench_part(settings, folder) -> dict:
    "The benchmark's table for this device; without TRL, the parts that do without it."
    parts = (
        ['overhead']
        if settings.quick
        else []
        if find_spec('trl')
        else ['overhead', 'recipe', 'limit', 'lora']
    )
    options = [
        *['--parts'] * bool(parts),
        *parts,
        *['--quick'] * settings.quick,
        '--out',
        folder / f'{settings.device}.md',
    ]
    done = subprocess.run(
        [sys.executable, HERE / 'bench.py', '--device', settings.device, *options], cwd=ROOT
    )
    return dict(parts=parts or 'all', good=done.returncode == 0)


def notebook_part(settings, folder) -> dict:
    """The last lesson with its cells for CUDA: it trains `sd-lora-16gb` to the end, which takes
    hours, and stores what it shows."""
    (path,) = (ROOT / 'nbs').glob('*_stable_diffusion.ipynb')
    command = [
        '-m',
        'nbconvert',
        '--to',
        'notebook',
        '--execute',
        '--output',
        f'gpu_{path.name}',
        '--output-dir',
        folder,
        path,
    ]
    return dict(good=subprocess.run([sys.executable, *command], cwd=path.parent).returncode == 0)


PARTS = dict(
    tiny=tiny_part,
    ratios=ratios_part,
    memory=memory_part,
    epoch=epoch_part,
    bench=bench_part,
    notebook=notebook_part,
)


def main(args: list[str] | None = None) -> int:  # 0 if all parts are good
    "Do what is not stored yet, store each part when it is done, and say what is good."
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    parser.add_argument(
        '--quick', action='store_true', help='small sizes, the tiny model: shows that it runs'
    )
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    parser.add_argument(
        '--out',
        type=Path,
        default=HERE / 'results' / 'gpu.json',
        help='what is in it is not done again',
    )
    asked = parser.parse_args(args)
    settings = for_device(asked.device, quick=asked.quick, model='tiny' if asked.quick else 'sd')
    stored = json.loads(asked.out.read_text(encoding='utf-8')) if asked.out.is_file() else {}
    for name in (part for part in asked.parts if part not in stored):
        start = time.perf_counter()
        found = PARTS[name](settings, asked.out.resolve().parent)
        stored[name] = dict(
            found, minutes=(time.perf_counter() - start) / 60, environment=describe(settings)
        )
        asked.out.write_text(json.dumps(stored, indent=1) + '\n', encoding='utf-8')
    for name in asked.parts:
        verdict = 'good' if stored[name]['good'] else 'NOT GOOD'
        print(f'{name:9} {verdict:9} {stored[name]["environment"]["hardware"]}')
    return int(not all(stored[name]['good'] for name in asked.parts))


if __name__ == '__main__':
    sys.exit(main())
