"""Loading, precision, encoding, decoding, pictures, LoRA, saving.

Run: python -m pytest tests/test_pipelines.py -n 0
"""

import contextlib
import json
import logging.handlers
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from helpers import (
    PROMPTS,
    calls_of,
    generator,
    micro_pipeline,
    moved,
    picture,
    sample_some,
    weights,
)
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from sd_shape import sd_networks

from ddpo_tutorial.checks import check_prompts
from ddpo_tutorial.configs import Config
from ddpo_tutorial.pipelines import (
    add_lora,
    check_weights,
    compute_dtype,
    contact_sheet,
    decode_latents,
    encode_prompts,
    fit_text,
    has_lora,
    load_model,
    load_pipeline,
    prepare_pipeline,
    product_dtype,
    save_memory,
    save_trained,
    tiny_folder,
    to_pil,
)
from ddpo_tutorial.sampling import make_generators, make_policy, sample

LONG = 'a' + ' cat' * 20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TARGETS = ['to_q', 'to_k', 'to_v', 'to_out.0']

# loading


def test_loads_for_training(tiny):
    "Dropout left on, or gradients into the VAE and the text encoder."
    for part in (tiny.unet, tiny.vae, tiny.text_encoder):
        assert not any(m.training for m in part.modules())
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert {p.requires_grad for p in part.parameters()} == {part is tiny.unet}


def with_scheduler(pipe, scheduler):
    "A pipeline as it comes from elsewhere, prepared for training."
    pipe.scheduler = scheduler
    return prepare_pipeline(pipe, 'cpu', torch.float32).scheduler


def test_latents_are_not_clamped(tiny, micro):
    "`from_config` turns clip_sample on where a config is silent, which clamps latents to [-1, 1]."
    silent = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    assert DDIMScheduler.from_config(silent.config).config.clip_sample  # the fault
    assert with_scheduler(micro, silent).config.clip_sample is False
    assert tiny.scheduler.config.clip_sample is False


@pytest.mark.parametrize(
    'changes',
    [
        dict(beta_end=0.02),
        dict(set_alpha_to_one=False, steps_offset=1),
        dict(prediction_type='v_prediction'),
    ],
)
def test_scheduler_keeps_the_noise_schedule(micro, changes):
    "Swapping the scheduler must not swap the noise schedule the model was trained with."
    old = PNDMScheduler(skip_prk_steps=True, **changes)
    new = with_scheduler(micro, old)
    assert isinstance(new, DDIMScheduler) and torch.equal(new.alphas_cumprod, old.alphas_cumprod)
    assert {k: new.config[k] for k in changes} == changes


