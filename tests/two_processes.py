"""What test_processes.py starts with torchrun, on one process and on two: each trains, and the
first writes what was found"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from helpers import PROMPTS, brightness, micro_pipeline, weights, without_time

from ddpo_tutorial.configs import Config
from ddpo_tutorial.rewards import WeightedSum
from ddpo_tutorial.training import collect, epoch_rng, new_state, policy_for, train, update

SMALL = Config(
    num_epochs=2,
    samples_per_epoch=7,
    sample_batch_size=3,
    num_inference_steps=3,
    updates_per_epoch=3,
    minibatch_size=5,
    learning_rate=1e-3,
    buffer_size=8,
    min_count=2,
)

GROUPS = replace(SMALL, samples_per_epoch=9, group_size=3, shared_noise=True, window_start=1)
# a picture an update, of which one process of two has none
ALONE = replace(SMALL, num_epochs=1, updates_per_epoch=7)


def dark(images, prompts):
    return -brightness(images, prompts)


def one_step(config, max_grad_norm):
    "How one step of plain gradient descent changes the weights, and the statistics of the update."
    config = replace(config, updates_per_epoch=1, max_grad_norm=max_grad_norm)
    pipe = micro_pipeline()
    policy = policy_for(config, pipe)
    before = weights(pipe.unet)
    state = new_state(config, pipe)
    state.optimizer = torch.optim.SGD(pipe.unet.parameters(), lr=1.0)
    with PartialState().split_between_processes(list(range(7))) as numbers:
        batch = collect(config, policy, brightness, [(PROMPTS * 2)[n] for n in numbers], numbers)
    batch = batch._replace(advantages=torch.linspace(-1, 2, 7)[numbers])
    (stats,) = update(config, policy, state, batch, epoch_rng(0, 0))
    return dict(moved=(weights(pipe.unet) - before).tolist(), stats=stats)


def whole_run(config=SMALL):
    """Rewards and advantages of each epoch, the pictures' prompts and numbers of all processes, and
    weights after it."""
    pipe, epochs = micro_pipeline(), []
    reward = WeightedSum(light=(1.0, brightness), dark=(2.0, dark))

    def on_epoch(epoch):
        mine = list(zip(epoch.batch.numbers, epoch.batch.prompts))
        same = gather_object([weights(pipe.unet).double().sum().item()])
        (row,) = without_time([epoch.row])
        epochs.append(
            dict(
                rewards=epoch.rewards.tolist(),
                advantages=epoch.advantages.tolist(),
                pictures=gather_object(mine),
                own=gather_object(epoch.batch.advantages.tolist()),
                shares=gather_object([len(mine)]),
                sums=same,
                row=row,
            )
        )

    train(config, pipe, reward, PROMPTS, on_epoch=on_epoch)
    return epochs


if __name__ == '__main__':
    processes = PartialState(cpu=True)
    found = dict(
        processes=processes.num_processes,
        steps=[one_step(SMALL, norm) for norm in (1e9, 1e-3)],
        epochs=whole_run(),
        groups=whole_run(GROUPS),
        alone=whole_run(ALONE),
    )
    if processes.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(found))
