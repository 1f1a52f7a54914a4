"""Time to reward: training until the evaluation reward has risen by one initial standard deviation,
in seconds and in forward passes

Ours as the command trains by default; TRL at the best of the settings that were tried on other
seeds.
"""

import math
import statistics
import time
from dataclasses import replace

import torch
from trl_side import make_trainer

from ddpo_tutorial.configs import Config, load_config
from ddpo_tutorial.pipelines import add_lora, load_pipeline
from ddpo_tutorial.prompts import fill_template, simple_animals
from ddpo_tutorial.rewards import tiny_aesthetic
from ddpo_tutorial.training import evaluate, train_epochs

MOST_FORWARDS = 61_440  # of one run: twelve epochs of the original algorithm
SEARCH_SEEDS = (100, 101, 102)
SEEDS = range(10)
OURS = load_config('tiny')
TRL = {  # what was tried for TRL; its own LoRA has rank 4
    'all weights, 1.5e-4': Config(learning_rate=1.5e-4),
    'all weights, 3e-4': Config(),
    'all weights, 6e-4': Config(learning_rate=6e-4),
    'LoRA, 1e-3': Config(learning_rate=1e-3, lora_rank=4),
    'LoRA, 3e-3': Config(learning_rate=3e-3, lora_rank=4),
    'all weights, 5 steps, 3e-4': Config(num_inference_steps=5),
}


class Curve:
    """A run as it goes on: the evaluation reward after every epoch, and what its epochs cost;
    evaluations are not counted."""

    def __init__(
        self,
        config: Config,  # of the run
        pipe,  # StableDiffusionPipeline in training
        reward,  # reward(images, prompts) -> (B,)
        aim: float = 1.0,  # gain to reach, in initial standard deviations
    ):
        self.cost = config.epoch_passes
        self.pipe = pipe
        self.reward = reward
        self.aim = aim
        self.prompts = (fill_template(simple_animals()) * 2)[:64]
        rewards = self.rewards_now()
        self.spread = rewards.std(correction=0).item()
        self.means = [rewards.mean().item()]
        self.seconds = [0.0]

    def rewards_now(self) -> torch.Tensor:  # (64,)
        "Rewards on prompts, noise and sampling settings that are the same for every run."
        self.pipe.unet.eval()
        return evaluate(Config(), self.pipe, self.reward, prompts=self.prompts).rewards

    def add(
        self,
        seconds: float,  # of the epoch
    ) -> None:
        "Evaluate after an epoch."
        self.means.append(self.rewards_now().mean().item())
        self.seconds.append(self.seconds[-1] + seconds)
        print(
            f'    epoch {len(self.means) - 1}: {self.seconds[-1]:.1f} s, '
            f'gain {self.gains()[-1]:+.2f} sd',
            flush=True,
        )

    @property
    def reached(self) -> bool:  # this run can end
        "Whether the gain is large enough for the second time in a row."
        return min(self.gains()[-2:]) >= self.aim

    def gains(self) -> list[float]:  # one an evaluation, 0 at first
        "Gains in units of the initial standard deviation."
        return [(m - self.means[0]) / self.spread for m in self.means]

    def result(self) -> dict:  # for the JSON
        "The run in numbers; what it took to the aim is None when the aim was not reached."
        costs = [self.cost * i for i in range(len(self.means))]
        return dict(
            initial_mean=self.means[0],
            initial_sd=self.spread,
            means=self.means,
            gains=self.gains(),
            seconds=self.seconds,
            forwards=costs,
            seconds_to_aim=crossing(self.seconds, self.gains(), self.aim),
            forwards_to_aim=crossing(costs, self.gains(), self.aim),
        )


def crossing(
    x: list[float],  # where
    y: list[float],  # what, 0 at first
    aim: float,  # the value to reach
) -> float | None:  # None when it is never reached, or not held
    "Where a polygon first reaches a value that it still has at the next corner."
    for i in range(1, len(y) - 1):
        if min(y[i : i + 2]) >= aim:
            return x[i - 1] + (x[i] - x[i - 1]) * (aim - y[i - 1]) / (y[i] - y[i - 1])
    return None


