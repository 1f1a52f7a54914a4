"""Every trial of breaking the command ends as it should.

Run: python -m pytest tests/test_breaking.py --slow -n 0
"""

import pytest
from breaking import judge
from trials import TRIALS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize('trial', TRIALS, ids=lambda trial: f'{trial.area}: {trial.name}')
def test_it_ends_as_it_should(trial, tmp_path):
    ending, faults = judge(trial, tmp_path / 'place')
    if faults and trial.left:
        pytest.xfail(trial.left)
    assert not faults, f'{"; ".join(faults)}\n\n{ending.said}'
