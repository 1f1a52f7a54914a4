"""Every notebook runs top to bottom, on a CPU, offline, within its budget of time."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
LIMIT = 90 # CPU seconds
ENV = os.environ | dict(HF_HUB_OFFLINE='1', MPLBACKEND='agg', CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')


def run_notebook(path, cwd=ROOT):
    """Returns exit code, output and CPU seconds. nbdev_test stops at the first cell that fails, and leaves out those
    for CUDA and for downloads. One thread each: two that wait for each other would count their waiting."""
    command = [Path(sys.executable).parent / 'nbdev_test', '--path', path, '--n_workers', '0', '--do_print']
    with tempfile.TemporaryFile('w+') as log:
        process = subprocess.Popen(command, cwd=cwd, env=ENV, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        return process.returncode, log.read(), used.ru_utime + used.ru_stime


def one_notebook(path):
    "A class for each notebook: pytest-xdist keeps a class in one process, and puts each wherever there is room."
    class Notebook:
        def test_runs(self):
            """Without an error and within the limit. Another process on the same machine makes every second longer, so
            a notebook over the limit has a second try."""
            code, log, spent = run_notebook(path)
            assert code == 0, log[-4000:]
            if spent > LIMIT: spent = min(spent, run_notebook(path)[2])
            print(f'{path.stem}: {spent:.0f} s of CPU')
            assert spent <= LIMIT, f'{spent:.0f} CPU seconds'
    return Notebook


for notebook in NOTEBOOKS: globals()[f'Test_{notebook.stem}'] = one_notebook(notebook)


@pytest.mark.slow
@pytest.mark.parametrize('stem', ['09_runs', '12_stable_diffusion'])
def test_notebook_runs_where_products_are_in_16_bits(stem, tmp_path):
    """These two take a GPU where there is one, and a GPU computes in 16 bits. Here the CPU is asked to."""
    shutil.copytree(ROOT / 'nbs', tmp_path / 'nbs', ignore=shutil.ignore_patterns('runs', 'wandb', '.ipynb_checkpoints'))
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    path = tmp_path / 'nbs' / f'{stem}.ipynb'
    notebook = json.loads(path.read_text(encoding='utf-8'))
    first = 'import torch\nfrom ddpo_tutorial import pipelines\npipelines.compute_dtype = lambda device: torch.bfloat16'
    cell = dict(cell_type='code', id='16b17000', metadata={}, execution_count=None, outputs=[], source=first)
    notebook['cells'].insert(1, cell)
    path.write_text(json.dumps(notebook), encoding='utf-8')
    code, log, _ = run_notebook(path, tmp_path)
    assert code == 0, log[-4000:]
