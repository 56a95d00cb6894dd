import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.commands import ROOT

NOTEBOOKS = ROOT / "notebooks"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOKS / "explore.ipynb", as_version=4)


def test_stored_without_results(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.slow
def test_runs_on_a_finished_run(notebook, finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_RUN", str(finished_run))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, kernel_name="python3", timeout=300, resources=resources).execute()

    results = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    pictures = [
        name
        for name, outputs in results.items()
        if any("image/png" in output.get("data", {}) for output in outputs)
    ]
    assert pictures == ["predict", "trade-off", "ranks"]
    assert "equal: True" in "".join(output.text for output in results["save"])
