"""The rules that notebooks and modules keep: exports in sync, floors, budgets, names, sizes.

Run: python -m pytest tests/test_gates.py -n 0
"""

import ast
import io
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    path for path in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts
)
MODULES = sorted(p for p in (ROOT / 'ddpo_tutorial').glob('*.py') if not p.name.startswith('_'))
DIRECTIVES = {'export', 'hide', 'slow', 'cuda', 'download', 'eval: false'}
SUFFIXES = {'.ipynb', '.py', '.md', '.ini', '.yml', '.yaml', '.toml', '.in', '.csv', '.json'}
NOT_OURS = {'.git', '.venv', 'build', 'runs', 'wandb', 'ddpo_tutorial.egg-info', '_proc', 'tests'}
TEXTS = [
    path
    for path in ROOT.rglob('*')
    if path.suffix in SUFFIXES
    and not {part for part in path.relative_to(ROOT).parts} & NOT_OURS
    and not any(part.endswith(('_cache', '_checkpoints')) for part in path.parts)
]
HOME = re.compile(r'(?<![\w.:/])/(?:home|root|Users|work|tmp|mnt|var|content)/\w')
# Each module imports from those before it alone, at its beginning or in a function.
FLOORS = """exercises checks schedules prompts configs drawings advantages ppo rewards sampling
pipelines predictors training checkpoints reports estimates runs command""".split()
MAIN_LINE = ('rewards', 'sampling', 'advantages', 'ppo', 'training')

notebooks = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
modules = pytest.mark.parametrize('path', MODULES, ids=lambda path: path.stem)


def cells(path, *kinds):
    "The cells of a notebook, of these kinds: code if none is given."
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [cell for cell in found if cell['cell_type'] in (kinds or ('code',))]


def source(cell):
    return ''.join(cell['source'])


def directives(cell):
    return [name.strip() for name in re.findall(r'^#\s*\|\s*(.*)$', source(cell), re.M)]


def parsed(path):
    return ast.parse(path.read_text(encoding='utf-8'))


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def ruff(*words, **options):
    command = [sys.executable, '-m', 'ruff', *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def code_lines(path):
    "How many lines hold code after the formatter: no comment, no docstring, not `__all__`."
    text = ruff('format', '-', input=path.read_text(encoding='utf-8')).stdout
    left_out = set()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
        if documented and ast.get_docstring(node) is not None:
            left_out |= span(node.body[0])
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            left_out |= span(node)
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent | {tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - left_out)


def span(node):
    return set(range(node.lineno, node.end_lineno + 1))


def package_imports(path):
    "The stems of this package's modules that a module imports, anywhere in it."
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            module = re.sub(r'^ddpo_tutorial\.?', '', node.module or '')
            if node.level or module != (node.module or ''):
                found |= {module.split('.')[0]} if module else {a.name for a in node.names}
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split('.')[0] == 'ddpo_tutorial']
            found |= {f'{name}.'.split('.')[1] for name in names}
    return found


def copy_of_notebooks(folder):
    "What nbdev needs of the project, in another folder."
    ignored = shutil.ignore_patterns('runs', 'wandb', '.ipynb_checkpoints')
    shutil.copytree(ROOT / 'nbs', folder / 'nbs', ignore=ignored)
    for name in ('settings.ini', 'setup.py', 'README.md'):
        shutil.copy(ROOT / name, folder)
    (folder / 'ddpo_tutorial').mkdir()
    for name in ('__init__.py', '__main__.py'):
        shutil.copy(ROOT / 'ddpo_tutorial' / name, folder / 'ddpo_tutorial')


