"""The blocks of a report in the order of reading: sentences, notes, tables, figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from optuna_ohgw.report import notes

if TYPE_CHECKING:
    from optuna_ohgw.evidence import Evidence
    from optuna_ohgw.report.page import Page

Block = dict[str, Any]
BUDGETS = {"mbu": "mini-batch units", "device_s": "device", "wall_s": "wall-clock"}
COMPARED = [
    "variation",
    "against",
    "bootstrap",
    "target",
    "pairs",
    "faster : slower : unknown",
    "censored / other's",
    "median / other's",
    "restricted mean / other's",
    "ratio [95%]",
    "p (Holm)",
    "sign test",
]
_SIGNS = {"pass": "✓", "fail": "✗", "undecided": "?"}


def sections(page: Page) -> list[Block]:
    """Return the sections of a page: title, id and blocks."""
    evidence = page.evidence
    missing = [_lines(evidence.missing, "missing")] if evidence.missing else []
    parts: dict[str, list[Block]] = {
        "Verdict": [
            _lines(sentences(page), ""),
            *missing,
            criteria(evidence),
            _note(notes.CRITERIA),
        ],
        "Time to target": [
            results(evidence),
            _note(f"{notes.RESULTS} {_rule(evidence)}"),
            _figure(page, "best-value"),
            _figure(page, "paired-times"),
            _figure(page, "survival-of-times"),
            *_compared(page),
            _note(notes.PAIRS),
        ],
        "Cost": [costs(evidence), _figure(page, "overhead"), _note(notes.COST)],
        "What moved": [
            _figure(page, "psi-shift"),
            _frame("Moves of ψ by the warm start", page.shift),
            _frame("Divergence of configurations", page.divergence),
            _figure(page, "gradient-benefit"),
            _frame("Rank correlation of hyper-gradient size and benefit", page.correlation),
            _note(notes.MOVED),
        ],
        "Sensitivity": _sensitivity(page),
        "Trials": [_figure(page, name) for name in ("survival", "learning-curves", "workers")],
        "Where it comes from": [
            _table("", ["", "value"], _origin(evidence), text=("value",)),
            _note(notes.FILES),
        ],
    }
    return [
        {"title": title, "id": title.lower().replace(" ", "-"), "blocks": blocks}
        for title, blocks in parts.items()
    ]


def sentences(page: Page) -> list[str]:
    """Return the verdict in words, that of the other bootstrap forms beside it."""
    own = page.evidence.sentences or ["There is no verdict yet."]
    return own + [
        f"With bootstrap_count {one.spec.scheduler.bootstrap_count} ({one.source}): {sentence}"
        for one in page.with_role("bootstrap")
        for sentence in one.sentences
    ]


def results(evidence: Evidence) -> Block:
    """Return the table of what was reached: medians [quartiles] over seeds, one row a variation."""
    columns = ["variation", "finished"]
    for target in evidence.targets:
        columns += [f"T@{target:.4g} (mbu)", f"reached {target:.4g}"]
    columns += ["best validation", "test", "AUC"]
    rows = []
    for row in evidence.table.to_dict("records"):
        cells = [row["variation"], f"{row['finished']}/{row['cells']}"]
        for target in evidence.targets:
            key = f"{target:.6g}"
            cells += [number(row[f"T@{key}_mbu"], ",.0f"), f"{row[f'reached@{key}']}/{row['cells']}"]
        rows.append(
            [*cells, *(_quartiles(row, name, ".3f") for name in ("best_val", "final_test", "auc_mbu"))]
        )
    return _table("", columns, rows)


def costs(evidence: Evidence) -> Block:
    """Return the table of what it cost: medians over seeds, one row a variation."""
    memory = {"peak_ram": "peak RAM", "peak_vram": "peak VRAM", "peak_nvml": "VRAM by the driver"}
    memory = {
        name: head
        for name, head in memory.items()
        if name in evidence.table and evidence.table[name].notna().any()
    }
    columns = ["variation", "overhead, mbu", "overhead, seconds", "overhead, FLOPs", *memory.values()]
    rows = [
        [
            row["variation"],
            *(number(row[f"overhead_{unit}"], ".1%") for unit in ("mbu", "s", "flops")),
            *(_bytes(row[name]) for name in memory),
            *(str(row[name]) for name in ("trials", "pruned", "failed")),
        ]
        for row in evidence.table.to_dict("records")
    ]
    return _table("", [*columns, "trials", "pruned", "failed"], rows)


def criteria(evidence: Evidence) -> Block:
    """Return the table of the published criteria, one row a variation and criterion."""
    columns = ["variation", "what is asked", "figure [95%]", "pairs", "outcome", "why"]
    rows = [
        [
            row["variation"],
            row["what"],
            f"{number(row['figure'], '+.1%')}{_ends(row['low'], row['high'], '+.1%')}",
            str(row["n"]),
            f"{_SIGNS[row['outcome']]} {row['outcome']}",
            row["why"],
        ]
        for row in evidence.verdicts.to_dict("records")
    ]
    return _table("Published criteria", columns, rows, text=("what is asked", "why"))


def markdown(page: Page) -> str:
    """Return verdict, gaps and the main tables as Markdown, for the dashboard's note."""
    evidence = page.evidence
    lines = [f"# {_plain(evidence.spec.name)}: does a warm start pay?", "", _plain(page.subtitle()), ""]
    lines += [f"- {_plain(sentence)}" for sentence in sentences(page)]
    if evidence.missing:
        lines += ["", "## What is missing", "", *(f"- {_plain(line)}" for line in evidence.missing)]
    for title, block in (
        ("Medians over seeds", results(evidence)),
        ("Published criteria", criteria(evidence)),
    ):
        head = [_plain(column) for column in block["columns"]]
        lines += ["", f"## {title}", "", _row(head), _row(["---"] * len(head))]
        lines += [_row([_plain(value) for value in row]) for row in block["rows"]]
    return "\n".join(lines)