def test_fast_attention_is_kept(tiny):
    "Attention slicing replaces the fast processors."
    assert {type(p) for p in tiny.unet.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.parametrize(
    'name', ['tyni', './no/such/folder', '/no/such', '~/no/such', 'a/b/c', 'owner/name']
)
def test_unknown_model_is_refused(name):
    "Offline, and for names that cannot be: one sentence, with the names that can be."
    wanted = "could not be loaded; expected 'tiny', a folder .* or a hub id owner/name"
    with pytest.raises(ValueError, match=wanted) as caught:
        load_pipeline(name)
    said = str(caught.value)
    assert repr(os.path.expanduser(name)) in said and len(said.splitlines()) == 1


def test_dead_network_is_one_sentence(tmp_path):
    "As a user meets it: one sentence, no row of retries. How long it takes is printed."
    env = {k: v for k, v in os.environ.items() if k != 'HF_HUB_OFFLINE'}
    env |= dict(HF_ENDPOINT='http://127.0.0.1:9', HF_HOME=str(tmp_path))
    code = """
import sys, time
from ddpo_tutorial.pipelines import load_pipeline
began = time.perf_counter()
try: load_pipeline('owner/name')
except ValueError as error: print(error, file=sys.stderr)
print(time.perf_counter() - began)"""
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    said = done.stderr.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(
        "'owner/name' could not be loaded; expected 'tiny'"
    ), done.stderr
    assert 'Connect' in said[0]
    print(f'after {float(done.stdout):.1f} s')


def test_folder_that_is_no_pipeline_is_refused(tmp_path):
    "A folder without a pipeline must not be taken for a hub id."
    with pytest.raises(ValueError, match="could not be loaded; expected 'tiny'.*model_index.json"):
        load_pipeline(tmp_path)


def test_broken_folder_is_refused(tmp_path, micro):
    "A copy that was cut off: the sentence says which file is missing."
    micro.save_pretrained(tmp_path)
    for file in (tmp_path / 'unet').glob('*.safetensors'):
        file.unlink()
    with pytest.raises(
        ValueError, match='could not be loaded; expected .*diffusion_pytorch_model.*unet'
    ):
        load_pipeline(tmp_path)


def test_missing_part_is_not_looked_for_on_the_hub(tmp_path, micro, monkeypatch):
    "Seen from where the folder lies, folder/vae is also a possible name on the hub."
    micro.save_pretrained(tmp_path / 'folder')
    shutil.rmtree(tmp_path / 'folder' / 'vae')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"^'folder' could not be loaded; .*[\\/]folder[\\/]vae"
    ) as caught:
        load_pipeline('folder', 'cpu')
    assert 'offline' not in str(caught.value)


OTHERS = ['StableDiffusionXLPipeline', 'FluxPipeline', 'StableDiffusionControlNetPipeline', None]


def write_index(folder, name):
    "A folder of a pipeline that has no weights yet."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'model_index.json').write_text(json.dumps({'_class_name': name} if name else {}))


def snapshot(hub, repo, revision):
    "Where the hub's local cache keeps a revision of a model; the revision becomes the newest."
    folder = hub / f'models--{repo.replace("/", "--")}'
    (folder / 'refs').mkdir(parents=True, exist_ok=True)
    (folder / 'refs' / 'main').write_text(revision)
    return folder / 'snapshots' / revision


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty local cache of the hub."
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    return tmp_path


@pytest.mark.parametrize('name', OTHERS)
def test_other_models_are_refused_by_name(hub, name):
    "SDXL and newer read other inputs; from a folder and from the hub, before weights are read."
    for source, folder in [
        (str(hub / 'sdxl'), hub / 'sdxl'),
        ('owner/name', snapshot(hub, 'owner/name', 'a' * 40)),
    ]:
        write_index(folder, name)
        with pytest.raises(
            ValueError,
            match=f"^'{source}' is a {name}; expected a StableDiffusionPipeline: .* 1 or 2",
        ):
            load_pipeline(source)


def test_cached_model_needs_no_network(hub, micro):
    "What was downloaded once is loaded from the cache."
    micro.save_pretrained(snapshot(hub, 'owner/name', 'a' * 40))
    assert torch.equal(weights(load_pipeline('owner/name', 'cpu').unet), weights(micro.unet))


def test_stable_diffusion_is_pinned(hub, micro):
    "A newer revision of the real model would be another model for the same command."
    name = 'CompVis/stable-diffusion-v1-4'
    micro.save_pretrained(snapshot(hub, name, '133a221b8aa7292a167afc5127cb63fb5005638b'))
    micro_pipeline(seed=1).save_pretrained(snapshot(hub, name, 'b' * 40))
    assert torch.equal(weights(load_pipeline(name, 'cpu').unet), weights(micro.unet))


def test_safety_checker_is_left_out(tmp_path, micro):
    "It turns pictures black, and a reward would score the black."
    micro.save_pretrained(tmp_path)
    checker = dict(
        safety_checker=['stable_diffusion', 'StableDiffusionSafetyChecker'],
        requires_safety_checker=True,
    )
    index = json.loads((tmp_path / 'model_index.json').read_text()) | checker
    (tmp_path / 'model_index.json').write_text(json.dumps(index))
    pipe = load_pipeline(tmp_path, 'cpu')
    assert pipe.safety_checker is None and not pipe.config.requires_safety_checker


