"""The contract reward(images, prompts) -> (B,), and the reward functions of the package. What is
refused is in test_checks.py.

Run: python -m pytest tests/test_rewards.py -n 0
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import brightness, generator
from open_clip import image_transform
from torch import nn

from ddpo_tutorial.pipelines import to_pil
from ddpo_tutorial.predictors import PickScore, place_reward
from ddpo_tutorial.rewards import (
    AestheticPredictor,
    TextSimilarity,
    WeightedSum,
    clip_pixels,
    jpeg_compressibility,
    jpeg_incompressibility,
    jpeg_kilobytes,
    load_tiny_clip,
    score,
    score_terms,
    tiny_aesthetic,
    tiny_similarity,
)

PAIR = ['a cat', 'an owl']
MEAN = (0.5, 0.4, 0.3)
STD = (0.2, 0.25, 0.3)


def pictures(n=2, height=64, width=64):
    return torch.rand(n, 3, height, width, generator=generator())


class FakeClip(nn.Module):
    "A linear image encoder with dropout, in the shape of an open_clip model."

    def __init__(self, size=8):
        super().__init__()
        self.visual = SimpleNamespace(image_size=size, image_mean=MEAN, image_std=STD)
        self.dropout = nn.Dropout(0.5)
        self.matrix = nn.Parameter(torch.randn(3 * size * size, 6, generator=generator()))

    def encode_image(self, x):
        return self.dropout(x.flatten(1) @ self.matrix)


def fake_predictor():
    return AestheticPredictor(FakeClip(), torch.arange(6) / 3.0, torch.tensor(5.0))


@pytest.fixture(scope='module')
def shipped():
    return tiny_aesthetic()


# the contract


def test_score_has_no_gradient():
    leaf = pictures().requires_grad_()
    result = score(brightness, leaf, PAIR)
    assert not result.requires_grad
    torch.testing.assert_close(result, leaf.detach().mean((1, 2, 3)))


def test_score_of_no_function():
    with pytest.raises(TypeError, match='a str; expected a function'):
        score('aesthetic', pictures(), PAIR)


@pytest.mark.parametrize(
    'memory', [torch.zeros(2), np.zeros(2, dtype=np.float32)], ids=['tensor', 'array']
)
def test_answers_are_copied(memory):
    "A reward function that answers in the same memory each time."

    def same_memory(images, prompts):
        memory[:] = memory + 1
        return memory

    total = WeightedSum(a=(1.0, same_memory))
    first = score(same_memory, pictures(), PAIR)
    _, terms = score_terms(total, pictures(), PAIR)
    score(same_memory, pictures(), PAIR)
    assert first.tolist() == [1.0, 1.0]
    assert terms['a'].tolist() == [2.0, 2.0]


class Convolution(nn.Module):
    "A reward of one layer, which refuses images of another dtype than its own."

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 8)

    def forward(self, images, prompts):
        return self.layer(images).mean((1, 2, 3))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_images_come_in_the_dtype_of_the_reward(dtype):
    "Also inside a sum, beside one of another dtype; scores are float32."
    model = Convolution()
    images = pictures()
    wanted = score(model, images, PAIR)
    assert wanted.dtype == torch.float32
    other = Convolution().to(dtype)
    other.load_state_dict(model.state_dict())
    total = WeightedSum(a=(1.0, other), b=(1.0, model))
    waiting = place_reward(total, 'cpu', offload=True)
    for reward, factor in ((other, 1), (total, 2), (waiting, 2)):
        for given in (images, images.bfloat16()):
            result = score(reward, given, PAIR)
            assert result.dtype == torch.float32
            torch.testing.assert_close(result, factor * wanted, rtol=0.05, atol=0.01)


def test_a_sum_hands_on_the_images_as_they_are():
    "A 16-bit network must not round the pictures of the term beside it."
    total = WeightedSum(network=(1.0, Convolution().bfloat16()), light=(1.0, brightness))
    for reward in (total, place_reward(total, 'cpu', offload=True)):
        _, terms = score_terms(reward, pictures(), PAIR)
        assert torch.equal(terms['light'], brightness(pictures(), PAIR))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_shipped_predictors_in_16_bits(dtype, shipped):
    "Features are compared and the head is applied in float32."
    for make in (tiny_aesthetic, tiny_similarity):
        result, wanted = score(make().to(dtype), pictures(), PAIR), score(make(), pictures(), PAIR)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, wanted, rtol=0, atol=0.03)


# JPEG size


def test_jpeg_size_is_the_files(tmp_path):
    "Another quality, unit or rounding than a file that PIL writes."
    images = pictures()
    for i, picture in enumerate(to_pil(images)):
        picture.save(tmp_path / f'{i}.jpg', quality=95)
    sizes = torch.tensor([(tmp_path / f'{i}.jpg').stat().st_size / 1000 for i in range(2)])
    torch.testing.assert_close(jpeg_incompressibility(images, PAIR), sizes)
    torch.testing.assert_close(jpeg_compressibility(images, PAIR), -sizes)


def test_jpeg_size_orders_pictures():
    "The sign: noise is incompressible, a flat picture is not."
    flat, noise = torch.full((3, 64, 64), 0.5), pictures(1)[0]
    assert jpeg_kilobytes(noise) > 3 * jpeg_kilobytes(flat)
    assert jpeg_kilobytes(noise, quality=30) < jpeg_kilobytes(noise)


# CLIP


@pytest.mark.parametrize('height, width', [(64, 64), (48, 80), (80, 48), (32, 32)])
def test_clip_preprocessing_is_open_clips(height, width):
    "Another interpolation, crop or normalisation than the one CLIP was trained with."
    images = pictures(2, height, width)
    transform = image_transform(32, is_train=False, mean=MEAN, std=STD)
    wanted = torch.stack([transform(p) for p in to_pil(images)])
    error = (
        (clip_pixels(images, 32, MEAN, STD) - wanted).abs() * min(STD) * 255
    )  # in steps of a byte
    assert (
        error.quantile(0.99) < 3 and error.max() < 10
    )  # PIL rounds and clips to bytes after each of its two passes


def test_aesthetic_score_is_the_formula():
    "The head applied to anything but features of length 1."
    images, predictor = pictures(3, 8, 8), fake_predictor()
    pixels = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    features = pixels.flatten(1) @ predictor.clip.matrix
    wanted = (features / features.norm(dim=1, keepdim=True)) @ (torch.arange(6) / 3.0) + 5
    torch.testing.assert_close(predictor(images), wanted)


def test_features_are_normalised():
    "Raw CLIP features give scores of 20 to 30; a longer feature must not score higher."
    images, predictor = pictures(3, 8, 8), fake_predictor()

    def raw():
        return predictor.clip.encode_image(clip_pixels(images, 8, MEAN, STD)) @ predictor.weight

    before, raw_before = predictor(images), raw()
    predictor.clip.matrix *= 7
    torch.testing.assert_close(predictor(images), before)
    assert not torch.allclose(raw(), raw_before)  # the fault


def test_predictors_stay_in_eval_mode():
    "Dropout left on in the reward model is noise in every score."
    predictor, images = fake_predictor().train(), pictures(4, 8, 8)
    wrapper = nn.ModuleList([predictor, TextSimilarity(FakeClip()), PickScore(FakeClip())]).train()
    assert not any(m.training for part in wrapper for m in part.modules())
    assert torch.equal(predictor(images), predictor(images))
    predictor.clip.dropout.training = True  # the fault
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
    "Cosines in [-1, 1] that belong to their own prompt; `classify` returns the best text."
    similarity, images, texts = tiny_similarity(), pictures(4), ['a cat', 'an owl', 'a fox']
    table = torch.stack([score(similarity, images, [text] * 4) for text in texts], 1)
    assert table.abs().max() <= 1 + 1e-5
    assert torch.equal(similarity.classify(images, texts), table.argmax(1))
    mixed = score(similarity, images, ['a cat', 'an owl', 'a fox', 'a cat'])
    torch.testing.assert_close(mixed, table[range(4), [0, 1, 2, 0]])
    torch.testing.assert_close(similarity.text_features(texts).norm(dim=1), torch.ones(3))


# sums


def test_weighted_sum():
    "Weights left out, or terms reported with their weight."
    images = pictures()
    total = WeightedSum(light=(2.0, brightness), size=(-0.5, jpeg_incompressibility))
    light = brightness(images, PAIR)
    size = jpeg_incompressibility(images, PAIR)
    rewards, terms = score_terms(total, images, PAIR)
    torch.testing.assert_close(rewards, 2 * light - 0.5 * size)
    torch.testing.assert_close(terms, dict(light=light, size=size))
    for called in (score(total, images, PAIR), total(images, PAIR), total.total(terms)):
        assert torch.equal(called, rewards)


def test_only_a_sum_has_terms():
    rewards, terms = score_terms(brightness, pictures(), PAIR)
    assert torch.equal(rewards, score(brightness, pictures(), PAIR))
    assert terms == {}


def test_a_sum_of_sums():
    inner = WeightedSum(light=(2.0, brightness))
    rewards, terms = score_terms(WeightedSum(twice=(3.0, inner)), pictures(), PAIR)
    torch.testing.assert_close(rewards, 6 * brightness(pictures(), PAIR))
    torch.testing.assert_close(terms, dict(twice=2 * brightness(pictures(), PAIR)))


def test_weighted_sum_has_the_gradient_of_its_terms():
    "So that a picture can be changed along it; `score` and `score_terms` have none."
    images = pictures(2, 8, 8).requires_grad_()
    predictor = fake_predictor()
    (wanted,) = torch.autograd.grad(predictor(images).sum(), images)
    total = WeightedSum(look=(2.0, predictor))
    (found,) = torch.autograd.grad(total(images, PAIR).sum(), images)
    torch.testing.assert_close(found, 2 * wanted)
    rewards, terms = score_terms(total, images, PAIR)
    assert not rewards.requires_grad and not terms['look'].requires_grad


def test_weighted_sum_of_nothing():
    "A sum of no rewards would be the integer 0."
    with pytest.raises(ValueError, match=r'no terms; expected e.g. WeightedSum\('):
        WeightedSum()


class Renamed(WeightedSum):
    "A sum that names its terms itself."

    def scores(self, images, prompts):
        return {'std': brightness(images, prompts), **super().scores(images, prompts)}


@pytest.mark.parametrize(
    'name, reward',
    [
        ('mean', WeightedSum(mean=(1.0, brightness))),
        ('std', WeightedSum(light=(1.0, brightness), std=(1.0, brightness))),
        ('std', Renamed(light=(1.0, brightness))),
    ],
)
def test_weighted_sum_with_the_name_of_a_metric(name, reward):
    "The columns reward_mean and reward_std would be overwritten."
    with pytest.raises(ValueError, match=f"'{name}' is the name of another metric.*another name"):
        score_terms(reward, pictures(), PAIR)


@pytest.mark.parametrize('weight', [1e39, float('nan'), float('-inf')])
def test_a_total_that_is_not_finite(weight):
    "Of finite terms; it would poison every advantage."
    total = WeightedSum(light=(weight, brightness), size=(1.0, jpeg_incompressibility))
    with pytest.raises(ValueError, match="for 'a cat'.*expected finite numbers"):
        score_terms(total, pictures(), PAIR)


@pytest.mark.parametrize('error', [StopIteration, GeneratorExit, SystemExit])
def test_what_would_end_something_else_is_an_error_of_the_reward(error):
    "A loop would be shorter, or Python would end without a word."

    def raises(images, prompts):
        raise error(3)

    for reward in (raises, WeightedSum(alone=(1.0, raises))):
        with pytest.raises(
            RuntimeError, match=rf'The reward function raised {error.__name__}\(3\)'
        ):
            score_terms(reward, pictures(), PAIR)
    with pytest.raises(KeyboardInterrupt):  # the user's own
        score(interrupted, pictures(), PAIR)


def interrupted(images, prompts):
    raise KeyboardInterrupt


def test_tiny_clip_is_in_evaluation_mode():
    "Also when it is used directly, and nobody switches it."
    images = clip_pixels(pictures(), 64, MEAN, STD)
    clip = load_tiny_clip()
    assert not any(module.training for module in clip.modules())
    again = clip.encode_image(images)
    torch.testing.assert_close(again, tiny_similarity().clip.encode_image(images))
    assert not torch.allclose(again, clip.train().encode_image(images), atol=1e-3)  # the fault


class Wrapped(nn.Module):
    "A reward that is a module with a weight."

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images, prompts):
        return self.inner(images).mean((1, 2, 3)) * self.scale.detach()


def test_score_switches_dropout_off():
    "Somebody's own reward, freshly made, is in training mode."
    reward = Wrapped(nn.Dropout(0.5))
    images = pictures()
    assert not torch.equal(reward(images, PAIR), reward(images, PAIR))  # the fault
    assert torch.equal(score(reward, images, PAIR), score(reward, images, PAIR))


def test_a_sum_evaluates_and_moves_its_terms():
    "A term left behind in training mode or on another device."
    term = Wrapped(nn.Dropout(0.5))
    total = WeightedSum(noise=(1.0, term), light=(1.0, brightness))
    assert term.inner.training
    score(total, pictures(), PAIR)
    assert not term.inner.training
    place_reward(total, 'meta', offload=False)
    assert term.scale.device.type == 'meta'
