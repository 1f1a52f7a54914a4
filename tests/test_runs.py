"""A run: its folder, its records, stopping, failing, going on; the command as a process"""
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from filelock import FileLock
from PIL import Image

from ddpo_tutorial.checkpoints import checkpoints
from ddpo_tutorial.configs import Config, main, read_config
from ddpo_tutorial.pipelines import tiny_folder
from ddpo_tutorial.rewards import WeightedSum
from ddpo_tutorial.runs import (FILES, Stop, before_after, line_of, load_reward, log_to_wandb, make_folder, reward_curve, start_wandb,
    summary, titled_sheet, write_rows)
from ddpo_tutorial.training import Batch, train
from helpers import PROMPTS, brightness, micro_pipeline

COMMAND = str(Path(sys.executable).parent / 'ddpo_train')
TINY = dict(samples_per_epoch=3, sample_batch_size=2, updates_per_epoch=2, num_inference_steps=2, eval_images=2, watch_images=0)
FLAGS = ['--config', 'tiny-original'] + [word for name, value in TINY.items() for word in (f'--{name}', str(value))]
ENV = os.environ | dict(HF_HUB_OFFLINE='1', CUDA_VISIBLE_DEVICES='', MPLBACKEND='agg')
SMALL = Config(num_epochs=3, samples_per_epoch=5, sample_batch_size=2, num_inference_steps=2, updates_per_epoch=2, learning_rate=1e-3,
    buffer_size=4, min_count=2)

def command(*args, cwd): return subprocess.run([COMMAND, *args], cwd=cwd, env=ENV, capture_output=True, text=True)

def table(folder, name='metrics.csv'):
    "The rows of a table, without the seconds."
    rows = csv.DictReader((folder / name).read_text().splitlines())
    return [{k: float(v) for k, v in row.items() if k != 'seconds'} for row in rows]

def unet_of(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder / 'pipeline')
    return torch.cat([p.flatten() for p in pipe.unet.parameters()])

def is_the_same_run(folder, other):
    "Both tables, but for the seconds, and the weights, to the bit."
    for name in ('metrics.csv', 'updates.csv'): assert table(folder, name) == table(other, name)
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
    files = {'config.yaml', 'metrics.csv', 'updates.csv', 'reward_curve.png', 'samples.png', 'before_after.png', 'checkpoints', 'pipeline'}
    assert {p.name for p in folder.iterdir()} == files | {'evaluation.json', 'prompts.json', 'run.lock'}
    assert files == set(FILES) - {'lora'} and all(f'run/{name}: {FILES[name]}' in said for name in files)
    for name in ('before_after.png', 'reward_curve.png', 'samples.png'): Image.open(folder / name).verify()
    assert [p.name for p in checkpoints(folder / 'checkpoints')] == ['epoch-00002.pt', 'epoch-00003.pt']
    assert Config(**read_config(folder / 'config.yaml')) == Config(num_epochs=3, out='run', **TINY)

def test_the_smoke_run_is_whole(tmp_path):
    done = command('--config', 'smoke', '--out', 'run', cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name for name in FILES if not (tmp_path / 'run' / name).exists()} == {'pipeline'} # it is a LoRA that is trained

def test_it_says_what_it_does_and_when_it_will_end(alone):
    said = alone[1]
    for words in ('9 images in all', '2 updates an epoch', 'epoch   1/3', 'epoch   3/3', 'ends about', 'standard deviations'):
        assert words in said

