"""Trials that are stopped, killed or lose a checkpoint. Oracle: the trial that nothing happened to."""

from __future__ import annotations

import errno
import io
import logging
import resource
import signal
import time

import optuna
import pandas as pd
import pytest
import safetensors.torch
import torch
from cell_runs import MEASURED, StopAt, courses, in_process, run, spec_of
from optuna.artifacts import FileSystemArtifactStore
from optuna.trial import TrialState

from optuna_ohgw import cell_work, checkpoint, ending, workload
from optuna_ohgw.cell_study import load_cell
from optuna_ohgw.cells import cells_of, config_index, revive
from optuna_ohgw.freezing import epochs
from optuna_ohgw.history import CHECKPOINT, LOST, chain
from optuna_ohgw.metrics import curves
from optuna_ohgw.opening import open_storage
from optuna_ohgw.pairing import check_pairing
from optuna_ohgw.records import read_records
from optuna_ohgw.training import Interrupted

ALWAYS = "execution={workers: 1, cells_at_once: 1, threads: 1, device: cpu, checkpoint_s: 0}"
NEVER = ALWAYS.replace("checkpoint_s: 0", "checkpoint_s: 1000")


class Killed(BaseException):
    """Ends a worker as a kill does: nothing is written any more."""


def kill_at(monkeypatch, *places):
    """Kill the worker once before each (configuration, epoch); return the epochs trained, None at a kill."""
    honest, trained, left = workload.train_epoch, [], list(places)

    def train_epoch(task, state, stop):
        place = state.config_index, state.epoch
        if place in left:
            left.remove(place)
            trained.append(None)
            raise Killed
        trained.append(place)
        return honest(task, state, stop)

    monkeypatch.setattr(workload, "train_epoch", train_epoch)
    return trained


def longest(expected, count):
    """Return the configurations that are trained longest under the baseline, with their epochs."""
    lengths = {index: len(curve["mbu"]) for (v, index), (curve, _) in expected.items() if v == "baseline"}
    return sorted(lengths.items(), key=lambda pair: -pair[1])[:count]


