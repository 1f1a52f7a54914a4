"""Trials of breaking `ddpo_train`: each in a folder of its own, judged by what must always hold.

The trials are in trials.py, what happens inside the command in planted.py. Whatever is done,
- it ends with the exit code that fits, and says why in one sentence, without a traceback;
- no file that was there is changed, but for those of the run that goes on; nothing is left behind
  by a refusal; nothing is half-written under its final name;
- no code runs that nobody asked for;
- the advice it prints works, and the run then has the numbers of one that was left alone.

Run: python tests/breaking.py > tests/bench/results/breaking.md, with words of names to choose some
"""

import hashlib
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

os.environ |= dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
os.environ |= dict(MPLBACKEND='agg', PYDANTIC_ERRORS_INCLUDE_URL='0')

SMALL = """
model: micro
reward: compressibility
lora_rank: 4
num_epochs: 2
samples_per_epoch: 4
num_inference_steps: 2
updates_per_epoch: 2
learning_rate: 2e-3
group_size: 2
eval_images: 2
watch_images: 0
"""
REWARD = 'def reward(images, prompts):\n    return images.mean((1, 2, 3))\n'
CANARY = 'CANARY'  # a file that code nobody asked for would make
STOPPED = (128 + signal.SIGHUP, 128 + signal.SIGINT, 128 + signal.SIGTERM)
LINES = 12  # that an error may have; a traceback has more
CPU_SECONDS = 60  # no trial needs ten
WALL_SECONDS = 300

# a child is forked from a server that has imported all this, as if the command had just started
FORKED = multiprocessing.get_context('forkserver')
FORKED.set_forkserver_preload(['ddpo_tutorial.runs', 'ddpo_tutorial.command'])
FRESH = multiprocessing.get_context('spawn')


@dataclass(frozen=True)
class Trial:
    "What is done, and how it should end."

    name: str
    line: str  # of the command, or of a shell
    codes: tuple = (2,)  # the exit codes that are right
    given: tuple = ()  # (function, *args) each, called with the folder before
    inside: tuple = ()  # functions, called in the command's process before
    says: tuple = ()  # what the message must name
    mend: tuple = ()  # as given, before advice is followed
    env: dict = field(default_factory=dict)
    cwd: str = '.'
    fresh: bool = False  # in a process that has imported nothing
    shell: bool = False  # the line is one of bash
    left: str = ''  # why it may fall short
    area: str = ''


@dataclass
class Ending:
    "How a command ended."

    code: int | None  # None: it did not end
    said: str  # on both streams
    error: str  # on stderr alone, without warnings


# doing


def be_command(words: list, place: Path, cwd: str, env: dict, inside: tuple) -> None:
    "In the child: the streams are files, and the process ends as the console script does."
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever this was started by
    os.chdir(place / cwd)
    os.environ.update(env)
    for number, name in ((1, 'out'), (2, 'err')):
        os.dup2(os.open(f'{place}.{name}', os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(i, 'w', encoding='utf-8', closefd=False) for i in (1, 2))
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    from ddpo_tutorial.command import main

    for plant in inside:
        plant()
    sys.exit(main(words))


def in_child(trial: Trial, words: list, place: Path, inside: tuple) -> int | None:
    context = FRESH if trial.fresh else FORKED
    args = (words, place, trial.cwd, trial.env, inside)
    child = context.Process(target=be_command, args=args)
    child.start()
    child.join(WALL_SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        return None
    return None if child.exitcode == -signal.SIGXCPU else child.exitcode


def in_shell(line: str, place: Path) -> int:
    "With the command of this environment, and the code of a pipeline's first program that fails."
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    line = f'set -o pipefail; {{ {line}; }} >>{place}.out 2>>{place}.err'
    options = dict(cwd=place, env=os.environ | dict(PATH=path), timeout=WALL_SECONDS)
    return subprocess.run(['bash', '-c', line], **options).returncode


def carry_out(trial: Trial, line: str, place: Path, inside: tuple = ()) -> Ending:
    "Run a command line in a folder."
    out, err = (Path(f'{place}.{name}') for name in ('out', 'err'))
    out.write_text('')
    err.write_text('')
    if trial.shell:
        code = in_shell(line, place)
    else:
        code = in_child(trial, shlex.split(line), place, inside)
    said, error = (path.read_text(encoding='utf-8', errors='replace') for path in (out, err))
    return Ending(code, said + error, without_warnings(error))


def without_warnings(text: str) -> str:
    "A warning is a line with its place and class, and one with the code."
    return re.sub(r'^\S.*Warning: .*\n(  .*\n)?', '', text, flags=re.M)


# the folder


@cache
def world() -> Path:
    "What every trial starts from: a small model, settings, a reward and two finished runs."
    from helpers import micro_pipeline

    place = Path(tempfile.mkdtemp(prefix='breaking'), 'world')
    micro_pipeline().save_pretrained(place / 'micro')
    (place / 'small.yaml').write_text(SMALL)
    (place / 'own.py').write_text(REWARD)
    (place / 'precious.txt').write_text('kept')
    for words in ('--out done', '--out own --reward own:reward'):
        trial = Trial('', f'--config small.yaml {words}')
        ending = carry_out(trial, trial.line, place)
        assert ending.code == 0, ending.said
    return place


def contents(place: Path) -> dict:  # name -> what is there
    "All files, folders and links; not what Python, a lock or Matplotlib leaves."
    found = {}
    for path in sorted(place.rglob('*')):
        if '__pycache__' in path.parts or path.name in ('run.lock', 'sitecustomize.py'):
            continue
        kind = os.readlink(path) if path.is_symlink() else 'other'
        if path.is_dir() and not path.is_symlink():
            kind = 'folder'
        elif path.is_file() and not path.is_symlink():
            kind = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(place))] = kind
    return found


