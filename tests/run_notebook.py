"""Runs a notebook in this process and writes it with fresh outputs.

python tests/run_notebook.py NOTEBOOK OUTPUT [LAST_CELL]

Left out are the cells that `nbdev_test` leaves out too: those for CUDA and for downloads, and
`eval: false`. LAST_CELL is a Python file that runs as one more cell. Ends with 1 at the first cell
that fails.
"""

import os
import re
import sys
from pathlib import Path

from execnb.nbio import mk_cell, read_nb, write_nb
from execnb.shell import CaptureShell

LEFT_OUT = re.compile(r'^#\s*\|\s*(cuda|download|slow|eval: false)', re.M)


def run(
    path: Path,  # the notebook
    output: Path,  # where it goes with its outputs
    last: Path | None = None,  # a file to run as a last cell
) -> None:
    "Raises what the first failing cell raises."
    notebook = read_nb(path)
    if last:
        notebook.cells.append(mk_cell(last.read_text(encoding='utf-8')))
    shell = CaptureShell(path)
    os.chdir(path.parent)
    os.environ['IN_TEST'] = (
        '1'  # nbdev's word for it: the last lesson then writes to a temporary folder
    )
    try:
        shell.run_all(
            notebook,
            exc_stop=True,
            preproc=lambda c: c.cell_type != 'code' or bool(LEFT_OUT.search(c.source)),
        )
    except Exception:
        raise SystemExit(shell.prettytb(fname=path))
    finally:
        write_nb(notebook, output)


if __name__ == '__main__':
    run(*(Path(arg).resolve() for arg in sys.argv[1:]))