def nbdev(command, folder):
    program = shutil.which(command, path=sysconfig.get_path('scripts'))
    done = subprocess.run([program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def modules_in(folder):
    return {p.name: p.read_text(encoding='utf-8') for p in (folder / 'ddpo_tutorial').glob('*.py')}


def test_modules_are_what_the_notebooks_export(tmp_path):
    "The same files with the same contents: no stale module, none edited by hand."
    copy_of_notebooks(tmp_path)
    nbdev('nbdev_export', tmp_path)
    assert modules_in(tmp_path) == modules_in(ROOT)


def test_a_hand_edit_would_be_seen(tmp_path):
    "The comparison above can fail."
    copy_of_notebooks(tmp_path)
    path = tmp_path / 'nbs' / '04_ppo.ipynb'
    text = path.read_text(encoding='utf-8')
    path.write_text(text.replace('torch.maximum', 'torch.minimum'), encoding='utf-8')
    nbdev('nbdev_export', tmp_path)
    assert modules_in(tmp_path)['ppo.py'] != modules_in(ROOT)['ppo.py']


def test_notebooks_are_clean(tmp_path):
    "`nbdev_clean` leaves them as they are, so that a commit shows what somebody changed."
    copy_of_notebooks(tmp_path)
    nbdev('nbdev_clean', tmp_path)
    changed = [
        str(path.relative_to(ROOT))
        for path in NOTEBOOKS
        if (tmp_path / path.relative_to(ROOT)).read_bytes() != path.read_bytes()
    ]
    assert not changed


def test_one_notebook_one_module_one_stem():
    "Two notebooks that export one module would silently overwrite each other."
    exports = {}
    for path in NOTEBOOKS:
        found = [d.split()[1] for c in cells(path) for d in directives(c) if 'default_exp' in d]
        assert len(found) <= 1, path
        if found:
            assert re.sub(r'^\d+_', '', path.stem) == found[0] and found[0] not in exports
            exports[found[0]] = path
    assert sorted(exports) == [path.stem for path in MODULES]


@notebooks
def test_directives_are_known(path):
    "nbdev ignores a misspelt directive without a word."
    for cell in cells(path):
        for name in directives(cell):
            assert name in DIRECTIVES or name.startswith('default_exp '), name


@notebooks
def test_first_cell_has_title_and_description(path):
    "The description becomes the module's docstring."
    first = cells(path, 'markdown', 'code')[0]
    assert first['cell_type'] == 'markdown' and re.match(r'# .+\n+> .+', source(first))


@notebooks
def test_outputs_are_stored_and_without_errors(path):
    "Most readers only read: a cell that shows something has its output, and no output is an error."
    shown = 0
    quiet = 0
    for cell in cells(path):
        assert all(output['output_type'] != 'error' for output in cell['outputs']), source(cell)
        assert cell['execution_count'] is None
        for data in (output.get('data', {}) for output in cell['outputs']):
            # a figure that shows as the word <Figure>
            is_word = ''.join(data.get('text/plain', '')).startswith('<Figure')
            assert not is_word or {'image/png', 'image/jpeg'} & set(data), source(cell)
        silent = set(directives(cell)) & {'export', 'hide', 'eval: false', 'cuda', 'download'}
        if silent or source(cell).startswith('#| default_exp'):
            continue
        if cell['outputs']:
            shown += 1
        else:
            quiet += 1
    assert shown >= quiet, f'{shown} cells with output, {quiet} without: was the notebook executed?'


@notebooks
def test_notebooks_load_quickly(path):
    "A notebook that takes long to load is not read."
    assert path.stat().st_size <= 530_000


@notebooks
def test_links_lead_somewhere(path):
    "Links to other files of the project, from the place where the notebook is."
    text = '\n'.join(source(cell) for cell in cells(path, 'markdown'))
    for target in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', text):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize('path', TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_paths_of_somebodys_machine(path):
    "Nothing that only exists where it was written."
    text = path.read_text(encoding='utf-8')
    found = HOME.search(text)
    assert not found, text[max(0, found.start() - 60) : found.end() + 40]


@pytest.mark.parametrize('words', [['format', '--check'], ['check']], ids=' '.join)
def test_ruff_finds_nothing(words):
    "Formatted, and no unknown or unused name: one from another cell would leak into a module."
    done = ruff(*words, '--no-cache', 'ddpo_tutorial', 'nbs', 'tests', 'setup.py')
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_function_stands_in_two_notebooks():
    "What lessons share is imported. Solutions are left out: a stub has the name of its answer."
    places = defaultdict(set)
    for path in NOTEBOOKS:
        for cell in cells(path):
            if 'solution' in cell['metadata'].get('tags', []):
                continue
            text = re.sub(r'^\s*[%!].*$', '', source(cell), flags=re.M)
            for function in ast.parse(text).body:
                if isinstance(function, ast.FunctionDef):
                    places[ast.dump(function)].add(f'{path.stem}: {function.name}')
    twice = [sorted(found) for found in places.values() if len(found) > 1]
    assert not twice


def test_the_package_is_small():
    "Formatted lines of code: what the main line leads through, and everything but the checkers."
    count = {path.stem: code_lines(path) for path in MODULES}
    assert sum(count[stem] for stem in MAIN_LINE) <= 750, count
    assert sum(count.values()) - count['exercises'] <= 2670, count


def test_floors_name_all_modules():
    assert sorted(FLOORS) == [path.stem for path in MODULES]


@modules
def test_imports_lead_down(path):
    "No star, no circle, nothing from a room above."
    stars = [n for n in ast.walk(parsed(path)) if isinstance(n, ast.ImportFrom)]
    assert not [node for node in stars if node.names[0].name == '*']
    below = FLOORS[: FLOORS.index(path.stem)]
    assert package_imports(path) <= set(below)


@modules
def test_functions_are_small_and_documented(path):
    "None over 30 lines or with more than six parameters; a public one says what it does."
    for function in functions(parsed(path)):
        documented = ast.get_docstring(function) is not None
        first = function.body[1 if documented and len(function.body) > 1 else 0]
        assert function.end_lineno - first.lineno + 1 <= 30, function.name
        assert len(function.args.args) + len(function.args.kwonlyargs) <= 6, function.name
        inner = function.name.startswith('_') or function.col_offset > 4
        assert inner or documented, function.name


@pytest.mark.parametrize('stem', ['sampling', 'training'])
def test_comments_say_why(stem):
    "Whoever opens the module from a traceback has no notebook beside it."
    path = ROOT / 'ddpo_tutorial' / f'{stem}.py'
    lines = path.read_text(encoding='utf-8').splitlines()
    alone = [n for n in lines if re.match(r'\s*#(?! %%| AUTOGENERATED)', n)]
    assert len(alone) >= 0.03 * code_lines(path)


def test_models_are_small():
    "What the package ships for the tiny world: at most 25 MB."
    tiny = [p for p in (ROOT / 'ddpo_tutorial' / 'tiny').rglob('*') if p.is_file()]
    assert 1e6 < sum(path.stat().st_size for path in tiny) <= 25e6
