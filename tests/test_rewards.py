"""The contract reward(images, prompts) -> (B,), and the rewards of the package"""
import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from open_clip import image_transform
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from ddpo_tutorial.pipelines import to_pil
from ddpo_tutorial.rewards import (AestheticPredictor, Offloaded, PickScore, TextSimilarity, WeightedSum, check_images, check_rewards, clip_pixels, clip_similarity,
    collapse, download, jpeg_compressibility, jpeg_incompressibility, jpeg_kilobytes, laion_aesthetic, load_open_clip, pick_score, score, tiny_aesthetic,
    tiny_clip_folder, tiny_similarity)
from ddpo_tutorial.training import TrainConfig, train
from helpers import PROMPTS, brightness, generator

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

def test_weighted_sum_moves_and_judges_as_one():
    "A term left behind in training mode or on another device."
    judge = nn.Dropout(.5)
    total = WeightedSum(noise=(1., Wrapped(judge)), light=(1., brightness))
    assert judge.training
    score(total, pictures(), PAIR)
    assert not judge.training
    assert total.to(torch.float64).judges['noise'].scale.dtype == torch.float64

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

def test_parts_of_a_sum_are_logged(micro):
    "Over all batches of an epoch, not the last one."
    total = WeightedSum(light=(2., brightness), size=(-.5, jpeg_incompressibility))
    config = TrainConfig(num_epochs=2, samples_per_epoch=5, sample_batch_size=2, num_inference_steps=2, updates_per_epoch=1, buffer_size=8, min_count=2)
    for row in train(config, micro, total, PROMPTS): assert row['reward_mean'] == pytest.approx(2 * row['reward_light'] - .5 * row['reward_size'], rel=1e-5)

# the LAION head

def find_head():
    "The published file, where somebody has it; or None."
    name = 'sac+logos+ava1-l14-linearMSE.pth'
    places = [os.environ.get('DDPO_LAION_HEAD'), Path(torch.hub.get_dir()) / 'checkpoints' / name, Path(__file__).parents[2] / 'shared' / 'data' / name]
    return next((Path(p) for p in places if p and Path(p).is_file()), None)

needs_head = pytest.mark.skipif(find_head() is None, reason='the LAION head is not here; name it in DDPO_LAION_HEAD')

def mlp():
    "The predictor as published: five linear layers with dropout between them, in training mode."
    layers = nn.Sequential(nn.Linear(768, 1024), nn.Dropout(.2), nn.Linear(1024, 128), nn.Dropout(.2), nn.Linear(128, 64), nn.Dropout(.1), nn.Linear(64, 16), nn.Linear(16, 1))
    return nn.ModuleDict(dict(layers=layers))

def unit(n=64): return nn.functional.normalize(torch.randn(n, 768, generator=generator()), dim=-1)

@needs_head
def test_head_collapses_to_one_affine_map():
    "The published weights: 17.996 long, bias 5.2366, the same scores as all five layers."
    state = torch.load(find_head(), map_location='cpu', weights_only=True)
    weight, bias = collapse(state)
    assert weight.norm().item() == pytest.approx(17.996, abs=1e-3) and bias.item() == pytest.approx(5.2366, abs=1e-4)
    layers = mlp().eval(); layers.load_state_dict(state)
    torch.testing.assert_close(unit() @ weight + bias, layers['layers'](unit())[:, 0], rtol=1e-6, atol=2e-6)

@needs_head
def test_pitfall_13_dropout_in_the_published_head():
    "The fault, measured: the sd that training mode adds to every score."
    layers = mlp(); layers.load_state_dict(torch.load(find_head(), map_location='cpu', weights_only=True))
    noise = torch.stack([layers['layers'](unit())[:, 0] for _ in range(100)]).std(0).mean().item()
    assert .02 < noise < .3

