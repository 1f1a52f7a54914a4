"""Fixtures: the pipeline the package ships, and a random one that is a thousand times smaller.
What runs side by side, and what runs only when asked for."""

import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1')  # two test processes run side by side: .pytest.ini

import pytest
from helpers import micro_pipeline

from ddpo_tutorial.pipelines import load_pipeline

SKIP = pytest.mark.skip(reason='needs many minutes or much memory: run with --slow')


@pytest.fixture(scope='session')
def tiny():
    "The shipped pipeline on the CPU, shared: nobody changes it (`trainable_copy` is for that)."
    return load_pipeline('tiny', device='cpu')


@pytest.fixture
def micro():
    "A very small random pipeline, a fresh one for every test."
    return micro_pipeline()


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also run what needs many minutes')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: needs many minutes or much memory; needs --slow')


def pytest_collection_modifyitems(config, items):
    "A file's tests stay in one process, for its fixtures; each notebook runs where there is room."
    for item in items:
        is_notebook = item.path.name == 'test_notebooks.py'
        group = item.name if is_notebook else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
        if item.get_closest_marker('slow') and not config.getoption('--slow'):
            item.add_marker(SKIP)
