"""The contract reward(images, prompts) -> (B,), and the reward functions of the package"""
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from open_clip import image_transform
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from ddpo_tutorial.pipelines import to_pil
from ddpo_tutorial.rewards import (
    AestheticPredictor, Offloaded, PickScore, TextSimilarity, WeightedSum, check_images, check_rewards, clip_pixels,
    clip_similarity, collapse, jpeg_compressibility, jpeg_incompressibility, jpeg_kilobytes, laion_aesthetic,
    laion_head, load_open_clip, pick_score, score, tiny_aesthetic, tiny_clip_folder, tiny_similarity)
from helpers import PROMPTS, brightness, generator

PAIR = ['a cat', 'an owl']
MEAN, STD = (.5, .4, .3), (.2, .25, .3)

def pictures(n=2, height=64, width=64): return torch.rand(n, 3, height, width, generator=generator())

class FakeClip(nn.Module):
    "A linear image encoder with dropout, in the shape of an open_clip model."
    def __init__(self, size=8):
        super().__init__()
        self.visual = SimpleNamespace(image_size=size, image_mean=MEAN, image_std=STD)
        self.dropout = nn.Dropout(.5)
        self.matrix = nn.Parameter(torch.randn(3 * size * size, 6, generator=generator()))

    def encode_image(self, x): return self.dropout(x.flatten(1) @ self.matrix)

def fake_predictor(): return AestheticPredictor(FakeClip(), torch.arange(6) / 3., torch.tensor(5.))

@pytest.fixture(scope='module')
def shipped(): return tiny_aesthetic()

# the contract

def spoilt(value):
    "Two pictures, the second one not finite."
    return torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), value)])

BAD_IMAGES = {
    'uint8': (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, r'uint8.*\[0, 1\].*255'),
    'list': ([[0.]], TypeError, 'images is list; expected floats'),
    'no batch': (torch.zeros(3, 8, 8), ValueError, r'\(3, 8, 8\) for 2 prompts; expected \(2, 3, H, W\)'),
    'channels last': (torch.zeros(2, 8, 8, 3), ValueError, r'\(2, 8, 8, 3\).*expected \(2, 3, H, W\)'),
    'one too many': (torch.zeros(3, 3, 8, 8), ValueError, r'\(3, 3, 8, 8\) for 2 prompts; .*one image per prompt'),
    '-1 to 1': (torch.linspace(-1, 1, 384).view(2, 3, 8, 8), ValueError, r'from -1 to 1; expected \[0, 1\].*images / 2 \+ 0.5'),
    '0 to 255': (torch.linspace(0, 255, 384).view(2, 3, 8, 8), ValueError, r'from 0 to 255; expected \[0, 1\]'),
    'nan': (spoilt(float('nan')), ValueError, "'an owl' is not finite.*VAE decoder overflowed: decode in float32"),
    'inf': (spoilt(float('inf')), ValueError, "'an owl' is not finite.*VAE decoder overflowed: decode in float32")}