def test_collapse_keeps_the_order_of_layers():
    "Ten layers: '10' sorts before '2' as a word."
    names = [0, 2, 4, 6, 8, 10]
    layers = {i: nn.Linear(6, 6 if i < 10 else 1) for i in names}
    x = unit(5)[:, :6]
    wanted = nn.Sequential(*layers.values())(x)[:, 0]
    weight, bias = collapse({f'layers.{i}.{k}': v.detach() for i, layer in reversed(layers.items()) for k, v in layer.state_dict().items()})
    torch.testing.assert_close(x @ weight + bias, wanted)

@pytest.fixture(scope='module')
def vit():
    "OpenAI's ViT-L/14 with random weights."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.create_model('ViT-L-14-quickgelu', pretrained=None).eval()

@needs_head
def test_tensor_path_is_the_pil_path(vit):
    "Within 0.01 of a point: resizing, cropping and normalising on tensors against open_clip's own transform on PIL pictures."
    small = torch.nn.functional.interpolate(pictures(3, 24, 24), size=(512, 512), mode='bicubic').clamp(0, 1)
    predictor = laion_aesthetic(head=find_head(), clip=vit)
    transform = image_transform(224, is_train=False, mean=vit.visual.image_mean, std=vit.visual.image_std)
    with torch.no_grad():
        features = nn.functional.normalize(vit.encode_image(torch.stack([transform(p) for p in to_pil(small)])), dim=-1)
        assert (score(predictor, small, PAIR + ['a fox']) - (features @ predictor.weight + predictor.bias)).abs().max() < .01

def test_pitfall_14_openais_clip_uses_quickgelu(vit):
    "The plain name builds another activation, and says nothing."
    kinds = lambda model: {type(m).__name__ for m in model.modules() if 'GELU' in type(m).__name__}
    assert kinds(vit) == {'QuickGELU'}
    assert kinds(open_clip.create_model('ViT-L-14', pretrained=None, device='meta')) == {'GELU'} # the fault

def test_wrong_head_is_refused(tmp_path, vit):
    "A file that is not the published head must not be unpickled."
    (tmp_path / 'head.pth').write_bytes(b'something else')
    for path in (tmp_path / 'head.pth', tmp_path / 'absent.pth'):
        with pytest.raises(ValueError, match=f'{path.name}.*is not the published head.*SHA-256'): laion_aesthetic(head=path, clip=vit)

def test_similarity_by_a_published_clip(vit):
    "open_clip's own tokenizer, and a cosine for each picture with its prompt."
    judge, images = clip_similarity(clip=vit), pictures(2, 224, 224)
    pixels = clip_pixels(images, 224, vit.visual.image_mean, vit.visual.image_std)
    with torch.no_grad(): image, text, _ = vit(pixels, open_clip.get_tokenizer('ViT-L-14-quickgelu')(PAIR))
    torch.testing.assert_close(score(judge, images, PAIR), (image * text).sum(-1), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('load', [load_open_clip, pick_score, lambda: laion_aesthetic(clip=None, head=find_head()) if find_head() else load_open_clip()])
def test_judges_that_cannot_be_had(load, tmp_path, monkeypatch):
    "Offline without the files: one sentence that names the model."
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(ValueError, match='could not be loaded.*network'): load()

# downloads

GOOD = b'the published bytes' * 1000
SHA = hashlib.sha256(GOOD).hexdigest()

@pytest.fixture
def server():
    "A server on this machine that serves what `bodies` says, and counts."
    bodies, calls = {}, []
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            calls.append(self.path)
            body, length = bodies[self.path]
            self.send_response(200); self.send_header('Content-Length', str(length)); self.end_headers(); self.wfile.write(body)
        def log_message(self, *args): pass
    http = HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f'http://127.0.0.1:{http.server_port}', bodies=bodies, calls=calls)
    http.shutdown()

def test_download_once(server, tmp_path, capsys):
    server.bodies['/head%2Bone.pth'] = GOOD, len(GOOD)
    for _ in range(2): assert download(server.url + '/head%2Bone.pth', SHA, tmp_path).read_bytes() == GOOD
    assert len(server.calls) == 1 and [p.name for p in tmp_path.iterdir()] == ['head+one.pth']
    assert 'head+one.pth' in capsys.readouterr().out