def run_killed(spec):
    """Run a study with a new worker after each kill; return the number of kills."""
    for kills in range(100):
        try:
            run(spec)
        except Killed:
            continue
        return kills
    raise AssertionError("it never ended")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The courses of cells that nothing happens to, by scheduler."""
    known = {}

    def of(name):
        if name not in known:
            spec = spec_of(tmp_path_factory.mktemp(name), name, NEVER)
            run(spec)
            known[name] = courses(spec)
        return known[name]

    return of


SCHEDULERS = ("asha", "asha-promotion", pytest.param("pasha", marks=pytest.mark.slow))
SCHEDULERS += tuple(pytest.param(n, marks=pytest.mark.slow) for n in ("hyperband", "dyhpo"))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_killed_trial_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, whole, name):
    if name == "dyhpo":
        pytest.importorskip("gpytorch")
    expected = whole(name)
    spec = spec_of(tmp_path, name, ALWAYS)
    (first, end), (second, other) = longest(expected, 2)
    places = {(first, 1), (first, 2), (first, end - 1), (second, 0), (second, other - 1)}
    trained = kill_at(monkeypatch, *places)
    assert run_killed(spec) == len(places)
    assert courses(spec) == expected
    # Each epoch once but those in which a kill came: these had not begun.
    done = [epoch for epoch in trained if epoch is not None]
    assert len(done) == sum(len(curve["mbu"]) for curve, _ in expected.values())
    assert not check_pairing(open_storage(spec.storage_url, create=False), spec).faults


def test_without_a_checkpoint_it_begins_anew(tmp_path, monkeypatch, whole):
    spec = spec_of(tmp_path, "asha", NEVER)
    ((config, end),) = longest(whole("asha"), 1)
    trained = kill_at(monkeypatch, (config, end - 1))
    assert run_killed(spec) == 1
    assert courses(spec) == whole("asha")
    assert trained[trained.index(None) + 1] == (config, 0)


@pytest.mark.parametrize("name", ["asha", "asha-promotion"])
@pytest.mark.parametrize("calls", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (9, 14))])
def test_a_stopped_trial_leaves_its_last_whole_epoch(tmp_path, monkeypatch, whole, name, calls):
    spec = spec_of(tmp_path, name, NEVER, "task.batch_size=8")  # of several mini-batches an epoch
    plain = spec_of(tmp_path / "plain", name, NEVER, "task.batch_size=8")
    run(plain)
    run(spec, StopAt(8 * calls + 5))
    stopped = open_storage(spec.storage_url, create=False)
    cut = [
        t
        for cell in cells_of(spec)
        for t in load_cell(stopped, spec, cell).get_trials(deepcopy=False)
        if t.state == TrialState.FAIL
    ]
    assert len(cut) == 1
    last = cut[0].last_step or 0
    assert (cut[0].user_attrs.get(CHECKPOINT) or {"epoch": 0})["epoch"] == last
    trained = kill_at(monkeypatch)
    run(spec)
    assert trained[0] == (cut[0].user_attrs["config_index"], last)
    assert courses(spec) == courses(plain)


def test_what_was_trained_in_vain_is_lost_and_counted_nowhere_else(tmp_path, monkeypatch, whole):
    spec = spec_of(tmp_path, "asha", "variations=[baseline]", NEVER)
    ((config, end),) = longest(whole("asha"), 1)
    kill_at(monkeypatch, (config, end - 1))
    monkeypatch.setattr("optuna_ohgw.trial._FLUSH_SECONDS", -1.0)
    monkeypatch.setattr("optuna_ohgw.storage._SECONDS", -1.0)
    run_killed(spec)
    storage, (cell,) = open_storage(spec.storage_url, create=False), cells_of(spec)
    trials = load_cell(storage, spec, cell).get_trials(deepcopy=False)
    (cut,) = (t for t in trials if t.state == TrialState.FAIL)
    (again,) = (t for t in trials if t.user_attrs.get("retry_of") == cut.number)
    curve = cut.user_attrs["curve"]
    vain = sum(sum(curve[c]) for c in ("train_s", "warm_s", "eval_s"))
    assert vain > 0
    assert again.user_attrs[LOST] == pytest.approx(vain, abs=1e-4)
    table = read_records(storage, spec).trials.set_index("trial")
    assert table["lost_s"][again.number] == again.user_attrs[LOST]
    assert not table["counted"][cut.number]
    assert table[table["counted"]]["lost_s"].sum() == again.user_attrs[LOST]


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def unlink(file):
    file.unlink()


@pytest.mark.parametrize("name", ["asha", "asha-promotion"])
@pytest.mark.parametrize("harm", [truncate, flip, unlink])
@pytest.mark.parametrize("many", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_harmed_checkpoint_is_passed_over(tmp_path, monkeypatch, whole, caplog, name, harm, many):
    """Of two kept checkpoints the last, or both, are: the trial goes on from the other, or its start."""
    spec = spec_of(tmp_path, name, ALWAYS)
    ((config, end),) = longest(whole(name), 1)
    trained = kill_at(monkeypatch, (config, end - 1))
    with pytest.raises(Killed):
        run(spec)
    storage = open_storage(spec.storage_url, create=False)
    found = [
        (cell, t)
        for cell in cells_of(spec)
        for t in load_cell(storage, spec, cell).get_trials(deepcopy=False)
        if t.state == TrialState.RUNNING
    ]
    ((cell, cut),) = found
    kept = list(chain(cut.user_attrs[CHECKPOINT]))
    assert len(kept) == 2
    for made in kept[:many]:
        harm(cell.folder(spec.folder) / "checkpoints" / made["artifact"])
    with caplog.at_level(logging.WARNING, "optuna_ohgw.checkpoint"):
        logging.getLogger("optuna_ohgw").propagate = True
        run(spec)
    assert courses(spec) == whole(name)
    epoch = kept[1]["epoch"] if many == 1 else 0
    assert trained[trained.index(None) + 1] == (cut.user_attrs["config_index"], epoch)
    assert (
        f"goes on from {f'epoch {epoch}' if epoch else 'its start'}: epoch {kept[0]['epoch']}: "
        in caplog.text
    )
    trials = load_cell(storage, spec, cell).get_trials(deepcopy=False)
    fell = next(t.user_attrs[checkpoint.FELL_BACK] for t in trials if checkpoint.FELL_BACK in t.user_attrs)
    assert fell["epoch"] == epoch
    assert len(fell["why"]) == many


def finals(spec):
    """Train the best of the baseline's cell to the end; return its record, what is left and the epochs."""
    cell = cells_of(spec)[0]
    folder = cell.folder(spec.folder)
    for path in folder.glob("trial-*"):
        path.unlink()  # as where another machine has them
    with in_process(spec):
        done = cell_work.finish(cell)
    record = load_cell(open_storage(spec.storage_url, create=False), spec, cell).user_attrs.get("final", {})
    return done, {n: v for n, v in record.items() if n != "seconds"}, folder