def number(value: float, form: str) -> str:
    """Return a number in a format, a dash for what is not finite."""
    return format(value, form) if math.isfinite(value) else "–"


def _compared(page: Page) -> list[Block]:
    blocks = []
    for budget, name in BUDGETS.items():
        shown = [page.evidence, *page.with_role("bootstrap")]
        unit, scale = "", 1.0
        if budget != "mbu":
            long = max((one.comparisons["horizon"].max() for one in shown if len(one.comparisons)), default=0)
            unit, scale = (" hours", 3600.0) if long > 3600 else (" seconds", 1.0)
        rows = [row for one in shown for row in _comparison_rows(one, budget, scale)]
        blocks.append(_table(f"In pairs, {name}{unit}", COMPARED, rows, folded=budget != "mbu"))
    absent = [side.absent for side in page.sides if side.role == "bootstrap" and side.absent]
    return blocks + [_note(f"The other bootstrap form is not shown: {why}.") for why in absent]


def _comparison_rows(evidence: Evidence, budget: str, scale: float) -> list[list[str]]:
    """Return the rows of one study, those of the verdict's target first."""
    table = evidence.comparisons[evidence.comparisons["budget"] == budget]
    table = table.assign(other=table["target"] != evidence.primary).sort_values("other", kind="stable")
    rows, form = [], ",.0f" if budget == "mbu" else ",.1f"
    for r in table.to_dict("records"):
        floor = r["p_floor_holm"] if math.isfinite(r["p_floor_holm"]) else 1.0
        rows.append(
            [
                *(r["variation"], r["against"], str(evidence.spec.scheduler.bootstrap_count)),
                f"{r['target']:.4g}{'' if r['other'] else ' (verdict)'}",
                str(r["pairs"]),
                f"{r['faster']} : {r['slower']} : {r['unknown']}",
                f"{r['censored']} / {r['reference_censored']}",
                f"{number(r['km_median'] / scale, form)} / {number(r['km_median_reference'] / scale, form)}",
                f"{number(r['rmst'] / scale, form)} / {number(r['rmst_reference'] / scale, form)}",
                f"{number(r['ratio'], '.2f')}{_ends(r['ratio_low'], r['ratio_high'], '.2f')}",
                number(r["p_holm"], ".3g") if r["enough"] else f"too few (≥ {floor:.2g})",
                number(r["p_sign"], ".3g"),
            ]
        )
    return rows


