"""Checkpoints: nothing forgotten, never torn, damage found, foreign ones refused, 0.2's go on.

Run: python -m pytest tests/test_checkpoints.py -n 0
"""

import os
import pickle
import random
import stat
import zipfile
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
import yaml
from helpers import PROMPTS, brightness, micro_pipeline, weights, without_time
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ddpo_tutorial.checkpoints import (
    checkpoints,
    epochs_done,
    is_whole,
    load_checkpoint,
    newest_checkpoint,
    open_checkpoint,
    pack,
    save_checkpoint,
    set_weights,
    trained_weights,
    unpack,
    write_aside,
)
from ddpo_tutorial.configs import Config, load_config
from ddpo_tutorial.pipelines import add_lora
from ddpo_tutorial.training import new_state, train_epochs

SMALL = Config(
    num_epochs=3,
    samples_per_epoch=3,
    sample_batch_size=2,
    num_inference_steps=2,
    updates_per_epoch=2,
    learning_rate=1e-3,
    buffer_size=4,
    min_count=2,
)
STEPS = 2  # optimizer steps of an epoch
BATCHES = 2  # batches of pictures of an epoch


class Cut(Exception):
    "The moment at which a run dies."


def model(lora=False):
    return add_lora(micro_pipeline()) if lora else micro_pipeline()


def go_through(config, pipe, reward, state):
    "To the end. Returns rows, updates and weights."
    for _ in train_epochs(config, pipe, reward, PROMPTS, state=state):
        pass
    return without_time(state.rows), without_time(state.updates), weights(pipe.unet)


def train_on(folder, lora=False, config=SMALL, reward=brightness, change=lambda packed: packed):
    """Fresh objects, the newest checkpoint if there is one, and on to the end, with a checkpoint
    after every epoch."""
    pipe = model(lora)
    state = new_state(config, pipe)
    found = newest_checkpoint(folder)
    if found:
        load_checkpoint(found, pipe, state)
        unpack(change(pack(state)), state)
    for _ in train_epochs(config, pipe, reward, PROMPTS, state=state):
        save_checkpoint(folder, pipe, state)
    return without_time(state.rows), without_time(state.updates), weights(pipe.unet)


@cache
def left_alone(lora, overlap):
    "Rows, updates and weights of a run that nothing happened to."
    pipe = model(lora)
    config = replace(SMALL, overlap_reward=overlap)
    return go_through(config, pipe, brightness, new_state(config, pipe))


def die_at_step(folder, number, **options):
    "Raise at the run's optimizer step of that number, counted from 1."
    taken = []

    def before_step(*_):
        taken.append(1)
        if len(taken) == number:
            raise Cut

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        with pytest.raises(Cut):
            train_on(folder, **options)
    finally:
        hook.remove()


def die_at_batch(folder, number, **options):
    "Raise when the run's batch of pictures of that number is scored, counted from 1."
    scored = []

    def reward(images, prompts):
        scored.append(1)
        if len(scored) == number:
            raise Cut
        return brightness(images, prompts)

    with pytest.raises(Cut):
        train_on(folder, reward=reward, **options)


def is_the_same(found, wanted):
    return found[:2] == wanted[:2] and torch.equal(found[2], wanted[2])


