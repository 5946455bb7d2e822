"""The benchmarks: their sums against closed forms, and their copies of the loop against the loop."""

from __future__ import annotations

import datetime
import itertools
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial
from torch import nn
from typer.testing import CliRunner

from optuna_ohgw.bench import BENCHMARKS, extrapolated, plain
from optuna_ohgw.bench.account import (
    BETWEEN,
    CHANGE,
    CLOSE,
    INSIDE,
    PARTS,
    SEARCH,
    START,
    TRAINING,
    WAITING,
    CellTime,
    RunTime,
    TrialTime,
    account,
    overhead,
    times_of,
)
from optuna_ohgw.bench.at_once import Job, trials_per_hour
from optuna_ohgw.bench.bound import Bound, saved_bytes
from optuna_ohgw.bench.cases import DIGITS, Case, resnet20
from optuna_ohgw.bench.clock import Spread, fastest, interleaved, ratios
from optuna_ohgw.bench.copies import fill_cell, fill_storage, forget, newest
from optuna_ohgw.bench.extrapolated import STUDY_PARTS, Part, Trials, device_hours, halved, part_hours
from optuna_ohgw.bench.growth import by_cells, by_trials, with_same_training
from optuna_ohgw.bench.parts import (
    AUGMENTATION,
    BACKWARD,
    FORWARD,
    OPTIMIZER,
    STATE,
    STORAGE,
    WARM_START,
    Parts,
    TimedTask,
    full_epoch,
    shares,
    timed_epoch,
    timed_parts,
)
from optuna_ohgw.bench.parts import PARTS as EPOCH_PARTS
from optuna_ohgw.bench.plain import bare_epoch, plain_epoch
from optuna_ohgw.bench.searches import Search, in_turns
from optuna_ohgw.bench.study import digits_study
from optuna_ohgw.cells import RETRY_OF, Cell, cells_of, check_cells, config_index, create_cell
from optuna_ohgw.cli import app
from optuna_ohgw.opening import open_storage
from optuna_ohgw.spec import load_spec
from optuna_ohgw.spec_tasks import AugmentationSpec
from optuna_ohgw.training import TrainState, train_epoch
from optuna_ohgw.trial import variation_settings

CPU = torch.device("cpu")
STUDY = Path(__file__).parents[1] / "studies" / "digits.yaml"
SMALL = replace(DIGITS, epochs=4, pictures=80)
# BatchNorm has buffers, which a multilayer perceptron has not.
RESNET = Case(
    "resnet",
    "resnet20",
    batch_size=16,
    epochs=4,
    size=8,
    channels=3,
    pictures=40,
    augmentation=AugmentationSpec(crop_padding=1, cutout=4),
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_spread_is_median_and_range() -> None:
    spread = Spread.of([0.25, 0.5, 0.125])
    assert spread == Spread(0.25, 0.125, 0.5)
    assert spread.text() == "0.25 (0.12–0.50)"
    assert spread.text(".0%") == "25% (12–50)"


def test_ratios_are_of_the_same_round() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


def test_the_fastest_has_the_smallest_median() -> None:
    assert fastest({"a": [1.0, 5.0, 5.0], "b": [2.0, 2.0, 90.0], "c": [3.0, 3.0, 3.0]}) == "b"


def test_forms_are_timed_in_turns_after_rounds_that_do_not_count() -> None:
    called: list[str] = []
    forms = {name: lambda name=name: called.append(name) for name in "ab"}
    times = interleaved(forms, CPU, 3, unmeasured=2)
    assert "".join(called) == "ab" * 5
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("flops", "traffic", "seconds", "limit"),
    [(100.0, 10.0, 10.0, "arithmetic"), (20.0, 15.0, 7.5, "memory"), (40.0, 8.0, 4.0, "arithmetic")],
)
def test_the_bound_is_the_longer_of_computing_and_moving(
    flops: float, traffic: float, seconds: float, limit: str
) -> None:
    bound = Bound(flops, traffic, rate=10.0, bandwidth=2.0)
    assert bound.seconds == seconds
    assert bound.limit == limit


