"""The numbers as JSON, and the same as Markdown tables: median (smallest to largest) of every
round"""

import json
import math
import statistics
from pathlib import Path

import numpy as np
from timing import spread

BARS = {  # part -> (device, what is looked at, at least so much)
    'sampling': ('cpu', 1.0),
    'training': ('cpu', 1.0),
    'overhead': ('cpu', 0.952),
    'recipe': ('cuda', 8.0),
}
TITLES = dict(
    sampling="Identical work against TRL's DDPOTrainer: sampling",
    training="Identical work against TRL's DDPOTrainer: training",
    overhead='`sample` and `update` over the bare UNet calls they make',
    recipe="Against the original tutorial's recipe",
    reward='Time to reward on the tiny model',
    limit='Against the limit: achieved TFLOP/s over those of a large matrix product',
    lora='A LoRA of rank 4: peak memory',
)


class Store:
    """The results on disk: each part replaces its own former numbers; the Markdown is written anew
    from all of them."""

    def __init__(
        self,
        path: Path,  # of the Markdown; the JSON lies beside it
    ):
        self.path = Path(path)
        self.json = Path(path).with_suffix('.json')
        self.parts = (
            json.loads(self.json.read_text(encoding='utf-8')) if self.json.is_file() else {}
        )

    def put(
        self,
        part: str,  # its name
        environment: dict,  # of `settings.describe`
        **content,  # rows, checks
    ) -> None:
        "Keep a part's numbers."
        self.parts[part] = dict(environment=environment, **content)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (self.json, json.dumps(self.parts, indent=1)),
            (self.path, markdown(self.parts)),
        ):
            aside = path.with_suffix(path.suffix + '.part')
            aside.write_text(text + '\n', encoding='utf-8')
            aside.replace(path)


def shown(
    values: list[float],  # measurements
    digits: int = 3,  # significant
) -> str:  # median (min to max)
    "Several numbers in one cell."
    s = spread(values)
    return (
        f'{figure(s["median"], digits)} ({figure(s["min"], digits)} to {figure(s["max"], digits)})'
    )


def figure(
    value: float,  # a number
    digits: int,  # significant
) -> str:  # without exponent
    "A number with so many significant digits."
    places = max(
        0,
        digits - len(str(int(abs(value)))) if abs(value) >= 1 else digits - 1 + (abs(value) < 0.1),
    )
    return f'{value:.{places}f}'


def table(
    head: list[str],  # columns
    rows: list[list],  # cells
) -> str:  # Markdown
    "A table."
    lines = [head, ['---'] * len(head)] + rows
    return '\n'.join('| ' + ' | '.join(str(c) for c in line) + ' |' for line in lines)


def verdict(
    part: str,  # its name
    device: str,  # it ran on
    ratio: float,  # median
) -> str:  # a cell
    "Whether the bar of a part was reached, where it has one on this device."
    where, least = BARS.get(part, (None, 0))
    if where != device:
        return 'none here'
    return f'{least:g}: ' + ('reached' if ratio >= least else 'missed')


def comparison(
    part: str,  # its name
    content: dict,  # of `Store.put`
) -> str:  # a table
    "Ours and theirs, with the ratio of each round and the memory beside."
    device = content['environment']['settings']['device']
    rows = []
    for row in content['rows']:
        if 'note' in row:
            rows.append([row['case'], row['note']] + [''] * 6)
            continue
        times = row['times']
        memory = {k: f'{v / 2**20:.0f}' for k, v in row['memory'].items()}
        met = verdict(part, device, statistics.median(row['ratios']))
        rows.append(
            [
                row['case'],
                len(row['ratios']),
                shown(times['ours']),
                shown(times['theirs']),
                shown(row['ratios']),
                met,
                memory['ours'],
                memory['theirs'],
            ]
        )
    return table(
        [
            'case',
            'rounds',
            'ours, s',
            'theirs, s',
            'theirs / ours',
            'to reach',
            'ours, MiB',
            'theirs, MiB',
        ],
        rows,
    )


def checks(
    content: dict,  # of `Store.put`
) -> str:  # a table, or nothing
    "What agreed before anything was timed."
    numbers = ('largest_difference', 'largest_value', 'relative_norm_of_difference')
    rows = [
        [c['what'], *(f'{c[k]:.1e}' if k in c else '' for k in numbers)]
        for c in content.get('checks', [])
    ]
    if not rows:
        return ''
    head = ['what', 'largest difference', 'largest value', 'norm of the difference / norm']
    return '\n\nChecked before: ours and theirs on the same data.\n\n' + table(head, rows)


def reward_cells(
    run: dict,  # of `Curve.result`, with its side, settings and seed
) -> list:  # cells
    """A run in a row of the table. The search (seeds from 100) goes by forward passes, so its
    seconds are left out."""
    seconds = f'{run["seconds_to_aim"]:.1f}' if run['seconds_to_aim'] and run['seed'] < 100 else ''
    reached = [
        seconds,
        f'{run["forwards_to_aim"]:.0f}' if run['forwards_to_aim'] else 'not reached',
    ]
    return [
        run['side'],
        run['settings'],
        run['seed'],
        *reached,
        f'{max(run["gains"]):+.2f}',
        len(run['gains']) - 1,
    ]


