"""The published predictors: their preprocessing, their heads, what cannot be had; a reward that
waits on the CPU; a reward function of the user's.

Run: python -m pytest tests/test_predictors.py -n 0
"""

import importlib
import os
import sys
import types
from pathlib import Path

import open_clip
import pytest
import torch
from helpers import PROMPTS, brightness, generator
from open_clip import image_transform
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from ddpo_tutorial.pipelines import to_pil
from ddpo_tutorial.predictors import (
    Offloaded,
    PickScore,
    clip_similarity,
    collapse,
    laion_aesthetic,
    laion_head,
    load_open_clip,
    own_reward,
    pick_score,
    place_reward,
    show_code,
)
from ddpo_tutorial.rewards import WeightedSum, clip_pixels, score, score_terms, tiny_clip_folder

PAIR = ['a cat', 'an owl']


def pictures(n=2, height=64, width=64):
    return torch.rand(n, 3, height, width, generator=generator())


# the LAION head


def find_head():
    "The published file, where somebody has it; or None."
    name = 'sac+logos+ava1-l14-linearMSE.pth'
    places = [
        os.environ.get('DDPO_LAION_HEAD'),
        Path(torch.hub.get_dir()) / 'checkpoints' / name,
        Path(__file__).parents[2] / 'shared' / 'data' / name,
    ]
    return next((Path(p) for p in places if p and Path(p).is_file()), None)


needs_head = pytest.mark.skipif(
    find_head() is None, reason='the LAION head is not here; name it in DDPO_LAION_HEAD'
)


