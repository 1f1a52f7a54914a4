"""Nonsense is refused at once, by functions and by the command: the class of the error, and the
words it must contain.

Run: python -m pytest tests/test_nonsense.py -n 0
"""

import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from helpers import PROMPTS, SD_SCHEDULE, brightness, micro_pipeline, rescore_all, sample_some
from pydantic import ValidationError

from ddpo_tutorial.advantages import PerPromptStatTracker, group_advantages
from ddpo_tutorial.checkpoints import set_weights
from ddpo_tutorial.command import check_same_run, main, read_command
from ddpo_tutorial.configs import Config, load_config, read_config
from ddpo_tutorial.pipelines import add_lora, contact_sheet, encode_prompts, load_pipeline
from ddpo_tutorial.ppo import ppo_loss
from ddpo_tutorial.predictors import laion_aesthetic, own_reward
from ddpo_tutorial.prompts import draw_prompts, fill_template, find_prompts, read_prompts
from ddpo_tutorial.rewards import WeightedSum, jpeg_compressibility, score, score_terms
from ddpo_tutorial.runs import make_folder
from ddpo_tutorial.sampling import make_generators, make_policy, sample
from ddpo_tutorial.schedules import check_scheduler, make_schedule
from ddpo_tutorial.training import evaluate, train

