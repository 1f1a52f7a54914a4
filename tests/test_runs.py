"""A run: its folder, its reports, stopping, failing, going on; the command as a process.

Run: python -m pytest tests/test_runs.py -n 0, with --slow for the kills and W&B's waits
"""

import errno
import gc
import json
import os
import pkgutil
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from filelock import FileLock
from helpers import PROMPTS, brightness, micro_pipeline, without_time
from PIL import Image

from ddpo_tutorial import runs, training
from ddpo_tutorial.checkpoints import checkpoints
from ddpo_tutorial.command import main
from ddpo_tutorial.configs import Config, load_config
from ddpo_tutorial.pipelines import tiny_folder
from ddpo_tutorial.ppo import reinforce_loss
from ddpo_tutorial.reports import (
    before_after,
    gain_of,
    log_to_wandb,
    progress_line,
    read_rows,
    reward_curve,
    start_wandb,
    titled_sheet,
    write_rows,
)
from ddpo_tutorial.rewards import WeightedSum
from ddpo_tutorial.runs import FILES, Run, Stop, begin_run, make_folder, train_run
from ddpo_tutorial.sampling import rescore
from ddpo_tutorial.training import Batch, train, train_epochs

COMMAND = str(Path(sys.executable).parent / 'ddpo_train')
TINY = dict(
    samples_per_epoch=3,
    sample_batch_size=2,
    updates_per_epoch=2,
    num_inference_steps=2,
    eval_images=2,
    watch_images=0,
)
FLAGS = ['--config', 'tiny-original']
FLAGS += [word for name, value in TINY.items() for word in (f'--{name}', str(value))]
ENV = os.environ | dict(HF_HUB_OFFLINE='1', CUDA_VISIBLE_DEVICES='', MPLBACKEND='agg')
SMALL = Config(
    num_epochs=3,
    samples_per_epoch=5,
    sample_batch_size=2,
    num_inference_steps=2,
    updates_per_epoch=2,
    learning_rate=1e-3,
    buffer_size=4,
    min_count=2,
)


def command(*args, cwd):
    return subprocess.run([COMMAND, *args], cwd=cwd, env=ENV, capture_output=True, text=True)


def table(folder, name='metrics.csv'):
    "The rows of a table, without the seconds."
    return without_time(read_rows(folder / name))


def unet_of(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder / 'pipeline')
    return torch.cat([p.flatten() for p in pipe.unet.parameters()])


def is_the_same_run(folder, other):
    "Both tables, but for the seconds, and the weights, to the bit."
    for name in ('metrics.csv', 'updates.csv'):
        assert table(folder, name) == table(other, name)
    assert torch.equal(unet_of(folder), unet_of(other))


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "A run of three epochs that was left alone, with what it said."
    place = tmp_path_factory.mktemp('alone')
    done = command(*FLAGS, '--num-epochs', '3', '--out', 'run', cwd=place)
    assert done.returncode == 0, done.stderr
    return place / 'run', done.stdout


# what it leaves behind


def test_the_folder_holds_what_it_says(alone):
    folder, said = alone
    files = set(FILES) - {'lora'}
    others = {'evaluation.json', 'prompts.json', 'run.lock'}
    assert {path.name for path in folder.iterdir()} == files | others
    assert all(f'run/{name}: {FILES[name]}' in said for name in files)
    assert files == {
        'config.yaml',
        'metrics.csv',
        'updates.csv',
        'reward_curve.png',
        'samples.png',
        'before_after.png',
        'checkpoints',
        'pipeline',
    }
    for name in ('before_after.png', 'reward_curve.png', 'samples.png'):
        Image.open(folder / name).verify()
    names = [path.name for path in checkpoints(folder / 'checkpoints')]
    assert names == ['epoch-00002.pt', 'epoch-00003.pt']
    assert load_config(folder / 'config.yaml') == Config(num_epochs=3, out='run', **TINY)


