"""Nonsense is refused at once: the class of the error, and the words it must contain; the command names the value"""
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from pydantic import ValidationError

from ddpo_tutorial.advantages import PerPromptStatTracker, group_advantages
from ddpo_tutorial.checkpoints import set_weights
from ddpo_tutorial.configs import Config, check_same_run, find_prompts, main, read_command, read_config
from ddpo_tutorial.pipelines import add_lora, contact_sheet, encode_prompts, load_pipeline
from ddpo_tutorial.ppo import ppo_loss
from ddpo_tutorial.prompts import draw_prompts, fill_template, read_prompts
from ddpo_tutorial.rewards import WeightedSum, jpeg_compressibility, laion_aesthetic, score
from ddpo_tutorial.runs import make_folder, own_reward
from ddpo_tutorial.sampling import check_scheduler, make_generators, make_schedule, rescore, sample
from ddpo_tutorial.training import evaluate, train
from helpers import PROMPTS, SD_SCHEDULE, brightness, micro_pipeline, sample_some

GOOD = DDIMScheduler(**SD_SCHEDULE)
GREY = torch.full((2, 3, 8, 8), .5)
TWO = ['a cat', 'a fox']
SETTINGS = dict(num_epochs=1, samples_per_epoch=2, num_inference_steps=2, updates_per_epoch=1)

@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    "A folder with a few bad files, in which everything happens."
    monkeypatch.chdir(tmp_path)
    for name, text in {
            'empty.txt': '# nothing\n', 'words.txt': 'a cat\n', 'misspelt.yaml': 'sede: 1\n', 'list.yaml': '- 1\n',
            'broken.yaml': 'a: b: c\n', 'code.yaml': 'model: !!python/object/apply:os.system [echo]\n',
            'xl/model_index.json': '{"_class_name": "StableDiffusionXLPipeline"}',
            'half/model_index.json': '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}',
            'begun/config.yaml': 'seed: 0\n', 'damaged/config.yaml': 'seed: [\n', 'full/notes.txt': 'mine\n',
            'words.csv': 'prompt\na cat\n', 'syntax.py': 'def broken(:\n',
            'raises.py': 'def reward(images, prompts): return images.nothing\n'}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / 'bytes.txt').write_bytes(b'\xff\xfe\x00')
    return tmp_path

def listing(folder): return sorted(str(p) for p in folder.rglob('*') if '__pycache__' not in p.parts)

def returns(value): return lambda images, prompts: value

def settings(**changes): return Config(**SETTINGS | changes)

def train_on(reward=brightness, prompts=PROMPTS, pipe=None):
    return train(settings(), pipe or micro_pipeline(), reward, prompts)

def train_with_weights(prepare):
    pipe = micro_pipeline()
    prepare(pipe.unet)
    return train_on(pipe=pipe)

def sample_two(**changes):
    pipe = micro_pipeline()
    arguments = dict(generators=make_generators(range(2)), num_inference_steps=2, guidance_scale=2.) | changes
    return sample(pipe, encode_prompts(pipe, TWO), **arguments)

def rescore_without_randomness():
    pipe = micro_pipeline()
    context, trajectory, schedule = sample_some(pipe, eta=0.)
    x, steps = trajectory.latents, torch.zeros(len(PROMPTS), dtype=torch.long)
    return rescore(pipe, context, schedule, steps, x[0], x[1], guidance_scale=2.)

