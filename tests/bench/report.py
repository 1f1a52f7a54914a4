"""The numbers as JSON, and the same as Markdown tables: median (smallest to largest) of every round"""
import json
import statistics
from pathlib import Path

from timing import spread

BARS = { # part -> (device, what is looked at, at least so much)
    'sampling': ('cpu', 1.), 'training': ('cpu', 1.), 'recipe': ('cuda', 8.)}
TITLES = dict(
    sampling="Identical work against TRL's DDPOTrainer: sampling", training="Identical work against TRL's DDPOTrainer: training",
    recipe="Against the original tutorial's recipe", reward='Time to reward on the tiny model',
    limit='Against the limit: achieved TFLOP/s over those of a large matrix product',
    lora='A LoRA of rank 4: peak memory')


class Store:
    "The results on disk: each part replaces its own former numbers; the Markdown is written anew from all of them."
    def __init__(self,
        path: Path, # of the Markdown; the JSON lies beside it
    ):
        self.path, self.json = Path(path), Path(path).with_suffix('.json')
        self.parts = json.loads(self.json.read_text(encoding='utf-8')) if self.json.is_file() else {}

    def put(self,
        part: str, # its name
        environment: dict, # of `settings.describe`
        **content, # rows, checks
    ) -> None:
        "Keep a part's numbers."
        self.parts[part] = dict(environment=environment, **content)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path, text in ((self.json, json.dumps(self.parts, indent=1)), (self.path, markdown(self.parts))):
            aside = path.with_suffix(path.suffix + '.part')
            aside.write_text(text + '\n', encoding='utf-8')
            aside.replace(path)


def shown(
    values: list[float], # measurements
    digits: int = 3, # significant
) -> str: # median (min to max)
    "Several numbers in one cell."
    s = spread(values)
    return f'{figure(s["median"], digits)} ({figure(s["min"], digits)} to {figure(s["max"], digits)})'


def figure(
    value: float, # a number
    digits: int, # significant
) -> str: # without exponent
    "A number with so many significant digits."
    places = max(0, digits - len(str(int(abs(value)))) if abs(value) >= 1 else digits - 1 + (abs(value) < .1))
    return f'{value:.{places}f}'


def table(
    head: list[str], # columns
    rows: list[list], # cells
) -> str: # Markdown
    "A table."
    lines = [head, ['---'] * len(head)] + rows
    return '\n'.join('| ' + ' | '.join(str(c) for c in line) + ' |' for line in lines)


def verdict(
    part: str, # its name
    device: str, # it ran on
    ratio: float, # median
) -> str: # a cell
    "Whether the bar of a part was reached, where it has one on this device."
    where, least = BARS.get(part, (None, 0))
    if where != device: return 'none here'
    return f'{least:g}: ' + ('reached' if ratio >= least else 'missed')


def comparison(
    part: str, # its name
    content: dict, # of `Store.put`
) -> str: # a table
    "Ours and theirs, with the ratio of each round and the memory beside."
    device, rows = content['environment']['settings']['device'], []
    for row in content['rows']:
        if 'note' in row:
            rows.append([row['case'], row['note']] + [''] * 6)
            continue
        times, memory = row['times'], {k: f'{v / 2**20:.0f}' for k, v in row['memory'].items()}
        met = verdict(part, device, statistics.median(row['ratios']))
        rows.append([row['case'], len(row['ratios']), shown(times['ours']), shown(times['theirs']), shown(row['ratios']), met,
                     memory['ours'], memory['theirs']])
    return table(['case', 'rounds', 'ours, s', 'theirs, s', 'theirs / ours', 'to reach', 'ours, MiB', 'theirs, MiB'], rows)


def checks(
    content: dict, # of `Store.put`
) -> str: # a table, or nothing
    "What agreed before anything was timed."
    numbers = ('largest_difference', 'largest_value', 'relative_norm_of_difference')
    rows = [[c['what'], *(f'{c[k]:.1e}' if k in c else '' for k in numbers)] for c in content.get('checks', [])]
    if not rows: return ''
    head = ['what', 'largest difference', 'largest value', 'norm of the difference / norm']
    return '\n\nChecked before: ours and theirs on the same data.\n\n' + table(head, rows)


def by_side(
    runs: list[dict], # of `reward_part`
) -> dict: # (side, learning rate) -> its runs
    "Runs grouped."
    groups = {}
    for run in runs: groups.setdefault((run['side'], run['learning_rate']), []).append(run)
    return groups


def best_trl(
    groups: dict, # of `by_side`
) -> float | None: # a learning rate
    "TRL's learning rate with the smallest median; only rates with as many seeds as ours, all of which reached the aim."
    ours = next((runs for (side, _), runs in groups.items() if side == 'ours'), [])
    full = {rate: statistics.median(r['seconds_to_aim'] for r in runs) for (side, rate), runs in groups.items()
            if side == 'trl' and len(runs) >= len(ours) and all(r['seconds_to_aim'] for r in runs)}
    return min(full, key=full.get) if full else None


