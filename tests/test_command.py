"""The command's line: which settings win, its help, its plan, and answers without PyTorch.

What it refuses is in test_nonsense.py, what it does in test_runs.py.
Run: python -m pytest tests/test_command.py -n 0
"""

import errno
import inspect
import io
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from ddpo_tutorial import command, runs
from ddpo_tutorial.command import check_same_run, export_checkpoint, main, read_command
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


def test_what_a_sweep_of_wandb_writes(tmp_path):
    "Its `${args_no_boolean_flags}`: names as in Python, a switch without a value."
    line = '--learning_rate=0.001 --shared_noise --group_size=4 --reward=similarity'
    changes = dict(learning_rate=0.001, shared_noise=True, group_size=4, reward='similarity')
    assert read_command(line.split()).settings == load_config('tiny', **changes)


def test_help_has_every_setting_its_meaning_and_its_default(capsys):
    assert main(['--help']) == 0
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
    device='cpu',
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
    minibatch_size gradient_checkpointing vae_slicing reward_on_cpu overlap_reward device""".split()
    assert {name for name in SETTINGS if not refuses(name)} == set(may)
    check_same_run(Config(), Config())


# code that somebody sent


CODE = {  # the reward's name: its file
    'helper:sharp': 'helper.py',
    'sent.helper:sharp': 'sent/helper.py',
    'package:sharp': 'package/__init__.py',
    'package.inner:sharp': 'package/inner.py',
}


@pytest.fixture(params=CODE)
def sent(request, tmp_path, monkeypatch):
    "A run that names code. Who imports it finds a file. Returns the reward's name."
    (tmp_path / 'sent').mkdir()
    write_config(Config(reward=request.param), tmp_path / 'sent' / 'config.yaml')
    file = tmp_path / CODE[request.param]
    file.parent.mkdir(exist_ok=True)
    for path in {file, file.parent / '__init__.py'} - {tmp_path / '__init__.py'}:
        if 'sent' not in path.parts or path == file:
            path.write_text(
                "open('it_ran', 'w')\nsharp = lambda images, prompts: prompts.nothing\n"
            )
    monkeypatch.setattr(sys, 'path', ['', *sys.path])
    for name in ('helper', 'sent', 'sent.helper', 'package', 'package.inner'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return request.param


@pytest.mark.parametrize('more', [[], ['--dry-run'], ['--num-epochs', '99']])
def test_a_sent_run_runs_no_code_unless_it_is_named(tmp_path, capsys, sent, more):
    assert main(['--resume', 'sent', *more]) == 2
    assert f'give --reward {sent} too' in capsys.readouterr().err
    assert not (tmp_path / 'it_ran').exists()
    assert read_command(['--resume', 'sent', '--reward', sent, *more]).settings.reward == sent


def test_a_plan_runs_no_code(tmp_path, capsys, sent):
    for words in (['--resume', 'sent'], []):
        assert main([*words, '--reward', sent, '--dry-run']) == 0
        assert f'The reward {sent} is code of {tmp_path}' in capsys.readouterr().out
    assert not (tmp_path / 'it_ran').exists()
    assert main(['--reward', 'nobody.has:this', '--dry-run']) == 2
    assert 'nobody.has' in capsys.readouterr().err


def test_its_place_is_said_before_it_runs(tmp_path, capsys, sent):
    assert main(['--reward', sent]) == 2
    said = capsys.readouterr()
    assert f'The reward {sent} is code of {tmp_path}' in said.out
    assert (tmp_path / 'it_ran').exists() and "no attribute 'nothing'" in said.err


# an earlier epoch


SHORT = """--config smoke --num-epochs 1 --samples-per-epoch 4 --num-inference-steps 2
--updates-per-epoch 1 --eval-images 1 --watch-images 0 --reward compressibility --device cpu
--out run""".split()


def test_a_checkpoint_is_exported_from_everywhere(tmp_path, monkeypatch, capsys):
    """By its name alone, through a link, by an absolute path; where a file is in the way, it stays,
    and nothing is said to be written."""
    assert main(SHORT) == 0
    folder = tmp_path / 'run' / 'checkpoints'
    file = folder / 'epoch-00001.pt'
    link = tmp_path / 'best.pt'
    link.symlink_to(file)
    monkeypatch.chdir(folder)
    for path in ('epoch-00001.pt', file, link, '../checkpoints/epoch-00001.pt'):
        written = export_checkpoint(Path(path))
        assert written.parent.samefile(tmp_path / 'run')
        assert [path.suffix for path in written.iterdir()] == ['.safetensors']
    (tmp_path / 'run' / 'lora-epoch-00002').write_text('mine')
    (folder / 'epoch-00002.pt').write_bytes(file.read_bytes())
    capsys.readouterr()
    assert main(['--export', 'epoch-00002.pt']) == 2
    said = capsys.readouterr()
    assert 'lora-epoch-00002' in said.err and not said.out
    assert (tmp_path / 'run' / 'lora-epoch-00002').read_text() == 'mine'


# nobody reads, nothing can be read, somebody interrupts


class Gone(io.StringIO):
    "A stream that fails as a pipe without a reader, a dead terminal and a full disk do."

    def __init__(self, number):
        super().__init__()
        self.number = number

    def flush(self):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize('number', [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_run_goes_on_when_nobody_reads(tmp_path, monkeypatch, number):
    stream = Gone(number)
    monkeypatch.setattr(sys, 'stdout', stream)
    assert main(SHORT) == 0 and sys.stdout is stream
    assert (tmp_path / 'run' / 'checkpoints' / 'epoch-00001.pt').exists()
    assert (tmp_path / 'run' / 'lora').is_dir()


@pytest.mark.parametrize('stream', [None, io.StringIO(), Gone(errno.EPIPE)])
def test_main_needs_no_terminal(monkeypatch, stream):
    "As in a notebook, or under a service manager: no stream, or one without `reconfigure`."
    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, stream)
    assert main(['--help']) == 0
    assert main(['--eta', '0']) == 2
    assert main(['--resume', 'nowhere']) == 2
    assert (sys.stdout, sys.stderr) == (stream, stream)
    if type(stream) is io.StringIO:
        assert all(words in stream.getvalue() for words in ('--seed', 'eta', "'nowhere' is no run"))


@pytest.mark.skipif(os.name == 'nt', reason='pipes and interrupts of Unix')
@pytest.mark.parametrize('args', ['--help', '--config nope', '--config tiny --dry-run'])
def test_a_reader_that_goes_away_sees_no_traceback(args):
    "As in `ddpo_train --help | head -1`, also when Python ends, and writes what is left."
    line = 'import sys; from ddpo_tutorial.command import main; sys.exit(main(sys.argv[1:]))'
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, '-c', line, *args.split()]
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    os.close(write)
    assert done.returncode == (2 if 'nope' in args else 0), done.stderr
    assert done.stderr.count('\n') == (1 if 'nope' in args else 0), done.stderr


def interrupted(*errors):
    "A function that is interrupted, and what libraries make of that, one around the other."

    def act(*args):
        error = KeyboardInterrupt()
        for outer in errors:
            outer.__context__ = error
            error = outer
        raise error

    return act


@pytest.mark.parametrize(
    'act',
    [
        interrupted(),
        interrupted(OSError('Unable to load weights')),
        interrupted(OSError('Unable to load weights'), ValueError('could not be loaded')),
        interrupted(RuntimeError('weights'), runs.RunFailed('After 0 of 9 epochs')),
    ],
)
def test_an_interrupt_is_one_line(monkeypatch, capsys, act):
    """Before the settings are read, and while the run loads. Whatever a library makes of it, it is
    an interrupt."""
    for module, name in ((runs, 'train_run'), (command, 'load_config')):
        monkeypatch.setattr(module, name, act)
        assert main([]) == 130
        assert capsys.readouterr().err == 'ddpo_train: interrupted.\n'


@pytest.mark.skipif(os.name == 'nt', reason='pipes and interrupts of Unix')
@pytest.mark.parametrize('library', ['torch', 'diffusers', 'accelerate'])
def test_ctrl_c_while_a_library_is_imported(library):
    code = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, *args):
        if name == {library!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
{COMMAND}"""
    number, _, said = fresh(code)
    assert number == 130 and said.strip() == 'ddpo_train: interrupted.', said


