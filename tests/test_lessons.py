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
GUIDE = (ROOT / 'nbs' / 'README.md').read_text(encoding='utf-8')
MAIN_LINE = sorted((ROOT / 'nbs').glob('[0-9]*.ipynb'))
MORE = sorted((ROOT / 'nbs' / 'more').glob('*.ipynb'))
EXERCISES = [
    path
    for path in NOTEBOOKS
    if any(source(cell).startswith('## Exercises') for cell in cells(path, 'markdown'))
]
WORDS, LINES = 200, 15  # a minute

timed = pytest.mark.parametrize('path', MAIN_LINE + MORE, ids=lambda path: path.stem)
exercises = pytest.mark.parametrize('path', EXERCISES, ids=lambda path: path.stem)


def all_cells(path):
    return cells(path, 'markdown', 'code')


def is_solution(cell):
    return 'solution' in cell['metadata'].get('tags', [])


def minutes_to_read(path):
    "Words and lines of code of the lesson itself, before its exercises."
    minutes = 0
    for cell in all_cells(path):
        text = source(cell)
        if text.startswith('## Exercises'):
            break
        if cell['cell_type'] == 'code':
            minutes += sum(bool(line.strip()) for line in text.splitlines()) / LINES
        else:
            minutes += len(text.split()) / WORDS
    return minutes


@timed
def test_time_to_read_is_counted(path):
    "To the nearest five minutes, in the lesson's first cell and in the table of lessons."
    said = re.search(r'(\d+)(?: minutes)? to read', source(all_cells(path)[0]))
    table, folder = (README, ROOT) if path in MAIN_LINE else (GUIDE, ROOT / 'nbs')
    name = path.relative_to(folder).as_posix()
    (row,) = re.findall(rf'^\| \[.*\]\({name}\).*$', table, re.M)
    counted = max(5, 5 * round(minutes_to_read(path) / 5))
    assert said and int(said[1]) == counted == int(row.split('|')[3]), counted


def test_main_line_takes_three_hours():
    minutes = [minutes_to_read(path) for path in MAIN_LINE]
    assert max(minutes) <= 30 and sum(minutes) <= 180, minutes
    assert 'in three hours' in README


def test_all_lessons_of_the_main_line_have_exercises():
    assert set(MAIN_LINE) <= set(EXERCISES)


@exercises
def test_solutions_are_in_one_place_and_folded(path):
    "Nothing to see of an answer before it is asked for."
    tagged = [is_solution(cell) for cell in all_cells(path)]
    first, end = tagged.index(True), len(tagged) - tagged[::-1].index(True)
    solutions = all_cells(path)[first:end]
    assert all(tagged[first:end]) and source(solutions[0]).startswith('## Solutions')
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
    found = re.findall(r'&& jupyter nbconvert (.*TagRemove.*?) learners/', text)
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
