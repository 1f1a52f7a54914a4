"""Settings from Python and files, what they come to, and the rewards and prompts they name.

Run: python -m pytest tests/test_configs.py -n 0
"""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import brightness

from ddpo_tutorial import predictors
from ddpo_tutorial.configs import (
    REWARDS,
    Config,
    describe,
    load_config,
    read_config,
    shipped_configs,
    write_config,
)
from ddpo_tutorial.prompts import find_prompts

SHIPPED = """sd-alignment sd-compressibility sd-fast sd-lora-16gb sd-lora-8gb sd-lora-published
sd-original smoke tiny tiny-original""".split()
SETTINGS = [field.name for field in fields(Config)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Every test in an empty folder."
    monkeypatch.chdir(tmp_path)


def test_the_shipped_ones_are_there_and_valid():
    assert sorted(shipped_configs()) == SHIPPED
    assert all(isinstance(load_config(name), Config) for name in SHIPPED)


def test_config_is_the_original():
    assert load_config('tiny-original') == Config() != load_config('tiny')


def forwards(config):
    "Of an epoch: a backward pass counts as two forward passes, guidance doubles."
    steps = config.num_inference_steps + 3 * len(config.random_steps)
    return 2 * config.samples_per_epoch * steps


def test_what_the_configurations_for_stable_diffusion_are_said_to_cost():
    path = Path(__file__).parents[1] / 'nbs' / '06_stable_diffusion.ipynb'
    lesson = path.read_text(encoding='utf-8')
    fast = load_config('sd-fast')
    published = load_config('sd-lora-published')
    assert f'= {forwards(fast):,} forward' in lesson
    assert f'= {forwards(published):,}.' in lesson
    total = f'{fast.num_epochs * forwards(fast):,} forward passes'
    assert total in lesson
    assert total in shipped_configs()['sd-fast'].read_text(encoding='utf-8')
    for name in ('sd-lora-16gb', 'sd-lora-8gb', 'sd-alignment', 'sd-compressibility'):
        assert forwards(load_config(name)) == forwards(fast)


# files


def test_changes_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    (tmp_path / 'my.yaml').write_text('learning_rate: 5e-6\nnum_epochs: 7\n')
    assert load_config('my.yaml') == Config(learning_rate=5e-6, num_epochs=7)
    assert load_config(tmp_path / 'my.yaml', num_epochs=9) == Config(
        learning_rate=5e-6, num_epochs=9
    )
    assert load_config(seed=3).lora_rank == load_config('tiny').lora_rank != Config().lora_rank
    with pytest.raises(ValueError, match='num_epoch\n.*Unexpected'):
        load_config('tiny', num_epoch=9)


@pytest.mark.parametrize(
    'line, wanted',
    [
        ('learning_rate: 5e-6', 5e-6),
        ('guidance_scale: 5', 5.0),
        ('num_epochs: 3', 3),
        ('vae_slicing: true', True),
        ('vae_slicing: off', False),
        ('wandb: off', 'off'),
        ('template: no {}', 'no {}'),
        ('out: 007', '007'),
    ],
)
def test_what_a_line_of_yaml_means(tmp_path, line, wanted):
    "YAML alone would read 5e-6 as a text, and `off` as False."
    (tmp_path / 'my.yaml').write_text(line)
    got = getattr(load_config('my.yaml'), line.partition(':')[0])
    assert got == wanted and type(got) is type(wanted)


@pytest.mark.parametrize('text', ['', '# nothing\n', '\ufeff# nothing\n'])
def test_an_empty_file_is_the_default(tmp_path, text):
    (tmp_path / 'empty.yaml').write_text(text, encoding='utf-8')
    assert load_config('empty.yaml') == Config()


@pytest.mark.parametrize(
    'text, words',
    [
        ('learning_rte: 1e-4', ['learning_rte', 'Unexpected']),
        ('num_epochs: 2.5', ['num_epochs', "'2.5'", 'integer']),
        ('num_epochs: true', ['num_epochs', "'true'", 'integer']),
        ('num_epochs:', ['num_epochs', "''", 'integer']),
        ('vae_slicing: perhaps', ['vae_slicing', "'perhaps'", 'boolean']),
        ('learning_rate: fast', ['learning_rate', "'fast'", 'number']),
        ('learning_rate: .nan', ['learning_rate', "'.nan'", 'number']),
        ('loss: hinge', ['loss', "'hinge'", "'clipped' or 'reinforce'"]),
        ('model: [tiny]', ['bad.yaml', 'model: [tiny]', 'one setting a line']),
        ('seed: -1', ['seed', "'-1'", 'greater than or equal to 0']),
        ('min_count: 99', ['min_count=99', 'buffer_size=16']),
        ('- a list', ['- a list', 'one setting a line', 'seed: 1']),
        ('seed: 1\nmodel: tiny\nseed: 2', ['line 3', 'seed: 2', 'each once']),
        ('seed: 1\n"seed": 1', ['line 2', 'each once']),
        ('? [a, b]\n: 1', ['? [a, b]', 'one setting a line']),
        ('seed: {a: 1}', ['seed: {a: 1}', 'one setting a line']),
        ('a: &a [x, x]\nb: &b [*a, *a]', ['a: &a [x, x]', 'one setting a line']),
        ('seed: 1\n---\nseed: 2', ['line 2', 'another document']),
        ('[' * 3000, ['bad.yaml', 'recursion']),
        ('#' * 100_001, ['bad.yaml', '100,000 bytes']),
        ('"just words"', ['"just words"', 'one setting a line']),
        ('a: b: c', ['bad.yaml', 'is not a YAML file']),
        ('model: "tiny', ['bad.yaml', 'is not a YAML file']),
    ],
)
def test_bad_files(tmp_path, text, words):
    (tmp_path / 'bad.yaml').write_text(text)
    with pytest.raises(ValueError) as error:
        load_config('bad.yaml')
    assert all(word in str(error.value) for word in words), error.value


def test_a_written_configuration_is_read_again(tmp_path):
    """Every setting differs from its default, and the texts are such that YAML could take for
    something else."""
    config = Config(
        model='owner/null',
        reward='module:no',
        prompts='1e3',
        template='{}: "ä", #1',
        out='off',
        seed=2**63 - 1,
        num_epochs=2,
        samples_per_epoch=33,
        num_inference_steps=3,
        guidance_scale=-0.0,
        eta=0.1,
        window_start=1,
        window_size=2,
        num_inner_epochs=2,
        updates_per_epoch=5,
        loss='reinforce',
        learning_rate=1e-7,
        weight_decay=0.0,
        max_grad_norm=1 / 3,
        clip_range=1e-4,
        adv_clip_max=5,
        group_size=3,
        shared_noise=True,
        buffer_size=7,
        min_count=2,
        lora_rank=4,
        device='cuda:1',
        dtype='bfloat16',
        sample_batch_size=5,
        minibatch_size=6,
        gradient_checkpointing=True,
        vae_slicing=True,
        reward_on_cpu=True,
        overlap_reward=True,
        eval_images=3,
        watch_images=0,
        checkpoint_every=4,
        keep_checkpoints=5,
        wandb='offline',
    )
    assert all(getattr(config, name) != getattr(Config(), name) for name in SETTINGS)
    write_config(config, tmp_path / 'config.yaml')
    assert load_config(tmp_path / 'config.yaml') == config
    assert list(read_config(tmp_path / 'config.yaml')) == SETTINGS


ROOMY = """a: &a [x, x, x, x, x, x, x, x, x]
b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]
c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]
"""


@pytest.mark.parametrize('last', ['seed: *c', '? *c\n: 1', '<<: *c', 'd: [*c, *c]'])
def test_nested_aliases_are_not_unfolded(tmp_path, last):
    "What is said stays short, whatever the few bytes would become."
    (tmp_path / 'roomy.yaml').write_text(ROOMY + last)
    with pytest.raises(ValueError, match='one setting a line') as caught:
        load_config('roomy.yaml')
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize('device', ['', 'cpu', 'cuda', 'cuda:1', 'mps'])
def test_devices(device):
    assert Config(device=device).device == device


@pytest.mark.parametrize('given', ['my/folder', './my/folder/', '~/my/folder', 'my.safetensors'])
def test_a_model_of_ones_own_is_found_from_everywhere(tmp_path, monkeypatch, given):
    "A name that means a folder here could mean somebody's model on the hub elsewhere."
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    (tmp_path / 'my' / 'folder').mkdir(parents=True)
    for file in ('my/folder/model_index.json', 'my.safetensors'):
        (tmp_path / file).write_text('{}')
    config = Config(model=given)
    write_config(config, tmp_path / 'config.yaml')
    monkeypatch.chdir('/')
    found = load_config(tmp_path / 'config.yaml').model
    assert found == config.model and Path(found).samefile(tmp_path / given.removeprefix('~/'))


@pytest.mark.parametrize('name', ['tiny', 'owner/name', 'CompVis/stable-diffusion-v1-4'])
def test_other_names_of_models_stay(name):
    assert Config(model=name).model == name


@pytest.mark.parametrize('count', [1, 10**6, 10**9])
def test_many_epochs(count):
    assert Config(num_epochs=count).sizes()['images'] == 64 * count


def test_help_of_a_configuration():
    "Every setting stands there with its meaning, once."
    for name in SETTINGS:
        (line,) = re.findall(rf'^    {name}: .*', Config.__doc__, re.MULTILINE)
        assert '  # ' in line or name == 'reward'
    assert 'or your own as module:name' in Config.__doc__


# what they come to


@pytest.mark.parametrize(
    'start, size, steps',
    [
        (0, 0, [0, 1, 2, 3, 4]),
        (2, 0, [2, 3, 4]),
        (0, 1, [0]),
        (1, 3, [1, 2, 3]),
        (4, 1, [4]),
    ],
)
def test_which_steps_are_random(start, size, steps):
    config = Config(
        num_inference_steps=5,
        window_start=start,
        window_size=size,
        eta=0.5,
        samples_per_epoch=10,
        updates_per_epoch=2,
    )
    sizes = config.sizes()
    assert list(config.random_steps) == steps
    assert config.etas == [0.5 if i in steps else 0.0 for i in range(5)]
    assert sizes['pairs_per_epoch'] == 10 * len(steps)
    assert sizes['pairs_per_update'] == 5 * len(steps)


def test_sizes_and_description():
    """By hand: 3 epochs of 10 images in 7 steps; twice round, 4 updates each; 17.5 pairs an update
    in minibatches of 8."""
    config = Config(
        num_epochs=3,
        samples_per_epoch=10,
        num_inference_steps=7,
        num_inner_epochs=2,
        updates_per_epoch=4,
        minibatch_size=8,
        lora_rank=4,
    )
    assert config.sizes() == dict(
        images=30, updates=24, pairs_per_epoch=70, samples_per_update=2.5, pairs_per_update=17.5
    )
    said = describe(config, ['an owl', 'a fox'])
    for words in (
        'a LoRA of rank 4 of tiny',
        "'aesthetic'",
        "2 prompts such as 'an owl'",
        '3 epochs of 10 images in groups of 1',
        '30 images in all. 7 steps each, 7 of them random',
        '8 updates an epoch, each over 2.5 images',
        '17.5 (image, step) pairs in 3 minibatches',
    ):
        assert words in said, words
    few = Config(samples_per_epoch=8, num_inference_steps=4)
    assert ' in 1 minibatch;' in describe(few, ['a cat'])


# what they name


@pytest.mark.parametrize(
    'name, count', [('simple', 45), ('tiny', 64), ('held-out', 19), ('imagenet', 398)]
)
def test_lists_of_prompts(name, count):
    plain = find_prompts(name)
    drawn = find_prompts(name, 'a drawing of {}')
    assert len(plain) == count and drawn == [f'a drawing of {prompt}' for prompt in plain]


def test_prompts_from_a_file(tmp_path):
    (tmp_path / 'mine.txt').write_text('# mine\na red cat\n\nüber\n', encoding='utf-8')
    assert find_prompts('mine.txt') == ['a red cat', 'über']


@pytest.mark.parametrize('on_cpu', [False, True])
@pytest.mark.parametrize('name', REWARDS)
def test_every_reward_can_be_loaded(name, on_cpu, monkeypatch):
    """For pictures of 64 pixels, with the one that needs a download replaced; two random pictures
    are scored."""
    monkeypatch.setattr(predictors, 'pick_score', lambda device: brightness)
    reward = predictors.find_reward(Config(reward=name, reward_on_cpu=on_cpu), 64, 'cpu')
    scores = reward(torch.rand(2, 3, 64, 64), ['a cat', 'a fox'])
    assert scores.shape == (2,) and scores.isfinite().all()


@pytest.mark.parametrize(
    'name, makers',
    [
        ('aesthetic', ['laion_aesthetic']),
        ('similarity', ['clip_similarity']),
        ('pickscore', ['pick_score']),
        ('alignment', ['laion_aesthetic', 'pick_score']),
    ],
)
def test_large_pictures_have_the_published_rewards(name, makers, monkeypatch):
    made = []
    for maker in ('laion_aesthetic', 'clip_similarity', 'pick_score'):

        def make(device, maker=maker):
            made.append(maker)
            return brightness

        monkeypatch.setattr(predictors, maker, make)
    predictors.find_reward(Config(reward=name), 512, 'cpu')
    assert made == makers
