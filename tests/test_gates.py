"""The rules that the notebooks and modules keep: exports in sync, stems, directives, names, paths, outputs, sizes."""
import ast
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MODULES = sorted(p for p in (ROOT / 'ddpo_tutorial').glob('*.py') if not p.name.startswith('_'))
DIRECTIVES = {'export', 'hide', 'slow', 'cuda', 'download', 'eval: false'}
SUFFIXES = {'.ipynb', '.py', '.md', '.ini', '.yml', '.yaml', '.toml', '.in', '.csv', '.json'}
NOT_OURS = {'.git', '.venv', 'build', 'runs', 'wandb', 'ddpo_tutorial.egg-info', '.pytest_cache', '.ruff_cache',
            'tests', '.ipynb_checkpoints', '_proc'}
TEXTS = [p for p in ROOT.rglob('*') if p.suffix in SUFFIXES and not set(p.relative_to(ROOT).parts) & NOT_OURS]
# What each module may import of the package, at its beginning; lesson 07 may import the settings of lesson 10.
LEAVES = dict(pipelines=set(), rewards=set(), prompts=set(), sampling=set(), advantages=set(), ppo=set(),
              drawings={'prompts'}, configs={'prompts'})
READ = ('pipelines', 'rewards', 'prompts', 'sampling', 'advantages', 'ppo', 'training')
HOME = re.compile(r'(?<![\w.:/])/(?:home|root|Users|work|tmp|mnt|var|content)/\w')

notebooks = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
modules = pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)


def cells(path, *kinds):
    """The cells of a notebook, of these kinds: code if none is given."""
    return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] in (kinds or ('code',))]


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


def package_imports(path, everywhere=True):
    """The stems of this package's modules that a module imports: anywhere, or only when it is imported itself."""
    tree, found = ast.parse(path.read_text(encoding='utf-8')), set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').split('.')[0] == 'ddpo_tutorial'):
            module = re.sub(r'^ddpo_tutorial\.?', '', node.module or '')
            found |= {module.split('.')[0]} if module else {a.name for a in node.names}
        if isinstance(node, ast.Import):
            found |= {(a.name + '.').split('.')[1] for a in node.names if a.name.split('.')[0] == 'ddpo_tutorial'}
    return found


def is_exports(node):
    return isinstance(node, ast.Assign) and any(getattr(t, 'id', '') == '__all__' for t in node.targets)


def span(node):
    return set(range(node.lineno, node.end_lineno + 1))


def code_lines(text):
    """How many lines hold code: a token that is no comment, no docstring and not in `__all__`."""
    left_out, lines = set(), set()
    for node in ast.walk(ast.parse(text)):
        described = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module))
        if described and ast.get_docstring(node) is not None: left_out |= span(node.body[0])
        if is_exports(node): left_out |= span(node)
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank: lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - left_out)


def text_columns(text):
    """How many columns of each line are a string, a docstring included."""
    lines, columns = text.splitlines(), {}
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.JoinedStr) and not isinstance(getattr(node, 'value', None), str): continue
        for n in span(node):
            start = node.col_offset if n == node.lineno else 0
            end = node.end_col_offset if n == node.end_lineno else len(lines[n - 1])
            columns.setdefault(n, set()).update(range(start, end))
    return {n: len(found) for n, found in columns.items()}


def too_wide(text):
    """The lines over 140 columns, and those over 120 that are no message, no row of a table and no setting: that have
    less than 30 columns of text. What nbdev generates doesn't count."""
    tree, texts = ast.parse(text), text_columns(text)
    generated = set().union(*(span(node) for node in tree.body if is_exports(node)))
    settings = {field.lineno for node in tree.body if isinstance(node, ast.ClassDef) and node.name == 'Config'
                for field in node.body if isinstance(field, ast.AnnAssign)}
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if len(line) > 120 and not line.startswith('# %%')]
    return [f'{n}: {line}' for n, line in lines if n not in generated
            and (len(line) > 140 or (n not in settings and texts.get(n, 0) < 30))]