def test_the_smoke_run_is_whole(tmp_path):
    done = command('--config', 'smoke', '--out', 'run', cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    # it is a LoRA that is trained
    assert {name for name in FILES if not (tmp_path / 'run' / name).exists()} == {'pipeline'}


def test_it_says_what_it_does_and_when_it_will_end(alone):
    said = alone[1]
    wanted = ['9 images in all', '2 updates an epoch', 'epoch   1/3', 'epoch   3/3', 'ends about']
    for words in [*wanted, 'standard deviations']:
        assert words in said, words


def test_the_trained_pipeline_is_plain_and_trained(alone):
    folders = (tiny_folder(), alone[0] / 'pipeline')
    old, new = (StableDiffusionPipeline.from_pretrained(folder) for folder in folders)
    pairs = zip(old.unet.parameters(), new.unet.parameters())
    assert any(not torch.equal(p, q) for p, q in pairs)
    assert all(torch.equal(p, q) for p, q in zip(old.vae.parameters(), new.vae.parameters()))
    assert new('a horse', num_inference_steps=2).images[0].size == (64, 64)


# reports


def test_tables_hold_the_rows(tmp_path):
    "Every number survives, and the names of a sum's terms are columns."
    reward = WeightedSum(light=(2.0, brightness), dark=(-0.5, brightness))
    epochs = []
    rows = train(SMALL, micro_pipeline(), reward, PROMPTS, on_epoch=epochs.append)
    tables = {'metrics.csv': rows, 'updates.csv': epochs[-1].state.updates}
    for name, wanted in tables.items():
        write_rows(tmp_path / name, wanted)
        assert read_rows(tmp_path / name) == wanted
    for row in rows:
        total = 2 * row['reward_light'] - 0.5 * row['reward_dark']
        assert row['reward_mean'] == pytest.approx(total, rel=1e-5)


ROWS = {
    'commas': [{'a, b': 1.0, 'c': 2.5}],
    'quotes and lines': [{'"a"': 'x "y", z', 'b': 'two\nlines'}],
    'letters': [{'reward_schön': 1e-9, 'prompt': 'ein Bär, 熊'}],
    'large and small': [{'a': 1e300, 'b': -1e-300, 'c': float('inf')}],
    'nothing': [],
}


@pytest.mark.parametrize('rows', ROWS.values(), ids=ROWS)
def test_rows_are_read_as_they_were_written(tmp_path, rows):
    write_rows(tmp_path / 'table.csv', rows)
    assert read_rows(tmp_path / 'table.csv') == rows
    assert [path.name for path in tmp_path.iterdir()] == ['table.csv']


def test_a_column_that_a_row_lacks_is_a_gap(tmp_path):
    "Columns stand in the order in which they come up."
    rows = [dict(epoch=0, kl=0.5), dict(epoch=1, entropy=2.0), dict(kl=1.5, epoch=2)]
    write_rows(tmp_path / 'table.csv', rows)
    lines = (tmp_path / 'table.csv').read_text().splitlines()
    assert lines == ['epoch,kl,entropy', '0,0.5,', '1,,2.0', '2,1.5,']
    assert read_rows(tmp_path / 'table.csv')[1] == dict(epoch=1, kl='', entropy=2)


def rows_of(count, **names):
    "Rows of epochs of an hour."
    shared = dict(reward_std=0.25, seconds=3600.0, **names)
    return [dict(epoch=epoch, reward_mean=epoch + 0.5, **shared) for epoch in range(count)]


def test_line():
    row = rows_of(3, approx_kl=1e-7, clipfrac=0.5)[2]
    began = time.time()
    line = progress_line(row, 5)
    wanted = ['3/5', '2.500', '0.250', 'approx_kl 1.0e-07', 'clipfrac 0.50', '3600.0 s']
    assert all(words in line for words in wanted), line
    seconds = range(int(time.time() - began) + 2)
    ends = [time.localtime(began + 7200 + second) for second in seconds]
    assert any(line.endswith(time.strftime('ends about %H:%M', end)) for end in ends), line


def test_curve():
    top, bottom = reward_curve(rows_of(3, approx_kl=1e-7)).axes
    assert top.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 1.5], [3, 2.5]]
    assert bottom.lines[0].get_xydata().tolist() == [[1, 1e-7], [2, 1e-7], [3, 1e-7]]


@pytest.mark.parametrize('names', [{}, dict(clipfrac=0.5), dict(approx_kl=1e-7)], ids=str)
def test_line_and_curve_of_a_loss_that_reports_less(names):
    row = rows_of(1, **names)[0]
    line = progress_line(row, 2)
    assert 'epoch   1/2' in line and '3600.0 s' in line
    assert ('approx_kl' in line, 'clipfrac' in line) == ('approx_kl' in row, 'clipfrac' in row)
    assert len(reward_curve([row]).axes[1].lines[0].get_xydata()) == 1


def quiet_loss(config, policy, batch, steps, rows):
    "A loss of the user's, with a diagnostic of its own."
    log_probs = rescore(policy, batch.trajectory, steps, rows)
    return reinforce_loss(log_probs, batch.advantages[rows]), dict(
        surprise=-log_probs.detach().mean()
    )


def test_tables_line_and_curve_of_a_users_loss(tmp_path):
    rows = train(SMALL, micro_pipeline(), brightness, PROMPTS, loss=quiet_loss)
    write_rows(tmp_path / 'metrics.csv', rows)
    read = read_rows(tmp_path / 'metrics.csv')
    assert read == rows and 'surprise' in read[0] and 'approx_kl' not in read[0]
    assert 'epoch   3/3' in progress_line(rows[-1], 3)
    assert len(reward_curve(rows).axes[0].lines[0].get_xydata()) == 3


def batch_of(count, shade, reward=0.0):
    "Pictures of one shade, with one score."
    return Batch(
        prompts=[f'p{i}' for i in range(count)],
        numbers=list(range(count)),
        images=torch.full((count, 3, 16, 16), shade),
        rewards=torch.full((count,), reward),
    )


def test_before_stands_above_after():
    "Rows in turn, eight a row: a picture and what became of it are one above the other."
    sheet = before_after(batch_of(10, 0.0), batch_of(10, 1.0)).convert('L')
    page = np.asarray(sheet).astype(int)
    quarters = np.array_split(np.arange(len(page)), 4)
    assert [page[quarter[20], 50] for quarter in quarters[:2]] == [0, 255]
    assert page.shape[0] > page.shape[1] / 3


def test_gain_is_also_in_standard_deviations():
    before = batch_of(4, 0.0)._replace(rewards=torch.tensor([1.0, 3.0, 1.0, 3.0]))
    after = batch_of(4, 0.0, reward=5.0)
    wanted = dict(before=2, before_std=1, after=5, gain=3, gain_in_std=3)
    assert gain_of(before, after) == wanted
    assert gain_of(after, after)['gain_in_std'] == 0  # without a spread