CALLS = { # what: (call; error; words)
    'prompts: a string': (lambda: encode_prompts(micro_pipeline(), 'a cat'), TypeError, ["'a cat'", 'list of strings']),
    'prompts: a number': (lambda: encode_prompts(micro_pipeline(), ['a cat', 3]), TypeError, ['3', 'int', 'strings']),
    'prompts: none': (lambda: encode_prompts(micro_pipeline(), []), ValueError, ['no prompts']),
    'prompts: none to draw from': (lambda: draw_prompts([], 3, np.random.default_rng()), ValueError, ['no prompts', 'at least one']),
    'prompts: none drawn': (lambda: draw_prompts(TWO, 0, np.random.default_rng()), ValueError, ['n=0', 'at least 1']),
    'prompts: unknown list': (lambda: find_prompts('simpel'), ValueError, ["'simpel'", 'simple, tiny']),
    'prompts: missing file': (lambda: read_prompts('absent.txt'), FileNotFoundError, ['absent.txt', 'one prompt a line']),
    'prompts: a folder': (lambda: read_prompts('.'), FileNotFoundError, ['expected a text file']),
    'prompts: empty file': (lambda: find_prompts('empty.txt'), ValueError, ['empty.txt', 'no prompt']),
    'prompts: no text': (lambda: find_prompts('bytes.txt'), ValueError, ['bytes.txt', 'UTF-8']),
    'template: for a file': (lambda: find_prompts('words.txt', 'a photo of {}'), ValueError, ['a photo of {}', 'lists of animals']),
    'template: no place': (lambda: fill_template(TWO, 'a photo'), ValueError, ["'a photo'", '{}']),
    'model: misspelt': (lambda: load_pipeline('tinny'), ValueError, ["'tinny'", "'tiny'"]),
    'model: another folder': (lambda: load_pipeline('.'), ValueError, ['model_index.json']),
    'model: another class': (lambda: load_pipeline('xl'), ValueError, ['StableDiffusionXLPipeline', 'expected a']),
    'model: half a folder': (lambda: load_pipeline('half'), ValueError, ['could not be loaded']),
    'model: offline': (lambda: load_pipeline('owner/name'), ValueError, ["'owner/name'", 'network']),
    'LoRA: rank 0': (lambda: add_lora(micro_pipeline(), 0), ValueError, ['positive', '0']),
    'LoRA: twice': (lambda: add_lora(add_lora(micro_pipeline())), ValueError, ['carries a LoRA already']),
    'LoRA: unknown layer': (lambda: add_lora(micro_pipeline(), targets=['to_x']), ValueError, ["'to_x'", 'to_q']),
    'sheet: no pictures': (lambda: contact_sheet(GREY[:0]), ValueError, ['0 images', 'at least one']),
    'images: bytes': (lambda: score(brightness, (GREY * 255).byte(), TWO), TypeError, ['uint8', 'float']),
    'images: an array': (lambda: score(brightness, np.zeros((2, 3, 8, 8)), TWO), TypeError, ['float']),
    'images: channels last': (lambda: score(brightness, GREY.permute(0, 2, 3, 1), TWO), ValueError, ['(2, 8, 8, 3)', '3, H, W)']),
    'images: from -1 to 1': (lambda: score(brightness, GREY - 1, TWO), ValueError, ['-0.5', '[0, 1]']),
    'images: NaN': (lambda: score(brightness, GREY * float('nan'), TWO), ValueError, ['finite']),
    'images: more than prompts': (lambda: score(brightness, GREY, ['a cat']), ValueError, ['(2, 3, 8, 8)', '1 prompts']),
    'reward: nothing': (lambda: score(returns(None), GREY, TWO), TypeError, ['NoneType', '2 numbers']),
    'reward: a column': (lambda: score(returns(torch.ones(2, 1)), GREY, TWO), ValueError, ['(2, 1)', '(2,)']),
    'reward: one number': (lambda: score(returns(torch.tensor(1.)), GREY, TWO), ValueError, ['()', '(2,)']),
    'reward: NaN': (lambda: score(returns(torch.tensor([1., float('nan')])), GREY, TWO), ValueError, ['nan', "'a fox'"]),
    'reward: infinite, in training': (lambda: train_on(lambda i, p: brightness(i, p) / 0), ValueError, ['inf', "'a"]),
    'reward: a name that is taken': (lambda: WeightedSum(mean=(1., brightness)), ValueError, ["'mean'", 'reward_mean']),
    'reward: no terms': (lambda: WeightedSum(), ValueError, ['no terms']),
    'reward: unknown module': (lambda: own_reward('no_such:reward'), ValueError, ['no_such', 'module:name']),
    'reward: unknown name in a module': (lambda: own_reward('json:reward'), ValueError, ['json:reward', 'AttributeError']),
    'reward: not a function': (lambda: own_reward('json:__name__'), ValueError, ['json:__name__', 'str', 'function']),
    'reward: raises': (lambda: own_reward('raises:reward'), ValueError, ['raises:reward', 'AttributeError', 'nothing']),
    'reward: JPEG of half a picture': (lambda: score(jpeg_compressibility, GREY[:, :1], TWO), ValueError, ['(2, 1, 8, 8)']),
    'head: another file': (lambda: laion_aesthetic('cpu', head='words.txt'), ValueError, ['not the published head', 'SHA-256']),
    'scheduler: another': (lambda: check_scheduler(PNDMScheduler()), TypeError, ['PNDMScheduler', 'DDIMScheduler']),
    'scheduler: clips': (lambda: check_scheduler(DDIMScheduler(**SD_SCHEDULE | dict(clip_sample=True))),
                         ValueError, ['clip_sample=True']),
    'scheduler: linspace': (lambda: check_scheduler(DDIMScheduler(**SD_SCHEDULE, timestep_spacing='linspace')),
                            ValueError, ['linspace', 'leading']),
    'scheduler: unknown prediction': (lambda: check_scheduler(DDIMScheduler(**SD_SCHEDULE, prediction_type='x')),
                                      ValueError, ["'x'", 'v_prediction']),
    'steps: none': (lambda: make_schedule(GOOD, 0), ValueError, ['num_inference_steps=0', '1 to 1000']),
    'steps: too many': (lambda: make_schedule(GOOD, 1001), ValueError, ['num_inference_steps=1001']),
    'steps: a fraction': (lambda: make_schedule(GOOD, 2.5), ValueError, ['num_inference_steps=2.5']),
    'eta: negative': (lambda: make_schedule(GOOD, 10, -.1), ValueError, ['eta=-0.1']),
    'eta: NaN': (lambda: make_schedule(GOOD, 10, float('nan')), ValueError, ['eta=nan']),
    'latents: another shape': (lambda: sample_two(latents=torch.zeros(3, 4, 8, 8)), ValueError, ['(3, 4, 8, 8)', 'each prompt']),
    'generators: too few': (lambda: sample_two(generators=make_generators(range(1))), ValueError, ['list of 2', 'make_generators']),
    'generators: only one': (lambda: sample_two(generators=torch.Generator()), ValueError, ['list of 2', 'make_generators']),
    'rescoring without randomness': (lambda: rescore_without_randomness(), ValueError, ['eta=0', 'eta > 0']),
    'tracker: no buffer': (lambda: PerPromptStatTracker(0, 1), ValueError, ['buffer_size=0']),
    'tracker: can never be full': (lambda: PerPromptStatTracker(4, 5), ValueError, ['min_count=5', 'buffer_size=4']),
    'tracker: a string': (lambda: PerPromptStatTracker(4, 2).update('ab', [1., 2.]), TypeError, ["'ab'", 'list']),
    'tracker: too few rewards': (lambda: PerPromptStatTracker(4, 2).update(TWO, [1.]), ValueError, ['(1,)', '2 prompts']),
    'tracker: NaN': (lambda: PerPromptStatTracker(4, 2).update(TWO, [1., float('nan')]), ValueError, ['nan', "'a fox'"]),
    'loss: other lengths': (lambda: ppo_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2), .1), ValueError, ['one length', '(3,)']),
    'loss: clip range 0': (lambda: ppo_loss(*torch.zeros(3, 2), clip_range=0.), ValueError, ['clip_range=0.0', 'above 0']),
    'settings: misspelt': (lambda: settings(sede=1), ValidationError, ['sede', 'Unexpected']),
    'settings: words for a number': (lambda: settings(learning_rate='fast'), ValidationError, ['learning_rate', "'fast'", 'number']),
    'settings: half a step': (lambda: settings(num_inference_steps=2.5), ValidationError, ['num_inference_steps', '2.5', 'integer']),
    'settings: too many steps': (lambda: settings(num_inference_steps=1001), ValidationError, ['num_inference_steps', '1001', '1000']),
    'settings: no steps': (lambda: settings(num_inference_steps=0), ValidationError, ['num_inference_steps', '0', '1']),
    'settings: no epochs': (lambda: settings(num_epochs=0), ValidationError, ['num_epochs', '0', 'greater than or equal to 1']),
    'settings: no randomness': (lambda: settings(eta=0), ValidationError, ['eta', '0', 'greater than 0']),
    'settings: too much randomness': (lambda: settings(eta=1.1), ValidationError, ['eta', '1.1', 'less than or equal to 1']),
    'settings: negative decay': (lambda: settings(weight_decay=-1.), ValidationError, ['weight_decay', '-1.0', 'equal to 0']),
    'settings: NaN guidance': (lambda: settings(guidance_scale=float('nan')), ValidationError, ['guidance_scale', 'nan', 'finite']),
    'settings: infinite learning rate': (lambda: settings(learning_rate=float('inf')), ValidationError, ['learning_rate', 'inf', 'finite']),
    'settings: no clip range': (lambda: settings(clip_range=0), ValidationError, ['clip_range', '0', 'greater than 0']),
    'settings: negative seed': (lambda: settings(seed=-1), ValidationError, ['seed', '-1', 'equal to 0']),
    'settings: a word for a switch': (lambda: settings(overlap_reward='maybe'), ValidationError, ['overlap_reward', "'maybe'", 'boolean']),
    'settings: no buffer': (lambda: settings(buffer_size=None), ValidationError, ['buffer_size', 'None', 'integer']),
    'settings: a buffer too small': (lambda: settings(buffer_size=1), ValidationError, ['min_count=8', 'buffer_size=1']),
    'settings: more updates than samples': (lambda: settings(updates_per_epoch=3), ValidationError,
                                            ['updates_per_epoch=3', 'samples_per_epoch=2']),
    'settings: groups that do not fit': (lambda: settings(group_size=3), ValidationError, ['group_size=3', 'samples_per_epoch=2']),
    'settings: no group to share with': (lambda: settings(shared_noise=True), ValidationError, ['shared_noise=True', 'group_size=1']),
    'settings: a window beyond the end': (lambda: settings(window_start=1, window_size=2), ValidationError,
                                          ['window_start=1', 'window_size=2', 'num_inference_steps=2']),
    'settings: a window after the end': (lambda: settings(window_start=2), ValidationError, ['window_start=2', 'num_inference_steps=2']),
    'groups: of one': (lambda: group_advantages(TWO, [1., 2.], 1), ValueError, ['size=1', 'at least 2']),
    'groups: that do not fit': (lambda: group_advantages(['a', 'a', 'a'], [1., 2., 3.], 2), ValueError, ['size=2', '3 prompts']),
    'groups: of different prompts': (lambda: group_advantages(TWO, [1., 2.], 2), ValueError, ['size=2', 'equal ones']),
    'eta: one too few': (lambda: make_schedule(GOOD, 3, [1., 0.]), ValueError, ['eta=[1.0, 0.0]', '3 such numbers']),
    'eta: one of them negative': (lambda: make_schedule(GOOD, 2, [1., -1.]), ValueError, ['eta=[1.0, -1.0]']),
    'settings: a number for a model': (lambda: settings(model=3), ValidationError, ['model', '3', 'string']),
    'settings: a folder that is no model': (lambda: settings(model='full'), ValidationError, ['model', "'full'", 'save_pretrained']),
    'settings: unknown reward': (lambda: settings(reward='beauty'), ValidationError, ["'beauty'", 'aesthetic', 'module:name']),
    'settings: unknown dtype': (lambda: settings(dtype='float64'), ValidationError, ['dtype', "'float64'", 'bfloat16']),
    'settings: rank -1': (lambda: settings(lora_rank=-1), ValidationError, ['lora_rank', '-1', 'equal to 0']),
    'settings: another seed than before': (lambda: check_same_run(settings(), settings(seed=1)), ValueError, ['seed=1', 'another run']),
    'training: nothing to train': (lambda: train_with_weights(lambda unet: unet.requires_grad_(False)), ValueError,
                                   ['none', 'float32', 'ask for gradients']),
    'training: weights in 16 bits': (lambda: train_with_weights(lambda unet: unet.bfloat16()), ValueError, ['bfloat16', 'float32', 'LoRA']),
    'training: prompts as a string': (lambda: train_on(prompts='a cat'), TypeError, ["'a cat'"]),
    'training: no prompts': (lambda: train_on(prompts=[]), ValueError, ['no prompts']),
    'training: reward not a function': (lambda: train_on(reward=3), TypeError, ['int', 'function', 'reward(images, prompts)']),
    'evaluation: no prompts': (lambda: evaluate(settings(), micro_pipeline(), brightness, []), ValueError, ['no prompts']),
    'file: neither name nor file': (lambda: read_config('sd-lora'), ValueError, ["'sd-lora'", 'sd-lora-16gb', 'YAML file']),
    'file: a folder': (lambda: read_config('full'), ValueError, ["'full'", 'YAML file']),
    'file: misspelt setting': (lambda: read_command(['--config', 'misspelt.yaml']), ValidationError, ['sede', 'Unexpected']),
    'file: a list': (lambda: read_config('list.yaml'), ValueError, ['list.yaml', "['1']", 'seed: 1']),
    'file: not YAML': (lambda: read_config('broken.yaml'), ValueError, ['broken.yaml', 'no YAML']),
    'file: bytes': (lambda: read_config('bytes.txt'), ValueError, ['bytes.txt', 'no YAML']),
    'file: code': (lambda: Config(**read_config('code.yaml')), ValidationError, ['model', "['echo']", 'string']),
    'resume: no run': (lambda: read_command(['--resume', 'full']), ValueError, ["'full' is no run", 'config.yaml']),
    'resume: damaged settings': (lambda: read_command(['--resume', 'damaged']), ValueError, ['damaged', 'no YAML']),
    'resume: another seed': (lambda: read_command(['--resume', 'begun', '--seed', '1']), ValueError, ['seed=1', 'another run']),
    'checkpoint: another model': (lambda: set_weights(micro_pipeline(), {}), ValueError, ['another model']),
    'out: under a file': (lambda: make_folder(Config(out='empty.txt/run')), ValueError, ['empty.txt', 'folder of a run']),
    'out: a file': (lambda: make_folder(Config(out='empty.txt')), ValueError, ['empty.txt', 'folder of a run']),
    'out: not empty': (lambda: make_folder(Config(out='full')), ValueError, ["'full'", 'written over', 'empty one']),
}

