"""What the README and the docs show is run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import optuna
import pytest
from distributed_jobs import environment_of_rank, free_port
from planted import grown_storage

from optuna_ohgw.opening import open_storage
from optuna_ohgw.spec import load_spec

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def blocks(name: str) -> list[str]:
    return BLOCK.findall((ROOT / name).read_text())


def run(sources: list[str]) -> dict[str, object]:
    names: dict[str, object] = {}
    for source in sources:
        exec(compile(source, "<block>", "exec"), names)
    return names


def test_readme_example_runs_as_written_after_what_it_needs() -> None:
    (example,) = blocks("README.md")
    names = run([blocks("docs/library.md")[0], example])
    study = names["study"]
    assert isinstance(study, optuna.Study)
    assert len(study.trials) == 5
    for trial in study.trials:
        record = trial.user_attrs["ohgw"][0]
        assert {n: trial.params[n] for n in record["trained"]} == record["trained"] != record["suggested"]


def test_blocks_of_the_library_page_run_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of_rank(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)  # one rank of one; test_distributed has two
    run(blocks("docs/library.md"))


def test_block_of_the_analysis_page_runs_on_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = blocks("docs/analysis.md")
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    monkeypatch.chdir(tmp_path)
    spec = load_spec(Path("studies/digits.yaml"))
    spec.folder.mkdir(parents=True)
    grown_storage(spec, open_storage(spec.storage_url, create=True), trials=3, epochs=3)
    assert len(run([source])["compared"]) == 15  # three variations, two with a control, in three budgets


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_other_pages_have_no_block_that_is_not_run(page: str) -> None:
    assert page in ("library.md", "analysis.md", "tasks.md") or not blocks(f"docs/{page}")


PAGES = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
