"""Whole runs on a CUDA card that is not there (fake_cuda.py), and the faults that it would show

Run: python -m pytest tests/test_fake_cuda.py -n 0 --slow
"""

import json
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from unittest.mock import patch

import pytest
import torch
from accelerate import PartialState
from diffusers import StableDiffusionPipeline
from fake_cuda import Card, card
from helpers import PROMPTS, brightness, micro_pipeline, sample_some, weights
from test_stable_diffusion import SMALL

from ddpo_tutorial import runs
from ddpo_tutorial.pipelines import has_lora, prepare_pipeline, product_dtype
from ddpo_tutorial.predictors import call_reward
from ddpo_tutorial.training import evaluate, new_state, train, train_epochs

LESSON = Path(__file__).parents[1] / 'nbs' / '06_stable_diffusion.ipynb'
RUN = replace(SMALL, num_epochs=2, num_inference_steps=2, eval_images=2, watch_images=0)
LORA, GROUPS = dict(lora_rank=4), dict(group_size=2, shared_noise=True)
WINDOW, UNGUIDED = dict(window_size=1), dict(guidance_scale=1.0)
THRIFTY = dict(gradient_checkpointing=True, vae_slicing=True, minibatch_size=2)
AWAY = dict(reward_on_cpu=True)
COMBINATIONS = [
    dict(dtype='float32', reward='alignment') | THRIFTY,
    dict(dtype='float32', reward='compressibility') | LORA | GROUPS,
    dict(dtype='float32', loss='reinforce') | UNGUIDED | WINDOW,
    dict(dtype='bfloat16', reward='similarity') | WINDOW,
    dict(dtype='bfloat16', reward='aesthetic') | AWAY | THRIFTY | GROUPS,
    dict(dtype='bfloat16', sample_batch_size=2) | LORA,
    dict(dtype='bfloat16', reward='alignment') | AWAY | LORA | THRIFTY | UNGUIDED,
    dict(dtype='float16', reward='compressibility') | UNGUIDED | GROUPS,
    dict(dtype='float16', reward='alignment', loss='reinforce') | THRIFTY,
    dict(dtype='float16', reward='aesthetic') | AWAY | LORA | GROUPS | WINDOW,
    dict(dtype='auto', reward='alignment', num_inner_epochs=2),
    dict(dtype='auto', bfloat16=False) | WINDOW,
    dict(dtype='auto', reward='aesthetic') | LORA | THRIFTY | GROUPS | WINDOW,
    dict(dtype='auto', bfloat16=False) | AWAY | LORA | THRIFTY | UNGUIDED,
]
there_is_one = pytest.mark.skipif(torch.cuda.is_available(), reason='tests/bench/gpu.py takes it')
pytestmark = [pytest.mark.slow, there_is_one]


@pytest.fixture(autouse=True)
def new_process():
    "accelerate remembers a device for the whole process."
    PartialState._reset_state()
    yield
    PartialState._reset_state()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('micro')
    micro_pipeline().save_pretrained(path)
    return path


def on_card():
    return prepare_pipeline(micro_pipeline(), 'cuda', torch.float32)


def whole_run(folder, out, **changes):  # Run, and the Batch before
    "Train for an epoch, resume to the end, save; then all must be in its place."
    config = replace(RUN, model=str(folder), out=str(out), **changes)
    runs.train_run(replace(config, num_epochs=1))
    with patch.object(runs, 'write_results', wraps=runs.write_results) as written:
        runs.train_run(config, resume=out)
    run, before = written.call_args.args
    check_places(run, before)
    return run, before


def check_places(run, before):
    "Networks and moments on the card, pictures not; and what is computed in which dtype."
    pipe, state, dtype = run.pipe, run.state, product_dtype(run.config, 'cuda')
    parameters = [p for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()]
    frozen = dtype if has_lora(pipe) else torch.float32
    moments = [moment['exp_avg'] for moment in state.optimizer.state.values()]
    assert moments and all(isinstance(x, Card) for x in parameters + moments)
    assert {p.dtype for p in parameters if not p.requires_grad} == {frozen}
    assert {moment.dtype for moment in moments} == {torch.float32}, 'moments in 16 bits'
    assert state.scaler.is_enabled() == (dtype == torch.float16), 'a scaler where it should not be'
    assert not isinstance(before.images, Card), 'pictures on the card'
    products = []
    hook = pipe.unet.conv_out.register_forward_hook(lambda *call: products.append(call[2].dtype))
    run.evaluate(1)
    hook.remove()
    assert set(products) == {dtype}, 'products in another dtype'
    assert [row['epoch'] for row in state.rows] == [0, 1]


def drawn_by_others(run, folder):
    "What plain diffusers loads of the files that were written, and draws."
    lora, saved = run.folder / 'lora', run.folder / 'pipeline'
    source = folder if has_lora(run.pipe) else saved
    pipe = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    if has_lora(run.pipe):
        pipe.load_lora_weights(lora)
    prepare_pipeline(pipe, 'cuda', run.pipe.vae.dtype)
    return evaluate(run.config, pipe, brightness, run.prompts[:2]).images


@pytest.mark.parametrize('changes', COMBINATIONS, ids=lambda c: ' '.join(map(str, c.values())))
def test_a_whole_run(changes, folder, tmp_path):
    "Its saved files draw what the trained model draws, and not what it drew before."
    changes = dict(changes)
    with card(changes.pop('bfloat16', True)):
        run, before = whole_run(folder, tmp_path / 'run', **changes)
        after = run.evaluate(2).images
        loaded = drawn_by_others(run, folder)
    moved = (after - before.images).abs().mean()
    assert moved > 1e-3 and (loaded - after).abs().mean() < 0.1 * moved


