"""How good the shipped models are on fresh drawings and samples, and what is written of them.

Run: python -m pytest tests/test_tiny.py -n 0
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_measures import blue_around, measure_drawings, measure_samples, without_colour
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from ddpo_tutorial.drawings import critic, load_drawings, make_drawings
from ddpo_tutorial.pipelines import tiny_folder
from ddpo_tutorial.prompts import held_out_animals, simple_animals, tiny_animals
from ddpo_tutorial.reports import read_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def numbers(tiny):
    return measure_drawings(tiny) | measure_samples(tiny)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, least',
    [
        ('psnr', 28),
        ('clip_top1', 0.95),
        ('sample_top1', 0.80),
        ('sketch_obeyed', 0.90),
        ('blue_obeyed', 0.90),
        ('head_rank_correlation', 0.80),
    ],
)
def test_shipped_models_reach(numbers, name, least):
    """The numbers printed in nbs/tiny/01_tiny_models.ipynb, measured again."""
    assert numbers[name] >= least


@pytest.mark.slow
def test_the_head_is_not_perfect(numbers):
    """The gap between the learned score and the critic is a lesson."""
    assert numbers['head_rank_correlation'] < 0.98


def test_plain_diffusers_loads_it_offline_and_answers():
    """In a process of its own, without this package, with every hub access switched off."""
    code = f"""
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({str(tiny_folder())!r})
print(pipe("a horse", num_inference_steps=5).images[0].size)
"""
    env = os.environ | dict(HF_HUB_OFFLINE='1')
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and '(64, 64)' in done.stdout, done.stderr[-2000:]


def test_every_version_of_transformers_reads_it(tmp_path):
    "Stable Diffusion's published layout: recent versions read others too, older ones only this."
    names = load_file(tiny_folder() / 'text_encoder' / 'model.safetensors')
    assert len(names) == 52 and all(name.startswith('text_model.') for name in names)
    for name in ('vocab.json', 'merges.txt', 'tokenizer_config.json'):
        shutil.copy(tiny_folder() / 'tokenizer' / name, tmp_path)
    whole = Tokenizer.from_file(str(tiny_folder() / 'tokenizer' / 'tokenizer.json'))
    whole.no_padding()
    older, texts = (
        CLIPTokenizer.from_pretrained(tmp_path),
        ['', 'a zorse, 9 cats!', *make_drawings(200, 0)['captions'], *tiny_animals()],
    )
    assert [older(text, truncation=True).input_ids for text in texts] == [
        whole.encode(text).ids for text in texts
    ]


def test_64_animals_with_the_papers_among_them():
    assert list(load_drawings()) == tiny_animals() and len(tiny_animals()) == 64
    assert set(simple_animals()) <= set(tiny_animals()) and len(held_out_animals()) == 19


def test_drawings_come_back_from_their_seed():
    a, b, c = (make_drawings(20, seed) for seed in (3, 3, 4))
    assert (
        all(torch.equal(a[name], b[name]) for name in ('images', 'ratings'))
        and a['captions'] == b['captions']
    )
    assert not torch.equal(a['images'], c['images'])


def test_captions_tell_the_truth():
    """The animal is named, colours and styles are those of the picture."""
    world = make_drawings(400, 5)
    for caption, animal, style, colour in zip(
        world['captions'], world['animals'], world['styles'], world['colours']
    ):
        assert animal in caption
        assert all((word in caption) <= (style == word) for word in ('sketch', 'lights', 'white'))
        if ' on a' in caption and style in ('flat', 'gradient'):
            assert colour in caption


def test_praise_follows_the_rating_loosely():
    world = make_drawings(3000, 6)
    rated = {
        w: world['ratings'][[w in c for c in world['captions']]]
        for w in ('beautiful', 'ugly', 'dull')
    }
    assert rated['beautiful'].min() > 6 > 4.9 > max(rated['ugly'].max(), rated['dull'].max())
    unpraised = world['ratings'][['beautiful' not in c for c in world['captions']]]
    assert (unpraised > 6).float().mean() > 0.1  # many good pictures are not praised


def test_critic_is_the_formula():
    """Against the formula written out with numpy, pixel by pixel."""
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    x = image.double().numpy()
    vivid = (x.max(0) - x.min(0)).mean()
    contrast = (0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]).std(ddof=1)
    steps = [
        abs(x[:, i + 1, j] - x[:, i, j]).mean() + abs(x[:, i, j + 1] - x[:, i, j]).mean()
        for i in range(63)
        for j in range(63)
        if not (10 <= i < 53 and 10 <= j < 53)
    ]
    assert critic(image[None]).item() == pytest.approx(
        4 + 4 * vivid + 8 * contrast - 30 * np.mean(steps), rel=1e-4
    )


def test_measurements_can_say_no():
    """A red frame is not blue, a coloured picture is no sketch."""
    red, blue = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    red[:, 0], blue[:, 2], blue[:, 1] = 1, 1, 0.4
    assert not blue_around(red) and blue_around(blue)
    assert not without_colour(red) and without_colour(torch.ones(1, 3, 64, 64))


def stored(name):
    return read_rows(ROOT / 'nbs' / 'results' / f'{name}_seeds.csv')


DEFAULT = stored('tiny')
ORIGINAL = stored('tiny-original')


def column(key):
    return [row[key] for row in DEFAULT]


def test_ten_seeds_of_the_default_and_three_of_the_original():
    assert column('seed') == list(range(10)) and [r['seed'] for r in ORIGINAL] == [0, 1, 2]


BARS = {  # the median of ten seeds, at least
    'trained_gain_in_sd': 2.2,
    'trained_named_after': 0.70,
    'unseen_gain_in_sd': 1.8,
    'unseen_named_after': 0.70,
}

MISSED = pytest.mark.xfail(strict=True, reason='missed by the stored runs, and README says so')


@pytest.mark.parametrize(
    'key', [pytest.param(k, marks=MISSED if k == 'unseen_named_after' else ()) for k in BARS]
)
def test_the_default_reaches(key):
    assert np.median(column(key)) >= BARS[key]


def test_no_seed_of_the_default_is_lost():
    assert min(column('trained_gain_in_sd')) >= 1.5


def test_no_seed_of_the_default_took_longer_than_a_minute_and_a_half():
    assert max(column('minutes')) <= 1.5


@pytest.mark.parametrize('seeds', [DEFAULT, ORIGINAL], ids=['default', 'original'])
def test_stored_gains_are_what_the_columns_say(seeds):
    for r in seeds:
        for name in ('trained', 'unseen'):
            before, after, sd, gain = (
                r[f'{name}_{column}'] for column in ('before', 'after', 'sd', 'gain_in_sd')
            )
            assert gain == pytest.approx((after - before) / sd, rel=1e-4)


def test_readme_table_is_the_stored_one():
    """A number in the README that no run produced would be seen here."""
    readme = (ROOT / 'nbs' / 'README.md').read_text(encoding='utf-8')
    for r in DEFAULT:
        cells = [
            f'{r[f"{name}_before"]:.2f} → {r[f"{name}_after"]:.2f} | '
            f'**{r[f"{name}_gain_in_sd"]:+.2f}** | {r[f"{name}_named_after"]:.0%}'
            for name in ('trained', 'unseen')
        ]
        assert f'| {r["seed"]:.0f} | {" | ".join(cells)} | {60 * r["minutes"]:.0f} |' in readme
    (gain, named), (unseen, recognised) = (
        [np.median([r[f'{name}_{key}'] for r in DEFAULT]) for key in ('gain_in_sd', 'named_after')]
        for name in ('trained', 'unseen')
    )
    medians = f'{gain:+.2f} with {named:.0%} named, and {unseen:+.2f} with {recognised:.0%}'
    assert f'Medians of the ten: {medians}.' in readme
    low, high = (f'{of(r["trained_gain_in_sd"] for r in ORIGINAL):+.1f}' for of in (min, max))
    assert f'between {low} and {high} (seeds 0 to 2)' in readme