@pytest.mark.parametrize('lora, overlap', [(False, False), (True, False), (False, True)])
def test_cut_off_at_any_step_or_batch_it_is_the_same_run(tmp_path, lora, overlap):
    """Every optimizer step and every batch of three epochs: reloaded into fresh objects and
    finished, equal to the last bit."""
    options = dict(lora=lora, config=replace(SMALL, overlap_reward=overlap))
    for die, an_epoch in ((die_at_step, STEPS), (die_at_batch, BATCHES)):
        for number in range(1, 3 * an_epoch + 1):
            folder = tmp_path / f'{die.__name__}-{number}'
            folder.mkdir()
            die(folder, number, **options)
            # nothing half-done is kept
            assert len(checkpoints(folder)) == min(2, (number - 1) // an_epoch)
            found = train_on(folder, **options)
            assert is_the_same(found, left_alone(lora, overlap)), (die.__name__, number)


def test_cut_off_again_and_again(tmp_path):
    "Five deaths in a row, each in the middle of an epoch."
    for number in (2, STEPS + 2, 1, STEPS + 1, 2):
        die_at_step(tmp_path, number)
    assert is_the_same(train_on(tmp_path), left_alone(False, False))


@pytest.mark.parametrize('name', ['optimizer', 'tracker'])
def test_what_is_forgotten_shows(tmp_path, name):
    "The comparison above can fail: one part of the state is a new run's."
    die_at_step(tmp_path, STEPS + 1)
    new = pack(new_state(SMALL, micro_pipeline()))[name]
    found = train_on(tmp_path, change=lambda packed: packed | {name: new})
    assert not is_the_same(found, left_alone(False, False))


def test_scaler_and_page_survive():
    pipe = model()
    state = new_state(SMALL, pipe)
    other = new_state(SMALL, pipe)
    state.scaler = torch.amp.GradScaler('cpu', init_scale=8.0)
    other.scaler = torch.amp.GradScaler('cpu')
    state.scaler.scale(torch.ones(()))
    state.wandb_id = 'abc'
    unpack(pack(state), other)
    assert other.scaler.get_scale() == 8 and other.wandb_id == 'abc'


def saved(folder, epochs=3, keep=2):
    "A pipeline and its state, with the checkpoints of so many epochs in the folder."
    pipe = model()
    config = replace(SMALL, num_epochs=epochs)
    state = new_state(config, pipe)
    for _ in train_epochs(config, pipe, brightness, PROMPTS, state=state):
        save_checkpoint(folder, pipe, state, keep)
    return pipe, state


def test_only_as_many_as_asked_stay(tmp_path):
    saved(tmp_path, epochs=4, keep=3)
    names = [path.stem for path in checkpoints(tmp_path)]
    assert names == ['epoch-00002', 'epoch-00003', 'epoch-00004']
    assert len(list(tmp_path.iterdir())) == 3


# version 0.2


def write_as_02(folder):
    "Settings and the checkpoint of one epoch as version 0.2 wrote them, which had no `loss`."
    pipe = model()
    config = replace(SMALL, num_epochs=1)
    state = new_state(config, pipe)
    go_through(config, pipe, brightness, state)
    settings = asdict(SMALL)
    del settings['loss']
    (folder / 'config.yaml').write_text(yaml.safe_dump(settings, sort_keys=False))
    buffers = state.tracker.buffers
    packed = dict(
        optimizer=state.optimizer.state_dict(),
        scaler=state.scaler.state_dict(),
        tracker={prompt: list(rewards) for prompt, rewards in buffers.items()},
        rows=state.rows,
        updates=state.updates,
        wandb_id='',
    )
    named = pipe.unet.named_parameters()
    content = dict(weights={name: p.detach() for name, p in named}, state=packed)
    torch.save(content, folder / 'epoch-00001.pt')


def test_a_run_of_version_02_goes_on(tmp_path):
    "With the loss that version had, to the end that a run of one go has."
    write_as_02(tmp_path)
    config = load_config(tmp_path / 'config.yaml')
    assert config == SMALL and config.loss == 'clipped'
    assert newest_checkpoint(tmp_path).stem == 'epoch-00001'
    assert is_the_same(train_on(tmp_path, config=config), left_alone(False, False))


# damage


def damage(path, how):
    "What a disk, a copy or a kill may do to a file."
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    if how == 'changed':
        data[half] ^= 1
    path.write_bytes({'cut': data[:half], 'empty': b'', 'changed': data}[how])


@pytest.mark.parametrize('how', ['cut', 'empty', 'changed'])
def test_a_damaged_one_is_named_and_passed_over(tmp_path, how, capsys):
    "One bit is enough; PyTorch would load it."
    saved(tmp_path)
    newest = checkpoints(tmp_path)[-1]
    assert newest_checkpoint(tmp_path) == newest and is_whole(newest)
    damage(newest, how)
    assert newest_checkpoint(tmp_path).stem == 'epoch-00002'
    assert 'epoch-00003.pt is damaged' in capsys.readouterr().out


def same(a, b):
    "Equal content of two checkpoints, to the bit."
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_one_bit_in_the_directory_is_found_or_means_nothing(tmp_path):
    """In the archive's directory and headers, and in what says where the tensors are. Whatever a
    bit makes of them, nothing is raised, and what is called whole loads as it was written."""
    saved(tmp_path, epochs=1)
    (path,) = checkpoints(tmp_path)
    data = path.read_bytes()
    wanted = open_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        heads = [info.header_offset for info in archive.infolist()]
        directory = range(archive.start_dir, len(data))
    places = [*directory, *(head + i for head in heads for i in range(64))]
    rng = random.Random(0)
    whole = []
    for _ in range(60):
        changed = bytearray(data)
        changed[rng.choice(places)] ^= 1 << rng.randrange(8)
        victim = tmp_path / 'epoch-00002.pt'
        victim.write_bytes(changed)
        whole.append(is_whole(victim))
        assert newest_checkpoint(tmp_path) == (victim if whole[-1] else path)
        assert not whole[-1] or same(open_checkpoint(victim), wanted)
    assert 0 < sum(whole) < 60


class Evil:
    "Makes a folder when it is unpickled."

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def write_odd(path, what):
    "A file that is no checkpoint of this version."
    content = torch.load(path, weights_only=True)
    evil = Evil(path.parent / 'evil')
    if what == 'no weights':
        del content['weights']
    elif what == 'an older version':
        del content['state']['wandb_id']
    elif what == 'a payload':
        content['more'] = evil
    elif what == 'plain weights':
        content = content['weights']
    elif what == 'a list':
        content = [1, 2]
    torch.save(content, path, _use_new_zipfile_serialization=what != 'the old format')
    if what == 'a pickle':
        path.write_bytes(pickle.dumps(evil))
    elif what == 'a zip':
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('archive/data.pkl', pickle.dumps(evil))


ODD = 'no weights,an older version,a payload,plain weights,a list,the old format,a pickle,a zip'


@pytest.mark.parametrize('what', ODD.split(','))
def test_what_does_not_load_is_named_and_passed_over(tmp_path, what, capsys):
    "No code in it is run, and nobody is told to load it nevertheless."
    saved(tmp_path)
    write_odd(tmp_path / 'epoch-00003.pt', what)
    assert newest_checkpoint(tmp_path).stem == 'epoch-00002'
    said = capsys.readouterr().out
    assert 'epoch-00003.pt is damaged, or no checkpoint of this version' in said
    assert 'weights_only' not in said and not (tmp_path / 'evil').exists()


def test_a_checkpoint_knows_whose_it_is(tmp_path):
    pipe, state = saved(tmp_path)
    path = save_checkpoint(tmp_path, pipe, state, owner=dict(seed=0, eta=1.0, names=['a', 'b']))
    assert epochs_done(path, dict(names=['a', 'b'], eta=1.0, seed=0)) == 3
    assert epochs_done(path, dict(seed=0, new='setting')) == 3  # of a later version
    with pytest.raises(ValueError, match='another run: its eta is 1.0, here it is 0.5'):
        epochs_done(path, dict(seed=0, eta=0.5, names=[]))
    assert epochs_done(save_checkpoint(tmp_path, pipe, state), dict(seed=7)) == 3  # version 0.3's


def test_after_99999_epochs_come_100000(tmp_path):
    pipe, state = saved(tmp_path, epochs=1)
    names = []
    for count in (99_999, 100_000, 100_001):
        state.rows = state.rows[:1] * count
        names.append(save_checkpoint(tmp_path, pipe, state).stem)
    assert names == ['epoch-99999', 'epoch-100000', 'epoch-100001']
    assert [path.stem for path in checkpoints(tmp_path)] == names[1:]
    assert newest_checkpoint(tmp_path).stem == 'epoch-100001'


def test_a_run_goes_on_from_before_the_damage(tmp_path):
    "And the damaged one is replaced by what it should have been."
    die_at_step(tmp_path, 2 * STEPS + 1)
    damage(tmp_path / 'epoch-00002.pt', 'changed')
    assert is_the_same(train_on(tmp_path), left_alone(False, False))
    assert is_whole(tmp_path / 'epoch-00003.pt')


def test_nothing_good_is_left(tmp_path):
    saved(tmp_path)
    for path in checkpoints(tmp_path):
        damage(path, 'cut')
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / 'absent') is None


