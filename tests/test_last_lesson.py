"""The last lesson: its check of the ratios, its page of commands, and what waits for a GPU.

Run: python -m pytest tests/test_last_lesson.py -n 0 --slow
"""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from test_gates import cells, source

from ddpo_tutorial import sampling, training
from ddpo_tutorial.command import main
from ddpo_tutorial.configs import load_config
from ddpo_tutorial.pipelines import tiny_folder

ROOT = Path(__file__).parents[1]
(PATH,) = (ROOT / 'nbs').glob('*_stable_diffusion.ipynb')
(PAGE,) = [source(c) for c in cells(PATH, 'markdown') if '## One page' in source(c)]
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', PAGE, re.S)
DTYPES = ['float32', 'bfloat16', 'float16']

# faults in rescoring


def another_guidance(policy, trajectory, steps, rows):
    other = replace(policy, guidance_scale=1.1 * policy.guidance_scale)
    return sampling.rescore(other, trajectory, steps, rows)


def another_timestep(policy, trajectory, steps, rows):
    shifted = policy.schedule._replace(timesteps=policy.schedule.timesteps - 20)
    return sampling.rescore(replace(policy, schedule=shifted), trajectory, steps, rows)


def another_prompt(policy, trajectory, steps, rows):
    context = trajectory.context
    swapped = trajectory._replace(context=context._replace(text=context.text.roll(1, 0)))
    return sampling.rescore(policy, swapped, steps, rows)


FAULTS = [another_guidance, another_timestep, another_prompt]


@pytest.fixture(scope='module')
def lesson():
    "What the imports and the cell with `first_ratios` define."
    space = {}
    for cell in cells(PATH):
        if source(cell).startswith('import os') or 'def first_ratios' in source(cell):
            exec(source(cell), space)
    return space


@pytest.mark.parametrize('dtype', DTYPES)
def test_first_ratios_pass_and_see_each_fault(lesson, dtype, monkeypatch):
    "The lesson's own function and bounds, for each format."
    config, allowed = load_config('tiny'), lesson['SCATTER'][dtype]
    honest, clipped = lesson['first_ratios'](config, dtype)
    assert honest <= allowed and clipped <= 0.1
    for fault in FAULTS:
        monkeypatch.setattr(training, 'rescore', fault)
        scatter, _ = lesson['first_ratios'](config, dtype)
        assert scatter > 3 * allowed, (fault.__name__, scatter)


# one page


def test_the_page_can_be_followed(tmp_path, monkeypatch):
    """Its files and its commands in their order, with the tiny model in place of the real one, and
    two short epochs."""
    monkeypatch.chdir(tmp_path)
    (words,), (reward, convert) = (
        [text for kind, text in BLOCKS if kind == k] for k in ('text', 'python')
    )
    Path('prompts.txt').write_text(words)
    Path('my_reward.py').write_text(reward)
    lines = [line for kind, text in BLOCKS if kind == 'bash' for line in text.splitlines()]
    assert lines[0] == 'python3 -m venv .venv && .venv/bin/pip install -q .' and len(lines) == 6
    short = ['--samples-per-epoch', '4', '--eval-images', '4', '--watch-images', '2']
    for line in lines[1:]:
        args = shlex.split(re.sub(r'^(nohup )?\.venv/bin/ddpo_train', '', line).split(' >')[0])
        if '--config' in args and '--dry-run' not in args:
            args = ['smoke' if a == 'sd-lora-16gb' else a for a in args] + short
        assert main([re.sub(r'epoch-\d+', 'epoch-00002', a) for a in args]) == 0, line
    left = {p.name for p in Path('runs/warm').iterdir()}
    assert {
        'config.yaml',
        'metrics.csv',
        'samples.png',
        'reward_curve.png',
        'lora',
        'lora-epoch-00002',
    } <= left
    exec(convert, {})
    a, b = (StableDiffusionPipeline.from_pretrained(tiny_folder()) for _ in range(2))
    a.load_lora_weights('runs/warm/lora')
    b.load_lora_weights(tmp_path, weight_name='warm.safetensors')
    assert any('lora' in name for name, _ in a.unet.named_parameters())
    for p, q in zip(a.unet.parameters(), b.unet.parameters()):
        torch.testing.assert_close(p, q)


# what waits for a GPU


@pytest.fixture
def gpu(monkeypatch):
    "The script as a module; the benchmark's modules lie beside it."
    monkeypatch.syspath_prepend(str(ROOT / 'tests' / 'bench'))
    import gpu

    return gpu


def test_gpu_script_allows_what_the_lesson_allows(gpu, lesson):
    assert gpu.ALLOWED == lesson['SCATTER']


def asked(tmp_path, *parts):
    return ['--quick', '--device', 'cpu', '--out', str(tmp_path / 'gpu.json'), '--parts', *parts]


@pytest.mark.slow
def test_gpu_script_runs_on_a_cpu(gpu, tmp_path, capsys):
    "What is stored is not done again."
    parts = ['ratios', 'memory', 'epoch']
    assert gpu.main(asked(tmp_path, *parts)) == 0
    stored = json.loads((tmp_path / 'gpu.json').read_text())
    assert list(stored) == parts and set(stored['ratios']['scatter']) == set(DTYPES)
    assert set(stored['memory']['rows']) == {'sd-lora-8gb', 'sd-original'}
    assert all(
        part['minutes'] > 0 and 'CPU cores' in part['environment']['hardware']
        for part in stored.values()
    )
    capsys.readouterr()
    assert gpu.main(asked(tmp_path, *parts)) == 0 and capsys.readouterr().out.count(' good ') == 3
    assert json.loads((tmp_path / 'gpu.json').read_text()) == stored


@pytest.mark.slow
def test_the_long_parts_of_the_gpu_script_run_on_a_cpu(gpu, tmp_path):
    """All but the notebook, which has a test of its own. Two epochs do not learn what nine do, so
    `tiny` may be called not good."""
    code = gpu.main(asked(tmp_path, 'tiny', 'bench'))
    stored = json.loads((tmp_path / 'gpu.json').read_text())
    assert (
        stored['bench']['good']
        and (tmp_path / 'cpu.md').is_file()
        and code == (not stored['tiny']['good'])
    )
    assert len(stored['tiny']['gains']) == 3 and len(stored['tiny']['cpu']) == 10


@pytest.mark.slow
def test_gpu_script_sees_faults(gpu, tmp_path, monkeypatch):
    "Rescoring with another guidance, and a count that leaves three quarters out."
    monkeypatch.setattr(gpu, 'rescore', another_guidance)
    count = gpu.memory_bytes
    monkeypatch.setattr(
        gpu, 'memory_bytes', lambda config: {name: size / 4 for name, size in count(config).items()}
    )
    assert gpu.main(asked(tmp_path, 'ratios', 'memory')) == 1
    stored = json.loads((tmp_path / 'gpu.json').read_text())
    assert not stored['ratios']['good'] and not stored['memory']['good']