# weights

FILES = dict(
    text_encoder='model.safetensors',
    unet='diffusion_pytorch_model.safetensors',
    vae='diffusion_pytorch_model.safetensors',
)
OLD_ATTENTION = {
    '.to_q.': '.query.',
    '.to_k.': '.key.',
    '.to_v.': '.value.',
    '.to_out.0.': '.proj_attn.',
}


def rewrite(folder, part, change):
    "Exchange a network's weights in a folder; `change` maps all of them by name to new ones."
    files = sorted((folder / part).glob('*.safetensors'))
    found = {name: weight.clone() for file in files for name, weight in load_file(file).items()}
    for file in [*files, *(folder / part).glob('*.index.json')]:
        file.unlink()
    save_file(change(found), folder / part / FILES[part], metadata=dict(format='pt'))


def without_first(found):
    return dict(sorted(found.items())[1:])


def with_another(found):
    return found | {'another.weight': torch.ones(2)}


def with_numbers(found):
    return found | {'text_model.embeddings.position_ids': torch.arange(16)[None]}


def with_projection(found):
    "As a text encoder with a layer for comparing with pictures was saved."
    return found | {'text_projection.weight': torch.ones(2, 2)}


def without_beginning(found):
    return {name.removeprefix('text_model.'): weight for name, weight in found.items()}


def with_old_attention(found):
    "As the VAE of Stable Diffusion v1.4 was saved."
    for new, old in OLD_ATTENTION.items():
        found = {name.replace(new, old): weight for name, weight in found.items()}
    return found


@pytest.fixture
def copied(tmp_path):
    "A copy of the tiny model, to be changed."
    return Path(shutil.copytree(tiny_folder(), tmp_path / 'copied'))


@pytest.mark.parametrize('change, said', [(without_first, 'missing'), (with_another, 'unexpected')])
@pytest.mark.parametrize('part', FILES)
def test_other_weights_are_refused(copied, part, change, said):
    "The libraries fill in random numbers, print a table and go on; training would run to its end."
    first = min(
        file for path in (copied / part).glob('*.safetensors') for file in load_file(path)
    ).removeprefix('text_model.')
    rewrite(copied, part, change)
    key = first if said == 'missing' else 'another.weight'
    words = rf"^The {part} of '.*copied' has {said} weights "
    words += rf"\(1, first '(text_model\.)?{key}'\); expected .* update "
    with pytest.raises(ValueError, match=words) as caught:
        load_pipeline(copied, 'cpu')
    assert len(str(caught.value).splitlines()) == 1


def test_other_weights_of_the_hub_are_refused(hub, micro):
    "The sentence names what was asked for, not where the cache lies."
    folder = snapshot(hub, 'owner/name', 'a' * 40)
    micro.save_pretrained(folder)
    rewrite(folder, 'unet', without_first)
    with pytest.raises(ValueError, match="^The unet of 'owner/name' has missing weights"):
        load_pipeline('owner/name', 'cpu')


@pytest.mark.parametrize(
    'part, change',
    [
        ('vae', with_old_attention),
        ('text_encoder', with_numbers),
        ('text_encoder', with_projection),
        ('unet', dict),
    ],
)
def test_older_files_are_the_same_model(copied, tiny, part, change):
    "Accepted: what diffusers converts, numbers that are no weights, one file in place of two."
    rewrite(copied, part, change)
    loaded = load_pipeline(copied, 'cpu')
    for name in FILES:
        assert torch.equal(weights(getattr(loaded, name)), weights(getattr(tiny, name)))


