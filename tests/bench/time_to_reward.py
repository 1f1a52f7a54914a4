"""Time to reward: seconds of training until the evaluation reward has risen by one initial standard deviation

Ours at its defaults, TRL at its best settings.
"""
import math
import time

import torch

from ddpo_tutorial.configs import Config
from ddpo_tutorial.pipelines import load_pipeline
from ddpo_tutorial.prompts import fill_template, simple_animals
from ddpo_tutorial.rewards import tiny_aesthetic
from ddpo_tutorial.training import evaluate, train

from trl_side import make_trainer

MOST_EPOCHS = 16


class Reached(Exception):
    "The evaluation reward has risen far enough: this run can end."


class Curve:
    "A run as it goes on: the evaluation reward after every epoch, and the seconds its epochs took; evaluations are not counted."
    def __init__(self,
        config: Config, # the sampling settings of the evaluation
        pipe, # StableDiffusionPipeline in training
        reward, # reward(images, prompts) -> (B,)
        aim: float = 1., # gain to reach, in initial standard deviations
    ):
        self.config, self.pipe, self.reward, self.aim = config, pipe, reward, aim
        animals = fill_template(simple_animals())
        self.prompts = (animals * 2)[:64]
        rewards = self.rewards_now()
        self.spread, self.means, self.seconds = rewards.std(correction=0).item(), [rewards.mean().item()], [0.]

    def rewards_now(self) -> torch.Tensor: # (64,)
        "Rewards on prompts and noise that are the same for every run."
        self.pipe.unet.eval()
        return evaluate(self.config, self.pipe, self.reward, self.prompts).rewards

    def add(self,
        seconds: float, # of the epoch
    ) -> None:
        "Evaluate after an epoch. Raises Reached when the gain is large enough."
        self.means.append(self.rewards_now().mean().item())
        self.seconds.append(self.seconds[-1] + seconds)
        print(f'    epoch {len(self.means) - 1}: {self.seconds[-1]:.1f} s, gain {self.gains()[-1]:+.2f} sd', flush=True)
        if self.gains()[-1] >= self.aim: raise Reached

    def gains(self) -> list[float]: # one an evaluation, 0 at first
        "Gains in units of the initial standard deviation."
        return [(m - self.means[0]) / self.spread for m in self.means]

    def result(self) -> dict: # for the JSON
        "The run in numbers; `seconds_to_aim` is None when the aim was not reached."
        epochs = list(range(len(self.means)))
        return dict(initial_mean=self.means[0], initial_sd=self.spread, means=self.means, gains=self.gains(), seconds=self.seconds,
                    seconds_to_aim=crossing(self.seconds, self.gains(), self.aim), epochs_to_aim=crossing(epochs, self.gains(), self.aim))


def crossing(
    x: list[float], # where
    y: list[float], # what, 0 at first
    aim: float, # the value to reach
) -> float | None: # None when it is never reached
    "Where a polygon first reaches a value."
    for i in range(1, len(y)):
        if y[i] >= aim: return x[i - 1] + (x[i] - x[i - 1]) * (aim - y[i - 1]) / (y[i] - y[i - 1])
    return None


def run_ours(
    device: str, # 'cpu' or 'cuda'
    seed: int, # of the run
    epochs: int, # at most
    learning_rate: float, # the default of Config
) -> dict: # of `Curve.result`
    "The package's `train` at its defaults."
    config = Config(num_epochs=epochs, seed=seed, learning_rate=learning_rate)
    pipe, reward = load_pipeline('tiny', device), tiny_aesthetic(device)
    curve = Curve(config, pipe, reward)
    try: train(config, pipe, reward, fill_template(simple_animals()), lambda epoch: curve.add(epoch.row['seconds']))
    except Reached: pass
    return curve.result()


def run_trl(
    device: str, # 'cpu' or 'cuda'
    seed: int, # of the run
    epochs: int, # at most
    learning_rate: float, # AdamW's
) -> dict: # of `Curve.result`
    """TRL's trainer with our epoch: 64 samples in one batch, 4 updates of 16 samples, each in one forward pass a timestep;
    statistics for each prompt as ours."""
    config = Config(num_epochs=epochs, seed=seed, learning_rate=learning_rate)
    pipe, reward = load_pipeline('tiny', device), tiny_aesthetic(device)
    prompts, generator = fill_template(simple_animals()), torch.Generator().manual_seed(seed)
    def draw(): return prompts[torch.randint(len(prompts), (), generator=generator).item()]
    curve = Curve(config, pipe, reward)
    trainer = make_trainer(pipe, config, config.samples_per_epoch // config.updates_per_epoch, reward, draw)
    step = 0
    try:
        for epoch in range(epochs):
            start = time.perf_counter()
            step = trainer.step(epoch, step)
            curve.add(time.perf_counter() - start)
    except Reached: pass
    return curve.result()


def planned(
    quick: bool, # one short run a side
) -> list[tuple]: # (side, factor of the default learning rate, seed), in the order they are run
    "Ours and TRL at our learning rate in turn, seed by seed; then TRL at others."
    seeds = (0,) if quick else (0, 1, 2)
    others = [('trl', factor, seed) for factor in (2., .5) for seed in seeds if not quick]
    return [(side, 1., seed) for seed in seeds for side in ('ours', 'trl')] + others


def reward_part(
    settings, # of the run
    done: list[dict], # runs that a former call has finished: not run again
    keep, # called with all runs after each
) -> list[dict]: # all runs
    "Run what is missing. Each run is kept as soon as it is finished."
    runs, default = list(done), Config().learning_rate
    for side, factor, seed in planned(settings.quick):
        rate = factor * default
        if any((r['side'], r['seed']) == (side, seed) and math.isclose(r['learning_rate'], rate) for r in runs): continue
        print(f'  {side}, learning rate {rate:g}, seed {seed}', flush=True)
        result = dict(ours=run_ours, trl=run_trl)[side](settings.device, seed, 1 if settings.quick else MOST_EPOCHS, rate)
        runs.append(dict(side=side, learning_rate=rate, seed=seed, **result))
        keep(runs)
    return runs