@pytest.mark.parametrize('body, length', [(b'<html>not found</html>', 22), (GOOD[:-1] + b'!', len(GOOD)), (GOOD[:500], 500), (GOOD[:500], len(GOOD))],
    ids=['another page', 'one wrong byte', 'short', 'cut off'])
def test_wrong_bytes_are_detected_removed_and_explained(server, tmp_path, body, length):
    server.bodies['/head.pth'] = body, length
    with pytest.raises(ValueError, match=f'could not be had as published.*removed.*head.pth.*{SHA}'): download(server.url + '/head.pth', SHA, tmp_path)
    assert list(tmp_path.iterdir()) == []

def test_broken_file_in_the_cache_is_replaced(server, tmp_path, capsys):
    server.bodies['/head.pth'] = GOOD, len(GOOD)
    (tmp_path / 'head.pth').write_bytes(GOOD[:100])
    assert download(server.url + '/head.pth', SHA, tmp_path).read_bytes() == GOOD
    assert 'not the published file' in capsys.readouterr().out

def test_no_server_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match='127.0.0.1:9.*could not be had.*put the file at'): download('http://127.0.0.1:9/head.pth', SHA, tmp_path)

# PickScore

def random_pick_score():
    "A CLIP of PickScore's class with random weights, and the tiny tokenizer."
    tokenizer = CLIPTokenizer.from_pretrained(tiny_clip_folder().parent / 'tokenizer')
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config=dict(small, vocab_size=362, max_position_embeddings=16, bos_token_id=360, eos_token_id=361),
                                    vision_config=dict(small, image_size=32, patch_size=8), projection_dim=16))
    return PickScore(clip, tokenizer)

def test_pick_score_is_the_models_own_logit():
    "Against transformers' preprocessing on PIL pictures: logits_per_image of each picture with its own prompt."
    judge, images = random_pick_score(), pictures(3)
    processor = CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    inputs = dict(processor(to_pil(images), return_tensors='pt'), **judge.tokenizer(PROMPTS[:3], padding=True, return_tensors='pt'))
    with torch.no_grad(): wanted = judge.clip(**inputs).logits_per_image.diagonal()
    got = score(judge, images, PROMPTS[:3])
    assert (got - wanted).abs().max() < .05 * wanted.std() + 1e-3 and got.std() > 0

def test_pick_score_reads_the_prompt_and_not_the_neighbours():
    "Padding to the longest prompt must not change the others; another prompt must change the score."
    judge, images = random_pick_score(), pictures(2)
    alone = torch.cat([score(judge, images[i:i + 1], [PROMPTS[i]]) for i in range(2)])
    torch.testing.assert_close(score(judge, images, PROMPTS[:2]), alone, rtol=1e-4, atol=1e-5)
    padded = score(judge, images.repeat(2, 1, 1, 1)[:3], [*PROMPTS[:2], 'a pencil sketch of a hippopotamus on a blue background'])[:2]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(score(judge, images, ['a whale'] * 2), alone, rtol=1e-4, atol=1e-5)

# on the CPU between calls

class Traveller(nn.Module):
    "A reward that notes where it is sent."
    def __init__(self): super().__init__(); self.places = []
    def to(self, device): self.places.append(str(device)); return self
    def forward(self, images, prompts):
        if prompts[0] == 'raise': raise RuntimeError('no')
        return brightness(images, prompts)

@pytest.mark.parametrize('prompts', [PAIR, ['raise', 'raise']])
def test_offloaded_goes_there_and_back(prompts):
    "Also when the reward fails."
    inner = Traveller(); reward = Offloaded(inner)
    try: torch.testing.assert_close(reward(pictures(), prompts), brightness(pictures(), prompts))
    except RuntimeError: assert prompts[0] == 'raise'
    assert inner.places == ['cpu', 'cpu', 'cpu'] # at the start, to the images, back

def test_offloaded_shows_the_parts_inside():
    reward = Offloaded(WeightedSum(light=(2., brightness)))
    assert reward.parts == {}
    score(reward, pictures(), PAIR)
    assert list(reward.parts) == ['light']
