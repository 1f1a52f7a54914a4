"""What waits for a GPU, in one command that checks itself: `python tests/bench/gpu.py`; README.md has the parts"""
import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from ddpo_tutorial.configs import Config, read_config
from ddpo_tutorial.pipelines import add_lora, compute_dtype, save_memory
from ddpo_tutorial.rewards import tiny_aesthetic
from ddpo_tutorial.runs import load_model, memory, summary
from ddpo_tutorial.sampling import make_schedule, rescore
from ddpo_tutorial.training import autocast, collect, epoch_rng, evaluate, new_state, plan_updates, train, update

from recipe import brightness
from settings import describe, for_device
from timing import give_back, peak_growth, seconds_of

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
ALLOWED = dict(float32=.02, bfloat16=.5, float16=.5) # scatter of the first log-ratios over the clip range, as in the last lesson


def model_of(name, settings, **changes): # Config, StableDiffusionPipeline
    "A shipped configuration and its model of `settings`, random or tiny, loaded as a run would load it."
    config = Config(**read_config(name) | changes)
    if settings.model == 'tiny':
        savers = {k: getattr(config, k) for k in ('lora_rank', 'gradient_checkpointing')}
        config = Config(**read_config('tiny') | savers | dict(minibatch_size=16, dtype='float32') | changes)
    dtype = compute_dtype(settings.device) if config.dtype == 'auto' else getattr(torch, config.dtype)
    pipe = settings.pipeline(dtype if config.lora_rank else torch.float32)
    if config.lora_rank: add_lora(pipe, config.lora_rank)
    return config, save_memory(pipe, config.gradient_checkpointing, config.vae_slicing)


def tiny_part(settings, folder) -> dict:
    "Does the tiny model learn in bfloat16 what it learns on a CPU in 32 bits? Seeds 0 to 2, measured as in lesson 07."
    reward, prompts, gains, look = tiny_aesthetic(settings.device), settings.prompts(45), [], Config(dtype='bfloat16')
    for seed in range(3):
        config = Config(**read_config('smoke' if settings.quick else 'tiny') | dict(seed=seed, dtype='bfloat16'))
        pipe = load_model(config, settings.device)
        before = evaluate(look, pipe, reward, prompts[:8] if settings.quick else prompts * 2)
        train(config, pipe, reward, prompts)
        gains.append(summary(before, evaluate(look, pipe, reward, before.prompts))['gain_in_std'])
    seeds = (ROOT / 'nbs' / 'results' / '07_tiny_seeds.csv').read_text().splitlines()
    cpu = [float(row['trained_gain_in_sd']) for row in csv.DictReader(seeds)]
    return dict(gains=gains, cpu=cpu, good=min(gains) >= 1 and statistics.median(gains) >= min(cpu))


def scatter_by_step(config, pipe, settings) -> list[float]: # one a step
    "Root mean square of the log-ratios before any update, in training's mixed minibatches, over the clip range."
    n, squares = config.samples_per_epoch, [[] for _ in config.etas]
    batch = collect(config, pipe, brightness, settings.prompts(n), list(range(n)))
    schedule = make_schedule(pipe.scheduler, config.num_inference_steps, config.etas, pipe.device)
    x, old = batch.trajectory.latents, batch.trajectory.log_probs
    for step, row in (part.to(x.device).T for u in plan_updates(config, epoch_rng(0, 0)) for part in u.split(config.minibatch_size)):
        context = batch.context._replace(text=batch.context.text[row])
        with autocast(config, pipe):
            new = rescore(pipe, context, schedule, step, x[step, row], x[step + 1, row], config.guidance_scale).detach()
        for s, difference in zip(step.tolist(), (new - old[step, row]).tolist()): squares[s].append(difference**2)
    return [statistics.mean(s) ** .5 / config.clip_range for s in squares]


def ratios_part(settings, folder) -> dict:
    "Is the ratio 1 before the first update, at every step and in every format?"
    found, every = {}, dict(samples_per_epoch=4, updates_per_epoch=2, window_size=0, group_size=1, shared_noise=False, minibatch_size=4)
    for dtype in ALLOWED:
        found[dtype] = scatter_by_step(*model_of('sd-lora-16gb', settings, dtype=dtype, **every), settings)
        give_back()
    return dict(scatter=found, good=all(statistics.mean(s**2 for s in found[d]) ** .5 <= ALLOWED[d] for d in ALLOWED))


