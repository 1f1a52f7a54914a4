"""The command's line: which settings win, its help, its plan, and answers without PyTorch.

What it refuses is in test_nonsense.py, what it does in test_runs.py.
Run: python -m pytest tests/test_command.py -n 0
"""

import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import yaml

from ddpo_tutorial.command import check_same_run, main, read_command
from ddpo_tutorial.configs import Config, load_config, shipped_configs, write_config

SETTINGS = [field.name for field in fields(Config)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Every test in an empty folder."
    monkeypatch.chdir(tmp_path)


# the line


def test_the_command_starts_from_tiny():
    assert read_command([]).settings == load_config('tiny')


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    text = 'learning_rate: 5e-6\nnum_epochs: 7\nvae_slicing: true\n'
    (tmp_path / 'my.yaml').write_text(text)
    command = read_command(['--config', 'my.yaml', '--num-epochs', '9', '--no-vae-slicing'])
    assert command.settings == Config(learning_rate=5e-6, num_epochs=9)
    assert (command.config, command.resume, command.export) == ('my.yaml', '', '')
    assert (command.dry_run, command.debug) == (False, False)


@pytest.mark.parametrize(
    'args', ['--samples_per_epoch 8', '--samples-per-epoch 8', '--samples-per-epoch=8']
)
def test_dashes_and_underscores(args):
    wanted = load_config('tiny', samples_per_epoch=8)
    assert read_command(args.split()).settings == wanted


def test_help_has_every_setting_its_meaning_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--help'])
    assert stop.value.code == 0
    said = ' '.join(re.sub('[│╭╮╰╯─]', ' ', capsys.readouterr().out).split())
    pattern = r'^    (?:# (.*)\n    )?(\w+): [^#\n]*(?:# (.*))?$'  # a comment above, or behind
    found = re.findall(pattern, settings_source(), re.M)
    meanings = {name: above or behind for above, name, behind in found}
    assert list(meanings) == SETTINGS
    for name, meaning in meanings.items():
        default = getattr(load_config('tiny'), name)
        shown = repr(default) if default in ('', '{}') else str(default)
        option = '--' + name.replace('_', '-')
        wanted = rf'{option}[ ,].*? {re.escape(meaning)} \(default: {re.escape(shown)}\)'
        assert re.search(wanted, said), name
    for option in ('--config', '--resume', '--export', '--dry-run', '--debug'):
        assert option in said


def settings_source():
    "The lines of `Config` that are settings."
    return inspect.getsource(Config).partition('@model_validator')[0]


# a run that goes on


def test_a_resumed_run_keeps_its_settings(tmp_path):
    write_config(Config(seed=5, num_epochs=3), tmp_path / 'config.yaml')
    command = read_command(['--resume', str(tmp_path), '--num-epochs', '9'])
    assert command.settings == Config(seed=5, num_epochs=9)
    assert command.resume == str(tmp_path)
    with pytest.raises(ValueError, match='seed=1 .* 5'):
        read_command(['--resume', str(tmp_path), '--seed', '1'])


OTHERS = dict(
    model='owner/name',
    reward='similarity',
    prompts='tiny',
    template='a photo of {}',
    out='there',
    loss='reinforce',
    dtype='float32',
    wandb='offline',
    group_size=4,
    samples_per_epoch=32,
)


def another(name, value):
    "A valid value of a setting that is not the one it has."
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2


def refuses(name):
    """Does a change of this setting make it another run? The message then names the setting and
    both values."""
    begun = Config(group_size=2)  # so that noise can be shared
    value = another(name, getattr(begun, name))
    try:
        check_same_run(begun, replace(begun, **{name: value}))
    except ValueError as error:
        assert f'{name}={value!r}' in str(error) and repr(getattr(begun, name)) in str(error)
        return True
    return False


def test_what_may_change_when_a_run_goes_on():
    "The number of epochs, what is recorded, and what only memory and time depend on."
    may = """num_epochs checkpoint_every keep_checkpoints watch_images wandb sample_batch_size
    minibatch_size gradient_checkpointing vae_slicing reward_on_cpu overlap_reward""".split()
    assert {name for name in SETTINGS if not refuses(name)} == set(may)
    check_same_run(Config(), Config())


# a plan


@pytest.mark.parametrize('name', shipped_configs())
def test_shipped_ones_can_be_planned(tmp_path, name, capsys):
    "A dry run says what would be done, in the form of a configuration, and writes nothing."
    assert main(['--config', name, '--dry-run']) == 0
    settings, sizes = capsys.readouterr().out.split('\n\n')
    config = load_config(name)
    assert f'{config.num_epochs * config.samples_per_epoch} images in all' in sizes
    assert yaml.safe_load(settings)['lora_rank'] == config.lora_rank
    assert not list(tmp_path.iterdir())
    (tmp_path / 'shown.yaml').write_text(settings)
    assert load_config('shown.yaml') == config


# without PyTorch


def fresh(code, *args):
    """Run code in a fresh process, and print its CPU seconds.
    Returns its exit code, which of the large libraries it imported, and what it said."""
    code += """
import sys, time
large = [name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules]
print('\\nleaves', code or 0, time.process_time(), *large)"""
    env = os.environ | dict(PYTHONIOENCODING='utf-8')
    options = dict(capture_output=True, text=True, encoding='utf-8', env=env)
    done = subprocess.run([sys.executable, '-c', code, *args], **options)
    said, _, last = done.stdout.rpartition('\nleaves ')
    assert last, done.stderr
    number, seconds, *large = last.split()
    print(f'{" ".join(args)}: {float(seconds):.2f} s of CPU')
    return int(number), large, said + done.stderr


COMMAND = """
import sys
from ddpo_tutorial.command import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
"""


@pytest.mark.parametrize(
    'args, number, word',
    [
        ('--help', 0, '--learning-rate'),
        ('--lerning-rate 1', 2, '--learning-rate'),
        ('--learning-rate fast', 2, 'fast'),
        ('--eta 0', 2, 'eta'),
        ('--config nope', 2, 'nope'),
        ('--model tinny', 2, 'tinny'),
        ('--reward beauty', 2, 'beauty'),
        ('--prompts anmals', 2, 'anmals'),
        ('--resume nowhere', 2, 'nowhere'),
    ],
)
def test_a_first_answer_comes_at_once(args, number, word):
    "Help and mistakes are answered without PyTorch, whose import takes seconds."
    code, large, said = fresh(COMMAND, *args.split())
    assert (code, large) == (number, []) and word in said


@pytest.mark.parametrize(
    'line',
    [
        'import ddpo_tutorial',
        'import ddpo_tutorial.command',
        'from ddpo_tutorial import Config, load_config, find_prompts',
    ],
)
def test_what_is_imported_without_pytorch(line):
    code, large, _ = fresh(f'{line}\ncode = 0')
    assert (code, large) == (0, [])


def test_pytorch_would_be_seen():
    "The comparison above can fail."
    assert 'torch' in fresh('from ddpo_tutorial import train\ncode = 0')[1]
