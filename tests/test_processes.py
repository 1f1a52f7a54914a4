"""Two processes on a CPU: the same run as one, equal weights in both, and no one left waiting"""
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from ddpo_tutorial.advantages import PerPromptStatTracker
from ddpo_tutorial.checkpoints import save_checkpoint
from ddpo_tutorial.configs import RunConfig
from ddpo_tutorial.processes import Team, make_team
from ddpo_tutorial.runs import Run, fingerprint, go_on
from ddpo_tutorial.training import Alone, TrainConfig, new_state, train
from helpers import PROMPTS, brightness, micro_pipeline, weights
from test_command import COMMAND, ENV, SMALL, metrics

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
EVEN = [*SMALL, '--samples_per_epoch', '6']

@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "What two processes found out."
    place = tmp_path_factory.mktemp('two')
    done = subprocess.run([*TORCHRUN, HERE / 'two_processes.py', place / 'found.json'], env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / 'found.json').read_text()) | dict(place=place)

def test_there_are_two(found): assert found['size'] == 2 and found['agree'] == 'from 0' and found['any'] == [False, True] and found['refused'] == [1, 1]

def test_weights_are_identical_after_every_update(found): assert found['equal'] == [True] * 6

def test_without_adding_up_they_would_differ(found):
    "The comparison above can fail."
    assert not any(found['deaf'])

@pytest.mark.parametrize('clipped', [0, 1])
def test_update_is_that_of_one_process(found, clipped):
    "Divided by the wrong number, added up after clipping, or twice: at the same global batch the step differs by rounding only. So do the statistics."
    one = found['updates'][clipped]
    assert one['length'] > 1e-6 and one['apart'] < 1e-4
    alone, together = one['stats']
    for name in alone: assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-6)

def test_prompts_are_split_and_statistics_are_global(found):
    "Each process has the prompts of its share; both know all rewards, and the advantages are those of one tracker that saw everything."
    epoch = found['epoch']
    assert len(epoch['prompts']) == len(epoch['rewards']) == 8 and sorted(epoch['known'][0]) == sorted(epoch['known'][1])
    np.testing.assert_allclose(sorted(epoch['known'][0]), sorted(epoch['rewards']), rtol=1e-6)
    advantages = PerPromptStatTracker(8, 2).update([PROMPTS[i] for i in epoch['prompts']], torch.tensor(epoch['rewards']))
    np.testing.assert_allclose(epoch['advantages'], advantages, rtol=1e-4)

def test_each_process_learns_from_the_advantages_of_its_own_samples(found):
    "The other's advantages have the same shape."
    used, wanted = found['epoch']['used'], found['epoch']['advantages']
    np.testing.assert_allclose(used, wanted, rtol=1e-4)
    assert not np.allclose(wanted[:4], wanted[4:], rtol=1e-2)

def test_row_is_of_all_samples(found):
    epoch = found['epoch']
    row, rewards = epoch['row'], np.array(epoch['rewards'])
    assert row['reward_mean'] == pytest.approx(rewards.mean(), rel=1e-5) and row['reward_std'] == pytest.approx(rewards.std(), rel=1e-4)
    assert row['reward_light'] == pytest.approx(-row['reward_dark'], rel=1e-5) and row['reward_light'] + 2 * row['reward_dark'] == pytest.approx(row['reward_mean'], rel=1e-4)

def test_noise_differs_and_generators_stay_in_step(found):
    "The same noise in both would draw each picture twice."
    assert len(set(found['epoch']['noise'])) == 8 and found['epoch']['generators'] == 0

def test_resumed_with_as_many_is_the_same_run(found): assert found['resumed'] == dict(rows=True, weights=True)

def test_without_a_launcher_one_is_alone(monkeypatch):
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    assert type(make_team()) is Alone

class Imagined(Team):
    def __init__(self, rank, size): self.rank, self.size = rank, size

