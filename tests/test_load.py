"""A soak: 300 short epochs of the tiny model; memory and disk stay flat, time is printed"""
import statistics
import time

import psutil
import pytest
import torch

from ddpo_tutorial.checkpoints import save_checkpoint
from ddpo_tutorial.configs import Config
from ddpo_tutorial.pipelines import add_lora, load_pipeline
from ddpo_tutorial.prompts import fill_template, simple_animals
from ddpo_tutorial.rewards import tiny_aesthetic
from ddpo_tutorial.runs import Run, record, write_settings
from ddpo_tutorial.training import new_state, train

EPOCHS, EVERY, KEEP = 300, 10, 2

def yardstick(unet):
    "CPU seconds of the same small work every time: the machine's neighbours make every second longer from time to time."
    start = time.process_time()
    with torch.no_grad():
        for _ in range(2): unet(torch.zeros(2, 4, 16, 16), 1, torch.zeros(2, 16, 128))
    return time.process_time() - start

def soak(folder):
    "After every epoch: resident bytes, CPU seconds since the one before with all that is written, bytes of checkpoints, the yardstick."
    config = Config(num_epochs=EPOCHS, samples_per_epoch=2, num_inference_steps=2, updates_per_epoch=1, minibatch_size=4, watch_images=0)
    pipe, process, seen, last = add_lora(load_pipeline('tiny', 'cpu')), psutil.Process(), [], [time.process_time()]
    run = Run(config, folder, pipe, tiny_aesthetic(), fill_template(simple_animals()), new_state(config, pipe), True)
    write_settings(run)
    def on_epoch(epoch):
        record(run, epoch, None)
        if (epoch.row['epoch'] + 1) % EVERY == 0: save_checkpoint(folder / 'checkpoints', pipe, run.state, KEEP)
        disk = sum(p.stat().st_size for p in (folder / 'checkpoints').iterdir())
        seen.append((process.memory_info().rss, time.process_time() - last[0], disk, yardstick(pipe.unet)))
        last[0] = time.process_time()
    train(config, pipe, run.reward, run.prompts, on_epoch, run.state)
    return [list(column) for column in zip(*seen)]

@pytest.mark.slow
def test_soak(tmp_path, capsys):
    "Nothing grows with the number of epochs but the tables. The time of an epoch is printed: it is the machine's as well."
    threads = torch.get_num_threads()
    torch.set_num_threads(1) # two would count their waiting for each other
    try: memory, seconds, disk, same = soak(tmp_path)
    finally: torch.set_num_threads(threads)
    growth = statistics.median(memory[-30:]) / statistics.median(memory[30:60]) - 1
    early, late = (statistics.median(s / y for s, y in zip(seconds[part], same[part])) for part in (slice(30, 130), slice(-100, None)))
    slower = late / early - 1
    with capsys.disabled():
        print(f'\n300 epochs: resident memory {memory[-1] / 2**20:.0f} MiB, {growth:+.2%} since epochs 30 to 60; CPU time of an epoch '
              f'{slower:+.1%} in the last hundred against epochs 30 to 130, by a yardstick; checkpoints {max(disk) / 1e6:.1f} MB at most')
    assert growth < .03
    assert len(list((tmp_path / 'checkpoints').iterdir())) == KEEP and max(disk) <= 1.5 * disk[2 * EVERY]
