"""What is done to `ddpo_train`: see breaking.py.

A trial names its area, what is done, the command line, and how it should end; `given` prepares the
folder, `inside` plants something into the command's process.
"""

import json
import os
import pickle
import shutil
import signal
import zipfile
from dataclasses import replace
from functools import partial

import breaking
import torch
from breaking import REWARD, Trial
from planted import (
    EVER,
    FULL,
    LOCKED,
    NO_LOCKS,
    another,
    at,
    close_streams,
    current_folder,
    fail,
    float64,
    forget,
    full_device,
    go_away,
    kernel,
    limit_descriptors,
    limit_files,
    reader_gone,
    send,
    set_clock,
    set_encoding,
    stop_import,
    strings,
)

NEW = '--config small.yaml --out run'
SMALL = '--config small.yaml'
DONE = (0,)
REFUSED = (2,)
FAILED = (1,)
LONG = 'n' * 300
LAST = 'checkpoints/epoch-00002.pt'
FIRST = 'done/checkpoints/epoch-00001.pt'
UNET = 'micro/unet/diffusion_pytorch_model.safetensors'

# calls of a run; where something can happen
LOADING = 'diffusers:UNet2DConditionModel.from_pretrained'
ENCODING = 'transformers:CLIPTextModel.forward'
JPEG = 'ddpo_tutorial.rewards:jpeg_kilobytes'  # 1, 2: evaluation; 3 to 6, 7 to 10: epochs; 11, 12
UPDATE = 'torch.optim:AdamW.step'  # two an epoch
SAVE = 'torch:save'
CURVE = 'matplotlib.figure:Figure.savefig'
LORA = 'safetensors.torch:save_file'


# in the folder before: functions of the folder


def write(place, name, content):
    "A file, a text or bytes."
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(place, name, old, new):
    text = (place / name).read_text()
    assert old in text, f'{old!r} is not in {name}'
    (place / name).write_text(text.replace(old, new))


def cut(place, name, share):
    "What a copy that broke off leaves."
    data = (place / name).read_bytes()
    (place / name).write_bytes(data[: int(len(data) * share)])


def flip(place, name, position):
    "One bit, so many bytes from the beginning or the end, or at a share of the file."
    data = bytearray((place / name).read_bytes())
    if isinstance(position, float):
        position = int(position * len(data))
    data[position] ^= 4
    (place / name).write_bytes(data)


def remove(place, *names):
    for name in names:
        path = place / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(True)


def move(place, name, new):
    (place / new).parent.mkdir(parents=True, exist_ok=True)
    (place / name).rename(place / new)


def copy(place, name, new):
    copied = place / new
    copied.parent.mkdir(parents=True, exist_ok=True)
    copier = shutil.copytree if (place / name).is_dir() else shutil.copy
    copier(place / name, copied)


def link(place, name, target):
    "A symbolic link, in place of what is there."
    path = place / name
    if path.exists():
        remove(place, name)
    path.symlink_to(target)


def fifo(place, name):
    os.mkfifo(place / name)


def run_before(place, line):
    "Another run in the same folder."
    ending = breaking.carry_out(Trial('', line), line, place)
    assert ending.code == 0, ending.said


def as_if_stopped(place, name):
    "The run after its first epoch."
    remove(place, f'{name}/{LAST}', f'{name}/lora', f'{name}/evaluation.json')


def canary(place, name, text='reward = lambda images, prompts: images.mean((1, 2, 3))\n'):
    "A module that says so when it is imported."
    path = str(place / breaking.CANARY)
    write(place, name, f'open({path!r}, "w").close()\n{text}')


class Payload:
    "What a pickle runs when it is loaded as such."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


def pickled(place, name):
    "A plain pickle that runs code."
    write(place, name, pickle.dumps(Payload(place / breaking.CANARY)))


def saved(place, name, change, legacy=False):
    "A checkpoint, changed."
    content = torch.load(place / name, weights_only=False)
    change(content, place)
    torch.save(content, place / name, _use_new_zipfile_serialization=not legacy)


def payload(content, place):
    content['state']['extra'] = Payload(place / breaking.CANARY)


def without(*keys):
    "Take away what is at the end of some keys."

    def change(content, place):
        *parents, last = keys
        for key in parents:
            content = content[key]
        del content[last]

    return change


def put(*keys, value):
    "Set what is at the end of some keys."

    def change(content, place):
        *parents, last = keys
        for key in parents:
            content = content[key]
        content[last] = value

    return change


def other_shapes(content, place):
    content['weights'] = {name: p[:1] for name, p in content['weights'].items()}


def archive(place, name, *members):
    "A zip file that is no checkpoint."
    with zipfile.ZipFile(place / name, 'w') as file:
        for member in members:
            file.writestr(member, 'x')


def indexed(place, name, value):
    "An entry of the model's index."
    path = place / 'micro/model_index.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


def as_pickle(place, name):
    "Weights as pickle files had them, with code in them."
    remove(place, f'micro/{name}/{weights_of(name)}.safetensors')
    pickled(place, f'micro/{name}/{weights_of(name)}.bin')


def weights_of(name):
    return 'model' if name == 'text_encoder' else 'diffusion_pytorch_model'


