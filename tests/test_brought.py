"""What people bring: models, LoRAs, reward functions, prompt files, terminals. What was saved draws
the same, what was given is left untouched, what cannot work is refused before anything large is
loaded or a folder is made.

Run: python -m pytest tests/test_brought.py -n 0
"""

import io
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.utils import convert_state_dict_to_kohya
from helpers import (
    PROMPTS,
    SD_SCHEDULE,
    brightness,
    generator,
    micro_pipeline,
    moved,
    picture,
    set_scheduler,
    weights,
)
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from ddpo_tutorial import pipelines
from ddpo_tutorial.advantages import PerPromptStatTracker
from ddpo_tutorial.command import export_checkpoint, main, read_command
from ddpo_tutorial.configs import Config
from ddpo_tutorial.pipelines import (
    add_lora,
    compute_dtype,
    decode_latents,
    encode_prompts,
    find_model,
    has_lora,
    load_model,
    load_pipeline,
    save_trained,
    tiny_folder,
    trained_parameters,
)
from ddpo_tutorial.predictors import own_reward
from ddpo_tutorial.prompts import read_prompts
from ddpo_tutorial.rewards import score
from ddpo_tutorial.runs import load_all
from ddpo_tutorial.sampling import make_generators, make_policy, sample
from ddpo_tutorial.schedules import check_actions, make_schedule
from ddpo_tutorial.training import train, train_epochs

SMALL = dict(num_epochs=1, samples_per_epoch=4, updates_per_epoch=2, num_inference_steps=3)
PAIR = ['a cat', 'a dog']


def saved(folder, pipe=None, **options):
    "A pipeline in a folder."
    (pipe or micro_pipeline()).save_pretrained(folder, **options)
    return folder


def edit(path, **changes):
    "Change a JSON file."
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def refused_by_the_command(words, capsys):
    "By a dry run and by a run. Returns what each said."
    said = []
    for extra in (['--dry-run'], []):
        assert main([*words, *extra]) == 2
        said.append(capsys.readouterr().err)
    return said


# saving and loading


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob('*.safetensors'))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('lora', [False, True])
def test_half_the_size_on_request(place, dtype, lora):
    """The variant fp16: found by `load_pipeline`, named to plain diffusers; the pipeline that is
    saved stays as it is."""
    pipe = load_pipeline(saved('given'), 'cpu', dtype)
    pipe = moved(add_lora(pipe) if lora else pipe)
    before = weights(pipe.unet)
    wanted = picture(pipe)
    whole = size_of(save_trained(pipe, place / 'whole', False))
    half = size_of(save_trained(pipe, place / 'half', True))
    assert 0.45 < half / whole < 0.7  # headers of a small file count
    assert torch.equal(weights(pipe.unet), before)
    source = 'given' if lora else 'half'
    variant = None if lora else 'fp16'
    options = dict(variant=variant, torch_dtype=torch.float16)
    plain = StableDiffusionPipeline.from_pretrained(source, **options)
    for reloaded in (plain, load_pipeline(source, 'cpu')):
        if lora:
            reloaded.load_lora_weights('half')
        assert (picture(reloaded) - wanted).abs().mean() < 0.01


@pytest.mark.parametrize(
    'name, rank, alpha',
    [('default', 4, 4), ('mine', 4, 8), ('his', 4, 1), ('other_one', 8, 32), ('v2', 2, 3)],
)
def test_a_lora_that_was_loaded_is_trained_on(name, rank, alpha):
    """Any name, any alpha: it changes, the model under it does not, and the file draws what was
    trained."""
    given = micro_pipeline()
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=['to_q', 'to_v'])
    given.unet.requires_grad_(False).add_adapter(lora, 'first')
    wanted = picture(moved(given))
    pipe = load_pipeline(saved('given'), 'cpu')
    pipe.load_lora_weights(save_trained(given, 'lora'), adapter_name=name)
    same(picture(pipe), wanted)
    base = [p for name, p in pipe.unet.named_parameters() if 'lora' not in name]
    frozen = [p.clone() for p in base]
    train(Config(**SMALL, learning_rate=1e-2), pipe, brightness, PROMPTS)
    plain = StableDiffusionPipeline.from_pretrained('given')
    plain.load_lora_weights(save_trained(pipe, 'trained'))
    assert all(torch.equal(a, b) for a, b in zip(base, frozen))
    assert (picture(pipe) - wanted).abs().max() > 1e-3
    same(picture(plain), picture(pipe))


@pytest.mark.parametrize('active', [['one'], ['two'], ['one', 'two']])
def test_several_loras_are_refused_before_training(active):
    pipe = add_lora(micro_pipeline())
    lora = save_trained(pipe, 'lora')
    pipe.delete_adapters('default')
    for name in ('one', 'two'):
        pipe.load_lora_weights(lora, adapter_name=name)
    pipe.set_adapters(active)
    before = weights(pipe.unet)
    with pytest.raises(ValueError, match=r"'two \(second LoRA\)'; expected none.*delete_adapters"):
        train(Config(**SMALL), pipe, brightness, PROMPTS)
    assert torch.equal(weights(pipe.unet), before)


TARGETS = [
    ('to_q',),
    ('to_q', 'proj_in'),
    ('conv1', 'proj_in'),
    ('conv_shortcut', 'time_emb_proj', 'to_k'),
    ('conv2', 'to_v'),
    ('ff.net.0.proj', 'ff.net.2'),
    ('conv_in', 'conv_out', 'linear_1'),
    ('to_out.0', 'proj_out', 'conv'),
]


@pytest.mark.parametrize('targets', TARGETS, ids='+'.join)
def test_every_set_of_targets_reloads(targets):
    trained = moved(add_lora(micro_pipeline(), 4, targets))
    plain = micro_pipeline()
    plain.load_lora_weights(save_trained(trained, 'lora'))
    assert (picture(trained) - picture(micro_pipeline())).abs().max() > 0.01
    same(picture(plain), picture(trained))