@pytest.mark.parametrize('change', [without_first, with_another, with_numbers])
@pytest.mark.parametrize('part', FILES)
def test_the_libraries_tables_are_not_printed(copied, part, change):
    "What is wrong is said once, by us; a library may speak again afterwards."
    rewrite(copied, part, change)
    said = logging.handlers.BufferingHandler(99)
    libraries = [logging.getLogger(name) for name in ('transformers', 'diffusers')]
    for library in libraries:
        library.addHandler(said)
    with contextlib.suppress(ValueError):
        load_pipeline(copied, 'cpu')
    assert not said.buffer
    for library in libraries:
        library.warning('heard')
        library.removeHandler(said)
    assert len(said.buffer) == 2


def test_numbers_of_positions_are_no_weights():
    "transformers 5.0 to 5.5 report those of Stable Diffusion v1.4 as unexpected."
    numbers = {'text_model.embeddings.position_ids'}
    check_weights('folder', dict(text_encoder=dict(missing_keys=set(), unexpected_keys=numbers)))


def test_text_encoder_is_never_random(copied, tiny):
    """Names without text_model., as the newest transformers write them: read rightly, or refused by
    a version that cannot."""
    rewrite(copied, 'text_encoder', without_beginning)
    try:
        loaded = load_pipeline(copied, 'cpu')
    except ValueError as error:
        assert 'The text_encoder of' in str(error) and '(52, ' in str(error)
    else:
        assert torch.equal(encode_prompts(loaded, PROMPTS).text, encode_prompts(tiny, PROMPTS).text)


# precision


@pytest.fixture
def load(tmp_path, micro):
    "Loads the very small pipeline from its folder, in any precision, with or without a LoRA."
    micro.save_pretrained(tmp_path / 'micro')

    def from_folder(dtype, lora):
        pipe = load_pipeline(tmp_path / 'micro', 'cpu', dtype)
        return add_lora(pipe) if lora else pipe

    return from_folder


@pytest.mark.parametrize('lora', [False, True])
@pytest.mark.parametrize('dtype', DTYPES)
def test_one_dtype_a_pipeline(load, dtype, lora):
    "A part in another precision; a LoRA in 16 bits, or gradients into the weights under it."
    pipe = load(dtype, lora)
    trained = {p.dtype for p in pipe.unet.parameters() if p.requires_grad}
    parameters = [p for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()]
    frozen = {p.dtype for p in parameters if not p.requires_grad}
    assert frozen == {dtype} and trained == {torch.float32 if lora else dtype}
    assert (
        all(('lora' in name) == p.requires_grad for name, p in pipe.unet.named_parameters()) == lora
    )


@pytest.mark.parametrize('lora', [False, True])
@pytest.mark.parametrize('dtype', DTYPES)
def test_draws_in_every_precision(load, dtype, lora):
    "A plain call, and the way from prompts to images, near those of 32 bits."

    def images(pipe):
        policy = make_policy(pipe, num_inference_steps=3, guidance_scale=2.0)
        generators = make_generators(range(len(PROMPTS)))
        trajectory = sample(policy, encode_prompts(pipe, PROMPTS), generators)
        assert trajectory.latents.dtype == trajectory.log_probs.dtype == torch.float32
        with torch.no_grad():
            return decode_latents(pipe, trajectory.latents[-1])

    pipe, exact = load(dtype, lora), load(torch.float32, lora)
    assert images(pipe).dtype == torch.float32
    for draw in (images, picture):
        assert (draw(pipe) - draw(exact)).abs().mean() < 0.01


