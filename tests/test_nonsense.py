"""Nonsense is refused at once: the class of the error, and the words it must contain; the command says it in one sentence"""
import os

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from ddpo_tutorial.advantages import PerPromptStatTracker
from ddpo_tutorial.checkpoints import load_checkpoint, set_weights
from ddpo_tutorial.configs import RunConfig, find_prompts, find_reward, read_config
from ddpo_tutorial.pipelines import add_lora, contact_sheet, encode_prompts, load_pipeline
from ddpo_tutorial.ppo import ppo_loss
from ddpo_tutorial.prompts import draw_prompts, fill_template, read_prompts
from ddpo_tutorial.rewards import WeightedSum, jpeg_compressibility, laion_aesthetic, score
from ddpo_tutorial.runs import check_writable, main, resumed_config
from ddpo_tutorial.sampling import check_scheduler, make_schedule, rescore, sample
from ddpo_tutorial.training import TrainConfig, evaluate, new_state, train
from helpers import PROMPTS, SD_SCHEDULE, brightness, generator, micro_pipeline, sample_some

GOOD = DDIMScheduler(**SD_SCHEDULE)
GREY = torch.full((2, 3, 8, 8), .5)
TWO = ['a cat', 'a fox']
SETTINGS = dict(num_epochs=1, samples_per_epoch=2, num_inference_steps=2, updates_per_epoch=1)

def returns(value): return lambda images, prompts: value

def train_with(**changes): return train(TrainConfig(**SETTINGS | changes), micro_pipeline(), brightness, PROMPTS)

def train_on(reward=brightness, prompts=PROMPTS, pipe=None): return train(TrainConfig(**SETTINGS), pipe or micro_pipeline(), reward, prompts)

def frozen():
    pipe = micro_pipeline()
    pipe.unet.requires_grad_(False)
    return pipe

def rescore_without_randomness():
    pipe = micro_pipeline()
    context, trajectory, schedule = sample_some(pipe, eta=0.)
    return rescore(pipe, context, schedule, torch.zeros(5, dtype=torch.long), trajectory.latents[0], trajectory.latents[1])

def written(path, text):
    path.write_text(text)
    return str(path)