def mlp(state):
    "The predictor as published: five linear layers with dropout between them, in training mode."
    layers = nn.Sequential(
        nn.Linear(768, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    nn.ModuleDict(dict(layers=layers)).load_state_dict(state)
    return layers


def load_head():
    return torch.load(find_head(), map_location='cpu', weights_only=True)


def unit(n=64):
    return nn.functional.normalize(torch.randn(n, 768, generator=generator()), dim=-1)


@needs_head
def test_head_collapses_to_one_affine_map():
    "The published weights: 17.996 long, bias 5.2366, the same scores as all five layers."
    weight, bias = laion_head(find_head())
    assert weight.norm().item() == pytest.approx(17.996, abs=1e-3) and bias.item() == pytest.approx(
        5.2366, abs=1e-4
    )
    layers = mlp(load_head()).eval()
    torch.testing.assert_close(unit() @ weight + bias, layers(unit())[:, 0], rtol=1e-6, atol=2e-6)


@needs_head
def test_dropout_in_the_published_head():
    "The fault, measured: the sd that training mode adds to every score."
    layers = mlp(load_head())
    noise = torch.stack([layers(unit())[:, 0] for _ in range(100)]).std(0).mean().item()
    assert 0.02 < noise < 0.3


def test_collapse_keeps_the_order_of_layers():
    "Ten layers: '10' sorts before '2' as a word."
    names = [0, 2, 4, 6, 8, 10]
    layers = {i: nn.Linear(6, 6 if i < 10 else 1) for i in names}
    x = unit(5)[:, :6]
    wanted = nn.Sequential(*layers.values())(x)[:, 0]
    state = {
        f'layers.{i}.{k}': v
        for i, layer in reversed(layers.items())
        for k, v in layer.state_dict().items()
    }
    weight, bias = collapse(state)
    torch.testing.assert_close(x @ weight + bias, wanted)


def random_clip(name):
    "One of open_clip's models, two layers deep and with random weights."
    config = open_clip.get_model_config(name)
    for part in ('vision_cfg', 'text_cfg'):
        config[part]['layers'] = 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(**config).eval()
    clip.visual.image_mean, clip.visual.image_std = (
        open_clip.OPENAI_DATASET_MEAN,
        open_clip.OPENAI_DATASET_STD,
    )
    return clip


@pytest.fixture(scope='module')
def vit():
    "OpenAI's ViT-L/14, but shallow and random."
    return random_clip('ViT-L-14-quickgelu')


@needs_head
def test_tensor_path_is_the_pil_path(vit):
    "Within 0.01 of a point: pixels as tensors against open_clip's own transform of PIL pictures."
    small = torch.nn.functional.interpolate(
        pictures(3, 24, 24), size=(512, 512), mode='bicubic'
    ).clamp(0, 1)
    predictor = laion_aesthetic(head=find_head(), clip=vit)
    transform = image_transform(
        224, is_train=False, mean=vit.visual.image_mean, std=vit.visual.image_std
    )
    with torch.no_grad():
        features = nn.functional.normalize(
            vit.encode_image(torch.stack([transform(p) for p in to_pil(small)])), dim=-1
        )
        wanted = features @ predictor.weight + predictor.bias
    assert (score(predictor, small, PAIR + ['a fox']) - wanted).abs().max() < 0.01


def test_openais_clip_uses_quickgelu(vit):
    "The plain name builds another activation, and says nothing."

    def kinds(model):
        return {type(m).__name__ for m in model.modules() if 'GELU' in type(m).__name__}

    assert kinds(vit) == {'QuickGELU'}
    assert kinds(random_clip('ViT-L-14')) == {'GELU'}  # the fault


@pytest.fixture
def offline(tmp_path, monkeypatch):
    "No network, and nothing in torch's folder of checkpoints, which is returned."
    for name in ('HTTPS_PROXY', 'https_proxy'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    assert tmp_path in folder.parents
    folder.mkdir(parents=True)
    return folder


def test_wrong_head_is_refused(offline, tmp_path):
    "Another file than the published head must not be unpickled; one given by hand is left alone."
    mine = tmp_path / 'head.pth'
    mine.write_bytes(b'something else')
    with pytest.raises(
        ValueError,
        match='LAION head could not be loaded.*head.pth is not the published head.*SHA-256',
    ):
        laion_aesthetic(head=mine)
    assert mine.read_bytes() == b'something else'
    with pytest.raises(ValueError, match='LAION head could not be loaded.*absent.pth'):
        laion_aesthetic(head=tmp_path / 'absent.pth')


@needs_head
def test_head_put_there_by_hand_is_found(offline):
    "The advice of the message; and a broken file in its place is not used."
    advice = 'LAION head could not be loaded.*network, or put it at .*checkpoints.*tiny_aesthetic'
    with pytest.raises(ValueError, match=advice) as told:
        laion_head()
    path = Path(str(told.value).split('put it at ')[1].split(' yourself')[0])
    path.write_bytes(find_head().read_bytes())
    torch.testing.assert_close(laion_head(), collapse(load_head()))
    path.write_bytes(find_head().read_bytes()[:-1] + b'!')
    with pytest.raises(ValueError, match='The LAION head could not be loaded'):
        laion_head()


def test_similarity_by_a_published_clip(vit):
    "open_clip's own tokenizer, and a cosine for each picture with its prompt."
    reward, images = clip_similarity(clip=vit), pictures(2, 224, 224)
    pixels = clip_pixels(images, 224, vit.visual.image_mean, vit.visual.image_std)
    ids = open_clip.get_tokenizer('ViT-L-14-quickgelu')(PAIR)
    with torch.no_grad():
        image, text, _ = vit(pixels, ids)
    torch.testing.assert_close(
        score(reward, images, PAIR), (image * text).sum(-1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    'load, name', [(load_open_clip, 'CLIP ViT-L/14'), (pick_score, 'PickScore')]
)
def test_models_that_cannot_be_had(load, name, offline):
    "Offline without the files: one sentence that says what, why, and what to do."
    advice = 'could not be loaded .*network.*Hugging Face cache.*tiny_aesthetic'
    with pytest.raises(ValueError, match=f'^{name} {advice}') as told:
        load()
    assert '\n' not in str(told.value)


# PickScore


def random_pick_score():
    "A CLIP of PickScore's class with random weights, and the tiny tokenizer."
    tokenizer = CLIPTokenizer.from_pretrained(tiny_clip_folder().parent / 'tokenizer')
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = small | dict(
        vocab_size=362, max_position_embeddings=16, bos_token_id=360, eos_token_id=361
    )
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
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.2)  # of about 14, the factor


def test_pick_score_is_the_models_own_logit():
    "Against transformers' preprocessing of PIL pictures: the logit of each with its own prompt."
    reward, images = random_pick_score(), pictures(3)
    processor = CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    pixels = processor(to_pil(images), return_tensors='pt')
    words = reward.tokenizer(PROMPTS[:3], padding=True, return_tensors='pt')
    with torch.no_grad():
        wanted = reward.clip(**pixels, **words).logits_per_image.diagonal()
    got = score(reward, images, PROMPTS[:3])
    assert (got - wanted).abs().max() < 0.05 * wanted.std() + 1e-3 and got.std() > 0


def test_pick_score_reads_the_prompt_and_not_the_neighbours():
    "Padding to the longest prompt changes no other score; another prompt changes its own."
    reward, images = random_pick_score(), pictures(2)
    alone = torch.cat([score(reward, images[i : i + 1], [PROMPTS[i]]) for i in range(2)])
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
        if prompts[0] == 'raise':
            raise RuntimeError('no')
        return brightness(images, prompts)


def test_offloaded_goes_there_and_back():
    "Also when the reward fails."
    inner = Traveller()
    reward = Offloaded(inner)
    torch.testing.assert_close(reward(pictures(), PAIR), brightness(pictures(), PAIR))
    assert inner.places == ['cpu', 'cpu', 'cpu']  # at the start, to the images, back
    with pytest.raises(RuntimeError, match='^no$'):
        reward(pictures(), ['raise', 'raise'])
    assert inner.places == ['cpu'] * 5


def test_all_terms_of_a_sum_wait():
    "A term without weights stays what it is."
    inner = Traveller()
    total = place_reward(
        WeightedSum(far=(2.0, inner), light=(1.0, brightness)), 'cpu', offload=True
    )
    assert isinstance(total.terms['far'][1], Offloaded)
    assert total.terms['light'] == (1.0, brightness)
    rewards, terms = score_terms(total, pictures(), PAIR)
    torch.testing.assert_close(rewards, 3 * brightness(pictures(), PAIR))
    assert list(terms) == ['far', 'light']
    assert inner.places == ['cpu', 'cpu', 'cpu']


# the user's own

SOURCES = dict(
    raises='def reward(images, prompts): return images.nothing\n',
    leaves='import sys\nsys.exit(3)\n',
    needs='import no_such_library\n',
    edited='reward = lambda images, prompts: [1, 2]\n',
    away="""import urllib.request
def reward(images, prompts): urllib.request.urlopen('http://127.0.0.1:9', timeout=5)
""",
)
IMPORT = 'with module.py in this folder'
TRIED = 'Tried on two random pictures'
OWN = {
    'no_such:reward': ['no_such', IMPORT],
    'json:reward': ['json:reward', 'AttributeError', IMPORT],
    'json:__name__': ['json:__name__', 'str', 'function', TRIED],
    'raises:reward': ['raises:reward', 'AttributeError', 'nothing', TRIED],
    'leaves:reward': ['leaves:reward', 'SystemExit: 3', IMPORT],
    'needs:reward': ['needs:reward', 'no_such_library', IMPORT],
    'away:reward': ['away:reward', 'URLError', 'refused', TRIED],
}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    "A folder with modules of the user's, none of which is imported yet."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    for name, text in SOURCES.items():
        Path(f'{name}.py').write_text(text)
    yield tmp_path
    for name in SOURCES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize('name', OWN)
def test_own_rewards_that_cannot_be_used(name, mine):
    """Found out on two random pictures, before anything heavy is loaded. The cause is named, and
    only who cannot import a module hears where it should be."""
    with pytest.raises(ValueError, match='cannot be used') as caught:
        own_reward(name)
    said = str(caught.value)
    assert all(words in said for words in OWN[name]) and (IMPORT in said) != (TRIED in said)


@pytest.mark.parametrize('how', ['defined again', 'reloaded', 'exchanged'])
def test_an_edited_reward_is_the_one_that_runs(how, mine):
    "In a running kernel. What was imported before is not announced again."
    assert own_reward('edited:reward')(None, []) == [1, 2]
    module = sys.modules['edited']
    text = 'reward = lambda images, prompts: [3, 4, ][:2]\n'
    if how == 'defined again':
        exec(text, vars(module))
    elif how == 'reloaded':
        Path('edited.py').write_text(text)
        importlib.reload(module)
    else:
        sys.modules['edited'] = types.ModuleType('edited')
        exec(text, vars(sys.modules['edited']))
    assert own_reward('edited:reward')(None, []) == [3, 4]


def test_its_place_is_said_once_and_first(mine, capsys):
    for _ in range(2):
        with pytest.raises(ValueError, match='Tried'):
            own_reward('raises:reward')
    assert capsys.readouterr().out == f'The reward raises:reward is code of {mine / "raises.py"}\n'
    for _ in range(2):
        show_code('away:reward')
    assert capsys.readouterr().out.count('away.py') == 2 and 'away' not in sys.modules
