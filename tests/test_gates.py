"""The rules that the notebooks and modules keep: exports in sync, stems, directives, names, paths, outputs, sizes."""
import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MODULES = sorted(p for p in (ROOT / 'ddpo_tutorial').glob('*.py') if not p.name.startswith('_'))
DIRECTIVES = {'export', 'hide', 'slow', 'cuda', 'download', 'eval: false'}
HOME = re.compile(r'(?<![\w.:/])/(?:home|root|Users|work|tmp|mnt|var|content)/\w')

notebooks = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
modules = pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)


def cells(path, kind='code'):
    return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]


def source(cell):
    return ''.join(cell['source'])


def directives(cell):
    return [m.strip() for m in re.findall(r'^#\s*\|\s*(.*)$', source(cell), re.M)]


def functions(path):
    tree = ast.parse(path.read_text(encoding='utf-8'))
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def body_lines(function):
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def export_to(folder, change=lambda path: None):
    """Export all notebooks in a copy of the project and return the exported files' contents."""
    shutil.copytree(ROOT / 'nbs', folder / 'nbs', ignore=shutil.ignore_patterns('runs', 'wandb', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'setup.py', 'README.md'):
        shutil.copy(ROOT / name, folder)
    (folder / 'ddpo_tutorial').mkdir()
    shutil.copy(ROOT / 'ddpo_tutorial' / '__init__.py', folder / 'ddpo_tutorial')
    change(folder)
    done = subprocess.run([Path(sys.executable).parent / 'nbdev_export'], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {p.name: p.read_text(encoding='utf-8') for p in (folder / 'ddpo_tutorial').glob('*.py')}


def test_modules_are_what_the_notebooks_export(tmp_path):
    """The same files with the same contents: no stale module, none edited by hand."""
    committed = {p.name: p.read_text(encoding='utf-8') for p in (ROOT / 'ddpo_tutorial').glob('*.py')}
    assert export_to(tmp_path) == committed


def test_a_hand_edit_would_be_seen(tmp_path):
    """The comparison above can fail."""
    def change(folder):
        path = folder / 'nbs' / '06_ppo.ipynb'
        path.write_text(path.read_text(encoding='utf-8').replace('torch.maximum', 'torch.minimum'), encoding='utf-8')
    assert export_to(tmp_path, change)['ppo.py'] != (ROOT / 'ddpo_tutorial' / 'ppo.py').read_text(encoding='utf-8')


def test_one_notebook_one_module_one_stem():
    """Two notebooks that export one module would silently overwrite each other."""
    exports = {}
    for path in NOTEBOOKS:
        names = [d.split()[1] for c in cells(path) for d in directives(c) if d.startswith('default_exp')]
        assert len(names) <= 1, path
        if names:
            assert re.sub(r'^\d+_', '', path.stem) == names[0] and names[0] not in exports
            exports[names[0]] = path
    assert sorted(exports) == [p.stem for p in MODULES]


@notebooks
def test_directives_are_known(path):
    """nbdev ignores a misspelt directive without a word."""
    for cell in cells(path):
        for d in directives(cell):
            assert d in DIRECTIVES or d.startswith('default_exp '), d


@notebooks
def test_first_cell_has_title_and_description(path):
    """The description becomes the module's docstring."""
    first = json.loads(path.read_text(encoding='utf-8'))['cells'][0]
    assert first['cell_type'] == 'markdown' and re.match(r'# .+\n+> .+', source(first))


@notebooks
def test_outputs_are_stored_and_without_errors(path):
    """Most readers only read: a cell that shows something has its output, and no output is an error."""
    shown, quiet = 0, 0
    for cell in cells(path):
        assert all(o['output_type'] != 'error' for o in cell['outputs']), source(cell)
        assert cell['execution_count'] is None
        for data in (o.get('data', {}) for o in cell['outputs']): # a figure that shows as the word <Figure>
            assert not ''.join(data.get('text/plain', '')).startswith('<Figure') or {'image/png', 'image/jpeg'} & set(data), source(cell)
        if not set(directives(cell)) & {'export', 'hide', 'eval: false', 'cuda', 'download'} and not source(cell).startswith('#| default_exp'):
            shown, quiet = shown + bool(cell['outputs']), quiet + (not cell['outputs'])
    assert shown >= quiet, f'{shown} cells with output, {quiet} without: was the notebook executed?'


@notebooks
def test_budget(path):
    """A notebook that takes long to load is not read."""
    assert path.stat().st_size <= 520_000


@pytest.mark.parametrize('path', [p for p in ROOT.rglob('*') if p.suffix in {'.ipynb', '.py', '.md', '.ini', '.yml', '.in', '.csv', '.json'}
                                  and not set(p.relative_to(ROOT).parts) & {'.git', '.venv', 'build', 'runs', 'wandb', 'ddpo_tutorial.egg-info', '.pytest_cache', 'tests', '.ipynb_checkpoints'}],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_no_paths_of_somebodys_machine(path):
    """Nothing that only exists where it was written."""
    found = HOME.search(path.read_text(encoding='utf-8'))
    assert not found, found and path.read_text(encoding='utf-8')[max(0, found.start() - 60):found.end() + 40]


@modules
def test_no_undefined_or_unused_names(path):
    """A name from another cell leaks into a module as an undefined name."""
    from pyflakes.api import check
    from pyflakes.reporter import Reporter
    import io
    out = io.StringIO()
    assert check(path.read_text(encoding='utf-8'), path.name, Reporter(out, out)) == 0, out.getvalue()


@modules
def test_imports_are_explicit(path):
    """No star imports; nothing imported from a later lesson."""
    order = [re.sub(r'^\d+_', '', p.stem) for p in NOTEBOOKS if p.parent.name == 'nbs']
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            assert all(a.name != '*' for a in node.names)
            stem = (node.module or '').removeprefix('ddpo_tutorial.')
            if stem in order and path.stem in order:
                assert order.index(stem) < order.index(path.stem)


@modules
def test_functions_are_small_and_documented(path):
    """None over 40 lines; a public one says what it does."""
    for f in functions(path):
        assert f.end_lineno - f.lineno + 1 <= 40, f.name
        assert f.name.startswith('_') or ast.get_docstring(f), f.name


def test_median_function_is_under_eight_lines():
    """Small functions are what makes the modules readable."""
    assert statistics.median(body_lines(f) for p in MODULES for f in functions(p)) < 8


def test_leaves_import_nothing_from_the_package():
    """Six modules can be read, and copied, alone."""
    for stem in ('pipelines', 'rewards', 'prompts', 'sampling', 'advantages', 'ppo'):
        assert 'from ddpo_tutorial' not in (ROOT / 'ddpo_tutorial' / f'{stem}.py').read_text(encoding='utf-8').split('__all__')[1]


def test_files_are_small():
    """No file over 12 MB in the project except the UNet's weights, and the folder of models at most 25 MB."""
    tiny = [p for p in (ROOT / 'ddpo_tutorial' / 'tiny').rglob('*') if p.is_file()]
    assert sum(p.stat().st_size for p in tiny) <= 25e6
