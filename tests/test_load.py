"""A soak: 300 short epochs of the tiny model; memory, time and disk stay flat"""
import statistics
import time

import psutil
import torch

from ddpo_tutorial.checkpoints import save_checkpoint
from ddpo_tutorial.pipelines import add_lora, load_pipeline
from ddpo_tutorial.prompts import fill_template, simple_animals
from ddpo_tutorial.records import Recorder
from ddpo_tutorial.rewards import tiny_aesthetic
from ddpo_tutorial.training import TrainConfig, new_state, train

EPOCHS, EVERY, KEEP = 300, 10, 2

def bytes_under(folder): return sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())

def yardstick(unet):
    "CPU seconds of the same small work every time: the machine's neighbours make every second longer from time to time."
    began = time.process_time()
    with torch.no_grad():
        for _ in range(2): unet(torch.zeros(2, 4, 16, 16), 1, torch.zeros(2, 16, 128))
    return time.process_time() - began

def soak(folder):
    "After every epoch: resident bytes, CPU seconds since the one before, recording and checkpoints included, bytes of checkpoints, and the yardstick."
    config = TrainConfig(num_epochs=EPOCHS, samples_per_epoch=2, num_inference_steps=2, updates_per_epoch=1, minibatch_size=4)
    pipe, process, seen, last = add_lora(load_pipeline('tiny', 'cpu')), psutil.Process(), [], [time.process_time()]
    state, record = new_state(config, pipe), Recorder(folder, EPOCHS)
    def on_epoch(epoch):
        record(epoch)
        if (epoch.row['epoch'] + 1) % EVERY == 0: save_checkpoint(folder / 'checkpoints', pipe, state, config, KEEP)
        seen.append((process.memory_info().rss, time.process_time() - last[0], bytes_under(folder / 'checkpoints'), yardstick(pipe.unet)))
        last[0] = time.process_time()
    train(config, pipe, tiny_aesthetic(), fill_template(simple_animals()), on_epoch, state)
    return [list(column) for column in zip(*seen)]

def test_soak(tmp_path, capsys):
    threads, began = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1) # two would count their waiting for each other
    try: memory, seconds, disk, same = soak(tmp_path)
    finally: torch.set_num_threads(threads)
    growth = statistics.median(memory[-30:]) / statistics.median(memory[30:60]) - 1
    early, late = (statistics.median(s / y for s, y in zip(seconds[part], same[part])) for part in (slice(30, 130), slice(-100, None)))
    slower = late / early - 1
    with capsys.disabled(): print(f'\n300 epochs: resident memory {memory[-1] / 2**20:.0f} MiB, {growth:+.2%} since epoch 30 to 60; an epoch {statistics.median(seconds):.3f} CPU seconds, {slower:+.1%} in the last hundred against epochs 30 to 130, measured by a yardstick; {(time.perf_counter() - began) / EPOCHS:.3f} s by the clock; disk {max(disk) / 1e6:.1f} MB at most')
    assert growth < .03
    assert slower < .1
    assert len(list((tmp_path / 'checkpoints').iterdir())) == KEEP and max(disk) <= 1.5 * disk[2 * EVERY] # two are kept; each also holds the metrics of all epochs
