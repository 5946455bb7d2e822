"""A replay under the study's own scheduler must be the study; on tables, what counting gives."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from optuna.trial import TrialState
from planted import RANGES, planted_spec
from typer.testing import CliRunner

from optuna_ohgw.cell_study import load_cell
from optuna_ohgw.cells import cells_of, create_cell
from optuna_ohgw.cli import app
from optuna_ohgw.errors import UserError
from optuna_ohgw.opening import open_storage
from optuna_ohgw.records import read_records
from optuna_ohgw.replays import comparison, export, over_study, over_tables, read_candidates, read_table
from optuna_ohgw.schedulers import SCHEDULERS, Settings
from optuna_ohgw.simulation import finite_curves, simulate

STUDY = """
name: planted
task: {data: digits, model: mlp, epochs: 27, validation_images: 360}
space:
  lr: {low: 1.0e-4, high: 1.0, log: true}
  momentum: {low: 0.0, high: 0.99}
  magnitude: {low: 0.0, high: 10.0}
scheduler: {min_resource: 3, reduction_factor: 3, bootstrap_count: 2}
variations: [asha-baseline, asha-ohgw-1step]
seeds: [0, 1]
targets: [0.9]
budget: {trials: 16}
output: OUTPUT
"""


def accuracies(variation: str, seed: int, index: int) -> list[float]:
    rng = np.random.default_rng((len(variation), seed, index))
    return (rng.random() * (1 - np.exp(-np.arange(1, 28) / 5)) + 0.05 * rng.random(27)).round(4).tolist()


@pytest.fixture
def grown(tmp_path: Path):
    """Return a study run by its own sampler and pruner, with planted accuracies, and its storage."""
    spec = planted_spec(seeds=(0, 1), output=str(tmp_path / "out"))
    return spec, grow(spec, accuracies)


def grow(spec, values):
    """Run a study by its own sampler and pruner, with planted values; return its storage."""
    spec.folder.mkdir()
    storage = open_storage(spec.storage_url, create=True)
    for cell in cells_of(spec):
        create_cell(storage, spec, cell, {})
        study = load_cell(storage, spec, cell)
        for index in range(16):
            trial = study.ask()
            for name, r in spec.ranges.items():
                trial.suggest_float(name, r.low, r.high, log=r.log)
            trial.set_user_attr("config_index", index)
            curve, state = values(cell.variation, cell.seed, index), TrialState.COMPLETE
            for epoch, value in enumerate(curve, start=1):
                trial.report(value, epoch)
                if epoch < 27 and trial.should_prune():
                    state = TrialState.PRUNED
                    break
            seen = curve[:epoch]
            columns = {c: [1.0] * epoch for c in ("train_s", "warm_s", "eval_s", "train_loss", "val_loss")}
            steps = {"mbu": list(range(1, epoch + 1)), "wall": [1e9 + e for e in range(epoch)]}
            trial.set_user_attr("curve", {**columns, **steps, "val_metric": seen})
            study.tell(trial, spec.metric.best(seen) if state == TrialState.COMPLETE else None, state)
    return storage


def test_the_studys_own_scheduler_repeats_it_to_the_epoch(grown) -> None:
    spec, storage = grown
    records = read_records(storage, spec)
    runs = over_study(records, ["asha"], workers=1, target=0.7).set_index(["variation", "seed"])
    steps = records.steps.groupby(["variation", "seed"])
    assert len(runs) == 4
    assert runs["slices"].to_dict() == steps.size().to_dict()
    assert runs["best"].to_dict() == steps["val_metric"].max().to_dict()
    assert (runs["beyond"] == 0).all()
    assert runs["slices"].min() > 16 * 3  # some went on beyond the first rung
    for key, own in steps:
        first = next((i for i, v in enumerate(own["val_metric"], start=1) if v >= 0.7), math.inf)
        assert runs.loc[key, "time_to_target"] == first


def test_where_lower_is_better_the_studys_own_scheduler_repeats_it_too(tmp_path: Path) -> None:
    spec = planted_spec(
        seeds=(0, 1),
        target=130.0,
        output=str(tmp_path / "out"),
        task={"name": "language", "data": "python", "epochs": 27},
        space={"lr": RANGES["lr"]},
    )
    storage = grow(spec, lambda *key: [100 * (2 - value) for value in accuracies(*key)])
    records = read_records(storage, spec)
    runs = over_study(records, ["asha"], workers=1, target=130.0).set_index(["variation", "seed"])
    steps = records.steps.groupby(["variation", "seed"])
    assert runs["slices"].to_dict() == steps.size().to_dict()
    assert runs["best"].to_dict() == steps["val_metric"].min().to_dict()
    assert (runs["beyond"] == 0).all()
    for key, own in steps:
        first = next((i for i, v in enumerate(own["val_metric"], start=1) if v <= 130.0), math.inf)
        assert runs.loc[key, "time_to_target"] == first


def test_a_study_that_knows_all_is_asked_under_other_rungs(tmp_path: Path) -> None:
    spec = planted_spec(
        seeds=(0, 1),
        output=str(tmp_path / "out"),
        scheduler={"min_resource": 27, "reduction_factor": 3, "bootstrap_count": 0},
    )
    records = read_records(grow(spec, accuracies), spec)
    asked = {"workers": 1, "target": 0.7}
    assert set(over_study(records, ["pasha"], **asked)["slices"]) == {16 * 27}  # its own only rung
    runs = over_study(records, ["asha-promotion"], rungs={"min_resource": 1}, **asked)
    assert (runs["beyond"] == 0).all()
    settings = Settings(27, min_resource=1, reduction_factor=3, maximize=True, configs=16)
    for _, run in runs.iterrows():
        curves = [accuracies(run["variation"], run["seed"], index) for index in range(16)]
        alone = simulate(
            SCHEDULERS["asha-promotion"](settings), curves, range(16), workers=1, resumes_last=True
        )
        assert run["slices"] == alone.slices < 16 * 27
    with pytest.raises(UserError, match=r"--min-resource: 28 is more than task.epochs, which is 27"):
        over_study(records, ["asha"], rungs={"min_resource": 28}, **asked)


def test_a_scheduler_that_wants_more_than_is_known_says_so(grown) -> None:
    spec, storage = grown
    records = read_records(storage, spec)
    (run,) = (
        over_study(records, ["full"], workers=1, target=0.7)
        .query("variation == 'asha-baseline' and seed == 0")
        .itertuples()
    )
    lengths = records.steps.query("variation == 'asha-baseline' and seed == 0").groupby("config_index").size()
    assert run.beyond == (lengths < 27).sum()
    assert run.slices == lengths.sum()


def test_a_study_exports_its_curves_and_trained_values(grown, tmp_path: Path) -> None:
    spec, storage = grown
    export(read_records(storage, spec), tmp_path / "curves.parquet")
    table = pd.read_parquet(tmp_path / "curves.parquet")
    assert len(table) == 4 * 16
    for row in table.itertuples():
        known = accuracies(row.variation, row.seed, row.config_index)
        assert list(row.val_metric) == known[: len(row.val_metric)]
    assert {f"trained_{name}" for name in RANGES} <= set(table.columns)


def table_file(path: Path, rows: int = 60, length: int = 10, *, first: float = 9.0) -> np.ndarray:
    rng = np.random.default_rng(rows)
    curves = rng.random((rows, 1)) + 0.2 * rng.random((rows, length))
    lists = [[first, *curve] for curve in curves.tolist()]
    pd.DataFrame({"lr": rng.random(rows), "loss": lists}).to_parquet(path)
    return curves


def test_a_table_is_read_without_what_is_before_the_first_epoch(tmp_path: Path) -> None:
    curves = table_file(tmp_path / "t.parquet")
    assert (read_table(tmp_path / "t.parquet", "loss", 1) == curves).all()
    assert read_table(tmp_path / "t.parquet", "loss").shape == (60, 11)


def test_full_training_costs_everything_and_returns_the_best(tmp_path: Path) -> None:
    curves = table_file(tmp_path / "t.parquet")
    settings = Settings(max_resource=1, configs=20)
    runs = over_tables({"t": curves}, ["full", "asha-promotion"], settings, seeds=3, workers=2)
    full = runs[runs["scheduler"] == "full"]
    assert (full["slices"] == 200).all()
    assert (full["makespan"] == 100).all()
    assert (full["selection_regret"] == 0).all()
    assert full["best_drawn"].all()
    assert (runs["regret"] >= runs["selection_regret"]).all()
    # The draw is the same for all schedulers: their best drawn is.
    drawn = (runs["regret"] - runs["selection_regret"]).round(12).groupby(runs["seed"]).nunique()
    assert (drawn == 1).all()
    (row,) = comparison(full).to_dict("records")
    assert (row["slices"], row["reached_end"], row["best_drawn"], row["runs"]) == (200, 20, 1.0, 3)


def test_times_are_those_of_the_first_value_among_the_best_final_ones() -> None:
    curves = np.array([[5.0, 4.0], [1.0, 3.0], [2.0, 1.5]] + [[9.0, 9.0 + i] for i in range(37)])
    settings = Settings(max_resource=1, configs=40)
    (run,) = over_tables({"t": curves}, ["full"], settings, seeds=1, workers=40).itertuples()
    assert (run.t5, run.t1) == (1.0, 1.0)  # 5% of 40: 3.0 and better; 1%: 1.5; both at 1.0 after a slice
    (run,) = over_tables({"t": curves[:, 1:]}, ["full"], settings, seeds=1, workers=40).itertuples()
    assert (run.t5, run.t1) == (1.0, 1.0)
    (run,) = over_tables({"t": 4 - curves}, ["full"], settings, seeds=1, workers=40).itertuples()
    assert run.t1 == 2.0  # lower is better still: 4 - 45 comes at the second slice


@pytest.mark.parametrize("sign", [1, -1])
def test_what_diverged_counts_as_the_worst_of_the_table(sign: int) -> None:
    nan, inf = math.nan, math.inf
    curves = sign * np.array([[1.0, nan, 0.5], [3.0, 2.0, 1.0], [inf, 0.0, 0.0]])
    expected = sign * np.array([[1.0, 3.0, 3.0], [3.0, 2.0, 1.0], [3.0, 3.0, 3.0]])
    assert (finite_curves(curves, maximize=sign < 0) == expected).all()


def test_reports_come_in_the_order_of_launch_before_the_free_are_given_work() -> None:
    curves = [[3.0, 3.0], [1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]
    replay = simulate(
        SCHEDULERS["asha-promotion"](Settings(2, reduction_factor=2)), curves, range(4), workers=2
    )
    # Both report at 1; then the better is promoted and a third is started; at 2 they report in that
    # order, the promoted one is done, and the third (of 1.0 2.0 3.0 it meets the median) goes on.
    assert list(zip(replay.times, replay.configs, replay.resources, strict=True)) == [
        *((1, 0, 1), (1, 1, 1)),
        *((2, 1, 2), (2, 2, 1)),
        *((3, 2, 2), (3, 3, 1)),
    ]
    assert (replay.slices, replay.makespan, replay.returned()) == (6, 3, 1)


def run_command(*arguments: str):
    return CliRunner().invoke(app, ["replay", *arguments], catch_exceptions=True)


def test_the_command_on_a_study_and_on_tables(grown, tmp_path: Path) -> None:
    spec, _ = grown
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.replace("OUTPUT", str(spec.folder)))
    done = run_command(
        str(file), "--scheduler", "pasha", "--scheduler", "asha", "--export", str(tmp_path / "c.parquet")
    )
    assert done.exit_code == 0, done.output
    for word in ("pasha", "asha-baseline", "asha-ohgw-1step", "beyond", "0/32", "c.parquet"):
        assert word in done.output
    for name in ("one", "two"):
        table_file(tmp_path / f"{name}.parquet")
    tables = [str(tmp_path / f"{n}.parquet") for n in ("one", "two")]
    options = ("--value", "loss", "--skip", "1", "--minimize", "--seeds", "2", "--configs", "20")
    done = run_command(*tables, *options)
    assert done.exit_code == 0, done.output
    assert "2 tables × 2 seeds" in done.output
    assert "fewer than" not in done.output
    few = run_command(*tables, *options[:-1], "5000")
    assert "fewer than 5000" in few.output
    assert all(name in done.output for name in SCHEDULERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.parquet"], "x.parquet: does not exist; name a parquet file"),
        (["t.parquet"], "column 'val_metric' cannot be read"),
        (["t.parquet", "--value", "loss", "--skip", "11"], "11 to 11 entries, 11 of them skipped"),
        (["ragged.parquet"], "curves of 'val_metric' have 1 to 2 entries"),
        (["t.parquet", "--scheduler", "asah"], "--scheduler: 'asah' is unknown; use some of asha, "),
        (["t.parquet", "--export", "x.parquet"], "--export: is for the curves of a study"),
        (["t.parquet", "--set", "seeds=2"], "--set: is for a study, not for tables; drop it"),
        (["t.parquet", "--smoke"], "--smoke: is for a study, not for tables; drop it"),
        (["t.parquet", "a.yaml"], "got 2 files; name one study file, or parquet tables alone"),
        (["bad.parquet"], "cannot be read"),
        (["t.parquet", "--value", "lr"], "t.parquet: column 'lr' holds 0."),
        (["null.parquet"], "column 'val_metric' holds None in row 1, no curve; name one of lists"),
        (["empty.parquet"], "empty.parquet: has no rows; name a table of learning curves"),
        (["alike.parquet"], "alike: at least half of the final values are the best one, 0.1, so no regret"),
        (["nan.parquet"], "nan: no value is a number"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table_file(Path("t.parquet"))
    pd.DataFrame({"val_metric": [[1.0], [1.0, 2.0]]}).to_parquet("ragged.parquet")
    Path("bad.parquet").write_text("no parquet")
    others = {"null": [[1.0], None], "empty": [], "alike": [[0.1], [0.1], [0.0]], "nan": [[math.nan]] * 3}
    for name, curves in others.items():
        pd.DataFrame({"val_metric": curves}).to_parquet(f"{name}.parquet")
    done = run_command(*arguments)
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_every_scheduler_is_made_from_the_same_settings() -> None:
    curves = np.random.default_rng(0).random((12, 9))
    for (name, make), up in itertools.product(SCHEDULERS.items(), (False, True)):
        replay = simulate(make(Settings(9, 1, 3, 1, up, 12)), curves, range(12), workers=3)
        assert len(replay.started) == 12, name


def test_candidates_are_the_columns_that_differ_in_the_unit_cube(tmp_path):
    table = pd.DataFrame(
        {
            "lr": [1e-4, 1e-2, 1.0],
            "decay": [-1.0, 0.0, 3.0],
            "same": [2.0, 2.0, 2.0],
            "gap": [1.0, np.nan, 2.0],
            "name": ["a", "b", "c"],
            "curve": [[1.0], [2.0], [3.0]],
        }
    )
    table.to_parquet(tmp_path / "t.parquet")
    assert read_candidates(tmp_path / "t.parquet") == pytest.approx(
        np.array([[0.0, 0.0], [0.5, 0.25], [1.0, 1.0]])
    )
    table[["same", "name", "curve"]].to_parquet(tmp_path / "none.parquet")
    with pytest.raises(UserError, match="no column of hyper-parameters"):
        read_candidates(tmp_path / "none.parquet")


@pytest.mark.parametrize("name", ["bohb", "boil", "dyhpo"])
def test_a_model_chooses_within_its_slices(name):
    pytest.importorskip("gpytorch")
    x = np.linspace(0, 1, 30)[:, None]
    curves = (x - 0.4) ** 2 + 1 / np.arange(1, 10)
    settings = Settings(max_resource=1, configs=20)
    options = {"seeds": 1, "workers": 2, "slices": 40, "candidates": {"t": x}}
    runs, again = (over_tables({"t": curves}, [name], settings, **options) for _ in range(2))
    assert runs.equals(again)
    assert 40 <= runs["slices"].item() <= 41
    assert runs["selection_regret"].item() < 0.2
