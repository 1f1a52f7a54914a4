"""Every notebook runs top to bottom, on a CPU, offline; what it prints is what it stores; its exercises tell wrong answers
from right ones."""
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
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
ENV = os.environ | dict(HF_HUB_OFFLINE='1', MPLBACKEND='agg', CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
TOLERANCE = {} # of a notebook's numbers, where it is not 2%
NUMBER = re.compile(r'(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?')
VERDICTS = '''
assert {check.__name__ for check in WRONG} == NAMES
for check, answers in WRONG.items():
    assert len(answers) >= 2, check
    for answer in answers:
        verdict = grade(check, answer)
        print(check.__name__, '-', verdict)
        assert verdict.startswith('not yet'), (check, answer, verdict)
for check, answers in RIGHT.items():
    for answer in answers: assert grade(check, answer) == 'right', (check, answer, grade(check, answer))
'''


def run_notebook(path, output, last=None, cwd=ROOT):
    """Returns exit code, output and CPU seconds. One thread each: two that wait for each other would count their waiting."""
    command = [sys.executable, Path(__file__).parent / 'run_notebook.py', path, output, *([last] if last else [])]
    with tempfile.TemporaryFile('w+') as log:
        process = subprocess.Popen(command, cwd=cwd, env=ENV, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        return process.returncode, log.read(), used.ru_utime + used.ru_stime


def texts(path):
    """What each cell prints or shows as text, by its id; not of cells tagged `varies`: times, paths, what a machine has."""
    found = {}
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] != 'code' or 'varies' in cell['metadata'].get('tags', []): continue
        words = ''
        for output in cell['outputs']:
            data = output.get('data', {})
            if output.get('name') != 'stderr' and not any(kind.startswith(('image/', 'text/html')) for kind in data):
                words += ''.join(output.get('text', data.get('text/plain', '')))
        found[cell['id']] = words.strip()
    return found


def last_digit(number):
    """What one unit of the last digit is worth, 0 for a whole number."""
    digits, _, exponent = number.partition('e')
    decimals = len(digits.partition('.')[2])
    return 10. ** (int(exponent or 0) - decimals) if decimals or exponent else 0.


def same_text(a, b, tolerance):
    """The same words; numbers within the tolerance, or one unit of their last digit. Spaces don't count: a number that loses
    its last zero moves its column."""
    if NUMBER.sub('#', a).split() != NUMBER.sub('#', b).split(): return False
    return all(abs(float(x) - float(y)) <= 1.001 * max(tolerance * abs(float(y)), last_digit(y))
               for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)))


def test_a_changed_number_is_seen():
    assert same_text('loss 0.301, 12 of 64', 'loss 0.300, 12 of 64', .0)
    assert not same_text('loss 0.31', 'loss 0.25', .02) and not same_text('13 of 64', '12 of 64', .02)
    assert same_text('kl  3.3e-09', 'kl 3.29e-09', .02) and not same_text('kl  3.3e-09', 'kl 3.19e-09', .02)
    assert not same_text('loss 0.31', 'cost 0.31', .02) and not same_text('1.2e-05', '1.2e-03', .02)


def graded(path):
    """The names of a notebook's checkers that some cell calls on an answer."""
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    return set(re.findall(r'grade\((check_\w+),', text))


def one_notebook(path):
    "A class for each notebook: pytest-xdist keeps a class in one process, and puts each wherever there is room."
    answers = Path(__file__).parent / 'answers' / f'{path.stem}.py'

    class Notebook:
        @pytest.fixture(scope='class')
        @classmethod
        def ran(cls, tmp_path_factory):
            folder = tmp_path_factory.mktemp(path.stem)
            last = folder / 'last.py'
            names = f'NAMES = {graded(path)}'
            last.write_text('\n'.join([answers.read_text(encoding='utf-8'), names, VERDICTS]) if graded(path) else '', encoding='utf-8')
            code, log, spent = run_notebook(path, folder / 'fresh.ipynb', last)
            return folder, code, log, spent

        def test_runs(self, ran):
            """Without an error, with wrong and right answers to its exercises. Its time is printed."""
            _, code, log, spent = ran
            assert code == 0, log[-4000:]
            print(f'{path.stem}: {spent:.0f} s of CPU')

        def test_prints_what_it_stores(self, ran):
            stored, fresh = texts(path), texts(ran[0] / 'fresh.ipynb')
            tolerance = TOLERANCE.get(path.stem, .02)
            stale = {i: (stored[i], fresh[i]) for i in stored if not same_text(fresh.get(i, ''), stored[i], tolerance)}
            assert not stale, '\n'.join(f'{i}\n--- stored\n{a}\n--- fresh\n{b}' for i, (a, b) in stale.items())
    return Notebook


SLOW = '01_tiny_models', '02_gallery' # no lessons: how the models in the package were made, everybody's runs on a page
for notebook in NOTEBOOKS:
    tests = one_notebook(notebook)
    globals()[f'Test_{notebook.stem}'] = pytest.mark.slow(tests) if notebook.stem in SLOW else tests


@pytest.mark.slow
@pytest.mark.parametrize('stem', ['09_runs', '16_stable_diffusion'])
def test_notebook_runs_where_products_are_in_16_bits(stem, tmp_path):
    """These two take a GPU where there is one, and a GPU computes in 16 bits. Here the CPU is asked to."""
    shutil.copytree(ROOT / 'nbs', tmp_path / 'nbs', ignore=shutil.ignore_patterns('runs', 'wandb', '.ipynb_checkpoints'))
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    path = tmp_path / 'nbs' / f'{stem}.ipynb'
    notebook = json.loads(path.read_text(encoding='utf-8'))
    first = 'import torch\nfrom ddpo_tutorial import pipelines\npipelines.compute_dtype = lambda device: torch.bfloat16'
    cell = dict(cell_type='code', id='16b17000', metadata={}, execution_count=None, outputs=[], source=first)
    notebook['cells'].insert(1, cell)
    path.write_text(json.dumps(notebook), encoding='utf-8')
    code, log, _ = run_notebook(path, tmp_path / 'fresh.ipynb', cwd=tmp_path)
    assert code == 0, log[-4000:]
