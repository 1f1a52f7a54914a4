"""The command `ddpo_train` as a process: what it writes, what it repeats, what it refuses, what an interruption leaves."""
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ddpo_tutorial.checkpoints as checkpointing
from ddpo_tutorial.checkpoints import newest_checkpoint
from ddpo_tutorial.configs import RunConfig
from ddpo_tutorial.runs import main

COMMAND = str(Path(sys.executable).parent / 'ddpo_train')
SMALL = '--num_epochs 2 --samples_per_epoch 5 --sample_batch_size 3 --updates_per_epoch 2 --minibatch_size 4 --num_inference_steps 3 --eval_images 4'.split()
ENV = os.environ | dict(HF_HUB_OFFLINE='1', CUDA_VISIBLE_DEVICES='', MPLBACKEND='agg')


def command(*args, cwd):
    return subprocess.run([COMMAND, *args], cwd=cwd, env=ENV, capture_output=True, text=True)


def metrics(folder, table='metrics.csv'):
    with (folder / table).open(newline='') as f:
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader(f)]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """One small run, shared by the tests below."""
    place = tmp_path_factory.mktemp('run')
    done = command(*SMALL, '--out', 'first', cwd=place)
    assert done.returncode == 0, done.stderr
    return place, done


def test_run_folder_is_complete(finished):
    place, _ = finished
    assert sorted(p.name for p in (place / 'first').iterdir()) == ['before.safetensors', 'before_after.png', 'checkpoints', 'config.json', 'evaluation.json', 'metrics.csv',
        'pipeline', 'reward_curve.png', 'samples.png', 'updates.csv']
    assert json.loads((place / 'first' / 'config.json').read_text())['samples_per_epoch'] == 5
    for name in ('before_after.png', 'reward_curve.png'):
        Image.open(place / 'first' / name).verify()


def test_output_says_what_where_and_how(finished):
    """The plan with derived sizes, a line an epoch, and where things are."""
    _, done = finished
    for words in ('10 images in all', '4 updates', 'epoch   1/2', 'epoch   2/2', 'approx_kl', 'clipfrac', 'first/pipeline', 'standard deviations'):
        assert words in done.stdout, words


