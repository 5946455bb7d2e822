"""Evidence to files: one HTML page that opens offline, JSON, parquet, CSV, LaTeX and PDF figures."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from optuna.storages import BaseStorage

from optuna_ohgw.beside import sides
from optuna_ohgw.errors import UserError
from optuna_ohgw.evidence import evidence_of, gather
from optuna_ohgw.report.blocks import results, sections
from optuna_ohgw.report.page import Page
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.version import __version__

if TYPE_CHECKING:
    import plotly.graph_objects as go

SCHEMA, SCHEMA_VERSION = "optuna-ohgw/summary", 1


def open_page(storage: BaseStorage, spec: StudySpec, source: Path, *, smoke: bool = False) -> Page:
    """Return what a report shows of a study and of those beside it, from their storages."""
    evidence = gather(storage, spec, source)
    beside = tuple(sides(spec, evidence.pilot, smoke=smoke))
    pilots = [
        s.evidence.pilot for s in beside if s.evidence is not None and s.evidence.spec.task == spec.task
    ]
    if not spec.pilot_seeds and any(pilots):
        evidence = evidence_of(evidence.records, evidence.source, next(filter(None, pilots)))
    return Page(evidence, beside)


def report_study(
    storage: BaseStorage, spec: StudySpec, source: Path, *, smoke: bool = False, pdf: bool = False
) -> tuple[Page, list[Path]]:
    """Write the report of a study into ``report/`` of its output folder; return page and files."""
    page = open_page(storage, spec, source, smoke=smoke)
    return page, write_report(page, spec.folder / "report", pdf=pdf)


def write_report(page: Page, folder: Path, *, pdf: bool = False) -> list[Path]:
    """Write everything of a report; return the files.

    ``report.html`` (self-contained), ``summary.json``, ``trials.parquet``, ``table.csv``,
    ``table.tex``, and with ``pdf`` each figure under ``figures/``. Each file replaces that of an
    earlier report at once, so that a reader never finds half of one.

    Args:
        page: What is to be shown.
        folder: Where; made if absent.
        pdf: Export the figures too; needs the ``pdf`` extra and a Chromium or Chrome.

    Raises:
        UserError: If the folder cannot be written, or figures cannot be exported.
    """
    evidence = page.evidence
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [
            _write(folder / "report.html", html(page).encode()),
            _write(folder / "summary.json", json.dumps(summary(page), indent=1, allow_nan=False).encode()),
            _write(folder / "table.csv", evidence.table.to_csv(index=False).encode()),
            _write(folder / "table.tex", table_tex(page).encode()),
        ]
        part = folder / "trials.parquet.partial"
        evidence.records.tidy().to_parquet(part, index=False)
        files.append(part.replace(folder / "trials.parquet"))
    except OSError as error:
        raise UserError(
            f"report: {folder} cannot be written ({error.strerror}); "
            "name another output folder by --set output=FOLDER"
        ) from None
    return [*files, *(_export(page.figures, folder / "figures") if pdf else [])]


def html(page: Page) -> str:
    """Return the page: self-contained, plotly.js included, everything that users named escaped."""
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    template = resources.files("optuna_ohgw.report").joinpath("template.html").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        name=page.evidence.spec.name,
        subtitle=page.subtitle(),
        sections=sections(page),
        plotly_js=get_plotlyjs(),
    )


def summary(page: Page) -> dict[str, Any]:
    """Return what ``summary.json`` holds: plain values, None for what is not known or infinite."""
    evidence = page.evidence
    whole: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "optuna_ohgw": __version__,
        "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "study": evidence.spec.name,
        "source": evidence.source,
        "spec": evidence.spec.identity(),
        "metric": {"name": evidence.spec.metric.name, "maximize": evidence.spec.metric.maximize},
        "environment": evidence.records.environment,
        "seeds": list(evidence.spec.seeds),
        "targets": evidence.targets,
        "pilot_target": evidence.pilot,
        "primary_target": evidence.primary,
        "primary_budget": "mbu",
        "verdict": evidence.sentences,
        "missing": evidence.missing,
        "variations": evidence.table,
        "comparisons": evidence.comparisons,
        "criteria": evidence.verdicts,
        "cells": evidence.cells,
        "times": evidence.times,
        "psi_shift": page.shift,
        "psi_divergence": page.divergence,
        "gradient_benefit": page.correlation,
        "sensitivity": page.sensitivity_summary(),
        "label_noise": page.noise,
        "beside": [
            {
                "source": side.source,
                "role": side.role,
                "absent": side.absent,
                "comparisons": side.evidence.comparisons if side.evidence else None,
                "verdict": side.evidence.sentences if side.evidence else None,
            }
            for side in page.sides
        ],
    }
    return {key: _plain(value) for key, value in whole.items()}


def table_tex(page: Page) -> str:
    """Return the results as a LaTeX table (booktabs), one row a variation, names escaped."""
    block = results(page.evidence)
    columns = block["columns"]
    table = pd.DataFrame(block["rows"], columns=columns)
    form = "l" + "r" * (len(columns) - 1)
    caption = f"{page.evidence.spec.name}: {page.subtitle()}"
    return str(
        table.style.hide(axis="index")
        .format(escape="latex")
        .format_index(axis=1, escape="latex")
        .to_latex(hrules=True, column_format=form, caption=_latex(caption))
    )


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, rf"\{c}" if c in "&%$#_{}" else c) for c in text)


def _export(figures: Mapping[str, go.Figure], folder: Path) -> Iterator[Path]:
    try:
        import kaleido  # noqa: F401
    except ImportError:
        raise UserError(
            "--pdf: the package kaleido is not installed; pip install 'optuna-ohgw[pdf]'"
        ) from None
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        file = folder / f"{name}.pdf"
        try:
            figure.write_image(file, width=figure.layout.width or 900, height=figure.layout.height or 560)
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--pdf: {file.name} could not be drawn ({first}); install Chromium or Chrome, "
                "or give its path in the environment variable BROWSER_PATH"
            ) from None
        yield file


def _write(path: Path, content: bytes) -> Path:
    part = path.with_name(path.name + ".partial")
    part.write_bytes(content)
    return part.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, pd.DataFrame):
        return [_plain(row) for row in value.to_dict("records")]
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