@pytest.mark.parametrize('lora', [False, True])
@pytest.mark.parametrize('dtype', DTYPES)
def test_what_is_saved_draws_the_same_in_plain_diffusers(load, tmp_path, dtype, lora):
    """transformers loads a text encoder in the precision it was saved in, diffusers a UNet in 32:
    they do not fit."""
    pipe = moved(load(dtype, lora))
    untrained, trained = picture(load(dtype, False)), picture(pipe)
    save_trained(pipe, tmp_path / 'trained')
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / ('micro' if lora else 'trained'))
    plain.set_progress_bar_config(disable=True)
    if lora:
        plain.load_lora_weights(tmp_path / 'trained')
    assert (trained - untrained).abs().mean() > 0.01
    error = (picture(plain) - trained).abs()
    assert error.max() <= 1e-5 if dtype == torch.float32 else error.mean() < 0.01
    assert pipe.vae.dtype == pipe.text_encoder.dtype == dtype  # saving changes nothing


@pytest.mark.parametrize('dtype', ['auto', 'bfloat16'])
@pytest.mark.parametrize('rank', [0, 2])
def test_model_is_the_one_its_configuration_asks_for(tmp_path, micro, rank, dtype):
    "Another rank; 16 bits where all weights are trained, or 32 under a LoRA, which needs no more."
    micro.save_pretrained(tmp_path)
    config = Config(model=str(tmp_path), lora_rank=rank, dtype=dtype, vae_slicing=True)
    pipe = load_model(config, 'cpu')
    products = torch.bfloat16 if dtype == 'bfloat16' else torch.float32
    assert product_dtype(config, 'cpu') == products
    assert pipe.vae.dtype == (products if rank else torch.float32)
    assert {p.dtype for p in pipe.unet.parameters() if p.requires_grad} == {torch.float32}
    assert has_lora(pipe) == bool(rank) and pipe.vae.use_slicing
    if rank:
        assert pipe.unet.peft_config['default'].r == rank


@pytest.mark.parametrize('has_bf16, dtype', [(True, torch.bfloat16), (False, torch.float16)])
def test_gpu_takes_bfloat16_where_it_computes_in_it(monkeypatch, has_bf16, dtype):
    "Older cards say they can, and emulate."
    supported = lambda including_emulation=True: has_bf16 or including_emulation
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', supported)
    assert compute_dtype('cuda') == dtype


# prompts


@pytest.mark.parametrize('guidance', [True, False])
def test_encoding_is_the_pipelines_own(tiny, guidance):
    "Another padding, layer or order than diffusers' own encoding."
    context = encode_prompts(tiny, PROMPTS)
    text, empty = tiny.encode_prompt(PROMPTS, 'cpu', 1, guidance)
    torch.testing.assert_close(context.text, text, rtol=0, atol=1e-5)
    if guidance:
        torch.testing.assert_close(context.empty.expand_as(empty), empty, rtol=0, atol=1e-5)


def test_textual_inversion_is_encoded_as_the_pipeline_does(micro):
    "A learned word of several vectors would be read as one."
    vectors = torch.randn(3, micro.text_encoder.config.hidden_size, generator=generator())
    micro.load_textual_inversion({'<mine>': vectors})
    text, _ = micro.encode_prompt(['a <mine> cat'], 'cpu', 1, False)
    torch.testing.assert_close(encode_prompts(micro, ['a <mine> cat']).text, text)
    assert (
        len(micro.tokenizer('a <mine> cat').input_ids) == 5
    )  # start, a, one of the three, cat, end


def test_each_prompt_is_encoded_once(micro):
    "Equal prompts cost one row, and no gradient reaches the text encoder."
    calls = calls_of(micro.text_encoder)
    micro.text_encoder.requires_grad_(True)
    context = encode_prompts(micro, PROMPTS)
    assert [len(c) for c in calls] == [1 + len(set(PROMPTS))]
    assert torch.equal(context.text[0], context.text[2]) and not torch.equal(
        context.text[0], context.text[1]
    )
    assert not context.text.requires_grad


