"""The files of a report: complete, self-contained, escaped, right also for partial studies."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from planted import FOUR, grown_storage, plant_cell, planted_spec, planted_storage, planted_trial

from optuna_ohgw.beside import Side
from optuna_ohgw.cells import Cell
from optuna_ohgw.errors import UserError
from optuna_ohgw.evidence import gather
from optuna_ohgw.report import Page, markdown, write_report
from optuna_ohgw.report.blocks import sentences
from optuna_ohgw.report.write import SCHEMA_VERSION, summary

SPEC = planted_spec(FOUR, range(8), pilot_seeds=(100, 101))
FILES = ["report.html", "summary.json", "table.csv", "table.tex", "trials.parquet"]
TITLES = [
    "Verdict",
    "Time to target",
    "Cost",
    "What moved",
    "Sensitivity",
    "Trials",
    "Where it comes from",
]


@pytest.fixture(scope="module")
def page() -> Page:
    evidence = gather(grown_storage(SPEC), SPEC, "planted.yaml")
    boot = planted_spec(
        FOUR, range(8), scheduler={"min_resource": 3, "reduction_factor": 3, "bootstrap_count": 0}
    )
    etas = [f"asha-ohgw-1step@{eta}" for eta in ("1e-4", "3e-4", "1e-3", "3e-3")]
    sweep = planted_spec(("asha-baseline", *etas), range(4), target=0.7, name="sweep")
    noise = planted_spec(FOUR, range(8), target=0.7, name="noise")
    sides = (
        Side("boot.yaml", "bootstrap", gather(grown_storage(boot, rng=1), boot, "boot.yaml")),
        Side("sweep.yaml", "eta", gather(grown_storage(sweep), sweep, "sweep.yaml")),
        Side("noise.yaml", "noise", gather(grown_storage(noise, rng=2), noise, "noise.yaml")),
        Side("gone.yaml", "bootstrap", None, "gone.yaml was not run"),
    )
    return Page(evidence, sides)


@pytest.fixture(scope="module")
def folder(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert [path.name for path in write_report(page, folder)] == FILES
    return folder


class Read(HTMLParser):
    """Headings, text, resources and balance of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.text: list[str] = []
        self.resources: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.resources += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "link", "br", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "script" not in self.open and "style" not in self.open:
            self.text.append(data)


class TestHtml:
    def test_has_every_section_and_is_well_formed(self, folder: Path) -> None:
        page = Read((folder / "report.html").read_text())
        assert page.headings == TITLES
        assert page.open == []

    def test_opens_offline(self, folder: Path) -> None:
        page = Read((folder / "report.html").read_text())
        assert all(r.startswith(("#", "data:")) for r in page.resources), page.resources
        assert (folder / "report.html").stat().st_size < 8e6

    def test_shows_verdict_controls_and_both_bootstrap_forms(self, page: Page, folder: Path) -> None:
        shown = " ".join(Read((folder / "report.html").read_text()).text)
        for sentence in page.evidence.sentences:
            assert sentence in shown
        assert "asha-random-warm" in shown
        assert "gone.yaml was not run" in shown
        rows = re.findall(
            r"<td>asha-ohgw-1step</td><td>asha-baseline</td><td>(\d)</td>",
            (folder / "report.html").read_text(),
        )
        assert {"0", "2"} <= set(rows)

    def test_every_figure_has_its_place(self, page: Page, folder: Path) -> None:
        text = (folder / "report.html").read_text()
        assert len(page.figures) == 10
        for name in page.figures:
            assert f'id="figure-{name}"' in text

    def test_each_figure_names_its_study_file(self, page: Page) -> None:
        for name, figure in page.figures.items():
            source = "sweep.yaml" if name == "eta-sensitivity" else "planted.yaml"
            assert source in figure.to_json(), name


class TestSummary:
    def test_is_plain_json_with_a_version(self, folder: Path) -> None:
        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        whole = json.loads((folder / "summary.json").read_text(), parse_constant=refuse)
        assert (whole["schema"], whole["schema_version"]) == ("optuna-ohgw/summary", SCHEMA_VERSION)
        assert [v["variation"] for v in whole["variations"]] == list(FOUR)
        assert len(whole["cells"]) == 32
        assert len(whole["times"]) == 64
        assert {c["outcome"] for c in whole["criteria"]} <= {"pass", "fail", "undecided"}
        assert [s["role"] for s in whole["beside"]] == ["bootstrap", "eta", "noise", "bootstrap"]
        assert whole["sensitivity"][0]["source"] == "sweep.yaml"
        assert len(whole["label_noise"]) == 3

    def test_every_key_is_documented(self, page: Page) -> None:
        documented = (Path(__file__).parents[1] / "docs/report.md").read_text()
        section = documented[documented.index("## `summary.json`") :]
        for key in summary(page):
            assert f"`{key}`" in section, key