def not_numbers(place, name):
    "A network's weights, all NaN."
    from safetensors.torch import load_file, save_file

    path = place / f'micro/{name}/{weights_of(name)}.safetensors'
    nan = float('nan')
    save_file({k: p.fill_(nan) for k, p in load_file(path).items()}, path, {'format': 'pt'})


ACTING = """
import os, signal, sys, time, torch
calls = []
def reward(images, prompts):
    rewards = images.mean((1, 2, 3))
    calls.append(images.shape[-1] == 16)
    if sum(calls) == {call} and calls[-1]:
        {act}
    return rewards
"""
HANG = """
        import threading
        for seconds in (0.3, 2.0):
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(600)
"""
WORKERS = """
        import multiprocessing
        with multiprocessing.get_context('fork').Pool(2) as pool:
            pool.map(abs, range(9))
"""
TERMS = """
from ddpo_tutorial.rewards import WeightedSum
def light(images, prompts):
    return images.mean((1, 2, 3))
reward = WeightedSum(**{{{name!r}: (1.0, light), 'b': (0.5, light)}})
"""


# the trials: a name, a line, the exit codes, what is given, what is planted, what must be named


def written(name, text, *says, codes=REFUSED):
    "A file of settings."
    given = ((write, 'my.yaml', text),)
    return Trial(name, '--config my.yaml --dry-run', codes, given, says=says)


def multiplied(levels):
    "Aliases that multiply."
    lines = [f'l{i}: &l{i} [{", ".join([f"*l{i - 1}"] * 9)}]' for i in range(1, levels)]
    return '\n'.join(['l0: &l0 [x, x]', *lines, f'seed: *l{levels - 1}'])


YAML = [
    written('a setting twice', 'seed: 1\nseed: 2\n', 'seed'),
    written('a setting twice, once quoted', 'seed: 1\n"seed": 2\n', 'seed'),
    written('aliases that multiply', multiplied(9)),
    written('an alias', 'num_epochs: &n 3\nwatch_images: *n\n'),
    written('a merge', 'a: &a {seed: 1}\n<<: *a\n'),
    written('nested 3000 deep', 'seed: ' + '[' * 3000),
    written('nested settings', 'model: {name: tiny}\n', 'model'),
    written('a list', '- seed: 1\n', 'my.yaml'),
    written('a word', 'tiny\n', 'my.yaml'),
    written('two documents', 'seed: 1\n---\nseed: 2\n', 'my.yaml'),
    written('bytes', b'\xff\xfe\x00s', 'my.yaml'),
    written('a NUL', 'seed: 1\x00\n', 'my.yaml'),
    written('a tab', 'seed: 1\n\tlearning_rate: 1\n', 'my.yaml'),
    written('20 MB', '# nothing\n' * 2_000_000, 'my.yaml'),
    written('a tag that calls', 'model: !!python/object/apply:os.mkdir [CANARY]\n', 'model'),
    written('an unknown setting', 'sede: 1\n', 'sede'),
    written('no number', 'learning_rate: .nan\n', 'learning_rate'),
    written('beyond all numbers', 'learning_rate: 1e999\n', 'learning_rate'),
    written('a date', 'seed: 2024-01-01\n', 'seed'),
    written('nothing', 'seed:\n', 'seed'),
    written('as Windows writes it', b'\xef\xbb\xbfseed: 1\r\nnum_epochs: 2\r\n', codes=DONE),
]

CONFIG = [
    Trial('empty', '--config "" --dry-run', says=('--config',)),
    Trial('missing', '--config my.yaml', says=('my.yaml',)),
    Trial('a folder', '--config micro', says=('micro',)),
    Trial('a long name', f'--config {LONG}'),
    Trial('of nobody', '--config ~nobodyhere/my.yaml', says=('~nobodyhere',)),
    Trial('a link to itself', '--config there', given=[(link, 'there', 'there')], says=['there']),
    Trial('a pipe', '--config there', given=[(fifo, 'there')], says=['there']),
    Trial(
        'not to be read',
        '--config locked.yaml',
        given=[(write, 'locked.yaml', 'seed: 1\n')],
        inside=LOCKED,
        says=['locked.yaml'],
    ),
]


def flag(name, line, *says, codes=REFUSED):
    return Trial(name, f'{NEW} {line}', codes, says=says)


FLAGS = [
    flag('unknown', '--lerning-rate 1', 'lerning-rate'),
    flag('a word for a number', '--seed one', 'one'),
    flag('a negative seed', '--seed -1', '-1'),
    flag('a seed too large', f'--seed {2**63}', 'seed'),
    flag('no epochs', '--num-epochs 0', 'num_epochs'),
    flag('10^18 epochs', f'--num-epochs {10**18}', 'num_epochs'),
    flag('half an epoch', '--num-epochs 1.5', '1.5'),
    flag('no eta', '--eta nan', 'eta'),
    flag('an eta too small', '--eta 1e-6', 'eta'),
    flag(
        'a picture an epoch',
        '--samples-per-epoch 1 --group-size 1 --updates-per-epoch 1',
        'samples_per_epoch',
    ),
    flag('groups that do not fit', '--group-size 3', 'group_size=3'),
    flag('a window that does not fit', '--window-start 2', 'window_start=2'),
    flag('an infinite rate', '--learning-rate inf', 'learning_rate'),
    flag('1000 steps of a shifted chain', '--num-inference-steps 1000', '1000'),
    flag('a word too much', 'more', 'more'),
    flag('an empty number', '--seed ""'),
    flag('an unknown device', '--device abacus', 'abacus'),
    flag('the CPU', '--device cpu', codes=DONE),
    flag('--config with --resume', '--resume done', '--config', '--resume'),
    Trial('--resume with --export', f'--resume done --export {FIRST}', says=['--export']),
    Trial('--resume without a value', '--resume', says=['--resume']),
    Trial('a model without settings', '--model micro', says=['micro', '--config']),
]