@pytest.mark.parametrize(
    'prompts, error, words',
    [
        ([], ValueError, 'no prompts.*at least one'),
        ('a cat', TypeError, r"the string 'a cat'.*\['a cat'\]"),
        (['a cat', 3], TypeError, 'holds 3, a int.*strings'),
        ([None], TypeError, 'holds None'),
    ],
)
def test_bad_prompts(micro, prompts, error, words):
    "A string would be read letter by letter; an empty list would fail far away."
    for function in (check_prompts, lambda p: encode_prompts(micro, p)):
        with pytest.raises(error, match=words):
            function(prompts)


def test_long_prompt_warns_of_what_is_cut(micro):
    "A prompt longer than the encoder reads is cut silently by the tokenizer."
    length = len(micro.tokenizer(LONG).input_ids)
    with pytest.warns(
        UserWarning, match=f'reads 16 tokens, this prompt has {length}.*will not see'
    ) as caught:
        cut = encode_prompts(micro, [LONG, LONG, 'a cat'])
    assert len(caught) == 1
    lost = str(caught[0].message).split('not see ')[1].strip("'.")
    assert LONG.endswith(lost)
    torch.testing.assert_close(
        cut.text[:1], encode_prompts(micro, [LONG[: -len(lost)].strip()]).text
    )


def test_short_prompts_do_not_warn(micro):
    "A warning for every prompt would soon be read by nobody."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        encode_prompts(micro, PROMPTS)


# images


def latents(n=5):
    return torch.randn(n, 4, 8, 8, generator=generator())


def test_decoding_is_the_pipelines_own(micro):
    "A wrong scale, shift or range of the images."
    raw = micro.vae.decode(latents() / micro.vae.config.scaling_factor).sample
    theirs = micro.image_processor.postprocess(raw, output_type='pt')
    torch.testing.assert_close(decode_latents(micro, latents()), theirs)


def test_scaling_factor_is_read(micro):
    "A hard-coded 0.18215 decodes another VAE's latents wrongly."
    right = decode_latents(micro, latents())
    micro.vae.register_to_config(scaling_factor=0.18215)
    assert (decode_latents(micro, latents()) - right).abs().max() > 0.01


@pytest.mark.parametrize('batch_size', [1, 2, 5, 100])
def test_decoding_in_parts(micro, batch_size):
    "A last part that is dropped or misplaced."
    whole = decode_latents(micro, latents(), 5)
    torch.testing.assert_close(
        decode_latents(micro, latents(), batch_size), whole, rtol=0, atol=1e-5
    )