def test_every_layer_that_can_be_adapted_reloads():
    layers = micro_pipeline().unet.named_modules()
    kinds = torch.nn.Linear | torch.nn.Conv2d
    endings = {name.rpartition('.')[2] for name, layer in layers if isinstance(layer, kinds)}
    names = sorted(name for name in endings if not name.isdigit())
    trained = moved(add_lora(micro_pipeline(), 2, names))
    plain = micro_pipeline()
    plain.load_lora_weights(save_trained(trained, 'lora'))
    same(picture(plain), picture(trained))


def lora(**settings):
    "Gives a UNet an adapter of diffusers' own making."
    settings = dict(r=4, lora_alpha=4, target_modules=['to_q', 'to_v']) | settings
    return lambda pipe: pipe.unet.requires_grad_(False).add_adapter(LoraConfig(**settings))


def adapter(kind, **settings):
    config = kind(target_modules=['to_q', 'to_v'], **settings)
    return lambda pipe: pipe.unet.requires_grad_(False).add_adapter(config)


def half_as_strong(pipe):
    moved(add_lora(pipe)).set_adapters(['default'], [0.5])


def strong_in_parts(pipe):
    moved(add_lora(pipe)).set_adapters(['default'], [dict(unet=dict(down=0.3, mid=2.0, up=0.7))])


def swapped(pipe):
    "Another LoRA, with another alpha, in the place of the first."
    for seed, alpha in enumerate((4, 9)):
        other = micro_pipeline()
        lora(lora_alpha=alpha)(other)
        folder = save_trained(moved(other), f'lora{seed}')
        pipe.load_lora_weights(folder, adapter_name='mine', hotswap=bool(seed))


def partly_trained(pipe):
    add_lora(pipe).unet.down_blocks.requires_grad_(False)


RELOADED = {
    'an alpha': lora(lora_alpha=9),
    'an alpha for some': lora(alpha_pattern={'to_q': 8}),
    'a rank for some': lora(rank_pattern={'to_q': 2}),
    'stabilised rank': lora(use_rslora=True, lora_alpha=8),
    'DoRA': lora(use_dora=True),
    'a bias of its own': lora(lora_bias=True),
    'dropout': lora(lora_dropout=0.5),
    'a pattern of targets': lora(target_modules='.*to_q'),
    'half as strong': half_as_strong,
    'strong in parts': strong_in_parts,
    'swapped': swapped,
    'partly trained': partly_trained,
    'compiled in place': lambda pipe: add_lora(pipe).unet.compile(backend='eager'),
}


@pytest.mark.parametrize('state', RELOADED.values(), ids=RELOADED)
@torch.compiler.set_stance('force_eager')  # what is compiled is called as it is
def test_a_lora_in_any_of_these_states_reloads(state):
    "Trained through, so that it changes, and read by plain diffusers."
    pipe = micro_pipeline()
    state(pipe)
    before = picture(pipe)
    train(Config(**SMALL, learning_rate=1e-2), pipe, brightness, PROMPTS)
    plain = micro_pipeline()
    plain.load_lora_weights(save_trained(pipe, 'trained'))
    assert (picture(pipe) - before).abs().max() > 1e-3
    same(picture(plain), picture(pipe))


def with_text_lora(pipe):
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=['q_proj', 'v_proj'])
    inject_adapter_in_model(lora, pipe.text_encoder)


def with_text_lora_too(pipe):
    with_text_lora(add_lora(pipe))


def compiled(pipe):
    pipe.unet = torch.compile(add_lora(pipe).unet, backend='eager')


def with_ip_adapter(pipe):
    "Image prompts: more weights beside each cross-attention, and one more input."
    layers = [name for name in pipe.unet.attn_processors if 'attn2' in name]
    width = pipe.unet.config.cross_attention_dim
    sizes = [pipe.unet.get_submodule(name.rpartition('.')[0]).to_k.out_features for name in layers]
    adapter = {
        f'{2 * i + 1}.to_{kind}_ip.weight': torch.zeros(size, width)
        for i, size in enumerate(sizes)
        for kind in 'kv'
    }
    image = {
        'proj.weight': torch.zeros(4 * width, 8),
        'proj.bias': torch.zeros(4 * width),
        'norm.weight': torch.ones(width),
        'norm.bias': torch.zeros(width),
    }
    pipe.unet._load_ip_adapter_weights([dict(image_proj=image, ip_adapter=adapter)])


