"""Settings from Python, files and the command line, what they come to, and how soon a wrong one is answered"""
import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from ddpo_tutorial import runs
from ddpo_tutorial.configs import (
    REWARDS, Config, check_same_run, describe, find_prompts, main, read_command, read_config, shipped_configs,
    write_config)
from helpers import brightness

SHIPPED = ['sd-alignment', 'sd-compressibility', 'sd-fast', 'sd-lora-16gb', 'sd-lora-8gb', 'sd-lora-published',
           'sd-original', 'smoke', 'tiny', 'tiny-original']
SETTINGS = [f.name for f in fields(Config)]

@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Every test in an empty folder."
    monkeypatch.chdir(tmp_path)

def read(path): return Config(**read_config(path))

def test_the_shipped_ones_are_there(): assert sorted(shipped_configs()) == SHIPPED

@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_ones_are_valid_and_can_be_planned(tmp_path, name, capsys):
    "A dry run says what would be done, in the form of a configuration, and writes nothing."
    assert main(['--config', name, '--dry-run']) == 0
    settings, _, sizes = capsys.readouterr().out.rpartition('\n\n')
    assert 'images in all' in sizes and list(tmp_path.iterdir()) == []
    (tmp_path / 'shown.yaml').write_text(settings)
    assert read(tmp_path / 'shown.yaml') == read(name)

def test_the_command_starts_from_tiny_and_config_is_the_original():
    assert read_command([]).settings == read('tiny') and read('tiny-original') == Config() != read('tiny')

def forwards(config):
    "Of an epoch: a backward pass counts as two forward passes, guidance doubles."
    return 2 * config.samples_per_epoch * (config.num_inference_steps + 3 * len(config.random_steps))

def test_what_the_configurations_for_stable_diffusion_are_said_to_cost():
    lesson = (Path(__file__).parents[1] / 'nbs' / '16_stable_diffusion.ipynb').read_text(encoding='utf-8')
    fast, published = read('sd-fast'), read('sd-lora-published')
    assert f'= {forwards(fast):,} forward' in lesson and f'= {forwards(published):,}.' in lesson
    total = f'{fast.num_epochs * forwards(fast):,} forward passes'
    assert total in lesson and total in shipped_configs()['sd-fast'].read_text(encoding='utf-8')
    for name in ('sd-lora-16gb', 'sd-lora-8gb', 'sd-alignment', 'sd-compressibility'): assert forwards(read(name)) == forwards(fast)

def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    (tmp_path / 'my.yaml').write_text('learning_rate: 5e-6\nnum_epochs: 7\nvae_slicing: true\n')
    command = read_command(['--config', 'my.yaml', '--num-epochs', '9', '--no-vae-slicing'])
    assert command.settings == Config(learning_rate=5e-6, num_epochs=9)
    assert (command.config, command.resume, command.dry_run, command.debug) == ('my.yaml', '', False, False)

@pytest.mark.parametrize('args', ['--samples_per_epoch 8', '--samples-per-epoch 8', '--samples-per-epoch=8'])
def test_dashes_and_underscores(args): assert read_command(args.split()).settings == replace(read('tiny'), samples_per_epoch=8)

@pytest.mark.parametrize('line, wanted', [
    ('learning_rate: 5e-6', 5e-6), ('guidance_scale: 5', 5.), ('num_epochs: 3', 3), ('vae_slicing: true', True),
    ('vae_slicing: off', False), ('wandb: off', 'off'), ('template: no {}', 'no {}'), ('out: 007', '007')])
def test_what_a_line_of_yaml_means(tmp_path, line, wanted):
    "YAML alone would read 5e-6 as a text, and `off` as False."
    (tmp_path / 'my.yaml').write_text(line)
    got = getattr(read(tmp_path / 'my.yaml'), line.partition(':')[0])
    assert got == wanted and type(got) is type(wanted)

@pytest.mark.parametrize('text', ['', '# nothing\n', '\ufeff# nothing\n'])
def test_an_empty_file_is_the_default(tmp_path, text):
    (tmp_path / 'empty.yaml').write_text(text, encoding='utf-8')
    assert read(tmp_path / 'empty.yaml') == Config()

@pytest.mark.parametrize('text, words', [
    ('learning_rte: 1e-4', ['learning_rte', 'Unexpected']), ('num_epochs: 2.5', ['num_epochs', "'2.5'", 'integer']),
    ('num_epochs: true', ['num_epochs', "'true'", 'integer']), ('num_epochs:', ['num_epochs', "''", 'integer']),
    ('vae_slicing: perhaps', ['vae_slicing', "'perhaps'", 'boolean']), ('learning_rate: fast', ['learning_rate', "'fast'", 'number']),
    ('learning_rate: .nan', ['learning_rate', "'.nan'", 'number']), ('model: [tiny]', ['model', "['tiny']", 'string']),
    ('seed: -1', ['seed', "'-1'", 'greater than or equal to 0']), ('min_count: 99', ['min_count=99', 'buffer_size=16']),
    ('- a list', ["['a list']", 'one setting a line', 'seed: 1']), ('"just words"', ["'just words'", 'one setting a line']),
    ('a: b: c', ['is no YAML file']), ('model: "tiny', ['is no YAML file'])])