def runs_in(place: Path) -> list[Path]:
    return sorted(path.parent for path in place.rglob('config.yaml'))


def settings_of(run: Path) -> dict:
    "But for those that do not change the numbers."
    from ddpo_tutorial.command import CAN_CHANGE

    free = {'out', 'device', *CAN_CHANGE} - {'num_epochs'}
    try:
        found = yaml.safe_load((run / 'config.yaml').read_text(encoding='utf-8')) or {}
    except yaml.YAMLError:
        return {}  # a trial has cut it
    settings = {name: value for name, value in found.items() if name not in free}
    return settings | dict(model=Path(found.get('model', '')).name)


def numbers_of(run: Path) -> list:
    "The table of a run, without the seconds."
    from helpers import without_time

    from ddpo_tutorial.reports import read_rows

    return without_time(read_rows(run / 'metrics.csv'))


def read(path: Path) -> None:
    "Raises whatever a reader of such a file raises when it is not whole."
    from PIL import Image
    from safetensors.torch import load_file
    from torch import load

    from ddpo_tutorial.reports import read_rows

    readers = {
        '.pt': lambda path: load(path, weights_only=True),
        '.safetensors': load_file,
        '.json': lambda path: json.loads(path.read_text()),
        '.yaml': lambda path: dict(yaml.safe_load(path.read_text())),
        '.csv': read_rows,
        '.png': lambda path: Image.open(path).verify(),
    }
    readers.get(path.suffix, Path.read_bytes)(path)


# judging


def expected_end(trial: Trial, ending: Ending):
    "The exit code, one sentence, and what it names."
    if ending.code not in trial.codes:
        yield f'exit code {ending.code}, expected {" or ".join(map(str, trial.codes))}'
    if 'Traceback' in ending.said:
        yield 'a traceback'
    if ending.code != 0 and len(ending.error.strip().splitlines()) > LINES:
        yield f'{len(ending.error.splitlines())} lines of error'
    if ending.code in (1, 2) and not re.search('ddpo_train|╭', ending.error):
        yield 'no sentence'
    for word in trial.says:
        if word not in ' '.join(ending.said.split()):
            yield f'does not name {word}'


def may_write(trial: Trial, name: str) -> bool:
    "New runs, and the run that goes on or is exported."
    words = shlex.split(trial.line)
    named = [word for flag, word in zip(words, words[1:]) if flag in ('--resume', '--export')]
    own = [os.path.normpath(os.path.join(trial.cwd, word)).partition('/check')[0] for word in named]
    return any(f'{name}/'.startswith(f'{root}/') for root in ['run', 'runs', *own])


