"""Tables that are read as they were written, a line of any length of run, and what W&B is told.
More of the reports is in test_runs.py.

Run: python -m pytest tests/test_reports.py -n 0
"""

import math
import shlex
from pathlib import Path

import pytest

from ddpo_tutorial.configs import Config
from ddpo_tutorial.reports import progress_line, read_rows, start_wandb, write_rows

TEXTS = [
    'nan',
    'infinity',
    'inf',
    '-inf',
    'NaN',
    '1_0',
    '1',
    '-2',
    '1.5e-3',
    ' 7 ',
    '٣',
    "'a",
    "''",
]
ODD = ['', 'a, b', 'say "no"', 'two\nlines', 'ein Bär']
NUMBERS = [0, -3, 10**18, 1.5, -1e-300, 1e300, math.inf, -math.inf, 0.1 + 0.2]


@pytest.mark.parametrize('value', [*TEXTS, *ODD, *NUMBERS], ids=repr)
def test_a_value_is_read_as_it_was_written(tmp_path, value):
    "A prompt may be a word that Python would take for a number."
    rows = [dict(epoch=0, note=value), dict(epoch=1, note=value)]
    for _ in range(2):
        write_rows(tmp_path / 'table.csv', rows)
        found = read_rows(tmp_path / 'table.csv')
        assert found == rows and isinstance(found[0]['note'], str) == isinstance(value, str)
        rows = found


def test_nan_stays_a_number(tmp_path):
    write_rows(tmp_path / 'table.csv', [dict(a=math.nan, b='nan')])
    (row,) = read_rows(tmp_path / 'table.csv')
    assert math.isnan(row['a']) and row['b'] == 'nan'


@pytest.mark.parametrize('name', ['a, b', '"a"', 'two\nlines', '=cmd|x', "it's", 'nan', '', ' '])
def test_any_name_is_a_column(tmp_path, name):
    rows = [{'epoch': 0, name: 1.5, 'last': 2}, {'epoch': 1, name: 2.5, 'last': 3}]
    write_rows(tmp_path / 'table.csv', rows)
    assert read_rows(tmp_path / 'table.csv') == rows


@pytest.mark.parametrize(
    'text, rows',
    [
        ('a,b\n1,2\n3', [dict(a=1, b=2), dict(a=3, b='')]),
        ('a,b\n1,2,3,4\n', [dict(a=1, b=2)]),
        ('a,b\n', []),
        ('', []),
    ],
)
def test_a_damaged_table_is_read_as_far_as_it_goes(tmp_path, text, rows):
    (tmp_path / 'table.csv').write_text(text)
    assert read_rows(tmp_path / 'table.csv') == rows


@pytest.mark.parametrize('total', [1, 10**6, 10**9])
@pytest.mark.parametrize('seconds', [1e-3, 60.0, 1e5])
def test_the_line_of_a_run_of_any_length(total, seconds):
    row = dict(epoch=0, reward_mean=1.0, reward_std=0.5, seconds=seconds)
    assert f'1/{total} ' in progress_line(row, total)


# W&B


@pytest.fixture(scope='module')
def offline(tmp_path_factory):
    "Two pages of one run: without and with names in the environment. Name, project; what was said."
    wandb = pytest.importorskip('wandb')
    found = []
    for names in ({}, dict(WANDB_PROJECT='mine', WANDB_NAME='first')):
        with pytest.MonkeyPatch.context() as patch:
            for name in ('WANDB_PROJECT', 'WANDB_NAME', 'WANDB_MODE'):
                patch.delenv(name, raising=False)
            for name, value in names.items():
                patch.setenv(name, value)
            folder = tmp_path_factory.mktemp('a run')
            tracking = start_wandb(Config(wandb='offline'), folder)
            found.append((tracking.name, tracking.project, folder))
            tracking.finish()
    assert wandb.run is None
    return found


def test_names_of_the_environment_are_taken(offline):
    (name, project, folder), second = offline
    assert (name, project) == (folder.name, 'ddpo_tutorial')
    assert second[:2] == ('first', 'mine')


def test_offline_says_how_it_is_sent(tmp_path, capsys):
    "The folder that is named is one that `wandb sync` takes."
    pytest.importorskip('wandb')
    folder = tmp_path / 'a run'
    folder.mkdir()
    start_wandb(Config(wandb='offline'), folder).finish()
    command = capsys.readouterr().out.rpartition('To send it later: ')[2]
    *words, place = shlex.split(command)
    assert words == ['wandb', 'sync'] and list(Path(place).glob('*.wandb'))