@pytest.mark.parametrize('images, error, words', BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_pitfall_15_image_range(images, error, words):
    "Images in [-1, 1] or [0, 255] scored as if in [0, 1]; a decoder that overflowed, taken for a wrong range."
    for function in (check_images, lambda images, prompts: score(brightness, images, prompts)):
        with pytest.raises(error, match=words): function(images, PAIR)

BAD_REWARDS = {
    '(B, 1)': (torch.zeros(2, 1), ValueError, r'Tensor of shape \(2, 1\) for 2 prompts; expected \(2,\).*squeeze'),
    'array (B, 1)': (np.zeros((2, 1)), ValueError, r'ndarray of shape \(2, 1\) for 2 prompts; expected \(2,\)'),
    'too many': (torch.zeros(3), ValueError, r'\(3,\) for 2 prompts; expected \(2,\)'),
    'list too short': ([1.], ValueError, r'list of shape \(1,\) for 2 prompts; expected \(2,\)'),
    'one number': (torch.tensor(1.), ValueError, r'\(\) for 2 prompts; expected \(2,\).*Average over pixels'),
    'scores and info': ((torch.zeros(2), {}), TypeError, 'returned a tuple; expected.*return the scores alone'),
    'tuple of numbers': ((1., 2.), TypeError, 'returned a tuple'),
    'None': (None, TypeError, 'returned a NoneType; expected a tensor'),
    'nan': (torch.tensor([1., float('nan')]), ValueError, "nan for 'an owl'.*1 of 2 are not finite"),
    'inf': (torch.tensor([float('-inf'), 1.]), ValueError, "-inf for 'a cat'.*expected finite")}

@pytest.mark.parametrize('rewards, error, words', BAD_REWARDS.values(), ids=BAD_REWARDS)
def test_pitfall_19_bad_rewards(rewards, error, words):
    "Rewards that would be broadcast, or poison every advantage; the message names the type or the prompt."
    def broken(images, prompts): return rewards
    for function in (lambda: check_rewards(rewards, PAIR), lambda: score(broken, pictures(), PAIR),
                     lambda: WeightedSum(a=(1., broken))(pictures(), PAIR)):
        with pytest.raises(error, match=words): function()

GOOD_REWARDS = [[1., 2.], [1, 2], [torch.tensor(1.), torch.tensor(2.)], np.array([1., 2.]), np.array([1, 2]),
                torch.tensor([1, 2]), torch.tensor([1., 2.]).half(), torch.tensor([1., 2.]).double()]

@pytest.mark.parametrize('rewards', GOOD_REWARDS, ids=lambda r: f'{type(r).__name__} {getattr(r, "dtype", type(r))}')
def test_rewards_that_are_taken(rewards):
    "Lists, arrays and whole numbers become a float32 tensor."
    result = score(lambda images, prompts: rewards, pictures(), PAIR)
    assert result.dtype == torch.float32 and result.tolist() == [1., 2.]

def test_score_has_no_gradient():
    leaf = pictures().requires_grad_()
    result = score(brightness, leaf, PAIR)
    assert not result.requires_grad
    torch.testing.assert_close(result, leaf.detach().mean((1, 2, 3)))

def test_score_of_no_function():
    with pytest.raises(TypeError, match='a str; expected a function'): score('aesthetic', pictures(), PAIR)

def test_nothing_of_the_callers_is_changed():
    "A reward function that works in place, alone and as a term of a sum."
    def careless(images, prompts):
        values = images.mean((1, 2, 3))
        images.zero_()
        prompts.clear()
        return values

    images, prompts, total = pictures(), list(PAIR), WeightedSum(first=(1., careless), second=(1., brightness))
    for reward, wanted in ((careless, 1), (total, 2), (Offloaded(total), 2)):
        torch.testing.assert_close(score(reward, images, prompts), wanted * pictures().mean((1, 2, 3)))
    assert torch.equal(images, pictures()) and prompts == PAIR

@pytest.mark.parametrize('memory', [torch.zeros(2), np.zeros(2, dtype=np.float32)], ids=['tensor', 'array'])
def test_answers_are_copied(memory):
    "A reward function that answers in the same memory each time."
    def same_memory(images, prompts):
        memory[:] = memory + 1
        return memory

    total = WeightedSum(a=(1., same_memory))
    first = score(same_memory, pictures(), PAIR)
    score(total, pictures(), PAIR)
    score(same_memory, pictures(), PAIR)
    assert first.tolist() == [1., 1.] and total.parts['a'].tolist() == [2., 2.]

class Convolution(nn.Module):
    "A reward of one layer, which refuses images of another dtype than its own."
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 8)

    def forward(self, images, prompts): return self.layer(images).mean((1, 2, 3))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_images_come_in_the_dtype_of_the_reward(dtype):
    "Also inside a sum, beside one of another dtype; scores are float32."
    model, images = Convolution(), pictures()
    wanted = score(model, images, PAIR)
    assert wanted.dtype == torch.float32
    other = WeightedSum(a=(1., Convolution().to(dtype)), b=(1., model))
    other.terms['a'][1].load_state_dict(model.state_dict())
    for reward, factor in ((other.terms['a'][1], 1), (other, 2), (Offloaded(other), 2)):
        for given in (images, images.bfloat16()):
            result = score(reward, given, PAIR)
            assert result.dtype == torch.float32
            torch.testing.assert_close(result, factor * wanted, rtol=.05, atol=.01)