def test_the_trained_pipeline_is_plain_and_trained(alone):
    old, new = (StableDiffusionPipeline.from_pretrained(f) for f in (tiny_folder(), alone[0] / 'pipeline'))
    assert any(not torch.equal(p, q) for p, q in zip(old.unet.parameters(), new.unet.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(old.vae.parameters(), new.vae.parameters()))
    assert new('a horse', num_inference_steps=2).images[0].size == (64, 64)

def test_tables_hold_the_rows(tmp_path):
    "Every number survives, and the names of a sum's parts are columns."
    reward, epochs = WeightedSum(light=(2., brightness), dark=(-.5, brightness)), []
    rows = train(SMALL, micro_pipeline(), reward, PROMPTS, epochs.append)
    updates = epochs[-1].state.updates
    for name, wanted in (('metrics.csv', rows), ('updates.csv', updates)):
        write_rows(tmp_path / name, wanted)
        assert table(tmp_path, name) == [{k: float(v) for k, v in row.items() if k != 'seconds'} for row in wanted]
    for row in rows: assert row['reward_mean'] == pytest.approx(2 * row['reward_light'] - .5 * row['reward_dark'], rel=1e-5)

def test_line_and_curve():
    rows = [dict(epoch=e, reward_mean=e + .5, reward_std=.25, approx_kl=1e-7, clipfrac=.5, seconds=3600.) for e in range(3)]
    began = time.time()
    line = line_of(rows[2], 5)
    assert all(w in line for w in ('3/5', '2.500', '0.250', '1.0e-07', '0.50', '3600.0 s'))
    ends = (time.localtime(began + 7200 + s) for s in range(int(time.time() - began) + 2))
    assert any(line.endswith(time.strftime('ends about %H:%M', end)) for end in ends)
    top, bottom = reward_curve(rows).axes
    assert top.lines[0].get_xydata().tolist() == [[1, .5], [2, 1.5], [3, 2.5]] and len(bottom.lines[0].get_xydata()) == 3

def batch_of(n, shade, reward=0.):
    "Pictures of one shade, with one score."
    return Batch([f'p{i}' for i in range(n)], list(range(n)), None, None, torch.full((n, 3, 16, 16), shade), torch.full((n,), reward))

def test_before_stands_above_after():
    "Rows in turn, eight a row: a picture and what became of it are one above the other."
    page = np.asarray(before_after(batch_of(10, 0.), batch_of(10, 1.)).convert('L')).astype(int)
    shades = [page[h[20], 50] for h in np.array_split(np.arange(len(page)), 4)]
    assert shades[:2] == [0, 255] and page.shape[0] > page.shape[1] / 3

def test_summary():
    before, after = batch_of(4, 0.)._replace(rewards=torch.tensor([1., 3., 1., 3.])), batch_of(4, 0., reward=5.)
    assert summary(before, after) == dict(before=2, before_std=1, after=5, gain=3, gain_in_std=3)

def test_the_sheet_shows_scores(): assert titled_sheet(batch_of(20, .5)).size[0] > 8 * 90

def test_reward_functions_by_name():
    "Every name of a configuration gives a function of images and prompts, where no download is needed."
    for name in ('aesthetic', 'similarity', 'alignment', 'compressibility', 'incompressibility'):
        for on_cpu in (False, True):
            reward = load_reward(Config(reward=name, reward_on_cpu=on_cpu), 64, 'cpu')
            assert reward(torch.rand(2, 3, 64, 64), ['a cat', 'a dog']).shape == (2,)

# its folder

def test_a_run_is_never_written_over(alone, monkeypatch, capsys):
    folder, _ = alone
    monkeypatch.chdir(folder.parent)
    before = sorted(folder.rglob('*'))
    assert main([*FLAGS, '--out', 'run']) == 2 and 'holds something already' in capsys.readouterr().err
    assert sorted(folder.rglob('*')) == before

def test_names_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [make_folder(Config(reward='m:f')).name for _ in range(2)] == ['tiny-m.f-001', 'tiny-m.f-002']

@pytest.mark.parametrize('out', ['file', 'file/run'])
def test_what_cannot_be_a_folder_is_refused(tmp_path, out):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='cannot be the folder of a run'): make_folder(Config(out=str(tmp_path / out)))

def test_a_model_that_cannot_be_loaded_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['--model', 'owner/name', '--config', 'tiny']) == 2
    assert "'owner/name'" in capsys.readouterr().err and not list(tmp_path.iterdir())

# stopping and going on

@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder, in which the command is called."
    monkeypatch.chdir(tmp_path)
    return tmp_path

