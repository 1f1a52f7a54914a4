"""Settings from Python, files and the command line, and what they come to"""
from dataclasses import asdict, fields

import pytest

from ddpo_tutorial.configs import RunConfig, convert, estimate, flops, make_parser, near, read_config, setting_groups, shipped_configs
from ddpo_tutorial.runs import dry_run, main, read_args

SHIPPED = ['sd-alignment', 'sd-compressibility', 'sd-lora-16gb', 'sd-lora-8gb', 'sd-original', 'tiny']

def test_the_shipped_ones_are_there(): assert sorted(shipped_configs()) == SHIPPED

@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_configs_are_good_and_can_be_planned(name, capsys):
    "Every one of them passes the checks, and says what it would do without loading anything."
    assert main(['--config', name, '--dry-run']) == 0
    said = capsys.readouterr().out
    for words in ('learning_rate:', 'images in all', 'updates, ', 'minibatches', 'minutes an epoch', 'GB'): assert words in said

def test_the_tiny_one_is_the_default(): assert RunConfig(**read_config('tiny')) == RunConfig()

def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    (tmp_path / 'my.yaml').write_text('learning_rate: 5e-6\nnum_epochs: 7\nvae_slicing: true\n')
    config, options = read_args(['--config', str(tmp_path / 'my.yaml'), '--num-epochs', '9', '--no-vae_slicing'])
    assert config == RunConfig(learning_rate=5e-6, num_epochs=9) and not options['dry_run']

@pytest.mark.parametrize('spelling', ['--samples_per_epoch', '--samples-per-epoch'])
def test_dashes_and_underscores(spelling): assert read_args([spelling, '3'])[0].samples_per_epoch == 3

@pytest.mark.parametrize('text, words', [
    ('learning_rte: 1e-4', ["'learning_rte'", "'learning_rate'"]), ('num_epochs: 2.5', ['num_epochs', '2.5', 'int']), ('num_epochs: true', ['num_epochs', 'bool']),
    ('gradient_checkpointing: 1', ['gradient_checkpointing', 'bool']), ('learning_rate: fast', ['learning_rate', "'fast'", 'float']), ('model: 3', ['model', 'str']),
    ('- a list', ['list', 'learning_rate: 5e-6']), ('a: b: c', ['not YAML']), ('"just words"', ['str'])])
def test_bad_files(tmp_path, text, words):
    (tmp_path / 'bad.yaml').write_text(text)
    with pytest.raises(ValueError) as error: read_config(str(tmp_path / 'bad.yaml'))
    assert all(w in str(error.value) for w in words), error.value

def test_empty_file_is_the_default(tmp_path):
    (tmp_path / 'empty.yaml').write_text('# nothing\n')
    assert read_config(str(tmp_path / 'empty.yaml')) == {}

@pytest.mark.parametrize('value, kind, wanted', [('5e-6', float, 5e-6), (1, float, 1.), (.5, float, .5), (3, int, 3), (True, bool, True), ('tiny', str, 'tiny')])
def test_what_yaml_reads_becomes_what_is_meant(value, kind, wanted):
    got = convert('x', value, kind)
    assert got == wanted and type(got) is kind

def test_off_means_off(): assert convert('wandb', False, str) == 'off'

def test_every_setting_is_in_one_group(): assert sorted(sum(setting_groups().values(), [])) == sorted(f.name for f in fields(RunConfig))

def test_help_has_groups_defaults_and_meanings():
    said = ' '.join(make_parser({}).format_help().split())
    for title in setting_groups(): assert title + ':' in said
    for f in fields(RunConfig): assert f'--{f.name}' in said and f'(default: {f.default})' in said

def test_near(): assert near('ofline', ['off', 'offline']) == " Did you mean 'offline'?" and near('xyz', ['off']) == ''

def test_operations_are_those_of_the_published_figure():
    "About 0.8 TFLOP a picture at 512x512; guidance doubles, a LoRA saves a third of the training."
    sd = RunConfig(model='CompVis/stable-diffusion-v1-4', guidance_scale=1.)
    count = flops(sd)
    assert .7e12 < count['forward'] < .9e12 and count['parameters'] == 859_520_964 == count['trained']
    assert count['epoch'] == 4 * sd.samples_per_epoch * sd.num_inference_steps * count['forward']
    lora = flops(RunConfig(**asdict(sd) | dict(lora_rank=4)))
    assert lora['epoch'] == count['epoch'] * 3 / 4 and lora['trained'] == 797_184
    assert flops(RunConfig(**asdict(sd) | dict(guidance_scale=2.)))['epoch'] == 2 * count['epoch']

def test_estimate_of_memory():
    "16 bytes a trained weight; a LoRA's frozen ones in the device's precision."
    full, lora = (estimate(RunConfig(model='CompVis/stable-diffusion-v1-4', lora_rank=r), 'cpu')['gigabytes'] for r in (0, 4))
    assert 13.7 < full < 14. and 3.4 < lora < 3.7

def test_dry_run_loads_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('ddpo_tutorial.configs.load_pipeline', lambda *a: pytest.fail('a model was loaded'))
    dry_run(RunConfig(model='owner/name'))
    assert list(tmp_path.iterdir()) == []
