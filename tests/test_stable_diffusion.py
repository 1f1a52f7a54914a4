"""What the real model needs, tested without its weights: loading, precision, LoRA, memory savers, its exact shape"""
import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from diffusers.utils import convert_state_dict_to_diffusers
from torch import nn

import ddpo_tutorial.pipelines as pipelines
from ddpo_tutorial.pipelines import (Context, add_lora, clip_tokenizer, decode_latents, frozen_dtype, has_lora, load_pipeline, place, save_memory, save_trained,
    sd_networks, sd_shaped_pipeline)
from ddpo_tutorial.sampling import make_schedule, predict
from ddpo_tutorial.training import TrainConfig, accumulate, collect, make_optimizer, make_scaler, train, update
from helpers import PROMPTS, all_pairs, brightness, generator, gradients, micro_pipeline, sample_some, weights

SMALL = TrainConfig(num_epochs=1, samples_per_epoch=4, sample_batch_size=4, num_inference_steps=3, updates_per_epoch=2, minibatch_size=4, learning_rate=1e-2, buffer_size=8, min_count=2)
ADVANTAGES = torch.tensor([1., -2., .5, .3])

# loading

@pytest.mark.parametrize('name', ['StableDiffusionXLPipeline', 'StableDiffusion3Pipeline', 'FluxPipeline', 'StableDiffusionInpaintPipeline', None])
def test_other_models_are_refused_by_name(tmp_path, name):
    "SDXL and newer read other inputs; from a folder and from the hub."
    (tmp_path / 'model_index.json').write_text(json.dumps({'_class_name': name} if name else {}))
    with pytest.raises(ValueError, match=f'is a {name}; expected a StableDiffusionPipeline.*1.x or 2.x'): load_pipeline(str(tmp_path))

def answer(monkeypatch, info):
    "Let the hub answer, or fail, without a network."
    def model_info(self, repo, **options):
        if isinstance(info, Exception): raise info
        return info
    monkeypatch.setattr(pipelines.HfApi, 'model_info', model_info)
    monkeypatch.setattr(pipelines.hub_constants, 'HF_HUB_OFFLINE', False)

def hub_info(name='StableDiffusionPipeline'):
    files = {'unet/diffusion_pytorch_model.safetensors': 3e9, 'unet/diffusion_pytorch_model.fp16.safetensors': 2e9, 'vae/diffusion_pytorch_model.safetensors': 3e8,
             'text_encoder/model.safetensors': 5e8, 'safety_checker/model.safetensors': 1e9, 'README.md': 9e9}
    return SimpleNamespace(config=dict(diffusers=dict(_class_name=name)), siblings=[SimpleNamespace(rfilename=f, size=s) for f, s in files.items()])

def test_download_says_what_how_large_and_from_where_first(monkeypatch, capsys, micro):
    "A download of gigabytes that begins without a word."
    answer(monkeypatch, hub_info())
    said = []
    def read(source, **options):
        if options.get('local_files_only'): raise OSError('not cached')
        said.append(capsys.readouterr().out)
        return micro
    monkeypatch.setattr(pipelines, 'read_pipeline', read)
    load_pipeline('owner/name', device='cpu')
    assert len(said) == 1 and 'owner/name' in said[0] and '3.8 GB' in said[0] and 'huggingface.co' in said[0]

def test_hub_model_of_another_class_is_not_downloaded(monkeypatch):
    answer(monkeypatch, hub_info('StableDiffusionXLPipeline'))
    monkeypatch.setattr(pipelines, 'read_pipeline', lambda *a, **k: pytest.fail('a download began'))
    with pytest.raises(ValueError, match='StableDiffusionXLPipeline'): load_pipeline('stabilityai/stable-diffusion-xl-base-1.0')

@pytest.mark.parametrize('error', [ConnectionError('no route'), TimeoutError('slow'), RuntimeError('404')])
def test_hub_that_does_not_answer(monkeypatch, error):
    answer(monkeypatch, error)
    with pytest.raises(ValueError, match=f"'owner/name' is not in the local cache, and .* did not deliver it .{type(error).__name__}.*'tiny'"): load_pipeline('owner/name')

def test_offline_is_one_sentence_at_once():
    "HF_HUB_OFFLINE is set in these tests; no network is asked, nothing is retried."
    began = time.perf_counter()
    with pytest.raises(ValueError, match="'owner/name' is not in the local cache, and HF_HUB_OFFLINE.*'tiny'"): load_pipeline('owner/name')
    assert time.perf_counter() - began < 2