def own_reward(place, monkeypatch, act=lambda calls: None):
    """Flags of a run with a reward function of one's own.
    It acts by the number of its call: 1 is the trial, 2 the evaluation, then two an epoch."""
    module, calls = types.ModuleType(f'rewards_{place.name}'), []
    def reward(images, prompts):
        calls.append(1)
        return brightness(images, prompts) if (other := act(len(calls))) is None else other
    module.reward = reward
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return ['--reward', f'{module.__name__}:reward', *FLAGS, '--num-epochs', '3', '--out', 'run']

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "The run with the mean of all pixels as its reward, left alone."
    place = tmp_path_factory.mktemp('undisturbed')
    (place / 'light.py').write_text('def reward(images, prompts): return images.mean((1, 2, 3))')
    done = command('--reward', 'light:reward', *FLAGS, '--num-epochs', '3', '--out', 'run', cwd=place)
    assert done.returncode == 0 and "'light:reward', 45 prompts such as 'a cat'" in done.stdout, done.stderr
    return place / 'run'

def send(*signals, pause=0.):
    "Signals to this process."
    for number in signals:
        os.kill(os.getpid(), number)
        time.sleep(pause)

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_epoch(here, monkeypatch, capfd, undisturbed, number):
    """In the second epoch. The epoch ends, a checkpoint is written, the messages say when and how to go on, the exit code
    which signal it was. The resumed run is the one that was left alone."""
    args = own_reward(here, monkeypatch, lambda call: send(number) if call == 5 else None)
    assert main(args) == 128 + number
    said = capfd.readouterr().out
    assert 'The run stops in about' in said and 'Stopped after 2 epochs. To go on: ddpo_train --resume run' in said
    assert [p.stem for p in checkpoints(here / 'run' / 'checkpoints')] == ['epoch-00001', 'epoch-00002']
    assert main(['--resume', 'run']) == 0
    is_the_same_run(here / 'run', undisturbed)

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_it_at_once(here, monkeypatch, capfd, undisturbed, number):
    "In the middle of the second epoch; the resumed run does that epoch again."
    args = own_reward(here, monkeypatch, lambda call: send(number, number, pause=1.1) if call == 5 else None)
    assert main(args) == 128 + number
    assert 'Interrupted. To go on, with this epoch done again: ddpo_train --resume run' in capfd.readouterr().out
    assert [p.stem for p in checkpoints(here / 'run' / 'checkpoints')] == ['epoch-00001']
    assert main(['--resume', 'run']) == 0
    is_the_same_run(here / 'run', undisturbed)

def test_a_process_ends_with_the_signals_code(tmp_path):
    "From outside, as a person or a machine that is taken away does it."
    words = [COMMAND, *FLAGS, '--num-epochs', '500', '--out', 'run']
    process = subprocess.Popen(words, cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / 'run' / 'checkpoints' / 'epoch-00001.pt').exists() and time.monotonic() < deadline: time.sleep(.1)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and 'To go on: ddpo_train --resume run' in said and len(table(tmp_path / 'run')) >= 1

def test_an_echo_is_no_second_signal():
    "A launcher passes on what the process has seen already. Afterwards signals do what they did before."
    before = signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        send(*[signal.SIGINT] * 3)
        assert stop.signal == signal.SIGINT and stop.epoch_done(1.) and signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before

def test_in_a_thread_it_listens_to_nothing():
    "Python allows handlers in the main thread only; a run may be in another."
    found = []
    def enter():
        with Stop() as stop: found.append(stop.epoch_done(1.))
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]

def test_a_reward_function_that_raises_loses_no_epoch(here, monkeypatch, capsys, undisturbed):
    "In the second epoch. One sentence, exit code 1; mended and resumed it is the run that never failed."
    def act(call):
        if call == 6: raise ConnectionError('no answer')
    assert main(own_reward(here, monkeypatch, act)) == 1
    wanted = 'After 1 of 3 epochs: ConnectionError: no answer. Its newest checkpoint is epoch-00001.pt. When the cause is gone, '
    assert wanted + 'ddpo_train --resume run goes on.' in capsys.readouterr().err
    assert main(['--resume', 'run']) == 0
    is_the_same_run(here / 'run', undisturbed)