@pytest.mark.parametrize("how", ["killed", "stopped", "truncated", "full disk"])
def test_a_final_training_goes_on_from_its_checkpoint(tmp_path, monkeypatch, how):
    calm, spec = (spec_of(tmp_path / n, "asha", ALWAYS if n != "stopped" else NEVER) for n in ("calm", how))
    for one in (calm, spec):
        run(one)
    _, expected, calm_folder = finals(calm)
    assert expected["retrained"]
    if how == "full disk":
        monkeypatch.setattr(ending, "CheckpointStore", lambda folder: FullDisk(folder, 0))
    trained = kill_at(monkeypatch, *([] if how == "stopped" else [(expected["config_index"], 6)]))
    if how == "stopped":
        honest = workload.train_epoch

        def stopped(task, state, stop):
            if state.epoch == 6:
                raise Interrupted
            return honest(task, state, stop)

        with monkeypatch.context() as patch:
            patch.setattr(workload, "train_epoch", stopped)
            assert finals(spec)[0] is False
    else:
        with pytest.raises(Killed):
            finals(spec)
    folder = cells_of(spec)[0].folder(spec.folder)
    if how == "truncated":
        truncate(folder / "final.checkpoint")
    del trained[:]
    done, record, _ = finals(spec)
    assert done
    assert record == expected
    first = 0 if how in ("truncated", "full disk") else 6
    assert [epoch for _, epoch in trained] == list(range(first, spec.task.epochs))
    assert not (folder / "final.checkpoint").exists()
    own, other = (safetensors.torch.load_file(f / "best.safetensors") for f in (folder, calm_folder))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    curves_of = (pd.read_csv(f / "curve.csv")[["epoch", *MEASURED]] for f in (folder, calm_folder))
    pd.testing.assert_frame_equal(*curves_of)


class FullDisk(checkpoint.CheckpointStore):
    """A store that writes half of a file, then has no space left, from the n-th file on."""

    def __init__(self, folder, room):
        super().__init__(folder)
        self.room = room

    def write(self, artifact_id, content_body):
        if self.room == 0:
            (self.folder / artifact_id).write_bytes(content_body.read(100))
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= 1
        super().write(artifact_id, content_body)


