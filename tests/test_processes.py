"""Two processes on a CPU: the pictures, advantages and updates of one, and no one left waiting.

Run: python -m pytest tests/test_processes.py -n 0
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from test_runs import COMMAND, ENV, FLAGS, TINY, table

HERE = Path(__file__).parent


def torchrun(n):
    return [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node',
        str(n),
    ]


def start(n, *words, cwd):
    return subprocess.run(
        [*torchrun(n), *words], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "What one process and what two processes found."
    place = tmp_path_factory.mktemp('found')
    for n in (1, 2):
        done = start(n, HERE / 'two_processes.py', place / f'{n}.json', cwd=place)
        assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((place / f'{n}.json').read_text()) for n in (1, 2)]


def test_there_is_one_and_there_are_two(found):
    assert [f['processes'] for f in found] == [1, 2]


def test_pictures_are_shared_out(found):
    """Each once, with the prompt that one process would give it, and nearly the same number for
    both."""
    one, two = (f['epochs'] for f in found)
    for a, b in zip(one, two):
        assert a['pictures'] == b['pictures'] and b['shares'] == [4, 3]


def test_rewards_and_advantages_are_those_of_one_process(found):
    "Of the first epoch; in the second the weights differ by rounding."
    one, two = (f['epochs'] for f in found)
    for name in ('rewards', 'advantages'):
        np.testing.assert_allclose(two[0][name], one[0][name], rtol=0, atol=1e-5)
    np.testing.assert_allclose(two[1]['rewards'], one[1]['rewards'], rtol=0, atol=1e-3)
    for found_epoch in one + two:
        np.testing.assert_allclose(found_epoch['own'], found_epoch['advantages'], rtol=1e-6)


def test_groups_are_not_torn(found):
    "Their first noise and their comparison do not depend on who has which of them."
    one, two = (f['groups'] for f in found)
    for a, b in zip(one, two):
        assert a['pictures'] == b['pictures'] and b['shares'] == [5, 4]
    for name, allowed in (('rewards', 1e-5), ('advantages', 0.005)):
        np.testing.assert_allclose(two[0][name], one[0][name], rtol=0, atol=allowed)


def test_weights_are_equal_in_both_after_every_epoch(found):
    for epoch in found[1]['epochs'] + found[1]['groups'] + found[1]['alone']:
        assert epoch['sums'][0] == epoch['sums'][1]


@pytest.mark.parametrize('clipped', [0, 1])
def test_update_is_that_of_one_process(found, clipped):
    """Divided by the wrong number, added up after clipping, or twice: the step would differ by more
    than rounding. So would the statistics."""
    one, two = (f['steps'][clipped] for f in found)
    a, b = np.array(one['moved']), np.array(two['moved'])
    assert np.linalg.norm(a) > 1e-6 and np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a)
    for name in one['stats']:
        assert two['stats'][name] == pytest.approx(one['stats'][name], rel=1e-3, abs=1e-6)


def test_a_process_without_pairs_waits_for_the_other(found):
    """Each update is of one picture, so that one process of two has no loss and no gradient; all is
    added up nevertheless."""
    one, two = (f['alone'][0] for f in found)
    assert list(two['row']) == list(one['row'])
    assert {'loss', 'approx_kl', 'clipfrac', 'ratio', 'grad_norm'} <= set(one['row'])
    np.testing.assert_allclose(two['rewards'], one['rewards'], rtol=0, atol=1e-5)
    assert two['row']['ratio'] == pytest.approx(one['row']['ratio'], rel=1e-3)
    assert two['row']['grad_norm'] == pytest.approx(one['row']['grad_norm'], rel=0.02)


def test_a_row_is_of_all_pictures(found):
    for f in found:
        epoch = f['epochs'][0]
        row, rewards = epoch['row'], np.array(epoch['rewards'])
        assert row['reward_mean'] == pytest.approx(rewards.mean(), rel=1e-5)
        assert row['reward_std'] == pytest.approx(rewards.std(), rel=1e-4)
        weighted = row['reward_light'] + 2 * row['reward_dark']
        assert weighted == pytest.approx(row['reward_mean'], rel=1e-4)


# the command


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "One small run of two processes."
    place = tmp_path_factory.mktemp('command')
    return place, start(
        2, '--no-python', COMMAND, *FLAGS, '--num-epochs', '2', '--out', 'two', cwd=place
    )


def test_the_first_process_alone_writes_and_speaks(finished):
    place, done = finished
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(table(place / 'two')) == 2 and (place / 'two' / 'pipeline').is_dir()
    assert done.stdout.count('epoch   1/2') == done.stdout.count('Training tiny') == 1


def test_resumed_by_another_number_of_processes(finished):
    "The pictures do not care who makes them."
    place, _ = finished
    done = subprocess.run(
        [COMMAND, '--resume', 'two', '--num-epochs', '3'],
        cwd=place,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and len(table(place / 'two')) == 3, done.stderr


def test_from_a_notebook(tmp_path):
    "The lesson's own lines, with a smaller run, in a kernel."
    lesson = json.loads((HERE.parent / 'nbs' / 'engine' / 'runs.ipynb').read_text(encoding='utf-8'))
    blocks = [
        block
        for c in lesson['cells']
        for block in re.findall(r'```python\n(.*?)```', ''.join(c['source']), re.S)
    ]
    (code,) = (block for block in blocks if 'notebook_launcher' in block)
    head = 'from ddpo_tutorial.configs import Config\nfrom ddpo_tutorial.runs import train_run\n'
    cell = new_code_cell(
        head + code.replace('Config()', f"Config(**{TINY}, num_epochs=1, out='launched')")
    )
    resources = dict(metadata=dict(path=tmp_path))
    NotebookClient(
        new_notebook(cells=[cell]), timeout=240, kernel_name='python3', resources=resources
    ).execute(env=ENV)
    assert len(table(tmp_path / 'launched')) == 1


def test_nonsense_that_only_the_first_sees_ends_all(finished):
    "A folder that holds something: it is said, none waits, none shows a traceback of ours."
    place, _ = finished
    done = start(2, '--no-python', COMMAND, *FLAGS, '--out', 'two', cwd=place)
    assert (
        done.returncode != 0
        and 'holds something already' in done.stderr
        and 'runs.py' not in done.stderr
    )


@pytest.mark.slow
def test_more_processes_than_pictures_are_refused(tmp_path):
    words = ['--samples_per_epoch', '2', '--updates_per_epoch', '1']
    done = start(3, '--no-python', COMMAND, *FLAGS, *words, '--out', 'run', cwd=tmp_path)
    assert (
        done.returncode != 0
        and 'samples_per_epoch=2; expected at least 3' in done.stderr
        and not (tmp_path / 'run').exists()
    )


def long_run(folder):
    "Two processes that would train for long, after their first epoch."
    words = [*torchrun(2), '--no-python', COMMAND, *FLAGS, '--num-epochs', '500', '--out', 'run']
    process = subprocess.Popen(
        words, cwd=folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while (
        not (folder / 'run' / 'checkpoints' / 'epoch-00001.pt').exists()
        and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    return process


@pytest.mark.slow
def test_a_signal_to_the_launcher_ends_the_epoch(tmp_path):
    "torchrun passes it on; both processes agree on where to stop, and a checkpoint is left."
    process = long_run(tmp_path)
    process.terminate()
    out, said = process.communicate(timeout=300)
    assert out.count('The run stops') == out.count('To go on: ddpo_train --resume run') == 1, (
        out + said
    )
    newest = max((tmp_path / 'run' / 'checkpoints').glob('epoch-*.pt')).stem
    assert len(table(tmp_path / 'run')) == int(newest.removeprefix('epoch-'))


@pytest.mark.slow
def test_when_one_is_killed_the_other_ends_and_says_so(tmp_path):
    process = long_run(tmp_path)
    second = next(
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if p.environ().get('RANK') == '1'
    )
    second.kill()
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    assert 'Has another process ended?' in said and '--resume run goes on' in said, said[-3000:]
    assert list((tmp_path / 'run' / 'checkpoints').glob('epoch-*.pt'))