def test_a_nan_reward_stops_before_the_update(here, monkeypatch, capsys):
    assert main(own_reward(here, monkeypatch, lambda call: torch.full((2,), float('nan')) if call == 5 else None)) == 1
    said = capsys.readouterr().err
    assert 'After 1 of 3 epochs' in said and 'The reward is nan for' in said and not (here / 'run' / 'pipeline').exists()

def test_a_removed_folder_is_said(here, monkeypatch, capsys):
    assert main(own_reward(here, monkeypatch, lambda call: shutil.rmtree('run') if call == 5 else None)) == 1
    assert 'FileNotFoundError' in capsys.readouterr().err

def test_resumed_from_elsewhere_with_the_prompt_file_gone(here, monkeypatch):
    "The run keeps its own prompts."
    (here / 'animals.txt').write_text('a lion\na whale\n')
    assert main([*FLAGS, '--prompts', 'animals.txt', '--out', 'run', '--num-epochs', '1']) == 0
    (here / 'animals.txt').unlink()
    (here / 'sub').mkdir()
    monkeypatch.chdir(here / 'sub')
    assert main(['--resume', '../run', '--num-epochs', '2']) == 0 and len(table(here / 'run')) == 2
    assert json.loads((here / 'run' / 'prompts.json').read_text()) == ['a lion', 'a whale']

def test_what_a_resumed_run_refuses(alone, monkeypatch, capsys):
    "Another run's settings, fewer epochs than are done, a run that is in use. A finished run that is resumed is not trained on."
    folder, _ = alone
    monkeypatch.chdir(folder.parent)
    rows = table(folder)
    assert main(['--resume', 'run', '--seed', '1']) == 2 and 'seed=1 would make it another run' in capsys.readouterr().err
    assert main(['--resume', 'run', '--num-epochs', '2']) == 1 and 'num_epochs=2; expected at least 3' in capsys.readouterr().err
    with FileLock(folder / 'run.lock'): assert main(['--resume', 'run']) == 2 and 'is in use' in capsys.readouterr().err
    assert main(['--resume', 'run']) == 0 and table(folder) == rows

def test_a_lora_is_saved_and_resumed(here):
    assert main([*FLAGS, '--lora-rank', '2', '--num-epochs', '1', '--out', 'run']) == 0
    assert main(['--resume', 'run', '--num-epochs', '2']) == 0
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder())
    pipe.load_lora_weights(here / 'run' / 'lora')
    assert len(table(here / 'run')) == 2 and any(p.abs().sum() > 0 for n, p in pipe.unet.named_parameters() if 'lora_B' in n)

def test_dry_run_writes_nothing(here, capsys):
    "Settings as YAML that can be read back, and the sizes they come to."
    assert main(['--config', 'sd-lora-16gb', '--dry-run']) == 0
    settings, sizes = capsys.readouterr().out.split('\n\n')
    assert yaml.safe_load(settings)['lora_rank'] == 4 and '25600 images in all' in sizes and not list(here.iterdir())

# W&B

class Page:
    "Stands in for a W&B run: what was logged, in order."
    def __init__(self): self.rows = []
    def log(self, row, step, commit): self.rows.append((step, commit, row))

def test_wandb_gets_one_call_a_step_and_the_epoch_with_its_last(tmp_path):
    "Pitfall 33: a call for each number would make 36 steps of an epoch."
    page, epochs = Page(), []
    def on_epoch(epoch):
        log_to_wandb(page, epoch)
        epochs.append(epoch)
    train(SMALL, micro_pipeline(), brightness, PROMPTS, on_epoch)
    assert [(step, commit) for step, commit, _ in page.rows] == [(i, True) for i in range(6)]
    for (_, _, row), wanted in zip(page.rows, epochs[-1].state.updates): assert wanted.items() <= row.items()
    for epoch, (_, _, row) in zip(epochs, page.rows[1::2]):
        assert row['reward_mean'] == epoch.row['reward_mean'] and len(row['pictures']) == 5 and {'rewards', 'advantages'} <= set(row)