def test_dead_network_is_one_sentence(tmp_path):
    "As a user meets it: no traceback and no row of retries."
    env = {k: v for k, v in os.environ.items() if k != 'HF_HUB_OFFLINE'} | dict(HF_ENDPOINT='http://127.0.0.1:9', HF_HOME=str(tmp_path))
    code = 'import time, sys; from ddpo_tutorial.runs import main; t = time.time(); code = main(["--model", "owner/name"]); print(time.time() - t); sys.exit(code)'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(said) == 1 and '127.0.0.1:9 did not deliver it' in said[0], done.stderr
    assert float(done.stdout.split()[-1]) < 20

def test_safety_checker_is_left_out_and_said(tmp_path, capsys, micro):
    micro.save_pretrained(tmp_path)
    index = json.loads((tmp_path / 'model_index.json').read_text()) | dict(safety_checker=['stable_diffusion', 'StableDiffusionSafetyChecker'])
    (tmp_path / 'model_index.json').write_text(json.dumps(index))
    assert load_pipeline(str(tmp_path)).safety_checker is None
    assert 'safety checker is left out' in capsys.readouterr().out

def test_broken_folder_is_one_sentence(tmp_path, micro):
    micro.save_pretrained(tmp_path)
    for f in (tmp_path / 'unet').glob('*.safetensors'): f.unlink()
    with pytest.raises(ValueError, match='could not be loaded.*Is the folder complete'): load_pipeline(str(tmp_path))

# precision

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_frozen_parts_have_16_bits_and_masters_32(micro, dtype):
    "Weights that are trained must be float32 (pitfall 29); the rest need not."
    place(micro, 'cpu', dtype)
    assert {p.dtype for p in micro.unet.parameters()} == {torch.float32}
    assert {p.dtype for part in (micro.vae, micro.text_encoder) for p in part.parameters()} == {dtype}

class Witness(nn.Module):
    "A UNet that only notes under which autocast it was called."
    def __init__(self): super().__init__(); self.seen = []
    def forward(self, x, t, text):
        self.seen.append(torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else torch.float32)
        return SimpleNamespace(sample=x.to(self.seen[-1]))

@pytest.mark.parametrize('guidance_scale', [1., 3.])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_unet_computes_in_the_precision_of_the_context(dtype, guidance_scale):
    "Sampling in one precision and rescoring in another is a ratio that is not 1; and what comes out is always float32."
    unet, x = Witness(), torch.randn(2, 4, 8, 8)
    out = predict(unet, x, torch.tensor(5), Context(torch.zeros(2, 3, 4, dtype=dtype), torch.zeros(1, 3, 4, dtype=dtype)), guidance_scale)
    assert unet.seen == [dtype] and out.dtype == torch.float32

def test_callers_autocast_is_left_alone():
    unet, x = Witness(), torch.randn(2, 4, 8, 8)
    with torch.autocast('cpu', torch.bfloat16): predict(unet, x, torch.tensor(5), Context(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4)), 1.)
    assert unet.seen == [torch.bfloat16]

def test_cpu_is_float32():
    assert frozen_dtype('cpu') == torch.float32

@pytest.mark.parametrize('has_bf16, dtype', [(True, torch.bfloat16), (False, torch.float16)])
def test_gpu_takes_bfloat16_where_it_computes_in_it(monkeypatch, has_bf16, dtype):
    "Older cards say they can, and emulate."
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: has_bf16 or including_emulation)
    assert frozen_dtype('cuda') == dtype

def test_only_float16_has_a_scaler(micro):
    assert make_scaler(micro) is None
    assert make_scaler(place(micro, 'cpu', torch.bfloat16)) is None
    assert isinstance(make_scaler(place(micro, 'cpu', torch.float16)), torch.amp.GradScaler)

def updated(scaler, config=SMALL):
    "Weights and statistics after one epoch's updates."
    pipe = micro_pipeline()
    batch = collect(config, pipe, brightness, PROMPTS[:4], generator())
    stats = update(config, pipe, make_optimizer(config, pipe), batch, ADVANTAGES, generator(1), scaler)[-1]
    return weights(pipe.unet), stats

def test_scaler_changes_nothing_but_the_range():
    "A scaled loss whose gradient is clipped before it is scaled back would be another update."
    (plain, stats), (scaled, scaled_stats) = updated(None), updated(torch.amp.GradScaler('cpu'))
    torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-5)
    assert scaled_stats['grad_norm'] == pytest.approx(stats['grad_norm'], rel=1e-3) and scaled_stats['loss'] == pytest.approx(stats['loss'], abs=1e-6)