# the disk


def test_a_writer_that_dies_leaves_the_old_file(tmp_path):
    "Whatever it dies of, and with half of the new one written."
    path = tmp_path / 'table.csv'
    path.write_text('old')
    for error in (OSError(28, 'No space left on device'), KeyboardInterrupt(), RuntimeError()):

        def write(aside):
            aside.write_text('ne')
            raise error

        with pytest.raises(type(error)):
            write_aside(path, write)
        assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_a_reader_in_the_middle_has_the_old_file(tmp_path):
    "Renamed, not written over: whoever has the file open reads on in the old one."
    path = tmp_path / 'table.csv'
    path.write_text('old' * 9)
    with path.open() as reader:
        write_aside(path, lambda aside: aside.write_text('new'))
        assert reader.read() == 'old' * 9 and path.read_text() == 'new'


@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_who_may_read_it_is_the_users_choice(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_aside(tmp_path / 'table.csv', lambda aside: aside.write_text('new'))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / 'table.csv').stat().st_mode) == mode


@pytest.mark.parametrize('dangling', [False, True])
def test_nothing_is_written_through_a_link(tmp_path, monkeypatch, dangling):
    "Not even if somebody knew the name under which it is written first."
    precious = tmp_path / 'precious.txt'
    monkeypatch.setattr(os, 'urandom', lambda count: bytes(count))
    for name in ('table.part', 'table.part00000000', 'table.csv'):
        (tmp_path / name).symlink_to(precious)
    if not dangling:
        precious.write_text('mine')
    with pytest.raises(FileExistsError):
        write_aside(tmp_path / 'table.csv', lambda aside: aside.write_text('new'))
    monkeypatch.undo()
    write_aside(tmp_path / 'table.csv', lambda aside: aside.write_text('new'))
    assert not (tmp_path / 'table.csv').is_symlink()
    assert not precious.exists() if dangling else precious.read_text() == 'mine'


