"""A soak: 300 short epochs of the tiny model; memory, time and disk stay flat"""
import statistics
import time

import psutil

from ddpo_tutorial.checkpoints import save_checkpoint
from ddpo_tutorial.pipelines import add_lora, load_pipeline
from ddpo_tutorial.prompts import fill_template, simple_animals
from ddpo_tutorial.records import Recorder
from ddpo_tutorial.rewards import tiny_aesthetic
from ddpo_tutorial.training import TrainConfig, new_state, train

EPOCHS, EVERY, KEEP = 300, 10, 2

def bytes_under(folder): return sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())

def soak(folder):
    "After every epoch: resident bytes, seconds since the one before, recording and checkpoints included, and bytes of checkpoints."
    config = TrainConfig(num_epochs=EPOCHS, samples_per_epoch=2, num_inference_steps=2, updates_per_epoch=1, minibatch_size=4)
    pipe, process, seen, last = add_lora(load_pipeline('tiny', 'cpu')), psutil.Process(), [], [time.perf_counter()]
    state, record = new_state(config, pipe), Recorder(folder, EPOCHS)
    def on_epoch(epoch):
        record(epoch)
        if (epoch.row['epoch'] + 1) % EVERY == 0: save_checkpoint(folder / 'checkpoints', pipe, state, config, KEEP)
        now = time.perf_counter()
        seen.append((process.memory_info().rss, now - last[0], bytes_under(folder / 'checkpoints')))
        last[0] = now
    train(config, pipe, tiny_aesthetic(), fill_template(simple_animals()), on_epoch, state)
    return [list(column) for column in zip(*seen)]

def test_soak(tmp_path, capsys):
    memory, seconds, disk = soak(tmp_path)
    growth = statistics.median(memory[-30:]) / statistics.median(memory[30:60]) - 1
    slower = statistics.median(seconds[-100:]) / statistics.median(seconds[30:130]) - 1
    with capsys.disabled(): print(f'\n300 epochs: resident memory {memory[-1] / 2**20:.0f} MiB, {growth:+.2%} since epoch 30 to 60; an epoch {statistics.median(seconds):.3f} s, {slower:+.1%}; disk {max(disk) / 1e6:.1f} MB at most')
    assert growth < .03
    assert slower < .25 # the machine's neighbours alone make seconds 1.5 times as long at times
    assert len(list((tmp_path / 'checkpoints').iterdir())) == KEEP and max(disk) <= 1.5 * disk[2 * EVERY] # two are kept; each also holds the metrics of all epochs