class Tiny:
    """A perceptron 4-3-2 of which a mini-batch of 5 keeps what can be counted by hand."""

    device = CPU

    def __init__(self) -> None:
        self._network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

    def network(self):
        return self._network

    def warm_batches(self, seed, config_index, rung):
        return lambda position: (torch.ones(5, 4), torch.zeros(5, 2))

    def prepare(self, inputs):
        return inputs

    def training_loss(self, output, target, label_smoothing):
        return output.square().sum()


def test_saved_bytes_counts_each_activation_once_and_no_weight() -> None:
    task = Tiny()
    weights = {n: p.detach().clone() for n, p in task.network().named_parameters()}
    velocity = {n: torch.zeros_like(p) for n, p in weights.items()}
    state = TrainState(weights, {}, velocity, {"label_smoothing": 0.0}, 0, 1, 0, 0)
    # The first layer's input; ReLU's output, which is the second layer's input too; the square's input.
    assert saved_bytes(task, state) == 4 * 5 * (4 + 3 + 2)


def test_trials_an_hour() -> None:
    # 2 processes × 3 trials × 10 epochs in a minute, of which 2 × 5 make a trial: 6 trials a minute.
    assert trials_per_hour(Job(2, 10, fused=3), 60.0, scale=2.0, trial_epochs=5) == pytest.approx(360.0)


def test_of_nested_parts_only_the_inner_one_is_charged(monkeypatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("optuna_ohgw.bench.parts.time", SimpleNamespace(perf_counter=lambda: clock.now))
    parts = Parts(CPU)
    with parts.part(FORWARD):
        clock.now += 1
        with parts.part(AUGMENTATION):
            clock.now += 10
        clock.now += 100
    clock.now += 1000  # outside of all parts
    with parts.part(FORWARD):
        clock.now += 10000
    assert {n: s for n, s in parts.seconds.items() if s} == {FORWARD: 10101.0, AUGMENTATION: 10.0}


@pytest.mark.parametrize("case", [SMALL, RESNET], ids=["mlp", "resnet20"])
def test_the_clocked_epoch_is_the_real_one_bit_for_bit(case: Case) -> None:
    task = case.task(CPU)
    timed, state = TimedTask(task), case.state(task)
    for _ in range(2):  # the second one starts with momentum
        want, _ = train_epoch(task, state)
        got = timed_epoch(timed, state)
        assert got.epoch == want.epoch
        assert got.psi == want.psi
        for name, tensor in want.tensors().items():
            assert torch.equal(got.tensors()[name], tensor), name
        state = want
    charged = {name for name, seconds in timed.parts.seconds.items() if seconds > 0}
    assert charged >= {AUGMENTATION, FORWARD, BACKWARD, OPTIMIZER, STATE}


def test_the_plain_epoch_changes_the_weights_of_its_own_network(monkeypatch) -> None:
    task = SMALL.task(CPU)
    state, made = SMALL.state(task), []
    own = plain.own_network
    monkeypatch.setattr(plain, "own_network", lambda *a: made.append(own(*a)) or made[-1])
    plain_epoch(task, state, 0)()
    moved = dict(made[0].named_parameters())
    for name, weight in task.network().named_parameters():
        assert not torch.equal(moved[name], weight), name
        assert torch.equal(weight, state.weights[name])


def test_the_bare_epoch_only_computes(monkeypatch) -> None:
    task = SMALL.task(CPU)
    state, made, sizes = SMALL.state(task), [], []
    own = plain.own_network
    monkeypatch.setattr(plain, "own_network", lambda *a: made.append(own(*a)) or made[-1])
    epoch = bare_epoch(task, state, torch.contiguous_format)
    made[0].register_forward_hook(lambda network, inputs, output: sizes.append(len(output)))
    epoch()
    assert sizes == [32, 32, 16]
    for name, weight in made[0].named_parameters():
        assert torch.equal(weight, state.weights[name])
        assert weight.grad is not None


def test_shares_sum_to_one() -> None:
    got = shares({"a": 1.0, "b": 3.0, "c": 0.0})
    assert got == {"a": 0.25, "b": 0.75, "c": 0.0}


def test_a_full_epoch_has_more_pictures_and_its_share_of_what_a_trial_does_once() -> None:
    full = full_epoch(dict.fromkeys(EPOCH_PARTS, 6.0), scale=4.0, epochs=3, warm_starts=2.0)
    assert full.pop(WARM_START) == 4.0
    assert full.pop(STORAGE) == 2.0
    assert full.pop(STATE) == 6.0
    assert set(full.values()) == {24.0}


def test_the_parts_of_each_repeat_are_timed_at_an_epoch_of_its_own() -> None:
    task, seen = SMALL.task(CPU), []

    def states():
        for state in SMALL.states(task):
            seen.append(state.epoch)
            yield state

    measured = timed_parts(task, states(), repeats=2, epochs=3)
    assert seen == [0, 1, 2]  # the first does not count
    assert len(measured) == 2
    assert all(seconds > 0 for parts in measured for seconds in parts.values())
    assert [tuple(parts) for parts in measured] == [EPOCH_PARTS] * 2


def test_the_states_of_a_case_draw_anew_and_stay_within_the_schedule() -> None:
    task = SMALL.task(CPU)
    states = list(itertools.islice(SMALL.states(task), 6))
    assert [s.epoch for s in states] == [0, 1, 2, 3, 0, 1]
    orders = [task._draws(s.seed, s.config_index, s.epoch)[0] for s in states[:4]]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(orders))