GOOD = DDIMScheduler(**SD_SCHEDULE)
GREY = torch.full((2, 3, 8, 8), 0.5)
NAN = float('nan')
TWO = ['a cat', 'a fox']
SETTINGS = dict(num_epochs=1, samples_per_epoch=2, num_inference_steps=2, updates_per_epoch=1)
FILES = {
    'empty.txt': '# nothing\n',
    'words.txt': 'a cat\n',
    'words.csv': 'prompt\na cat\n',
    'misspelt.yaml': 'sede: 1\n',
    'list.yaml': '- 1\n',
    'broken.yaml': 'a: b: c\n',
    'code.yaml': 'model: !!python/object/apply:os.system [echo]\n',
    'xl/model_index.json': '{"_class_name": "StableDiffusionXLPipeline"}',
    'half/model_index.json': (
        '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    ),
    'begun/config.yaml': 'seed: 0\n',
    'damaged/config.yaml': 'seed: [\n',
    'full/notes.txt': 'mine\n',
    'syntax.py': 'def broken(:\n',
    'raises.py': 'def reward(images, prompts): return images.nothing\n',
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    "A folder with a few bad files, in which everything happens."
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / 'bytes.txt').write_bytes(b'\xff\xfe\x00')
    return tmp_path


def listing(folder):
    "Its files, without those that lock a run's folder for a moment."
    passing = {'__pycache__', 'run.lock'}
    return sorted(str(path) for path in folder.rglob('*') if not passing & set(path.parts))


def returns(value):
    return lambda images, prompts: value


def settings(**changes):
    return Config(**SETTINGS | changes)


def train_on(reward=brightness, prompts=PROMPTS, pipe=None):
    return train(settings(), pipe or micro_pipeline(), reward, prompts)


def train_with_weights(prepare):
    pipe = micro_pipeline()
    prepare(pipe.unet)
    return train_on(pipe=pipe)


def scheduler(**changes):
    return DDIMScheduler(**SD_SCHEDULE | changes)


def sample_two(generators=None, first=None):
    pipe = micro_pipeline()
    policy = make_policy(pipe, num_inference_steps=2, guidance_scale=2.0)
    return sample(policy, encode_prompts(pipe, TWO), generators or make_generators(range(2)), first)


def score_grey(reward=brightness, images=GREY, prompts=TWO):
    return score(reward, images, prompts)


def tracked(prompts, rewards):
    return PerPromptStatTracker(4, 2).update(prompts, rewards)


def draw(prompts, count):
    return draw_prompts(prompts, count, np.random.default_rng())


PROMPT_CALLS = {
    'a string': (
        lambda: encode_prompts(micro_pipeline(), 'a cat'),
        TypeError,
        ["'a cat'", 'expected a list'],
    ),
    'a number': (
        lambda: encode_prompts(micro_pipeline(), ['a cat', 3]),
        TypeError,
        ['3', 'int', 'strings'],
    ),
    'none': (lambda: encode_prompts(micro_pipeline(), []), ValueError, ['no prompts']),
    'none to draw from': (lambda: draw([], 3), ValueError, ['no prompts', 'at least one']),
    'none drawn': (lambda: draw(TWO, 0), ValueError, ['n=0', 'at least 1']),
    'unknown list': (lambda: find_prompts('simpel'), ValueError, ["'simpel'", 'simple, tiny']),
    'missing file': (
        lambda: read_prompts('absent.txt'),
        FileNotFoundError,
        ['absent.txt', 'check its name'],
    ),
    'a folder': (lambda: read_prompts('.'), FileNotFoundError, ['no prompt file']),
    'empty file': (lambda: find_prompts('empty.txt'), ValueError, ['empty.txt', 'no prompt']),
    'no text': (lambda: find_prompts('bytes.txt'), ValueError, ['bytes.txt', 'UTF-8']),
    'template for a file': (
        lambda: find_prompts('words.txt', 'a photo of {}'),
        ValueError,
        ['a photo of {}', 'is for lists', "'words.txt'"],
    ),
    'template without a place': (
        lambda: fill_template(TWO, 'a photo'),
        ValueError,
        ["'a photo'", '{}'],
    ),
}

MODEL_CALLS = {
    'misspelt': (lambda: load_pipeline('tinny'), ValueError, ["'tinny'", "'tiny'"]),
    'another folder': (lambda: load_pipeline('.'), ValueError, ['model_index.json']),
    'another class': (
        lambda: load_pipeline('xl'),
        ValueError,
        ['StableDiffusionXLPipeline', 'expected a'],
    ),
    'half a folder': (lambda: load_pipeline('half'), ValueError, ['could not be loaded']),
    'offline': (lambda: load_pipeline('owner/name'), ValueError, ["'owner/name'", 'network']),
    'LoRA of rank 0': (lambda: add_lora(micro_pipeline(), 0), ValueError, ['positive', '0']),
    'LoRA twice': (
        lambda: add_lora(add_lora(micro_pipeline())),
        ValueError,
        ['carries a LoRA already'],
    ),
    'LoRA of an unknown layer': (
        lambda: add_lora(micro_pipeline(), targets=['to_x']),
        ValueError,
        ["'to_x'", 'to_q'],
    ),
    'sheet without pictures': (
        lambda: contact_sheet(GREY[:0]),
        ValueError,
        ['0 images', 'at least one'],
    ),
    'checkpoint of another': (
        lambda: set_weights(micro_pipeline(), {}),
        ValueError,
        ['another model'],
    ),
}

IMAGE_CALLS = {
    'bytes': (
        lambda: score_grey(images=(GREY * 255).byte()),
        TypeError,
        ['uint8', 'floats', '255'],
    ),
    'an array': (lambda: score_grey(images=np.zeros((2, 3, 8, 8))), TypeError, ['float']),
    'channels last': (
        lambda: score_grey(images=GREY.permute(0, 2, 3, 1)),
        ValueError,
        ['(2, 8, 8, 3)', '3, H, W)'],
    ),
    'from -1 to 1': (lambda: score_grey(images=GREY - 1), ValueError, ['-0.5', '[0, 1]']),
    'NaN': (lambda: score_grey(images=GREY * NAN), ValueError, ['finite']),
    'more than prompts': (
        lambda: score_grey(prompts=['a cat']),
        ValueError,
        ['(2, 3, 8, 8)', '1 prompts'],
    ),
}

REWARD_CALLS = {
    'nothing': (lambda: score_grey(returns(None)), TypeError, ['NoneType', '2 numbers']),
    'a column': (
        lambda: score_grey(returns(torch.ones(2, 1))),
        ValueError,
        ['(2, 1)', '(2,)', 'squeeze'],
    ),
    'one number': (lambda: score_grey(returns(torch.tensor(1.0))), ValueError, ['()', '(2,)']),
    'NaN': (
        lambda: score_grey(returns(torch.tensor([1.0, NAN]))),
        ValueError,
        ['nan', "'a fox'"],
    ),
    'infinite, in training': (
        lambda: train_on(lambda images, prompts: brightness(images, prompts) / 0),
        ValueError,
        ['inf', "'a"],
    ),
    'a name that is taken': (
        lambda: score_terms(
            WeightedSum(mean=(1.0, brightness)), torch.rand(len(PROMPTS), 3, 8, 8), PROMPTS
        ),
        ValueError,
        ["'mean'", 'another metric'],
    ),
    'no terms': (lambda: WeightedSum(), ValueError, ['no terms']),
    'unknown module': (
        lambda: own_reward('no_such:reward'),
        ValueError,
        ['no_such', 'module:name'],
    ),
    'unknown name in a module': (
        lambda: own_reward('json:reward'),
        ValueError,
        ['json:reward', 'AttributeError'],
    ),
    'not a function': (
        lambda: own_reward('json:__name__'),
        ValueError,
        ['json:__name__', 'str', 'function'],
    ),
    'raises': (
        lambda: own_reward('raises:reward'),
        ValueError,
        ['raises:reward', 'AttributeError', 'nothing'],
    ),
    'JPEG of half a picture': (
        lambda: score_grey(jpeg_compressibility, GREY[:, :1]),
        ValueError,
        ['(2, 1, 8, 8)'],
    ),
    'head of another file': (
        lambda: laion_aesthetic('cpu', head='words.txt'),
        ValueError,
        ['not the published head', 'SHA-256'],
    ),
}

STEP_CALLS = {
    'another scheduler': (
        lambda: check_scheduler(PNDMScheduler()),
        TypeError,
        ['PNDMScheduler', 'DDIMScheduler'],
    ),
    'clips': (
        lambda: check_scheduler(scheduler(clip_sample=True)),
        ValueError,
        ['clip_sample=True'],
    ),
    'linspace': (
        lambda: check_scheduler(scheduler(timestep_spacing='linspace')),
        ValueError,
        ['linspace', 'leading'],
    ),
    'unknown prediction': (
        lambda: check_scheduler(scheduler(prediction_type='x')),
        ValueError,
        ["'x'", 'v_prediction'],
    ),
    'none': (lambda: make_schedule(GOOD, 0), ValueError, ['num_inference_steps=0', '1 to 1000']),
    'too many': (lambda: make_schedule(GOOD, 1001), ValueError, ['num_inference_steps=1001']),
    'a fraction': (lambda: make_schedule(GOOD, 2.5), ValueError, ['num_inference_steps=2.5']),
    'negative eta': (lambda: make_schedule(GOOD, 10, -0.1), ValueError, ['eta=-0.1']),
    'eta is NaN': (lambda: make_schedule(GOOD, 10, NAN), ValueError, ['eta=nan']),
    'one eta too few': (
        lambda: make_schedule(GOOD, 3, [1.0, 0.0]),
        ValueError,
        ['eta=[1.0, 0.0]', '3 such numbers'],
    ),
    'one eta negative': (
        lambda: make_schedule(GOOD, 2, [1.0, -1.0]),
        ValueError,
        ['eta=[1.0, -1.0]'],
    ),
    'first noise of another number': (
        lambda: sample_two(first=torch.zeros(3, 4, 8, 8)),
        ValueError,
        ['first holds 3', 'expected 2', 'one a prompt'],
    ),
    'too few generators': (
        lambda: sample_two(generators=make_generators(range(1))),
        ValueError,
        ['list of 2', 'make_generators'],
    ),
    'only one generator': (
        lambda: sample_two(generators=torch.Generator()),
        ValueError,
        ['list of 2', 'make_generators'],
    ),
    'rescoring without randomness': (
        lambda: rescore_all(*sample_some(micro_pipeline(), eta=0.0)),
        ValueError,
        ['eta=0', 'eta > 0'],
    ),
}

TRAINING_CALLS = {
    'no buffer': (lambda: PerPromptStatTracker(0, 1), ValueError, ['buffer_size=0']),
    'a buffer never full': (
        lambda: PerPromptStatTracker(4, 5),
        ValueError,
        ['min_count=5', 'buffer_size=4'],
    ),
    'advantages: prompts as a string': (
        lambda: tracked('ab', [1.0, 2.0]),
        TypeError,
        ["'ab'", 'list'],
    ),
    'advantages: too few rewards': (
        lambda: tracked(TWO, [1.0]),
        ValueError,
        ['(1,)', '2 prompts'],
    ),
    'advantages: NaN': (lambda: tracked(TWO, [1.0, NAN]), ValueError, ['nan', "'a fox'"]),
    'a group of one': (
        lambda: group_advantages(TWO, [1.0, 2.0], 1),
        ValueError,
        ['size=1', '2 or more'],
    ),
    'groups that do not fit': (
        lambda: group_advantages(['a'] * 3, [1.0, 2.0, 3.0], 2),
        ValueError,
        ['size=2', '3 prompts'],
    ),
    'groups of different prompts': (
        lambda: group_advantages(TWO, [1.0, 2.0], 2),
        ValueError,
        ['size=2', 'equal groups'],
    ),
    'loss: other lengths': (
        lambda: ppo_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2), 0.1),
        ValueError,
        ['one length', '(3,)'],
    ),
    'loss: clip range 0': (
        lambda: ppo_loss(*torch.zeros(3, 2), clip_range=0.0),
        ValueError,
        ['clip_range=0.0', 'above 0'],
    ),
    'nothing to train': (
        lambda: train_with_weights(lambda unet: unet.requires_grad_(False)),
        ValueError,
        ['none', 'float32', 'require gradients'],
    ),
    'weights in 16 bits': (
        lambda: train_with_weights(lambda unet: unet.bfloat16()),
        ValueError,
        ['bfloat16', 'float32', 'LoRA'],
    ),
    'prompts as a string': (lambda: train_on(prompts='a cat'), TypeError, ["'a cat'"]),
    'no prompts': (lambda: train_on(prompts=[]), ValueError, ['no prompts']),
    'reward not a function': (
        lambda: train_on(reward=3),
        TypeError,
        ['int', 'function', 'reward(images, prompts)'],
    ),
    'evaluation without prompts': (
        lambda: evaluate(settings(), micro_pipeline(), brightness, []),
        ValueError,
        ['no prompts'],
    ),
}

