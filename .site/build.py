"""Builds the site from README, the notebooks and the docstrings: python .site/build.py FOLDER

Needs the extras `dev` and `site`, and no network. Warnings are errors.
"""

import ast
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sphinx.cmd.build import build_main

ROOT = Path(__file__).parents[1]
CHAPTERS = {
    'The main line': 'nbs/0*.ipynb',
    'More': 'nbs/more/*.ipynb',
    'The engine': 'nbs/engine/*.ipynb',
    'The tiny models': 'nbs/tiny/*.ipynb',
    'For a room': 'nbs/room/*.*',
    'Reference': 'reference/*.md',
    'The project': '{nbs/README,tests/bench/*,tests/bench/results/cpu,.github/*}.md',
}


def copy_sources(pages: Path) -> None:
    "Every Markdown file and notebook that git knows, in its place, with the pictures."
    found = subprocess.run(
        ['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in found.stdout.splitlines():
        path = ROOT / name
        if path.suffix in ('.md', '.ipynb') or 'nbs/images/' in name:
            target = pages / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    (pages / 'README.md').rename(pages / 'index.md')


def tidy_links(text: str, page: Path, pages: Path) -> str:
    "Links to README lead to the first page; those to files that are no pages become plain text."

    def tidy(link):
        "One link, or its words."
        words, target = link.groups()
        if target.startswith('http'):
            return link[0]
        place, hash_sign, heading = target.partition('#')
        # Jupyter keeps the marks and capitals of a heading, Sphinx does not
        heading = re.sub(r'[^\w-]', '', heading).lower()
        if not place:
            return f'[{words}](#{heading})'
        path = (page.parent / place).resolve()
        if path == pages / 'README.md':
            path = pages / 'index.md'
        if not path.exists():
            return words
        relative = Path(
            *['..'] * len(page.parent.relative_to(pages).parts), path.relative_to(pages)
        )
        return f'[{words}]({relative}{hash_sign}{heading})'

    return re.sub(r'(?<!!)\[([^\]]+)\]\(([^)\s]+)\)', tidy, text)


def tidy_cell(cell: dict) -> None:
    "Directives go; imports that are folded in Jupyter are folded here; so are solutions."
    text = ''.join(cell['source'])
    tags = cell['metadata'].setdefault('tags', [])
    if cell['cell_type'] == 'code':
        directives = re.findall(r'^#\| *(\w+)', text, re.M)
        text = re.sub(r'^#\|.*\n?', '', text, flags=re.M).strip('\n')
        if 'hide' in directives or not text:
            tags.append('remove-cell')
        elif 'solution' in tags:
            tags.append('hide-cell')
        elif cell['metadata'].get('jupyter', {}).get('source_hidden'):
            tags.append('hide-input')
    elif 'solution' in tags and not text.startswith('#'):
        text = f'<details><summary>Solution</summary>\n\n{text}\n\n</details>'
    cell['source'] = text


def tidy_pages(pages: Path) -> None:
    "Every page as Sphinx wants it."
    for page in [*pages.rglob('*.md'), *pages.rglob('*.ipynb')]:
        if page.suffix == '.md':
            page.write_text(tidy_links(page.read_text(), page, pages))
            continue
        notebook = json.loads(page.read_text())
        for cell in notebook['cells']:
            tidy_cell(cell)
            if cell['cell_type'] == 'markdown':
                cell['source'] = tidy_links(cell['source'], page, pages)
        page.write_text(json.dumps(notebook))


def header(thing) -> str:
    "The source of a function up to its docstring; of a class up to its first method."
    source = inspect.cleandoc('\n' + inspect.getsource(thing))
    (node,) = ast.parse(source).body
    inner = node.body[0]
    if isinstance(node, ast.ClassDef):
        methods = (part for part in node.body if isinstance(part, ast.FunctionDef))
        inner = next(methods, None)
    if inner is None:
        return source
    first = min([inner.lineno, *(line.lineno for line in getattr(inner, 'decorator_list', []))])
    return '\n'.join(source.splitlines()[: first - 1]).rstrip()


def describe(name: str, thing) -> str:
    "What a name of the package is: its header with the comments on each parameter, its docstring."
    title = f'## {name}'
    if not (inspect.isfunction(inspect.unwrap(thing)) or inspect.isclass(thing)):
        return f'{title}\n\n`{thing!r:.200}`'
    thing = inspect.unwrap(thing)
    words = inspect.getdoc(thing) if inspect.isfunction(thing) else ''
    return f'{title}\n\n{words or ""}\n\n```python\n{header(thing)}\n```'


def write_reference(pages: Path) -> None:
    "A page a module, of its docments."
    (pages / 'reference').mkdir()
    for path in sorted((ROOT / 'ddpo_tutorial').glob('[a-z]*.py')):
        module = importlib.import_module(f'ddpo_tutorial.{path.stem}')
        parts = [describe(name, getattr(module, name)) for name in module.__all__]
        text = '\n\n'.join([f'# ddpo_tutorial.{path.stem}', module.__doc__ or '', *parts])
        (pages / 'reference' / f'{path.stem}.md').write_text(text)


def write_contents(pages: Path) -> None:
    "The order of the pages, which decides what is next and what was before."
    with (pages / 'index.md').open('a') as index:
        listed = set()
        for caption, patterns in CHAPTERS.items():
            braces = re.fullmatch(r'\{(.*)\}(.*)', patterns)
            patterns = [p + braces[2] for p in braces[1].split(',')] if braces else [patterns]
            found = [path for pattern in patterns for path in sorted(pages.glob(pattern))]
            names = [path.relative_to(pages).as_posix() for path in found if path not in listed]
            listed.update(found)
            index.write('\n'.join(['', '```{toctree}', ':hidden:', f':caption: {caption}', '']))
            index.write('\n'.join(['', *names, '```', '']))


def main(target: str) -> int:  # Sphinx's exit code
    "Prepare the pages in a temporary folder, and build."
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder).resolve() / 'pages'
        copy_sources(pages)
        write_reference(pages)
        tidy_pages(pages)
        write_contents(pages)
        here = str(Path(__file__).parent)
        options = ['-W', '--keep-going', '-q', '-b', 'html', '-c', here]
        return build_main([*options, '-d', f'{folder}/trees', str(pages), target])


if __name__ == '__main__':
    sys.exit(main(sys.argv[1]))