REFUSED = {  # state: what is named, and what undoes it where that is a line
    'LoKr': (adapter(LoKrConfig, r=4, alpha=4), 'lokr', None),
    'LoHa': (adapter(LoHaConfig, r=4, alpha=4), 'hada', None),
    'OFT': (adapter(OFTConfig, oft_block_size=4), 'oft', None),
    'all biases': (lora(bias='all'), 'conv_in.bias', None),
    'biases beside it': (lora(bias='lora_only', target_modules=['proj_in']), 'bias', None),
    'a layer saved whole': (lora(modules_to_save=['conv_in']), 'conv_in', None),
    'a layer trained too': (
        lambda pipe: add_lora(pipe).unet.conv_in.requires_grad_(True),
        'conv_in.weight',
        'pipe.unet.conv_in.requires_grad_(False)',
    ),
    'PiSSA': (lora(init_lora_weights='pissa'), 'pissa', None),
    'OLoRA': (lora(init_lora_weights='olora'), 'olora', None),
    'merged': (
        lambda pipe: moved(add_lora(pipe)).fuse_lora(),
        r'default \(merged',
        'pipe.unfuse_lora()',
    ),
    'switched off': (
        lambda pipe: add_lora(pipe).disable_lora(),
        r'default \(disabled',
        'pipe.enable_lora()',
    ),
    'compiled': (compiled, '_orig_mod', 'pipe.unet = pipe.unet._orig_mod; pipe.unet.compile()'),
    'half on the text encoder': (with_text_lora_too, 'self_attn.*base_layer', None),
    'text encoder alone': (with_text_lora, 'self_attn.*base_layer', None),
    'fused attention': (lambda pipe: pipe.fuse_qkv_projections(), 'to_qkv', None),
    'IP-Adapter': (with_ip_adapter, 'ip', 'pipe.unload_ip_adapter()'),
    'IP-Adapter under a LoRA': (lambda pipe: (with_ip_adapter(pipe), add_lora(pipe)), 'ip', None),
    'offloaded': (
        lambda pipe: pipe.enable_model_cpu_offload(device='cpu'),
        'hook',
        'pipe.remove_all_hooks()',
    ),
    'offloaded layer by layer': (
        lambda pipe: pipe.enable_sequential_cpu_offload(device='cpu'),
        'hook',
        None,
    ),
    'offloaded in groups': (
        lambda pipe: pipe.unet.enable_group_offload(
            onload_device=torch.device('cpu'), offload_type='leaf_level'
        ),
        'hook',
        None,
    ),
    'eight bits in storage': (lambda pipe: pipe.unet.enable_layerwise_casting(), 'hook', None),
}


@pytest.mark.parametrize('state, named, undo', REFUSED.values(), ids=REFUSED)
@torch.compiler.set_stance('force_eager')
def test_what_cannot_be_trained_and_saved_is_refused(state, named, undo):
    "Before a picture is drawn; and what the sentence says to do is enough."
    pipe = micro_pipeline()
    state(pipe)
    drawn = []
    with pytest.raises(ValueError, match=f'first .*{named}.*; expected none') as caught:
        train(Config(**SMALL), pipe, lambda images, prompts: drawn.append(images), PROMPTS)
    assert not drawn and len(str(caught.value).splitlines()) == 1
    if undo:
        exec(undo, dict(pipe=pipe))
        train(Config(**SMALL), pipe, brightness, PROMPTS)
        plain = micro_pipeline()
        if has_lora(pipe):
            plain.load_lora_weights(save_trained(pipe, 'trained'))
        else:
            plain = StableDiffusionPipeline.from_pretrained(save_trained(pipe, 'trained'))
        same(picture(plain), picture(pipe))


def with_slices(pipe):
    pipe.enable_attention_slicing()
    pipe.vae.enable_tiling()


