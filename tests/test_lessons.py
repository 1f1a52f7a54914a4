"""What the lessons promise their readers: times to read, folded solutions, learners' copies that need none of them"""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from test_gates import cells, source

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
LESSONS = sorted((ROOT / 'nbs').glob('[0-9]*.ipynb'))
WORDS, LINES = 200, 12 # a minute

lessons = pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)


def all_cells(path):
    return cells(path, 'markdown', 'code')


def is_solution(cell):
    return 'solution' in cell['metadata'].get('tags', [])


def minutes_to_read(path):
    """Words and lines of code, without the solutions, to the nearest five minutes."""
    minutes = 0
    for cell in all_cells(path):
        if is_solution(cell): continue
        text = source(cell)
        if cell['cell_type'] == 'code': minutes += sum(bool(line.strip()) for line in text.splitlines()) / LINES
        else: minutes += len(text.split()) / WORDS
    return max(5, 5 * round(minutes / 5))


@lessons
def test_time_to_read_is_counted(path):
    """In the lesson's first cell and in README's table."""
    said = re.search(r'(\d+)(?: minutes)? to read', source(all_cells(path)[0]))
    row, = re.findall(rf'^\| \[.*\]\(nbs/{path.name}\).*$', README, re.M)
    assert said and int(said[1]) == minutes_to_read(path) == int(row.split('|')[4]), minutes_to_read(path)


def test_readme_adds_the_times_up():
    hours = sum(minutes_to_read(path) for path in LESSONS) / 60
    assert f'{hours:.0f} hours of reading' in README, hours


@lessons
def test_solutions_are_the_end_and_folded(path):
    """Nothing to see of an answer before it is asked for."""
    tagged = [is_solution(c) for c in all_cells(path)]
    first = tagged.index(True)
    assert all(tagged[first:]) and source(all_cells(path)[first]).startswith('## Solutions')
    for cell in all_cells(path)[first:]:
        if cell['cell_type'] == 'code': assert cell['metadata']['jupyter']['source_hidden'], source(cell)


@lessons
def test_every_exercise_has_a_stub_and_a_solution(path):
    """Both checked by the same checker."""
    text = '\n'.join(source(c) for c in cells(path))
    names = re.findall(r'^grade\(check_(\w+), \1\)$', text, re.M)
    assert names
    for name in names:
        assert re.search(rf'def {name}\(.*\):\n    raise NotImplementedError', text), name
        assert re.search(rf'grade\(check_{name}, {name}_solution\)', text), name


def test_learners_copies_need_no_solution(tmp_path):
    """The teacher's page has the command; what is left uses no name that only a solution defines."""
    text = (ROOT / 'nbs' / 'room' / 'WORKSHOP.md').read_text(encoding='utf-8')
    command, = re.findall(r'^\.venv/bin/jupyter nbconvert (.*TagRemove.*) learners/\*\.ipynb$', text, re.M)
    for path in LESSONS: shutil.copy(path, tmp_path)
    copies = sorted(tmp_path.glob('*.ipynb'))
    subprocess.run([sys.executable, '-m', 'nbconvert', *command.split(), *copies], check=True, capture_output=True)
    assert not [p for p in copies if '_solution' in p.read_text(encoding='utf-8')]
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--isolated', '--select', 'F821', tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