def ratio_of_medians(
    theirs: list[float],  # one a seed, infinite where the aim was not reached
    ours: list[float],  # the same
) -> tuple[float, float, float]:  # ratio, and where 95% of ratios of seeds drawn again lie
    "How many times as long theirs takes, with a bootstrap interval."
    rng = np.random.default_rng(0)

    def again(values):
        return np.median(rng.choice(values, (4000, len(values))), 1)

    with np.errstate(invalid='ignore'):
        ratios = again(theirs) / again(ours)
    return np.median(theirs) / np.median(ours), *np.quantile(
        ratios, (0.025, 0.975), method='nearest'
    )


def reward_table(
    content: dict,  # of `Store.put`
) -> str:  # a table and two lines
    "Every run, and the ratios of the medians over the seeds that nothing was chosen on."
    rows = content['rows']
    columns = [
        'side',
        'settings',
        'seed',
        'seconds to + 1 sd',
        'forward passes to + 1 sd',
        'largest gain, sd',
        'epochs run',
    ]
    text = [table(columns, [reward_cells(run) for run in rows])]
    for key, unit in (('seconds_to_aim', 's'), ('forwards_to_aim', 'forward passes')):
        ours, theirs = (
            [r[key] or math.inf for r in rows if r['side'] == side and r['seed'] < 100]
            for side in ('ours', 'trl')
        )
        if not (ours and theirs):
            continue
        ratio, low, high = ratio_of_medians(theirs, ours)
        met = 'reached' if ratio >= 2 else 'missed'
        text.append(
            f'Median {unit}, {len(ours)} and {len(theirs)} seeds: ours {np.median(ours):.0f}, '
            f'TRL at its best here {np.median(theirs):.0f}. '
            f'Ratio of the medians **{ratio:.1f}** ({low:.1f} to {high:.1f}); '
            f'to reach on a CPU: 2, {met}.'
        )
    return '\n\n'.join(text)


def limit_table(
    content: dict,  # of `Store.put`
) -> str:  # a table
    "Achieved and possible TFLOP/s."
    bars = dict(sampling=0.5, training=0.4)
    device = content['environment']['settings']['device']
    rows = []
    for row in content['rows']:
        if 'note' in row:
            rows.append([row['case'], row['note']] + [''] * 5)
            continue
        least = bars[row['case'].split(',')[0]]
        tflops = row['tflops']
        met = (
            f'{least:g}: ' + ('reached' if statistics.median(row['ratios']) >= least else 'missed')
            if device == 'cuda'
            else 'none here'
        )
        rows.append(
            [
                row['case'],
                len(row['ratios']),
                shown(tflops['work']),
                shown(tflops['product']),
                shown(row['ratios']),
                met,
                f'{row["memory"]["work"] / 2**20:.0f}',
            ]
        )
    return table(
        ['case', 'rounds', 'TFLOP/s', 'of the product', 'fraction', 'to reach', 'MiB'], rows
    )


def lora_table(
    content: dict,  # of `Store.put`
) -> str:  # a table
    "Peak memory in all."
    rows = [
        [
            r['case'],
            r.get('note') or f'{r["peak_bytes"] / 1e9:.2f}',
            f'{r["reserved_bytes"] / 1e9:.2f}' if 'reserved_bytes' in r else '',
            ''
            if 'note' in r
            else 'yes'
            if r.get('reserved_bytes', r['peak_bytes']) <= 8e9
            else 'no',
        ]
        for r in content['rows']
    ]
    return table(['case', 'peak in use, GB', 'peak reserved, GB', 'within 8 GB'], rows)


def head(
    environment: dict,  # of `settings.describe`
) -> str:  # one line
    "Where a part was measured."
    s = environment['settings']
    real = f"Stable Diffusion v1.4's shape, random weights, {s['image_size']} pixels"
    what = 'the tiny model' if s['model'] == 'tiny' else real
    names = ('torch', 'diffusers', 'transformers', 'accelerate', 'trl')
    libraries = ', '.join(f'{name} {environment[name]}' for name in names if environment.get(name))
    quick = ' **A quick run: it shows that it runs, not how fast.**' if s['quick'] else ''
    where = f'{environment["hardware"]} ({environment["threads"]} threads)'
    return f'{where}, {what}; Python {environment["python"]}, {libraries}.{quick}'


def markdown(
    parts: dict,  # of `Store`
) -> str:  # the page
    "All parts that have been measured."
    special = dict(reward=reward_table, limit=limit_table, lora=lora_table)
    text = [
        '# Speed',
        'Seconds and ratios: median (smallest to largest) of the rounds; '
        'both sides measured in turn within one run. '
        'Above 1, ours is faster. What each part measures: README.md.',
    ]
    for part in (p for p in TITLES if p in parts):
        content = parts[part]
        body = special[part](content) if part in special else comparison(part, content)
        text += [f'## {TITLES[part]}', head(content['environment']), body + checks(content)]
    return '\n\n'.join(text)