RUN_CALLS = {
    'neither name nor file': (
        lambda: read_config('sd-lora'),
        ValueError,
        ["'sd-lora'", 'sd-lora-16gb', 'YAML file'],
    ),
    'a folder': (lambda: read_config('full'), ValueError, ["'full'", 'YAML file']),
    'misspelt setting': (
        lambda: read_command(['--config', 'misspelt.yaml']),
        ValidationError,
        ['sede', 'Unexpected'],
    ),
    'a list': (lambda: read_config('list.yaml'), ValueError, ['list.yaml', '- 1', 'seed: 1']),
    'not YAML': (lambda: read_config('broken.yaml'), ValueError, ['broken.yaml', 'not a YAML']),
    'bytes': (lambda: read_config('bytes.txt'), ValueError, ['bytes.txt', 'not a YAML']),
    'code': (lambda: load_config('code.yaml'), ValueError, ['code.yaml', 'python', 'seed: 1']),
    'another seed than before': (
        lambda: check_same_run(settings(), settings(seed=1)),
        ValueError,
        ['seed=1', 'another run'],
    ),
    'resume: no run': (
        lambda: read_command(['--resume', 'full']),
        ValueError,
        ["'full' is no run", 'config.yaml'],
    ),
    'resume: damaged settings': (
        lambda: read_command(['--resume', 'damaged']),
        ValueError,
        ['damaged', 'not a YAML'],
    ),
    'resume: another seed': (
        lambda: read_command(['--resume', 'begun', '--seed', '1']),
        ValueError,
        ['seed=1', 'another run'],
    ),
    'out: under a file': (
        lambda: make_folder(Config(out='empty.txt/run')),
        ValueError,
        ['empty.txt', 'cannot be the folder of a run'],
    ),
    'out: a file': (
        lambda: make_folder(Config(out='empty.txt')),
        ValueError,
        ['empty.txt', 'cannot be the folder of a run'],
    ),
    'out: not empty': (
        lambda: make_folder(Config(out='full')),
        ValueError,
        ["'full'", 'written over', 'empty one'],
    ),
}