def to(name, where, *given, codes=REFUSED, inside=(), says=None):
    "A new run's folder."
    line = f'--config small.yaml --out {where}'
    return Trial(name, line, codes, given, inside, [where] if says is None else says)


OUT = [
    to('a finished run', 'done'),
    to('by another path', 'micro/../done/', says=['done']),
    to('through a link', 'there', (link, 'there', 'done')),
    to('a file', 'own.py'),
    to('below a file', 'own.py/run', says=['own.py']),
    to('a full folder', 'micro'),
    to('a link to nothing', 'there', (link, 'there', 'nowhere')),
    to('a long name in new folders', f'run/a/{LONG}'),
    to('of nobody', '~nobodyhere/run'),
    to('in /proc', '/proc/run'),
    to('of a model that does not load', 'run/new', (remove, UNET), says=['micro']),
    to('umlauts and spaces', '"run/lä ü"', codes=DONE, says=()),
    to(
        'umlauts and spaces, stopped',
        '"run/lä ü"',
        codes=(130,),
        inside=[at(JPEG, 3, send(signal.SIGINT))],
        says=(),
    ),
]


def other(name, line, where, second, codes, *says):
    "A second command starts and ends while the first one waits at a call."
    return Trial(name, line, codes, inside=[at(where, 1, another(second))], says=says)


FREE, TAKEN = ('the other one ended with 0', 'the other one ended with 2')
MORE = '--resume done --num-epochs 3'
TWO = [
    other('one --out, the first loads', NEW, LOADING, f'{NEW} --seed 5', DONE, TAKEN),
    other(
        'one --out, the first looks', f'{NEW} --seed 5', 'pathlib:Path.mkdir', NEW, REFUSED, FREE
    ),
    other('one --out, the first trains', NEW, UPDATE, f'{NEW} --seed 5', DONE, TAKEN),
    other('no --out, the first makes a folder', SMALL, 'pathlib:Path.mkdir', SMALL, DONE, FREE),
    other('no --out, the first looks', SMALL, 'pathlib:Path.exists', SMALL, DONE, FREE),
    other('resumed twice', MORE, UPDATE, MORE, DONE, TAKEN),
    other('an export while a run trains', MORE, UPDATE, f'--export {FIRST}', DONE, FREE),
    Trial('a lock left behind', '--resume done', DONE, [(write, 'done/run.lock', '')]),
    Trial(
        'a lock that is a folder',
        '--resume done',
        given=[(remove, 'done/run.lock'), (write, 'done/run.lock/a', '')],
        says=['run.lock'],
    ),
    Trial('a disk without locks', NEW, DONE, inside=[at('fcntl:flock', EVER, fail(NO_LOCKS))]),
]


def resumed(name, *given, codes=REFUSED, line='--resume run', says=()):
    "A copy of the finished run, changed."
    return Trial(name, line, codes, [(copy, 'done', 'run'), *given], says=says)