def test_overflow_skips_the_step(micro):
    "An infinite gradient must not reach the weights; with a scaler it is left out, and the scale is made smaller."
    batch, before, scaler = collect(SMALL, micro, brightness, PROMPTS[:4], generator()), weights(micro.unet), torch.amp.GradScaler('cpu')
    next(micro.unet.parameters()).register_hook(lambda g: g * float('inf'))
    update(SMALL, micro, make_optimizer(SMALL, micro), batch, ADVANTAGES, generator(1), scaler)
    assert torch.equal(before, weights(micro.unet)) and scaler.get_scale() < 65536

# LoRA

@pytest.mark.parametrize('rank, parameters', [(4, 797_184), (8, 1_594_368), (16, 3_188_736), (32, 6_377_472)])
def test_lora_of_stable_diffusion_has_the_known_size(rank, parameters):
    "The sizes that published code reports for Stable Diffusion 1.x, on networks without memory."
    with torch.device('meta'): networks = sd_networks()
    pipe = SimpleNamespace(**networks)
    assert sum(p.numel() for p in pipe.unet.parameters()) == 859_520_964
    add_lora(pipe, rank)
    assert sum(p.numel() for p in pipe.unet.parameters() if p.requires_grad) == parameters

def test_lora_starts_as_the_identity(micro):
    "Sampling through a fresh LoRA draws the same latents."
    before = sample_some(micro)[1].latents
    assert torch.equal(sample_some(add_lora(micro))[1].latents, before) and has_lora(micro)

def test_lora_freezes_the_rest_and_keeps_masters_in_32_bits(micro):
    add_lora(place(micro, 'cpu', torch.bfloat16))
    trained = {n: p for n, p in micro.unet.named_parameters() if p.requires_grad}
    assert trained and all('lora' in n and p.dtype == torch.float32 for n, p in trained.items())
    assert {p.dtype for p in micro.unet.parameters() if not p.requires_grad} == {torch.bfloat16}

def test_lora_is_seeded():
    "Two processes or two runs that begin with different LoRAs."
    a, b, c = (weights(add_lora(micro_pipeline(), seed=seed).unet) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)

@pytest.mark.parametrize('options, words', [(dict(rank=0), 'rank=0; expected at least 1'), (dict(targets=('to_x',)), "no layer named 'to_x'.*to_q")])
def test_bad_lora(micro, options, words):
    with pytest.raises(ValueError, match=words): add_lora(micro, **options)

def test_second_lora_is_refused(micro):
    with pytest.raises(ValueError, match='carries a LoRA already'): add_lora(add_lora(micro))

def images_of(pipe, seed=0):
    context, trajectory, _ = sample_some(pipe, seed=seed)
    with torch.no_grad(): return decode_latents(pipe, trajectory.latents[-1])

def train_lora(pipe, alpha=None):
    "A LoRA that has learned something; with another alpha than the rank, the fault of pitfall 32."
    add_lora(pipe)
    if alpha: pipe.unet.delete_adapters('default'); pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=alpha, init_lora_weights='gaussian', target_modules=['to_q', 'to_k', 'to_v', 'to_out.0']))
    frozen = weights(nn.ModuleList(m.base_layer for m in pipe.unet.modules() if hasattr(m, 'base_layer')))
    train(replace(SMALL, num_epochs=3), pipe, brightness, PROMPTS)
    assert torch.equal(frozen, weights(nn.ModuleList(m.base_layer for m in pipe.unet.modules() if hasattr(m, 'base_layer'))))
    return pipe

def test_pitfall_32_lora_reloads_in_plain_diffusers(tmp_path, micro):
    "The saved file must mean the same to `load_lora_weights`."
    base = StableDiffusionPipeline(**copy.deepcopy(micro.components), requires_safety_checker=False)
    untrained = images_of(base)
    trained = images_of(train_lora(micro))
    assert (trained - untrained).abs().max() > 1e-3
    save_trained(micro, tmp_path)
    base.load_lora_weights(tmp_path)
    torch.testing.assert_close(images_of(base), trained, rtol=0, atol=1e-6)

def test_pitfall_32_another_alpha_would_show(tmp_path, micro):
    "The fault, put in: alpha other than the rank, saved without metadata."
    base = StableDiffusionPipeline(**copy.deepcopy(micro.components), requires_safety_checker=False)
    trained = images_of(train_lora(micro, alpha=32))
    micro.save_lora_weights(tmp_path, convert_state_dict_to_diffusers(get_peft_model_state_dict(micro.unet)))
    base.load_lora_weights(tmp_path)
    assert (images_of(base) - trained).abs().max() > 1e-3

def test_pitfall_08_first_ratio_of_a_lora(micro):
    row, = train(replace(SMALL, updates_per_epoch=1), add_lora(micro), brightness, PROMPTS)
    assert abs(row['ratio'] - 1) < 1e-6 and row['clipfrac'] == 0

