"""Every notebook runs top to bottom, on a CPU, offline, within its budget of time."""
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
LIMIT = 90 # CPU seconds
ENV = os.environ | dict(HF_HUB_OFFLINE='1', MPLBACKEND='agg', CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')


def run_notebook(path):
    """nbdev_test raises at the first cell that fails; slow, cuda and download cells are left out. Returns exit code, output, CPU seconds.
    One thread each: two that wait for each other would count their waiting."""
    with tempfile.TemporaryFile('w+') as log:
        process = subprocess.Popen([Path(sys.executable).parent / 'nbdev_test', '--path', path, '--n_workers', '0', '--do_print'], cwd=ROOT, env=ENV, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        return process.returncode, log.read(), used.ru_utime + used.ru_stime


@pytest.fixture(scope='module')
def ran(request):
    """All notebooks that are asked for, two at a time."""
    paths = [item.callspec.params['path'] for item in request.session.items if item.originalname == 'test_notebook_runs']
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(paths, pool.map(run_notebook, paths)))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, ran):
    """Without an error and within the limit. Another process on the same machine makes every second longer, so a notebook over the limit has a second try."""
    code, log, spent = ran[path]
    assert code == 0, log[-4000:]
    if spent > LIMIT: spent = min(spent, run_notebook(path)[2])
    print(f'{path.stem}: {spent:.0f} s of CPU')
    assert spent <= LIMIT, f'{spent:.0f} CPU seconds'