GROUPS = dict(
    prompts=PROMPT_CALLS,
    model=MODEL_CALLS,
    images=IMAGE_CALLS,
    reward=REWARD_CALLS,
    steps=STEP_CALLS,
    training=TRAINING_CALLS,
    run=RUN_CALLS,
)
CALLS = {
    f'{group}: {name}': call for group, calls in GROUPS.items() for name, call in calls.items()
}


@pytest.mark.parametrize('call, error, words', CALLS.values(), ids=CALLS)
def test_call(call, error, words):
    with pytest.raises(error) as caught:
        call()
    said = str(caught.value)
    assert type(caught.value) is error and all(word in said for word in words), said


VALUES = {  # what: (settings; words)
    'misspelt': (dict(sede=1), ['sede', 'Unexpected']),
    'words for a number': (dict(learning_rate='fast'), ['learning_rate', "'fast'", 'number']),
    'half a step': (dict(num_inference_steps=2.5), ['num_inference_steps', '2.5', 'integer']),
    'too many steps': (dict(num_inference_steps=1001), ['num_inference_steps', '1001', '1000']),
    'no steps': (dict(num_inference_steps=0), ['num_inference_steps', '0', '1']),
    'no epochs': (dict(num_epochs=0), ['num_epochs', '0', 'greater than or equal to 1']),
    'no randomness': (dict(eta=0), ['eta', '0', 'equal to 0.01']),
    'too little randomness': (dict(eta=1e-3), ['eta', '0.001', 'equal to 0.01']),
    'one picture': (dict(samples_per_epoch=1), ['samples_per_epoch', '1', 'equal to 2']),
    'more than will ever be': (dict(num_epochs=10**10), ['num_epochs', '1000000000']),
    'unknown device': (dict(device='gpu'), ['device', "'gpu'", 'cuda']),
    'too much randomness': (dict(eta=1.1), ['eta', '1.1', 'less than or equal to 1']),
    'negative decay': (dict(weight_decay=-1.0), ['weight_decay', '-1.0', 'equal to 0']),
    'NaN guidance': (dict(guidance_scale=NAN), ['guidance_scale', 'nan', 'finite']),
    'infinite learning rate': (
        dict(learning_rate=float('inf')),
        ['learning_rate', 'inf', 'finite'],
    ),
    'no clip range': (dict(clip_range=0), ['clip_range', '0', 'greater than 0']),
    'negative seed': (dict(seed=-1), ['seed', '-1', 'equal to 0']),
    'a word for a switch': (dict(overlap_reward='maybe'), ['overlap_reward', "'maybe'", 'boolean']),
    'no buffer': (dict(buffer_size=None), ['buffer_size', 'None', 'integer']),
    'a buffer too small': (dict(buffer_size=1), ['min_count=8', 'buffer_size=1']),
    'more updates than samples': (
        dict(updates_per_epoch=3),
        ['updates_per_epoch=3', 'samples_per_epoch=2'],
    ),
    'groups that do not fit': (dict(group_size=3), ['group_size=3', 'samples_per_epoch=2']),
    'no group to share with': (dict(shared_noise=True), ['shared_noise=True', 'group_size=1']),
    'a window beyond the end': (
        dict(window_start=1, window_size=2),
        ['window_start=1', 'window_size=2', 'num_inference_steps=2'],
    ),
    'a window after the end': (dict(window_start=2), ['window_start=2', 'num_inference_steps=2']),
    'a number for a model': (dict(model=3), ['model', '3', 'string']),
    'a folder that is no model': (dict(model='full'), ['model', "'full'", 'save_pretrained']),
    'unknown reward': (dict(reward='beauty'), ["'beauty'", 'aesthetic', 'module:name']),
    'unknown dtype': (dict(dtype='float64'), ['dtype', "'float64'", 'bfloat16']),
    'unknown loss': (dict(loss='hinge'), ['loss', "'hinge'", 'reinforce']),
    'rank -1': (dict(lora_rank=-1), ['lora_rank', '-1', 'equal to 0']),
}


