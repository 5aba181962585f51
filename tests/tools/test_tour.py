"""The notebook runs top to bottom, on a data set small enough for a test."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def test_the_notebook_is_kept_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    assert [one for one in notebook.cells if one.get("outputs")] == []


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("faiss")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("TOUR_SIZES", "64,16,16")
    monkeypatch.setenv("TOUR_EPOCHS", "1")
    monkeypatch.setenv("TOUR_FOLDER", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, 4)
    settings = {"timeout": 280, "kernel_name": "python3"}
    resources = {"metadata": {"path": str(ROOT / "docs")}}
    nbclient.NotebookClient(notebook, resources=resources, **settings).execute()
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "pictures" / "first_1.png").exists()
    last = "".join(one.get("text", "") for one in notebook.cells[-3]["outputs"])
    assert "pictures" in last