def test_whole_model_is_saved_as_a_folder(tmp_path, micro):
    images = images_of(micro)
    assert torch.equal(images_of(load_pipeline(str(save_trained(micro, tmp_path / 'model')), device='cpu')), images)

# memory savers

def saved_bytes(pipe, batch, config):
    "The gradient of one update, and the bytes that autograd keeps for it."
    kept = []
    pipe.unet.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t):
        accumulate(config, pipe, make_schedule(pipe.scheduler, 3), batch, ADVANTAGES, all_pairs(3, 4).T)
    return gradients(pipe.unet), sum(kept)

def test_gradient_checkpointing_keeps_less_and_changes_nothing(micro):
    batch = collect(SMALL, micro, brightness, PROMPTS[:4], generator())
    plain, much = saved_bytes(micro, batch, SMALL)
    thrifty, little = saved_bytes(save_memory(micro, gradient_checkpointing=True), batch, SMALL)
    torch.testing.assert_close(thrifty, plain, rtol=1e-4, atol=1e-6)
    assert little < .7 * much, (little, much)

def test_slicing_changes_nothing(micro):
    before = images_of(micro)
    save_memory(micro, vae_slicing=True, attention_slicing=True)
    assert micro.vae.use_slicing
    torch.testing.assert_close(images_of(micro), before, rtol=0, atol=1e-5)

def test_nothing_is_switched_on_by_default(micro):
    "Each saver has a price."
    processors = {type(p) for p in micro.unet.attn_processors.values()}
    save_memory(micro)
    assert not micro.vae.use_slicing and not micro.unet.is_gradient_checkpointing and {type(p) for p in micro.unet.attn_processors.values()} == processors

# the exact shape

def test_networks_have_the_published_sizes():
    with torch.device('meta'): networks = sd_networks()
    assert {name: sum(p.numel() for p in n.parameters()) for name, n in networks.items()} == dict(unet=859_520_964, vae=83_653_863, text_encoder=123_060_480)
    assert networks['unet'].config.sample_size == 64 and networks['vae'].config.scaling_factor == .18215

def test_tokenizer_is_clips():
    "Another vocabulary would be other words for the text encoder."
    texts = ['a photo of a hippopotamus, 4k!', '', 'Ein Bär']
    ours = clip_tokenizer()(texts, padding='max_length', max_length=77, truncation=True, return_tensors='pt').input_ids
    theirs = open_clip.get_tokenizer('ViT-L-14')(texts)
    for a, b in zip(ours.tolist(), theirs.tolist()):
        end = a.index(49407) + 1
        assert a[:end] == b[:end] and set(a[end:]) <= {49407} # Stable Diffusion pads with the end token, open_clip with zeros

@pytest.fixture(scope='module')
def sd_shaped():
    "Stable Diffusion v1.4's exact shape, random weights, pictures of 64 pixels."
    return sd_shaped_pipeline(image_size=64)

SD_EPOCH = TrainConfig(num_epochs=1, samples_per_epoch=2, sample_batch_size=2, num_inference_steps=2, guidance_scale=5., updates_per_epoch=1, minibatch_size=1, learning_rate=3e-4,
    clip_range=1e-4, buffer_size=8, min_count=2)

def one_epoch(pipe):
    "One epoch of two samples and two steps; whether every trained tensor had a finite gradient."
    seen, trained = {}, {n: p for n, p in pipe.unet.named_parameters() if p.requires_grad}
    hooks = [p.register_post_accumulate_grad_hook(lambda p, n=n: seen.update({n: bool(p.grad.isfinite().all())})) for n, p in trained.items()]
    row, = train(SD_EPOCH, pipe, brightness, ['a cat', 'an owl'])
    for hook in hooks: hook.remove()
    assert set(seen) == set(trained) and all(seen.values())
    assert abs(row['ratio'] - 1) < 1e-5 and row['clipfrac'] == 0 and row['grad_norm'] > 0
    return row

@pytest.mark.slow
def test_stable_diffusion_shaped_lora_epoch(tmp_path, sd_shaped):
    "LoRA: finite gradients everywhere, ratio 1 before the first update, identical images after saving and reloading."
    pipe = add_lora(StableDiffusionPipeline(**sd_shaped.components, requires_safety_checker=False))
    one_epoch(pipe)
    images = images_of(pipe)
    save_trained(pipe, tmp_path)
    pipe.unload_lora_weights()
    assert not torch.equal(images_of(pipe), images)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(images_of(pipe), images, rtol=0, atol=1e-5)
    pipe.unload_lora_weights()

@pytest.mark.slow
def test_stable_diffusion_shaped_full_epoch(sd_shaped):
    "All 859,520,964 weights; needs about 16 GB of memory."
    sd_shaped.unet.requires_grad_(True)
    one_epoch(sd_shaped)