def test_the_sheet_shows_scores():
    assert titled_sheet(batch_of(20, 0.5)).size[0] > 8 * 90


# its folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder, in which the command is called."
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_is_never_written_over(alone, monkeypatch, capsys):
    folder, _ = alone
    monkeypatch.chdir(folder.parent)
    before = sorted(folder.rglob('*'))
    assert main([*FLAGS, '--out', 'run']) == 2
    assert 'holds something already' in capsys.readouterr().err
    assert sorted(folder.rglob('*')) == before


def test_names_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [make_folder(Config(reward='m:f')).name for _ in range(2)]
    assert names == ['tiny-m.f-001', 'tiny-m.f-002']


def test_of_many_that_start_at_once_each_has_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(20) as threads:
        found = set(threads.map(make_folder, [Config()] * 60))
    assert len(found) == 60


def test_of_two_that_find_it_empty_one_has_it(tmp_path, monkeypatch):
    "The look is not what claims a folder."
    monkeypatch.setattr(Path, 'glob', lambda *_: [])
    config = Config(out=str(tmp_path / 'run'))
    make_folder(config)
    with pytest.raises(ValueError, match='cannot be the folder of a run'):
        make_folder(config)


def test_one_that_was_slow_to_start_writes_over_nothing(here, monkeypatch, capsys):
    "It is held up while it loads; the other begins in the same folder meanwhile."
    words = [*FLAGS, '--num-epochs', '1', '--out', 'run']
    load = runs.load_all
    codes = []

    def slow(*given):
        monkeypatch.setattr(runs, 'load_all', load)
        codes.append(main(words))
        return load(*given)

    monkeypatch.setattr(runs, 'load_all', slow)
    codes.append(main(words))
    assert codes == [2, 0] and 'holds something already' in capsys.readouterr().err


@pytest.mark.parametrize(
    'error', [OSError(errno.ENOLCK, 'No locks'), NotImplementedError()], ids=repr
)
def test_a_disk_without_locks_is_used(here, monkeypatch, error):
    def acquire(*_, **__):
        raise error

    monkeypatch.setattr(FileLock, 'acquire', acquire)
    with pytest.warns(UserWarning, match='cannot be locked.*start no other run'):
        run = begin_run(Config(out='run', **TINY))
    assert (run.folder / 'config.yaml').exists()


def raises(error):
    def function(*_, **__):
        raise error

    return function


def interrupted(*_, **__):
    "Ctrl-C, which a library that reads a file takes for a fault of the file."
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        raise OSError('Unable to load weights from the file.') from None


LOADS = {
    'no model': (raises(ValueError('no model')), 2),
    'Ctrl-C': (raises(KeyboardInterrupt()), 130),
    'Ctrl-C, misread': (interrupted, 130),
    'SIGTERM': (lambda *_: send(signal.SIGTERM, pause=5), 143),
}


@pytest.mark.parametrize('out', [[], ['--out', 'a/new/one'], ['--out', '../other/new']], ids=str)
@pytest.mark.parametrize('load, code', LOADS.values(), ids=LOADS)
def test_what_does_not_load_leaves_nothing(here, monkeypatch, capsys, load, code, out):
    "No folder, and nothing wrong is said."
    (here / 'place').mkdir()
    monkeypatch.chdir(here / 'place')
    monkeypatch.setattr(runs, 'load_model', load)
    assert main([*FLAGS, *out]) == code
    assert [path.name for path in here.rglob('*')] == ['place']
    said = capsys.readouterr()
    assert 'resume' not in said.out + said.err and ('no model' in said.err) == (code == 2)


def test_what_does_not_load_leaves_other_runs(here, monkeypatch):
    make_folder(Config())
    monkeypatch.setattr(runs, 'load_model', raises(ValueError('no model')))
    assert main(FLAGS) == 2
    assert [path.name for path in Path('runs').iterdir()] == ['tiny-aesthetic-001']


def test_a_chain_that_cannot_be_made_leaves_no_run(here):
    "The scheduler is asked when the model is loaded, and before anything is sampled."
    with pytest.raises(ValueError, match='starts at timestep 1000'):
        train_run(load_config('tiny', num_inference_steps=1000))
    assert not list(here.iterdir())


def test_a_step_without_randomness_leaves_no_run(here, monkeypatch):
    "What the loop would refuse at its start is refused before there is a run."
    pipe = micro_pipeline(set_alpha_to_one=True)
    monkeypatch.setattr(runs, 'load_model', lambda *_: pipe)
    with pytest.raises(ValueError, match='set_alpha_to_one'):
        train_run(Config(**TINY))
    assert not list(here.iterdir())


# stopping and going on


def own_reward(place, monkeypatch, act=lambda calls: None):
    """Flags of a run with a reward function of one's own.
    It acts by the number of its call: 1 is the trial, 2 the evaluation, then two an epoch."""
    module = types.ModuleType(f'rewards_{place.name}')
    calls = []

    def reward(images, prompts):
        calls.append(1)
        other = act(len(calls))
        return brightness(images, prompts) if other is None else other

    module.reward = reward
    monkeypatch.setitem(sys.modules, module.__name__, module)
    name = f'{module.__name__}:reward'
    return ['--reward', name, *FLAGS, '--num-epochs', '3', '--out', 'run']