HARMLESS = {
    'attention in slices': with_slices,
    'FreeU': lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    'checkpointing': lambda pipe: pipe.unet.enable_gradient_checkpointing(),
    'channels last': lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize('change', HARMLESS.values(), ids=HARMLESS)
def test_what_is_harmless_is_left_on(change):
    pipe = micro_pipeline()
    change(pipe)
    rows = train(Config(**SMALL | dict(updates_per_epoch=1)), pipe, brightness, PROMPTS)
    assert abs(rows[0]['approx_kl']) < 1e-6  # the first ratio is 1


@pytest.mark.parametrize('rank, asked', [(2, 4), (8, 4), (4, 1), (None, 4)])
def test_a_lora_of_another_rank_is_refused(rank, asked):
    "It would be trained under a configuration that says something else."
    pipe = add_lora(micro_pipeline(), rank) if rank else micro_pipeline()
    ranks = r'\[%s\]' % (rank or '')
    with pytest.raises(ValueError, match=f'lora_rank={asked}, .*{ranks}; expected add_lora'):
        trained_parameters(pipe, asked)
    assert trained_parameters(pipe) and trained_parameters(pipe, rank or 0)


VARIANTS = {
    'fp16': dict(variant='fp16'),
    'another name': dict(variant='ema'),
    'pieces': dict(variant='fp16', max_shard_size='50KB'),
    'pickled': dict(variant='fp16', safe_serialization=False),
    'no variant': {},
    'pieces without': dict(max_shard_size='50KB'),
}


@pytest.mark.filterwarnings('ignore:.*has pickled weights')
@pytest.mark.parametrize('options', VARIANTS.values(), ids=VARIANTS)
def test_a_folder_with_a_variant_only(options):
    pipe = load_pipeline(saved('folder', **options), 'cpu')
    same(picture(pipe), picture(micro_pipeline()))


@pytest.mark.filterwarnings('ignore:.*has pickled weights')
@pytest.mark.parametrize('options', VARIANTS.values(), ids=VARIANTS)
def test_a_name_on_the_hub_with_a_variant_only(place, monkeypatch, options):
    "The hub sends what is asked for: files without a variant, or those of the one that is named."
    saved('hub', **options)

    def download(source, revision=None, variant=None, **left_out):
        for path in (place / 'hub').rglob('*.*'):
            is_weight = path.suffix in ('.safetensors', '.bin')
            if not is_weight or (path.name.count('.') > 1) == bool(variant):
                target = place / 'cache' / path.relative_to(place / 'hub')
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        return str(place / 'cache')

    def read(source, file, revision=None):
        return json.loads((place / 'hub' / file).read_text())

    monkeypatch.setattr(StableDiffusionPipeline, 'download', download)
    monkeypatch.setattr(pipelines, 'read_json', read)
    same(picture(load_pipeline('owner/name', 'cpu')), picture(micro_pipeline()))


def test_the_plain_files_come_first():
    saved('folder', micro_pipeline(seed=1), variant='fp16')
    loaded = load_pipeline(saved('folder'), 'cpu')
    assert torch.equal(weights(loaded.unet), weights(micro_pipeline().unet))


# what a folder may not do


def plant(place, folder):
    "Modules that leave a mark when they are imported: in each part's folder, beside it, in it."
    code = f'open({str(place / "ran")!r}, "w")\nclass Evil: pass\nfrom_pretrained = Evil\n'
    for name in ('scheduler', 'tokenizer', 'unet', 'text_encoder', '.', '..'):
        for module in ('evilmod.py', 'pipeline.py'):
            (folder / name / module).write_text(code)


ENTRIES = {
    'a scheduler of its own': dict(scheduler=['evilmod', 'Evil']),
    'a tokenizer of its own': dict(tokenizer=['evilmod', 'Evil']),
    'a network of its own': dict(unet=['evilmod', 'Evil']),
    'one part more': dict(guard=['evilmod', 'Evil']),
    'an unused part': dict(feature_extractor=['evilmod', 'Evil']),
    'a path': dict(scheduler=['../evilmod', 'Evil']),
    'a module below': dict(scheduler=['diffusers.evilmod', 'Evil']),
    'a standard module': dict(text_encoder=['this', 's']),
    'nothing': dict(vae=[]),
    'a list': dict(vae=[['evilmod'], 'Evil']),
    'a pipeline of its own': dict(_class_name=['pipeline', 'Evil']),
    'another pipeline': dict(_class_name='evilmod.Evil'),
}


@pytest.mark.parametrize('changes', ENTRIES.values(), ids=ENTRIES)
def test_no_code_of_a_model_runs(place, monkeypatch, changes, capsys):
    "Refused by its name, before anything is imported, loaded or made."
    edit(saved(place / 'folder') / 'model_index.json', **changes)
    plant(place, place / 'folder')
    monkeypatch.syspath_prepend(place)
    with pytest.raises(ValueError, match=r"folder' (has \[|is a ).*; expected") as caught:
        load_pipeline('folder', 'cpu')
    assert len(str(caught.value).splitlines()) == 1
    for said in refused_by_the_command(['--model', 'folder', '--config', 'tiny'], capsys):
        assert str(caught.value).removeprefix("'folder' ") in said  # there it is absolute
    assert not (place / 'ran').exists() and 'evilmod' not in sys.modules


CLASSES = {
    'scheduler': ['diffusers', 'EulerDiscreteScheduler'],
    'tokenizer': ['transformers', 'AutoTokenizer'],
    'unet': ['diffusers', 'AutoModel'],
    'text_encoder': ['transformers', 'AutoModel'],
}


@pytest.mark.parametrize('part', CLASSES)
def test_only_known_classes_are_loaded(place, part):
    "Whatever the folder names: a class that reads further names of code from a config reads none."
    edit(saved(place / 'folder') / 'model_index.json', **{part: CLASSES[part]})
    plant(place, place / 'folder')
    for config in (place / 'folder').glob('*/*config.json'):
        code = dict.fromkeys(CLASSES[part] + ['AutoModel', 'AutoTokenizer'], 'evilmod.Evil')
        edit(config, auto_map=code, trust_remote_code=True)
    same(picture(load_pipeline('folder', 'cpu')), picture(micro_pipeline()))
    assert not (place / 'ran').exists()


@pytest.mark.parametrize(
    'file', ['model_index.json', 'unet/config.json', 'scheduler/scheduler_config.json']
)
@pytest.mark.parametrize('text', ['[]', '["a"]', '3', '"text"', 'null', '{'])
def test_a_small_file_that_is_no_table(place, file, text, capsys):
    (saved(place / 'folder') / file).write_text(text)
    with pytest.raises(ValueError, match="^'folder' could not be loaded; expected") as caught:
        load_pipeline('folder', 'cpu')
    assert len(str(caught.value).splitlines()) == 1
    assert main(['--model', 'folder', '--config', 'tiny']) == 2
    assert names_in(place) == ['folder']


class Payload:
    "Pickled, it is a call."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


BINS = {
    'unet': 'diffusion_pytorch_model.bin',
    'vae': 'diffusion_pytorch_model.bin',
    'text_encoder': 'pytorch_model.bin',
}


@pytest.mark.parametrize('part', BINS)
def test_pickles_are_read_last_and_as_numbers(place, part):
    "Beside safetensors, of any variant, not at all; alone they are said, and a call in them fails."
    folder = saved(place / 'folder', variant='fp16')
    torch.save(dict(x=Payload(place / 'ran')), folder / part / BINS[part])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_pipeline('folder', 'cpu')
    for path in (folder / part).glob('*.safetensors'):
        path.unlink()
    with (
        pytest.warns(UserWarning, match=f"{part}' has pickled weights alone"),
        pytest.raises(ValueError, match='could not be loaded'),
    ):
        load_pipeline('folder', 'cpu')
    assert not (place / 'ran').exists()


@pytest.mark.parametrize('kind', ['Img2Img', 'Inpaint', ''])
def test_pipelines_of_the_same_parts(kind):
    "An inpainting pipeline may have a UNet of four channels."
    edit(saved(Path('folder')) / 'model_index.json', _class_name=f'StableDiffusion{kind}Pipeline')
    same(picture(load_pipeline('folder', 'cpu')), picture(micro_pipeline()))


@pytest.mark.parametrize('name', ['model.safetensors', 'model.ckpt', 'model'])
def test_a_single_file_is_told_the_way(place, name, capsys):
    (place / name).write_bytes(b'\0' * 99)
    with pytest.raises(ValueError, match='from_single_file.*save_pretrained'):
        load_pipeline(name)
    for said in refused_by_the_command(['--model', name, '--config', 'tiny'], capsys):
        assert name in said and 'from_single_file' in said
    assert names_in(place) == [name]


# schedulers


LINSPACE = [
    EulerDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    LMSDiscreteScheduler,
    DDIMScheduler,
]


@pytest.mark.parametrize('kind', LINSPACE, ids=lambda kind: kind.__name__)
def test_linspace_is_set_to_leading(kind):
    "The default of several schedulers. The noise schedule stays, and a run begins."
    betas = {name: value for name, value in SD_SCHEDULE.items() if name.startswith('beta')}
    pipe = micro_pipeline()
    pipe.scheduler = kind(**betas, timestep_spacing='linspace')
    wanted = "DDPO cannot train with the scheduler as it came.*'timestep_spacing': 'leading'"
    with pytest.warns(UserWarning, match=wanted):
        loaded = load_pipeline(saved('folder', pipe), 'cpu')
    found = loaded.scheduler
    assert found.config.timestep_spacing == 'leading' and not found.config.set_alpha_to_one
    assert torch.equal(found.alphas_cumprod, micro_pipeline().scheduler.alphas_cumprod)
    train(Config(**SMALL), loaded, brightness, PROMPTS)


@pytest.mark.parametrize(
    'changes',
    [
        dict(thresholding=True),
        dict(set_alpha_to_one=True),
        dict(thresholding=True, set_alpha_to_one=True),
    ],
)
def test_other_settings_that_cannot_be_trained_with(changes):
    saved('folder', set_scheduler(micro_pipeline(), **changes))
    wanted = ', '.join(f"'{name}': False" for name in changes)
    with pytest.warns(UserWarning, match=wanted):
        loaded = load_pipeline('folder', 'cpu')
    schedule = make_schedule(loaded.scheduler, 3)
    check_actions(schedule)


def test_a_scheduler_that_fits_is_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        by_name = load_pipeline('tiny', 'cpu')
        by_folder = load_pipeline(tiny_folder(), 'cpu')
    assert by_name.scheduler.config == by_folder.scheduler.config


def test_a_scheduler_without_a_noise_schedule(place, capsys):
    pipe = micro_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    saved('flow', pipe)
    assert main(['--model', 'flow', '--config', 'tiny']) == 2
    wanted = 'FlowMatchEulerDiscreteScheduler; expected one with a beta_schedule'
    assert wanted in capsys.readouterr().err
    assert names_in(place) == ['flow']


def zero_snr(**changes):
    return DDIMScheduler(**SD_SCHEDULE, rescale_betas_zero_snr=True, **changes)


@pytest.mark.parametrize('steps', [1, 4, 10])
def test_epsilon_from_pure_noise_is_refused(steps):
    "Elsewhere it is no trouble: another spacing, another prediction."
    with pytest.raises(ValueError, match='timestep 999.*zero terminal SNR.*leading'):
        make_schedule(zero_snr(timestep_spacing='trailing'), steps)
    for fine in (
        zero_snr(),
        zero_snr(timestep_spacing='trailing', prediction_type='v_prediction'),
        zero_snr(timestep_spacing='trailing', prediction_type='sample'),
    ):
        schedule = make_schedule(fine, steps)
        for numbers in (schedule.alpha, schedule.alpha_prev, schedule.std):
            assert numbers.isfinite().all()


@pytest.mark.parametrize('eta', [1.0001, 1.5, 2, float('inf')])
def test_more_random_than_ddpm_is_refused(eta):
    with pytest.raises(ValueError, match=f'eta={eta}; expected 0'):
        make_schedule(micro_pipeline().scheduler, 5, eta)


@pytest.mark.parametrize('spacing', ['trailing', 'leading'])
@pytest.mark.parametrize('steps', [3, 6, 7, 9, 11, 30, 48])
def test_a_step_ends_where_the_next_one_begins(steps, spacing):
    """diffusers subtracts 1000 // T, and lands beside it when T does not divide 1000 and spacing is
    trailing."""
    scheduler = DDIMScheduler(**SD_SCHEDULE, timestep_spacing=spacing)
    schedule = make_schedule(scheduler, steps)
    assert torch.equal(schedule.alpha_prev[:-1], schedule.alpha[1:])
    assert schedule.alpha_prev[-1] == scheduler.final_alpha_cumprod


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'sample'])
@pytest.mark.parametrize('steps', [1, 4, 10])
def test_a_last_step_without_noise_is_sampled_and_not_trained(steps, prediction):
    pipe = set_scheduler(micro_pipeline(), set_alpha_to_one=True, prediction_type=prediction)
    policy = make_policy(pipe, steps, guidance_scale=1.0)
    sample(policy, encode_prompts(pipe, PAIR), make_generators(range(2)))
    config = Config(**SMALL | dict(num_inference_steps=steps))
    wanted = 'std 0.*missing from the gradient.*set_alpha_to_one=False'
    with pytest.raises(ValueError, match=wanted):
        train(config, pipe, brightness, PROMPTS)
    set_scheduler(pipe, set_alpha_to_one=False, steps_offset=0)
    check_actions(make_schedule(pipe.scheduler, steps))  # the last step goes nowhere


