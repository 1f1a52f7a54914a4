"""Fixtures: the pipeline the package ships, and a random one that is a thousand times smaller"""
import os
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest

from ddpo_tutorial.pipelines import load_pipeline
from helpers import micro_pipeline

@pytest.fixture(scope='session')
def tiny():
    "The shipped pipeline on the CPU, shared by all tests: nobody changes it (`trainable_copy` is for that)."
    return load_pipeline('tiny', device='cpu')

@pytest.fixture
def micro():
    "A very small random pipeline, a fresh one for every test."
    return micro_pipeline()
