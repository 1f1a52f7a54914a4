"Reinforcement learning for diffusion models, from scratch: DDPO as notebooks and a small module"

__version__ = "0.4.0"

from importlib import import_module

# Where the names that users import most stand. They are loaded when they are asked for, because
# `ddpo_train --help` and `import ddpo_tutorial` should not wait for PyTorch.
_NAMES = {
    'advantages': ['PerPromptStatTracker', 'group_advantages'],
    'configs': ['Config', 'load_config'],
    'pipelines': [
        'add_lora',
        'contact_sheet',
        'decode_latents',
        'encode_prompts',
        'load_model',
        'load_pipeline',
        'save_trained',
    ],
    'ppo': ['ppo_loss', 'reinforce_loss'],
    'predictors': ['clip_similarity', 'laion_aesthetic', 'pick_score'],
    'prompts': ['fill_template', 'find_prompts', 'held_out_animals', 'simple_animals'],
    'rewards': [
        'WeightedSum',
        'jpeg_compressibility',
        'jpeg_incompressibility',
        'score',
        'tiny_aesthetic',
        'tiny_similarity',
    ],
    'runs': ['train_run'],
    'sampling': ['Context', 'Trajectory', 'make_generators', 'make_policy', 'rescore', 'sample'],
    'training': ['clipped_loss', 'collect', 'evaluate', 'train', 'train_epochs'],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name):
    "A name from the module where it stands, loaded now."
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_HOMES[name]}', __name__), name)


def __dir__():
    return [*globals(), *__all__]
