"""The benchmark: `python tests/bench/bench.py`; what it measures is in README.md"""

import argparse
import os
import warnings
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('WANDB_MODE', 'disabled')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
warnings.filterwarnings('ignore', category=FutureWarning)

import torch
from report import TITLES, Store, markdown
from settings import describe, for_device

DEFAULT = dict(
    cpu=['sampling', 'training', 'overhead', 'recipe', 'reward'],
    cuda=['sampling', 'training', 'overhead', 'recipe', 'limit', 'lora', 'reward'],
)


def arguments() -> argparse.Namespace:  # what was asked for
    "The command line."
    what = (
        'Measure ddpo_tutorial against TRL, the original recipe and the hardware; '
        'see README.md beside this file.'
    )
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument(
        '--parts',
        nargs='+',
        choices=TITLES,
        help='what to measure; by default all that the device is meant for',
    )
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu', choices=['cpu', 'cuda']
    )
    parser.add_argument('--repeats', type=int, default=5, help='timed rounds, at least (5)')
    parser.add_argument(
        '--quick',
        action='store_true',
        help='small and short: shows that it runs, says little about speed',
    )
    parser.add_argument(
        '--model',
        choices=['tiny', 'sd'],
        help="tiny (default on a CPU) or sd: SD v1.4's shape with random weights",
    )
    parser.add_argument('--image-size', type=int, default=512, help='pixels a side, of sd (512)')
    parser.add_argument(
        '--out',
        type=Path,
        help='the Markdown file, the numbers beside it as JSON (results/cpu.md or results/cuda.md)',
    )
    return parser.parse_args()


def measure(
    part: str,  # its name
    settings,  # of the run
    store: Store,  # where it is written
) -> None:
    """Check, measure and keep one part. What needs TRL is imported here, so that the other parts
    run without it."""
    environment = describe(settings)
    if part in ('sampling', 'training'):
        import identical

        checks = identical.check_all(settings)
        store.put(part, environment, checks=checks, rows=identical.rows_of(part, settings))
    elif part == 'overhead':
        import overhead

        store.put(part, environment, rows=overhead.overhead_part(settings))
    elif part == 'recipe':
        import recipe

        store.put(
            part,
            environment,
            checks=recipe.check_recipe(settings),
            rows=recipe.recipe_part(settings),
        )
    elif part == 'reward':
        import time_to_reward

        done = store.parts.get('reward', {})
        done = (
            done['rows']
            if done and done['environment']['settings']['quick'] == settings.quick
            else []
        )
        time_to_reward.reward_part(
            settings, done, lambda runs: store.put(part, environment, rows=runs)
        )
    else:
        import limit

        store.put(
            part,
            environment,
            rows=(limit.limit_part if part == 'limit' else limit.lora_part)(settings),
        )


def main() -> None:
    "Measure the parts one after the other; each is on disk when it is finished."
    args = arguments()
    settings = for_device(
        args.device,
        repeats=args.repeats,
        quick=args.quick,
        model=args.model,
        image_size=args.image_size,
    )
    store = Store(
        args.out or Path(__file__).parent / 'results' / f'{"quick-" * args.quick}{args.device}.md'
    )
    for part in args.parts or DEFAULT[args.device]:
        print(f'{part} ...', flush=True)
        measure(part, settings, store)
    print(markdown(store.parts))
    print(f'\nWritten to {store.path} and {store.json}.')


if __name__ == '__main__':
    main()