# other networks


UNETS = [
    dict(in_channels=9),
    dict(in_channels=8),
    dict(time_cond_proj_dim=256),
    dict(class_embed_type='timestep'),
    dict(num_class_embeds=10),
    dict(addition_embed_type='text_time'),
    dict(encoder_hid_dim_type='text_proj'),
    dict(out_channels=8),
]


@pytest.mark.parametrize('changes', UNETS, ids=str)
def test_a_unet_that_reads_more_is_refused(place, changes, capsys):
    "Seen in its config, before a weight is read (there is none) or a folder is made."
    edit(saved(place / 'folder') / 'unet' / 'config.json', **changes)
    for file in place.rglob('*.safetensors'):
        file.unlink()
    name = 'in_channels' if 'out_channels' in changes else next(iter(changes))
    with pytest.raises(ValueError, match=f'{name}=.*; expected one that reads'):
        find_model('folder')
    for said in refused_by_the_command(['--model', 'folder', '--config', 'tiny'], capsys):
        assert f'{name}=' in said
    assert names_in(place) == ['folder']


@pytest.mark.parametrize('size', [8, [8, 8], [8, 12], (12, 8)])
def test_pictures_of_two_sizes(place, size):
    "From loading to a run, by the command's own way."
    edit(saved(place / 'folder') / 'unet' / 'config.json', sample_size=size)
    config = Config(**SMALL, model='folder')
    pipe, reward, state = load_all(config, 'cpu')
    epochs = list(train_epochs(config, pipe, reward, PROMPTS, state=state))
    shapes = [tuple(epoch.batch.images.shape[2:]) for epoch in epochs]
    assert shapes == [tuple(2 * np.broadcast_to(size, 2))]