def test_a_sum_hands_on_the_images_as_they_are():
    "A 16-bit network must not round the pictures of the term beside it."
    total = WeightedSum(network=(1., Convolution().bfloat16()), light=(1., brightness))
    for reward in (total, Offloaded(total)):
        score(reward, pictures(), PAIR)
        assert torch.equal(total.parts['light'], brightness(pictures(), PAIR))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_shipped_predictors_in_16_bits(dtype, shipped):
    "Features are compared and the head is applied in float32."
    for make in (tiny_aesthetic, tiny_similarity):
        result, wanted = score(make().to(dtype), pictures(), PAIR), score(make(), pictures(), PAIR)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, wanted, rtol=0, atol=.03)

# JPEG size

def test_jpeg_size_is_the_files(tmp_path):
    "Another quality, unit or rounding than a file that PIL writes."
    images = pictures()
    for i, picture in enumerate(to_pil(images)): picture.save(tmp_path / f'{i}.jpg', quality=95)
    sizes = torch.tensor([(tmp_path / f'{i}.jpg').stat().st_size / 1000 for i in range(2)])
    torch.testing.assert_close(jpeg_incompressibility(images, PAIR), sizes)
    torch.testing.assert_close(jpeg_compressibility(images, PAIR), -sizes)

def test_jpeg_size_orders_pictures():
    "The sign: noise is incompressible, a flat picture is not."
    flat, noise = torch.full((3, 64, 64), .5), pictures(1)[0]
    assert jpeg_kilobytes(noise) > 3 * jpeg_kilobytes(flat)
    assert jpeg_kilobytes(noise, quality=30) < jpeg_kilobytes(noise)

# CLIP

@pytest.mark.parametrize('height, width', [(64, 64), (48, 80), (80, 48), (32, 32)])
def test_clip_preprocessing_is_open_clips(height, width):
    "Another interpolation, crop or normalisation than the one CLIP was trained with."
    images = pictures(2, height, width)
    transform = image_transform(32, is_train=False, mean=MEAN, std=STD)
    wanted = torch.stack([transform(p) for p in to_pil(images)])
    error = (clip_pixels(images, 32, MEAN, STD) - wanted).abs() * min(STD) * 255 # in steps of a byte
    assert error.quantile(.99) < 3 and error.max() < 10 # PIL rounds and clips to bytes after each of its two passes

def test_aesthetic_score_is_the_formula():
    "The head applied to anything but features of length 1."
    images, predictor = pictures(3, 8, 8), fake_predictor()
    pixels = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    features = pixels.flatten(1) @ predictor.clip.matrix
    wanted = (features / features.norm(dim=1, keepdim=True)) @ (torch.arange(6) / 3.) + 5
    torch.testing.assert_close(predictor(images), wanted)

def test_pitfall_14_features_are_normalised():
    "Raw CLIP features give scores of 20 to 30; a longer feature must not score higher."
    images, predictor = pictures(3, 8, 8), fake_predictor()
    def raw(): return predictor.clip.encode_image(clip_pixels(images, 8, MEAN, STD)) @ predictor.weight
    before, raw_before = predictor(images), raw()
    predictor.clip.matrix *= 7
    torch.testing.assert_close(predictor(images), before)
    assert not torch.allclose(raw(), raw_before) # the fault

def test_pitfall_13_predictors_stay_in_eval_mode():
    "Dropout left on in the reward model is noise in every score."
    predictor, images = fake_predictor().train(), pictures(4, 8, 8)
    wrapper = nn.ModuleList([predictor, TextSimilarity(FakeClip()), PickScore(FakeClip())]).train()
    assert not any(m.training for part in wrapper for m in part.modules())
    assert torch.equal(predictor(images), predictor(images))
    predictor.clip.dropout.training = True # the fault
    assert not torch.equal(predictor(images), predictor(images))

def test_aesthetic_gradient_reaches_the_picture_only():
    "Guidance needs the picture's gradient; the predictor itself must not be trained."
    predictor, images = fake_predictor(), pictures(2, 12, 12).requires_grad_()
    predictor(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in predictor.parameters())

def test_shipped_predictor(shipped):
    "A score that depends on the batch, on the mode or on chance."
    images = pictures(5)
    scores = score(shipped.train(), images, ['a cat'] * 5)
    assert scores.shape == (5,) and scores.std() > 0
    alone = torch.cat([score(shipped, image[None], ['a cat']) for image in images])
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(shipped.features(images).norm(dim=1), torch.ones(5))