@pytest.mark.skipif(not STUDY.exists(), reason="the study files are not installed with the package")
@pytest.mark.parametrize(("case", "study"), [(DIGITS, "digits.yaml"), (resnet20(), "cifar10.yaml")])
def test_a_case_is_augmented_and_halved_as_its_study(case: Case, study: str) -> None:
    spec = load_spec(STUDY.with_name(study))
    assert case.augmentation == spec.task.augmentation
    assert (case.epochs, case.batch_size) == (spec.task.epochs, spec.task.batch_size)


@pytest.mark.skipif(not STUDY.exists(), reason="the study files are not installed with the package")
def test_the_halving_is_that_of_the_study() -> None:
    spec = load_spec(STUDY.with_name("cifar10.yaml"))
    same = halved(
        epochs=spec.task.epochs,
        min_resource=spec.scheduler.min_resource,
        reduction_factor=spec.scheduler.reduction_factor,
        bootstrap_count=spec.scheduler.bootstrap_count,
        budget_epochs=300.0,
    )
    assert halved(budget_epochs=300.0) == same


def test_the_mean_trial_under_halving() -> None:
    # Every trial stopped at the first rung; none tested at all.
    assert halved(epochs=9, bootstrap_count=50, budget_trials=50) == Trials(1.0, 1.0)
    assert halved(epochs=9, min_resource=9, budget_trials=5) == Trials(9.0, 1.0)
    # Half go on for the one epoch after the first rung, about half a trial more of many that start early.
    many = halved(epochs=2, reduction_factor=2, bootstrap_count=0, budget_trials=400)
    assert many.epochs == many.rungs == pytest.approx(1.5, abs=0.02)