CALLS = { # what: (call, given a folder; error; words)
    'prompts: a string': (lambda f: encode_prompts(micro_pipeline(), 'a cat'), TypeError, ["'a cat'", 'list of strings']),
    'prompts: a number': (lambda f: encode_prompts(micro_pipeline(), ['a cat', 3]), TypeError, ['3', 'int', 'strings']),
    'prompts: none': (lambda f: encode_prompts(micro_pipeline(), []), ValueError, ['no prompts']),
    'prompts: none to draw from': (lambda f: draw_prompts([], 3, generator()), ValueError, ['no prompts', 'at least one']),
    'prompts: none drawn': (lambda f: draw_prompts(TWO, 0, generator()), ValueError, ['n=0', 'at least 1']),
    'prompts: unknown list': (lambda f: find_prompts('simpel'), FileNotFoundError, ["'simpel'", "Did you mean 'simple'"]),
    'prompts: missing file': (lambda f: read_prompts(f / 'absent.txt'), FileNotFoundError, ['absent.txt', 'one prompt a line']),
    'prompts: a folder': (lambda f: read_prompts(f), FileNotFoundError, ['expected a text file']),
    'prompts: empty file': (lambda f: read_prompts(written(f / 'empty.txt', '# nothing\n')), ValueError, ['empty.txt', 'no prompt']),
    'prompts: no text': (lambda f: ((f / 'a.txt').write_bytes(b'\xff\xfe\x00'), read_prompts(f / 'a.txt')), ValueError, ['a.txt', 'UTF-8']),
    'template: for a file': (lambda f: find_prompts(written(f / 'a.txt', 'a cat'), 'a photo of {}'), ValueError, ['a photo of {}', 'lists of animals']),
    'template: no place': (lambda f: fill_template(TWO, 'a photo'), ValueError, ["'a photo'", '{}']),
    'model: misspelt': (lambda f: load_pipeline('tinny'), ValueError, ["'tinny'", "'tiny'"]),
    'model: another folder': (lambda f: load_pipeline(f), ValueError, ['model_index.json']),
    'model: another class': (lambda f: (written(f / 'model_index.json', '{"_class_name": "StableDiffusionXLPipeline"}'), load_pipeline(f)), ValueError, ['StableDiffusionXLPipeline', 'not supported']),
    'model: half a folder': (lambda f: (written(f / 'model_index.json', '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'), load_pipeline(f)), ValueError, ['could not be loaded']),
    'model: offline': (lambda f: load_pipeline('owner/name'), ValueError, ["'owner/name'", 'HF_HUB_OFFLINE']),
    'LoRA: rank 0': (lambda f: add_lora(micro_pipeline(), 0), ValueError, ['rank=0', 'at least 1']),
    'LoRA: twice': (lambda f: add_lora(add_lora(micro_pipeline())), ValueError, ['carries a LoRA already']),
    'LoRA: unknown layer': (lambda f: add_lora(micro_pipeline(), targets=['to_x']), ValueError, ["'to_x'", 'to_q']),
    'sheet: no pictures': (lambda f: contact_sheet(GREY[:0]), ValueError, ['0 images', 'at least one']),
    'images: bytes': (lambda f: score(brightness, (GREY * 255).byte(), TWO), TypeError, ['uint8', '255']),
    'images: an array': (lambda f: score(brightness, np.zeros((2, 3, 8, 8)), TWO), TypeError, ['float tensor']),
    'images: channels last': (lambda f: score(brightness, GREY.permute(0, 2, 3, 1), TWO), ValueError, ['(2, 8, 8, 3)', '(B, 3, H, W)']),
    'images: from -1 to 1': (lambda f: score(brightness, GREY - 1, TWO), ValueError, ['-0.5', '[0, 1]']),
    'images: NaN': (lambda f: score(brightness, GREY * float('nan'), TWO), ValueError, ['nan', '[0, 1]']),
    'images: more than prompts': (lambda f: score(brightness, GREY, ['a cat']), ValueError, ['2 images and 1 prompts']),
    'reward: integers': (lambda f: score(returns(torch.ones(2, dtype=torch.long)), GREY, TWO), TypeError, ['int64', 'float']),
    'reward: nothing': (lambda f: score(returns(None), GREY, TWO), TypeError, ['NoneType', 'float tensor (2,)']),
    'reward: a list': (lambda f: score(returns([1., 2.]), GREY, TWO), TypeError, ['list', 'float tensor']),
    'reward: a column': (lambda f: score(returns(torch.ones(2, 1)), GREY, TWO), ValueError, ['(2, 1)', '(2,)']),
    'reward: NaN': (lambda f: score(returns(torch.tensor([1., float('nan')])), GREY, TWO), ValueError, ['nan', "'a fox'"]),
    'reward: infinite, in training': (lambda f: train_on(lambda i, p: brightness(i, p) / 0), ValueError, ['inf', 'a ']),
    'reward: a name that is taken': (lambda f: WeightedSum(mean=(1., brightness)), ValueError, ["'mean'", 'reward_mean']),
    'reward: no terms': (lambda f: WeightedSum(), ValueError, ['no terms']),
    'reward: unknown': (lambda f: find_reward('compresibility'), ValueError, ["'compresibility'", "Did you mean 'compressibility'"]),
    'reward: unknown module': (lambda f: find_reward('no_such_module:reward'), ValueError, ['no_such_module', 'module:name']),
    'reward: unknown name in a module': (lambda f: find_reward('json:reward'), ValueError, ['json:reward', 'reward']),
    'reward: not a function': (lambda f: find_reward('json:__name__'), ValueError, ['json:__name__', 'str', 'function']),
    'reward: JPEG of half a picture': (lambda f: score(jpeg_compressibility, GREY[:, :1], TWO), ValueError, ['(2, 1, 8, 8)']),
    'head: another file': (lambda f: laion_aesthetic('cpu', head=written(f / 'head.pth', 'not a head')), ValueError, ['not the published head', 'SHA-256']),
    'scheduler: another': (lambda f: check_scheduler(PNDMScheduler()), TypeError, ['PNDMScheduler', 'DDIMScheduler']),
    'scheduler: clips': (lambda f: check_scheduler(DDIMScheduler(**SD_SCHEDULE | dict(clip_sample=True))), ValueError, ['clip_sample=True']),
    'scheduler: linspace': (lambda f: check_scheduler(DDIMScheduler(**SD_SCHEDULE, timestep_spacing='linspace')), ValueError, ['linspace', 'leading']),
    'scheduler: unknown prediction': (lambda f: check_scheduler(DDIMScheduler(**SD_SCHEDULE, prediction_type='x')), ValueError, ["'x'", 'v_prediction']),
    'steps: none': (lambda f: make_schedule(GOOD, 0), ValueError, ['num_inference_steps=0', '1 to 1000']),
    'steps: too many': (lambda f: make_schedule(GOOD, 1001), ValueError, ['num_inference_steps=1001']),
    'steps: a fraction': (lambda f: make_schedule(GOOD, 2.5), ValueError, ['num_inference_steps=2.5']),
    'eta: negative': (lambda f: make_schedule(GOOD, 10, -.1), ValueError, ['eta=-0.1']),
    'eta: NaN': (lambda f: make_schedule(GOOD, 10, float('nan')), ValueError, ['eta=nan']),
    'latents: another shape': (lambda f: sample(micro_pipeline(), encode_prompts(micro_pipeline(), TWO), generator(), 2, latents=torch.zeros(3, 4, 8, 8)), ValueError, ['(3, 4, 8, 8)', 'a row for each prompt']),
    'rescoring without randomness': (lambda f: rescore_without_randomness(), ValueError, ['eta=0', 'eta > 0']),
    'tracker: no buffer': (lambda f: PerPromptStatTracker(0, 1), ValueError, ['buffer_size=0']),
    'tracker: can never be full': (lambda f: PerPromptStatTracker(4, 5), ValueError, ['min_count=5', 'buffer_size=4']),
    'tracker: a string': (lambda f: PerPromptStatTracker(4, 2).update('ab', [1., 2.]), TypeError, ["'ab'", 'list of strings']),
    'tracker: too few rewards': (lambda f: PerPromptStatTracker(4, 2).update(TWO, [1.]), ValueError, ['(1,)', '2 prompts']),
    'tracker: NaN': (lambda f: PerPromptStatTracker(4, 2).update(TWO, [1., float('nan')]), ValueError, ['nan', "'a fox'"]),
    'loss: other lengths': (lambda f: ppo_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2)), ValueError, ['one length', '(3,)']),
    'loss: clip range 0': (lambda f: ppo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), clip_range=0.), ValueError, ['clip_range=0.0', 'above 0']),
    'settings: words for a number': (lambda f: train_with(learning_rate='fast'), ValueError, ["learning_rate='fast'", 'a number above 0']),
    'settings: True for a number': (lambda f: train_with(num_epochs=True), ValueError, ['num_epochs=True', 'a whole number']),
    'settings: negative decay': (lambda f: train_with(weight_decay=-1.), ValueError, ['weight_decay=-1.0', 'at least 0']),
    'settings: NaN guidance': (lambda f: train_with(guidance_scale=float('nan')), ValueError, ['guidance_scale=nan']),
    'settings: negative seed': (lambda f: train_with(seed=-1), ValueError, ['seed=-1']),
    'settings: a word for a switch': (lambda f: train_with(overlap_reward='yes'), ValueError, ["overlap_reward='yes'", 'True or False']),
    'settings: more updates than samples': (lambda f: train_with(updates_per_epoch=3), ValueError, ['updates_per_epoch=3', 'samples_per_epoch=2']),
    'settings: no buffer': (lambda f: TrainConfig(buffer_size=None).check(), ValueError, ['buffer_size=None', 'a whole number']),
    'settings: a buffer too small': (lambda f: train_with(buffer_size=1), ValueError, ['min_count=8', 'buffer_size=1']),
    'settings: a number for a model': (lambda f: RunConfig(model=3).check(), ValueError, ['model=3', 'words']),
    'settings: rank -1': (lambda f: RunConfig(lora_rank=-1).check(), ValueError, ['lora_rank=-1', '0 for the whole UNet']),
    'training: nothing to train': (lambda f: train_on(pipe=frozen()), ValueError, ['asks for gradients', 'requires_grad_']),
    'training: prompts as a string': (lambda f: train_on(prompts='a cat'), TypeError, ["'a cat'"]),
    'training: reward not a function': (lambda f: train_on(reward=3), TypeError, ['int', 'function', 'reward(images, prompts)']),
    'evaluation: no prompts': (lambda f: evaluate(TrainConfig(), micro_pipeline(), brightness, []), ValueError, ['no prompts']),
    'config: neither name nor file': (lambda f: read_config('sd-lora'), ValueError, ["'sd-lora'", "Did you mean 'sd-lora-"]),
    'config: misspelt key': (lambda f: read_config(written(f / 'a.yaml', 'learning_rte: 1')), ValueError, ["'learning_rte'", "Did you mean 'learning_rate'"]),
    'config: key of nothing': (lambda f: read_config(written(f / 'a.yaml', 'zzz: 1')), ValueError, ["'zzz'", '--help']),
    'config: a list': (lambda f: read_config(written(f / 'a.yaml', '- 1')), ValueError, ['list', 'learning_rate: 5e-6']),
    'config: not YAML': (lambda f: read_config(written(f / 'a.yaml', 'a: b: c')), ValueError, ['not YAML']),
    'config: bytes': (lambda f: ((f / 'a.yaml').write_bytes(b'\xff\xfe\x00'), read_config(str(f / 'a.yaml'))), ValueError, ['not YAML']),
    'config: a word for a number': (lambda f: read_config(written(f / 'a.yaml', 'eta: often')), ValueError, ['eta', "'often'", 'float']),
    'config: code': (lambda f: read_config(written(f / 'a.yaml', 'model: !!python/object/apply:os.system [echo]')), ValueError, ['not YAML']),
    'resume: no run': (lambda f: resumed_config(str(f), {}), ValueError, ['is no run', 'config.json']),
    'resume: damaged settings': (lambda f: (written(f / 'config.json', '{"seed": '), resumed_config(str(f), {})), ValueError, ['is damaged', 'config.json']),
    'resume: settings that are none': (lambda f: (written(f / 'config.json', '[1]'), resumed_config(str(f), {})), ValueError, ['is damaged', 'list']),
    'resume: another seed': (lambda f: (written(f / 'config.json', '{"seed": 0}'), resumed_config(str(f), dict(seed=1))), ValueError, ['seed=1', 'another run']),
    'checkpoint: another model': (lambda f: set_weights(micro_pipeline(), {}), ValueError, ['another model']),
    'checkpoint: absent': (lambda f: load_checkpoint(f, micro_pipeline(), new_state(TrainConfig(), micro_pipeline())), ValueError, ['no whole checkpoint']),
    'out: under a file': (lambda f: check_writable((written(f / 'a', ''), f / 'a' / 'run')[1]), NotADirectoryError, ['is a file', 'another name']),
}