def export_to(folder, change=lambda path: None):
    """Export all notebooks in a copy of the project and return the exported files' contents."""
    shutil.copytree(ROOT / 'nbs', folder / 'nbs', ignore=shutil.ignore_patterns('runs', 'wandb', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'setup.py', 'README.md'):
        shutil.copy(ROOT / name, folder)
    (folder / 'ddpo_tutorial').mkdir()
    shutil.copy(ROOT / 'ddpo_tutorial' / '__init__.py', folder / 'ddpo_tutorial')
    change(folder)
    command = shutil.which('nbdev_export', path=sysconfig.get_path('scripts'))
    done = subprocess.run([command], cwd=folder, capture_output=True, text=True)
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
            word = ''.join(data.get('text/plain', '')).startswith('<Figure')
            assert not word or {'image/png', 'image/jpeg'} & set(data), source(cell)
        silent = set(directives(cell)) & {'export', 'hide', 'eval: false', 'cuda', 'download'}
        if not silent and not source(cell).startswith('#| default_exp'):
            shown, quiet = shown + bool(cell['outputs']), quiet + (not cell['outputs'])
    assert shown >= quiet, f'{shown} cells with output, {quiet} without: was the notebook executed?'


@notebooks
def test_budget(path):
    """A notebook that takes long to load is not read."""
    assert path.stat().st_size <= 530_000


@pytest.mark.parametrize('path', TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_paths_of_somebodys_machine(path):
    """Nothing that only exists where it was written."""
    found = HOME.search(path.read_text(encoding='utf-8'))
    assert not found, found and path.read_text(encoding='utf-8')[max(0, found.start() - 60):found.end() + 40]


def test_ruff_finds_nothing():
    """Unknown and unused names (one from another cell leaks into a module), lines over 140 columns, semicolons."""
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'concise',
                           'ddpo_tutorial', 'nbs', 'tests'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@modules
def test_lines_are_short(path):
    """At most 120 columns; up to 140 for a message, a row of a table or a setting."""
    assert too_wide(path.read_text(encoding='utf-8')) == []


@pytest.mark.parametrize('path', sorted((ROOT / 'nbs').glob('0[0-7]_*.ipynb')), ids=lambda p: p.stem)
def test_exported_cells_are_short(path):
    """What is read between two sentences: at most 30 lines, without the line of the directive."""
    long = [source(c) for c in cells(path) if 'export' in directives(c) and len(source(c).splitlines()) - 1 > 30]
    assert not long, '\n\n'.join(f'{len(text.splitlines()) - 1} lines:\n{text}' for text in long)


def test_the_lesson_on_training_is_no_listing():
    """At most 40% of the code lines of lesson 07 are the module's."""
    count = Counter()
    path, = (ROOT / 'nbs').glob('07_*.ipynb')
    for cell in cells(path):
        lines = [line.strip() for line in source(cell).splitlines()]
        count['export' in directives(cell)] += sum(bool(line) and not line.startswith('#') for line in lines)
    assert count[True] <= .4 * count.total(), f'{count[True]} of {count.total()}'


def test_the_package_is_small():
    """Lines of code: what lessons 00 to 07 lead through, and everything."""
    count = {p.stem: code_lines(p.read_text(encoding='utf-8')) for p in MODULES}
    assert sum(count[stem] for stem in READ) <= 912, count # 900, and the check of missing weights
    assert sum(count.values()) <= 1720, count


@modules
def test_imports_are_explicit(path):
    """No star imports, and nothing from a later lesson but the settings, which need nothing of those between."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.names[0].name == '*']
    order = [re.sub(r'^\d+_', '', p.stem) for p in NOTEBOOKS if p.parent.name == 'nbs']
    if path.stem in order:
        earlier = {*order[:order.index(path.stem)], 'configs'}
        assert package_imports(path) & set(order) <= earlier


@pytest.mark.parametrize('stem', LEAVES)
def test_leaves_can_be_read_alone(stem):
    """They import nothing from the package, or only the lists of prompts; the command imports the rest later."""
    path = ROOT / 'ddpo_tutorial' / f'{stem}.py'
    assert package_imports(path, everywhere=False) == LEAVES[stem]
    assert package_imports(path) - LEAVES[stem] == ({'runs'} if stem == 'configs' else set())


@modules
def test_functions_are_small_and_documented(path):
    """None over 40 lines; a public one says what it does."""
    for f in functions(path):
        assert f.end_lineno - f.lineno + 1 <= 40, f.name
        assert f.name.startswith('_') or ast.get_docstring(f), f.name


def test_median_function_is_under_eight_lines():
    """Small functions are what makes the modules readable."""
    assert statistics.median(body_lines(f) for p in MODULES for f in functions(p)) < 8


def test_models_are_small():
    """What the package ships for the tiny world: at most 25 MB."""
    tiny = [p for p in (ROOT / 'ddpo_tutorial' / 'tiny').rglob('*') if p.is_file()]
    assert 1e6 < sum(p.stat().st_size for p in tiny) <= 25e6


@modules
def test_modules_import_each_other_relatively(path):
    """nbdev leaves a long import as it is when its last line is shorter than the module's name."""
    assert not re.findall(r'^from ddpo_tutorial', path.read_text(encoding='utf-8'), re.M)
