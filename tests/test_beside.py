from __future__ import annotations

import json
from pathlib import Path

import pytest
from planted import grown_storage, planted_spec

from optuna_ohgw.beside import role, sides
from optuna_ohgw.errors import UserError
from optuna_ohgw.opening import open_storage
from optuna_ohgw.report import open_page
from optuna_ohgw.spec import StudySpec, load_spec


def written(folder: Path, name: str, *, run: bool = True, **changes: object) -> StudySpec:
    """Write a study file (JSON is YAML) and, if ``run``, its storage; return its spec."""
    spec = planted_spec(seeds=range(2), name=name, output=str(folder / name), **changes)  # type: ignore[arg-type]
    given = spec.model_dump(mode="json", exclude={"storage", "beside"})
    given["beside"] = list(spec.beside)
    (folder / f"{name}.yaml").write_text(json.dumps({k: v for k, v in given.items() if v is not None}))
    loaded = load_spec(folder / f"{name}.yaml")
    if run:
        (folder / name).mkdir()
        grown_storage(loaded, open_storage(loaded.storage_url, create=True), trials=2, epochs=3)
    return loaded


HALVING = {"min_resource": 3, "reduction_factor": 3, "bootstrap_count": 0}
TASK = {"data": "digits", "model": "mlp", "epochs": 27, "validation_images": 360}


def test_each_study_beside_is_found_from_the_folder_of_the_file_with_its_role(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    written(tmp_path / "more", "boot", scheduler=HALVING)
    written(tmp_path, "eta", variations=["asha-baseline", "asha-ohgw-1step@3e-4"])
    written(tmp_path, "noise", task={**TASK, "label_noise": 0.1}, run=False)
    written(tmp_path, "later", trials=99)
    spec = written(tmp_path, "main", beside=["more/boot.yaml", "eta.yaml", "noise.yaml", "later.yaml"])
    found = list(sides(spec))
    assert [side.role for side in found] == ["bootstrap", "eta", "noise", "other"]
    assert [side.evidence is None for side in found] == [False, False, True, False]
    assert found[0].evidence is not None
    assert found[0].evidence.spec.name == "boot"
    assert found[0].source == str(tmp_path / "more/boot.yaml")
    assert found[2].absent is not None
    assert "noise" in found[2].absent


def test_the_role_of_itself_is_none_of_the_named(tmp_path: Path) -> None:
    spec = written(tmp_path, "main", run=False)
    assert role(spec, spec) == "other"


def test_a_storage_without_the_study_is_said(tmp_path: Path) -> None:
    other = written(tmp_path, "other", run=False)
    (tmp_path / "other").mkdir()
    open_storage(other.storage_url, create=True)
    spec = written(tmp_path, "main", run=False, beside=["other.yaml"])
    (side,) = sides(spec)
    assert side.absent is not None
    assert "was not run" in side.absent


def test_a_file_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    spec = written(tmp_path, "main", run=False, beside=["nowhere.yaml"])
    with pytest.raises(UserError, match=r"nowhere\.yaml: there is no such file"):
        list(sides(spec))


def test_what_stands_beside_is_no_part_of_the_study(tmp_path: Path) -> None:
    assert "beside" not in planted_spec(beside=["x.yaml"]).identity()


def test_a_study_without_pilots_takes_the_target_of_one_on_the_same_task(tmp_path: Path) -> None:
    written(tmp_path, "eta", variations=["asha-baseline", "asha-ohgw-1step@3e-4"], beside=["main.yaml"])
    written(tmp_path, "noise", task={**TASK, "label_noise": 0.1})
    main = written(tmp_path, "main", pilot_seeds=[7, 8], beside=["eta.yaml", "noise.yaml"])
    page = open_page(open_storage(main.storage_url, create=False), main, tmp_path / "main.yaml")
    assert page.evidence.pilot is not None
    eta, noise = (side.evidence for side in page.sides)
    assert eta is not None
    assert eta.primary == page.evidence.pilot
    assert noise is not None
    assert noise.primary == noise.spec.targets[0]  # another task: 90% there is not 90% here
    own = load_spec(tmp_path / "eta.yaml")
    alone = open_page(open_storage(own.storage_url, create=False), own, tmp_path / "eta.yaml")
    assert alone.evidence.primary == page.evidence.pilot
