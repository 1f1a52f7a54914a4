"""Fixtures: the pipeline the package ships, and a random one that is a thousand times smaller"""
import os
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1') # two test processes run side by side, see .pytest.ini

import pytest

from ddpo_tutorial.pipelines import load_pipeline
from helpers import micro_pipeline

SKIP = pytest.mark.skip(reason='needs many minutes or much memory: run with --slow')

@pytest.fixture(scope='session')
def tiny():
    "The shipped pipeline on the CPU, shared by all tests: nobody changes it (`trainable_copy` is for that)."
    return load_pipeline('tiny', device='cpu')

@pytest.fixture
def micro():
    "A very small random pipeline, a fresh one for every test."
    return micro_pipeline()

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also run the tests that need many minutes or much memory')

def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: needs many minutes or much memory; runs with --slow')

def pytest_collection_modifyitems(config, items):
    "Slow tests are left out unless asked for."
    for item in items:
        if item.get_closest_marker('slow') and not config.getoption('--slow'): item.add_marker(SKIP)
