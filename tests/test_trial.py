from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.pruners import BasePruner, NopPruner
from optuna.trial import TrialState

from optuna_ohgw import trial as trial_module
from optuna_ohgw import workload as workload_module
from optuna_ohgw.cells import CONFIG_INDEX
from optuna_ohgw.curve import COLUMNS, Best, Curve
from optuna_ohgw.final_training import train_final
from optuna_ohgw.sampler import OhgwSampler, PairedSampler
from optuna_ohgw.spec import StudySpec, load_spec
from optuna_ohgw.tasks.base import Evaluation
from optuna_ohgw.tasks.image import ImageTask, load_image_arrays, split_images
from optuna_ohgw.training import Interrupted, TrainState, cosine, initial_state
from optuna_ohgw.trial import run_trial, variation_settings
from optuna_ohgw.warmstart import WarmStart
from optuna_ohgw.workload import BatchWorkload

STUDIES = Path(__file__).parents[1] / "studies"
FINE = "space.lr={low: 0.01, high: 0.1, log: true}"
PSI = {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.0, "magnitude": 1.0, "label_smoothing": 0.0}
HUGE = "space.lr={low: 1.0e+20, high: 1.0e+25, log: true}"


def spec_of(*overrides: str) -> StudySpec:
    small = (
        "task.epochs=4",
        "task.train_images=380",
        "task.validation_images=60",
        "task.test_images=60",
        "scheduler.min_resource=1",
        "scheduler.reduction_factor=2",
        "pilot_seeds=[]",
    )
    return load_spec(STUDIES / "digits.yaml", (*small, FINE, *overrides))


@pytest.fixture(scope="module")
def tasks() -> Callable[[StudySpec], ImageTask]:
    """Spec ↦ its task; every test uses one network, as a worker does."""
    spec = spec_of()
    data = split_images(spec.image, load_image_arrays(spec.image, None), 0, torch.device("cpu"))
    built = ImageTask(spec.image, data, "mlp", spec.image.batch_size)
    return lambda spec: built


def on(task: ImageTask) -> BatchWorkload:
    return BatchWorkload(task, 4)


