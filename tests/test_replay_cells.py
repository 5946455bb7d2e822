"""Oracle: the simulation of the same scheduler on the same curves; times and costs by hand."""

from __future__ import annotations

import io
import math

import numpy as np
import pandas as pd
import pytest
from cell_runs import StopAt, in_process, run
from optuna.trial import TrialState
from rich.console import Console

from optuna_ohgw import cell_work, runner
from optuna_ohgw.cells import cells_of
from optuna_ohgw.claims import Claims
from optuna_ohgw.errors import UserError
from optuna_ohgw.evidence import gather
from optuna_ohgw.metrics import curves, times
from optuna_ohgw.opening import open_storage
from optuna_ohgw.pairing import check_pairing
from optuna_ohgw.progress import show_progress
from optuna_ohgw.records import read_records
from optuna_ohgw.replays import export
from optuna_ohgw.schedulers import SCHEDULERS, Settings
from optuna_ohgw.simulation import simulate
from optuna_ohgw.spec import load_spec
from optuna_ohgw.tasks.replay import courses_of

EPOCHS, CONFIGS = 9, 20
NAMES = [name for name in SCHEDULERS if name != "full"]
STUDY = """
name: replayed
task: {{name: replay, data: {data}, epochs: 9}}
space: {{lr: {{low: 1.0e-4, high: 1.0, log: true}}}}
scheduler: {{name: asha, min_resource: 1, reduction_factor: 3, bootstrap_count: 0}}
variations: [baseline, ohgw-1step]
seeds: [0, 1]
targets: [0.9]
budget: {{trials: 20}}
execution: {{device: cpu}}
output: {output}
"""


def table_of(**columns):
    """Return curves of 20 configurations for two warm starts and two seeds, as an export has them."""
    rows = []
    for variation in ("hyperband-baseline", "hyperband-ohgw-1step"):
        for seed in (0, 1):
            rng = np.random.default_rng((seed, len(variation)))
            drawn = np.random.default_rng(seed).uniform(1e-4, 1, CONFIGS)
            for index in range(CONFIGS):
                end = rng.random()
                curve = np.clip(end * (1 - 0.7 ** np.arange(1, EPOCHS + 1)) + 0.1 * rng.random(EPOCHS), 0, 1)
                warm = variation.endswith("1step")
                rows.append(
                    {
                        "variation": variation,
                        "seed": seed,
                        "config_index": index,
                        "val_metric": curve.round(4).tolist(),
                        "suggested_lr": drawn[index],
                        "trained_lr": drawn[index] * (1.0 - 0.01 * warm),
                        "batches_per_epoch": 7.0,
                        "warm_mbu": 2.0 * warm,
                        "warm_s": 0.5 * warm,
                        "epoch_s": 1.0,
                        **columns,
                    }
                )
    return pd.DataFrame(rows)


@pytest.fixture
def study(tmp_path):
    def load(*overrides, table=None):
        data = tmp_path / "curves.parquet"
        (table_of() if table is None else table).to_parquet(data)
        file = tmp_path / "study.yaml"
        file.write_text(STUDY.format(data=data, output=tmp_path / "run"))
        return load_spec(file, overrides)

    return load


def reached_of(spec):
    storage = open_storage(spec.storage_url, create=False)
    trials = read_records(storage, spec).trials
    counted = trials[trials["counted"]]
    return {
        key: dict(zip(own["config_index"], own["epochs"], strict=True))
        for key, own in counted.groupby(["variation", "seed"])
    }


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_cell_does_what_the_simulation_does(study, name, workers):
    spec = study(f"scheduler.name={name}", f"task.workers={workers}", "warm_start.eta_h=0.1")
    run(spec)
    found = reached_of(spec)
    settings = Settings(EPOCHS, maximize=True, configs=CONFIGS)
    for cell in cells_of(spec):
        known = courses_of(spec, cell)
        # Launched with no time between: only where warm starts take none do epochs end together.
        if workers > 1 and known[0].warm_s:
            continue
        own = [k.curve for k in known]
        simulated = simulate(
            SCHEDULERS[name](settings), own, range(CONFIGS), workers=workers, resumes_last=True
        )
        assert found[cell.variation, cell.seed] == simulated.final_resources()