def _sensitivity(page: Page) -> list[Block]:
    blocks = [_figure(page, name) for name in page.figures if name.startswith("eta-sensitivity")]
    for role, what in (("eta", "η_h sweep"), ("noise", "label noise")):
        absent = [side.absent for side in page.sides if side.role == role and side.absent]
        blocks += [_note(f"No {what}: {why}.") for why in absent]
        if not absent and not page.with_role(role):
            blocks.append(_note(f"No study of {what} is named under 'beside' in {page.evidence.source}."))
    if len(page.noise):
        columns = ["variation", "noisy study", "speed-up kept [95%]", "why"]
        rows = []
        for r in page.noise.to_dict("records"):
            share = f"{number(r['value'], '.0%')}{_ends(r['low'], r['high'], '.0%')}"
            rows.append([r["variation"], r["source"], share, r["why"]])
        blocks.append(_table("Speed-up kept under label noise", columns, rows, text=("why",)))
    return blocks


def _rule(evidence: Evidence) -> str:
    if not evidence.spec.pilot_seeds and evidence.pilot is None:
        return "The verdict is on the first of the study's targets."
    star = f" ({evidence.pilot:.4g})" if evidence.pilot is not None else ""
    whose = "the" if evidence.spec.pilot_seeds else "another study's"
    return (
        f"The verdict is on τ*{star}, the hardest target that 90% of {whose} pilot's baseline-only seeds "
        "reach: it is fixed before any warm start is seen."
    )


def _origin(evidence: Evidence) -> list[list[str]]:
    spec, environment = evidence.spec, evidence.records.environment
    versions = environment.get("versions", {})
    warm = spec.warm_start
    halving = spec.scheduler.model_dump(exclude={"name"}).items()
    return [
        ["study file", evidence.source],
        ["task", spec.task.summary],
        ["scheduler", f"{spec.scheduler.name}, " + ", ".join(f"{key} {value}" for key, value in halving)],
        ["warm start", f"η_h {warm.eta_h:g}, horizon {warm.horizon}, {warm.estimator}"],
        ["seeds", ", ".join(map(str, spec.seeds))],
        ["pilot seeds", ", ".join(map(str, spec.pilot_seeds)) or "none"],
        ["device", str(environment.get("device", "–"))],
        ["versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "–"],
        ["commit", str(environment.get("commit") or "–")],
    ]


def _figure(page: Page, name: str) -> Block:
    config = {"displaylogo": False, "responsive": True, "toImageButtonOptions": {"filename": name}}
    html = page.figures[name].to_html(
        full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=config
    )
    return {"kind": "figure", "html": html}


def _lines(lines: list[str], tone: str) -> Block:
    return {"kind": "lines", "lines": lines, "tone": tone}


def _note(text: str) -> Block:
    return {"kind": "note", "text": text}


def _table(
    title: str,
    columns: list[str],
    rows: list[list[str]],
    text: tuple[str, ...] = (),
    *,
    folded: bool = False,
) -> Block:
    whole = {"title": title, "columns": columns, "rows": rows, "text": text, "folded": folded}
    return {"kind": "table", **whole}


def _frame(title: str, table: pd.DataFrame) -> Block:
    if table.empty:
        return _note(f"{title}: nothing to show, no trial has been moved.")
    rows = [[_text(value) for value in row] for row in table.itertuples(index=False)]
    return _table(title, [str(column).replace("_", " ") for column in table.columns], rows, folded=True)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return number(value, ".3g")
    return "–" if value is None else str(value)


def _ends(low: float, high: float, form: str) -> str:
    return f" [{number(low, form)}, {number(high, form)}]" if math.isfinite(low) else ""


def _quartiles(row: Mapping[Any, Any], name: str, form: str) -> str:
    if not math.isfinite(row[name]):
        return "–"
    return f"{row[name]:{form}} [{row[f'{name}_q1']:{form}}–{row[f'{name}_q3']:{form}}]"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if math.isfinite(value) else "–"


def _row(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"


def _plain(text: str) -> str:
    for character in "\\`*_[]<>|#$&~":
        text = text.replace(character, f"\\{character}")
    return text