RESUME = [
    resumed('a copy', codes=DONE),
    resumed('a copy without tables', (remove, 'run/metrics.csv', 'run/updates.csv'), codes=DONE),
    resumed('a moved run', (move, 'run', 'runs/lä ü'), line='--resume "runs/lä ü"', codes=DONE),
    resumed('through a link', (link, 'there', 'run'), line='--resume there/', codes=DONE),
    resumed('after its first epoch', (as_if_stopped, 'run'), codes=DONE),
    resumed('the newest cut', (cut, f'run/{LAST}', 0.5), codes=DONE),
    resumed('the newest empty', (cut, f'run/{LAST}', 0), codes=DONE),
    resumed(
        'the newest is a folder', (remove, f'run/{LAST}'), (write, f'run/{LAST}/a', ''), codes=DONE
    ),
    resumed('a bit of the newest, in its weights', (flip, f'run/{LAST}', 0.5), codes=DONE),
    resumed('a bit of the newest, in its list', (flip, f'run/{LAST}', -40), codes=DONE),
    resumed('a bit of the newest, in a name', (flip, f'run/{LAST}', 34), codes=DONE),
    resumed(
        'all cut',
        (cut, f'run/{LAST}', 0.5),
        (cut, 'run/checkpoints/epoch-00001.pt', 0.5),
        says=['run'],
    ),
    resumed('none left', (remove, f'run/{LAST}', 'run/checkpoints/epoch-00001.pt'), says=['run']),
    resumed('their folder gone', (remove, 'run/checkpoints'), says=['run']),
    resumed(
        'one of another seed',
        (run_before, f'{SMALL} --out runs/other --seed 5'),
        (copy, 'runs/other/checkpoints/epoch-00002.pt', f'run/{LAST}'),
        codes=(0, 2),
        says=['epoch-00002.pt'],
    ),
    resumed(
        'one of another reward',
        (copy, f'own/{LAST}', f'run/{LAST}'),
        codes=(0, 2),
        says=['epoch-00002.pt'],
    ),
    resumed('settings empty', (write, 'run/config.yaml', ''), says=['run']),
    resumed('settings cut', (cut, 'run/config.yaml', 0.5), says=['run']),
    resumed(
        'another seed in its settings',
        (edit, 'run/config.yaml', 'seed: 0', 'seed: 7'),
        says=['seed'],
    ),
    resumed(
        'another rate in its settings',
        (edit, 'run/config.yaml', '0.002', '0.001'),
        says=['learning_rate'],
    ),
    resumed('prompts empty', (write, 'run/prompts.json', ''), says=['prompts.json']),
    resumed('prompts a number', (write, 'run/prompts.json', '7'), says=['prompts.json']),
    resumed('prompts a word', (write, 'run/prompts.json', '"a cat"'), says=['prompts.json']),
    resumed('prompts numbers', (write, 'run/prompts.json', '[1, 2]'), says=['prompts.json']),
    resumed('prompts a mapping', (write, 'run/prompts.json', '{}'), says=['prompts.json']),
    resumed('prompts bytes', (write, 'run/prompts.json', b'\xff\xfe'), says=['prompts.json']),
    resumed('other prompts', (write, 'run/prompts.json', '["a cat", "a cow"]'), says=['prompts']),
    resumed('prompts gone', (remove, 'run/prompts.json'), says=['prompts.json']),
    resumed('fewer epochs', line='--resume run --num-epochs 1', says=['num_epochs=1']),
    resumed('another seed', line='--resume run --seed 3', says=['seed=3']),
    Trial('empty', '--resume "" --dry-run', says=['--resume']),
    Trial('nowhere', '--resume nowhere', says=['nowhere']),
    Trial('a file', '--resume own.py', says=['own.py']),
    Trial('from elsewhere', '--resume ../done', (0, 2), cwd='micro', says=['micro']),
    Trial(
        'not to be read',
        '--resume locked',
        given=[(move, 'done', 'locked')],
        inside=LOCKED,
        says=['locked'],
    ),
]

EXPORT = [
    Trial('a checkpoint', f'--export {FIRST}', DONE),
    Trial('from inside its folder', '--export epoch-00001.pt', DONE, cwd='done/checkpoints'),
    Trial('through a link', '--export there.pt', DONE, [(link, 'there.pt', FIRST)]),
    Trial('twice', f'--export {FIRST}', (0, 2), [(run_before, f'--export {FIRST}')]),
    Trial(
        'onto a file',
        f'--export {FIRST}',
        given=[(write, 'done/lora-epoch-00001', 'mine')],
        says=['lora-epoch-00001'],
    ),
    Trial('empty', '--export "" --dry-run', says=['--export']),
    Trial('nowhere', '--export done/nowhere.pt', says=['nowhere.pt']),
    Trial('a run', '--export done', says=['done']),
    Trial('cut', f'--export {FIRST}', given=[(cut, FIRST, 0.5)], says=['epoch-00001.pt']),
    Trial(
        'another archive',
        f'--export {FIRST}',
        given=[(archive, FIRST, 'a.txt')],
        says=['epoch-00001.pt'],
    ),
    Trial('of an own reward', f'--export own/{LAST}', DONE, [(canary, 'own.py')]),
    Trial('onto a full disk', f'--export {FIRST}', (1, 2), inside=[at(LORA, 1, fail(FULL))]),
    Trial('on a disk that fills', f'--export {FIRST}', (1, 2), inside=[partial(limit_files, 3000)]),
]


def hostile(name, *given):
    "The newest checkpoint is not what it was; the older one is used, or all is refused."
    given = [(copy, 'done', 'run'), *given]
    return Trial(name, '--resume run', (0, 2), given, says=['epoch-00002.pt'])


def changed(name, change):
    return hostile(name, (saved, f'run/{LAST}', change))


CHECKPOINTS = [
    hostile('a pickle with code', (pickled, f'run/{LAST}')),
    changed('code beside its content', payload),
    hostile("code, in PyTorch's old format", (saved, f'run/{LAST}', payload, True)),
    hostile('another archive', (archive, f'run/{LAST}', 'a.txt')),
    hostile('an archive of paths', (archive, f'run/{LAST}', '../../CANARY', '/tmp/CANARY')),
    changed('without weights', without('weights')),
    changed('without its state', without('state')),
    changed('rows that are a word', put('state', 'rows', value='none')),
    changed('rows that are numbers', put('state', 'rows', value=[1, 2])),
    changed('a tracker that is a list', put('state', 'tracker', value=[1])),
    changed('an optimizer that is none', put('state', 'optimizer', value={})),
    changed('weights of other shapes', other_shapes),
    changed('weights that are no numbers', put('weights', value=3)),
    changed('of an older version', without('state', 'wandb_id')),
    Trial(
        'code, exported',
        f'--export {FIRST}',
        given=[(saved, FIRST, payload)],
        says=['epoch-00001.pt'],
    ),
]


