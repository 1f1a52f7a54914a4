"""A soak: 300 short epochs of the tiny model; memory and disk stay flat, time is printed.

Run: python -m pytest tests/test_load.py -n 0 --slow -s
"""

import statistics
import time

import psutil
import pytest
import torch
from filelock import FileLock

from ddpo_tutorial.checkpoints import save_checkpoint
from ddpo_tutorial.configs import Config
from ddpo_tutorial.pipelines import add_lora, load_pipeline
from ddpo_tutorial.prompts import fill_template, simple_animals
from ddpo_tutorial.rewards import tiny_aesthetic
from ddpo_tutorial.runs import Run, record_epoch, write_settings
from ddpo_tutorial.training import new_state, train_epochs

EPOCHS = 300
EVERY = 10  # epochs between checkpoints
KEEP = 2  # checkpoints


def yardstick(unet):
    """CPU seconds of the same small work every time: the machine's neighbours make every second
    longer from time to time."""
    start = time.process_time()
    with torch.no_grad():
        for _ in range(2):
            unet(torch.zeros(2, 4, 16, 16), 1, torch.zeros(2, 16, 128))
    return time.process_time() - start


def new_run(folder):
    "A LoRA of the tiny model, before training."
    config = Config(
        num_epochs=EPOCHS,
        samples_per_epoch=2,
        num_inference_steps=2,
        updates_per_epoch=1,
        minibatch_size=4,
        watch_images=0,
    )
    pipe = add_lora(load_pipeline('tiny', 'cpu'))
    prompts = fill_template(simple_animals())
    run = Run(config, folder, str(folder), prompts, True, FileLock(folder / 'run.lock'))
    write_settings(run)
    return run._replace(pipe=pipe, reward=tiny_aesthetic(), state=new_state(config, pipe))


def soak(folder):
    """After every epoch: resident bytes, CPU seconds since the one before with all that is written,
    bytes of checkpoints, the yardstick."""
    run = new_run(folder)
    process = psutil.Process()
    seen = []
    last = time.process_time()
    for epoch in train_epochs(run.config, run.pipe, run.reward, run.prompts, state=run.state):
        record_epoch(run, epoch, None)
        if (epoch.row['epoch'] + 1) % EVERY == 0:
            save_checkpoint(folder / 'checkpoints', run.pipe, run.state, KEEP)
        disk = sum(path.stat().st_size for path in (folder / 'checkpoints').iterdir())
        seconds = time.process_time() - last
        seen.append((process.memory_info().rss, seconds, disk, yardstick(run.pipe.unet)))
        last = time.process_time()
    return [list(column) for column in zip(*seen)]


def by_the_yardstick(seconds, same, part):
    return statistics.median(s / y for s, y in zip(seconds[part], same[part]))


@pytest.mark.slow
def test_soak(tmp_path, capsys):
    """Nothing grows with the number of epochs but the tables. The time of an epoch is printed: it
    is the machine's as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two would count their waiting for each other
    try:
        memory, seconds, disk, same = soak(tmp_path)
    finally:
        torch.set_num_threads(threads)
    growth = statistics.median(memory[-30:]) / statistics.median(memory[30:60]) - 1
    early = by_the_yardstick(seconds, same, slice(30, 130))
    late = by_the_yardstick(seconds, same, slice(-100, None))
    with capsys.disabled():
        print(
            f'\n{EPOCHS} epochs: resident memory {memory[-1] / 2**20:.0f} MiB, {growth:+.2%} since '
            f'epochs 30 to 60; CPU time of an epoch {late / early - 1:+.1%} in the last hundred '
            f'against epochs 30 to 130, by a yardstick; checkpoints {max(disk) / 1e6:.1f} MB at '
            'most'
        )
    assert growth < 0.03
    assert len(list((tmp_path / 'checkpoints').iterdir())) == KEEP
    assert max(disk) <= 1.5 * disk[2 * EVERY]