def test_the_study_is_its_epochs_and_what_its_trials_cost_besides(monkeypatch) -> None:
    monkeypatch.setattr(extrapolated, "halved", lambda **_: Trials(epochs=4.0, rungs=1.5))
    monkeypatch.setattr(extrapolated, "AROUND_SECONDS", 0.5)
    # 2 cells × 100 epochs, 50 trials.
    assert part_hours(Part(2, 1.0, 100), 3.0, 2.0) == pytest.approx((600 + 50 * 2.5) / 3600)
    assert part_hours(Part(2, 0.0, 100), 3.0, 2.0) == pytest.approx((600 + 50 * 0.5) / 3600)
    assert part_hours(Part(2, 1.0, 100, every_rung=True), 3.0, 2.0) == pytest.approx((600 + 50 * 3.5) / 3600)
    assert part_hours(Part(2, 1.0, 100, trials=False), 3.0, 2.0) == pytest.approx(600 / 3600)
    search = device_hours([1.0, 3.0, 2.0], 2.0, 4.0)["search, 4 variations × 32 seeds"]
    assert search.median == pytest.approx(128 * 2500 * (2.0 + 3.0 / 4) / 4 / 3600)
    assert (search.low, search.high) == pytest.approx(
        (128 * 2500 * (1.0 + 3.0 / 4) / 4 / 3600, 128 * 2500 * (3.0 + 3.0 / 4) / 4 / 3600)
    )


# Two workers over 20 s, from 100 to 120. Of each trial 1 s is training.
#
#   worker 1: start-up 3, x 2, gap 0.5, x 2.5, end of x with 1 of final training 2, y 2, end of y 1
#   worker 2: start-up 4, z 3, end of z 1.5
RUN = RunTime(
    began=100.0,
    ended=120.0,
    trials=[
        TrialTime("y", 1, 110.0, 112.0, 1.0),
        TrialTime("x", 1, 103.0, 105.0, 1.0),
        TrialTime("z", 2, 104.0, 107.0, 1.0),
        TrialTime("x", 1, 105.5, 108.0, 1.0),
    ],
    cells={"x": CellTime(109.0, 1.0), "y": CellTime(113.0, 0.0), "z": CellTime(108.5, 0.0)},
)


def test_the_parts_of_a_run_add_up_to_all_of_its_time() -> None:
    got = account(RUN, 2)
    assert got == {
        TRAINING: 5.0,
        START: 3.0 + 4.0,
        BETWEEN: 0.5,
        INSIDE: 1.0 + 1.5 + 1.0 + 2.0,
        CHANGE: (110.0 - 108.0) + 1.0 + 1.5 - 1.0,
        WAITING: 113.0 - 108.5,
        CLOSE: 2 * 7.0,
    }
    assert sum(got.values()) == 2 * 20.0
    assert overhead(got) == pytest.approx(40.0 / 5.0 - 1)
    # From a worker's first trial to the end of its last cell: 103 to 113 and 104 to 108.5.
    assert overhead(got, SEARCH) == pytest.approx((10.0 + 4.5) / 5.0 - 1)


def test_a_worker_without_a_trial_waits() -> None:
    got = account(RUN, 3)
    assert got[WAITING] == account(RUN, 2)[WAITING] + 13.0
    assert sum(got.values()) == 3 * 20.0
    assert tuple(got) == PARTS


def test_times_are_read_from_storage_and_folder(tmp_path: Path) -> None:
    spec = digits_study(tmp_path).model_copy(
        update={"seeds": (3,), "pilot_seeds": (), "variations": ("asha-baseline",)}
    )
    (cell,) = cells_of(spec)
    storage = open_storage(spec.storage_url, create=True)
    create_cell(storage, spec, cell, {})
    study = optuna.load_study(study_name=cell.name, storage=storage)
    start = datetime.datetime(2026, 5, 1, 12)
    curve = {"train_s": [1.0, 2.0], "warm_s": [0.5, 0.0], "eval_s": [0.25, None], "mbu": [45, 90]}
    trial = create_trial(value=0.5, user_attrs={"worker": {"pid": 7}, "curve": curve})
    trial.datetime_start, trial.datetime_complete = start, start + datetime.timedelta(seconds=4.5)
    study.add_trial(trial)
    study.add_trial(create_trial(state=TrialState.WAITING))
    study.set_user_attr("final", {"seconds": 1.5})
    began = start.timestamp()
    label = "asha-baseline/seed-0003"

    want = [TrialTime(label, 7, began, began + 4.5, 3.75)]
    assert times_of(spec) == (want, {label: CellTime(began + 4.5, 1.5)})

    (folder := cell.folder(tmp_path)).mkdir(parents=True)
    (folder / "curve.csv").touch()
    os.utime(folder / "curve.csv", (began + 6, began + 6))
    assert times_of(spec)[1] == {label: CellTime(began + 6.0, 1.5)}