def model(name, *given, codes=REFUSED, says=('micro',), **more):
    return Trial(name, NEW, codes, given, says=says, **more)


def part(name, text):
    return (write, f'micro/{name}', text)


OWN_CLASS = 'from diffusers import DDIMScheduler as Evil\n'
MODELS = [
    model(
        'a module of its own in the folder',
        (canary, 'micro/scheduler/evil.py', OWN_CLASS),
        (indexed, 'scheduler', ['evil', 'Evil']),
    ),
    model(
        'a module of its own on the path',
        (canary, 'evil.py', OWN_CLASS),
        (indexed, 'scheduler', ['evil', 'Evil']),
        env=dict(PYTHONPATH='.'),
        inside=[current_folder],
    ),
    model('an installed module', (indexed, 'scheduler', ['os', 'system'])),
    model(
        'another part',
        (indexed, 'extra', ['evil', 'Evil']),
        (canary, 'micro/extra/evil.py', OWN_CLASS),
    ),
    model('a class of another kind', (indexed, 'unet', ['diffusers', 'AutoencoderKL'])),
    model('a pipeline.py', (canary, 'micro/pipeline.py'), codes=DONE, says=()),
    model(
        'code named in its settings',
        (
            edit,
            'micro/unet/config.json',
            '{',
            '{"auto_map": {"AutoModel": "evil.Evil"}, "trust_remote_code": true,',
        ),
        (canary, 'micro/unet/evil.py'),
        codes=(0, 2),
    ),
    model('a UNet with code', (as_pickle, 'unet')),
    model('a text encoder with code', (as_pickle, 'text_encoder')),
    model('a VAE with code', (as_pickle, 'vae')),
    model('an index that is a list', part('model_index.json', '[]')),
    model('an index that is no JSON', part('model_index.json', '{')),
    model('no index', (remove, 'micro/model_index.json')),
    model('a UNet config that is a list', part('unet/config.json', '[]')),
    model('no UNet config', (remove, 'micro/unet/config.json')),
    model(
        'a UNet of ten million channels', (edit, 'micro/unet/config.json', '  16,', '  16000000,')
    ),
    model('weights cut', (cut, UNET, 0.5)),
    model('no weights', (remove, UNET)),
    model('weights that are NaN', (not_numbers, 'unet'), codes=(1, 2), says=('nan',)),
    model(
        'an empty tokenizer',
        *(
            (remove, f'micro/tokenizer/{name}')
            for name in ('vocab.json', 'merges.txt', 'tokenizer.json')
        ),
        says=(),
    ),
    model(
        'a scheduler without betas',
        part('scheduler/scheduler_config.json', '{}'),
        codes=(0, 2),
        says=(),
    ),
    model('a file', (remove, 'micro'), (write, 'micro', 'x')),
    model('a link to itself', (link, 'micro', 'micro')),
    model(
        'not to be read',
        (move, 'micro', 'locked'),
        (edit, 'small.yaml', 'micro', 'locked'),
        inside=LOCKED,
        says=('locked',),
    ),
]


def sent(name, line, codes=REFUSED, cwd='.', **more):
    "A run that somebody sent, whose reward is a module that lies in it."
    given = [
        (copy, 'own', 'run'),
        (edit, 'run/config.yaml', 'own:reward', 'run.helper:reward'),
        (canary, 'run/helper.py'),
    ]
    return Trial(name, line, codes, given, cwd=cwd, **more)


def linked(name, target, *given, codes=(0, 2)):
    "A name in the run's folder leads elsewhere: to what must stay as it is."
    return Trial(
        f'{name} is a link',
        '--resume run --num-epochs 3',
        codes,
        [(copy, 'done', 'run'), *given, (link, f'run/{name}', target)],
    )


def named(name, reward, *given, says=None):
    return Trial(
        name, f'{NEW} --reward {reward}', REFUSED, given, says=[reward] if says is None else says
    )


FOLDERS = [
    sent('its reward, resumed', '--resume run', says=['run.helper:reward']),
    sent('its reward, planned', '--resume run --dry-run', (0, 2)),
    sent('its reward, exported', f'--export run/{LAST}', DONE),
    Trial(
        'a reward of Python, resumed',
        '--resume run',
        REFUSED,
        [(copy, 'own', 'run'), (edit, 'run/config.yaml', 'own:reward', 'os:system')],
        says=['os:system'],
    ),
    Trial(
        'its own reward, not asked for',
        '--resume own',
        REFUSED,
        [(canary, 'own.py')],
        says=['--reward own:reward'],
    ),
    Trial(
        'its own reward, asked for',
        '--resume own --reward own:reward',
        DONE,
        [(as_if_stopped, 'own')],
    ),
    Trial(
        'another reward, asked for',
        '--resume own --reward mine:reward',
        REFUSED,
        [(canary, 'mine.py')],
        says=['mine:reward'],
    ),
    Trial('a new run, planned', f'{NEW} --reward own:reward --dry-run', (0,), [(canary, 'own.py')]),
    linked('metrics.part', '../precious.txt'),
    linked('metrics.csv', '../precious.txt'),
    linked('config.part', '../precious.txt'),
    linked('samples.png', '../precious.txt'),
    linked('evaluation.json', '../precious.txt'),
    linked('run.lock', '../precious.txt'),
    linked('checkpoints', '../done/checkpoints'),
    linked('lora', '../done/lora'),
    named('a reward of no module', 'nowhere:reward'),
    named('a name that is not there', 'own:nothing'),
    named('a module that does not import', 'mine:reward', (write, 'mine.py', 'import nowhere\n')),
    named('a module that exits', 'mine:reward', (write, 'mine.py', 'import sys\nsys.exit(3)\n')),
    named('a module with a wrong word', 'mine:reward', (write, 'mine.py', 'def reward(:\n')),
    named('no name', 'own:'),
    named('a path', './own.py:reward'),
]