def test_bad_files(tmp_path, text, words):
    (tmp_path / 'bad.yaml').write_text(text)
    with pytest.raises(ValueError) as error: read(tmp_path / 'bad.yaml')
    assert all(w in str(error.value) for w in words), error.value

def test_a_written_configuration_is_read_again(tmp_path):
    "Every setting differs from its default, and the texts are such that YAML could take for something else."
    config = Config(
        model='owner/null', reward='module:no', prompts='1e3', template='{}: "ä", #1', out='off', seed=2**63 - 1,
        num_epochs=2, samples_per_epoch=33, num_inference_steps=3, guidance_scale=-0., eta=1e-9, num_inner_epochs=2,
        window_start=1, window_size=2, group_size=3, shared_noise=True,
        updates_per_epoch=5, learning_rate=1e-7, weight_decay=0., max_grad_norm=1 / 3, clip_range=1e-4, adv_clip_max=5,
        buffer_size=7, min_count=2, lora_rank=4, dtype='bfloat16', sample_batch_size=5, minibatch_size=6,
        gradient_checkpointing=True, vae_slicing=True, reward_on_cpu=True, overlap_reward=True, eval_images=3,
        watch_images=0, checkpoint_every=4, keep_checkpoints=5, wandb='offline')
    assert all(getattr(config, name) != getattr(Config(), name) for name in SETTINGS)
    write_config(config, tmp_path / 'config.yaml')
    assert read(tmp_path / 'config.yaml') == config
    assert list(read_config(tmp_path / 'config.yaml')) == SETTINGS

@pytest.mark.parametrize('start, size, steps', [(0, 0, [0, 1, 2, 3, 4]), (2, 0, [2, 3, 4]), (0, 1, [0]), (1, 3, [1, 2, 3]), (4, 1, [4])])
def test_which_steps_are_random(start, size, steps):
    config = Config(num_inference_steps=5, window_start=start, window_size=size, eta=.5, samples_per_epoch=10, updates_per_epoch=2)
    assert list(config.random_steps) == steps and config.etas == [.5 if i in steps else 0. for i in range(5)]
    assert config.sizes()['pairs_per_epoch'] == 10 * len(steps) and config.sizes()['pairs_per_update'] == 5 * len(steps)

def another(name, value):
    "A valid value of a setting that is not the one it has."
    words = dict(model='owner/name', reward='similarity', prompts='tiny', template='a photo of {}', out='there',
                 dtype='float32', wandb='offline')
    if name in words: return words[name]
    if isinstance(value, bool): return not value
    if name == 'group_size': return 4
    if name == 'samples_per_epoch': return 32
    return value + 1 if isinstance(value, int) else value / 2

def refuses(name):
    "Does a change of this setting make it another run? The message then names the setting and both values."
    begun = Config(group_size=2) # so that noise can be shared
    wanted = replace(begun, **{name: another(name, getattr(begun, name))})
    try: check_same_run(begun, wanted)
    except ValueError as error:
        assert f'{name}={getattr(wanted, name)!r}' in str(error) and repr(getattr(begun, name)) in str(error)
        return True
    return False

def test_what_may_change_when_a_run_goes_on():
    "The number of epochs, what is recorded, and what only memory and time depend on."
    may = {'num_epochs', 'checkpoint_every', 'keep_checkpoints', 'watch_images', 'wandb', 'sample_batch_size',
           'minibatch_size', 'gradient_checkpointing', 'vae_slicing', 'reward_on_cpu', 'overlap_reward'}
    assert {name for name in SETTINGS if not refuses(name)} == may
    check_same_run(Config(), Config())

def test_a_resumed_run_keeps_its_settings(tmp_path):
    write_config(Config(seed=5, num_epochs=3), tmp_path / 'config.yaml')
    command = read_command(['--resume', str(tmp_path), '--num-epochs', '9'])
    assert command.settings == Config(seed=5, num_epochs=9) and command.resume == str(tmp_path)
    with pytest.raises(ValueError, match='seed=1 .* 5'): read_command(['--resume', str(tmp_path), '--seed', '1'])

