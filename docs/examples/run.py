"""Runs the notebooks of this folder against a server, CUTAWAY_ADDRESS, and writes what they show into them.

python docs/examples/run.py                        # all of them
python docs/examples/run.py 04-attention.ipynb     # some of them

A cell that fails stops everything: the notebooks check what they claim.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

HERE = Path(__file__).parent
SECONDS = 300  # for one cell


def run(path: Path) -> NotebookNode:
    """The notebook with what its cells showed.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as sockets:  # TCP could be read by whoever is on this machine
        settings = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
        where = {"metadata": {"path": str(HERE)}}
        NotebookClient(
            notebook, config=settings, timeout=SECONDS, kernel_name="python3", resources=where, coalesce_streams=True
        ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran: of no use, and different each time
    notebook.metadata.pop("language_info", None)
    return notebook


if __name__ == "__main__":
    for path in [HERE / name for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        nbformat.write(run(path), path)
        print(path.name)
