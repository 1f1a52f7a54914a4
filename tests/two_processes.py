"""What test_processes.py starts with torchrun, on one process and on two: each trains, and the first writes what was found"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ddpo_tutorial.configs import Config
from ddpo_tutorial.rewards import WeightedSum
from ddpo_tutorial.training import collect, epoch_rng, new_state, train, update
from helpers import PROMPTS, brightness, micro_pipeline, weights

SMALL = Config(num_epochs=2, samples_per_epoch=7, sample_batch_size=3, num_inference_steps=3, updates_per_epoch=3, minibatch_size=5,
    learning_rate=1e-3, buffer_size=8, min_count=2)

GROUPS = replace(SMALL, samples_per_epoch=9, group_size=3, shared_noise=True, window_start=1)

def dark(images, prompts): return -brightness(images, prompts)

def one_step(config, max_grad_norm):
    "How one step of plain gradient descent changes the weights, and the statistics of the update."
    pipe, config = micro_pipeline(), replace(config, updates_per_epoch=1, max_grad_norm=max_grad_norm)
    before, state = weights(pipe.unet), new_state(config, pipe)
    state.optimizer = torch.optim.SGD(pipe.unet.parameters(), lr=1.)
    with PartialState().split_between_processes(list(range(7))) as numbers:
        batch = collect(config, pipe, brightness, [(PROMPTS * 2)[n] for n in numbers], numbers)
    stats, = update(config, pipe, state, batch, torch.linspace(-1, 2, 7), epoch_rng(0, 0))
    return dict(moved=(weights(pipe.unet) - before).tolist(), stats=stats)

def whole_run(config=SMALL):
    "Rewards and advantages of each epoch, the pictures' prompts and numbers of all processes, and weights after it."
    pipe, epochs = micro_pipeline(), []
    reward = WeightedSum(light=(1., brightness), dark=(2., dark))
    def on_epoch(epoch):
        mine = list(zip(epoch.batch.numbers, epoch.batch.prompts))
        same = gather_object([weights(pipe.unet).double().sum().item()])
        epochs.append(dict(rewards=epoch.rewards.tolist(), advantages=epoch.advantages.tolist(), pictures=gather_object(mine),
            shares=gather_object([len(mine)]), sums=same, row={k: v for k, v in epoch.row.items() if k != 'seconds'}))
    train(config, pipe, reward, PROMPTS, on_epoch)
    return epochs

if __name__ == '__main__':
    processes = PartialState(cpu=True)
    found = dict(processes=processes.num_processes, steps=[one_step(SMALL, norm) for norm in (1e9, 1e-3)], epochs=whole_run(),
        groups=whole_run(GROUPS))
    if processes.is_main_process: Path(sys.argv[1]).write_text(json.dumps(found))
