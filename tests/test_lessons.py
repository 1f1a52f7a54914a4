"""What the lessons promise their readers: times to read, folded solutions, learners' copies that
need none of them.

Run: python -m pytest tests/test_lessons.py -n 0
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_gates import NOTEBOOKS, cells, source

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
MAIN_LINE = sorted((ROOT / 'nbs').glob('[0-9]*.ipynb'))
MORE = sorted((ROOT / 'nbs' / 'more').glob('*.ipynb'))
EXERCISES = [
    path
    for path in NOTEBOOKS
    if any(source(cell).startswith('## Exercises') for cell in cells(path, 'markdown'))
]
WORDS, LINES = 200, 12  # a minute

timed = pytest.mark.parametrize('path', MAIN_LINE + MORE, ids=lambda path: path.stem)
exercises = pytest.mark.parametrize('path', EXERCISES, ids=lambda path: path.stem)


def all_cells(path):
    return cells(path, 'markdown', 'code')


def is_solution(cell):
    return 'solution' in cell['metadata'].get('tags', [])


def minutes_to_read(path):
    "Words and lines of code, without the solutions, to the nearest five minutes."
    minutes = 0
    for cell in all_cells(path):
        if is_solution(cell):
            continue
        text = source(cell)
        if cell['cell_type'] == 'code':
            minutes += sum(bool(line.strip()) for line in text.splitlines()) / LINES
        else:
            minutes += len(text.split()) / WORDS
    return max(5, 5 * round(minutes / 5))


@timed
def test_time_to_read_is_counted(path):
    "In the lesson's first cell and in README's table."
    said = re.search(r'(\d+)(?: minutes)? to read', source(all_cells(path)[0]))
    name = path.relative_to(ROOT).as_posix()
    (row,) = re.findall(rf'^\| \[.*\]\({name}\).*$', README, re.M)
    counted = minutes_to_read(path)
    assert said and int(said[1]) == counted == int(row.split('|')[4]), counted


def test_readme_adds_the_times_up():
    hours = sum(minutes_to_read(path) for path in MAIN_LINE) / 60
    assert f'{hours:.0f} hours of reading' in README, hours


def test_all_lessons_of_the_main_line_have_exercises():
    assert set(MAIN_LINE) <= set(EXERCISES)


@exercises
def test_solutions_are_the_end_and_folded(path):
    "Nothing to see of an answer before it is asked for."
    tagged = [is_solution(cell) for cell in all_cells(path)]
    first = tagged.index(True)
    solutions = all_cells(path)[first:]
    assert all(tagged[first:]) and source(solutions[0]).startswith('## Solutions')
    for cell in solutions:
        if cell['cell_type'] == 'code':
            assert cell['metadata']['jupyter']['source_hidden'], source(cell)


@exercises
def test_every_exercise_has_a_stub_and_a_solution(path):
    "Both checked by the same checker."
    text = '\n'.join(source(cell) for cell in cells(path))
    names = re.findall(r'^grade\(check_(\w+), \1\)$', text, re.M)
    assert names
    for name in names:
        assert re.search(rf'def {name}\([^)]*\):\n    raise NotImplementedError', text), name
        assert re.search(rf'grade\(check_{name}, {name}_solution\)', text), name


def test_learners_copies_need_no_solution(tmp_path):
    "The teacher's page has the command; what is left uses no name that only a solution defines."
    text = (ROOT / 'nbs' / 'room' / 'WORKSHOP.md').read_text(encoding='utf-8')
    found = re.findall(r'^\.venv/bin/jupyter nbconvert (.*TagRemove.*?) learners/', text, re.M)
    for path in EXERCISES:
        shutil.copy(path, tmp_path)
    copies = sorted(tmp_path.glob('*.ipynb'))
    command = [sys.executable, '-m', 'nbconvert', *found[0].split(), *copies]
    subprocess.run(command, check=True, capture_output=True)
    assert not [path for path in copies if '_solution' in path.read_text(encoding='utf-8')]
    rules = ['--no-cache', '--isolated', '--select', 'F821']
    check = [sys.executable, '-m', 'ruff', 'check', *rules, tmp_path]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