MOMENTS = {
    'loading': (LOADING, 1),
    'before the first evaluation': (ENCODING, 1),
    'in the first evaluation': (JPEG, 1),
    'in the first epoch': (JPEG, 3),
    'in the first update': (UPDATE, 1),
    'writing the first checkpoint': (SAVE, 1),
    'renaming something': ('os:fsync', 3),
    'drawing the curve': (CURVE, 1),
    'in the second epoch': (UPDATE, 3),
    'writing the last checkpoint': (SAVE, 2),
    'in the last evaluation': (JPEG, 11),
    'writing the LoRA': (LORA, 1),
}
IN = [name for name in MOMENTS if name.startswith('in ')]


def ended(kind, action, codes, *moments):
    "Something happens at a moment of a run."
    return [
        Trial(f'{kind} {moment}', NEW, codes, inside=[at(*MOMENTS[moment], action)])
        for moment in moments
    ]


INTERRUPT = send(signal.SIGINT)
SIGNALS = [
    *ended('Ctrl-C', INTERRUPT, (130,), 'loading', 'before the first evaluation', *IN[:3]),
    *ended('Ctrl-C', INTERRUPT, (0, 130), 'drawing the curve', *IN[3:]),
    *ended('Ctrl-C twice', send(signal.SIGINT, signal.SIGINT), (130,), *IN),
    *ended('SIGTERM', send(signal.SIGTERM), (143,), 'loading', *IN[1:3]),
    *ended('SIGHUP', send(signal.SIGHUP), (129, 143), 'loading', *IN[:3]),
    *ended('SIGKILL', send(signal.SIGKILL), (-signal.SIGKILL,), *MOMENTS),
    *(
        Trial(
            f'Ctrl-C, importing {name}',
            NEW,
            (130,),
            inside=[partial(stop_import, name)],
            fresh=True,
        )
        for name in ('torch.nn', 'diffusers', 'ddpo_tutorial.runs')
    ),
]

STREAMS = [
    Trial('no stdout', NEW, DONE, inside=[partial(close_streams, [1])]),
    Trial('no stderr', NEW, DONE, inside=[partial(close_streams, [2])]),
    Trial('no streams', NEW, DONE, inside=[partial(close_streams, [0, 1, 2])]),
    Trial('no stderr, and a mistake', f'{NEW} --eta 2', inside=[partial(close_streams, [1])]),
    Trial('into a string', NEW, DONE, inside=[strings]),
    Trial('in a notebook', NEW, DONE, inside=[kernel]),
    Trial('a plan in a notebook', f'{NEW} --dry-run', DONE, inside=[kernel]),
    Trial('its reader gone', NEW, DONE, inside=[reader_gone]),
    *ended('its reader gone', reader_gone, DONE, 'in the first evaluation', 'in the second epoch'),
    Trial('onto a full device', NEW, DONE, inside=[full_device]),
    Trial(
        'in ASCII',
        f'{NEW} --template "ein Bär, {{}}"',
        DONE,
        inside=[partial(set_encoding, 'ascii')],
    ),
    Trial('in UTF-16', NEW, DONE, inside=[partial(set_encoding, 'utf-16')]),
    Trial('help, one line of it', 'ddpo_train --help | head -1', (0, 141), shell=True),
    Trial('help, onto a full device', 'ddpo_train --help >/dev/full', (0, 1, 2, 120), shell=True),
    Trial('help, without stdout', 'ddpo_train --help >&-', (0, 2), shell=True),
    Trial('help, without stderr', 'ddpo_train --help 2>&-', DONE, shell=True),
    Trial('help, 20 columns', '--help', DONE, env=dict(COLUMNS='20')),
    Trial('help, 5 columns', '--help', DONE, env=dict(COLUMNS='5')),
    Trial('a mistake, without stderr', 'ddpo_train --eta 2 2>&-', shell=True),
]

DISK = [
    *ended(
        'no space',
        fail(FULL),
        FAILED,
        *IN[:1],
        'writing the first checkpoint',
        'renaming something',
    ),
    *ended('no space', fail(FULL), FAILED, 'writing the last checkpoint', 'writing the LoRA'),
    *ended('no space', fail(FULL), (0, 1), 'drawing the curve'),
    *ended('files of 4 kB', partial(limit_files, 4096), FAILED, *IN[:1], 'in the second epoch'),
    *ended('no memory', fail(MemoryError()), FAILED, *IN[:1], 'in the second epoch'),
    *ended('no memory', fail(MemoryError()), (1, 2), 'loading'),
    *ended('its folder gone', partial(forget, 'run'), FAILED, 'in the second epoch'),
    Trial('few file descriptors', NEW, (0, 1, 2), inside=[partial(limit_descriptors, 12)]),
    Trial('the current folder gone', NEW, inside=[go_away]),
    Trial('the clock ten years back', NEW, DONE, inside=[partial(set_clock, -3e8)]),
    Trial('the clock before 1970', NEW, DONE, inside=[partial(set_clock, -3e9)]),
]

