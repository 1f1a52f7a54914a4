"""Every notebook runs top to bottom, on a CPU, offline, within its budget of time."""
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
LIMIT = 90 # CPU seconds over all cores


def run_notebook(path):
    """nbdev_test raises at the first cell that fails; slow, cuda and download cells are left out. Returns CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([Path(sys.executable).parent / 'nbdev_test', '--path', path, '--n_workers', '0', '--do_print'], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | dict(HF_HUB_OFFLINE='1', MPLBACKEND='agg', CUDA_VISIBLE_DEVICES=''))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    """Without an error and within the limit. Another process on the same cores makes every second longer, so a notebook over the limit has a second try."""
    spent = run_notebook(path)
    if spent > LIMIT: spent = min(spent, run_notebook(path))
    print(f'{path.stem}: {spent:.0f} s of CPU')
    assert spent <= LIMIT, f'{spent:.0f} CPU seconds'
