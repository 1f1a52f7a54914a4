"""The page of lesson 00 with seeds 0 to 4: python tests/bench/start_seeds.py

Takes the cells of the page from the notebook, runs them with another seed, and measures before
and after on the 45 prompts with fixed noise. Writes nbs/results/start_seeds.csv for the lesson.
"""

import json
import os
import time
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')

from ddpo_tutorial.reports import gain_of, write_rows
from ddpo_tutorial.training import evaluate

NBS = Path(__file__).parents[2] / 'nbs'
CELLS = json.loads((NBS / '00_start.ipynb').read_text(encoding='utf-8'))['cells']
CODE = [''.join(cell['source']) for cell in CELLS if cell['cell_type'] == 'code']
IMPORTS = CODE[0]
SETUP = next(code for code in CODE if code.startswith("config = load_config('tiny')\n"))
PAGE = next(code for code in CODE if '# 1. sample' in code and 'for epoch in' in code)


def run_page(seed: int) -> dict:  # a row of the table
    "Set up, train by the page's own code, evaluate."
    space = {}
    exec(IMPORTS, space)
    exec(SETUP.replace("load_config('tiny')", f"load_config('tiny', seed={seed})"), space)
    config, model, reward, prompts = (space[n] for n in ('config', 'model', 'reward', 'prompts'))
    before = evaluate(config, model, reward, prompts)
    start = time.perf_counter()
    exec(PAGE, space)
    seconds = time.perf_counter() - start
    after = evaluate(config, model, reward, prompts)
    return dict(seed=seed, **gain_of(before, after), seconds=seconds)


if __name__ == '__main__':
    rows = []
    for seed in range(5):
        rows.append(run_page(seed))
        write_rows(NBS / 'results' / 'start_seeds.csv', rows)
