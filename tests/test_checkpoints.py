"""Checkpoints: nothing forgotten, never torn, damage found, foreign ones refused"""
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch

import ddpo_tutorial.checkpoints as checkpointing
import ddpo_tutorial.training as training
from ddpo_tutorial.checkpoints import (checkpoints, is_whole, load_checkpoint, newest_checkpoint, pack, save_checkpoint, set_weights, trained_weights, unpack)
from ddpo_tutorial.configs import RunConfig
from ddpo_tutorial.pipelines import add_lora
from ddpo_tutorial.runs import Run, keep
from ddpo_tutorial.training import Alone, TrainConfig, new_state, train
from helpers import PROMPTS, brightness, micro_pipeline, weights

SMALL = TrainConfig(num_epochs=4, samples_per_epoch=5, sample_batch_size=2, num_inference_steps=3, updates_per_epoch=2, minibatch_size=4, learning_rate=1e-3, buffer_size=4, min_count=2)

def model(lora=False): return add_lora(micro_pipeline()) if lora else micro_pipeline()

def without_time(rows): return [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]

@cache
def run_through(lora=False, threads=None):
    "Rows and weights of a run that was left alone; of as many threads as PyTorch has, which must be the argument where they change."
    pipe = model(lora)
    rows = train(SMALL, pipe, brightness, PROMPTS)
    return without_time(rows), weights(pipe.unet)

def train_some(folder, epochs, lora=False, keep=2):
    "Train, with a checkpoint after every epoch; go on where the newest one is."
    pipe = model(lora); state = new_state(SMALL, pipe)
    found = newest_checkpoint(folder)
    if found: load_checkpoint(found, pipe, state)
    rows = train(replace(SMALL, num_epochs=epochs), pipe, brightness, PROMPTS, lambda epoch: save_checkpoint(folder, pipe, epoch.state, SMALL, keep), state)
    return without_time(rows), weights(pipe.unet), state

@pytest.mark.parametrize('lora', [False, True])
@pytest.mark.parametrize('pauses', [[1, 4], [1, 2, 3, 4], [3, 4]])
def test_resumed_is_the_same_run_to_the_bit(tmp_path, lora, pauses):
    "Pitfall 30: the tracker, the generator or the number of epochs forgotten."
    for epochs in pauses: rows, after, state = train_some(tmp_path, epochs, lora)
    wanted_rows, wanted = run_through(lora)
    assert rows == wanted_rows and torch.equal(after, wanted)
    assert [(u['epoch'], u['update']) for u in state.updates] == [(e, u) for e in range(4) for u in range(2)]

class Break(Exception): "Raised by `pause`, to stop the loop."

CALLS = 3 + 1 + 4 # of `pause` in an epoch: before 3 batches, before the updates, after each of 2 in 2 inner epochs

def train_on(folder, config, lora=False, steps=None):
    "Go on from the newest checkpoint, for so many calls of `pause` or to the end, and leave a checkpoint."
    pipe = model(lora); state, calls = new_state(config, pipe), []
    found = newest_checkpoint(folder)
    if found: load_checkpoint(found, pipe, state)
    def pause():
        calls.append(1)
        if len(calls) == steps: raise Break
    try: train(config, pipe, brightness, PROMPTS, state=state, pause=pause)
    except Break: assert state.whole and save_checkpoint(folder, pipe, state, config)
    return without_time(state.rows), weights(pipe.unet), state

@pytest.mark.parametrize('lora, overlap', [(False, False), (True, False), (False, True)])
def test_stopped_after_any_step_it_is_the_same_run(tmp_path, lora, overlap):
    "Between any two batches of pictures and after any update, in the first epoch and later: everything is loaded into fresh objects, and nothing shows. Stops at every third step, too."
    config = replace(SMALL, num_epochs=2, num_inner_epochs=2, overlap_reward=overlap)
    rows, wanted, through = train_on(tmp_path / 'through', config, lora)
    for steps in range(1, 2 * CALLS + 1):
        folder = tmp_path / str(steps)
        _, _, state = train_on(folder, config, lora, steps)
        epoch, step = divmod(steps - 1, CALLS)
        unfinished = state.unfinished and len(state.unfinished.done)
        assert (len(state.rows), unfinished) == (epoch, step - 3 if step > 2 else None)
        assert newest_checkpoint(folder).name == f'epoch-{epoch:05d}' + (f'-update-{step - 3:05d}' if step > 2 else '')
        again, after, state = train_on(folder, config, lora)
        assert again == rows and torch.equal(after, wanted) and state.updates == through.updates
    while len(train_on(tmp_path / 'often', config, lora, 4)[0]) < 2: pass # a stop in the pictures takes one back: each part must come further than that
    again, after, state = train_on(tmp_path / 'often', config, lora)
    assert again == rows and torch.equal(after, wanted) and state.updates == through.updates