NUMBERS = [
    Trial('a huge rate', f'{NEW} --learning-rate 1e30', FAILED, says=['new run']),
    Trial('a huge decay', f'{NEW} --weight-decay 1e30', FAILED, says=['new run']),
    Trial('a rate of 10', f'{NEW} --learning-rate 10', (0, 1, 2), says=['learning_rate']),
    Trial('a huge guidance', f'{NEW} --guidance-scale 1e38', (1, 2), says=['guidance_scale']),
    Trial('one step', f'{NEW} --num-inference-steps 1', DONE),
    Trial('one prompt for all', f'{NEW} --prompts one.txt', DONE, [(write, 'one.txt', 'a cat\n')]),
    Trial(
        'batches of a billion', f'{NEW} --sample-batch-size {10**9} --minibatch-size {10**9}', DONE
    ),
    Trial('the largest seed', f'{NEW} --seed {2**63 - 1}', DONE),
    Trial('half precision', f'{NEW} --dtype float16', DONE),
    Trial('a rank of 10^9', f'{NEW} --lora-rank {10**9}', (1, 2)),
]


def rewarded(name, call, act, *says, codes=FAILED, line='', **more):
    """An own reward acts at one of its calls: 1 evaluates, 2 and 3 are the epochs, 4 evaluates
    again. It does nothing when it is tried, on other pictures."""
    given = [(write, 'own.py', ACTING.format(call=call, act=act))]
    mend = [(write, 'own.py', REWARD)]
    return Trial(
        name, f'{NEW} --reward own:reward {line}', codes, given, says=says, mend=mend, **more
    )


def owned(name, text, *says, codes=REFUSED):
    return Trial(name, f'{NEW} --reward own:reward', codes, [(write, 'own.py', text)], says=says)


OVERLAP = '--overlap-reward --sample-batch-size 2'
REWARDS = [
    rewarded('raises at first', 1, 'raise ConnectionError("no answer")', 'no answer'),
    rewarded('raises in the second epoch', 3, 'raise ConnectionError("no answer")', 'no answer'),
    rewarded('raises at last', 4, 'raise ConnectionError("no answer")', 'no answer'),
    rewarded('leaves Python', 3, 'sys.exit(3)', 'SystemExit'),
    rewarded('raises StopIteration', 3, 'next(iter([]))', 'StopIteration'),
    rewarded('raises GeneratorExit', 3, 'raise GeneratorExit("odd")', 'GeneratorExit'),
    rewarded('is cancelled', 3, 'import asyncio; raise asyncio.CancelledError', 'CancelledError'),
    rewarded('raises a long text', 3, 'raise ValueError("long\\n" * 5)', 'long'),
    rewarded('raises nothing said', 3, 'raise AssertionError', 'AssertionError'),
    rewarded('is NaN', 3, 'rewards[0] = float("nan")', 'nan'),
    rewarded('is beyond float32', 3, 'rewards = rewards.double() * 1e300', '1'),
    rewarded('is too short', 3, 'rewards = rewards[:1]', '1'),
    rewarded('is a column', 3, 'rewards = rewards[:, None]', '1'),
    rewarded('is None', 3, 'rewards = None', 'None'),
    rewarded('changes the pictures', 3, 'images.zero_()', codes=DONE),
    rewarded('changes the prompts', 3, 'prompts.clear()', codes=DONE),
    rewarded('changes the folder', 2, 'os.chdir("/")', codes=DONE),
    rewarded('sets a seed', 2, 'torch.manual_seed(7)', codes=DONE),
    rewarded('switches gradients off', 2, 'torch.set_grad_enabled(False)', codes=DONE),
    rewarded('sets a default dtype', 2, 'torch.set_default_dtype(torch.float64)', codes=DONE),
    rewarded('closes stdout', 2, 'sys.stdout.close()', codes=DONE),
    rewarded('takes the signals', 2, 'signal.signal(signal.SIGINT, signal.SIG_IGN)', codes=DONE),
    rewarded('starts workers', 2, WORKERS, codes=DONE),
    rewarded('hangs', 3, HANG, codes=(130,)),
    rewarded('hangs while others are drawn', 3, HANG, codes=(130,), line=OVERLAP),
    Trial('another dtype before', NEW, DONE, inside=[float64]),
    owned('a term of an odd name', TERMS.format(name='=a, "b"\n'), codes=DONE),
    owned('a term called mean', TERMS.format(name='mean'), 'mean'),
    owned('a term called std', TERMS.format(name='std'), 'std'),
    owned(
        'always the same',
        REWARD.replace('images.mean((1, 2, 3))', 'images.new_zeros(len(images))'),
        codes=DONE,
    ),
    owned('very small', REWARD.replace('return ', 'return 1e-9 * '), codes=DONE),
]