class TestTables:
    def test_the_whole_record_is_in_the_parquet_file(self, page: Page, folder: Path) -> None:
        table = pd.read_parquet(folder / "trials.parquet")
        assert len(table) == len(page.evidence.records.steps)
        keys = ["variation", "seed", "trial", "epoch"]
        assert not table.duplicated(keys).any()
        assert table["val_metric"].sum() == pytest.approx(page.evidence.records.steps["val_metric"].sum())

    def test_the_csv_file_is_the_table(self, page: Page, folder: Path) -> None:
        table = pd.read_csv(folder / "table.csv")
        assert table["variation"].tolist() == list(FOUR)
        finite = page.evidence.table["best_val"]
        assert table["best_val"].tolist() == pytest.approx(finite.tolist())

    def test_the_latex_table_has_a_row_a_variation(self, folder: Path) -> None:
        text = (folder / "table.tex").read_text()
        body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
        assert body.count(r"\\") == 4
        assert not re.search(r"(?<!\\)[%&_#$](?=\d)", body.replace(" & ", " "))


class TestEscaping:
    NAME = "a<script>alert(1)</script>&_%$#{}~^\\"

    def page(self) -> Page:
        # The spec allows no such name; a file's path and a failure's message can hold anything.
        spec = planted_spec(FOUR, range(2))
        storage = grown_storage(planted_spec(FOUR, range(1)))
        cell = plant_cell(storage, Cell("planted", "asha-baseline", 1), spec)
        failed = planted_trial(0, [], state=TrialState.FAIL, reason=f"ValueError: {self.NAME}")
        storage.create_new_trial(cell, template_trial=failed)
        return Page(gather(storage, spec, f"studies/{self.NAME}.yaml"))

    def test_of_html(self, tmp_path: Path) -> None:
        write_report(self.page(), tmp_path)
        text = (tmp_path / "report.html").read_text()
        assert "<script>alert" not in text
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert Read(text).open == []

    def test_of_latex(self, tmp_path: Path) -> None:
        write_report(self.page(), tmp_path)
        caption = re.search(r"\\caption\{(.*)\}\n", (tmp_path / "table.tex").read_text())
        assert caption is not None
        for special in (
            r"\&",
            r"\_",
            r"\%",
            r"\$",
            r"\#",
            r"\{",
            r"\}",
            r"\textasciitilde{}",
            r"\textbackslash{}",
        ):
            assert special in caption[1]

    def test_of_markdown(self) -> None:
        text = markdown(self.page())
        assert "<script" not in text.replace("\\<script", "")