def test_the_card_computes_what_the_cpu_computes():
    "So that what it shows is the package's: a chain, and the gradient of the first update."
    config = replace(SMALL, updates_per_epoch=1)
    _, here = sample_some(micro_pipeline())
    (row,) = train(config, micro_pipeline(), brightness, PROMPTS)
    with card():
        _, there = sample_some(on_card())
        (found,) = train(config, on_card(), brightness, PROMPTS)
    assert there.latents.device.type == 'cuda'
    torch.testing.assert_close(there.latents.value, here.latents, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(there.log_probs.value, here.log_probs, rtol=1e-3, atol=1e-3)
    assert found['grad_norm'] == pytest.approx(row['grad_norm'], rel=1e-2)


def test_an_update_that_overflows_in_float16_is_left_out():
    "No weight changes, and the scale is halved for the next."
    config = replace(SMALL, dtype='float16')
    with card():
        pipe = on_card()
        state, before = new_state(config, pipe), weights(pipe.unet)
        state.scaler = torch.amp.GradScaler('cuda', init_scale=2.0**40)
        epoch = next(train_epochs(config, pipe, brightness, PROMPTS, state=state))
        assert torch.equal(weights(pipe.unet), before)
    assert state.scaler.get_scale() == 2.0 ** (40 - config.updates_per_epoch)
    assert not epoch.row['grad_norm'] < float('inf')


# faults: each takes the place of `old`, with its arguments


def moments_left(old, optimizer, packed):
    "As if `load_state_dict` moved nothing."
    optimizer.state.update(zip(optimizer.param_groups[0]['params'], packed['state'].values()))


def halved(old, pipe, *rank):
    for parameter in old(pipe, *rank):
        parameter.data = parameter.data.to(pipe.unet.dtype)
    return [p for p in pipe.unet.parameters() if p.requires_grad]


def reward_left(old, offloaded, images, prompts):
    return call_reward(offloaded.reward, images, prompts)


def advantages_left(old, log_probs, advantages):
    return old(log_probs, advantages.cpu())


def pictures_kept(old, reward, batch):
    return old(reward, batch)._replace(images=batch.images)


def autocast_of_cpu(old, device, *args, **options):
    return old('cpu', *args, **options)


TRAINING, SAMPLING = 'ddpo_tutorial.training.', 'ddpo_tutorial.sampling.'
HALF, BRAIN = dict(dtype='float16'), dict(dtype='bfloat16')
TWO = 'two different devices|values on the CPU|a different device|on the same device'
FAULTS = [  # what is replaced, by what, with which settings, and what is then said
    (SAMPLING + 'randn_tensor', lambda old, *args: old(*args[:2]), {}, 'Input type'),
    (SAMPLING + 'make_schedule', lambda old, *args: old(*args[:3]), {}, TWO),
    ('transformers.BatchEncoding.to', lambda old, tokens, device: tokens, {}, TWO),
    (TRAINING + 'reinforce_loss', advantages_left, dict(loss='reinforce'), TWO),
    (TRAINING + 'reduce', lambda old, gradient, how: gradient.cpu(), {}, TWO),
    ('torch.optim.AdamW.load_state_dict', moments_left, {}, TWO),
    ('ddpo_tutorial.predictors.Offloaded.__call__', reward_left, AWAY, TWO),
    (TRAINING + 'score_batch', pictures_kept, {}, 'pictures on the card'),
    ('torch.autocast', autocast_of_cpu, BRAIN, 'products in another dtype'),
    ('torch.amp.GradScaler', lambda old, *_, **__: old(enabled=False), HALF, 'a scaler'),
    (TRAINING + 'trained_parameters', halved, LORA | HALF, 'expected float32'),
    (TRAINING + 'trained_parameters', halved, LORA | BRAIN, 'expected float32'),
]


@pytest.mark.parametrize('name, fault, changes, said', FAULTS, ids=[name for name, *_ in FAULTS])
def test_a_fault_is_seen(name, fault, changes, said, folder, tmp_path):
    "The same run goes through without it, see above."
    place, _, attribute = name.rpartition('.')
    old = getattr(resolve_name(place), attribute)
    with card(), patch(name, lambda *args, **options: fault(old, *args, **options)):
        with pytest.raises((AssertionError, RuntimeError), match=said):
            whole_run(folder, tmp_path / 'run', **changes)


def test_the_last_lesson_takes_the_card(folder, tmp_path):
    "All its cells, with the settings for a card but smaller; in place of Stable Diffusion, micro."
    small = dict(model=str(folder), out=str(tmp_path / 'run'), num_epochs=1, samples_per_epoch=8)
    small |= dict(num_inference_steps=3, window_size=1, sample_batch_size=32, watch_images=0)
    names = dict(small=small)
    cells = json.loads(LESSON.read_text(encoding='utf-8'))['cells']
    with card():
        for cell in (cell for cell in cells if cell['cell_type'] == 'code'):
            if cell['source'][0].startswith('#| hide'):  # makes diffusers silent, for all tests
                continue
            exec(''.join(line for line in cell['source'] if not line.startswith('%')), names)
            if 'load_config(NAME' in ''.join(cell['source']):
                assert names['config'].model == 'CompVis/stable-diffusion-v1-4'
                exec('config = replace(config, **small)', names)
        places = {p.device.type for p in names['run'].pipe.unet.parameters()}
    assert places == {'cuda'} and list(tmp_path.glob('run/lora/*.safetensors'))


def test_afterwards_there_is_no_card():
    "No other test is disturbed."
    with card():
        assert isinstance(torch.ones(2, device='cuda'), Card)
    assert not torch.cuda.is_available() and not torch.accelerator.is_available()
    assert type(torch.tensor([1.0], requires_grad=True).exp()) is torch.Tensor
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device='cuda')
