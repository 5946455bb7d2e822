"""Planted storages; oracle: tables of what was planted."""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
from pathlib import Path

import pytest
from cell_runs import EPOCHS, spec_of
from optuna.trial import TrialState, create_trial
from rich.console import Console

from optuna_ohgw import show_status
from optuna_ohgw.cell_study import load_cell
from optuna_ohgw.cells import cells_of, create_cell
from optuna_ohgw.claims import CELL, DEVICE, ERROR, Pulse, claims_of, workers_study
from optuna_ohgw.history import DECISION, FINAL, RESUMED_FROM, WORKER
from optuna_ohgw.identity import identity
from optuna_ohgw.opening import open_storage
from optuna_ohgw.pairing import PairingReport
from optuna_ohgw.status import Worker, read_status

ELSEWHERE = {"host": "elsewhere", "boot": "b", "pids": "p", "pid": 1, "born": 0.0}


@pytest.fixture
def planted(tmp_path):
    spec = spec_of(
        tmp_path, "asha-promotion", "seeds=[3,4,5,6,7]", "variations=[baseline]", "budget.trials=4"
    )
    storage = open_storage(spec.storage_url, create=True)
    for cell in cells_of(spec)[:4]:
        create_cell(storage, spec, cell, {})
    return spec, storage


def plant(storage, spec, cell, state, value=0.5, span=None, **attributes):
    """Plant a trial that began and ended so many seconds ago; ``decision`` is that at its last epoch."""
    decision = attributes.pop("decision", None)
    now = datetime.datetime.now()
    trial = create_trial(
        state=state,
        value=value if state == TrialState.COMPLETE else None,
        intermediate_values={1: value} if state != TrialState.WAITING else {},
        user_attrs=attributes,
        system_attrs={} if decision is None else {f"{DECISION}1": {"action": decision}},
    )
    if state.is_finished():
        trial.datetime_start, trial.datetime_complete = now, now
    if span is not None:
        trial.datetime_start, trial.datetime_complete = (
            None if s is None else now - datetime.timedelta(seconds=s) for s in span
        )
    load_cell(storage, spec, cell).add_trial(trial)


def claim(storage, spec, cell, state=TrialState.RUNNING, **who):
    attributes = {CELL: cell.label, DEVICE: "cpu", **(who or identity())}
    trial = create_trial(
        state=state, user_attrs=attributes, value=0 if state == TrialState.COMPLETE else None
    )
    return storage.create_new_trial(workers_study(storage, spec), trial)


def test_cells_trials_and_workers(planted):
    spec, storage = planted
    done, at_work, given_up, begun, absent = cells_of(spec)
    plant(storage, spec, done, TrialState.COMPLETE, 0.7)
    storage.set_study_user_attr(
        storage.get_study_id_from_name(done.name), FINAL, {"trial": 0, "test_metric": 0.6}
    )
    plant(storage, spec, at_work, TrialState.PRUNED, decision="pause")
    plant(storage, spec, at_work, TrialState.PRUNED, decision="stop")
    plant(storage, spec, at_work, TrialState.RUNNING, **{RESUMED_FROM: 0}, lost_s=2.5)
    plant(storage, spec, at_work, TrialState.FAIL, reason="interrupted", lost_s=9.0)
    plant(storage, spec, given_up, TrialState.FAIL, reason="ValueError: no such thing")
    plant(storage, spec, begun, TrialState.WAITING)
    claim(storage, spec, at_work)
    claim(storage, spec, at_work, **{**identity(), "born": 1.0})  # its process is gone
    claim(storage, spec, begun, **ELSEWHERE)
    failed = claim(storage, spec, given_up)
    storage.set_trial_user_attr(failed, ERROR, "1 of 1 trials failed")
    storage.set_trial_state_values(failed, TrialState.FAIL)
    before = [t.state for t in claims_of(storage, spec)]

    status = read_status(storage, spec, Pulse())
    assert [(c.cell, c.state) for c in status.cells] == [
        (done.label, "done"),
        (at_work.label, "running"),
        (given_up.label, "given up"),
        (begun.label, "running"),
        (absent.label, "waiting"),
    ]
    assert status.counts == {"done": 1, "running": 2, "waiting": 1, "given up": 1}
    own = dict.fromkeys(status.trials, 0)
    assert status.trials == own | {
        "complete": 1,
        "pruned": 1,
        "running": 1,
        "waiting": 1,
        "failed": 1,
        "interrupted": 1,
    }
    assert [(w.host, w.known) for w in status.workers] == [(identity()["host"], True), ("elsewhere", False)]
    assert (status.cells[0].best, status.cells[0].test) == (0.7, 0.6)
    assert status.cells[2].error == "1 of 1 trials failed"
    assert [c.share for c in status.cells] == [1.0, 0.25, 0.25, 0.0, 0.0]
    assert status.share == pytest.approx(0.3)
    assert status.lost_s == 2.5
    assert [t.state for t in claims_of(storage, spec)] == before  # it only read

    told = json.loads(show_status.line(status))
    assert told["trials"] == status.trials
    console = Console(file=io.StringIO(), width=100)
    console.print(show_status.blocks(status))
    shown = console.file.getvalue()
    assert "5 cells: 1 done, 2 running, 1 waiting, 1 given up" in shown
    assert "elsewhere ?" in shown
    assert f"{given_up.label} was given up: 1 of 1 trials failed" in shown
    assert "…" not in shown