def test_sizes_and_description():
    "By hand: 3 epochs of 10 images in 7 steps; twice round, 4 updates each; 17.5 pairs an update in minibatches of 8."
    config = Config(num_epochs=3, samples_per_epoch=10, num_inference_steps=7, num_inner_epochs=2, updates_per_epoch=4,
                    minibatch_size=8, lora_rank=4)
    assert config.sizes() == dict(
        images=30, updates=24, pairs_per_epoch=70, samples_per_update=2.5, pairs_per_update=17.5)
    said = describe(config, ['an owl', 'a fox'])
    for words in ('a LoRA of rank 4 of tiny', "'aesthetic'", "2 prompts such as 'an owl'", '3 epochs of 10 images in groups of 1',
                  '30 images in all. 7 steps each, 7 of them random',
                  '8 updates an epoch, each over 2.5 images', '17.5 (image, step) pairs in 3 minibatches'):
        assert words in said, words
    assert ' in 1 minibatch;' in describe(Config(samples_per_epoch=8, num_inference_steps=4), ['a cat'])

@pytest.mark.parametrize('name, count', [('simple', 45), ('tiny', 64), ('held-out', 19), ('imagenet', 398)])
def test_lists_of_prompts(name, count):
    plain, drawn = find_prompts(name), find_prompts(name, 'a drawing of {}')
    assert len(plain) == count and drawn == [f'a drawing of {prompt}' for prompt in plain]

def test_prompts_from_a_file(tmp_path):
    (tmp_path / 'mine.txt').write_text('# mine\na red cat\n\nüber\n', encoding='utf-8')
    assert find_prompts('mine.txt') == ['a red cat', 'über']

def test_help_has_every_setting_its_meaning_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop: main(['--help'])
    assert stop.value.code == 0
    said = ' '.join(re.sub('[│╭╮╰╯─]', ' ', capsys.readouterr().out).split())
    meanings = dict(re.findall(r'^    (\w+): .* # (.*)$', inspect.getsource(Config), re.M))
    assert list(meanings) == SETTINGS
    for name, meaning in meanings.items():
        default = getattr(read('tiny'), name)
        shown = repr(default) if default in ('', '{}') else str(default)
        option = '--' + name.replace('_', '-')
        assert re.search(f'{option}[ ,].*? {re.escape(meaning)} \\(default: {re.escape(shown)}\\)', said), name
    for option in ('--config', '--resume', '--dry-run', '--debug'): assert option in said

@pytest.mark.parametrize('name', REWARDS)
def test_every_reward_can_be_loaded(name, monkeypatch):
    "For pictures of 64 pixels, with the one that needs a download replaced; two random pictures are scored."
    monkeypatch.setattr(runs, 'pick_score', lambda device: brightness)
    reward = runs.load_reward(Config(reward=name), 64, 'cpu')
    scores = reward(torch.rand(2, 3, 64, 64), ['a cat', 'a fox'])
    assert scores.shape == (2,) and scores.isfinite().all()

@pytest.mark.parametrize('name, makers', [
    ('aesthetic', ['laion_aesthetic']), ('similarity', ['clip_similarity']), ('pickscore', ['pick_score']),
    ('alignment', ['laion_aesthetic', 'pick_score'])])
def test_large_pictures_have_the_published_rewards(name, makers, monkeypatch):
    made = []
    for maker in ('laion_aesthetic', 'clip_similarity', 'pick_score'):
        monkeypatch.setattr(runs, maker, lambda device, maker=maker: made.append(maker) or brightness)
    runs.load_reward(Config(reward=name), 512, 'cpu')
    assert made == makers

def answer(*args):
    """Run the command in a fresh process, and print its CPU seconds.
    Returns its exit code, which of the large libraries it imported, and what it said."""
    code = '''if True:
        import sys, time
        from ddpo_tutorial.configs import main
        try: code = main(sys.argv[1:])
        except SystemExit as stop: code = stop.code
        large = [name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules]
        print('\\nleaves', code or 0, time.process_time(), *large)'''
    done = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, encoding='utf-8',
                          env=os.environ | dict(PYTHONIOENCODING='utf-8'))
    said, _, last = done.stdout.rpartition('\nleaves ')
    assert last, done.stderr
    number, seconds, *large = last.split()
    print(f'{" ".join(args)}: {float(seconds):.2f} s of CPU')
    return int(number), large, said + done.stderr

@pytest.mark.parametrize('args, number, word', [
    ('--help', 0, '--learning-rate'), ('--lerning-rate 1', 2, '--learning-rate'), ('--learning-rate fast', 2, 'fast'),
    ('--eta 0', 2, 'eta'), ('--config nope', 2, 'nope'), ('--model tinny', 2, 'tinny'), ('--reward beauty', 2, 'beauty'),
    ('--prompts anmals', 2, 'anmals'), ('--resume nowhere', 2, 'nowhere')])
def test_a_first_answer_comes_at_once(args, number, word):
    "Help and mistakes are answered without PyTorch, whose import takes seconds."
    code, large, said = answer(*args.split())
    assert (code, large) == (number, []) and word in said