@pytest.mark.parametrize('what', CALLS)
def test_call(tmp_path, what):
    call, error, words = CALLS[what]
    with pytest.raises(error) as caught: call(tmp_path)
    assert type(caught.value) is error and all(w in str(caught.value) for w in words), repr(caught.value)

COMMANDS = { # arguments; words
    '--model tinny': ["'tinny'", "'tiny'"], '--model .': ['model_index.json'], '--model owner/name': ["'owner/name'", 'HF_HUB_OFFLINE'],
    '--reward beauty': ["'beauty'", 'aesthetic'], '--reward no_such_module:reward': ['no_such_module'], '--reward bad_reward:broken': ['bad_reward:broken', 'SyntaxError'], '--prompts anmals': ["'anmals'"],
    '--prompts empty.txt': ['empty.txt', 'no prompt'], '--template photo': ["'photo'", '{}'], '--eta 0': ['eta=0', 'above 0'], '--num_epochs 0': ['num_epochs=0', 'at least 1'],
    '--learning_rate nan': ['learning_rate=nan'], '--num_inference_steps 5000': ['num_inference_steps=5000', '1000'], '--updates_per_epoch 9 --samples_per_epoch 4': ['updates_per_epoch=9'],
    '--eval_images 0': ['eval_images=0'], '--watch_images -1': ['watch_images=-1'], '--config sd-lora': ["'sd-lora'", 'sd-lora-16gb'], '--config bad.yaml': ["'sede'", "'seed'"],
    '--resume nowhere': ["'nowhere' is no run"], '--wandb ofline': ["'ofline'", "'offline'"], '--lora_rank -1': ['lora_rank=-1'], '--checkpoint_every 0': ['checkpoint_every=0'],
    '--config tiny --resume here': ['exclude each other'], '--resume here --out there': ['exclude each other', 'its own folder'], '--resume=': ["'' is no run"], '--min_count 99': ['min_count=99', 'buffer_size=16'], '--out empty.txt/run': ['is a file'], '--seed -1': ['seed=-1'], '--out shut/run': ['may not be written'],
}