def test_a_stop_in_the_middle_of_an_epoch_keeps_its_clock(tmp_path):
    "The seconds of an epoch are those that it ran, before and after the break."
    config = replace(SMALL, num_epochs=1)
    def slow(images, prompts): time.sleep(.2); return brightness(images, prompts)
    pipe = model(); state, calls = new_state(config, pipe), []
    def pause():
        calls.append(1)
        if len(calls) == 5: raise Break
    with pytest.raises(Break): train(config, pipe, slow, PROMPTS, state=state, pause=pause)
    packed = pack(state)
    time.sleep(1)
    other = new_state(config, pipe)
    unpack(packed, other)
    seconds = train(config, pipe, slow, PROMPTS, state=other)[0]['seconds']
    assert .6 <= packed['unfinished']['seconds'] <= seconds < packed['unfinished']['seconds'] + .9

@pytest.mark.parametrize('during', ['step_with', 'accumulate', 'collect'])
def test_a_step_that_was_interrupted_is_not_whole(tmp_path, monkeypatch, during):
    "An interruption in the middle of an optimizer step leaves weights that belong to no moment; one while gradients are added up or pictures drawn leaves those of the step before."
    pipe = model(); state, calls = new_state(SMALL, pipe), []
    original = getattr(training, during)
    def interrupted(*args, **options):
        calls.append(1)
        result = original(*args, **options)
        if len(calls) == 2: raise KeyboardInterrupt
        return result
    monkeypatch.setattr(training, during, interrupted)
    with pytest.raises(KeyboardInterrupt): train(SMALL, pipe, brightness, PROMPTS, state=state)
    assert state.whole == (during != 'step_with')
    if not state.whole: return
    monkeypatch.undo()
    save_checkpoint(tmp_path, pipe, state, SMALL)
    rows, after, _ = train_on(tmp_path, SMALL)
    assert rows == run_through()[0] and torch.equal(after, run_through()[1])

@pytest.mark.parametrize('name', ['optimizer', 'generator', 'tracker'])
def test_what_is_forgotten_shows(tmp_path, name, monkeypatch):
    "The comparison above can fail: one part of the state is a new run's."
    original = checkpointing.pack
    monkeypatch.setattr(checkpointing, 'pack', lambda state: original(state) | {name: original(new_state(SMALL, micro_pipeline()))[name]})
    for epochs in (2, 4): rows, after, _ = train_some(tmp_path, epochs)
    wanted_rows, wanted = run_through()
    assert rows != wanted_rows or not torch.equal(after, wanted)

def test_scaler_survives():
    pipe = model(); state = new_state(SMALL, pipe); state.scaler = torch.amp.GradScaler('cpu', init_scale=8.)
    state.scaler.scale(torch.ones(()))
    other = new_state(SMALL, pipe); other.scaler = torch.amp.GradScaler('cpu')
    unpack(pack(state), other)
    assert other.scaler.get_scale() == 8

def test_only_as_many_as_asked_are_kept(tmp_path):
    train_some(tmp_path, 4, keep=3)
    assert [p.name for p in checkpoints(tmp_path)] == ['epoch-00002', 'epoch-00003', 'epoch-00004'] and len(list(tmp_path.iterdir())) == 3