def test_what_a_killed_writer_left_is_in_nobodys_way(tmp_path):
    "It may be as large as a checkpoint, and goes with the next one that is written."
    pipe, state = saved(tmp_path)
    for name in ('epoch-00003.part', 'epoch-00003.part0f0f0f0f', 'epoch-00004.part00000000'):
        (tmp_path / name).write_bytes(b'half')
    assert newest_checkpoint(tmp_path).stem == 'epoch-00003'
    save_checkpoint(tmp_path, pipe, state)
    assert {path.name for path in tmp_path.iterdir()} == {'epoch-00002.pt', 'epoch-00003.pt'}


def test_a_full_disk_is_said(tmp_path):
    "A real limit of the system's: the error names the file, and what was there can be loaded."
    resource = pytest.importorskip('resource')  # Windows has none
    pipe, state = saved(tmp_path)
    state.rows.append(state.rows[-1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    wanted = 'epoch-00004.pt could not be written.*What was there before is still there'
    try:
        with pytest.raises(OSError, match=wanted):
            save_checkpoint(tmp_path, pipe, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest_checkpoint(tmp_path).stem == 'epoch-00003'
    assert len(list(tmp_path.iterdir())) == 2


def test_a_removed_folder_is_said(tmp_path):
    pipe, state = saved(tmp_path)
    with pytest.raises(OSError, match='could not be written'):
        save_checkpoint(tmp_path / 'gone', pipe, state)


# other models


@pytest.mark.parametrize('other', ['lora', 'rank', 'shape'])
def test_another_models_weights_are_refused(other):
    "Before anything is changed."
    pipes = dict(lora=model(True), rank=add_lora(micro_pipeline(), rank=8), shape=micro_pipeline())
    pipe = pipes[other]
    if other == 'shape':
        pipe.unet.conv_out = torch.nn.Conv2d(16, 8, 3)
    found = trained_weights(model(other == 'rank'))
    before = weights(pipe.unet)
    with pytest.raises(ValueError, match='another model'):
        set_weights(pipe, found)
    assert torch.equal(before, weights(pipe.unet))


def test_a_compiled_models_names_are_the_plain_ones():
    "torch.compile wraps the UNet; its prefix is nobody's business, in either direction."
    plain = micro_pipeline()
    compiled = micro_pipeline(seed=1)
    compiled.unet = torch.compile(compiled.unet)
    assert trained_weights(compiled).keys() == trained_weights(plain).keys()
    set_weights(compiled, trained_weights(plain))
    assert torch.equal(weights(compiled.unet), weights(plain.unet))