class Stub(BasePruner):
    """Prunes at one step; keeps the steps at which it was asked."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.asked = at, list[int]()

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        self.asked.append(trial.last_step or 0)
        return trial.last_step == self.at


def one_trial(
    spec: StudySpec,
    task: ImageTask,
    variation: str = "asha-baseline",
    pruner: BasePruner | None = None,
    number: int = 0,
    **options: Any,
) -> tuple[Best | None, optuna.trial.FrozenTrial, list[dict[str, Any]]]:
    """Run one trial as a worker does; return its best, what is stored and the structures asked for."""
    study = optuna.create_study(
        direction="maximize", sampler=OhgwSampler(PairedSampler(0)), pruner=pruner or NopPruner()
    )
    trial, structures, best = study.ask(), list[dict[str, Any]](), None
    trial.set_user_attr(CONFIG_INDEX, number)

    def task_for(structure: dict[str, Any]) -> BatchWorkload:
        structures.append(structure)
        return on(task)

    try:
        best = run_trial(trial, spec, variation, task_for, seed=0, config_index=number, **options)
        study.tell(trial, best.value)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    return best, study.trials[0], structures


class TestRecords:
    @pytest.mark.parametrize("every_rung", [False, True])
    @pytest.mark.parametrize(
        "variation", ["asha-baseline", "asha-ohgw-1step", "asha-ohgw-3step", "asha-lr-grid"]
    )
    def test_budget_and_curve_agree(
        self, tasks: Callable[[StudySpec], ImageTask], variation: str, every_rung: bool
    ) -> None:
        spec = spec_of(f"warm_start.every_rung={str(every_rung).lower()}", "warm_start.grid_horizon=2")
        task = tasks(spec)
        best, trial, structures = one_trial(spec, task, variation)
        curve, records = trial.user_attrs["curve"], trial.user_attrs["ohgw"]
        assert tuple(curve) == COLUMNS
        assert {len(column) for column in curve.values()} == {4}
        assert structures == [{"model": "mlp", "batch_size": 32}]
        assert trial.user_attrs["batches_per_epoch"] == task.batches_per_epoch == 10

        warm_epochs = [0, 1, 2] if every_rung and variation != "asha-baseline" else [0]
        assert len(records) == len(warm_epochs)
        cost = sum(record["cost_mbu"] for record in records)
        assert (cost > 0) == (variation != "asha-baseline")
        assert curve["mbu"][-1] == pytest.approx(4 * task.batches_per_epoch + cost, rel=1e-5)
        spent = 0.0
        for epoch in range(4):
            if epoch in warm_epochs:
                spent += records[warm_epochs.index(epoch)]["cost_mbu"]
            assert curve["mbu"][epoch] == pytest.approx(10 * (epoch + 1) + spent, rel=1e-5)
            warmed = epoch in warm_epochs and variation != "asha-baseline"
            assert (curve["warm_s"][epoch] > 0) == warmed
            if warmed:
                seconds = records[warm_epochs.index(epoch)]["seconds"]
                assert curve["warm_s"][epoch] == pytest.approx(seconds, rel=1e-3)
            assert curve["train_s"][epoch] > 0
            assert curve["eval_s"][epoch] > 0
        assert curve["wall"] == sorted(curve["wall"])
        # six digits in the curve, whole floats in the intermediate values
        assert trial.intermediate_values == pytest.approx(
            dict(enumerate(curve["val_metric"], start=1)), rel=1e-5
        )
        assert best is not None
        assert trial.value == best.value == max(trial.intermediate_values.values())
        assert best.state is not None
        assert trial.intermediate_values[best.state.epoch] == best.value
        assert trial.params == records[0]["trained"]

    def test_streams_name_the_initial_weights_and_the_order(
        self, tasks: Callable[[StudySpec], ImageTask]
    ) -> None:
        spec = spec_of()
        task = tasks(spec)
        found = [one_trial(spec, task, v, number=3)[1] for v in ("asha-baseline", "asha-ohgw-1step")]
        expected = {
            "seed": 0,
            "config_index": 3,
            "weights": initial_state(task, 0, 3, 4).digest(),
            "order": task.order_digest(0, 3),
        }
        assert [t.user_attrs["streams"] for t in found] == [expected, expected]
        suggested = [t.user_attrs["ohgw"][0]["suggested"] for t in found]
        assert suggested[0] == suggested[1] == found[0].params
        assert found[1].params != found[0].params

    @pytest.mark.parametrize(("every_rung", "limit"), [(False, 20_000), (True, 22_500)])
    def test_a_trial_of_200_epochs_is_stored_in_20_kilobytes(
        self, tasks: Callable[[StudySpec], ImageTask], every_rung: bool, limit: int
    ) -> None:
        """A warm start at every rung adds its record, some 1.2 kB, for each of four rungs."""
        spec = load_spec(STUDIES / "cifar10.yaml")
        task = tasks(spec)
        rungs = len(spec.scheduler.rungs(200)) if every_rung else 0
        small = spec_of(f"warm_start.every_rung={str(every_rung).lower()}")
        _, real, _ = one_trial(small, task, "asha-ohgw-1step")
        records = [real.user_attrs["ohgw"][0]] * (1 + rungs)
        draws = random.Random(0)
        curve, values = Curve(), {}
        for epoch in range(1, 201):
            values[str(epoch)] = draws.randrange(5000) / 5000
            curve.append(
                mbu=352 * epoch + 17 / 3,
                wall=1.76e9 + draws.uniform(0, 1e5),
                train_s=draws.uniform(5, 50),
                warm_s=draws.uniform(0.1, 9) if epoch == 1 else 0.0,
                eval_s=draws.uniform(0.2, 2),
                train_loss=draws.uniform(0.01, 2.3),
                val_loss=draws.uniform(0.01, 2.3),
                val_metric=values[str(epoch)],
            )
        attributes = {**real.user_attrs, "curve": curve.columns, "ohgw": records}
        assert attributes["flops"]["warm"] > 0
        attributes["flops"] = {"batch": 10**12, "warm": 10**13}
        attributes["memory"] = dict.fromkeys(("ram", "vram", "nvml"), 10**11)
        attributes["reason"] = "stopped by the pruner after epoch 64"
        attributes["worker"] = {"host": "a" * 64, "pid": 1234567, "device": "NVIDIA H200 141GB"}
        size = len(json.dumps(attributes)) + len(json.dumps(values))
        assert size <= limit
        assert size > 10_000  # else this is not a trial of 200 epochs

    @pytest.mark.parametrize("variation", ["asha-baseline", "asha-ohgw-3step", "asha-random-warm"])
    def test_counting_flops_changes_nothing_else(
        self,
        tasks: Callable[[StudySpec], ImageTask],
        variation: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        spec = spec_of("warm_start.every_rung=true", "warm_start.eta_h=0.5")
        task, calls = tasks(spec), []
        honest = workload_module.count_flops
        monkeypatch.setattr(trial_module, "_flops", {})
        monkeypatch.setattr(workload_module, "count_flops", lambda *args: calls.append(1) or honest(*args))
        best, counted, _ = one_trial(spec, task, variation)
        monkeypatch.setattr(trial_module, "flops", lambda *args: {})
        other, plain, _ = one_trial(spec, task, variation)

        def kept(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
            own = {k: v for k, v in trial.user_attrs.items() if k not in ("flops", "memory", "cgroup")}
            own["ohgw"] = [
                {k: v for k, v in record.items() if k not in ("seconds", "peak_bytes")}
                for record in own["ohgw"]
            ]
            clocks = ("wall", "train_s", "warm_s", "eval_s")
            own["curve"] = {k: v for k, v in own["curve"].items() if k not in clocks}
            return own

        assert calls == [1]
        assert kept(counted) == kept(plain)
        assert counted.params == plain.params
        assert counted.intermediate_values == plain.intermediate_values
        assert best is not None
        assert other is not None
        assert best.state is not None
        assert other.state is not None
        assert best.state.digest() == other.state.digest()

    def test_counting_flops_is_on_no_clock(
        self, tasks: Callable[[StudySpec], ImageTask], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def slow(*args: Any) -> dict[str, int]:
            time.sleep(1.0)
            return {"batch": 1, "warm": 2}

        spec = spec_of()
        monkeypatch.setattr(trial_module, "_flops", {})
        monkeypatch.setattr(workload_module, "count_flops", slow)
        _, trial, _ = one_trial(spec, tasks(spec), "asha-ohgw-1step")
        curve = trial.user_attrs["curve"]
        assert trial.user_attrs["flops"] == {"batch": 1, "warm": 2}
        assert max(curve[c][0] for c in ("train_s", "warm_s", "eval_s")) < 1.0

    def test_flops_are_counted_once_for_each_structure_and_variation(
        self, tasks: Callable[[StudySpec], ImageTask], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[Any] = []

        def counter(task: Any, state: Any, space: Any, settings: Any, *rest: Any) -> dict[str, int]:
            calls.append(settings)
            return {"batch": len(calls), "warm": 0}

        monkeypatch.setattr(trial_module, "_flops", {})
        monkeypatch.setattr(workload_module, "count_flops", counter)
        spec = spec_of("space.batch_size={choices: [16, 64]}")
        task = tasks(spec)
        state = initial_state(task, 0, 0, 4)
        of = [
            trial_module.flops(spec, variation, {"model": "mlp", "batch_size": size}, on(task), state)[
                "batch"
            ]
            for _ in range(2)
            for variation in ("asha-baseline", "asha-ohgw-1step@1e-4")
            for size in (16, 64)
        ]
        assert of == [1, 2, 3, 4] * 2
        assert [getattr(settings, "eta_h", None) for settings in calls] == [None, None, 1e-4, 1e-4]

    @pytest.mark.parametrize("how", ["completed", "pruned", "diverged", "failed"])
    def test_peak_memory_is_recorded_however_a_trial_ends(
        self, tasks: Callable[[StudySpec], ImageTask], how: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = spec_of(*([HUGE] if how == "diverged" else []))
        task, study = (
            tasks(spec),
            optuna.create_study(
                sampler=OhgwSampler(PairedSampler(0)), pruner=Stub(at=1 if how == "pruned" else None)
            ),
        )
        if how == "failed":
            monkeypatch.setattr(task, "evaluate", lambda part: 1 / 0)
        ended = {"completed": None, "failed": ZeroDivisionError}.get(how, optuna.TrialPruned)
        with pytest.raises(ended) if ended else contextlib.nullcontext():
            run_trial(study.ask(), spec, "asha-baseline", lambda _: on(task), seed=0, config_index=0)
        memory = study.trials[0].user_attrs["memory"]
        assert set(memory) == {"ram", "vram", "nvml"}
        # Python with torch takes more than 100 MB, and no machine of a test has a terabyte.
        assert 1e8 < memory["ram"] < 1e12
        assert (memory["vram"], memory["nvml"]) == (None, None)


class TestDivergence:
    @pytest.mark.parametrize("variation", ["asha-baseline", "asha-ohgw-1step"])
    def test_is_pruned_with_the_reason_and_never_becomes_a_number(
        self, tasks: Callable[[StudySpec], ImageTask], variation: str
    ) -> None:
        spec = spec_of(HUGE)
        best, trial, _ = one_trial(spec, tasks(spec), variation)
        assert best is None
        assert trial.state == TrialState.PRUNED
        assert trial.user_attrs["reason"].startswith("diverged in epoch 1: training loss ")
        curve = trial.user_attrs["curve"]
        assert {len(column) for column in curve.values()} == {1}
        assert curve["val_metric"] == [None]
        assert curve["train_loss"] == [None] or curve["val_loss"] == [None]
        assert curve["mbu"][0] >= 10
        assert trial.intermediate_values == {}
        assert trial.value is None
        json.dumps(trial.user_attrs, allow_nan=False)

    def test_in_a_later_epoch_keeps_what_came_before(
        self, tasks: Callable[[StudySpec], ImageTask], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = spec_of()
        task = tasks(spec)
        results = iter([Evaluation(1.5, 0.25), Evaluation(math.inf, 0.5)])
        monkeypatch.setattr(task, "evaluate", lambda part: next(results))
        _, trial, _ = one_trial(spec, task)
        assert trial.user_attrs["reason"].startswith("diverged in epoch 2: ")
        assert trial.user_attrs["reason"].endswith("validation loss inf")
        assert trial.user_attrs["curve"]["val_metric"] == [0.25, None]
        assert trial.intermediate_values == {1: 0.25}

    @pytest.mark.parametrize("metric", [math.nan, math.inf])
    def test_a_metric_that_is_no_number_is_not_the_best(
        self, tasks: Callable[[StudySpec], ImageTask], monkeypatch: pytest.MonkeyPatch, metric: float
    ) -> None:
        spec = spec_of()
        task = tasks(spec)
        results = iter([Evaluation(1.5, 0.25), Evaluation(1.4, metric)])
        monkeypatch.setattr(task, "evaluate", lambda part: next(results))
        _, trial, _ = one_trial(spec, task)
        assert trial.user_attrs["reason"].endswith(f"metric {metric}")
        assert trial.user_attrs["curve"]["val_metric"] == [0.25, None]
        assert trial.intermediate_values == {1: 0.25}

    def test_of_the_final_training_ends_it_and_wins_nothing(
        self, tasks: Callable[[StudySpec], ImageTask], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = spec_of()
        task = tasks(spec)
        results = iter([Evaluation(1.5, 0.25), Evaluation(math.nan, 0.9)])
        monkeypatch.setattr(task, "evaluate", lambda part: next(results))
        trained = [
            {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.0, "magnitude": 1.0, "label_smoothing": 0.0}
        ]
        best, curve = train_final(spec, on(task), trained, seed=0, config_index=0)
        assert curve.columns["val_metric"] == [0.25, None]
        assert best.value == 0.25
        assert best.state is not None
        assert best.state.epoch == 1


class TestEnds:
    def test_the_pruner_decides_after_every_epoch_but_the_last(
        self, tasks: Callable[[StudySpec], ImageTask]
    ) -> None:
        spec, stub = spec_of(), Stub()
        one_trial(spec, tasks(spec), pruner=stub)
        assert stub.asked == [1, 2, 3]

    def test_a_pruned_trial_keeps_its_curve_and_the_reason(
        self, tasks: Callable[[StudySpec], ImageTask]
    ) -> None:
        spec = spec_of()
        best, trial, _ = one_trial(spec, tasks(spec), pruner=Stub(at=3))
        assert best is None
        assert trial.state == TrialState.PRUNED
        assert trial.user_attrs["reason"] == "stopped by the pruner after epoch 3"
        assert {len(column) for column in trial.user_attrs["curve"].values()} == {3}
        assert list(trial.intermediate_values) == [1, 2, 3]

    def test_a_spent_budget_ends_the_trial(self, tasks: Callable[[StudySpec], ImageTask]) -> None:
        spec, calls = spec_of(), iter(range(9))
        _, trial, _ = one_trial(spec, tasks(spec), spent=lambda: next(calls) == 1)
        assert trial.state == TrialState.PRUNED
        assert trial.user_attrs["reason"] == "budget of the cell spent after epoch 2"
        assert list(trial.intermediate_values) == [1, 2]

    def test_stopping_raises_interrupted_in_the_epoch(self, tasks: Callable[[StudySpec], ImageTask]) -> None:
        spec, calls = spec_of(), iter(range(99))
        with pytest.raises(Interrupted):
            one_trial(spec, tasks(spec), stop=lambda: next(calls) >= 15)
        assert next(calls) == 16


class TestFinal:
    @pytest.mark.parametrize("every_rung", [False, True])
    @pytest.mark.parametrize("variation", ["asha-baseline", "asha-ohgw-1step"])
    def test_repeats_a_completed_trial_bit_for_bit(
        self, tasks: Callable[[StudySpec], ImageTask], variation: str, every_rung: bool
    ) -> None:
        # a large eta_h, so that a missed warm start would show
        spec = spec_of(f"warm_start.every_rung={str(every_rung).lower()}", "warm_start.eta_h=0.5")
        task = tasks(spec)
        best, trial, _ = one_trial(spec, task, variation, number=1)
        trained = [record["trained"] for record in trial.user_attrs["ohgw"]]
        again, curve = train_final(spec, on(task), trained, seed=0, config_index=1)
        own = trial.user_attrs["curve"]
        for column in ("train_loss", "val_loss", "val_metric"):
            assert curve.columns[column] == own[column]
        assert curve.columns["mbu"] == [10.0, 20.0, 30.0, 40.0]
        assert best is not None
        assert best.state is not None
        assert again.state is not None
        assert again.value == best.value
        a, b = again.state.tensors(), best.state.tensors()
        assert all(torch.equal(a[name], b[name]) for name in b)
        assert dict(again.state.psi) == dict(best.state.psi)

    def test_goes_on_with_the_last_values_where_the_trial_was_pruned(
        self, tasks: Callable[[StudySpec], ImageTask]
    ) -> None:
        spec = spec_of("warm_start.every_rung=true", "warm_start.eta_h=0.5")
        task = tasks(spec)
        _, trial, _ = one_trial(spec, task, "asha-ohgw-1step", pruner=Stub(at=2), number=1)
        trained = [record["trained"] for record in trial.user_attrs["ohgw"]]
        assert len(trained) == 2
        best, curve = train_final(spec, on(task), trained, seed=0, config_index=1)
        own = trial.user_attrs["curve"]
        assert curve.columns["val_loss"][:2] == own["val_loss"]
        assert len(curve.columns["val_loss"]) == 4
        assert best.state is not None
        assert {n: best.state.psi[n] for n in trained[-1]} in trained

    def test_can_be_interrupted(self, tasks: Callable[[StudySpec], ImageTask]) -> None:
        spec = spec_of()
        with pytest.raises(Interrupted):
            train_final(
                spec,
                on(tasks(spec)),
                [PSI],
                seed=0,
                config_index=0,
                stop=lambda: True,
            )


class TestEveryRung:
    def test_psi_in_effect_is_the_base_of_the_schedule(
        self, tasks: Callable[[StudySpec], ImageTask], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = spec_of("warm_start.every_rung=true", "warm_start.eta_h=0.5")
        task = tasks(spec)
        rates: list[float] = []
        honest = torch.optim.SGD.step

        def step(self: torch.optim.SGD, *args: Any) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return honest(self, *args)

        monkeypatch.setattr(torch.optim.SGD, "step", step)
        best, trial, _ = one_trial(spec, task, "asha-ohgw-1step")
        records = trial.user_attrs["ohgw"]
        assert len(records) == 3  # before epochs 1, 2 and 3: rungs after 1 and 2 of 4
        base = [record["trained"]["lr"] for record in records]
        assert len(set(base)) == 3
        for later, earlier in zip(records[1:], records, strict=False):
            assert later["suggested"] == earlier["trained"]
        in_effect = [base[0], base[1], base[2], base[2]]
        expected = [in_effect[i // 10] * cosine(i, 40) for i in range(40)]
        assert rates == pytest.approx(expected, rel=1e-12)
        assert best is not None
        assert best.state is not None
        assert best.state.psi["lr"] == in_effect[best.state.epoch - 1]
        assert trial.params["lr"] == base[0]

    def test_each_rung_is_warmed_on_mini_batches_of_its_own(
        self, tasks: Callable[[StudySpec], ImageTask], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = spec_of("warm_start.every_rung=true")
        task, asked = tasks(spec), []
        honest = task.warm_batches

        def warm_batches(seed: int, config_index: int, rung: int) -> Any:
            asked.append((seed, config_index, rung))
            return honest(seed, config_index, rung)

        monkeypatch.setattr(task, "warm_batches", warm_batches)
        one_trial(spec, task, "asha-ohgw-1step", number=2)
        assert asked == [(0, 2, 0), (0, 2, 1), (0, 2, 2)]


class TestSettings:
    def test_a_variation_overrides_the_shared_section_and_nothing_else(self) -> None:
        spec = spec_of("warm_start.radius=0.3", "warm_start.freeze=[momentum]")
        settings = variation_settings(spec, "asha-random-trust")
        assert settings == WarmStart(
            rule="trust-region", random=True, radius=0.3, freeze=("momentum",), estimator=None
        )
        assert variation_settings(spec, "asha-baseline") is None

    def test_a_step_size_in_the_name_goes_before_the_shared_one(self) -> None:
        spec = spec_of("warm_start.eta_h=0.5")
        shared, own = (variation_settings(spec, f"asha-random-3step{eta}") for eta in ("", "@3e-4"))
        assert shared is not None
        assert shared.eta_h == 0.5
        assert own == dataclasses.replace(shared, eta_h=3e-4)

    def test_structure_is_suggested_before_the_warm_start(
        self, tasks: Callable[[StudySpec], ImageTask]
    ) -> None:
        spec = spec_of("space.batch_size={choices: [16, 64]}")
        _, trial, structures = one_trial(spec, tasks(spec))
        assert structures == [{"model": "mlp", "batch_size": trial.params["batch_size"]}]
        assert set(trial.params) == {"batch_size", *spec.ranges}

    def test_constants_are_in_effect(self, tasks: Callable[[StudySpec], ImageTask]) -> None:
        spec = spec_of("space.momentum=0.75")
        best, trial, _ = one_trial(spec, tasks(spec))
        assert best is not None
        assert best.state is not None
        assert best.state.psi["momentum"] == 0.75
        assert "momentum" not in trial.params


class TestBest:
    def test_keeps_the_first_of_the_best(self) -> None:
        states = [TrainState({}, {}, {}, {}, e, 9, 0, 0) for e in range(4)]
        best = Best()
        for state, accuracy in zip(states, (0.5, 0.7, 0.7, 0.6), strict=True):
            best.offer(state, Evaluation(1.0, accuracy))
        assert best.state is states[1]
        assert best.value == 0.7