def damage(path, how):
    data = path.read_bytes()
    if how == 'cut': path.write_bytes(data[:len(data) // 2])
    elif how == 'changed': path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == 'empty': path.write_bytes(b'')
    else: path.unlink()

@pytest.mark.parametrize('how', ['cut', 'changed', 'empty', 'gone'])
@pytest.mark.parametrize('name', ['weights.safetensors', 'state.pt', 'config.json', 'sums.json'])
def test_damage_is_found_and_the_one_before_is_used(tmp_path, name, how, capsys):
    train_some(tmp_path, 3)
    damage(tmp_path / 'epoch-00003' / name, how)
    assert newest_checkpoint(tmp_path).name == 'epoch-00002' and 'epoch-00003 is damaged' in capsys.readouterr().out
    rows, after, _ = train_some(tmp_path, 4)
    assert rows == run_through()[0] and torch.equal(after, run_through()[1])
    assert all(map(is_whole, checkpoints(tmp_path)))

def test_without_a_checkpoint_it_begins_anew(tmp_path):
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / 'absent') is None
    (tmp_path / 'epoch-00007.part').mkdir()
    assert newest_checkpoint(tmp_path) is None

@pytest.mark.parametrize('mine, theirs', [(False, True), (True, False)])
def test_foreign_checkpoint_is_refused_and_changes_nothing(tmp_path, mine, theirs):
    train_some(tmp_path, 1, theirs)
    pipe = model(mine); before, state = weights(pipe.unet), new_state(SMALL, pipe)
    with pytest.raises(ValueError, match='belongs to another model or another LoRA'): load_checkpoint(newest_checkpoint(tmp_path), pipe, state)
    assert torch.equal(weights(pipe.unet), before) and not state.rows

def test_other_rank_is_refused():
    with pytest.raises(ValueError, match='belongs to another'): set_weights(add_lora(micro_pipeline(), rank=2), trained_weights(add_lora(micro_pipeline(), rank=4)))

class Bomb:
    def __reduce__(self): return os.system, ('echo exploded',)

def test_code_in_a_checkpoint_is_not_run(tmp_path, capfd):
    "A state that was replaced by somebody, checksums and all."
    train_some(tmp_path, 1)
    place = checkpoints(tmp_path)[0]
    torch.save(dict(optimizer=Bomb()), place / 'state.pt')
    (place / 'sums.json').write_text(json.dumps(checkpointing.sums(place)))
    pipe = model()
    with pytest.raises(Exception, match='[Ww]eights.only'): load_checkpoint(place, pipe, new_state(SMALL, pipe))
    assert 'exploded' not in capfd.readouterr().out

@pytest.mark.parametrize('step', ['save_file', 'flush'])
def test_full_disk_keeps_the_one_before(tmp_path, monkeypatch, step):
    "The write fails half-way; what was there stays, and nothing torn is taken for good."
    train_some(tmp_path, 2)
    def fail(*args, **options): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(checkpointing, step, fail)
    with pytest.raises(OSError, match='No space left'): train_some(tmp_path, 3)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path).name == 'epoch-00002'
    rows, after, _ = train_some(tmp_path, 4)
    assert rows == run_through()[0] and torch.equal(after, run_through()[1])

def in_a_process(folder, started=None):
    "What is killed: training in a process of its own, with one thread."
    torch.set_num_threads(1)
    if started: started.set()
    train_some(folder, SMALL.num_epochs)

@pytest.fixture(scope='module')
def processes():
    "Children that begin with the package imported and no threads inherited."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['ddpo_tutorial.checkpoints', 'ddpo_tutorial.pipelines'])
    return context

def kill_after(processes, folder, seconds):
    "Train in a child process and kill it so many seconds after it has begun to; seconds it ran, or None if it was faster."
    started = processes.Event()
    child = processes.Process(target=in_a_process, args=(folder, started))
    child.start(); started.wait(60); began = time.perf_counter()
    child.join(seconds); finished = child.exitcode is not None
    child.kill(); child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return time.perf_counter() - began if finished else None