class TestPartial:
    def write(self, page: Page, folder: Path) -> tuple[str, dict[str, Any]]:
        write_report(page, folder)
        shown = " ".join(Read((folder / "report.html").read_text()).text)
        return shown, json.loads((folder / "summary.json").read_text())

    def test_nothing_yet(self, tmp_path: Path) -> None:
        shown, whole = self.write(Page(gather(InMemoryStorage(), SPEC, "x.yaml")), tmp_path)
        assert "No cell of planted is in the storage yet." in shown
        assert "There is no verdict yet." in shown
        assert whole["comparisons"] == []

    def test_a_first_trial_at_work(self, tmp_path: Path) -> None:
        storage = InMemoryStorage()
        cell = plant_cell(storage, Cell("planted", "asha-ohgw-1step", 0), SPEC)
        running = planted_trial(0, [0.3], warm=True, state=TrialState.RUNNING)
        storage.create_new_trial(cell, template_trial=running)
        shown, whole = self.write(Page(gather(storage, SPEC, "x.yaml")), tmp_path)
        assert "asha-ohgw-1step: seeds 1, 2, 3, 4, 5, 6, 7 of 8 not begun." in shown
        assert whole["primary_target"] is None

    def test_one_seed(self, tmp_path: Path) -> None:
        spec = planted_spec(FOUR, [3])
        shown, whole = self.write(Page(gather(grown_storage(spec), spec, "x.yaml")), tmp_path)
        assert "There is one seed" in shown
        assert "not significant" not in shown
        assert all(c["outcome"] == "undecided" for c in whole["criteria"])

    def test_every_trial_failed(self, tmp_path: Path) -> None:
        spec, storage = planted_spec(FOUR, range(2)), InMemoryStorage()
        for seed in spec.seeds:
            for variation in FOUR:
                cell = plant_cell(storage, Cell("planted", variation, seed), spec)
                failed = planted_trial(0, [], state=TrialState.FAIL, reason="ValueError: no")
                storage.create_new_trial(cell, template_trial=failed)
        shown, whole = self.write(Page(gather(storage, spec, "x.yaml")), tmp_path)
        assert "every trial failed in seeds 0, 1 (ValueError: no)" in shown
        assert [v["T@0.9_mbu"] for v in whole["variations"]] == [None] * 4

    def test_no_finite_accuracy(self, tmp_path: Path) -> None:
        spec, storage = planted_spec(seeds=range(6)), InMemoryStorage()
        for seed in spec.seeds:
            for variation in spec.variations:
                cell = plant_cell(storage, Cell("planted", variation, seed), spec)
                trial = planted_trial(0, [None], warm=variation != "asha-baseline")
                storage.create_new_trial(cell, template_trial=trial)
        shown, _ = self.write(Page(gather(storage, spec, "x.yaml")), tmp_path)
        assert "12 of 12 trials diverged and were pruned." in shown


def test_an_unwritable_folder_is_one_line(page: Page, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"report: .*file.* cannot be written"):
        write_report(page, tmp_path / "file")


def test_a_second_report_replaces_the_first(page: Page, tmp_path: Path) -> None:
    write_report(page, tmp_path)
    write_report(page, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_pdf_without_a_browser_is_one_line(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("kaleido")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-browser"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"--pdf: .*Chromium or Chrome"):
        write_report(page, tmp_path, pdf=True)


def test_cell_figures_are_by_the_names_of_the_cells_studies(page: Page) -> None:
    figures = page.cell_figures()
    assert len(figures) == 34
    assert set(figures["planted/asha-ohgw-1step/seed-0003"]) == {"learning-curves", "workers", "psi-shift"}
    assert "planted/pilot/seed-0100" in figures


@pytest.mark.parametrize("role_of_own", ["clean", "noisy"])
def test_label_noise_is_told_apart_whichever_study_the_report_is_of(role_of_own: str) -> None:
    noise = {"data": "digits", "model": "mlp", "epochs": 27, "validation_images": 360, "label_noise": 0.1}
    clean_spec, noisy_spec = planted_spec(seeds=range(8)), planted_spec(seeds=range(8), task=noise)
    baseline = {s: 1000.0 + 10 * s for s in range(8)}

    def planted(spec: Any, ratio: float) -> Any:
        factor = {"asha-baseline": 1.0, "asha-ohgw-1step": ratio}
        times = {(v, s): (t * f, 5000.0) for s, t in baseline.items() for v, f in factor.items()}
        return gather(planted_storage(times, spec), spec, f"{ratio}.yaml")

    clean, noisy = planted(clean_spec, 0.6), planted(noisy_spec, 0.8)
    own, other = (clean, noisy) if role_of_own == "clean" else (noisy, clean)
    (row,) = Page(own, (Side(other.source, "noise", other),)).noise.to_dict("records")
    assert (row["clean"], row["source"]) == ("0.6.yaml", "0.8.yaml")
    assert row["value"] == pytest.approx((1 - 0.8) / (1 - 0.6))


def test_both_bootstrap_forms_stand_in_verdict_and_note(page: Page) -> None:
    form = "With bootstrap_count 0 (boot.yaml): asha-ohgw-1step"
    assert any(sentence.startswith(form) for sentence in sentences(page))
    assert "With bootstrap\\_count 0 (boot.yaml): asha-ohgw-1step" in markdown(page)


@pytest.mark.slow
def test_a_large_study_is_one_page_of_less_than_8_mb(tmp_path: Path) -> None:
    spec = planted_spec(
        FOUR, range(32), epochs=30, trials=50, scheduler={"min_resource": 30, "reduction_factor": 3}
    )
    records = gather(grown_storage(spec, trials=50, epochs=30, workers=4), spec, "big.yaml")
    assert len(records.records.steps) > 150_000
    write_report(Page(records), tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 8e6