@pytest.mark.skipif(not STUDY.exists(), reason="the study files are not installed with the package")
def test_the_study_is_that_of_the_study_file(tmp_path: Path) -> None:
    assert digits_study(tmp_path) == load_spec(STUDY, (f"output={tmp_path}",)).model_copy(
        update={"beside": ()}
    )


def filled(tmp_path: Path, trials: int):
    spec = digits_study(tmp_path).model_copy(update={"seeds": (0, 1), "pilot_seeds": ()})
    storage = open_storage(spec.storage_url, create=True)
    first = cells_of(spec)[0]
    create_cell(storage, spec, first, {})
    study = optuna.load_study(study_name=first.name, storage=storage)
    low = optuna.distributions.FloatDistribution(0, 1)
    for i in range(trials):
        value = (i + 1) / 10
        study.add_trial(
            create_trial(
                value=value,
                params={"momentum": value},
                distributions={"momentum": low},
                intermediate_values={1: value, 2: value},
                user_attrs={"config_index": i},
                system_attrs={"completed_rung_0": value, "other": value},
            )
        )
    return spec, storage, study


def test_a_cell_is_filled_with_copies_of_its_trials(tmp_path: Path) -> None:
    spec, storage, study = filled(tmp_path, 3)
    create_cell(storage, spec, cells_of(spec)[1], {})
    fill_cell(storage, study._study_id, 8)
    trials = optuna.load_study(study_name=study.study_name, storage=storage).trials
    assert [t.number for t in trials] == list(range(8))
    assert [t.params["momentum"] for t in trials] == [0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1, 0.2]
    assert [t.user_attrs.get(RETRY_OF) for t in trials] == [None, None, None, 0, 1, 2, 0, 1]
    assert [t.user_attrs["config_index"] for t in trials] == [0, 1, 2, 0, 1, 2, 0, 1]
    for trial in trials:
        assert trial.state == TrialState.COMPLETE
        assert trial.values == [0.0]
        assert trial.intermediate_values == {1: 0.0, 2: 0.0}
        assert trial.system_attrs["completed_rung_0"] == 0.0
        assert trial.system_attrs["other"] == trial.params["momentum"]
    study.ask()
    trials = study.get_trials(deepcopy=False)
    assert config_index(trials[-1], trials) == 3  # as if there were no copies


def test_a_storage_is_filled_with_copies_of_a_cell(tmp_path: Path) -> None:
    spec, storage, study = filled(tmp_path, 2)
    first, *others = cells_of(spec)
    fill_storage(storage, study._study_id, others)
    assert len(check_cells(storage, spec)) == 8
    names = ("params", "intermediate_values", "user_attrs", "system_attrs", "values", "state")
    want = [tuple(getattr(t, n) for n in names) for t in study.trials]
    for cell in others:
        copy = optuna.load_study(study_name=cell.name, storage=storage)
        assert (copy.user_attrs["variation"], copy.user_attrs["seed"]) == (cell.variation, cell.seed)
        assert copy.direction == study.direction
        assert copy.metric_names == study.metric_names
        assert [tuple(getattr(t, n) for n in names) for t in copy.trials] == want
    assert study.user_attrs["seed"] == first.seed


def test_what_came_later_is_forgotten(tmp_path: Path) -> None:
    spec, storage, study = filled(tmp_path, 3)
    kept, mark = contents(storage, study.study_name), newest(storage)
    create_cell(storage, spec, other := Cell("digits", "asha-baseline", 9), {})
    optuna.load_study(study_name=other.name, storage=storage).ask()
    study.ask().suggest_float("momentum", 0, 1)
    forget(storage, *mark)
    assert optuna.get_all_study_names(storage) == [study.study_name]
    assert contents(storage, study.study_name) == kept
    assert newest(storage) == mark