def kept_files(trial: Trial, ending: Ending, place: Path, before: dict):
    "What was there is there unchanged; a refusal leaves nothing but a whole run of another."
    after = contents(place)
    finished = tuple(str(run.relative_to(place)) for run in runs_in(place) if is_finished(run))
    mended = {name for _, name, *_ in trial.mend}
    for name in sorted(after.keys() | before.keys()):
        if before.get(name) == after.get(name) or name in {CANARY, *mended}:
            continue
        if name in before and not (ending.code != 2 and may_write(trial, name)):
            yield f'changed {name}'
        if name not in before and ending.code == 2 and not name.startswith(finished or ('//',)):
            yield f'left {name}'
        if name not in before and ending.code != 2 and not may_write(trial, name):
            yield f'wrote {name}'


def is_finished(run: Path) -> bool:
    return (run / 'evaluation.json').exists()


def whole_files(ending: Ending, place: Path, before: dict):
    "Every new file can be read, and none has a passing name, unless the process was killed."
    for name, content in contents(place).items():
        path = place / name
        if before.get(name) == content or not path.is_file() or path.is_symlink():
            continue
        if ending.code != -signal.SIGKILL and re.search(r'part$|tmp', path.name):
            yield f'left {name}'
            continue
        try:
            read(path)
        except Exception as error:
            yield f'half-written {name}: {type(error).__name__}'


def same_numbers(place: Path):
    "Each finished run whose settings are those of one that was left alone has its numbers."
    # an own reward's numbers are the same only where its code is
    code, its = (sorted(p.read_text() for p in f.glob('*.py')) for f in (place, world()))
    names = ('done', 'own') if code == its else ('done',)
    alone = [(settings_of(world() / name), numbers_of(world() / name)) for name in names]
    for run in runs_in(place):
        if not is_finished(run):
            continue
        for settings, numbers in alone:
            if settings_of(run) == settings and numbers_of(run) != numbers:
                yield f'other numbers in {run.name}'


def advice_in(trial: Trial, ending: Ending, place: Path) -> str:  # a command line
    "What the command advises; after a kill, what everybody would try."
    found = re.findall(r"ddpo_train (--resume (?:'[^']*'|\S+)(?: --\w\S* \S+)*)", ending.said)
    if found:
        return found[-1].rstrip('.,;:')
    if ending.code == -signal.SIGKILL:
        return '--resume run' if (place / 'run').exists() else trial.line
    return ''


def follow_advice(trial: Trial, ending: Ending, place: Path):
    "With the cause gone it works, and nobody is left without a way on."
    advice = advice_in(trial, ending, place)
    if not advice:
        stopped = ending.code == 1 or ending.code in STOPPED
        if stopped and (place / 'run').exists() and 'new run' not in ending.said:
            yield 'no advice'
        return
    for function, *args in trial.mend:
        function(place, *args)
    after = carry_out(trial, advice, place)
    if after.code != 0 or 'Traceback' in after.said:
        last = after.said.strip().splitlines()[-1:]
        yield f'the advice {advice} ends with {after.code}: {"".join(last)}'
    elif not is_finished(place / trial.cwd / shlex.split(advice)[1]):
        yield 'the advice leads to no finished run'


def judge(trial: Trial, place: Path) -> tuple[Ending, list[str]]:  # and what falls short
    "Carry out a trial in a new folder."
    shutil.copytree(world(), place, symlinks=True)
    for function, *args in trial.given:
        function(place, *args)
    before = contents(place)
    ending = carry_out(trial, trial.line, place, trial.inside)
    faults = [*expected_end(trial, ending), *whole_files(ending, place, before)]
    if not faults or ending.code in trial.codes:
        faults += follow_advice(trial, ending, place)
    faults += [*kept_files(trial, ending, place, before), *same_numbers(place)]
    if list(place.rglob(CANARY)):
        faults.append('foreign code ran')
    return ending, faults


# a table


def print_table(chosen: list) -> None:
    "A row a trial, as it is judged."
    print('| area | trial | exit code | verdict |\n|---|---|---|---|')
    short = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, trial in enumerate(chosen):
            ending, faults = judge(trial, Path(folder, str(number)))
            short += bool(faults)
            verdict = '; '.join(faults).replace('|', '/') or 'right'
            if faults and trial.left:
                verdict = f'left: {trial.left} ({verdict})'
            print(f'| {trial.area} | {trial.name} | {ending.code} | {verdict} |', flush=True)
            shutil.rmtree(Path(folder, str(number)), ignore_errors=True)
    print(f'\n{len(chosen)} trials, {len(chosen) - short} right.')


if __name__ == '__main__':
    from trials import TRIALS

    words = sys.argv[1:]
    print_table([t for t in TRIALS if all(word in f'{t.area} {t.name}' for word in words)])
