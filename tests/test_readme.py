"""README.md's commands and code are what they say: parsed from the file, and run."""
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', README, re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == 'bash' for line in text.splitlines() if line.strip() and not line.startswith('#')]


def test_first_command_sets_up_and_runs_the_main_job():
    assert COMMANDS[0] == 'python3 -m venv .venv && .venv/bin/pip install -q . && .venv/bin/ddpo_train'


def test_one_command_sets_up_and_runs_the_tests():
    """.ci/run takes this line from here."""
    tests = [c for c in COMMANDS if 'pytest' in c]
    assert tests == ["python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/python -m pytest"]


def test_every_option_in_the_readme_exists():
    from dataclasses import fields
    from ddpo_tutorial.configs import RunConfig
    known = {f'--{f.name}'.replace('_', '-') for f in fields(RunConfig)} | {'--help', '--config', '--resume', '--dry-run'}
    used = [w for c in COMMANDS for part in [c.split('ddpo_train', 1)] if len(part) == 2 for w in shlex.split(part[1]) if w.startswith('--')]
    assert {w.replace('_', '-') for w in used} <= known


def test_python_block_runs(monkeypatch):
    """The ten lines of the API, with fewer epochs."""
    code = [text for kind, text in BLOCKS if kind == 'python'][0]
    assert code.count('num_epochs=') == 1
    space = {}
    exec(re.sub(r'num_epochs=\d+', 'num_epochs=1, samples_per_epoch=4, num_inference_steps=2', code), space)
    assert len(space['rows']) == 1 and space['rows'][0]['reward_mean'] > 0


@pytest.mark.parametrize('link', re.findall(r'\]\(([^)#]+)\)', README))
def test_links_lead_somewhere(link):
    """Links to files of the project; other pages only by arXiv id."""
    assert link.startswith('https://arxiv.org/abs/') or (ROOT / link).exists()


def test_lessons_are_all_listed():
    for path in sorted((ROOT / 'nbs').glob('[0-9]*.ipynb')):
        assert f'nbs/{path.name}' in README