@pytest.mark.parametrize('rank', [1, 4, 8])
def test_a_lora_for_other_tools(place, rank):
    "The two lines of the lesson on pipelines: kohya's names, and an alpha for each layer."
    trained = moved(add_lora(micro_pipeline(), rank))
    plain = micro_pipeline()
    layers = load_file(save_trained(trained, place / 'lora') / 'pytorch_lora_weights.safetensors')
    save_file(convert_state_dict_to_kohya(layers), place / 'kohya.safetensors')
    found = load_file(place / 'kohya.safetensors')
    endings = {name.partition('.')[2] for name in found}
    alphas = {value.item() for name, value in found.items() if name.endswith('alpha')}
    assert endings == {'lora_down.weight', 'lora_up.weight', 'alpha'}
    assert all(name.startswith('lora_unet_') for name in found) and alphas == {rank}
    plain.load_lora_weights(place, weight_name='kohya.safetensors')
    same(picture(plain), picture(trained))


def with_words(pipe, count):
    pipe.load_textual_inversion({'<mine>': torch.randn(count, 16, generator=generator())})


def with_mask(pipe):
    pipe.text_encoder.config.use_attention_mask = True


ENCODERS = {
    'as it is': lambda pipe: None,
    'a word': lambda pipe: with_words(pipe, 1),
    'three vectors': lambda pipe: with_words(pipe, 3),
    'a mask': with_mask,
    'a LoRA': with_text_lora,
}


@pytest.mark.parametrize('change', ENCODERS.values(), ids=ENCODERS)
def test_prompts_are_encoded_as_the_pipeline_does(change):
    pipe = micro_pipeline()
    change(pipe)
    prompts = ['a <mine> cat', 'a fox', 'a', 'a pencil sketch of an owl']
    with torch.no_grad():
        wanted, empty = pipe.encode_prompt(prompts, 'cpu', 1, True)
    context = encode_prompts(pipe, prompts)
    same(context.text, wanted)
    same(context.empty.expand_as(empty), empty)


LOST = {  # what a tokenizer without some file makes of every word
    'nothing': (['a cat', 'a dog'], {}, "'' and 'a cat'"),
    'nothing of one prompt': (['a fox'], {}, "'' and 'a fox'"),
    'the same word': (
        ['a cat', 'a dog'],
        dict.fromkeys('cat dog'.split(), 'fox'),
        "'a cat' and 'a dog'",
    ),
    'some words the same': (
        ['a', 'my owl', 'my fox'],
        dict(my='my', fox='owl', owl='owl', a='a'),
        "'my owl' and 'my fox'",
    ),
}


@pytest.mark.parametrize('prompts, read_as, named', LOST.values(), ids=LOST)
def test_prompts_that_lose_their_difference(prompts, read_as, named):
    "Both are named: their pictures would be those of one prompt."
    pipe = micro_pipeline()

    class Tokenizer(type(pipe.tokenizer)):
        def __call__(self, texts, **options):
            texts = [texts] if isinstance(texts, str) else texts
            changed = [' '.join(read_as.get(word, '') for word in text.split()) for text in texts]
            return super().__call__(changed, **options)

    pipe.tokenizer = Tokenizer.from_pretrained(tiny_folder() / 'tokenizer')
    with pytest.raises(ValueError, match=f'The prompts {named} are the same 16 tokens'):
        encode_prompts(pipe, prompts)


CUT = 'a' + ' cat' * 20


@pytest.mark.filterwarnings('ignore:The text encoder reads')
@pytest.mark.parametrize('endings', [('dog', 'fox'), ('', 'dog'), ('on a blue field', 'in a box')])
def test_prompts_that_differ_where_they_are_cut(endings):
    prompts = [f'{CUT} {ending}' for ending in endings]
    with pytest.raises(ValueError, match='are the same 16 tokens.*shorten both'):
        encode_prompts(micro_pipeline(), prompts)


@pytest.mark.parametrize('other', ['A Cat', ' a  cat ', 'a\tcat', 'a cat'])
def test_prompts_that_are_spelled_otherwise(other):
    "The tokenizer's own affair: it reads small letters, and a space is a space."
    text = encode_prompts(micro_pipeline(), ['a cat', other]).text
    assert torch.equal(text[0], text[1])


# rewards


REWARDS = {  # source: words
    'def reward(images, prompts, metadata): return images.mean((1, 2, 3)), {}': [
        'TypeError',
        'metadata',
    ],
    'def reward(images, prompts): return images.mean((1, 2, 3)), {}': ['tuple', 'scores alone'],
    'def reward(images, prompts): return {"score": 1.}': ['dict', '2 numbers'],
    'class reward:\n    def __init__(self, images, prompts): pass': ['reward', '2 numbers'],
    'def reward():\n    return lambda images, prompts: images.mean((1, 2, 3))': [
        'TypeError',
        'positional',
    ],
    'def reward(*anything):\n    return lambda images, prompts: images.mean((1, 2, 3))': [
        'function',
        '2 numbers',
    ],
    'def reward(images, prompts): return images.mean((2, 3))': ['(2, 3)', '(2,)', 'pixels'],
    'def reward(images, prompts): return images.mean((1, 2, 3))[:, None]': ['(2, 1)', 'squeeze'],
    'def reward(images, prompts): return images.mean()': ['()', '(2,)'],
    'def reward(images, prompts): return (x for x in (1., 2.))': ['generator', '2 numbers'],
    'reward = 3': ['int', 'function'],
}
FINE = [
    'images.mean((1, 2, 3))',
    'images.mean((1, 2, 3)).tolist()',
    'images.mean((1, 2, 3)).numpy()',
    '[1, 2]',
]


