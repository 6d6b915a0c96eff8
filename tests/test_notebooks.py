"""Notebooks run from start to end, and are kept with what they gave."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"

SMALL = {
    "colab_tpu": "STEPS, TRAIN, TEST, QUADRUPLES, WORK = 2, 64, 32, 4, 'runs'",
    "own_data": "STEPS, PICTURES, FOLDER, WORK = 2, 80, Path('my_data'), Path('runs')",
}
"""What stands in for the cell of parameters, so that the run is short."""


def notebook(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def test_every_notebook_is_listed():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_it_is_kept_with_outputs_and_without_errors(name):
    cells = [cell for cell in notebook(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any(output.output_type in ("display_data", "execute_result") for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert str(Path.home()) not in nbformat.writes(notebook(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_runs_from_start_to_end(name, tmp_path, monkeypatch):
    book = notebook(name)
    (parameters,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = SMALL[name]
    # One device, as on a laptop; the tests' eight are for what is sharded.
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    (tmp_path / "launch.py").symlink_to(NOTEBOOKS.parent / "launch.py")
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs) == (name == "colab_tpu")
    assert not any("error:" in output.get("text", "") for output in outputs)