def memory_part(settings, folder) -> dict:
    "An update's peak over the count of `--dry-run`; without the reward's network, which is not loaded here."
    rows = {}
    for name in ('sd-lora-8gb', 'sd-original', *(() if settings.quick else ('sd-lora-16gb', 'sd-fast'))):
        config, pipe = model_of(name, settings)
        n = -(-2 * config.minibatch_size // len(config.random_steps)) # pictures that give two minibatches
        short = replace(config, samples_per_epoch=n, updates_per_epoch=1, sample_batch_size=1, group_size=1, shared_noise=False)
        batch, state = collect(short, pipe, brightness, settings.prompts(n), list(range(n))), new_state(short, pipe)
        parts = memory(config) | dict(reward=0)
        try: peak = peak_growth(lambda: update(short, pipe, state, batch, torch.linspace(-1, 1, n), epoch_rng(0, 0)), settings.device)
        except torch.OutOfMemoryError: peak = None
        if settings.device == 'cpu': parts['weights'] = 0 # what is measured there is what an update adds to them
        elif peak: peak = torch.cuda.max_memory_allocated()
        rows[name] = dict(parts, counted=sum(parts.values()), peak=peak, ratio=peak and peak / sum(parts.values()))
        pipe = state = batch = None
        give_back()
    most = 1.25 if settings.device == 'cuda' else 4 # a CPU's libraries set much aside
    return dict(rows=rows, good=all(.75 <= row['ratio'] <= most for row in rows.values() if row['peak']))


def epoch_part(settings, folder) -> dict:
    "Minutes an epoch, from a part of its pictures; and the passes a second that the last lesson's table asks for."
    rows = {}
    for name in ('sd-lora-16gb', 'sd-fast'):
        config, pipe = model_of(name, settings)
        short = replace(config, num_epochs=1, samples_per_epoch=4 if settings.quick else 32, updates_per_epoch=1)
        _, seconds = (seconds_of(lambda: train(short, pipe, brightness, settings.prompts(45)), settings.device) for _ in range(2))
        rate = short.epoch_passes / seconds
        rows[name] = dict(minutes=config.epoch_passes / rate / 60, passes_a_second=rate)
        give_back()
    return dict(rows=rows, good=True)


def bench_part(settings, folder) -> dict:
    "The benchmark's table for this device; without TRL, the parts that do without it."
    parts = ['overhead'] if settings.quick else [] if find_spec('trl') else ['overhead', 'recipe', 'limit', 'lora']
    options = [*['--parts'] * bool(parts), *parts, *['--quick'] * settings.quick, '--out', folder / f'{settings.device}.md']
    done = subprocess.run([sys.executable, HERE / 'bench.py', '--device', settings.device, *options], cwd=ROOT)
    return dict(parts=parts or 'all', good=done.returncode == 0)


def notebook_part(settings, folder) -> dict:
    "The last lesson with its cells for CUDA: it trains `sd-lora-16gb` to the end, which takes hours, and stores what it shows."
    path, = (ROOT / 'nbs').glob('*_stable_diffusion.ipynb')
    command = ['-m', 'nbconvert', '--to', 'notebook', '--execute', '--output', f'gpu_{path.name}', '--output-dir', folder, path]
    return dict(good=subprocess.run([sys.executable, *command], cwd=path.parent).returncode == 0)


PARTS = dict(tiny=tiny_part, ratios=ratios_part, memory=memory_part, epoch=epoch_part, bench=bench_part, notebook=notebook_part)


def main(args: list[str] | None = None) -> int: # 0 if all parts are good
    "Do what is not stored yet, store each part when it is done, and say what is good."
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    parser.add_argument('--quick', action='store_true', help='small sizes, the tiny model: shows that it runs')
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    parser.add_argument('--out', type=Path, default=HERE / 'results' / 'gpu.json', help='what is in it is not done again')
    asked = parser.parse_args(args)
    settings = for_device(asked.device, quick=asked.quick, model='tiny' if asked.quick else 'sd')
    stored = json.loads(asked.out.read_text(encoding='utf-8')) if asked.out.is_file() else {}
    for name in (part for part in asked.parts if part not in stored):
        start = time.perf_counter()
        found = PARTS[name](settings, asked.out.resolve().parent)
        stored[name] = dict(found, minutes=(time.perf_counter() - start) / 60, environment=describe(settings))
        asked.out.write_text(json.dumps(stored, indent=1) + '\n', encoding='utf-8')
    for name in asked.parts: print(f'{name:9} {"good" if stored[name]["good"] else "NOT GOOD":9} {stored[name]["environment"]["hardware"]}')
    return int(not all(stored[name]['good'] for name in asked.parts))


if __name__ == '__main__': sys.exit(main())