def test_shipped_similarity():
    "Cosines are in [-1, 1], belong to their own prompt, and the best text is the one `classify` returns."
    similarity, images, texts = tiny_similarity(), pictures(4), ['a cat', 'an owl', 'a fox']
    table = torch.stack([score(similarity, images, [text] * 4) for text in texts], 1)
    assert table.abs().max() <= 1 + 1e-5
    assert torch.equal(similarity.classify(images, texts), table.argmax(1))
    mixed = score(similarity, images, ['a cat', 'an owl', 'a fox', 'a cat'])
    torch.testing.assert_close(mixed, table[range(4), [0, 1, 2, 0]])
    torch.testing.assert_close(similarity.text_features(texts).norm(dim=1), torch.ones(3))

# sums

def test_weighted_sum():
    "Weights left out, or parts reported with their weight."
    images = pictures()
    total = WeightedSum(light=(2., brightness), size=(-.5, jpeg_incompressibility))
    light, size = brightness(images, PAIR), jpeg_incompressibility(images, PAIR)
    torch.testing.assert_close(score(total, images, PAIR), 2 * light - .5 * size)
    torch.testing.assert_close(total.parts, dict(light=light, size=size))

def test_weighted_sum_has_the_gradient_of_its_terms():
    images = pictures(2, 8, 8).requires_grad_()
    predictor = fake_predictor()
    wanted, = torch.autograd.grad(2 * predictor(images).sum(), images)
    got, = torch.autograd.grad(WeightedSum(look=(2., predictor))(images, PAIR).sum(), images)
    torch.testing.assert_close(got, wanted)

def test_weighted_sum_of_nothing():
    "A sum of no rewards would be the integer 0."
    with pytest.raises(ValueError, match=r'no terms; expected e.g. WeightedSum\('): WeightedSum()

@pytest.mark.parametrize('name', ['mean', 'std'])
def test_weighted_sum_with_the_name_of_a_metric(name):
    "The columns reward_mean and reward_std would be overwritten."
    with pytest.raises(ValueError, match=f"cannot be named '{name}'.*another name"):
        WeightedSum(**{name: (1., brightness)})

def test_weighted_sum_moves_and_evaluates_as_one():
    "A term left behind in training mode or on another device."
    term = Wrapped(nn.Dropout(.5))
    total = WeightedSum(noise=(1., term), light=(1., brightness))
    assert term.inner.training
    score(total, pictures(), PAIR)
    assert not term.inner.training
    total.to(torch.float64)
    assert term.scale.dtype == torch.float64

class Wrapped(nn.Module):
    "A reward that is a module with a weight."
    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(()))

    def forward(self, images, prompts): return self.inner(images).mean((1, 2, 3)) * self.scale.detach()

def test_score_switches_dropout_off():
    "Somebody's own reward, freshly made, is in training mode (pitfall 13)."
    reward, images = Wrapped(nn.Dropout(.5)), pictures()
    assert not torch.equal(reward(images, PAIR), reward(images, PAIR)) # the fault
    assert torch.equal(score(reward, images, PAIR), score(reward, images, PAIR))

# the LAION head

def find_head():
    "The published file, where somebody has it; or None."
    name = 'sac+logos+ava1-l14-linearMSE.pth'
    places = [os.environ.get('DDPO_LAION_HEAD'), Path(torch.hub.get_dir()) / 'checkpoints' / name,
              Path(__file__).parents[2] / 'shared' / 'data' / name]
    return next((Path(p) for p in places if p and Path(p).is_file()), None)

needs_head = pytest.mark.skipif(find_head() is None, reason='the LAION head is not here; name it in DDPO_LAION_HEAD')

def mlp(state):
    "The predictor as published: five linear layers with dropout between them, in training mode."
    layers = nn.Sequential(nn.Linear(768, 1024), nn.Dropout(.2), nn.Linear(1024, 128), nn.Dropout(.2),
                           nn.Linear(128, 64), nn.Dropout(.1), nn.Linear(64, 16), nn.Linear(16, 1))
    nn.ModuleDict(dict(layers=layers)).load_state_dict(state)
    return layers

def load_head(): return torch.load(find_head(), map_location='cpu', weights_only=True)

def unit(n=64): return nn.functional.normalize(torch.randn(n, 768, generator=generator()), dim=-1)

