"""Runs docs/quickstart.ipynb: `make notebook` stores what it prints, a test looks at it.

python -m tests.notebook
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def run(folder: Path) -> Any:
    """The notebook with what its cells printed; its files go to a folder."""
    import nbformat
    from nbclient import NotebookClient

    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=where).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") == "stdout"]
    return notebook


if __name__ == "__main__":
    import nbformat

    with tempfile.TemporaryDirectory() as name:
        nbformat.write(run(Path(name)), NOTEBOOK)