@pytest.mark.parametrize("name", ["asha", "asha-promotion"])
def test_a_full_disk_costs_checkpoints_and_no_result(tmp_path, monkeypatch, whole, name):
    made = cell_work._checkpoints
    monkeypatch.setattr(cell_work, "_checkpoints", lambda folder: FullDisk(made(folder).folder, 3))
    spec = spec_of(tmp_path, name, ALWAYS)
    (first, end), (second, other) = longest(whole(name), 2)
    kill_at(monkeypatch, (first, end - 1), (second, other - 1))
    assert run_killed(spec) == 2
    assert courses(spec) == whole(name)
    for cell in cells_of(spec):
        kept = {f.name for f in (cell.folder(spec.folder) / "checkpoints").iterdir()}
        study = load_cell(open_storage(spec.storage_url, create=False), spec, cell)
        trials = study.get_trials(deepcopy=False)
        known = {m["artifact"] for t in trials for m in chain(t.user_attrs.get(CHECKPOINT))}
        assert kept <= known  # no half a file


def test_nothing_is_unpickled_but_tensors(tmp_path):
    """A file that holds code is not run, though its hash is right."""
    import hashlib
    import pickle

    class Code:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    content = pickle.dumps({"epoch": 1, "streams": {}, "parts": {"part": Code()}}, protocol=2)
    (tmp_path / "code").write_bytes(content)
    made = {"artifact": "code", "epoch": 1, "bytes": len(content), "warm_starts": 0, "rungs": 0}
    made |= {"sha256": hashlib.sha256(content).hexdigest(), "previous": None}
    study = optuna.create_study()
    one = study.ask()
    one.set_user_attr(CHECKPOINT, made)
    assert checkpoint.load(one, FileSystemArtifactStore(tmp_path), {"part": torch.Generator()}) == 0
    assert not (tmp_path / "ran").exists()


def test_a_loop_of_ones_own_goes_on_after_a_heartbeats_retry(tmp_path):
    """As Optuna's callback for stale trials queues it: with the attributes of the one that was killed."""
    store = FileSystemArtifactStore(tmp_path)
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    study = optuna.create_study(storage=storage)

    def train(one, until):
        torch.manual_seed(0)
        weights, done = torch.nn.Linear(2, 1), []
        for epoch in epochs(one, 6, store, every_s=0, weights=weights):
            if epoch == until:
                return done
            with torch.no_grad():
                weights.weight += torch.rand(1, 2)
            one.report(float(weights.weight.detach().sum()), epoch)
            done.append(epoch)
        return done

    assert train(study.ask(), 4) == [1, 2, 3]
    optuna.storages.RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(study, study.trials[0])
    assert train(study.ask(), None) == [4, 5, 6]
    assert train(study.ask(), None) == [1, 2, 3, 4, 5, 6]
    assert study.trials[1].intermediate_values == study.trials[2].intermediate_values
    assert [f.name for f in tmp_path.iterdir()] == ["study.db"]  # none is kept at the end


def test_a_worker_that_is_stopped_says_where_it_was(tmp_path):
    spec = spec_of(tmp_path, "asha", "variations=[baseline]", NEVER)
    with in_process(spec, StopAt(5)):
        cell_work.search(cells_of(spec)[0])
    study = load_cell(open_storage(spec.storage_url, create=False), spec, cells_of(spec)[0])
    assert revive(study) == 1
    assert revive(study) == 0


def test_wall_time_has_what_was_kept_of_an_interrupted_trial(tmp_path, monkeypatch, whole):
    """And not what was lost, nor the time between the runs."""
    spec = spec_of(tmp_path, "asha", "variations=[baseline]", ALWAYS)
    ((config, end),) = longest(whole("asha"), 1)
    kill_at(monkeypatch, (config, end - 1))
    with pytest.raises(Killed):
        run(spec)
    time.sleep(1.0)
    run(spec)
    records = read_records(open_storage(spec.storage_url, create=False), spec)
    table = curves(records)
    trials = records.trials
    (cut,) = trials[trials["kept_until"].notna()].to_dict("records")
    assert cut["start"] < cut["kept_until"] < cut["end"]
    counted = trials[trials["counted"]]
    spans = (counted["end"] - counted["start"]).sum() + cut["kept_until"] - cut["start"]
    assert table["cell_wall_s"].max() == pytest.approx(spans, abs=0.02)
    assert (table["cell_wall_s"].diff().dropna() > 0).all()
    assert (table["cell_wall_s"] > 0).all()


