"""Lists of animals, templates, files, the seeded draw.

Run: python -m pytest tests/test_prompts.py -n 0
"""

from collections import Counter

import numpy as np
import pytest

from ddpo_tutorial.prompts import (
    draw_prompts,
    fill_template,
    held_out_animals,
    imagenet_animals,
    read_prompts,
    simple_animals,
    tiny_animals,
    with_article,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_animals_are_split_cleanly():
    """An animal used for training and for the held-out measure at once, or one the tiny model does
    not know."""
    assert len(simple_animals()) == len(set(simple_animals())) == 45
    assert len(tiny_animals()) == len(set(tiny_animals()))
    assert set(simple_animals()) | set(held_out_animals()) == set(tiny_animals())
    assert not set(simple_animals()) & set(held_out_animals())


def test_imagenet_has_398_animals():
    "`[:397]` misses the last one."
    names = imagenet_animals()
    assert len(names) == 398 and names[0] == 'tench' and names[-1] in ('puffer', 'pufferfish')
    assert names[-1] not in names[:397]  # the fault
    assert not any(',' in name or name != name.strip() for name in names)


@pytest.mark.parametrize(
    'noun, phrase',
    [
        ('cat', 'a cat'),
        ('owl', 'an owl'),
        ('Ant', 'an Ant'),
        ('ugly cat', 'an ugly cat'),
        ('bee', 'a bee'),
    ],
)
def test_articles(noun, phrase):
    "'a owl' is not what the captions say."
    assert with_article(noun) == phrase


@pytest.mark.parametrize(
    'template, prompt',
    [
        ('{}', 'an owl'),
        ('a pencil sketch of {}', 'a pencil sketch of an owl'),
        ('{} {x} {}', 'an owl {x} an owl'),
        ('50% {}', '50% an owl'),
    ],
)
def test_templates(template, prompt):
    "Other braces in a template must not be read as format fields."
    assert fill_template(['owl'], template) == [prompt]


def test_template_without_a_hole():
    "A template without a hole would give the same prompt for every animal."
    with pytest.raises(ValueError, match="'a photo' has no '{}'.*try"):
        fill_template(['owl'], 'a photo')


@pytest.mark.parametrize(
    'text, prompts',
    [
        ('a cat\nan owl\n', ['a cat', 'an owl']),
        ('# animals\n\n  a cat \r\n\n#x\nan owl', ['a cat', 'an owl']),
        ('\ufeffa cat', ['a cat']),
        ('a cät', ['a cät']),
        ('a cat\u2028in the\u2029rain\x85\nan owl', ['a cat\u2028in the\u2029rain', 'an owl']),
        ('a\vcat\fan\x1cowl\x1d\x1e', ['a\vcat\fan\x1cowl']),
        ('a cat\ran owl', ['a cat', 'an owl']),
    ],
)
def test_prompt_files(tmp_path, text, prompts):
    """Comments, empty lines, line ends and a byte order mark taken for prompts. A line ends at LF,
    CRLF and CR, and nowhere else."""
    path = tmp_path / 'prompts.txt'
    path.write_bytes(text.encode())
    assert read_prompts(path) == read_prompts(str(path)) == prompts


@pytest.mark.parametrize('text', ['', '\n \n', '# only a comment\n'])
def test_empty_prompt_file(tmp_path, text):
    "An empty file must say so, with its name."
    path = tmp_path / 'empty.txt'
    path.write_text(text)
    with pytest.raises(ValueError, match="empty.txt' holds no prompt.*one a line"):
        read_prompts(path)


@pytest.mark.parametrize('name', ['missing.txt', '.'])
def test_missing_prompt_file(tmp_path, name):
    "A missing file, or a folder in its place."
    with pytest.raises(FileNotFoundError, match='no prompt file'):
        read_prompts(tmp_path / name)


def test_draw_is_reproducible():
    "Randomness that does not come from the generator."
    names = tiny_animals()
    first = draw_prompts(names, 20, rng(1))
    np.random.seed(5)  # must not matter
    assert first == draw_prompts(names, 20, rng(1)) != draw_prompts(names, 20, rng(2))


def test_draw_is_uniform_with_replacement():
    "A draw that never reaches the last prompt, favours one, or runs out."
    counts = Counter(draw_prompts(['a', 'b', 'c'], 3000, rng()))
    expected = 1000
    sd = (3000 * 1 / 3 * 2 / 3) ** 0.5
    assert all(abs(counts[p] - expected) < 5 * sd for p in 'abc')


def test_draw_moves_the_generator():
    "The same prompts in every call."
    moving = rng()
    assert draw_prompts(tiny_animals(), 20, moving) != draw_prompts(tiny_animals(), 20, moving)


def test_draw_from_nothing():
    "An empty list would raise something unreadable in NumPy."
    with pytest.raises(ValueError, match='no prompts to draw from.*at least one'):
        draw_prompts([], 3, rng())
