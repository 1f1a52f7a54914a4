"""The contract reward(images, prompts) -> (B,), and the rewards of the package"""
from types import SimpleNamespace

import pytest
import torch
from open_clip import image_transform
from torch import nn

from ddpo_tutorial.pipelines import to_pil
from ddpo_tutorial.rewards import (AestheticPredictor, TextSimilarity, WeightedSum, check_images, check_rewards, clip_pixels, jpeg_compressibility,
    jpeg_incompressibility, jpeg_kilobytes, score, tiny_aesthetic, tiny_similarity)
from helpers import brightness, generator

PAIR = ['a cat', 'an owl']

def pictures(n=2, height=64, width=64): return torch.rand(n, 3, height, width, generator=generator())

class FakeClip(nn.Module):
    "A linear image encoder with dropout, in the shape of an open_clip model."
    def __init__(self, size=8):
        super().__init__()
        self.visual = SimpleNamespace(image_size=size, image_mean=(.5, .4, .3), image_std=(.2, .25, .3))
        self.dropout = nn.Dropout(.5)
        self.register_buffer('matrix', torch.randn(3 * size * size, 6, generator=generator()))

    def encode_image(self, x): return self.dropout(x.flatten(1) @ self.matrix)

def fake_predictor(): return AestheticPredictor(FakeClip(), torch.arange(6) / 3., torch.tensor(5.))

@pytest.fixture(scope='module')
def shipped(): return tiny_aesthetic()

# the contract

BAD_IMAGES = [
    (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, r'uint8.*\[0, 1\].*255'),
    ([[0.]], TypeError, 'images is list.*float tensor'),
    (torch.zeros(3, 8, 8), ValueError, r'\(3, 8, 8\).*expected \(B, 3, H, W\)'),
    (torch.zeros(2, 8, 8, 3), ValueError, r'\(2, 8, 8, 3\).*expected \(B, 3, H, W\)'),
    (torch.linspace(-1, 1, 384).view(2, 3, 8, 8), ValueError, r'from -1 to 1; expected \[0, 1\].*images / 2 \+ 0.5'),
    (torch.linspace(0, 255, 384).view(2, 3, 8, 8), ValueError, r'from 0 to 255; expected \[0, 1\]'),
    (torch.full((2, 3, 8, 8), float('nan')), ValueError, r'nan.*expected \[0, 1\]')]

@pytest.mark.parametrize('images, error, words', BAD_IMAGES, ids=['uint8', 'list', 'no batch', 'channels last', '-1 to 1', '0 to 255', 'nan'])
def test_pitfall_15_image_range(images, error, words):
    "Images in [-1, 1] or [0, 255] scored as if they were in [0, 1]."
    for function in (check_images, lambda x: score(brightness, x, PAIR), lambda x: jpeg_incompressibility(x, PAIR), fake_predictor()):
        with pytest.raises(error, match=words): function(images)

BAD_REWARDS = [
    (torch.zeros(2, 1), ValueError, r'\(2, 1\) for 2 prompts; expected \(2,\)'),
    (torch.zeros(3), ValueError, r'\(3,\) for 2 prompts; expected \(2,\)'),
    (torch.tensor(1.), ValueError, r'\(\) for 2 prompts; expected \(2,\)'),
    (torch.zeros(2, dtype=torch.int64), TypeError, r'int64; expected a float tensor.*\.float\(\)'),
    ([1., 2.], TypeError, 'list; expected a float tensor'),
    (None, TypeError, 'NoneType; expected a float tensor'),
    (torch.tensor([1., float('nan')]), ValueError, "nan for the prompt 'an owl'.*1 of 2 are not finite"),
    (torch.tensor([float('-inf'), 1.]), ValueError, "-inf for the prompt 'a cat'.*expected finite")]

