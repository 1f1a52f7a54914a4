"""What settings.ini requires: all that the package imports, and the versions that are tested.

Run: python -m pytest tests/test_versions.py -n 0
"""

import ast
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def read_requirements(lines):
    "The operator and the version of each."
    found = [Requirement(line.partition('#')[0]) for line in lines]
    return {
        canonicalize_name(r.name): [(s.operator, s.version) for s in r.specifier] for r in found
    }


def required():
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT / 'settings.ini', encoding='utf-8')
    return read_requirements(settings['DEFAULT']['requirements'].split())


def imported_names(path):
    "The packages that a module imports, anywhere in it."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split('.')[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split('.')[0]


def test_lowest_versions_are_the_bounds():
    "lowest.txt, which is installed and tested, has each requirement, at its bound."
    lines = (ROOT / 'tests' / 'lowest.txt').read_text(encoding='utf-8').splitlines()
    lowest = read_requirements(line for line in lines if not line.startswith('#'))
    bounds = {name: [('>=', version)] for name, [(_, version)] in lowest.items()}
    assert required() == bounds and {s[0][0] for s in lowest.values()} == {'=='}


def test_all_that_is_imported_is_required():
    "And nothing besides: another package may stop asking for it."
    modules = (ROOT / 'ddpo_tutorial').glob('*.py')
    names = {name for path in modules for name in imported_names(path)}
    names -= {*sys.stdlib_module_names, 'ddpo_tutorial'}
    distributions = packages_distributions()
    assert {canonicalize_name(distributions[name][0]) for name in names} == set(required())