@pytest.mark.parametrize('source', REWARDS)
def test_a_reward_of_another_form_is_refused_first(place, monkeypatch, capsys, source):
    """By the command, with the type of what came back, before a model is loaded or a folder is
    made."""
    (place / 'brought.py').write_text(source + '\n')
    monkeypatch.delitem(sys.modules, 'brought', raising=False)
    assert main(['--reward', 'brought:reward']) == 2
    said = capsys.readouterr().err
    assert 'brought:reward' in said, said
    assert all(word in said for word in REWARDS[source]), said
    monkeypatch.delitem(sys.modules, 'brought', raising=False)
    assert not (place / 'runs').exists()


@pytest.mark.parametrize('answer', FINE)
def test_numbers_are_taken_as_they_come(place, monkeypatch, answer):
    (place / 'brought.py').write_text(f'def reward(images, prompts): return {answer}\n')
    monkeypatch.delitem(sys.modules, 'brought', raising=False)
    assert score(own_reward('brought:reward'), torch.rand(2, 3, 8, 8), PAIR).shape == (2,)
    monkeypatch.delitem(sys.modules, 'brought', raising=False)


@pytest.mark.parametrize('lora', [False, True])
@pytest.mark.parametrize('how', ['set_grad_enabled(False)', 'is imported', 'in the reward'])
def test_gradients_switched_off_elsewhere(how, lora):
    pipe = add_lora(micro_pipeline()) if lora else micro_pipeline()
    before = weights(pipe.unet)

    def reward(images, prompts):
        if how == 'in the reward':
            torch.set_grad_enabled(False)
        return brightness(images, prompts)

    try:
        if how != 'in the reward':
            torch.set_grad_enabled(False)
        if how == 'is imported':
            exec('import torch\ntorch.autograd.set_grad_enabled(False)', {})
        train(Config(**SMALL), pipe, reward, PROMPTS)
    finally:
        torch.set_grad_enabled(True)
    assert not torch.equal(weights(pipe.unet), before)


def overflowing(dtype, factor):
    """A pipeline whose decoder's first layer gives numbers that float16 cannot hold; the norm after
    it makes them small again."""
    pipe = load_pipeline(saved('folder'), 'cpu')
    with torch.no_grad():
        for p in pipe.vae.decoder.conv_in.parameters():
            p.mul_(factor)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.to(dtype)
    return pipe


@pytest.mark.parametrize('factor', [1e6, 1e7, 3e7])
def test_a_decoder_that_overflows_is_decoded_in_float32(factor):
    """The numbers are as large as in 32 bits; what is given stays in its dtype, and a gradient
    still flows."""
    x = torch.randn(3, 4, 8, 8, generator=generator())
    pipe = overflowing(torch.float16, 6e4)
    with torch.no_grad():
        assert not pipe.vae.decode(x.half() * factor).sample.isfinite().all()  # the fault
    pipe = overflowing(torch.float16, 6e4)
    wide = overflowing(torch.float32, 1.0)
    for p, q in zip(wide.vae.parameters(), pipe.vae.parameters()):
        p.data = q.data.float()
    leaf = (x * factor / 1e6).requires_grad_()
    images = decode_latents(pipe, leaf)
    same(images, decode_latents(wide, leaf))
    images.sum().backward()
    assert leaf.grad.isfinite().all() and pipe.vae.dtype == torch.float16


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_a_picture_that_is_no_number_is_named(bad):
    images = torch.rand(2, 3, 8, 8)
    images[1, 0, 3, 3] = bad
    with pytest.raises(ValueError, match="'a dog' is not finite; .*VAE decoder.*float32"):
        score(brightness, images, PAIR)


@pytest.mark.parametrize('value', [0.0, 1.0, -3.5, 1e6])
def test_equal_rewards_are_said_once(value):
    tracker = PerPromptStatTracker(8, 4)
    with pytest.warns(UserWarning, match='All 3 rewards are .* nothing to learn') as caught:
        warnings.simplefilter('default')
        for _ in range(3):
            advantages = tracker.update(['a', 'b', 'a'], [value] * 3)
    assert len(caught) == 1 and abs(advantages).max() < 1e-6


@pytest.mark.parametrize('rewards', [[1.0, 2.0, 1.0], [0.0, 1e-9, 0.0], [5.0]])
def test_other_rewards_are_not(rewards):
    prompts = ['a', 'b', 'a'][: len(rewards)]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        PerPromptStatTracker(8, 4).update(prompts, rewards)


# files and terminals


@pytest.mark.parametrize('mark', [b'\xef\xbb\xbf', b''])
@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_a_byte_order_mark_is_dropped(place, mark, end):
    (place / 'words.txt').write_bytes(mark + f'a cat{end}ein Bär{end}'.encode())
    assert read_prompts('words.txt') == ['a cat', 'ein Bär']


FORMATS = {
    'words.json': '["a cat", "a dog"]',
    'words.jsonl': '{"prompt": "a cat"}\n',
    'WORDS.JSON': '{}',
    'words.csv': 'prompt,seed\na cat,1\n',
    'words.tsv': 'a cat\t1\n',
    'words.yaml': '- a cat\n',
    'words.parquet': 'PAR1',
}