@pytest.mark.parametrize('rewards, error, words', BAD_REWARDS, ids=['(B,1)', 'too many', 'one number', 'integers', 'list', 'None', 'nan', 'inf'])
def test_pitfall_19_bad_rewards(rewards, error, words):
    "Rewards that would be broadcast, truncated or poison every advantage; the message names the prompt."
    broken = lambda images, prompts: rewards
    for function in (lambda: check_rewards(rewards, PAIR), lambda: score(broken, pictures(), PAIR), lambda: WeightedSum(a=(1., broken))(pictures(), PAIR)):
        with pytest.raises(error, match=words): function()

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_score_passes_what_is_right(dtype):
    "One float32 number an image, without gradient."
    leaf = pictures().requires_grad_()
    result = score(lambda images, prompts: brightness(images, prompts).to(dtype), leaf, PAIR)
    assert result.dtype == torch.float32 and not result.requires_grad
    torch.testing.assert_close(result, leaf.detach().mean((1, 2, 3)))

def test_score_counts():
    "Images and prompts out of step."
    with pytest.raises(ValueError, match='2 images and 3 prompts; expected one prompt an image'): score(brightness, pictures(), ['a'] * 3)

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
    mean, std = (.5, .4, .3), (.2, .25, .3)
    transform = image_transform(32, is_train=False, mean=mean, std=std)
    wanted = torch.stack([transform(p) for p in to_pil(images)])
    error = (clip_pixels(images, 32, mean, std) - wanted).abs() * min(std) * 255 # in steps of a byte
    assert error.quantile(.99) < 3 and error.max() < 10 # PIL rounds and clips to bytes after each of its two passes

def test_aesthetic_score_is_the_formula():
    "The head applied to anything but features of length 1."
    images, predictor = pictures(3, 8, 8), fake_predictor()
    features = ((images - torch.tensor([.5, .4, .3]).view(3, 1, 1)) / torch.tensor([.2, .25, .3]).view(3, 1, 1)).flatten(1) @ predictor.clip.matrix
    torch.testing.assert_close(predictor(images), (features / features.norm(dim=1, keepdim=True)) @ (torch.arange(6) / 3.) + 5)

def test_pitfall_14_features_are_normalised():
    "Raw CLIP features give scores of 20 to 30; a longer feature must not score higher."
    images, predictor = pictures(3, 8, 8), fake_predictor()
    raw = lambda: predictor.clip.encode_image(clip_pixels(images, 8, predictor.clip.visual.image_mean, predictor.clip.visual.image_std)) @ predictor.weight
    before, raw_before = predictor(images), raw()
    predictor.clip.matrix *= 7
    torch.testing.assert_close(predictor(images), before)
    assert not torch.allclose(raw(), raw_before) # the fault

def test_pitfall_13_judge_stays_in_eval_mode():
    "Dropout left on in the reward model is noise in every score."
    predictor, images = fake_predictor().train(), pictures(4, 8, 8)
    wrapper = nn.ModuleList([predictor, TextSimilarity(FakeClip(), None)]).train()
    assert not any(m.training for part in (predictor, wrapper[1].predictor) for m in part.modules())
    assert torch.equal(predictor(images), predictor(images))
    predictor.clip.dropout.training = True # the fault
    assert not torch.equal(predictor(images), predictor(images))

def test_aesthetic_gradient_reaches_the_picture_only():
    "Guidance needs the picture's gradient; the judge itself must not be trained."
    predictor, images = fake_predictor(), pictures(2, 12, 12).requires_grad_()
    predictor(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in predictor.parameters())

def test_shipped_judge(shipped):
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
    torch.testing.assert_close(score(similarity, images, ['a cat', 'an owl', 'a fox', 'a cat']), table[range(4), [0, 1, 2, 0]])
    torch.testing.assert_close(similarity.text_features(texts).norm(dim=1), torch.ones(3))

# sums

def test_weighted_sum():
    "Weights left out, or parts reported with their weight."
    images = pictures()
    total = WeightedSum(light=(2., brightness), size=(-.5, jpeg_incompressibility))
    torch.testing.assert_close(score(total, images, PAIR), 2 * brightness(images, PAIR) - .5 * jpeg_incompressibility(images, PAIR))
    torch.testing.assert_close(total.parts, dict(light=brightness(images, PAIR), size=jpeg_incompressibility(images, PAIR)))

def test_weighted_sum_of_nothing():
    "A sum of no rewards would be the integer 0."
    with pytest.raises(ValueError, match=r'no terms; expected name=\(weight, reward\)'): WeightedSum()
