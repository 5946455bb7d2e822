"""The folders for OptunaHub are loaded as it loads them, from disk and with no way to the network."""

from __future__ import annotations

import inspect
import re
import runpy
import socket
from pathlib import Path
from typing import Any

import optuna
import optunahub
import pytest
import torch
import yaml
from optuna.artifacts import FileSystemArtifactStore
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

import optuna_ohgw
from optuna_ohgw.history import decisions_of

ROOT = Path(__file__).parents[1]
REGISTRY = ROOT / "docs" / "optunahub" / "package"
ALL = {
    "pruners/pasha": ["OhgwSampler", "PashaPruner", "best_trial", "epochs"],
    "samplers/dyhpo": ["DyHPOSampler", "best_trial", "epochs"],
    "samplers/ohgw": ["OhgwSampler", "WarmStart", "lookahead_loss", "ohgw_suggest"],
}
FIELDS = ["author", "title", "description", "tags", "optuna_versions", "license"]
SECTIONS = ["Abstract", "APIs", "Installation", "Example", "Others"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"the network was asked for {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("OPTUNAHUB_NO_ANALYTICS", "1")
    monkeypatch.setenv("OPTUNAHUB_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(optunahub, "load_module", load)


def load(package: str) -> Any:
    return optunahub.load_local_module(package=package, registry_root=str(REGISTRY))


def readme(package: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the front matter and the sections of a package's README."""
    _, front, text = (REGISTRY / package / "README.md").read_text().split("---\n", maxsplit=2)
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    assert not parts[0].strip()
    return yaml.safe_load(front), dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_folder_is_checked_here() -> None:
    assert sorted(str(p.parent.relative_to(REGISTRY)) for p in REGISTRY.glob("*/*/__init__.py")) == sorted(
        ALL
    )


@pytest.mark.parametrize("package", list(ALL))
def test_what_is_loaded_is_the_package_itself(package: str) -> None:
    module = load(package)
    assert module.__name__ == f"optunahub_registry.package.{package.replace('/', '.')}"
    assert sorted(module.__all__) == ALL[package]
    for name in module.__all__:
        assert getattr(module, name) is getattr(optuna_ohgw, name)


@pytest.mark.parametrize("package", ALL)
def test_front_matter_and_sections_are_those_of_the_template(package: str) -> None:
    front, sections = readme(package)
    assert list(front) == FIELDS
    assert all(isinstance(front[name], str) and front[name] for name in FIELDS if name[-1] != "s")
    for name in ("tags", "optuna_versions"):
        assert front[name]
        assert all(isinstance(value, str) for value in front[name])
    assert package.split("/", maxsplit=1)[0].rstrip("s") in front["tags"]
    assert optuna.__version__.split(".")[0] in {v.split(".")[0] for v in front["optuna_versions"]}
    assert front["license"] == "MIT License"
    assert list(sections) == SECTIONS
    assert "### Reference" in sections["Others"]


@pytest.mark.parametrize("package", ALL)
def test_the_files_of_a_package_agree(package: str) -> None:
    folder = REGISTRY / package
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    sections = readme(package)[1]
    (requirement,) = (folder / "requirements.txt").read_text().split()
    assert f"pip install {requirement}" in sections["Installation"].replace('"', "")
    assert sections["Example"].strip() == f"```python\n{(folder / 'example.py').read_text()}```"
    assert list((folder / "tests").glob("test_*.py"))


@pytest.mark.parametrize("package", list(ALL))
def test_every_name_is_described_with_the_parameters_that_it_has(package: str) -> None:
    module = load(package)
    described = re.findall(r"^- `(\w+)\((.*)\)`", readme(package)[1]["APIs"], flags=re.MULTILINE)
    assert sorted(name for name, _ in described) == sorted(module.__all__)
    for name, arguments in described:
        known = inspect.signature(getattr(module, name)).parameters
        shown = {a.split("=")[0].strip("* ") for a in arguments.split(",")} - {""}
        required = {n for n, p in known.items() if p.default is p.empty}
        assert required <= shown <= set(known)


@pytest.mark.parametrize("package", list(ALL))
def test_the_example_runs_as_it_is(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(REGISTRY / package / "example.py"), run_name="__main__")
    study = names["study"]
    assert {t.state for t in study.trials} <= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING}
    assert float(re.match(r"\d\.\d+", capsys.readouterr().out)[0]) > 0.85  # type: ignore[index]


def curve(x: float, epoch: int) -> float:
    return x + 1 / epoch + 0.2 * ((x * 997 * epoch) % 1)


def paused_study(pruner: Any, epochs: Any, folder: Path, sampler: Any) -> list[Any]:
    """Return what happened in a study of known curves: values, state and decisions of each trial."""
    store = FileSystemArtifactStore(str(folder))

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        for epoch in epochs(trial, 27, store):
            trial.report(curve(x, epoch), epoch)
        return curve(x, 27)

    folder.mkdir()
    study = optuna.create_study(pruner=pruner, sampler=sampler)
    study.optimize(objective, n_trials=40)
    kept = ("action", "rule", "resource", "rung", "value", "cutoff", "rank", "of", "maximum")
    made = [[tuple(d.get(name) for name in kept) for d in decisions_of(t).values()] for t in study.trials]
    return [(t.params, t.state, t.intermediate_values, d) for t, d in zip(study.trials, made, strict=True)]


def test_pasha_decides_as_the_package_does(tmp_path: Path) -> None:
    hub = load("pruners/pasha")
    happened = [
        paused_study(source.PashaPruner(27), source.epochs, tmp_path / name, RandomSampler(seed=1))
        for name, source in (("hub", hub), ("own", optuna_ohgw))
    ]
    assert happened[0] == happened[1]
    assert {len(values) for _, _, values, _ in happened[0]} > {1, 3}
    assert sum(len(decided) for *_, decided in happened[0]) > 40


def test_dyhpo_chooses_as_the_package_does(tmp_path: Path) -> None:
    happened = []
    for name, source in (("hub", load("samplers/dyhpo")), ("own", optuna_ohgw)):
        sampler = source.DyHPOSampler(max_resource=27, candidates=20, seed=0)
        happened.append(paused_study(sampler.pruner, source.epochs, tmp_path / name, sampler))
    assert happened[0] == happened[1]
    assert len({len(values) for _, _, values, _ in happened[0]}) > 2


def test_ohgw_moves_suggestions_as_the_package_does() -> None:
    space = {"lr": FloatDistribution(1e-4, 1.0, log=True)}

    def moved(source: Any) -> list[Any]:
        study = optuna.create_study(sampler=source.OhgwSampler(RandomSampler(seed=3)))
        trials = [study.ask() for _ in range(5)]
        for trial in trials:
            source.ohgw_suggest(
                trial, space, lambda psi: torch.log10(psi["lr"]) ** 2, source.WarmStart(eta_h=0.1)
            )
        return [(t.params, t.user_attrs["ohgw"][0]["suggested"]) for t in trials]

    hub = moved(load("samplers/ohgw"))
    assert hub == moved(optuna_ohgw)
    assert all(trained != suggested for trained, suggested in hub)