def test_an_empty_storage_is_no_error_and_stays_so(planted):
    spec, storage = planted
    before = {s.study_name for s in storage.get_all_studies()}
    status = read_status(storage, spec, Pulse())
    assert (status.share, status.eta_s, status.workers) == (0.0, None, ())
    assert {s.study_name for s in storage.get_all_studies()} == before


def give_up(storage, spec, cell, error):
    failed = claim(storage, spec, cell)
    storage.set_trial_user_attr(failed, ERROR, error)
    storage.set_trial_state_values(failed, TrialState.FAIL)


def shown(status, **options):
    """Return what is printed, in one line, without what its width adds."""
    console = Console(file=io.StringIO(), width=100)
    console.print(show_status.blocks(status, **options), highlight=False)
    return " ".join(console.file.getvalue().split())


MARKED = "no [/a] in [bold]x[/bold], [red], :bell: or \\[link=y]"


def test_what_looks_like_markup_is_shown_as_it_is(planted):
    spec, storage = planted
    give_up(storage, spec, cells_of(spec)[0], MARKED + "\x1b[2J\nend")
    status = read_status(storage, spec, Pulse())
    assert f"seed-0003 was given up: {MARKED} [2J end" in shown(status)
    who = Worker("cell[/x]", "[bold]host", 1, "[/]cpu", 0.0, known=True)
    found = shown(
        dataclasses.replace(status, study="s[i]", workers=(who, dataclasses.replace(who, known=False)))
    )
    assert all(name in found for name in ("s[i]: 5 cells", "cell[/x]", "[bold]host ?", "[/]cpu"))
    cell = dataclasses.replace(status.cells[0], cell="c[/y]")
    assert "c[/y] was given up" in shown(dataclasses.replace(status, cells=(cell,)))


@pytest.mark.parametrize("as_json", [True, False])
def test_a_watched_error_is_shown_as_it_is(planted, as_json):
    spec, storage = planted
    give_up(storage, spec, cells_of(spec)[0], MARKED)
    status = dataclasses.replace(read_status(storage, spec, Pulse()), cells=())  # all of none are done
    status = dataclasses.replace(status, study=MARKED)
    console = Console(file=io.StringIO(), width=1000)
    show_status.watch(lambda: status, console, all_cells=False, as_json=as_json)
    told = console.file.getvalue()
    assert (
        json.loads(told)["study"] if as_json else told.splitlines()[0].partition(": 0 cells")[0]
    ) == MARKED


@pytest.mark.parametrize(
    "text",
    [
        "cannot reach postgresql+psycopg://ohgw:s3cret@db/x",
        "x://u:p@s3cret@h (mysql://v:s3cret@h)",
        "(x) connection to 'host=h password=s3cret' failed",
        "a line\nand postgresql://h/x?user=u&password=s3cret",
    ],
)
def test_no_password_of_an_error_is_shown(planted, text):
    spec, storage = planted
    give_up(storage, spec, cells_of(spec)[0], text)
    status = read_status(storage, spec, Pulse())
    for told in (shown(status), show_status.line(status)):
        assert "***" in told
        assert "s3cret" not in told


GONE = {"born": 1.0}  # of this machine, but no process of it was born then


@pytest.mark.parametrize(
    ("workers", "claims", "marks", "running"),
    [
        # who has a claim on the cell in turn, which claims running trials bear, how many still run
        (2, [{}], [0, None], 2),
        (2, [GONE], [0, None], 0),
        (2, [GONE, {}], [0, 1, None], 2),
        (2, [{}, GONE], [0, 1, None], 2),
        (2, [ELSEWHERE, GONE], [0, 1], 1),
        (2, [GONE], [0, 1], 1),  # claimed since the claims were read
        (2, [], [0, None], 2),  # nobody ever claimed: nothing is known
        (1, [GONE], [0, None], 0),
        (1, [GONE, {}], [0], 1),  # taken over, and not written since
    ],
)
def test_what_a_dead_worker_ran_is_interrupted(planted, workers, claims, marks, running):
    spec, storage = planted
    spec = spec.model_copy(update={"execution": spec.execution.model_copy(update={"workers": workers})})
    cell = cells_of(spec)[0]
    for who in claims:
        claim(storage, spec, cell, **{**identity(), **who})
    for mark in marks:
        plant(storage, spec, cell, TrialState.RUNNING, **({} if mark is None else {WORKER: {"claim": mark}}))
    status = read_status(storage, spec, Pulse())
    assert (status.trials["running"], status.trials["interrupted"]) == (running, len(marks) - running)
    states = [t.state for t in load_cell(storage, spec, cell).get_trials()]
    assert states == [TrialState.RUNNING] * len(marks)  # it only read