def start(
    config: Config,  # of the run
    device: str,  # 'cpu' or 'cuda'
):  # pipe, reward, Curve
    "A fresh model, whole or with a LoRA."
    pipe = load_pipeline('tiny', device)
    reward = tiny_aesthetic(device)
    if config.lora_rank:
        add_lora(pipe, config.lora_rank)
    return pipe, reward, Curve(config, pipe, reward)


def run_ours(
    config: Config,  # of the run
    device: str,  # 'cpu' or 'cuda'
) -> dict:  # of `Curve.result`
    "The package's training, an epoch at a time."
    pipe, reward, curve = start(config, device)
    for epoch in train_epochs(config, pipe, reward, prompts=fill_template(simple_animals())):
        curve.add(epoch.row['seconds'])
        if curve.reached:
            break
    return curve.result()


def run_trl(
    config: Config,  # of the run
    device: str,  # 'cpu' or 'cuda'
) -> dict:  # of `Curve.result`
    """TRL's trainer with the original algorithm's epoch: 64 samples in one batch, 4 updates of 16
    samples, each in one forward pass a timestep; its own statistics for each prompt."""
    pipe, reward, curve = start(config, device)
    prompts = fill_template(simple_animals())
    generator = torch.Generator().manual_seed(config.seed)

    def draw():
        return prompts[torch.randint(len(prompts), (), generator=generator).item()]

    trainer = make_trainer(
        pipe, config, config.samples_per_epoch // config.updates_per_epoch, reward=reward, draw=draw
    )
    step = 0
    for epoch in range(config.num_epochs):
        began = time.perf_counter()
        step = trainer.step(epoch, step)
        curve.add(time.perf_counter() - began)
        if curve.reached:
            break
    return curve.result()


def ranked_trl(
    runs: list[dict],  # so far
) -> list[str]:  # names, the best first
    """TRL's settings by the median of what it took to the aim on the seeds for choosing, infinite
    for a run that did not get there; among equals by the largest gain."""

    def rank(name):
        mine = [
            r
            for r in runs
            if r['side'] == 'trl' and r['settings'] == name and r['seed'] in SEARCH_SEEDS
        ]
        took = statistics.median(r['forwards_to_aim'] or math.inf for r in mine)
        return took, -statistics.median(max(r['gains']) for r in mine)

    return sorted(TRL, key=rank)


def reward_part(
    settings,  # of the run
    done: list[dict],  # runs that a former call has finished: not run again
    keep,  # called with all runs after each
) -> list[dict]:  # all runs
    """All of TRL's settings on the first seed for choosing, the two best on the other two as well;
    then ours and TRL's best in turn on the seeds for comparing. Each run is kept as soon as it is
    finished."""
    runs = list(done)

    def run(side, name, seed):
        if any((r['side'], r['settings'], r['seed']) == (side, name, seed) for r in runs):
            return
        print(f'  {side}, {name}, seed {seed}', flush=True)
        config = OURS if side == 'ours' else TRL[name]
        epochs = 1 if settings.quick else MOST_FORWARDS // config.epoch_passes
        result = dict(ours=run_ours, trl=run_trl)[side](
            replace(config, seed=seed, num_epochs=epochs), settings.device
        )
        runs.append(dict(side=side, settings=name, seed=seed, **result))
        keep(runs)

    first, *more = SEARCH_SEEDS
    for name in TRL:
        run('trl', name, first)
    best = ranked_trl(runs)[:2]
    for name in [] if settings.quick else best:
        for seed in more:
            run('trl', name, seed)
    best = min(best, key=ranked_trl(runs).index)
    for seed in SEEDS[:1] if settings.quick else SEEDS:
        run('ours', 'tiny', seed)
        run('trl', best, seed)
    return runs