def reward_cells(
    run: dict, # of `Curve.result`, with its seed
) -> list: # cells
    "A run in a row of the table."
    an_epoch = statistics.median(b - a for a, b in zip(run['seconds'], run['seconds'][1:]))
    return [run['seed'], f'{run["initial_mean"]:.2f} ± {run["initial_sd"]:.2f}',
            f'{run["seconds_to_aim"]:.1f}' if run['seconds_to_aim'] else 'not reached',
            f'{run["epochs_to_aim"]:.2f}' if run['epochs_to_aim'] else '', f'{an_epoch:.1f}']


def reward_table(
    content: dict, # of `Store.put`
) -> str: # two lines of text and a table
    "Every run, and the ratio of the medians."
    groups = by_side(content['rows'])
    rows = [[side, f'{rate:g}', *reward_cells(run)] for (side, rate), runs in groups.items() for run in runs]
    columns = ['side', 'learning rate', 'seed', 'reward before', 'seconds to + 1 sd', 'epochs to + 1 sd', 'median s an epoch']
    text = table(columns, rows)
    ours = [r['seconds_to_aim'] for (side, _), runs in groups.items() if side == 'ours' for r in runs]
    rate = best_trl(groups)
    if rate is None or not all(ours): return text
    theirs = [r['seconds_to_aim'] for r in groups['trl', rate]]
    ratio = statistics.median(theirs) / statistics.median(ours)
    return text + (f'\n\nOurs: {shown(ours)} s. TRL at its best learning rate here, {rate:g}: {shown(theirs)} s. '
                   f'Ratio of the medians **{ratio:.2f}**; to reach on a CPU: 2, {"reached" if ratio >= 2 else "missed"}.')


def limit_table(
    content: dict, # of `Store.put`
) -> str: # a table
    "Achieved and possible TFLOP/s."
    bars, device, rows = dict(sampling=.5, training=.4), content['environment']['settings']['device'], []
    for row in content['rows']:
        if 'note' in row:
            rows.append([row['case'], row['note']] + [''] * 5)
            continue
        least, tflops = bars[row['case'].split(',')[0]], row['tflops']
        met = f'{least:g}: ' + ('reached' if statistics.median(row['ratios']) >= least else 'missed') if device == 'cuda' else 'none here'
        rows.append([row['case'], len(row['ratios']), shown(tflops['work']), shown(tflops['product']), shown(row['ratios']), met,
                     f'{row["memory"]["work"] / 2**20:.0f}'])
    return table(['case', 'rounds', 'TFLOP/s', 'of the product', 'fraction', 'to reach', 'MiB'], rows)


def lora_table(
    content: dict, # of `Store.put`
) -> str: # a table
    "Peak memory in all."
    rows = [[r['case'], r.get('note') or f'{r["peak_bytes"] / 1e9:.2f}',
             f'{r["reserved_bytes"] / 1e9:.2f}' if 'reserved_bytes' in r else '',
             '' if 'note' in r else 'yes' if r.get('reserved_bytes', r['peak_bytes']) <= 8e9 else 'no'] for r in content['rows']]
    return table(['case', 'peak in use, GB', 'peak reserved, GB', 'within 8 GB'], rows)


def head(
    environment: dict, # of `settings.describe`
) -> str: # one line
    "Where a part was measured."
    s = environment['settings']
    real = f"Stable Diffusion v1.4's shape, random weights, {s['image_size']} pixels"
    what = 'the tiny model' if s['model'] == 'tiny' else real
    names = ('torch', 'diffusers', 'transformers', 'accelerate', 'trl')
    libraries = ', '.join(f'{name} {environment[name]}' for name in names if environment.get(name))
    quick = ' **A quick run: it shows that it runs, not how fast.**' if s['quick'] else ''
    where = f"{environment['hardware']} ({environment['threads']} threads)"
    return f"{where}, {what}; Python {environment['python']}, {libraries}.{quick}"


def markdown(
    parts: dict, # of `Store`
) -> str: # the page
    "All parts that have been measured."
    special = dict(reward=reward_table, limit=limit_table, lora=lora_table)
    text = ['# Speed', 'Seconds and ratios: median (smallest to largest) of the rounds; both sides measured in turn within one run. '
            'Above 1, ours is faster. What each part measures: README.md.']
    for part in (p for p in TITLES if p in parts):
        content = parts[part]
        body = special[part](content) if part in special else comparison(part, content)
        text += [f'## {TITLES[part]}', head(content['environment']), body + checks(content)]
    return '\n\n'.join(text)