def test_a_released_claim_runs_nothing(planted):
    spec, storage = planted
    cell = cells_of(spec)[0]
    claim(storage, spec, cell, TrialState.COMPLETE)
    plant(storage, spec, cell, TrialState.RUNNING, **{WORKER: {"claim": 0}})
    assert read_status(storage, spec, Pulse()).trials["interrupted"] == 1


def test_the_time_left_goes_by_all_cells_and_those_at_work(planted):
    spec, storage = planted
    ended, at_work, given_up, *_ = cells_of(spec)
    for cell, state, began_s, ended_s in (
        (ended, TrialState.COMPLETE, 500, 300),
        (ended, TrialState.COMPLETE, 300, 100),
        (at_work, TrialState.RUNNING, 200, None),
    ):
        plant(storage, spec, cell, state, span=(began_s, ended_s))
    assert read_status(storage, spec, Pulse()).eta_s is None  # nobody works
    claim(storage, spec, at_work)
    give_up(storage, spec, given_up, "no")
    # In 600 s of workers 2 of 4 trials, and of one of 4 an epoch of all. What was given up is not waited for.
    used = 2 / 4 + 1 / EPOCHS / 4
    expected = (4 - used) * 600 / used
    assert read_status(storage, spec, Pulse()).eta_s == pytest.approx(expected, rel=0.02)
    claim(storage, spec, ended)
    assert read_status(storage, spec, Pulse()).eta_s == pytest.approx(expected / 2, rel=0.02)


def test_budget_and_disk_are_told(planted):
    spec, storage = planted
    (spec.folder / "deep").mkdir(parents=True)
    (spec.folder / "deep" / "weights").write_bytes(b"x" * 2_000_000)
    (spec.folder / "elsewhere").symlink_to("/")
    whole = sum(f.stat().st_size for f in spec.folder.rglob("*") if f.is_file() and not f.is_symlink())
    status = read_status(storage, spec, Pulse())
    assert status.disk_bytes == pytest.approx(whole, abs=1000)
    assert status.budget == {"trials": 4}
    assert f"{status.disk_bytes / 1e6:,.1f} MB in the output folder" in shown(status)


def test_an_output_folder_of_another_machine_has_no_size(planted, tmp_path):
    spec, storage = planted
    spec = spec.model_copy(update={"output": tmp_path / "absent"})
    status = read_status(storage, spec, Pulse())
    assert status.disk_bytes is None
    assert "output folder" not in shown(status)


@pytest.mark.parametrize("number", [0, 40, 41, 100])
def test_at_most_forty_workers_are_listed(planted, number):
    spec, storage = planted
    status = read_status(storage, spec, Pulse())
    one = Worker("cell", "host", 4242, "cpu", 0.0, known=True)
    told = shown(dataclasses.replace(status, workers=(one,) * number))
    assert told.count("4242") == min(number, 40)
    assert (f"{number - 40} more workers" in told) == (number > 40)


@pytest.mark.parametrize("pairing", [None, {"intact": True}])
def test_pairing_is_in_the_json_where_it_was_asked_for(planted, pairing):
    spec, storage = planted
    told = json.loads(show_status.line(read_status(storage, spec, Pulse()), pairing))
    assert told.get("pairing") == pairing
    assert ("pairing" in told) == (pairing is not None)


def test_the_docs_name_every_key(planted):
    spec, storage = planted
    claim(storage, spec, cells_of(spec)[0])
    report = PairingReport("paired").as_dict()
    told = json.loads(show_status.line(read_status(storage, spec, Pulse()), report))
    docs = (Path(__file__).parents[1] / "docs" / "studies.md").read_text(encoding="utf-8")
    table = docs.partition("| key of `--json` |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    assert {key.strip(" `") for key, _ in rows} == set(told)
    inner = {key.strip(" `"): meaning for key, meaning in rows}
    for key, part in (("cells", told["cells"][0]), ("workers", told["workers"][0]), ("pairing", report)):
        assert all(f"`{name}`" in inner[key] for name in part), key
