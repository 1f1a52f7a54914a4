"""Every notebook runs top to bottom on a CPU, offline; what it prints is what it stores; its
exercises tell wrong answers from right ones.

Run one: python -m pytest tests/test_notebooks.py -n 0 -k 02_sampling
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    path for path in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts
)
# no lessons: how the models in the package were made, everybody's runs on a page
SLOW = ('01_tiny_models', '02_gallery')
# one thread each, because two that wait for each other would count their waiting
ENV = os.environ | dict(
    HF_HUB_OFFLINE='1', MPLBACKEND='agg', CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1'
)
TOLERANCE = 0.02  # of a number
NUMBER = re.compile(r'(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?')
# runs as a notebook's last cell, after WRONG and RIGHT of tests/answers and NAMES
VERDICTS = """
assert {check.__name__ for check in WRONG} == NAMES
for check, answers in WRONG.items():
    assert len(answers) >= 2, check
    for answer in answers:
        verdict = grade(check, answer)
        print(check.__name__, '-', verdict)
        assert verdict.startswith('not yet'), (check, answer, verdict)
for check, answers in RIGHT.items():
    for answer in answers:
        assert grade(check, answer) == 'right', (check, answer, grade(check, answer))
"""


def run_notebook(path, output, last=None, cwd=ROOT):
    "Returns exit code, output and CPU seconds."
    command = [sys.executable, Path(__file__).parent / 'run_notebook.py', path, output]
    if last:
        command.append(last)
    with tempfile.TemporaryFile('w+') as log:
        process = subprocess.Popen(command, cwd=cwd, env=ENV, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        return process.returncode, log.read(), used.ru_utime + used.ru_stime


def code_cells(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [cell for cell in cells if cell['cell_type'] == 'code']


def text_of(output):
    "What an output prints or shows as text; nothing for pictures and warnings."
    data = output.get('data', {})
    if output.get('name') == 'stderr':
        return ''
    if any(kind.startswith(('image/', 'text/html')) for kind in data):
        return ''
    return ''.join(output.get('text', data.get('text/plain', '')))


def texts(path):
    "What each cell prints, by its id; not of cells tagged `varies`: times, paths, the machine."
    return {
        cell['id']: ''.join(text_of(output) for output in cell['outputs']).strip()
        for cell in code_cells(path)
        if 'varies' not in cell['metadata'].get('tags', [])
    }


def last_digit(number):
    "What one unit of the last digit is worth, 0 for a whole number."
    digits, _, exponent = number.partition('e')
    decimals = len(digits.partition('.')[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals or exponent else 0.0


def same_text(fresh, stored, tolerance=TOLERANCE):
    """The same words; numbers within the tolerance, or one unit of their last digit. Spaces do not
    count, because a number that loses its last zero moves its column."""
    if NUMBER.sub('#', fresh).split() != NUMBER.sub('#', stored).split():
        return False
    for a, b in zip(NUMBER.findall(fresh), NUMBER.findall(stored)):
        allowed = max(tolerance * abs(float(b)), last_digit(b))
        if abs(float(a) - float(b)) > 1.001 * allowed:
            return False
    return True


def test_a_changed_number_is_seen():
    assert same_text('loss 0.301, 12 of 64', 'loss 0.300, 12 of 64', 0.0)
    assert same_text('kl  3.3e-09', 'kl 3.29e-09')
    assert not same_text('kl  3.3e-09', 'kl 3.19e-09')
    assert not same_text('loss 0.31', 'loss 0.25')
    assert not same_text('13 of 64', '12 of 64')
    assert not same_text('loss 0.31', 'cost 0.31')
    assert not same_text('1.2e-05', '1.2e-03')


def last_cell(path):
    "A notebook's answers and what they should be told; nothing for one without exercises."
    text = '\n'.join(''.join(cell['source']) for cell in code_cells(path))
    names = set(re.findall(r'grade\(\s*(check_\w+),', text))
    if not names:
        return ''
    answers = Path(__file__).parent / 'answers' / f'{path.stem}.py'
    return '\n'.join([answers.read_text(encoding='utf-8'), f'NAMES = {names}', VERDICTS])


@pytest.mark.parametrize(
    'path',
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])
        for path in NOTEBOOKS
    ],
)
def test_notebook(path, tmp_path):
    "It runs, judges wrong and right answers, and prints what it stores. Its time is printed."
    last = tmp_path / 'last.py'
    last.write_text(last_cell(path), encoding='utf-8')
    code, log, seconds = run_notebook(path, tmp_path / 'fresh.ipynb', last)
    print(f'{path.stem}: {seconds:.0f} s of CPU')
    assert code == 0, log[-4000:]
    fresh = texts(tmp_path / 'fresh.ipynb')
    stale = [
        f'{number}\n--- stored\n{stored}\n--- fresh\n{fresh.get(number, "")}'
        for number, stored in texts(path).items()
        if not same_text(fresh.get(number, ''), stored)
    ]
    assert not stale, '\n'.join(stale)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['engine/runs', '06_stable_diffusion'])
def test_notebook_runs_where_products_are_in_16_bits(name, tmp_path):
    "These two take a GPU where there is one, which computes in 16 bits. Here the CPU is asked to."
    ignored = shutil.ignore_patterns('runs', 'wandb', '.ipynb_checkpoints')
    shutil.copytree(ROOT / 'nbs', tmp_path / 'nbs', ignore=ignored)
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    path = tmp_path / 'nbs' / f'{name}.ipynb'
    notebook = json.loads(path.read_text(encoding='utf-8'))
    first = """import torch
from ddpo_tutorial import pipelines
pipelines.compute_dtype = lambda device: torch.bfloat16"""
    cell = dict(
        cell_type='code',
        id='16b17000',
        metadata={},
        execution_count=None,
        outputs=[],
        source=first,
    )
    notebook['cells'].insert(1, cell)
    path.write_text(json.dumps(notebook), encoding='utf-8')
    code, log, _ = run_notebook(path, tmp_path / 'fresh.ipynb', cwd=tmp_path)
    assert code == 0, log[-4000:]
