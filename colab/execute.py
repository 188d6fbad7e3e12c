"""Executes notebooks, as CI does: `python colab/execute.py colab/*.ipynb --out build/notebooks`."""

from __future__ import annotations

import argparse
import pathlib
import time

import nbformat
from nbclient import NotebookClient

MAX_SECONDS = 600
"""Per cell."""


def main() -> None:
    """Runs each notebook in its own kernel; stops with the traceback of the first failing cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", type=pathlib.Path, nargs="+")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.notebooks:
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook,
            timeout=MAX_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": str(args.out)}},
        )
        try:
            client.execute()
        finally:
            nbformat.write(notebook, args.out / path.name)
        print(f"{path}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