def test_trouble_with_wandb_does_not_stop_training(capsys):
    class Broken(Page):
        def log(self, *args, **options): raise ConnectionError('gone')
    assert len(train(SMALL, micro_pipeline(), brightness, PROMPTS, lambda epoch: log_to_wandb(Broken(), epoch))) == 3
    assert capsys.readouterr().out.count('W&B could not log epoch') == 3

def test_wandb_off_is_off(tmp_path): assert start_wandb(Config(), tmp_path) is None and not list(tmp_path.iterdir())

def test_wandb_offline_is_one_page_over_a_resume(here):
    assert main([*FLAGS, '--out', 'run', '--wandb', 'offline', '--num-epochs', '1']) == 0
    time.sleep(1.1) # W&B names its folders by the second
    assert main(['--resume', 'run', '--num-epochs', '2']) == 0
    parts = list((here / 'run' / 'wandb').glob('offline-run-*'))
    assert len(parts) == 2 and len({p.name.split('-')[-1] for p in parts}) == 1

@pytest.mark.parametrize('key', ['', pytest.param('a' * 40, marks=pytest.mark.slow)])
def test_without_a_key_or_a_network_wandb_is_offline(tmp_path, key):
    "Nobody listens at the server's address: neither the start nor the end may hang. How long it takes is printed."
    clean = {k: v for k, v in ENV.items() if k not in ('WANDB_API_KEY', 'WANDB_MODE')}
    env = clean | dict(WANDB_BASE_URL='http://127.0.0.1:9', NETRC=str(tmp_path / 'none'), HOME=str(tmp_path))
    if key: env |= dict(WANDB_API_KEY=key)
    start = time.monotonic()
    words = [*FLAGS, '--num-epochs', '1', '--out', 'run', '--wandb', 'online']
    done = subprocess.run([COMMAND, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    print(f'{time.monotonic() - start:.0f} s')
    assert done.returncode == 0 and 'It goes on offline' in done.stdout, done.stdout + done.stderr
    assert len(list((tmp_path / 'run' / 'wandb').glob('offline-run-*/*.wandb'))) == 1

# slow

def newest(folder): return max((p.name for p in checkpoints(folder / 'checkpoints')), default='')

@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path, capsys):
    """SIGKILL, at any moment of a start or of an epoch, in the middle of a write too: resumed, it ends as the run that was left alone.
    Every other time the kill comes up to two seconds after a new checkpoint, so that the run gets on."""
    args = [*FLAGS, '--num-epochs', '100', '--out']
    assert command(*args, 'alone', cwd=tmp_path).returncode == 0
    rng, words, moments = random.Random(0), [*args, 'run'], []
    for kill in range(20):
        before, deadline = newest(tmp_path / 'run'), time.monotonic() + 90
        process = subprocess.Popen([COMMAND, *words], cwd=tmp_path, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while kill % 2 == 0 and newest(tmp_path / 'run') == before and time.monotonic() < deadline: time.sleep(.02)
        time.sleep(rng.uniform(0, 2) if kill % 2 == 0 else rng.uniform(0, 9))
        process.kill()
        moments.append((process.wait(), newest(tmp_path / 'run'), [p.name for p in (tmp_path / 'run' / 'checkpoints').glob('*.part')]))
        words = ['--resume', 'run']
    assert command(*words, cwd=tmp_path).returncode == 0
    writing = sum(bool(parts) for _, _, parts in moments)
    with capsys.disabled(): print(f'\nkilled {len(moments)} times, {writing} of them in a write')
    assert all(code == -9 for code, _, _ in moments) and moments[-1][1] < 'epoch-00100.pt'
    is_the_same_run(tmp_path / 'run', tmp_path / 'alone')