def prompted(name, text, *says, codes=DONE):
    return Trial(name, f'{NEW} --prompts my.txt', codes, [(write, 'my.txt', text)], says=says)


PROMPTS = [
    prompted('a line separator', 'a cat\u2028a dog\na cow\n', '2 prompts'),
    prompted('a vertical tab', 'a cat\va dog\na cow\n', '2 prompts'),
    prompted('a form feed and more', 'a cat\x0ca\x1cb\x85c\na cow\n', '2 prompts'),
    prompted('Windows', '\ufeffa cat\r\na cow\r\n', "2 prompts such as 'a cat'"),
    prompted('escapes', 'a \x1b[31mcat\na cow\n'),
    prompted('a long one', 'a cat ' * 200),
    prompted('nothing', '\n# a cat\n', 'my.txt', codes=REFUSED),
    prompted('bytes', b'\xff\xfe\x00', 'my.txt', codes=REFUSED),
    prompted(
        'two that encode alike', 'a cat ' * 30 + 'one\n' + 'a cat ' * 30 + 'two\n', codes=REFUSED
    ),
    Trial(
        'a table', f'{NEW} --prompts my.csv', given=[(write, 'my.csv', 'a cat')], says=['my.csv']
    ),
    Trial('a folder', f'{NEW} --prompts micro', says=['micro']),
    Trial('a pipe', f'{NEW} --prompts there', given=[(fifo, 'there')], says=['there']),
    Trial(
        'not to be read',
        f'{NEW} --prompts locked',
        given=[(write, 'locked', 'a cat')],
        inside=LOCKED,
        says=['locked'],
    ),
    Trial('a long name', f'{NEW} --prompts {LONG}'),
]


def set_to(name, codes=DONE, line=NEW, **env):
    return Trial(name, line, codes, env=env)


ENVIRONMENT = [
    set_to("a kernel's backend", MPLBACKEND='module://matplotlib_inline.backend_inline'),
    set_to('a backend that is none', MPLBACKEND='nothing'),
    set_to('no home', HOME='/proc/nowhere'),
    set_to('no folder for temporary files', TMPDIR='/proc/nowhere'),
    set_to('no path', PATH=''),
    set_to('no terminal', TERM='dumb', COLUMNS='0'),
    set_to('a locale that is none', LC_ALL='xx_YY', LANG='xx_YY'),
    set_to(
        'W&B offline, without a home',
        line=f'{NEW} --wandb offline',
        HOME='/proc/nowhere',
        WANDB_PROJECT='mine',
    ),
    Trial(
        'one without letters',
        f'LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 ddpo_train {SMALL} --out "run/lä"',
        DONE,
        shell=True,
    ),
    Trial('MPLBACKEND from the start', f'MPLBACKEND=nothing ddpo_train {NEW}', DONE, shell=True),
    Trial('a sweep', f'{SMALL} --out=run --shared_noise=True --seed=0', DONE),
]

AREAS = {
    'YAML': YAML,
    '--config': CONFIG,
    'flags': FLAGS,
    '--out': OUT,
    'two commands': TWO,
    '--resume': RESUME,
    '--export': EXPORT,
    'checkpoints': CHECKPOINTS,
    'model folders': MODELS,
    'run folders': FOLDERS,
    'signals': SIGNALS,
    'streams': STREAMS,
    'disk and limits': DISK,
    'numbers': NUMBERS,
    'rewards': REWARDS,
    'prompts': PROMPTS,
    'environment': ENVIRONMENT,
}
NOT_OURS = (
    'whole, and not what a run writes: refused by the part that reads it, once the run has begun'
)
NO_CURE = 'the message names the picture and its prompt; what made it so, only the user can know'
LEFT = {  # what may fall short, and why
    'an alias': 'an alias to a plain value multiplies nothing, and is taken',
    'a long name in new folders': 'the folders above it have been made by then',
    'a lock that is a folder': 'taken for a disk without locks: it warns, and goes on',
    'the newest is a folder': 'what lies in the place of a checkpoint is not removed',
    'through a link': 'it is written beside the run, under the name that was given',
    'rows that are a word': NOT_OURS,
    'a tracker that is a list': NOT_OURS,
    'an optimizer that is none': NOT_OURS,
    'rows that are numbers': NOT_OURS,
    'weights that are no numbers': NOT_OURS,
    'weights of other shapes': NOT_OURS,
    'a class of another kind': 'the class is not taken from the index: the model is right',
    'weights that are NaN': NO_CURE,
    'a huge guidance': NO_CURE,
    'a mistake, without stderr': 'there is no stream to say it on',
    'its folder gone in the second epoch': 'there is nothing left to go on with',
    'help, 5 columns': 'tyro never ends in so few columns',
    'another dtype before': 'PEFT draws the first weights of a LoRA in the default dtype',
    'a sweep': 'tyro has no such option; ${args_no_boolean_flags} of W&B writes what is taken',
}
TRIALS = [
    replace(trial, area=area, left=trial.left or LEFT.get(trial.name, ''))
    for area, trials in AREAS.items()
    for trial in trials
]
assert set(LEFT) <= {trial.name for trial in TRIALS}