def advice(said):
    "The words of the command that was printed last, as a shell would hand them over."
    found = re.findall(r'ddpo_train (--resume .+?)(?: goes on\.)?$', said, re.M)
    return shlex.split(found[-1])


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "The run with the mean of all pixels as its reward, left alone."
    place = tmp_path_factory.mktemp('undisturbed')
    source = 'def reward(images, prompts): return images.mean((1, 2, 3))'
    (place / 'light.py').write_text(source)
    words = ['--reward', 'light:reward', *FLAGS, '--num-epochs', '3', '--out', 'run']
    done = command(*words, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "'light:reward', 45 prompts such as 'a cat'" in done.stdout
    return place / 'run'


def send(*signals, pause=0.0):
    "Signals to this process."
    for number in signals:
        os.kill(os.getpid(), number)
        time.sleep(pause)


def epochs_kept(folder):
    return [path.stem for path in checkpoints(folder / 'checkpoints')]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_epoch(here, monkeypatch, capfd, undisturbed, number):
    """In the second epoch. The epoch ends, a checkpoint is written, the messages say when and how
    to go on, the exit code which signal it was. The resumed run is the one left alone."""

    def act(call):
        if call == 5:
            send(number)

    assert main(own_reward(here, monkeypatch, act)) == 128 + number
    said = capfd.readouterr().out
    assert 'The run stops in about' in said and 'its epoch is done, with a checkpoint' in said
    assert 'Stopped after 2 epochs. To go on: ddpo_train --resume run' in said
    assert epochs_kept(here / 'run') == ['epoch-00001', 'epoch-00002']
    assert main(advice(said)) == 0
    is_the_same_run(here / 'run', undisturbed)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_it_at_once(here, monkeypatch, capfd, undisturbed, number):
    "In the middle of the second epoch; the resumed run does that epoch again."

    def act(call):
        if call == 5:
            send(number, number, pause=1.1)

    assert main(own_reward(here, monkeypatch, act)) == 128 + number
    said = capfd.readouterr().out
    assert 'Stopped after 1 epochs. To go on: ddpo_train --resume run' in said
    assert epochs_kept(here / 'run') == ['epoch-00001']
    assert main(advice(said)) == 0
    is_the_same_run(here / 'run', undisturbed)


def wait_for(path):
    "Until a file is there, at most two minutes."
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def test_a_process_ends_with_the_signals_code(tmp_path):
    "From outside, as a person or a machine that is taken away does it."
    words = [COMMAND, *FLAGS, '--num-epochs', '500', '--out', 'run']
    options = dict(cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen(words, **options)
    wait_for(tmp_path / 'run' / 'checkpoints' / 'epoch-00001.pt')
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert 'To go on: ddpo_train --resume run' in said and len(table(tmp_path / 'run')) >= 1


def test_an_echo_is_no_second_signal():
    """A launcher passes on what the process has seen already. Afterwards signals do what they did
    before."""
    before = signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        stop.when = 'later'
        send(*[signal.SIGINT] * 3)
        assert stop.signal == stop.between('soon') == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_in_a_thread_it_listens_to_nothing():
    "Python allows handlers in the main thread only; a run may be in another."
    found = []

    def enter():
        with Stop() as stop:
            found.append(stop.between('soon'))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [0]


def test_a_reward_function_that_raises_loses_no_epoch(here, monkeypatch, capsys, undisturbed):
    """In the second epoch. One sentence, exit code 1; mended and resumed it is the run that never
    failed."""

    def act(call):
        if call == 6:
            raise ConnectionError('no answer')

    assert main(own_reward(here, monkeypatch, act)) == 1
    said = capsys.readouterr().err
    assert 'After 1 of 3 epochs: ConnectionError: no answer. When the cause is gone, ' in said
    assert main(advice(said)) == 0
    is_the_same_run(here / 'run', undisturbed)


MOMENTS = {
    'evaluation before': ('ddpo_tutorial.runs.evaluate', 1),
    'W&B': ('ddpo_tutorial.reports.start_wandb', 1),
    'first batch': ('ddpo_tutorial.training.score_batch', 2),
    'first update': ('ddpo_tutorial.training.clip_gradients', 1),
    'first checkpoint': ('torch.save', 1),
    'checkpoint written': ('os.fsync', 3),
    'old ones removed': ('pathlib.Path.unlink', 1),
    'first record': ('ddpo_tutorial.runs.record_epoch', 1),
    'second epoch': ('ddpo_tutorial.training.draw_prompts', 2),
    'third checkpoint': ('ddpo_tutorial.checkpoints.pack', 3),
    'evaluation after': ('ddpo_tutorial.runs.evaluate', 2),
    'pipeline': ('ddpo_tutorial.runs.save_trained', 1),
}


def strike(monkeypatch, name, number, error):
    "Raise at the call of that number of a function, counted from 1, and never again."
    place, _, function = name.rpartition('.')
    original = pkgutil.resolve_name(name)
    calls = []

    def struck(*given, **options):
        calls.append(1)
        if len(calls) == number:
            raise error
        return original(*given, **options)

    monkeypatch.setattr(pkgutil.resolve_name(place), function, struck)


SLOW_EXIT = pytest.param(SystemExit(3), marks=pytest.mark.slow)


@pytest.mark.parametrize('error', [KeyboardInterrupt(2), SLOW_EXIT], ids=repr)
@pytest.mark.parametrize('name, number', MOMENTS.values(), ids=MOMENTS)
def test_the_advice_works_at_every_moment(
    here, monkeypatch, capsys, undisturbed, name, number, error
):
    """From the words "Writing to" to the end. The command that was printed last goes on, and the
    run ends as the one that was left alone."""
    words = own_reward(here, monkeypatch)
    strike(monkeypatch, name, number, error)
    assert main(words) == (130 if isinstance(error, KeyboardInterrupt) else 1)
    said = capsys.readouterr()
    assert isinstance(error, KeyboardInterrupt) or 'SystemExit: 3' in said.err
    assert main(advice(said.out + said.err)) == 0
    is_the_same_run(here / 'run', undisturbed)


@pytest.mark.parametrize('call', [2, pytest.param(3, marks=pytest.mark.slow), 5])
def test_killed_without_a_word_it_can_be_resumed(here, undisturbed, call):
    "In the evaluation, in the first epoch, in the second; also into another number of checkpoints."
    source = f"""
import os, pathlib
calls = pathlib.Path('calls')
def reward(images, prompts):
    with calls.open('a') as file:
        file.write('.')
    if len(calls.read_text()) == {call}:
        os.kill(os.getpid(), 9)
    return images.mean((1, 2, 3))
"""
    (here / 'light.py').write_text(source)
    words = ['--reward', 'light:reward', *FLAGS, '--num-epochs', '3', '--out', 'run']
    assert command(*words, cwd=here).returncode == -9
    words = ['--resume', 'run', '--reward', 'light:reward', '--checkpoint-every', '2']
    done = command(*words, cwd=here)
    assert done.returncode == 0, done.stderr
    is_the_same_run(here / 'run', undisturbed)


def test_the_advice_is_for_a_shell(tmp_path):
    run = Run(Config(reward='mine:sharp'), tmp_path, "a b/it's", [], True, None)
    assert advice(run.again) == ['--resume', "a b/it's", '--reward', 'mine:sharp']
    assert advice(run._replace(config=Config()).again) == ['--resume', "a b/it's"]


def test_a_nan_reward_stops_before_the_update(here, monkeypatch, capsys):
    def act(call):
        return torch.full((2,), float('nan')) if call == 5 else None

    assert main(own_reward(here, monkeypatch, act)) == 1
    said = capsys.readouterr().err
    assert 'After 1 of 3 epochs' in said and 'The reward is nan for' in said
    assert not (here / 'run' / 'pipeline').exists()


def test_a_removed_folder_is_said(here, monkeypatch, capsys):
    def act(call):
        if call == 5:
            shutil.rmtree('run')

    assert main(own_reward(here, monkeypatch, act)) == 1
    assert 'could not be written' in capsys.readouterr().err


def test_resumed_from_elsewhere_with_the_prompt_file_gone(here, monkeypatch):
    "The run keeps its own prompts."
    (here / 'animals.txt').write_text('a lion\na whale\n')
    words = ['--prompts', 'animals.txt', '--out', 'run', '--num-epochs', '1']
    assert main([*FLAGS, *words]) == 0
    (here / 'animals.txt').unlink()
    (here / 'sub').mkdir()
    monkeypatch.chdir(here / 'sub')
    assert main(['--resume', '../run', '--num-epochs', '2']) == 0
    assert len(table(here / 'run')) == 2
    assert json.loads((here / 'run' / 'prompts.json').read_text()) == ['a lion', 'a whale']


def test_a_run_of_version_02_is_resumed(here, undisturbed):
    "Its config.yaml knows no `loss`, its tables were written without a thought of gaps."
    shutil.copytree(undisturbed, here / 'run')
    (here / 'light.py').write_text((undisturbed.parent / 'light.py').read_text())
    path = here / 'run' / 'config.yaml'
    settings = yaml.safe_load(path.read_text())
    assert settings.pop('loss') == 'clipped'
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    assert main(['--resume', 'run', '--reward', 'light:reward', '--num-epochs', '4']) == 0
    assert load_config(path).loss == 'clipped'
    assert table(here / 'run')[:3] == table(undisturbed) and len(table(here / 'run')) == 4


def test_what_a_resumed_run_refuses(alone, monkeypatch, capsys):
    """Another run's settings, fewer epochs than are done, a run that is in use. A finished run that
    is resumed is not trained on."""
    folder, _ = alone
    monkeypatch.chdir(folder.parent)
    rows = table(folder)
    assert main(['--resume', 'run', '--seed', '1']) == 2
    assert 'seed=1 would make it another run' in capsys.readouterr().err
    assert main(['--resume', 'run', '--num-epochs', '2']) == 2
    assert 'num_epochs=2; expected at least 3' in capsys.readouterr().err
    assert load_config(folder / 'config.yaml').num_epochs == 3
    with FileLock(folder / 'run.lock'):
        assert main(['--resume', 'run']) == 2
    assert 'is in use' in capsys.readouterr().err
    assert main(['--resume', 'run']) == 0 and table(folder) == rows


def contents(folder):
    "All files, by name, but for the lock."
    files = [path for path in folder.rglob('*') if path.is_file() and path.name != 'run.lock']
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused_untouched(folder, capsys, *wanted, words=()):
    "Resuming is refused before anything is loaded or written. Returns what was said."
    before = contents(folder)
    assert main(['--resume', str(folder), *words]) == 2
    said = ''.join(capsys.readouterr())
    assert all(word in said for word in wanted), said
    assert 'Training' not in said and contents(folder) == before


def for_all(act):
    return lambda folder: [act(path) for path in (folder / 'checkpoints').iterdir()]


LOST = {
    'emptied': for_all(lambda path: path.write_bytes(b'')),
    'cut': for_all(lambda path: path.write_bytes(path.read_bytes()[:1000])),
    'removed': for_all(Path.unlink),
    'all removed': lambda folder: shutil.rmtree(folder / 'checkpoints'),
    'no files': for_all(lambda path: (path.unlink(), path.mkdir())),
}


@pytest.mark.parametrize('lose', LOST.values(), ids=LOST)
def test_without_its_checkpoints_a_run_is_not_begun_anew(alone, tmp_path, capsys, lose):
    "Its tables are all that is left of it."
    shutil.copytree(alone[0], tmp_path / 'run')
    lose(tmp_path / 'run')
    wanted = ['No checkpoint in', 'loads, and 3 epochs are done', 'begin a new run']
    refused_untouched(tmp_path / 'run', capsys, *wanted, words=['--num-epochs', '4'])


def test_interrupted_before_its_first_checkpoint_it_begins_again(here, monkeypatch, undisturbed):
    "Twice, with more checkpoints the second time: the table of the first does not count any more."
    words = own_reward(here, monkeypatch)
    reward = words[:2]
    for call, number in ((7, 3), (2, 1)):
        strike(monkeypatch, 'ddpo_tutorial.training.score_batch', call, KeyboardInterrupt(2))
        assert main([*words, '--checkpoint-every', str(number)]) == 130
        assert not epochs_kept(here / 'run')
        words = ['--resume', 'run', *reward]
    assert main(words) == 0
    is_the_same_run(here / 'run', undisturbed)


CHANGED = {
    'its seed': ('config.yaml', 'seed: 0', 'seed: 5', 'its seed is 0, here it is 5'),
    'a cut file': ('config.yaml', 'eta: 1.0', 'eta: 0.5', 'its eta is 1.0, here it is 0.5'),
    'its prompts': ('prompts.json', 'a cat', 'a cow', "its prompts.json is ['a cat'"),
}


@pytest.mark.parametrize('name, old, new, wanted', CHANGED.values(), ids=CHANGED)
def test_a_checkpoint_knows_its_run(alone, tmp_path, capsys, name, old, new, wanted):
    shutil.copytree(alone[0], tmp_path / 'run')
    path = tmp_path / 'run' / name
    path.write_text(path.read_text().replace(old, new))
    words = ['belongs to another run', wanted, 'epoch-00003.pt']
    refused_untouched(tmp_path / 'run', capsys, *words, words=['--num-epochs', '4'])


def test_cut_settings_are_not_filled_up(alone, tmp_path, capsys):
    "With defaults they would be another run's."
    shutil.copytree(alone[0], tmp_path / 'run')
    path = tmp_path / 'run' / 'config.yaml'
    path.write_text(path.read_text().partition('samples_per_epoch')[0])
    refused_untouched(tmp_path / 'run', capsys, 'its samples_per_epoch is 3, here it is 64')


def test_another_runs_checkpoint_is_refused(alone, undisturbed, tmp_path, capsys):
    shutil.copytree(alone[0], tmp_path / 'run')
    shutil.copy(undisturbed / 'checkpoints' / 'epoch-00003.pt', tmp_path / 'run' / 'checkpoints')
    wanted = "its reward is 'light:reward', here it is 'aesthetic'"
    refused_untouched(tmp_path / 'run', capsys, wanted)


def test_a_moved_run_goes_on(alone, tmp_path, monkeypatch):
    "Wherever its folder is and whatever it is called, its checkpoints are its own."
    shutil.copytree(alone[0], tmp_path / 'ein Lauf')
    monkeypatch.chdir(tmp_path)
    assert main(['--resume', 'ein Lauf', '--num-epochs', '4']) == 0
    assert table(tmp_path / 'ein Lauf')[:3] == table(alone[0])


NO_PROMPTS = {
    'cut': b'["a cat", ',
    'empty': b'',
    'no prompt': b'[]',
    'a string': b'"a cat"',
    'a number': b'7',
    'numbers': b'[1, 2]',
    'nothing': b'null',
    'bytes': bytes(range(200, 256)),
    'deep': b'[' * 100_000,
}


@pytest.mark.parametrize('data', [*NO_PROMPTS.values(), None], ids=[*NO_PROMPTS, 'missing'])
def test_damaged_prompts_are_named(alone, tmp_path, capsys, data):
    shutil.copytree(alone[0], tmp_path / 'run')
    path = tmp_path / 'run' / 'prompts.json'
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    refused_untouched(tmp_path / 'run', capsys, f'{str(path)!r} does not hold the prompts of a run')


@pytest.mark.parametrize('name', ['checkpoints', 'pipeline', 'lora', 'run.lock'])
def test_links_in_a_runs_folder_are_refused(alone, tmp_path, capsys, name):
    "Through them a run would write to, and delete, what is elsewhere."
    shutil.copytree(alone[0], tmp_path / 'run', ignore=shutil.ignore_patterns(name))
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'run' / name).symlink_to(tmp_path / 'mine')
    refused_untouched(tmp_path / 'run', capsys, f'{name}', 'is a link')


# what surrounds a reward function

POOL = """
import multiprocessing, signal
def double(x):
    return [2 * x, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL]
def reward(images, prompts):
    with multiprocessing.get_context('fork').Pool(2) as pool:
        assert pool.map(double, [1, 2]) == [[2, True], [4, True]]
    return images.mean((1, 2, 3))
"""


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs to fork')
def test_a_reward_may_start_processes(here):
    "They end when they are told to: the run's way with signals is not theirs."
    (here / 'pool.py').write_text(POOL)
    words = ['--reward', 'pool:reward', *FLAGS, '--num-epochs', '1', '--out', 'run']
    done = subprocess.run([COMMAND, *words], cwd=here, env=ENV, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_reward_may_change_the_folder(here, monkeypatch, capsys):
    "The run stays where it was begun, and the advice is for the shell it was typed in."
    (here / 'elsewhere').mkdir()

    def act(call):
        os.chdir(here / 'elsewhere')
        if call == 5:
            raise ConnectionError

    assert main(own_reward(here, monkeypatch, act)) == 1
    assert {path.name for path in here.iterdir()} == {'elsewhere', 'run'}
    assert not list((here / 'elsewhere').iterdir()) and epochs_kept(here / 'run')
    assert advice(capsys.readouterr().err)[:2] == ['--resume', 'run']


@pytest.mark.parametrize('error', [SystemExit(3), SystemExit('bye'), GeneratorExit()], ids=repr)
def test_whatever_a_reward_raises_ends_the_run_with_its_name(here, monkeypatch, capsys, error):
    def act(call):
        if call == 5:
            raise error

    assert main(own_reward(here, monkeypatch, act)) == 1
    said = f'After 1 of 3 epochs: RuntimeError: The reward function raised {error!r}'
    assert said in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='needs SIGHUP')
def test_a_closed_terminal_ends_the_epoch(here, monkeypatch):
    "Unless it is ignored, as nohup does."
    words = own_reward(here, monkeypatch, lambda call: send(signal.SIGHUP) if call == 3 else None)
    assert main(words) == 128 + signal.SIGHUP
    assert epochs_kept(here / 'run') == ['epoch-00001']
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop() as stop:
        send(signal.SIGHUP)
        assert not stop.signal
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


@pytest.mark.parametrize('call, code', [(9, 0), (8, 130)])
def test_asked_in_the_last_evaluation_it_ends_with_it(here, monkeypatch, capfd, call, code):
    "And says so. Asked in the last epoch it stops there, and the evaluation is done when resumed."

    def act(number):
        if number == call:
            send(signal.SIGINT)

    assert main(own_reward(here, monkeypatch, act)) == code
    said = capfd.readouterr().out
    assert ('when its last evaluation is done' in said) == (code == 0), said
    assert (here / 'run' / 'evaluation.json').exists() == (code == 0)
    if code:
        assert main(advice(said)) == 0 and (here / 'run' / 'evaluation.json').exists()


# what cannot be shown


def broken_print(*words, **options):
    if 'epoch ' in words[0] or 'Same prompts' in words[0]:
        raise BrokenPipeError(32, 'Broken pipe')


UNSHOWN = {
    'a line': ('builtins.print', broken_print),
    'a table': ('ddpo_tutorial.reports.write_rows', raises(OSError(28, 'No space left'))),
    'the curve': ('ddpo_tutorial.reports.reward_curve', raises(AttributeError('old'))),
    'pictures': ('ddpo_tutorial.reports.titled_sheet', raises(TypeError('an old Pillow'))),
    'the end': ('ddpo_tutorial.reports.before_after', raises(UnicodeError('no such letter'))),
}


@pytest.mark.parametrize('name, broken', UNSHOWN.values(), ids=UNSHOWN)
def test_what_cannot_be_shown_is_said_once_and_the_run_goes_on(
    here, monkeypatch, undisturbed, name, broken
):
    words = own_reward(here, monkeypatch)
    monkeypatch.setattr(name, broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        assert main(words) == 0
    said = [str(warning.message) for warning in caught if 'The run goes on' in str(warning.message)]
    assert len(said) == len(set(said)) == (2 if name == 'builtins.print' else 1), said
    assert torch.equal(unet_of(here / 'run'), unet_of(undisturbed))
    assert epochs_kept(here / 'run') == ['epoch-00002', 'epoch-00003']


def test_a_checkpoint_comes_before_what_is_shown(here, monkeypatch):
    kept = []
    monkeypatch.setattr(runs, 'record_epoch', lambda *_: kept.append(epochs_kept(here / 'run')[-1]))
    assert main([*FLAGS, '--num-epochs', '2', '--out', 'run']) == 0
    assert kept == ['epoch-00001', 'epoch-00002']


def test_a_reward_that_fails_on_watched_pictures_ends_the_run(here, monkeypatch):
    "It is no matter of showing."

    def act(call):
        if call == 5:
            raise OSError('no answer')

    assert main([*own_reward(here, monkeypatch, act), '--watch-images', '2']) == 1


def test_an_epochs_batch_is_gone_when_the_next_is_trained_on(here, monkeypatch):
    "Its pictures and latents would take the place that an update needs."
    update = training.update
    seen = []

    def watch(config, policy, state, batch, *rest):
        gc.collect()
        assert not any(images() is not None for images in seen)
        seen.append(weakref.ref(batch.images))
        return update(config, policy, state, batch, *rest)

    monkeypatch.setattr(training, 'update', watch)
    assert main([*FLAGS, '--num-epochs', '3', '--out', 'run']) == 0 and len(seen) == 3


# a LoRA


def test_a_lora_is_saved_and_resumed(here):
    assert main([*FLAGS, '--lora-rank', '2', '--num-epochs', '1', '--out', 'run']) == 0
    assert main(['--resume', 'run', '--num-epochs', '2']) == 0
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder())
    pipe.load_lora_weights(here / 'run' / 'lora')
    outer = [p for name, p in pipe.unet.named_parameters() if 'lora_B' in name]
    assert len(table(here / 'run')) == 2 and any(p.abs().sum() > 0 for p in outer)


# W&B


class Page:
    "Stands in for a W&B run: what was logged, in order."

    def __init__(self):
        self.rows = []

    def log(self, row, step, commit):
        self.rows.append((step, commit, row))


def test_wandb_gets_one_call_a_step_and_the_epoch_with_its_last():
    "A call for each number would make dozens of steps of an epoch."
    page = Page()
    epochs = []
    for epoch in train_epochs(SMALL, micro_pipeline(), brightness, PROMPTS):
        log_to_wandb(page, epoch)
        epochs.append(epoch)
    steps = [(step, commit) for step, commit, _ in page.rows]
    logged = [row for _, _, row in page.rows]
    assert steps == [(i, True) for i in range(6)]
    for row, wanted in zip(logged, epochs[-1].state.updates):
        assert wanted.items() <= row.items()
    for epoch, row in zip(epochs, logged[1::2]):
        assert row['reward_mean'] == epoch.row['reward_mean']
        assert len(row['pictures']) == 5 and {'rewards', 'advantages'} <= set(row)


class Broken(Page):
    def log(self, *args, **options):
        raise ConnectionError('gone')


def test_trouble_with_wandb_does_not_stop_training(capsys):
    epochs = train_epochs(SMALL, micro_pipeline(), brightness, PROMPTS)
    for epoch in epochs:
        log_to_wandb(Broken(), epoch)
    assert len(epoch.state.rows) == 3
    assert capsys.readouterr().out.count('W&B could not log epoch') == 3


def test_wandb_off_is_off(tmp_path):
    assert start_wandb(Config(), tmp_path) is None and not list(tmp_path.iterdir())


def test_wandb_offline_is_one_page_over_a_resume(here):
    assert main([*FLAGS, '--out', 'run', '--wandb', 'offline', '--num-epochs', '1']) == 0
    time.sleep(1.1)  # W&B names its folders by the second
    assert main(['--resume', 'run', '--num-epochs', '2']) == 0
    parts = list((here / 'run' / 'wandb').glob('offline-run-*'))
    assert len(parts) == 2 and len({path.name.split('-')[-1] for path in parts}) == 1


@pytest.mark.parametrize('key', ['', pytest.param('a' * 40, marks=pytest.mark.slow)])
def test_without_a_key_or_a_network_wandb_is_offline(tmp_path, key):
    """Nobody listens at the server's address: neither the start nor the end may hang. How long it
    takes is printed."""
    env = {name: ENV[name] for name in ENV if name not in ('WANDB_API_KEY', 'WANDB_MODE')}
    nobody = dict(WANDB_BASE_URL='http://127.0.0.1:9', NETRC=str(tmp_path / 'none'))
    env |= nobody | dict(HOME=str(tmp_path))
    if key:
        env |= dict(WANDB_API_KEY=key)
    start = time.monotonic()
    words = [*FLAGS, '--num-epochs', '1', '--out', 'run', '--wandb', 'online']
    options = dict(capture_output=True, text=True, timeout=900)
    done = subprocess.run([COMMAND, *words], cwd=tmp_path, env=env, **options)
    print(f'{time.monotonic() - start:.0f} s')
    said = done.stdout + done.stderr
    assert done.returncode == 0 and 'It goes on offline' in done.stdout, said
    assert len(list((tmp_path / 'run' / 'wandb').glob('offline-run-*/*.wandb'))) == 1


# slow


def newest(folder):
    return max((path.name for path in checkpoints(folder / 'checkpoints')), default='')


def kill_soon(words, folder, seconds, after_checkpoint):
    """Start the command and kill it so many seconds later, or after a new checkpoint.
    Returns its exit code, the newest checkpoint and whether one was being written."""
    before = newest(folder / 'run')
    deadline = time.monotonic() + 90
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([COMMAND, *words], cwd=folder, env=ENV, **silent)
    while after_checkpoint and newest(folder / 'run') == before and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(seconds)
    process.kill()
    code = process.wait()
    writing = bool(list((folder / 'run' / 'checkpoints').glob('*.part*')))
    return code, newest(folder / 'run'), writing


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path, capsys):
    """SIGKILL, at any moment of a start or of an epoch, in the middle of a write too: resumed, it
    ends as the run that was left alone. Every other time the kill comes up to two seconds after a
    new checkpoint, so that the run gets on."""
    args = [*FLAGS, '--num-epochs', '100', '--out']
    assert command(*args, 'alone', cwd=tmp_path).returncode == 0
    rng = random.Random(0)
    words = [*args, 'run']
    moments = []
    for kill in range(20):
        after_checkpoint = kill % 2 == 0
        seconds = rng.uniform(0, 2 if after_checkpoint else 9)
        moments.append(kill_soon(words, tmp_path, seconds, after_checkpoint))
        words = ['--resume', 'run']
    assert command(*words, cwd=tmp_path).returncode == 0
    codes, names, writing = zip(*moments)
    with capsys.disabled():
        print(f'\nkilled {len(moments)} times, {sum(writing)} of them in a write')
    assert set(codes) == {-9} and names[-1] < 'epoch-00100.pt'
    is_the_same_run(tmp_path / 'run', tmp_path / 'alone')