def test_killed_at_twenty_random_moments_it_is_the_same_run(tmp_path, processes, capsys):
    "SIGKILL while training and writing: always resumable, never a torn file taken for good, and in the end the rows and weights of a run that was left alone."
    whole, moments = kill_after(processes, tmp_path / 'timing', 60), random.Random(0)
    reached, torn, finished = [], 0, 0
    for i in range(20):
        folder = tmp_path / f'run-{i // 2}' # ten runs of two kills each: a finished one has nothing left to kill
        finished += kill_after(processes, folder, moments.uniform(0, .7) * whole) is not None
        found = newest_checkpoint(folder)
        assert found is None or is_whole(found)
        reached.append(int(found.name[-5:]) if found else 0); torn += len(list(folder.glob('*.part')))
    with capsys.disabled(): print(f'\n20 kills within {whole:.1f} s: {20 - finished} while running, {torn} in the middle of writing; epochs reached {reached}')
    assert finished <= 8 and 0 < sum(0 < r < 4 for r in reached)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        wanted_rows, wanted = run_through(threads=1)
        for i in range(10):
            rows, after, _ = train_some(tmp_path / f'run-{i}', SMALL.num_epochs)
            assert rows == wanted_rows and torch.equal(after, wanted)
    finally: torch.set_num_threads(threads)

def on_a_full_disk(folder, room):
    "The next epoch on a disk where no file can have more bytes than `room`; exit code 7 for the error that is expected."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try: train_some(folder, 3)
    except OSError as error: sys.exit(7 if 'could not be written' in str(error) and 'are free' in str(error) else 8)