@needs_head
def test_head_collapses_to_one_affine_map():
    "The published weights: 17.996 long, bias 5.2366, the same scores as all five layers."
    weight, bias = laion_head(find_head())
    assert weight.norm().item() == pytest.approx(17.996, abs=1e-3) and bias.item() == pytest.approx(5.2366, abs=1e-4)
    layers = mlp(load_head()).eval()
    torch.testing.assert_close(unit() @ weight + bias, layers(unit())[:, 0], rtol=1e-6, atol=2e-6)

@needs_head
def test_pitfall_13_dropout_in_the_published_head():
    "The fault, measured: the sd that training mode adds to every score."
    layers = mlp(load_head())
    noise = torch.stack([layers(unit())[:, 0] for _ in range(100)]).std(0).mean().item()
    assert .02 < noise < .3

def test_collapse_keeps_the_order_of_layers():
    "Ten layers: '10' sorts before '2' as a word."
    names = [0, 2, 4, 6, 8, 10]
    layers = {i: nn.Linear(6, 6 if i < 10 else 1) for i in names}
    x = unit(5)[:, :6]
    wanted = nn.Sequential(*layers.values())(x)[:, 0]
    state = {f'layers.{i}.{k}': v for i, layer in reversed(layers.items()) for k, v in layer.state_dict().items()}
    weight, bias = collapse(state)
    torch.testing.assert_close(x @ weight + bias, wanted)

def random_clip(name):
    "One of open_clip's models, two layers deep and with random weights."
    config = open_clip.get_model_config(name)
    for part in ('vision_cfg', 'text_cfg'): config[part]['layers'] = 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(**config).eval()
    clip.visual.image_mean, clip.visual.image_std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return clip

@pytest.fixture(scope='module')
def vit():
    "OpenAI's ViT-L/14, but shallow and random."
    return random_clip('ViT-L-14-quickgelu')

@needs_head
def test_tensor_path_is_the_pil_path(vit):
    "Within 0.01 of a point: preprocessing on tensors against open_clip's own transform on PIL pictures."
    small = torch.nn.functional.interpolate(pictures(3, 24, 24), size=(512, 512), mode='bicubic').clamp(0, 1)
    predictor = laion_aesthetic(head=find_head(), clip=vit)
    transform = image_transform(224, is_train=False, mean=vit.visual.image_mean, std=vit.visual.image_std)
    with torch.no_grad():
        features = nn.functional.normalize(vit.encode_image(torch.stack([transform(p) for p in to_pil(small)])), dim=-1)
        wanted = features @ predictor.weight + predictor.bias
    assert (score(predictor, small, PAIR + ['a fox']) - wanted).abs().max() < .01

def test_pitfall_14_openais_clip_uses_quickgelu(vit):
    "The plain name builds another activation, and says nothing."
    def kinds(model): return {type(m).__name__ for m in model.modules() if 'GELU' in type(m).__name__}
    assert kinds(vit) == {'QuickGELU'}
    assert kinds(random_clip('ViT-L-14')) == {'GELU'} # the fault

@pytest.fixture
def offline(tmp_path, monkeypatch):
    "No network, and nothing in torch's folder of checkpoints, which is returned."
    for name in ('HTTPS_PROXY', 'https_proxy'): monkeypatch.setenv(name, 'http://127.0.0.1:9')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    assert tmp_path in folder.parents
    folder.mkdir(parents=True)
    return folder

def test_wrong_head_is_refused(offline, tmp_path):
    "A file that is not the published head must not be unpickled, and one given by hand is left alone."
    mine = tmp_path / 'head.pth'
    mine.write_bytes(b'something else')
    with pytest.raises(ValueError, match='LAION head could not be loaded.*head.pth is not the published head.*SHA-256'):
        laion_aesthetic(head=mine)
    assert mine.read_bytes() == b'something else'
    with pytest.raises(ValueError, match='LAION head could not be loaded.*absent.pth'):
        laion_aesthetic(head=tmp_path / 'absent.pth')

@needs_head
def test_head_put_there_by_hand_is_found(offline):
    "The advice of the message; and a broken file in its place is not used."
    advice = 'LAION head could not be loaded.*network, or put it at .*checkpoints.*tiny_aesthetic'
    with pytest.raises(ValueError, match=advice) as told: laion_head()
    path = Path(str(told.value).split('put it at ')[1].split(' yourself')[0])
    path.write_bytes(find_head().read_bytes())
    torch.testing.assert_close(laion_head(), collapse(load_head()))
    path.write_bytes(find_head().read_bytes()[:-1] + b'!')
    with pytest.raises(ValueError, match='The LAION head could not be loaded'): laion_head()

