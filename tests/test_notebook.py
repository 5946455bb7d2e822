"""The notebook runs on a study's storage from its first cell to its last."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from planted import grown_storage, planted_spec

from optuna_ohgw.opening import open_storage
from optuna_ohgw.spec import load_spec

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "analysis.ipynb"
VARIATIONS = (
    "asha-baseline",
    "asha-random-warm",
    "asha-ohgw-1step",
    "asha-ohgw-1step@1e-4",
    "asha-ohgw-1step@3e-4",
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    spec = planted_spec(VARIATIONS, range(3), pilot_seeds=(100,), output=str(folder / "out"), trials=8)
    path = folder / "planted.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_unset=True)))
    loaded = load_spec(path)
    (folder / "out").mkdir()
    grown_storage(
        loaded, open_storage(loaded.storage_url, create=True), trials=8, effect={"asha-ohgw-1step": 0.8}
    )
    return path


def code_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_of(notebook))
    assert NOTEBOOK.stat().st_size < 20_000


def test_names_a_shipped_study() -> None:
    first = code_of(nbformat.read(NOTEBOOK, as_version=4))[0]
    names: dict[str, str] = {}
    exec(first.source, names)
    assert (NOTEBOOK.parent / names["study"]).exists()


def test_every_cell_runs_on_a_planted_study(
    study: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The kernel's history and settings stay out of the user's home.
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = code_of(notebook)
    cells[0].source = f"study = {str(study)!r}"
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert all(cell.execution_count is not None for cell in cells)
    # The first one only sets a name.
    assert all(cell.outputs for cell in cells[1:])
    kinds = [kind for cell in cells for output in cell.outputs for kind in output.get("data", {})]
    assert kinds.count("application/vnd.plotly.v1+json") == 3
    text = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "curvature Estimate(" in text