@pytest.mark.parametrize('samples, updates, size, words', [(7, 1, 2, 'samples_per_epoch=7.*multiple of 2'), (8, 5, 2, 'updates_per_epoch=5.*the 4 samples'), (9, 4, 3, 'updates_per_epoch=4.*the 3 samples')])
def test_what_cannot_be_split_is_refused(samples, updates, size, words):
    with pytest.raises(ValueError, match=words): Imagined(0, size).check(TrainConfig(samples_per_epoch=samples, updates_per_epoch=updates))

@pytest.mark.parametrize('size', [1, 2, 3, 6])
def test_shares_are_disjoint_and_whole(size): assert sum((Imagined(r, size).share(list(range(12))) for r in range(size)), []) == list(range(12))

# the command

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "One small run of two processes."
    place = tmp_path_factory.mktemp('command')
    return place, subprocess.run([*TORCHRUN, '--no-python', COMMAND, *EVEN, '--out', 'two'], cwd=place, env=ENV, capture_output=True, text=True, timeout=300)

def test_first_process_alone_writes_and_speaks(finished):
    place, done = finished
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(metrics(place / 'two')) == 2 and (place / 'two' / 'pipeline').is_dir() and done.stdout.count('epoch   1/2') == 1 and done.stdout.count('Training tiny') == 1

def test_from_a_notebook(finished):
    "The lesson's own lines, with a smaller run, in a kernel: the metrics are those of two processes that torchrun starts."
    place, _ = finished
    lesson = (HERE.parent / 'nbs' / '08_processes.ipynb').read_text(encoding='utf-8')
    code, = (block for c in json.loads(lesson)['cells'] for block in re.findall(r'```python\n(.*?)```', ''.join(c['source']), re.S) if 'notebook_launcher' in block)
    settings = ', '.join(f'{name.removeprefix("--")}={value}' for name, value in dict(zip(EVEN[::2], EVEN[1::2])).items()) + ", out='launched'"
    nb = new_notebook(cells=[new_code_cell(code.replace('samples_per_epoch=128', settings))])
    NotebookClient(nb, timeout=240, kernel_name='python3', resources=dict(metadata=dict(path=place))).execute(env=ENV)
    assert metrics(place / 'launched') == metrics(place / 'two') and len(metrics(place / 'two')) >= 2