def test_a_write_that_is_cut_short_leaves_nothing(tmp_path):
    """On a real limit: the size of a file."""
    store = checkpoint.CheckpointStore(tmp_path / "made")
    store.write("whole", io.BytesIO(b"1" * 1000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.write("cut", io.BytesIO(b"1" * 200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [f.name for f in (tmp_path / "made").iterdir()] == ["whole"]


def test_a_trial_that_is_killed_again_and_again_has_failed(tmp_path, monkeypatch, whole):
    """Where memory does not suffice; one that comes further each time is not given up."""
    ((config, end),) = longest(whole("asha"), 1)
    kill_at(monkeypatch, *[(config, 1)] * 10)
    spec = spec_of(tmp_path / "short", "asha", "variations=[baseline]", NEVER)
    assert run_killed(spec) == 10
    storage, (cell,) = open_storage(spec.storage_url, create=False), cells_of(spec)
    trials = load_cell(storage, spec, cell).get_trials(deepcopy=False)
    own = [t for t in trials if config_index(t, trials) == config]
    assert [t.state for t in own] == [TrialState.FAIL] * 10
    assert [t.user_attrs["reason"] for t in own[:9]] == ["interrupted"] * 9
    assert own[9].user_attrs["reason"] == "killed 10 times in a row; too little memory?"
    assert len({t.user_attrs["config_index"] for t in trials if t.state != TrialState.FAIL}) == 8

    further = [(config, epoch) for epoch in range(1, end) for _ in range(4)]
    assert len(further) > 10
    kill_at(monkeypatch, *further)
    spec = spec_of(tmp_path / "further", "asha", "variations=[baseline]", ALWAYS)
    assert run_killed(spec) == len(further)
    own = courses(spec)
    assert {key: own[key] for key in own} == {k: v for k, v in whole("asha").items() if k[0] == "baseline"}


def test_a_fall_behind_a_warm_start_forgets_it(tmp_path, monkeypatch):
    """Of a trial that is warmed at epoch 4 those of epochs 2 and 6 are kept; the last is lost."""
    rungs = "scheduler={name: asha, min_resource: 4, reduction_factor: 2}"
    run(plain := spec_of(tmp_path / "plain", "asha", NEVER, rungs))
    expected = courses(plain)
    lengths = {
        index: len(c["mbu"]) for (variation, index), (c, _) in expected.items() if variation == "1step"
    }
    config = max(lengths, key=lambda index: lengths[index])
    assert lengths[config] > 6
    spec = spec_of(tmp_path / "own", "asha", ALWAYS, rungs)
    honest, kept = checkpoint.save, {2, 6}

    def save(trial, epoch, *arguments, **options):
        return epoch in kept and honest(trial, epoch, *arguments, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    cells = cells_of(spec)
    with in_process(spec):
        cell_work.search(cells[0])
    kill_at(monkeypatch, (config, 6))
    with in_process(spec), pytest.raises(Killed):
        cell_work.search(cells[1])
    study = load_cell(open_storage(spec.storage_url, create=False), spec, cells[1])
    (cut,) = study.get_trials(states=(TrialState.RUNNING,))
    made = list(chain(cut.user_attrs[CHECKPOINT]))
    assert [(m["epoch"], m["warm_starts"]) for m in made] == [(6, 2), (2, 1)]
    unlink(cells[1].folder(spec.folder) / "checkpoints" / made[0]["artifact"])
    kept |= {3}
    run(spec)
    assert courses(spec) == expected
    trials = study.get_trials()
    (again,) = [t for t in trials if t.user_attrs.get("retry_of") == cut.number]
    curve = cut.user_attrs["curve"]
    vain = sum(sum(curve[column][2:6]) for column in ("train_s", "warm_s", "eval_s"))
    assert again.user_attrs[LOST] == pytest.approx(vain, abs=1e-3)