@pytest.mark.parametrize('changes, words', VALUES.values(), ids=VALUES)
def test_settings(changes, words):
    with pytest.raises(ValidationError) as caught:
        settings(**changes)
    said = str(caught.value)
    assert all(word in said for word in words), said


COMMANDS = {  # arguments: words
    '--model half --config tiny': ["half'", 'could not be loaded'],
    '--model xl --config tiny': ['StableDiffusionXLPipeline'],
    '--model owner/name': ["'owner/name'", '--config', 'sd-lora-16gb'],
    '--model tinny': ["'tinny'", "'tiny'"],
    '--model full': ["'full'", 'save_pretrained'],
    '--export absent.pt': ['absent.pt', 'no checkpoint'],
    '--reward beauty': ["'beauty'", 'aesthetic'],
    '--reward no_such:reward': ['no_such'],
    '--prompts words.csv': ['words.csv', 'one prompt a line'],
    '--prompts anmals': ["'anmals'", 'simple'],
    '--prompts empty.txt': ['empty.txt', 'no prompt'],
    '--prompts bytes.txt': ['bytes.txt', 'UTF-8'],
    '--template photo': ["'photo'", '{}'],
    '--prompts words.txt --template a{}': ["'a{}'", 'words.txt'],
    '--eta 0': ['eta', 'equal to 0.01', 'input_value=0'],
    '--num-epochs 0': ['num_epochs', 'input_value=0'],
    '--num_epochs 2.5': ['--num-epochs', "'2.5'"],
    '--learning-rate nan': ['learning_rate', 'finite', 'nan'],
    '--learning-rate fast': ['--learning-rate', "'fast'"],
    '--num-inference-steps 5000': ['num_inference_steps', '5000', '1000'],
    '--updates-per-epoch 9 --samples-per-epoch 4': ['updates_per_epoch=9', 'samples_per_epoch=4'],
    '--eval-images 0': ['eval_images', 'input_value=0'],
    '--watch-images -1': ['watch_images', 'input_value=-1'],
    '--lora-rank -1': ['lora_rank', 'input_value=-1'],
    '--checkpoint-every 0': ['checkpoint_every', 'input_value=0'],
    '--min-count 99': ['min_count=99', 'buffer_size=16'],
    '--seed -1': ['seed', 'input_value=-1'],
    '--seed': ['--seed'],
    '--wandb ofline': ["'ofline'", "'offline'"],
    '--dtype half': ["'half'", "'float16'"],
    '--loss hinge': ["'hinge'", "'reinforce'"],
    'tiny': ['tiny'],
    '--lerning_rate 1': ['--lerning_rate', '--learning-rate'],
    '--resum x': ['--resum', '--resume'],
    '--num-epoch 3': ['--num-epoch', '--num-epochs'],
    '--config sd-lora': ["'sd-lora'", 'sd-lora-16gb'],
    '--config misspelt.yaml': ['sede', 'Unexpected'],
    '--config broken.yaml': ['broken.yaml', 'not a YAML'],
    '--config list.yaml': ['list.yaml', 'seed: 1'],
    '--config': ['--config', 'expected one argument'],
    '--config=': ['--config is empty', 'variable'],
    '--resume=': ['--resume is empty', 'variable'],
    '--export=': ['--export is empty', 'variable'],
    '--export': ['--export', 'expected one argument'],
    '--resume begun --export x.pt': ['--export', 'not allowed with', '--resume'],
    '--config tiny --export x.pt': ['--export', 'not allowed with', '--config'],
    '--device gpu': ['device', "'gpu'", 'cuda'],
    '--num-epochs 1000000000000000000': ['num_epochs', '1000000000'],
    '--samples-per-epoch 1': ['samples_per_epoch', 'input_value=1', '2'],
    '--resume nowhere': ["'nowhere' is no run"],
    '--resume full': ["'full' is no run", 'config.yaml'],
    '--resume damaged': ['damaged', 'not a YAML'],
    '--config tiny --resume begun': ['--config', '--resume', 'not allowed with'],
    '--resume begun --out there': ["out='there'", 'another run'],
    '--resume begun --seed 1': ['seed=1', 'another run'],
    '--resume begun --loss reinforce': ["loss='reinforce'", 'another run'],
}
LATER = {  # what is seen when a run begins, and not when it is planned
    '--model owner/name --config tiny': ["'owner/name'", 'network'],
    '--reward syntax:broken': ['syntax:broken', 'SyntaxError'],
    '--reward raises:reward': ['raises:reward', 'AttributeError'],
    '--out empty.txt/run': ['empty.txt', 'folder of a run'],
    '--out full': ["'full'", 'written over'],
    '--resume begun': ['begun', 'prompts.json'],
}


def said_by(args, capsys):
    "Run a command that is refused: exit code 2, no traceback. Returns what it said, unframed."
    code = main(args)
    said = capsys.readouterr().err
    assert code == 2 and 'Traceback' not in said, said
    return ' '.join(re.sub('[│╭╮╰╯─]', ' ', said).split())


@pytest.mark.parametrize('args', COMMANDS | LATER)
def test_command(place, args, capsys):
    "What is wrong is named, and nothing is written."
    before = listing(place)
    said = said_by(args.split(), capsys)
    assert all(word in said for word in (COMMANDS | LATER)[args]), said
    assert listing(place) == before


@pytest.mark.parametrize('args', COMMANDS)
def test_plan(args, capsys):
    "A dry run refuses in the same words what a run refuses before it begins."
    said = said_by(['--dry-run', *args.split()], capsys)
    assert all(word in said for word in COMMANDS[args]), said


def test_debug_shows_the_traceback(capsys):
    assert main(['--reward', 'raises:reward', '--debug']) == 2
    assert 'Traceback' in capsys.readouterr().err