@pytest.mark.parametrize('name', FORMATS)
def test_a_format_that_is_no_list_of_lines_is_refused(place, name, capsys):
    (place / name).write_text(FORMATS[name])
    for said in refused_by_the_command(['--prompts', name], capsys):
        assert name in said and 'one prompt a line' in said
    assert names_in(place) == [name]


@pytest.mark.parametrize('name', ['words.txt', 'words', 'words.prompts', 'my.words.md'])
def test_a_list_of_lines_may_have_any_other_name(place, name):
    (place / name).write_text('a cat\n[V] a dog\n')
    assert read_prompts(name) == ['a cat', '[V] a dog']


SHORT = """--config tiny --num-epochs 1 --samples-per-epoch 2 --updates-per-epoch 1
--num-inference-steps 2 --eval-images 1 --watch-images 0 --reward compressibility --model folder
--out run""".split()


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'cp437'])
def test_a_terminal_without_these_letters(place, monkeypatch, encoding):
    "Prompts and ± are printed; what cannot be is replaced, and the run goes on."
    saved('folder')
    (place / 'words.txt').write_text('ein Bär — 熊\n', encoding='utf-8')
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, 'stdout', stream)
    code = main([*SHORT, '--prompts', 'words.txt'])
    stream.flush()
    said = stream.buffer.getvalue().decode(encoding)
    assert code == 0 and 'epoch   1/1' in said and 'ein B' in said and '?' in said


@pytest.mark.parametrize('model', ['CompVis/stable-diffusion-v1-4', 'owner/name', 'folder'])
def test_a_model_without_a_configuration(place, model, capsys):
    """It would be trained with the tiny model's numbers: refused, with the names of the
    configurations."""
    saved('folder')
    for said in refused_by_the_command(['--model', model], capsys):
        assert all(word in said for word in (model, '--config', 'sd-lora-16gb', 'tiny')), said
    command = read_command(['--model', model, '--config', 'sd-lora-16gb'])
    assert command.settings.guidance_scale == 5
    assert names_in(place) == ['folder']


@pytest.mark.parametrize('there, wanted', [(None, 'cpu'), ('meta', 'meta'), ('meta:0', 'meta')])
def test_an_accelerator_is_chosen_where_there_is_one(monkeypatch, there, wanted):
    "torch names it (cuda, mps, ...); here the device without memory stands in."
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: there is not None)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device(there))
    assert load_pipeline('tiny').device.type == wanted


@pytest.mark.parametrize(
    'by, wanted',
    [('argument', 'meta'), ('environment', 'cpu'), ('environment', 'meta'), ('setting', 'cpu')],
)
def test_a_device_can_be_chosen(monkeypatch, by, wanted):
    "An argument before a setting, that before the environment, and that before what is there."
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    other = torch.device('meta' if wanted == 'cpu' else 'cpu')
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: other)
    monkeypatch.setenv('DDPO_DEVICE', wanted if by == 'environment' else str(other))
    config = Config(lora_rank=0, device=dict(setting=wanted, argument='cpu').get(by, ''))
    pipe = load_model(config, wanted if by == 'argument' else None)
    assert pipe.device.type == wanted
    if by == 'environment':
        assert load_pipeline('tiny').device.type == wanted


@pytest.mark.parametrize('device', ['cuda:99', 'xpu', 'gpu', 'cpu cpu', 'CPU'])
def test_a_device_that_is_not_there(monkeypatch, device):
    "One sentence, before a weight is read."
    with pytest.raises(ValueError, match=f"^There is no device '{device}'; expected") as caught:
        load_pipeline('no/such/model', device)
    assert len(str(caught.value).splitlines()) == 1
    monkeypatch.setenv('DDPO_DEVICE', device)
    with pytest.raises(ValueError, match=f"^There is no device '{device}'"):
        load_pipeline('tiny')


@pytest.mark.parametrize('device', ['cpu', 'mps', 'xpu'])
def test_float32_without_cuda(device):
    assert compute_dtype(device) == torch.float32


# an earlier epoch


def reloaded(lora, path):
    "A plain pipeline with the LoRA of that path, or the one of that path."
    pipe = StableDiffusionPipeline.from_pretrained('folder' if lora else path)
    if lora:
        pipe.load_lora_weights(path)
    return pipe


@pytest.mark.parametrize('lora', [0, 4])
def test_an_earlier_checkpoint_can_be_exported(lora, capsys):
    """The weights of that epoch and no other, as `load_pipeline` and `load_lora_weights` read
    them."""
    saved('folder')
    words = ['--lora-rank', str(lora), '--num-epochs', '3', '--keep-checkpoints', '9']
    assert main([*SHORT, *words, '--learning-rate', '0.01']) == 0
    kind = 'lora' if lora else 'pipeline'
    drawn = []
    for epoch in (1, 2, 3):
        assert main(['--export', f'run/checkpoints/epoch-{epoch:05d}.pt']) == 0
        folder = Path('run') / f'{kind}-epoch-{epoch:05d}'
        assert folder.name in capsys.readouterr().out
        drawn.append(picture(reloaded(lora, folder)))
    same(drawn[2], picture(reloaded(lora, Path('run') / kind)))
    for one, next_one in zip(drawn, drawn[1:]):
        assert (one - next_one).abs().max() > 1e-4


@pytest.mark.parametrize(
    'name',
    ['absent.pt', 'run/checkpoints/absent.pt', 'words.txt', 'run', 'run/checkpoints/damaged.pt'],
)
def test_what_is_no_checkpoint_is_not_exported(place, name):
    (place / 'run' / 'checkpoints').mkdir(parents=True)
    for file in ('words.txt', 'run/config.yaml', 'run/checkpoints/damaged.pt'):
        (place / file).write_text('seed: 1\n')
    with pytest.raises(ValueError, match=f'{name!r} is no checkpoint.*epoch-00008.pt'):
        export_checkpoint(Path(name))
