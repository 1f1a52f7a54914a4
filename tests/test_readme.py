"""The commands and the code of README.md and of nbs/README.md, the guide, are what they say: parsed
from the files, and run.

Run: python -m pytest tests/test_readme.py -n 0
"""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from ddpo_tutorial.command import read_command
from ddpo_tutorial.configs import Config, shipped_configs, write_config

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
GUIDE = (ROOT / 'nbs' / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', README + GUIDE, re.S)
LINES = [line for kind, text in BLOCKS if kind == 'bash' for line in text.splitlines()]
COMMANDS = [line for line in LINES if line.strip() and not line.startswith('#')]
RUNS = [
    shlex.split(command.split('ddpo_train', 1)[1])
    for command in COMMANDS
    if 'bin/ddpo_train' in command
]


def test_first_command_sets_up_and_runs_the_main_job():
    assert (
        COMMANDS[0] == 'python3 -m venv .venv && .venv/bin/pip install -q . && .venv/bin/ddpo_train'
    )


def test_one_command_sets_up_and_runs_the_tests():
    """.ci/run takes this line from here."""
    steps = [
        'python3 -m venv .venv',
        ".venv/bin/pip install -q -e '.[dev]'",
        '.venv/bin/python -m pytest',
    ]
    assert [c for c in COMMANDS if 'pytest' in c] == [' && '.join(steps)]


def test_every_option_in_the_text_exists():
    """In backticks between the words, where no command is read."""
    known = {f.name for f in fields(Config)} | {
        'config',
        'resume',
        'export',
        'dry_run',
        'debug',
        'help',
    }
    text = re.sub(r'```.*?```', '', README + GUIDE, flags=re.S)
    used = re.findall(
        r'--([\w-]+)',
        ' '.join(code for code in re.findall(r'`([^`]+)`', text) if 'pytest' not in code),
    )
    assert {name.replace('-', '_') for name in used} - {'slow'} <= known


@pytest.mark.parametrize('args', RUNS, ids=' '.join)
def test_every_command_is_understood(args, tmp_path, monkeypatch):
    """Its options exist and its values are valid. The files it names are made first."""
    monkeypatch.chdir(tmp_path)
    for option, value in zip(args, args[1:]):
        if option == '--config' and value not in shipped_configs():
            write_config(Config(), tmp_path / value)
        if option == '--resume':
            (tmp_path / value).mkdir(parents=True)
            write_config(Config(), tmp_path / value / 'config.yaml')
    if '--help' in args:
        with pytest.raises(SystemExit) as stop:
            read_command(args)
        assert stop.value.code == 0
    else:
        read_command(args)


def test_configurations_are_all_listed():
    for name in shipped_configs():
        assert f'`{name}`' in GUIDE


def test_python_block_runs(tmp_path, monkeypatch):
    """The ten lines of the API, with fewer epochs."""
    monkeypatch.chdir(tmp_path)
    code = [text for kind, text in BLOCKS if kind == 'python'][0]
    assert code.count('num_epochs=') == 1
    space, fewer = {}, 'num_epochs=1, samples_per_epoch=4, num_inference_steps=2'
    exec(re.sub(r'num_epochs=\d+', fewer, code), space)
    assert len(space['rows']) == 1 and space['rows'][0]['reward_mean'] > 0


LINKS = [
    (folder, link)
    for folder, text in ((ROOT, README), (ROOT / 'nbs', GUIDE))
    for link in re.findall(r'\]\(([^)#]+)(?:#[^)]*)?\)', text)
]


@pytest.mark.parametrize('folder, link', LINKS, ids=lambda value: str(value)[-30:])
def test_links_lead_somewhere(folder, link):
    """Links to files of the project; other pages only by arXiv id."""
    assert link.startswith('https://arxiv.org/abs/') or (folder / link).exists()


def test_lessons_are_all_listed():
    for path in (ROOT / 'nbs').glob('*.ipynb'):
        assert f'nbs/{path.name}' in README
    for folder in ('more', 'engine', 'tiny'):
        for path in (ROOT / 'nbs' / folder).glob('*.ipynb'):
            assert f'({folder}/{path.name}' in GUIDE


def test_readme_is_short():
    """What a command needs comes first, and everything in a few minutes."""
    words = len(re.sub(r'```.*?```', '', README, flags=re.S).split())
    assert words <= 800 and len(README.split('```')[0].split()) <= 120