@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with a few bad files, where the command is run."
    monkeypatch.chdir(tmp_path)
    written(tmp_path / 'empty.txt', '# nothing\n'); written(tmp_path / 'bad.yaml', 'sede: 1\n'); written(tmp_path / 'bad_reward.py', 'def broken(:\n')
    (tmp_path / 'shut').mkdir(mode=0o500)
    if os.access(tmp_path / 'shut', os.W_OK): # for root every folder is open
        ask = os.access
        monkeypatch.setattr(os, 'access', lambda path, mode: not str(path).endswith('shut') and ask(path, mode))
    return tmp_path

@pytest.mark.parametrize('args', COMMANDS)
@pytest.mark.parametrize('dry', [[], ['--dry-run']])
def test_command(place, args, dry, capsys):
    "One sentence that names the value, exit code 2, no traceback, nothing written; also before a run is only planned."
    if dry and '--model owner/name' == args: pytest.skip('a hub id can be planned without its files')
    before = sorted(p.name for p in place.rglob('*') if '__pycache__' not in p.parts)
    assert main(args.split() + dry) == 2
    said = capsys.readouterr().err
    assert said.startswith('ddpo_train: ') and 'Traceback' not in said and all(w in said for w in COMMANDS[args]), said
    assert sorted(p.name for p in place.rglob('*') if '__pycache__' not in p.parts) == before

def test_debug_shows_the_traceback(place, capsys):
    assert main(['--eta', '0', '--debug']) == 2
    assert 'Traceback' in capsys.readouterr().err

@pytest.mark.parametrize('args, near', [(['--lerning_rate', '1'], '--learning_rate'), (['--resum', 'x'], '--resume'), (['--num-epoch', '3'], '--num')])
def test_unknown_option_names_the_near_one(args, near, capsys):
    with pytest.raises(SystemExit) as stop: main(args)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"Did you mean '{near}" in said and 'Traceback' not in said

def test_there_are_at_least_sixty(): assert len(CALLS) + len(COMMANDS) >= 60