def test_similarity_by_a_published_clip(vit):
    "open_clip's own tokenizer, and a cosine for each picture with its prompt."
    reward, images = clip_similarity(clip=vit), pictures(2, 224, 224)
    pixels = clip_pixels(images, 224, vit.visual.image_mean, vit.visual.image_std)
    ids = open_clip.get_tokenizer('ViT-L-14-quickgelu')(PAIR)
    with torch.no_grad(): image, text, _ = vit(pixels, ids)
    torch.testing.assert_close(score(reward, images, PAIR), (image * text).sum(-1), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('load, name', [(load_open_clip, 'CLIP ViT-L/14'), (pick_score, 'PickScore')])
def test_models_that_cannot_be_had(load, name, offline):
    "Offline without the files: one sentence that says what, why, and what to do."
    advice = 'could not be loaded .*network.*Hugging Face cache.*tiny_aesthetic'
    with pytest.raises(ValueError, match=f'^{name} {advice}') as told: load()
    assert '\n' not in str(told.value)

# PickScore

def random_pick_score():
    "A CLIP of PickScore's class with random weights, and the tiny tokenizer."
    tokenizer = CLIPTokenizer.from_pretrained(tiny_clip_folder().parent / 'tokenizer')
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = small | dict(vocab_size=362, max_position_embeddings=16, bos_token_id=360, eos_token_id=361)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = small | dict(image_size=32, patch_size=8)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    return PickScore(clip, tokenizer)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_pick_score_in_16_bits(dtype):
    reward, images = random_pick_score(), pictures(3)
    wanted = score(reward, images, PROMPTS[:3])
    got = score(reward.to(dtype), images, PROMPTS[:3])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0, atol=.2) # of about 14, the factor

def test_pick_score_is_the_models_own_logit():
    "Against transformers' preprocessing on PIL pictures: logits_per_image of each picture with its own prompt."
    reward, images = random_pick_score(), pictures(3)
    processor = CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    pixels = processor(to_pil(images), return_tensors='pt')
    words = reward.tokenizer(PROMPTS[:3], padding=True, return_tensors='pt')
    with torch.no_grad(): wanted = reward.clip(**pixels, **words).logits_per_image.diagonal()
    got = score(reward, images, PROMPTS[:3])
    assert (got - wanted).abs().max() < .05 * wanted.std() + 1e-3 and got.std() > 0

def test_pick_score_reads_the_prompt_and_not_the_neighbours():
    "Padding to the longest prompt must not change the others; another prompt must change the score."
    reward, images = random_pick_score(), pictures(2)
    alone = torch.cat([score(reward, images[i:i + 1], [PROMPTS[i]]) for i in range(2)])
    torch.testing.assert_close(score(reward, images, PROMPTS[:2]), alone, rtol=1e-4, atol=1e-5)
    long = 'a pencil sketch of a hippopotamus on a blue background'
    padded = score(reward, images.repeat(2, 1, 1, 1)[:3], [*PROMPTS[:2], long])[:2]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(score(reward, images, ['a whale'] * 2), alone, rtol=1e-4, atol=1e-5)

# on the CPU between calls

class Traveller(nn.Module):
    "A reward that notes where it is sent."
    def __init__(self):
        super().__init__()
        self.places = []

    def to(self, device):
        self.places.append(str(device))
        return self

    def forward(self, images, prompts):
        if prompts[0] == 'raise': raise RuntimeError('no')
        return brightness(images, prompts)

def test_offloaded_goes_there_and_back():
    "Also when the reward fails."
    inner = Traveller()
    reward = Offloaded(inner)
    torch.testing.assert_close(reward(pictures(), PAIR), brightness(pictures(), PAIR))
    assert inner.places == ['cpu', 'cpu', 'cpu'] # at the start, to the images, back
    with pytest.raises(RuntimeError, match='^no$'): reward(pictures(), ['raise', 'raise'])
    assert inner.places == ['cpu'] * 5

def test_offloaded_shows_the_parts_inside():
    reward = Offloaded(WeightedSum(light=(2., brightness)))
    assert reward.parts == {}
    score(reward, pictures(), PAIR)
    assert list(reward.parts) == ['light']