LONG = 'a' * 300
UNREADABLE = [
    ['--config', LONG],
    ['--config', 'folder'],
    ['--config', 'deep.yaml'],
    ['--config', '~nosuchuser/my.yaml'],
    ['--model', LONG, '--config', 'tiny'],
    ['--model', '~nosuchuser/sd', '--config', 'tiny'],
    ['--prompts', LONG],
    ['--prompts', 'folder'],
    ['--prompts', '~nosuchuser/animals.txt'],
    ['--resume', LONG],
    ['--resume', 'words.txt'],
    ['--export', LONG],
    ['--export', 'folder'],
    ['--export', 'words.txt'],
    ['--reward', 'folder:reward'],
]


@pytest.mark.parametrize('args', UNREADABLE, ids=' '.join)
def test_what_cannot_be_read_is_a_sentence(tmp_path, capsys, args):
    "With the value, and exit code 2."
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'words.txt').write_text('a cat\n')
    (tmp_path / 'deep.yaml').write_text('[' * 3000)
    assert main(args) == 2
    said = ''.join(re.sub('[│╭╮╰╯─]', ' ', capsys.readouterr().err).split())
    assert 'Traceback' not in said and args[1][:60] in said, said
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('args', ['--config closed', '--prompts closed', '--model closed'])
def test_what_may_not_be_read_is_a_sentence(monkeypatch, capsys, args):
    is_file = Path.is_file

    def refuse(path):
        if 'closed' in path.parts:
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return is_file(path)

    monkeypatch.setattr(Path, 'is_file', refuse)
    assert main(args.split()) == 2
    assert "Permission denied: 'closed'" in capsys.readouterr().err


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