def test_decoding_has_range_and_gradient(micro):
    "Images out of [0, 1], or a gradient cut off (guidance by a reward needs it)."
    x = (30 * latents()).requires_grad_()
    images = decode_latents(micro, x)
    assert images.shape == (5, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    images.sum().backward()
    assert x.grad.abs().sum() > 0


def test_pictures_keep_their_values():
    "Truncation instead of rounding, or channels in a wrong place."
    levels = torch.arange(3 * 8 * 8).view(1, 3, 8, 8) % 256
    drawn = to_pil(levels / 255)[0]
    assert drawn.size == (8, 8)
    pixels = [list(drawn.getpixel((x, y))) for y in range(8) for x in range(8)]
    assert pixels == levels[0].permute(1, 2, 0).reshape(-1, 3).tolist()


@pytest.mark.parametrize(
    'n, columns, titles, size', [(5, 2, False, (2, 3)), (5, 8, True, (5, 1)), (1, 1, True, (1, 1))]
)
def test_contact_sheet_layout(n, columns, titles, size):
    "A row too few, or pictures over each other."
    images = torch.linspace(0.1, 0.9, n).view(n, 1, 1, 1).expand(n, 3, 4, 4)
    sheet = contact_sheet(images, ['a long title ' * 9] * n if titles else None, columns, size=20)
    height = 24 + 14 * titles
    assert sheet.size == (24 * size[0], height * size[1])
    for i, image in enumerate(images):
        middle = sheet.getpixel((i % size[0] * 24 + 12, i // size[0] * height + 12))
        assert all(abs(value - image[0, 0, 0].item() * 255) <= 1 for value in middle)


@pytest.mark.parametrize('width', [0, 30, 96, 1000])
def test_titles_fit(width):
    "A title that runs into the next picture."
    title = 'a pencil sketch of a hippopotamus'
    fitted = fit_text(title, width)
    assert (
        fitted == title if width == 1000 else fitted.endswith('…') and title.startswith(fitted[:-1])
    )


# LoRA


@pytest.mark.parametrize(
    'rank, parameters', [(4, 797_184), (8, 1_594_368), (16, 3_188_736), (32, 6_377_472)]
)
def test_lora_of_stable_diffusion_has_the_known_size(rank, parameters):
    "The sizes that published code reports for Stable Diffusion 1.x, on networks without memory."
    with torch.device('meta'):
        pipe = SimpleNamespace(**sd_networks())
    assert sum(p.numel() for p in pipe.unet.parameters()) == 859_520_964
    add_lora(pipe, rank)
    assert sum(p.numel() for p in pipe.unet.parameters() if p.requires_grad) == parameters


def test_lora_starts_as_the_identity(micro):
    "Sampling through a fresh LoRA draws the same latents."
    before = sample_some(micro)[1].latents
    assert torch.equal(sample_some(add_lora(micro))[1].latents, before) and has_lora(micro)


def test_lora_is_seeded():
    "Two processes or two runs that begin with different LoRAs."
    a, b, c = (weights(add_lora(micro_pipeline(), seed=seed).unet) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(rank=0), 'should be a positive integer value but the value passed is 0'),
        (dict(targets=('to_x',)), "no layer 'to_x'.*to_q"),
    ],
)
def test_bad_lora(micro, options, words):
    with pytest.raises(ValueError, match=words):
        add_lora(micro, **options)


def test_second_lora_is_refused(micro):
    with pytest.raises(ValueError, match='carries a LoRA already'):
        add_lora(add_lora(micro))


def test_lora_of_another_name_and_alpha_reloads(load, tmp_path):
    "An alpha that is not the rank is part of what `load_lora_weights` must be told."
    pipe, plain = load(torch.float32, False), load(torch.float32, False)
    pipe.unet.requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights='gaussian', target_modules=TARGETS)
    pipe.unet.add_adapter(config, adapter_name='mine')
    trained = picture(moved(pipe))
    plain.load_lora_weights(save_trained(pipe, tmp_path / 'lora'))
    torch.testing.assert_close(picture(plain), trained, rtol=0, atol=1e-5)


# memory savers


def test_slicing_changes_nothing(micro):
    before = picture(micro)
    save_memory(micro, vae_slicing=True).enable_attention_slicing()
    assert micro.vae.use_slicing
    torch.testing.assert_close(picture(micro), before, rtol=0, atol=1e-5)


def saved_bytes(pipe):
    "The gradient of one pass, and the bytes that autograd keeps for it."
    kept = []

    def keep(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    pipe.unet.train().zero_grad()
    context = encode_prompts(pipe, PROMPTS)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pipe.unet(latents(), 500, context.text).sample.pow(2).sum().backward()
    return torch.cat([p.grad.flatten() for p in pipe.unet.parameters()]), sum(kept)


def test_gradient_checkpointing_keeps_less_and_changes_nothing(micro):
    plain, much = saved_bytes(micro)
    thrifty, little = saved_bytes(save_memory(micro, gradient_checkpointing=True))
    torch.testing.assert_close(thrifty, plain, rtol=1e-4, atol=1e-6)
    assert little < 0.7 * much, (little, much)


def test_nothing_is_switched_on_by_default(micro):
    "Each saver has a price."
    processors = {type(p) for p in micro.unet.attn_processors.values()}
    save_memory(micro)
    assert not micro.vae.use_slicing and not micro.unet.is_gradient_checkpointing
    assert {type(p) for p in micro.unet.attn_processors.values()} == processors
