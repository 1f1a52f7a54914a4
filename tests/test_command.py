"""The command `ddpo_train` as a process: what it writes, what it repeats, what it refuses, what an interruption leaves."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

COMMAND = str(Path(sys.executable).parent / 'ddpo_train')
SMALL = '--num_epochs 2 --samples_per_epoch 5 --sample_batch_size 3 --updates_per_epoch 2 --minibatch_size 4 --num_inference_steps 3 --eval_images 4'.split()
ENV = os.environ | dict(HF_HUB_OFFLINE='1', CUDA_VISIBLE_DEVICES='', MPLBACKEND='agg')


def command(*args, cwd):
    return subprocess.run([COMMAND, *args], cwd=cwd, env=ENV, capture_output=True, text=True)


def metrics(folder):
    with (folder / 'metrics.csv').open(newline='') as f:
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
    assert sorted(p.name for p in (place / 'first').iterdir()) == ['before_after.png', 'config.json', 'evaluation.json', 'metrics.csv', 'pipeline', 'reward_curve.png']
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


def test_a_run_is_never_overwritten(finished):
    place, _ = finished
    done = command(*SMALL, '--out', 'first', cwd=place)
    assert done.returncode == 2 and 'already holds something' in done.stderr


@pytest.mark.parametrize('args, words', [
    (['--model', 'tinny'], ["'tinny'", "'tiny'"]),
    (['--model', '.'], ['model_index.json']),
    (['--reward', 'beauty'], ["'beauty'", 'aesthetic', 'compressibility']),
    (['--prompts', 'anmals'], ["'anmals'", 'simple', 'held-out']),
    (['--prompts', 'empty.txt'], ['empty.txt', 'no prompt']),
    (['--template', 'a photo'], ["'a photo'", '{}']),
    (['--eta', '0'], ['eta=0', 'above 0']),
    (['--num_epochs', '0'], ['num_epochs=0', 'at least 1']),
    (['--learning_rate', 'nan'], ['learning_rate=nan']),
    (['--num_inference_steps', '5000'], ['num_inference_steps=5000', '1000']),
    (['--updates_per_epoch', '9', '--samples_per_epoch', '4'], ['updates_per_epoch=9', 'samples_per_epoch=4']),
    (['--eval_images', '0'], ['eval_images=0']),
], ids=lambda v: v[0] + '=' + v[1] if isinstance(v, list) and v[0].startswith('--') else '')
def test_nonsense_is_refused_in_a_sentence(args, words, tmp_path, capsys, monkeypatch):
    """One sentence that names the value, exit code 2, no traceback, nothing written."""
    from ddpo_tutorial.runs import main
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty.txt').write_text('# nothing here\n\n')
    assert main(args) == 2
    said = capsys.readouterr().err
    assert 'Traceback' not in said and all(w in said for w in words), said
    assert [p.name for p in tmp_path.iterdir()] == ['empty.txt']


def test_unknown_option_is_refused(tmp_path):
    done = command('--sede', '1', cwd=tmp_path)
    assert done.returncode == 2 and '--sede' in done.stderr and 'Traceback' not in done.stderr


def test_interruption_keeps_what_is_done(tmp_path):
    """Ctrl-C after the first epoch: metrics, curve and weights are there, and the command says where."""
    args = [*SMALL[2:], '--num_epochs', '500', '--out', 'run']
    process = subprocess.Popen([COMMAND, *args], cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (tmp_path / 'run' / 'reward_curve.png').exists() and time.time() < deadline:
        time.sleep(.1)
    time.sleep(.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and 'Interrupted' in out and 'run/pipeline' in out, err
    assert 1 <= len(metrics(tmp_path / 'run')) < 500
    StableDiffusionPipeline.from_pretrained(tmp_path / 'run' / 'pipeline')


def test_help_names_every_setting(tmp_path):
    from dataclasses import fields
    from ddpo_tutorial.runs import RunConfig
    done = command('--help', cwd=tmp_path)
    assert done.returncode == 0
    for f in fields(RunConfig):
        assert f'--{f.name}' in done.stdout and f.metadata['help'].split()[0] in done.stdout