def test_times_and_costs_are_those_of_the_table(study):
    spec = study("scheduler.min_resource=9")
    run(spec)
    records = read_records(open_storage(spec.storage_url, create=False), spec)
    reached = times(curves(records), records, [0.5]).set_index(["variation", "seed"])
    for cell in cells_of(spec):
        known = courses_of(spec, cell)
        place = next(i for i, k in enumerate(known) if max(k.curve) >= 0.5)
        first = next(e for e, v in enumerate(known[place].curve, 1) if v >= 0.5)
        epochs, warm = EPOCHS * place, cell.variation.endswith("1step") * (place + 1)
        row = reached.loc[(cell.variation, cell.seed)]
        assert row["mbu"] == pytest.approx(7 * (epochs + first) + 2 * warm)
        for clock in ("device_s", "wall_s"):
            assert row[clock] == pytest.approx(epochs + first + 0.5 * warm)
    trials = records.trials
    warmed = trials[trials["variation"] == "asha-ohgw-1step"]
    assert (warmed["warm_starts"] == 1).all()
    assert np.allclose(warmed["trained_lr"], 0.99 * warmed["suggested_lr"])


def test_two_simulated_workers_halve_the_time(study):
    spans = []
    for workers in (1, 2):
        spec = study("scheduler.min_resource=9", f"task.workers={workers}", f"name=w{workers}")
        run(spec)
        table = curves(read_records(open_storage(spec.storage_url, create=False), spec))
        own = table[table["variation"] == "asha-baseline"]
        spans.append(own.groupby("seed")["cell_wall_s"].max().tolist())
    assert spans == [[180.0, 180.0], [90.0, 90.0]]


def test_the_whole_command_with_its_report_and_pairs(study, tmp_path):
    spec = study("scheduler.name=pasha", "task.workers=3")
    console = Console(file=io.StringIO())
    assert runner.run(spec, console)
    assert not runner.run(spec, console)
    storage = open_storage(spec.storage_url, create=False)
    report = check_pairing(storage, spec)
    assert (report.faults, report.trials) == ([], 4 * CONFIGS)
    evidence = gather(storage, spec, "study.yaml", None)
    assert evidence.records.cells["finished"].all()
    assert evidence.records.cells["final_test"].isna().all()
    # What it exports replays the same.
    export(evidence.records, tmp_path / "again.parquet")
    again = study(f"task.data={tmp_path / 'again.parquet'}", "name=again", "scheduler.name=pasha")
    for cell, other in zip(cells_of(spec), cells_of(again), strict=True):
        before, after = courses_of(spec, cell), courses_of(again, other)
        for one, two in zip(before, after, strict=True):
            assert two.curve == one.curve[: len(two.curve)]
            assert (two.suggested, two.trained, two.batches, two.warm_mbu) == (
                one.suggested,
                one.trained,
                one.batches,
                one.warm_mbu,
            )


def test_a_replay_that_was_stopped_begins_its_cell_anew(study):
    spec = study("scheduler.name=asha-promotion", "variations=[baseline]", "seeds=[0]")
    run(spec)
    whole = reached_of(spec)
    broken = study("scheduler.name=asha-promotion", "variations=[baseline]", "seeds=[0]", "name=b")
    with in_process(broken, StopAt(25)):
        cell_work.search(cells_of(broken)[0])
    assert reached_of(broken) != whole
    runner.run(broken, Console(file=io.StringIO()))
    assert reached_of(broken) == whole


def test_a_cell_that_is_gone_while_it_is_made_anew_is_in_nobodys_way(study):
    """A worker deletes it and is killed; others, and whoever shows progress, look on."""
    spec = study("scheduler.name=asha-promotion", "variations=[baseline]", "seeds=[0]")
    (cell,) = cells_of(spec)
    with in_process(spec):
        storage = open_storage(spec.storage_url, create=False)
        claims = Claims(storage, spec, "cpu")
        with show_progress(storage, spec, claims, Console(file=io.StringIO())) as view:
            dead = Claims(storage, spec, "cpu").take()
            view.look()
            storage.delete_study(storage.get_study_id_from_name(cell.name))
            assert view.look() == []
            storage.set_trial_state_values(dead.trial_id, TrialState.FAIL)
            assert claims.may_need_me()
            assert claims.take() is not None
            cell_work.search(cell, claims)
            assert cell_work.finish(cell)
            assert view.look() == [cell]
    assert len(next(iter(reached_of(spec).values()))) == CONFIGS


def test_a_curve_that_ends_or_diverges_ends_its_trial(study):
    table = table_of()
    table.at[0, "val_metric"] = [0.99, 0.99]
    table.at[1, "val_metric"] = [0.5, math.nan] + [0.5] * 7
    spec = (
        study("scheduler.name=full-length", table=table)
        if False
        else study("scheduler.min_resource=9", "variations=[baseline]", "seeds=[0]", table=table)
    )
    run(spec)
    trials = read_records(open_storage(spec.storage_url, create=False), spec).trials
    assert trials["reason"][0] == "the table ends at epoch 2"
    assert trials["reason"][1] == "diverged in epoch 2: no value in the table"
    assert trials["state"].tolist()[:3] == ["PRUNED", "PRUNED", "COMPLETE"]