@pytest.mark.parametrize('room', ['less than the weights', 'less than the state'])
def test_really_full_disk(tmp_path, processes, room):
    "The system refuses to write on: each library raises its own error, the user gets one; what was there stays, and nothing torn takes room."
    train_some(tmp_path, 2)
    size = (tmp_path / 'epoch-00002' / 'weights.safetensors').stat().st_size
    child = processes.Process(target=on_a_full_disk, args=(tmp_path, size // 2 if room == 'less than the weights' else size + 1000))
    child.start(); child.join(120)
    assert child.exitcode == 7 and [p.name for p in checkpoints(tmp_path)] == ['epoch-00001', 'epoch-00002'] and not list(tmp_path.glob('*.part'))
    rows, after, _ = train_some(tmp_path, 4)
    assert len(rows) == 4

@pytest.mark.parametrize('keep', [1, 2])
def test_damaged_newer_ones_do_not_push_out_good_ones(tmp_path, keep):
    "The run begins anew below them: what it writes must stay, and they must go."
    train_some(tmp_path, 4, keep=2)
    for name in ('epoch-00003', 'epoch-00004'): damage(tmp_path / name / 'state.pt', 'cut')
    train_some(tmp_path, 1, keep=keep)
    assert [p.name for p in checkpoints(tmp_path)] == ['epoch-00001'] and is_whole(tmp_path / 'epoch-00001')

def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path):
    "A stop while pictures are drawn keeps what the last epoch has kept: for a moment there would be none."
    config = RunConfig(**asdict(SMALL))
    pipe = model(); state = new_state(config, pipe)
    train(replace(config, num_epochs=1), pipe, brightness, PROMPTS, state=state)
    run = Run(config, tmp_path, Alone(), pipe, brightness, PROMPTS, state)
    (tmp_path / 'config.json').write_text('{}')
    def written(): return (tmp_path / 'checkpoints' / 'epoch-00001' / 'weights.safetensors').stat().st_ino
    keep(run); first = written()
    keep(run); assert written() == first
    damage(tmp_path / 'checkpoints' / 'epoch-00001' / 'state.pt', 'cut')
    keep(run); assert written() != first and is_whole(newest_checkpoint(tmp_path / 'checkpoints'))

def test_what_a_killed_writer_left_is_removed(tmp_path):
    "Also of a checkpoint that will never be written again: it may be gigabytes."
    (tmp_path / 'epoch-00000-update-00001.part').mkdir()
    train_some(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ['epoch-00001']

def test_a_stray_file_does_no_harm(tmp_path):
    train_some(tmp_path, 1)
    (tmp_path / 'epoch-00001' / '.DS_Store').write_bytes(b'x'); (tmp_path / 'epoch-00001' / 'notes.txt').write_text('mine')
    assert newest_checkpoint(tmp_path).name == 'epoch-00001'

def test_other_generators_are_kept(tmp_path):
    "A reward that draws from Python's, NumPy's or PyTorch's generator goes on where it was."
    def noisy(images, prompts): return brightness(images, prompts) + torch.rand(len(prompts)) + float(np.random.rand()) + random.random()
    def some(epochs, folder):
        pipe = model(); state = new_state(SMALL, pipe)
        found = newest_checkpoint(folder)
        if found: load_checkpoint(found, pipe, state)
        return without_time(train(replace(SMALL, num_epochs=epochs), pipe, noisy, PROMPTS, lambda epoch: save_checkpoint(folder, pipe, state, SMALL), state))
    def seeded(): torch.manual_seed(3); np.random.seed(3); random.seed(3)
    seeded(); through = some(3, tmp_path / 'through')
    seeded(); some(1, tmp_path / 'parts'); torch.rand(5); np.random.rand(5); random.random()
    assert some(3, tmp_path / 'parts') == through

@pytest.mark.parametrize('overlap', [False, True])
def test_other_generators_are_put_back_when_an_epoch_is_given_up(tmp_path, overlap):
    "A reward that draws from them is interrupted in the middle of an epoch: the checkpoint of the epoch before must have them as they were."
    config = replace(SMALL, num_epochs=2, overlap_reward=overlap)
    def noisy(images, prompts):
        time.sleep(.2) # so that a thread still has to draw when the epoch is given up
        return brightness(images, prompts) + torch.rand(len(prompts)) + float(np.random.rand()) + random.random()
    def seeded(): torch.manual_seed(3); np.random.seed(3); random.seed(3)
    seeded(); through = without_time(train(config, model(), noisy, PROMPTS))
    seeded(); pipe = model(); state, calls = new_state(config, pipe), []
    def pause():
        calls.append(1)
        if len(calls) == 3 + 1 + 2 + 3: raise Break # in the second epoch, before its last batch
    with pytest.raises(Break): train(config, pipe, noisy, PROMPTS, state=state, pause=pause)
    time.sleep(.5) # for a thread that should have ended
    save_checkpoint(tmp_path, pipe, state, config)
    torch.rand(5); np.random.rand(5); random.random()
    pipe = model(); state = new_state(config, pipe)
    load_checkpoint(newest_checkpoint(tmp_path), pipe, state)
    assert len(state.rows) == 1 and without_time(train(config, pipe, noisy, PROMPTS, state=state)) == through

def test_own_copies_are_left_alone(tmp_path):
    train_some(tmp_path, 1)
    shutil.copytree(tmp_path / 'epoch-00001', tmp_path / 'epoch-00001-mine')
    train_some(tmp_path, 4, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['epoch-00001-mine', 'epoch-00004']

def test_strings_of_numpy_can_be_kept(tmp_path):
    pipe = model(); state = new_state(SMALL, pipe)
    train(replace(SMALL, num_epochs=1), pipe, brightness, list(np.array(PROMPTS)), lambda epoch: save_checkpoint(tmp_path, pipe, state, SMALL), state)
    load_checkpoint(newest_checkpoint(tmp_path), pipe, new_state(SMALL, pipe))

@pytest.mark.parametrize('moment', ['before the rename', 'after the rename', 'between the files'])
def test_killed_while_writing(tmp_path, monkeypatch, moment):
    "The same at the worst moments, on purpose: the process is gone there, and nothing is cleaned up."
    class Killed(BaseException): "What no handler catches."
    def gone(*args, **options): raise Killed
    train_some(tmp_path, 2)
    pipe = model(); state = new_state(SMALL, pipe)
    load_checkpoint(newest_checkpoint(tmp_path), pipe, state)
    monkeypatch.setattr(checkpointing, {'before the rename': 'flush', 'after the rename': 'checkpoints', 'between the files': 'sums'}[moment], gone)
    with pytest.raises(Killed): train(replace(SMALL, num_epochs=3), pipe, brightness, PROMPTS, lambda epoch: save_checkpoint(tmp_path, pipe, state, SMALL), state)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path).name == ('epoch-00003' if moment == 'after the rename' else 'epoch-00002')
    rows, after, _ = train_some(tmp_path, 4)
    assert rows == run_through()[0] and torch.equal(after, run_through()[1])

def test_a_write_stopped_half_way_is_seen(tmp_path):
    "The check can fail: without the rename a torn folder would be taken for a checkpoint, were it not for its sums."
    train_some(tmp_path, 2)
    torn = tmp_path / 'epoch-00003'
    torn.mkdir(); (torn / 'weights.safetensors').write_bytes(b'half')
    assert newest_checkpoint(tmp_path).name == 'epoch-00002'
