"""Loading, encoding, decoding, pictures"""
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from diffusers.models.attention_processor import AttnProcessor2_0

from ddpo_tutorial.pipelines import (check_prompts, contact_sheet, ddim_scheduler, decode_latents, encode_prompts, fit_text, load_pipeline, model_source,
    tiny_folder, to_pil)
from helpers import PROMPTS, calls_of, generator

LONG = 'a' + ' cat' * 20

# loading

def test_loads_for_training(tiny):
    "Dropout left on, half-precision weights, or gradients into the VAE and the text encoder."
    for part in (tiny.unet, tiny.vae, tiny.text_encoder):
        assert not any(m.training for m in part.modules())
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert {p.requires_grad for p in part.parameters()} == {part is tiny.unet}

def test_pitfall_05_latents_are_not_clamped(tiny):
    "`from_config` turns clip_sample on where a config is silent, which clamps latents to [-1, 1]."
    silent = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    assert DDIMScheduler.from_config(silent.config).config.clip_sample # the fault
    assert ddim_scheduler(silent).config.clip_sample is False
    assert tiny.scheduler.config.clip_sample is False

@pytest.mark.parametrize('changes', [dict(beta_end=.02), dict(set_alpha_to_one=False, steps_offset=1), dict(prediction_type='v_prediction')])
def test_scheduler_keeps_the_noise_schedule(changes):
    "Swapping the scheduler must not swap the noise schedule the model was trained with."
    old = PNDMScheduler(skip_prk_steps=True, **changes)
    new = ddim_scheduler(old)
    assert torch.equal(new.alphas_cumprod, old.alphas_cumprod)
    assert {k: new.config[k] for k in changes} == changes

def test_pitfall_28_fast_attention_is_kept(tiny):
    "Attention slicing replaces the fast processors."
    kinds = lambda: {type(p) for p in tiny.unet.attn_processors.values()}
    assert kinds() == {AttnProcessor2_0}

@pytest.mark.parametrize('name', ['stable-diffusion', './no/such/folder', '/no/such', '~/no/such', 'a/b/c'])
def test_unknown_model_is_refused(name):
    "An unknown name must say which names exist, before anything is downloaded."
    with pytest.raises(ValueError, match=f"no model named '{name}'.*'tiny'.*save_pretrained.*hub id"): model_source(name)

def test_folder_that_is_no_pipeline_is_refused(tmp_path):
    "A folder without a pipeline must not be taken for a hub id."
    with pytest.raises(ValueError, match="no diffusers folder.*model_index.json.*'tiny'"): load_pipeline(str(tmp_path))

@pytest.mark.parametrize('name, source', [('tiny', str(tiny_folder())), (tiny_folder(), str(tiny_folder())), ('owner/name', 'owner/name')])
def test_known_models_pass(name, source):
    "The name of the shipped model, a folder and a hub id."
    assert model_source(name) == source

def test_saved_pipeline_loads_again(tmp_path, micro):
    "What was trained must come back from its folder with the same weights."
    micro.save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path), device='cpu')
    assert all(torch.equal(a, b) for a, b in zip(loaded.unet.parameters(), micro.unet.parameters()))

# prompts

@pytest.mark.parametrize('guidance', [True, False])
def test_encoding_is_the_pipelines_own(tiny, guidance):
    "Another padding, layer or order than diffusers' own encoding."
    context = encode_prompts(tiny, PROMPTS)
    text, empty = tiny.encode_prompt(PROMPTS, 'cpu', 1, guidance)
    torch.testing.assert_close(context.text, text, rtol=0, atol=1e-5)
    if guidance: torch.testing.assert_close(context.empty.expand_as(empty), empty, rtol=0, atol=1e-5)

def test_each_prompt_is_encoded_once(micro):
    "Equal prompts cost one row, and no gradient reaches the text encoder."
    calls = calls_of(micro.text_encoder)
    micro.text_encoder.requires_grad_(True)
    context = encode_prompts(micro, PROMPTS)
    assert [len(c) for c in calls] == [1 + len(set(PROMPTS))]
    assert torch.equal(context.text[0], context.text[2]) and not torch.equal(context.text[0], context.text[1])
    assert not context.text.requires_grad

@pytest.mark.parametrize('prompts, error, words', [
    ([], ValueError, 'no prompts.*at least one'),
    ('a cat', TypeError, r"the string 'a cat'.*\['a cat'\]"),
    (['a cat', 3], TypeError, 'holds 3, a int.*strings'),
    ([None], TypeError, 'holds None')])
def test_bad_prompts(micro, prompts, error, words):
    "A string would be read letter by letter; an empty list would fail far away."
    for function in (check_prompts, lambda p: encode_prompts(micro, p)):
        with pytest.raises(error, match=words): function(prompts)

def test_long_prompt_warns_of_what_is_cut(micro):
    "A prompt longer than the encoder reads is cut silently by the tokenizer."
    length = len(micro.tokenizer(LONG).input_ids)
    with pytest.warns(UserWarning, match=f'reads 16 tokens, this prompt has {length}.*will not see') as caught: cut = encode_prompts(micro, [LONG, LONG, 'a cat'])
    assert len(caught) == 1
    lost = str(caught[0].message).split('not see ')[1].strip("'.")
    assert LONG.endswith(lost)
    torch.testing.assert_close(cut.text[:1], encode_prompts(micro, [LONG[:-len(lost)].strip()]).text)

def test_short_prompts_do_not_warn(micro):
    "A warning for every prompt would soon be read by nobody."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        encode_prompts(micro, PROMPTS)

# images

def latents(n=5): return torch.randn(n, 4, 8, 8, generator=generator())

def test_decoding_is_the_pipelines_own(micro):
    "A wrong scale, shift or range of the images."
    raw = micro.vae.decode(latents() / micro.vae.config.scaling_factor).sample
    torch.testing.assert_close(decode_latents(micro, latents()), micro.image_processor.postprocess(raw, output_type='pt'))

def test_pitfall_16_scaling_factor_is_read(micro):
    "A hard-coded 0.18215 decodes another VAE's latents wrongly."
    right = decode_latents(micro, latents())
    micro.vae.register_to_config(scaling_factor=.18215)
    assert (decode_latents(micro, latents()) - right).abs().max() > .01

@pytest.mark.parametrize('batch_size', [1, 2, 5, 100])
def test_decoding_in_parts(micro, batch_size):
    "A last part that is dropped or misplaced."
    torch.testing.assert_close(decode_latents(micro, latents(), batch_size), decode_latents(micro, latents(), 5), rtol=0, atol=1e-5)

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
    picture = to_pil(levels / 255)[0]
    assert picture.size == (8, 8)
    assert [picture.getpixel((x, y)) for y in range(8) for x in range(8)] == [tuple(p) for p in levels[0].permute(1, 2, 0).reshape(-1, 3).tolist()]

@pytest.mark.parametrize('n, columns, titles, size', [(5, 2, False, (2, 3)), (5, 8, True, (5, 1)), (1, 1, True, (1, 1))])
def test_contact_sheet_layout(n, columns, titles, size):
    "A row too few, or pictures over each other."
    images = torch.linspace(.1, .9, n).view(n, 1, 1, 1).expand(n, 3, 4, 4)
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
    assert fitted == title if width == 1000 else fitted.endswith('…') and title.startswith(fitted[:-1])