def test_trained_pipeline_loads_in_plain_diffusers_and_is_trained(finished):
    place, _ = finished
    from ddpo_tutorial.pipelines import tiny_folder
    old, new = (StableDiffusionPipeline.from_pretrained(f) for f in (tiny_folder(), place / 'first' / 'pipeline'))
    assert any(not torch.equal(p, q) for p, q in zip(old.unet.parameters(), new.unet.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(old.vae.parameters(), new.vae.parameters()))
    assert new('a horse', num_inference_steps=2).images[0].size == (64, 64)


def test_same_seed_same_metrics_other_seed_other_metrics(finished):
    place, _ = finished
    assert command(*SMALL, '--out', 'second', cwd=place).returncode == 0
    assert command(*SMALL, '--out', 'third', '--seed', '1', cwd=place).returncode == 0
    assert metrics(place / 'first') == metrics(place / 'second') != metrics(place / 'third')


def test_trained_model_can_be_trained_on(finished):
    """A folder is a model name."""
    place, _ = finished
    done = command(*SMALL, '--model', 'first/pipeline', '--reward', 'compressibility', cwd=place)
    assert done.returncode == 0 and (place / 'runs' / 'pipeline-compressibility-001' / 'metrics.csv').exists(), done.stderr


def test_a_run_is_never_overwritten(finished, monkeypatch, capsys):
    place, _ = finished
    monkeypatch.chdir(place)
    assert main([*SMALL, '--out', 'first']) == 2 and 'already holds something' in capsys.readouterr().err


def test_unknown_option_is_refused(tmp_path):
    done = command('--sede', '1', cwd=tmp_path)
    assert done.returncode == 2 and '--sede' in done.stderr and 'Traceback' not in done.stderr


LONGER = [*SMALL[2:], '--watch_images', '0', '--num_epochs']


def start(cwd, epochs=5):
    """A run in the background, somewhere in its second epoch or later."""
    process = subprocess.Popen([COMMAND, *LONGER, str(epochs), '--out', 'run'], cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (cwd / 'run' / 'checkpoints' / 'epoch-00001').exists() and time.time() < deadline:
        time.sleep(.05)
    return process


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """The run that `start` starts, left alone."""
    place = tmp_path_factory.mktemp('alone')
    done = command(*LONGER, '5', '--out', 'run', cwd=place)
    assert done.returncode == 0, done.stderr
    return place / 'run'


def unet(run):
    return {name: w for path in sorted((run / 'pipeline' / 'unet').glob('*.safetensors')) for name, w in load_file(path).items()}


def is_the_same_run(run, alone):
    """Metrics, but for the seconds, and weights, to the bit."""
    assert all(metrics(run, table) == metrics(alone, table) for table in ('metrics.csv', 'updates.csv'))
    mine, wanted = unet(run), unet(alone)
    assert mine.keys() == wanted.keys() and len(mine) > 100 and all(torch.equal(mine[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize('number, wait', [(signal.SIGINT, .1), (signal.SIGTERM, .5)])
def test_a_signal_keeps_what_is_done_and_the_run_goes_on_as_if_nothing_had_happened(alone, tmp_path, number, wait, capsys):
    """The step ends, a checkpoint is written, the command says how to go on within seconds; then it goes on."""
    process = start(tmp_path)
    time.sleep(wait)
    process.send_signal(number); began = time.time()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and 'Stopping after this step' in out and 'ddpo_train --resume run' in out and 'run/pipeline' in out, err
    assert 1 <= len(metrics(tmp_path / 'run')) < 5
    StableDiffusionPipeline.from_pretrained(tmp_path / 'run' / 'pipeline')
    where, = re.findall(r'Stopped after (.*)\. To go on', out)
    with capsys.disabled(): print(f'\nstopped {time.time() - began:.1f} s after the signal, after {where}')
    more = command('--resume', 'run', cwd=tmp_path)
    assert more.returncode == 0 and f'Going on with run/ after {where}.' in more.stdout, more.stderr
    is_the_same_run(tmp_path / 'run', alone)


@contextmanager
def at_step(number, act):
    """Do something just before an optimizer step."""
    taken = []

    def before_step(optimizer, args, kwargs):
        taken.append(1)
        if len(taken) == number:
            act()

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        yield taken
    finally:
        hook.remove()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize('number, name, words', [(3, 'epoch-00001-update-00001', '1 of 5 epochs and 1 of 2 updates of the next'), (4, 'epoch-00001-update-00002', '1 of 5 epochs and 2 of 2 updates of the next')])
def test_a_signal_in_an_update_ends_that_update(alone, tmp_path, monkeypatch, capsys, number, name, words):
    """Not the epoch: the checkpoint is in the middle of it. Resumed, it is the same run."""
    monkeypatch.chdir(tmp_path)
    with at_step(number, terminate) as taken:
        assert main([*LONGER, '5', '--out', 'run']) == 0
    assert len(taken) == number and f'Stopped after {words}.' in capsys.readouterr().out
    assert newest_checkpoint(tmp_path / 'run' / 'checkpoints').name == name
    path = tmp_path / 'run' / 'before.safetensors'
    with safe_open(path, 'pt') as kept:
        before, about = {name: kept.get_tensor(name) for name in kept.keys()}, kept.metadata()
    save_file(dict(before, rewards=before['rewards'] + 1), path, about)
    assert main(['--resume', 'run']) == 0
    is_the_same_run(tmp_path / 'run', alone)
    first, wanted = (json.loads((run / 'evaluation.json').read_text()) for run in (tmp_path / 'run', alone))
    assert first['after'] == wanted['after'] and first['before'] == pytest.approx(wanted['before'] + 1)  # read from the file, not drawn again


def fail(*args, **options):
    raise OSError(28, 'No space left on device')


@pytest.mark.parametrize('trouble, words', [('removed', 'config.json is gone'), ('full', 'could not be written')])
def test_a_stop_that_cannot_be_kept_is_said(tmp_path, monkeypatch, capsys, trouble, words):
    """The folder is gone or the disk is full when the run is asked to stop: not a word of success, and the checkpoint that a resumed run would take is named."""
    monkeypatch.chdir(tmp_path)

    def act():
        if trouble == 'removed':
            shutil.rmtree('run')
        else:
            monkeypatch.setattr(checkpointing, 'save_file', fail)
        terminate()

    with at_step(3, act):
        assert main([*LONGER, '5', '--out', 'run']) == 1
    out, err = capsys.readouterr()
    assert words in err and 'Stopped after' not in out and ('Its newest checkpoint is epoch-00001' in err or trouble == 'removed'), err


def test_a_fault_that_cannot_be_kept_is_said_too(tmp_path, monkeypatch, capsys):
    """A reward that raises, and then a full disk: both, and the checkpoint that is left."""
    monkeypatch.chdir(tmp_path)
    module = type(sys)('full_disk')
    calls = []

    def reward(images, prompts):
        calls.append(1)
        if len(calls) == 7:  # two for the evaluation, two an epoch: the first batch of the third epoch
            monkeypatch.setattr(checkpointing, 'save_file', fail)
            raise ConnectionError('the judge did not answer')
        return images.mean((1, 2, 3))

    module.reward = reward
    monkeypatch.setitem(sys.modules, 'full_disk', module)
    assert main([*LONGER, '5', '--out', 'run', '--reward', 'full_disk:reward', '--checkpoint_every', '3']) == 1
    err = capsys.readouterr().err
    assert 'After 2 of 5 epochs: ConnectionError: the judge did not answer.' in err and 'could not be written' in err and 'It has no checkpoint yet.' in err


def test_a_signal_in_the_evaluation_stops_it(tmp_path, monkeypatch, capsys):
    """Before training and after it: the batch ends, and the resumed run draws the pictures again."""
    monkeypatch.chdir(tmp_path)
    module, calls = type(sys)('signalling'), []

    def reward(images, prompts):
        calls.append(1)
        if len(calls) in when:
            terminate()
        return images.mean((1, 2, 3))

    module.reward = reward
    monkeypatch.setitem(sys.modules, 'signalling', module)
    when = [1]
    settings = [*LONGER, '1', '--out', 'run', '--reward', 'signalling:reward']
    assert main(settings) == 0 and len(calls) == 1 and 'Stopped after 0 of 1 epochs.' in capsys.readouterr().out
    calls.clear(); when[:] = [5]  # two before, two of the epoch, the first after it
    assert main(['--resume', 'run']) == 0 and len(calls) == 5
    assert 'Stopped after 1 of 1 epochs.' in capsys.readouterr().out and not (tmp_path / 'run' / 'evaluation.json').exists()
    when.clear()
    assert main(['--resume', 'run']) == 0 and len(calls) == 7 and 'standard deviations' in capsys.readouterr().out


def test_prompts_edited_before_the_first_checkpoint(tmp_path, monkeypatch):
    """The pictures before training are drawn again: those that are kept have other prompts."""
    monkeypatch.chdir(tmp_path)
    Path('animals.txt').write_text('a cat\na dog\n')
    with at_step(1, fail):
        assert main([*LONGER, '1', '--out', 'run', '--prompts', 'animals.txt']) == 1
    first = load_file('run/before.safetensors')
    shutil.rmtree('run/checkpoints', ignore_errors=True)
    Path('animals.txt').write_text('a cow\na fox\na bee\n')
    assert main(['--resume', 'run']) == 0
    assert not torch.equal(first['images'], load_file('run/before.safetensors')['images'])


def test_killed_and_resumed_is_the_same_run(alone, tmp_path):
    """SIGKILL while training: resumed, it writes the metrics and weights of a run that was left alone."""
    process = start(tmp_path)
    time.sleep(.5)
    process.kill(); process.communicate()
    more = command('--resume', 'run', cwd=tmp_path)
    assert more.returncode == 0 and 'Going on with run/' in more.stdout, more.stderr
    is_the_same_run(tmp_path / 'run', alone)


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--help'])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for f in fields(RunConfig):
        assert f'--{f.name}' in said and f.metadata['help'].split()[0] in said


def own_reward(place, text):
    """A module with a reward, in the folder where the command runs."""
    (place / 'my_rewards.py').write_text('import torch\ncalls = []\n' + text)
    return ['--reward', 'my_rewards:reward', *SMALL, '--num_epochs', '3', '--out', 'run', '--watch_images', '0']


def test_reward_and_prompts_of_ones_own(tmp_path):
    (tmp_path / 'animals.txt').write_text('a lion\na whale\n')
    done = command(*own_reward(tmp_path, 'def reward(images, prompts): return images[:, 0].mean((1, 2))'), '--prompts', 'animals.txt', cwd=tmp_path)
    assert done.returncode == 0 and "'my_rewards:reward', 2 prompts such as 'a lion'" in done.stdout, done.stderr


FLAKY = """
from pathlib import Path
def reward(images, prompts):
    calls.append(len(prompts))
    if len(calls) == 6 and not Path('mended').exists(): raise ConnectionError('the judge did not answer')
    return images[:, 0].mean((1, 2))
"""


def test_a_reward_that_raises_loses_nothing(tmp_path):
    """Two calls for the evaluation, two an epoch: it fails in the second epoch. One sentence, exit code 1; mended and resumed it is the run that never failed."""
    args = own_reward(tmp_path, FLAKY)
    failed = command(*args, cwd=tmp_path)
    assert failed.returncode == 1 and 'Traceback' not in failed.stderr, failed.stderr
    assert 'After 1 of 3 epochs: ConnectionError: the judge did not answer' in failed.stderr and 'ddpo_train --resume run goes on' in failed.stderr
    (tmp_path / 'mended').write_text('')
    assert command('--resume', 'run', cwd=tmp_path).returncode == 0
    alone = command(*[a if a != 'run' else 'alone' for a in args], cwd=tmp_path)
    assert alone.returncode == 0 and metrics(tmp_path / 'run') == metrics(tmp_path / 'alone') and len(metrics(tmp_path / 'run')) == 3


def test_nan_reward_stops_before_the_update(tmp_path):
    """In the first epoch; named with its prompt, and the untrained model is untouched on the disk."""
    args = own_reward(tmp_path, "def reward(images, prompts):\n    calls.append(1)\n    return images.mean((1, 2, 3)) * (1. if len(calls) < 5 else float('nan'))")
    done = command(*args, cwd=tmp_path)
    assert done.returncode == 1 and 'After 1 of 3 epochs' in done.stderr and 'The reward is nan for the prompt' in done.stderr
    assert [p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()] == ['epoch-00001'] and not (tmp_path / 'run' / 'pipeline').exists()


def test_a_removed_folder_is_said(tmp_path):
    """Somebody deletes the run while it trains."""
    process = start(tmp_path, 500)
    try:
        shutil.rmtree(tmp_path / 'run', ignore_errors=True)
        _, err = process.communicate(timeout=120)
    finally: process.kill()
    assert process.returncode == 1 and 'run' in err and 'FileNotFoundError' in err and 'Traceback' not in err, err


def test_wandb_offline_keeps_one_id_over_a_resume(tmp_path):
    args = [*SMALL, '--out', 'run', '--wandb', 'offline']
    assert command(*args, '--num_epochs', '1', cwd=tmp_path).returncode == 0
    done = command('--resume', 'run', '--num_epochs', '2', cwd=tmp_path)
    ids = {p.stem.split('-')[-1] for p in (tmp_path / 'run' / 'wandb').glob('offline-run-*/*.wandb')}
    assert done.returncode == 0 and len(ids) == 1 and len(list((tmp_path / 'run' / 'wandb').glob('offline-run-*'))) == 2, done.stderr