@pytest.mark.parametrize('launcher', [TORCHRUN + ['--no-python'], []])
def test_resumed_by_two_or_by_one(finished, launcher):
    "With another number of processes the run says that its numbers will differ."
    place, _ = finished
    epochs = 3 if launcher else 4
    done = subprocess.run([*launcher, COMMAND, '--resume', 'two', '--num_epochs', str(epochs)], cwd=place, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and len(metrics(place / 'two')) == epochs, done.stderr[-3000:]
    assert ('It had 2 processes and has 1 now' in done.stdout) == (not launcher)

def long_run(folder):
    "Two processes that would train for long, after their first epoch."
    process = subprocess.Popen([*TORCHRUN, '--no-python', COMMAND, *EVEN[2:], '--num_epochs', '500', '--out', 'run'], cwd=folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (folder / 'run' / 'checkpoints' / 'epoch-00001').exists() and time.time() < deadline: time.sleep(.2)
    return process

class Two(Alone):
    size = 2

def test_an_epoch_in_progress_is_not_shared_out(tmp_path):
    "One process has drawn all its samples; two would each finish it with half of the advantages."
    class Break(Exception): "Raised by `pause`."
    config = RunConfig(num_epochs=1, samples_per_epoch=4, num_inference_steps=2, updates_per_epoch=2, minibatch_size=4)
    pipe = micro_pipeline(); state = new_state(config, pipe)
    def pause():
        if state.unfinished: raise Break
    with pytest.raises(Break): train(config, pipe, brightness, PROMPTS, state=state, pause=pause)
    state.notes |= dict(processes=1, prompts=fingerprint(PROMPTS))
    save_checkpoint(tmp_path / 'checkpoints', pipe, state, config)
    with pytest.raises(ValueError, match='1 process has drawn.*2 now. Go on with 1'): go_on(Run(config, tmp_path, Two(), pipe, brightness, PROMPTS, new_state(config, pipe)))
    go_on(Run(config, tmp_path, Alone(), pipe, brightness, PROMPTS, new_state(config, pipe)))

def test_several_begin_an_epoch_in_progress_again(tmp_path, capsys):
    "From the checkpoint before it, which pruning has left although only one is to be kept."
    class Break(Exception): "Raised by `pause`."
    config = RunConfig(num_epochs=2, samples_per_epoch=4, num_inference_steps=2, updates_per_epoch=2, minibatch_size=4, keep_checkpoints=1)
    pipe = micro_pipeline(); state, between = new_state(config, pipe), []
    state.notes |= dict(processes=1, prompts=fingerprint(PROMPTS))
    def keep_it(epoch=None): save_checkpoint(tmp_path / 'checkpoints', pipe, state, config, 1); between.append(weights(pipe.unet))
    def pause():
        if state.rows and state.unfinished and state.unfinished.done: raise Break
    with pytest.raises(Break): train(config, pipe, brightness, PROMPTS, keep_it, state, pause=pause)
    keep_it()
    run = Run(config, tmp_path, Two(), micro_pipeline(), brightness, PROMPTS, new_state(config, pipe))
    run = run._replace(state=new_state(config, run.pipe))
    go_on(run)
    assert len(run.state.rows) == 1 and run.state.unfinished is None and torch.equal(weights(run.pipe.unet), between[0]) and not torch.equal(between[0], between[1])
    assert 'after 1 of 2 epochs.' in capsys.readouterr().out

def test_fewer_epochs_than_are_begun_are_refused(tmp_path):
    "Half an epoch would be taken for none, and its weights for those of the epoch before."
    config = RunConfig(num_epochs=2, samples_per_epoch=4, num_inference_steps=2, updates_per_epoch=2, minibatch_size=4)
    pipe = micro_pipeline(); state = new_state(config, pipe)
    train(config, pipe, brightness, PROMPTS, lambda epoch: save_checkpoint(tmp_path / 'checkpoints', pipe, state, config), state)
    with pytest.raises(ValueError, match='num_epochs=1; expected at least 2'): go_on(Run(replace(config, num_epochs=1), tmp_path, Alone(), pipe, brightness, PROMPTS, new_state(config, pipe)))

def test_nonsense_that_only_the_first_sees_ends_all(finished):
    "A folder that holds something: each says so, none waits, none shows a traceback."
    place, _ = finished
    done = subprocess.run([*TORCHRUN, '--no-python', COMMAND, *EVEN, '--out', 'two'], cwd=place, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and 'ddpo_train: ' in done.stderr and done.stderr.count('already holds something') >= 1
    assert 'runs.py' not in done.stderr

def test_a_signal_to_the_launcher_ends_the_epoch(tmp_path):
    "torchrun passes it on; both processes agree on where to stop, which is between two epochs, and a checkpoint is left."
    process = long_run(tmp_path)
    process.terminate()
    out, said = process.communicate(timeout=60)
    assert out.count('Stopping after this epoch') == out.count('To go on: ddpo_train --resume run') == 1, out + said
    assert len(metrics(tmp_path / 'run')) == int(max((tmp_path / 'run' / 'checkpoints').iterdir()).name[-5:])

def test_when_one_is_killed_the_other_ends_and_says_so(tmp_path):
    process = long_run(tmp_path)
    second = next(p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get('RANK') == '1')
    second.kill()
    began = time.time()
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - began < 60
    assert 'another process has ended' in said and '--resume run goes on' in said, said[-3000:]
    assert len(list((tmp_path / 'run' / 'checkpoints').glob('epoch-*'))) >= 1