def test_a_plain_table_is_drawn_by_seed(study):
    plain = table_of()[["val_metric"]]
    spec = study("variations=[baseline]", "space.lr=0.1", "budget.trials=80", table=plain)
    run(spec)
    for cell in cells_of(spec):
        order = np.random.RandomState(1000 + cell.seed).permutation(80)
        drawn = [list(plain["val_metric"][row]) for row in order]
        assert [k.curve for k in courses_of(spec, cell)] == drawn
        simulated = simulate(
            SCHEDULERS["asha"](Settings(EPOCHS, maximize=True)), drawn, range(80), resumes_last=True
        )
        assert reached_of(spec)[cell.variation, cell.seed] == simulated.final_resources()


def test_a_chooser_has_the_suggestions_as_its_pool(study):
    pytest.importorskip("gpytorch")
    spec = study("scheduler.name=dyhpo", "budget.epochs=40", "seeds=[0]", "variations=[ohgw-1step]")
    run(spec)
    for own in reached_of(spec).values():
        assert sum(own.values()) == 40


WRONG = [
    (("task.data=nowhere.parquet",), None, "task.data: nowhere.parquet does not exist"),
    (("task.value=loss",), None, "task.value: .* has no column 'loss'; columns of lists: .*val_metric"),
    (("seeds=[0, 5]",), None, "task.data: .* has no seed 5"),
    (("variations=[baseline, ohgw-3step]",), None, "no rows of asha-ohgw-3step/seed-0000"),
    (("pilot_seeds=[1000]",), None, "has no seed 1000"),
    (("budget.trials=21",), None, "budget.trials: 21 but .* has 20 configurations for asha-baseline"),
    (("task.value=epoch_s",), None, "task.value: column 'epoch_s' of .* holds 1.0, no curve"),
    (("task.skip=9",), None, "has nothing after 9 skipped entries; lower task.skip"),
    (("space.lr.high=0.5",), None, "space.lr: .* give a range that holds all"),
    (("space.momentum={low: 0, high: 0.9}",), None, "space.momentum: .* leave the name out"),
    ((), table_of(val_metric=[2.0] * 9), "is no accuracy from 0 to 1; of losses use"),
    (
        (),
        table_of()[["val_metric", "trained_lr"]].rename(columns={"trained_lr": "lr"}),
        "knows no warm start",
    ),
    ((), table_of(config_index=3), "config_index of asha-baseline/seed-0000 is not 0, 1, 2"),
]


@pytest.mark.parametrize(("overrides", "table", "words"), WRONG, ids=[w[2][:30] for w in WRONG])
def test_a_wrong_table_is_told_before_anything_is_made(study, tmp_path, overrides, table, words):
    spec = study(*overrides, table=table)
    with pytest.raises(UserError, match=words):
        runner.run(spec, Console(file=io.StringIO()))
    assert not (tmp_path / "run" / "study.db").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "execution.workers=2",
            "execution.workers: 2 processes in a cell; a replay has one",
        ),
        ("sampler=tpe", "sampler: 'tpe' draws nothing in a replay"),
        ("budget.wall_hours=1", "budget.wall_hours: a replay has a simulated clock"),
        ("space.model={choices: [a, b]}", "space.model: choices are not replayed"),
        ("task.model=mlp", 'task.model: unknown key with value "mlp"; known: epochs, name, data'),
        ("task.epochs=null", "task.epochs: got null; give a whole number"),
        ("task.workers=0", "task.workers: got 0; give a number greater than 0"),
        ("task.name=replays", 'task.name: got "replays"'),
    ],
)
def test_a_wrong_spec_is_told(study, override, words):
    with pytest.raises(UserError, match=words):
        study(override)


def test_a_study_on_images_becomes_a_replay_in_one_line(tmp_path, study):
    study()
    digits = tmp_path / "digits.yaml"
    digits.write_text("extends: base.yaml\ntask: {name: replay, data: x.parquet, epochs: 9}\n")
    base = STUDY.format(data="x", output="y").replace(
        "task: {name: replay, data: x, epochs: 9}",
        "task: {data: digits, model: mlp, epochs: 27, validation_images: 99}",
    )
    (tmp_path / "base.yaml").write_text(base)
    assert load_spec(digits).task.model_dump() == {
        "name": "replay",
        "data": "x.parquet",
        "epochs": 9,
        "value": "val_metric",
        "skip": 0,
        "workers": 1,
    }
