"""The smallest run and the tests with the lowest versions that settings.ini allows.

In an environment of its own in the temporary folder (6 GB, removed afterwards), made by the Python
that runs this: 3.11 or 3.12. Words after the name go to pytest.

Run: python3.11 tests/lowest.py
"""

import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory
from venv import EnvBuilder

ROOT = Path(__file__).parents[1]


def run(program, *words, folder=ROOT):
    "Run a program, which is shown first. Raises CalledProcessError where it fails."
    print('$', Path(program).name, *words, flush=True)
    subprocess.run([program, *words], cwd=folder, check=True)


def main(words):
    with TemporaryDirectory() as place:
        EnvBuilder(with_pip=True).create(place)
        programs = Path(sysconfig.get_path('scripts', 'venv', vars=dict(base=place)))
        python, command = programs / 'python', programs / 'ddpo_train'
        run(python, '-m', 'pip', 'install', '-q', '-c', 'tests/lowest.txt', '-e', '.[dev]')
        run(command, '--config', 'smoke', '--dry-run', folder=place)
        run(command, '--config', 'smoke', folder=place)
        run(python, '-m', 'pytest', *words)


if __name__ == '__main__':
    main(sys.argv[1:])