def contents(storage, name: str):
    trials = optuna.load_study(study_name=name, storage=storage).trials
    return [
        (t.number, t.params, t.values, t.intermediate_values, t.user_attrs, t.system_attrs) for t in trials
    ]


def test_a_search_is_charged_by_trial() -> None:
    search = Search(opening=2.0, seconds=8.0, training=6.0, epochs=9, trials=4)
    assert (search.a_trial, search.with_opening, search.rest) == (2.0, 2.5, 0.5)


def test_the_same_training_leaves_the_growth_of_the_rest() -> None:
    # The rest, 1 s and 2 s a trial, beside training of 3, 7 and 5 s a trial: the median is 5.
    few = [Search(0.0, 8.0, 6.0, 9, 2), Search(0.0, 16.0, 14.0, 9, 2)]
    many = [Search(9.0, 14.0, 10.0, 9, 2), Search(9.0, 14.0, 10.0, 9, 2)]
    assert with_same_training({10: few, 100: many}) == {10: [6.0, 6.0], 100: [7.0, 7.0]}


def test_rounds_that_differ_in_work_are_refused() -> None:
    epochs = itertools.count()
    with pytest.raises(RuntimeError, match="epochs and trials differ"):
        in_turns({1: lambda: Search(0.0, 1.0, 0.5, next(epochs), 1)}, 2)
    assert in_turns({1: lambda: "a", 2: lambda: "b"}, 2) == {1: ["a", "a"], 2: ["b", "b"]}


def test_the_same_trials_are_run_beside_any_number_of_others(tmp_path: Path) -> None:
    sizes = (10, 20)
    measured = by_trials(tmp_path, "cpu", 1, sizes)
    assert {(s.epochs, s.trials) for many in measured.values() for s in many} == {(15, 5)}
    for size in sizes:
        storage = open_storage(f"sqlite:///{tmp_path / str(size) / 'study.db'}", create=False)
        (summary,) = optuna.get_all_study_summaries(storage)
        assert summary.n_trials == size


def test_a_fresh_cell_is_run_beside_others_and_taken_away(tmp_path: Path) -> None:
    measured, checks = by_cells(tmp_path, "cpu", 1, (8,))
    assert [s.trials for s in measured[8]] == [8]
    assert len(checks[8]) == 1
    storage = open_storage(f"sqlite:///{tmp_path / '8' / 'study.db'}", create=False)
    assert [s.n_trials for s in optuna.get_all_study_summaries(storage)] == [4] * 8


def test_the_command_names_all_benchmarks() -> None:
    assert list(BENCHMARKS) == ["warm-start", "train", "run", "growth", "decisions", "workers"]
    shown = " ".join(CliRunner().invoke(app, ["bench", "--help"]).output.split())
    assert "warm-start, train, run, growth, decisions or workers" in shown


def test_the_warm_starts_of_the_study_are_those_of_its_variations() -> None:
    """By the mbu of each variation's own warm start: a control takes the gradient whose length it has."""
    spec = load_spec(Path(__file__).parents[1] / "studies" / "cifar10.yaml")
    settings = [variation_settings(spec, variation) for variation in spec.variations]
    assert [s is None or s.rule == "raw" for s in settings] == [True] * 4
    steps = [0 if s is None else s.steps for s in settings]
    search = STUDY_PARTS["search, 4 variations × 32 seeds"]
    assert sum(steps) / len(steps) == search.warm_starts == 1.25
    cells = len(spec.seeds) * len(spec.variations)
    assert (search.cells, STUDY_PARTS["4 pilot cells"].cells) == (cells, len(spec.pilot_seeds))
    beside = [part.cells for name, part in STUDY_PARTS.items() if part.trials and part is not search]
    assert STUDY_PARTS["final retraining of those beside, at most"].cells == sum(beside)