@pytest.mark.parametrize('what', CALLS)
def test_call(what):
    call, error, words = CALLS[what]
    with pytest.raises(error) as caught: call()
    assert type(caught.value) is error and all(w in str(caught.value) for w in words), repr(caught.value)

COMMANDS = { # arguments: words
    '--model half --config tiny': ["'half'", 'could not be loaded'], '--model xl --config tiny': ['StableDiffusionXLPipeline'],
    '--model owner/name': ["'owner/name'", '--config', 'sd-lora-16gb'], '--prompts words.csv': ['words.csv', 'one prompt a line'],
    '--export absent.pt': ['absent.pt', 'no checkpoint'],
    '--model tinny': ["'tinny'", "'tiny'"], '--model full': ["'full'", 'save_pretrained'], '--reward beauty': ["'beauty'", 'aesthetic'],
    '--reward no_such:reward': ['no_such'], '--reward syntax:broken': ['syntax:broken', 'SyntaxError'],
    '--reward raises:reward': ['raises:reward', 'AttributeError'], '--prompts anmals': ["'anmals'", 'simple'],
    '--prompts empty.txt': ['empty.txt', 'no prompt'], '--prompts bytes.txt': ['bytes.txt', 'UTF-8'],
    '--template photo': ["'photo'", '{}'], '--prompts words.txt --template a{}': ["'a{}'", 'words.txt'],
    '--eta 0': ['eta', 'greater than 0', 'input_value=0'], '--num-epochs 0': ['num_epochs', 'input_value=0'],
    '--num_epochs 2.5': ['--num-epochs', "'2.5'"], '--learning-rate nan': ['learning_rate', 'finite', 'nan'],
    '--learning-rate fast': ['--learning-rate', "'fast'"], '--num-inference-steps 5000': ['num_inference_steps', '5000', '1000'],
    '--updates-per-epoch 9 --samples-per-epoch 4': ['updates_per_epoch=9', 'samples_per_epoch=4'],
    '--eval-images 0': ['eval_images', 'input_value=0'], '--watch-images -1': ['watch_images', 'input_value=-1'],
    '--lora-rank -1': ['lora_rank', 'input_value=-1'], '--checkpoint-every 0': ['checkpoint_every', 'input_value=0'],
    '--min-count 99': ['min_count=99', 'buffer_size=16'], '--seed -1': ['seed', 'input_value=-1'], '--seed': ['--seed'],
    '--wandb ofline': ["'ofline'", "'offline'"], '--dtype half': ["'half'", "'float16'"], 'tiny': ['tiny'],
    '--lerning_rate 1': ['--lerning_rate', '--learning-rate'], '--resum x': ['--resum', '--resume'],
    '--num-epoch 3': ['--num-epoch', '--num-epochs'], '--config sd-lora': ["'sd-lora'", 'sd-lora-16gb'],
    '--config misspelt.yaml': ['sede', 'Unexpected'], '--config broken.yaml': ['broken.yaml', 'no YAML'],
    '--config list.yaml': ['list.yaml', 'seed: 1'], '--config': ['--config'], '--resume nowhere': ["'nowhere' is no run"],
    '--resume full': ["'full' is no run", 'config.yaml'], '--resume damaged': ['damaged', 'no YAML'],
    '--config tiny --resume begun': ['--config', '--resume', 'exclude each other'],
    '--resume begun --out there': ["out='there'", 'another run'], '--resume begun --seed 1': ['seed=1', 'another run'],
}
LATER = { # what is seen when a run begins, and not when it is planned
    '--model owner/name --config tiny': ["'owner/name'", 'network'], '--out empty.txt/run': ['empty.txt', 'folder of a run'],
    '--out full': ["'full'", 'written over'], '--resume begun': ['begun', 'prompts.json'],
}

def said_by(args, capsys):
    "Run a command that is refused: exit code 2, no traceback. Returns what it said, without frames."
    try: code = main(args)
    except SystemExit as stop: code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and 'Traceback' not in said, said
    return ' '.join(re.sub('[│╭╮╰╯─]', ' ', said).split())

@pytest.mark.parametrize('args', [*COMMANDS, *LATER])
def test_command(place, args, capsys):
    "What is wrong is named, and nothing is written."
    before = listing(place)
    said = said_by(args.split(), capsys)
    assert all(w in said for w in (COMMANDS | LATER)[args]), said
    assert listing(place) == before

@pytest.mark.parametrize('args', COMMANDS)
def test_plan(place, args, capsys):
    "A dry run refuses in the same words what a run refuses before it begins."
    said = said_by(['--dry-run', *args.split()], capsys)
    assert all(w in said for w in COMMANDS[args]), said

def test_debug_shows_the_traceback(capsys):
    assert main(['--reward', 'raises:reward', '--debug']) == 2
    assert 'Traceback' in capsys.readouterr().err
