from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial

from optuna_ohgw import cell_study, cells
from optuna_ohgw.cell_study import ask, load_cell
from optuna_ohgw.cells import (
    Cell,
    Ledger,
    cells_of,
    check_cells,
    config_index,
    create_cell,
    has_work,
    revive,
    to_retry,
)
from optuna_ohgw.errors import UserError
from optuna_ohgw.history import resume
from optuna_ohgw.opening import open_storage, sqlite_path
from optuna_ohgw.spec import StudySpec, load_spec

STUDIES = Path(__file__).parents[1] / "studies"
NOON = datetime.datetime(2026, 1, 1, 12)
HOUR = datetime.timedelta(hours=1)
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def spec_of(*overrides: str, budget: str = "{trials: 4}") -> StudySpec:
    few = ("seeds=[0]", "pilot_seeds=[]", "variations=[asha-baseline]")
    return load_spec(
        STUDIES / "digits.yaml", (*few, "scheduler.reduction_factor=2", f"budget={budget}", *overrides)
    ).model_copy(update=_only(budget))


def _only(budget: str) -> dict[str, Any]:
    """Return the budget alone: an override is merged into the file's."""
    import yaml

    from optuna_ohgw.spec_parts import BudgetSpec

    return {"budget": BudgetSpec(**yaml.safe_load(budget))}


@pytest.fixture
def storage(tmp_path: Path) -> BaseStorage:
    return open_storage(f"sqlite:///{tmp_path / 'study.db'}", create=True)


@pytest.fixture
def study(storage: BaseStorage) -> optuna.Study:
    spec = spec_of()
    create_cell(storage, spec, cells_of(spec)[0], {})
    return load_cell(storage, spec, cells_of(spec)[0])


def plant(study: optuna.Study, state: TrialState = TrialState.COMPLETE, epochs: int = 0, **attrs: Any) -> int:
    """Add a trial whose epochs had ten mini-batches and took 90, 9 and 1 seconds; return its number."""
    columns = {
        "mbu": [10.0 * e for e in range(1, epochs + 1)],
        "train_s": [90.0] * epochs,
        "warm_s": [9.0] * epochs,
        "eval_s": [1.0] * epochs,
        "val_metric": [0.5] * epochs,
    }
    attributes = {"curve": columns, "batches_per_epoch": 10, **attrs}
    study.add_trial(
        create_trial(
            state=state,
            value=0.5 if state == TrialState.COMPLETE else None,
            intermediate_values=dict.fromkeys(range(1, epochs + 1), 0.5),
            user_attrs={k: v for k, v in attributes.items() if v is not None},
        )
    )
    return len(study.get_trials(deepcopy=False)) - 1


class TestCells:
    def test_pilots_come_first_and_pairs_together(self) -> None:
        spec = spec_of("seeds=[3,1]", "pilot_seeds=[9]", "variations=[asha-ohgw-1step,asha-baseline]")
        assert [c.label for c in cells_of(spec)] == [
            "pilot/seed-0009",
            "asha-ohgw-1step/seed-0003",
            "asha-baseline/seed-0003",
            "asha-ohgw-1step/seed-0001",
            "asha-baseline/seed-0001",
        ]
        assert cells_of(spec)[0] == Cell("digits", "asha-baseline", 9, pilot=True)
        assert cells_of(spec)[0].name == "digits/pilot/seed-0009"
        assert cells_of(spec)[1].folder(Path("out")) == Path("out/asha-ohgw-1step/seed-0003")

    def test_no_two_cells_share_a_name_or_folder(self) -> None:
        spec = spec_of("seeds=12", "pilot_seeds=[100]", "variations=[asha-ohgw-1step,asha-baseline]")
        assert len({c.name for c in cells_of(spec)}) == len(cells_of(spec)) == 25


class TestCreate:
    def test_twice_is_once(self, storage: BaseStorage) -> None:
        spec = spec_of()
        (cell,) = cells_of(spec)
        create_cell(storage, spec, cell, {"commit": "first"})
        plant(load_cell(storage, spec, cell))
        create_cell(storage, spec, cell, {"commit": "second"})
        study = load_cell(storage, spec, cell)
        assert len(storage.get_all_studies()) == 1
        assert len(study.trials) == 1
        assert study.user_attrs["environment"] == {"commit": "first"}
        assert study.user_attrs["spec"] == spec.identity()
        assert study.direction == optuna.study.StudyDirection.MAXIMIZE
        assert study.metric_names == ["validation accuracy"]

    def test_goes_on_where_a_killed_run_left_off(self, storage: BaseStorage) -> None:
        spec = spec_of()
        (cell,) = cells_of(spec)
        optuna.create_study(study_name=cell.name, storage=storage, direction="maximize")
        assert check_cells(storage, spec) == {}
        create_cell(storage, spec, cell, {})
        assert set(check_cells(storage, spec)) == {cell.name}


class TestCheckCells:
    def test_knows_the_cells_that_are_there(self, study: optuna.Study, storage: BaseStorage) -> None:
        optuna.create_study(study_name="another", storage=storage)
        assert check_cells(storage, spec_of("seeds=[0,1]")) == {study.study_name: study._study_id}

    @pytest.mark.parametrize(
        "override",
        ["execution.workers=3", "targets=[0.5]", "seeds=[0,7]", "variations=[asha-baseline,asha-gaussian]"],
    )
    def test_accepts_what_no_result_depends_on(
        self, study: optuna.Study, storage: BaseStorage, override: str
    ) -> None:
        assert set(check_cells(storage, spec_of(override))) == {study.study_name}

    @pytest.mark.parametrize(
        ("override", "field", "before", "now"),
        [
            ("task.epochs=9", "task.epochs", "27", "9"),
            ("task.model=resnet20", "task.model", '"mlp"', '"resnet20"'),
            ("warm_start.every_rung=true", "warm_start.every_rung", "false", "true"),
            ("space.lr.high=0.5", "space.lr.high", "1.0", "0.5"),
            ("space.batch_size={choices: [16]}", "space.batch_size", "null", '{"choices": [16]}'),
            ("scheduler.min_resource=2", "scheduler.min_resource", "3", "2"),
        ],
    )
    def test_names_the_difference(
        self, study: optuna.Study, storage: BaseStorage, override: str, field: str, before: str, now: str
    ) -> None:
        with pytest.raises(UserError) as caught:
            check_cells(storage, spec_of(override))
        message = str(caught.value)
        assert f"{study.study_name!r} was made with {field} = {before}, now {now}; " in message
        assert "\n" not in message

    @pytest.mark.parametrize("kind", ["minimized", "with trials", "other spec"])
    def test_refuses_a_study_of_another_make(self, storage: BaseStorage, kind: str) -> None:
        spec = spec_of()
        direction = "minimize" if kind == "minimized" else "maximize"
        name = cells_of(spec)[0].name
        study = optuna.create_study(study_name=name, storage=storage, direction=direction)
        if kind == "with trials":
            study.ask()
        if kind == "other spec":
            study.set_user_attr("spec", "mine")
        with pytest.raises(UserError, match="was not made by optuna-ohgw"):
            check_cells(storage, spec)


class TestOpenStorage:
    def test_a_missing_file_is_made_or_named(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path / 'a.db'}"
        with pytest.raises(UserError, match=r"a\.db does not exist"):
            open_storage(url, create=False)
        open_storage(url, create=True)
        assert sqlite_path(url) == tmp_path / "a.db"
        open_storage(url, create=False)

    def test_a_file_that_is_no_database_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "a.db").write_text("no database, and long enough to be read as a page" * 100)
        with pytest.raises(UserError) as caught:
            open_storage(f"sqlite:///{tmp_path / 'a.db'}", create=True)
        assert "\n" not in str(caught.value)


class TestHasWork:
    @pytest.mark.parametrize(
        ("planted", "expected"),
        [
            ([], True),
            ([{}] * 3, True),
            ([{}] * 4, False),
            ([{"state": TrialState.FAIL, "reason": "ValueError: no"}] * 4, False),
            ([{}] * 3 + [{"state": TrialState.RUNNING}], False),
            # the retry of an interrupted trial is no new one
            ([{}] * 2 + [{"state": TrialState.FAIL, "reason": "interrupted"}, {"retry_of": 2}], True),
            ([{}] * 3 + [{"state": TrialState.FAIL, "reason": "interrupted"}, {"retry_of": 3}], False),
            ([{}] * 4 + [{"state": TrialState.WAITING, "retry_of": 3}], True),
        ],
    )
    def test_by_trials(self, study: optuna.Study, planted: list[dict[str, Any]], expected: bool) -> None:
        for trial in planted:
            plant(study, **trial)
        assert has_work(study, spec_of()) == expected

    def test_without_a_limit_of_trials_there_always_is(self, study: optuna.Study) -> None:
        for _ in range(9):
            plant(study)
        assert has_work(study, spec_of(budget="{mbu: 10}"))


class TestIsSpent:
    @pytest.mark.parametrize(
        ("mbu", "expected"), [(129.9, True), (130.0, True), (130.1, False), (1000.0, False)]
    )
    def test_mbu_is_that_of_epochs_and_warm_starts(
        self, study: optuna.Study, mbu: float, expected: bool
    ) -> None:
        plant(study, epochs=3, ohgw=[{"cost_mbu": 4.0}, {"cost_mbu": 6.0}])
        plant(study, TrialState.PRUNED, epochs=2)
        plant(study, TrialState.RUNNING, epochs=4, curve=None)  # not flushed yet
        plant(study, TrialState.FAIL, epochs=1, reason="ValueError: no")
        plant(study, TrialState.FAIL, epochs=9, reason="interrupted")
        plant(study, TrialState.WAITING, retry_of=4, curve=None, batches_per_epoch=None)
        # ten for each of 10 epochs, twenty for the one of a trial of larger mini-batches, ten warm
        plant(study, TrialState.RUNNING, epochs=1, batches_per_epoch=20)
        assert Ledger(study, spec_of(budget=f"{{mbu: {mbu}}}")).is_spent() == expected

    def test_one_ledger_follows_a_cell_as_it_goes_on(self, study: optuna.Study) -> None:
        ledger = Ledger(study, spec_of(budget="{mbu: 100, trials: 4}"))
        plant(study, epochs=2)
        plant(study, TrialState.RUNNING, epochs=1)
        assert ledger.share_done() == pytest.approx(0.3)
        study._storage.set_trial_intermediate_value(study.trials[1]._trial_id, 2, 0.5)
        assert ledger.share_done() == pytest.approx(0.4)
        study.tell(1, 0.5)
        assert ledger.share_done() == pytest.approx(0.5)  # of the trials
        plant(study, TrialState.PRUNED, epochs=6)
        assert ledger.is_spent()

    def test_an_ended_trial_is_counted_once(
        self, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plant(study, epochs=2)
        plant(study, TrialState.RUNNING, epochs=1)
        counted: list[int] = []
        count = cells._mbu
        monkeypatch.setattr(cells, "_mbu", lambda trial: counted.append(trial.number) or count(trial))
        ledger = Ledger(study, spec_of(budget="{mbu: 100}"))
        for _ in range(3):
            ledger.is_spent()
        assert counted == [0, 1, 1, 1]

    def test_an_epoch_that_diverged_is_paid_for(self, study: optuna.Study) -> None:
        curve = {"mbu": [10.0, 20.0], "train_s": [1.0, 1.0], "val_metric": [0.1, None]}
        plant(study, TrialState.PRUNED, epochs=1, curve=curve)
        assert Ledger(study, spec_of(budget="{mbu: 20}")).is_spent()
        assert not Ledger(study, spec_of(budget="{mbu: 20.1}")).is_spent()

    @pytest.mark.parametrize(("epochs", "expected"), [(35, False), (36, True)])
    def test_device_hours_are_training_warm_starts_and_evaluation(
        self, study: optuna.Study, epochs: int, expected: bool
    ) -> None:
        plant(study, epochs=20)
        plant(study, TrialState.PRUNED, epochs=epochs - 20)
        plant(study, TrialState.FAIL, epochs=30, reason="interrupted")
        assert Ledger(study, spec_of(budget="{device_hours: 1}")).is_spent() == expected

    def test_what_is_not_finite_in_a_curve_counts_nothing(self, study: optuna.Study) -> None:
        curve = {
            "mbu": [10.0],
            "train_s": [None],
            "warm_s": [0.0],
            "eval_s": [3600.0],
            "val_metric": [None],
            "val_loss": [None],
        }
        plant(study, TrialState.PRUNED, curve=curve)
        assert Ledger(study, spec_of(budget="{device_hours: 1}")).is_spent()
        assert not Ledger(study, spec_of(budget="{device_hours: 1.01}")).is_spent()

    @pytest.mark.parametrize(
        ("spans", "hours"),
        [
            ([(0, 2)], 2),
            ([(0, 2), (0, 2)], 2),
            ([(0, 2), (1, 3)], 3),
            ([(1, 3), (0, 2)], 3),
            ([(0, 4), (1, 2), (3, 4)], 4),
            ([(0, 1), (5, 6)], 2),  # the time between two runs
            ([(0, 1), (1, 2)], 2),
            ([(0, 3), (1, 2), (2, 5)], 5),
        ],
    )
    def test_wall_hours_count_overlapping_trials_once(
        self, study: optuna.Study, monkeypatch: pytest.MonkeyPatch, spans: list[tuple[int, int]], hours: int
    ) -> None:
        trials = []
        for start, end in spans:
            trial = create_trial(state=TrialState.COMPLETE, value=0.5)
            trial.datetime_start, trial.datetime_complete = NOON + start * HOUR, NOON + end * HOUR
            trials.append(trial)
        killed = create_trial(state=TrialState.FAIL, user_attrs={"reason": "interrupted"})
        killed.datetime_start, killed.datetime_complete = NOON, NOON + 99 * HOUR
        waiting = create_trial(state=TrialState.WAITING)
        waiting.datetime_start = None
        monkeypatch.setattr(study, "get_trials", lambda **_: [*trials, killed, waiting])
        assert Ledger(study, spec_of(budget=f"{{wall_hours: {hours}}}")).is_spent()
        assert not Ledger(study, spec_of(budget=f"{{wall_hours: {hours + 0.01}}}")).is_spent()

    def test_wall_hours_of_a_running_trial_run(
        self, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trial = create_trial(state=TrialState.RUNNING)
        trial.datetime_start = datetime.datetime.now() - 2 * HOUR
        monkeypatch.setattr(study, "get_trials", lambda **_: [trial])
        assert Ledger(study, spec_of(budget="{wall_hours: 2}")).is_spent()
        assert not Ledger(study, spec_of(budget="{wall_hours: 2.1}")).is_spent()

    def test_trials_are_not_its_business(self, study: optuna.Study) -> None:
        for _ in range(9):
            plant(study, epochs=9)
        assert not Ledger(study, spec_of()).is_spent()

    @pytest.mark.parametrize("budget", ["{mbu: 1}", "{device_hours: 1}", "{wall_hours: 1}"])
    def test_an_empty_cell_is_not(self, study: optuna.Study, budget: str) -> None:
        assert not Ledger(study, spec_of(budget=budget)).is_spent()


class TestConfigIndex:
    @pytest.mark.parametrize(
        ("attrs", "expected"),
        [
            ([{}, {}, {}], [0, 1, 2]),
            ([{}, {"retry_of": 0, "config_index": 0}, {}, {}], [0, 0, 1, 2]),
            # killed at configuration 1, its retry interrupted at once, then on with configuration 2
            (
                [
                    {},
                    {"reason": "interrupted"},
                    {"retry_of": 1, "config_index": 1},
                    {"retry_of": 2, "config_index": 1},
                    {},
                    {},
                ],
                [0, 1, 1, 1, 2, 3],
            ),
            # two workers killed at 0 and 1
            (
                [{}, {}, {"retry_of": 0, "config_index": 0}, {"retry_of": 1, "config_index": 1}, {}],
                [0, 1, 0, 1, 2],
            ),
            ([{"config_index": 5}, {}], [5, 1]),
        ],
    )
    def test_is_the_number_without_the_retries_before(
        self, study: optuna.Study, attrs: list[dict[str, Any]], expected: list[int]
    ) -> None:
        for attr in attrs:
            plant(study, **attr)
        trials = study.get_trials(deepcopy=False)
        assert [config_index(t, trials) for t in trials] == expected


class TestRevive:
    def test_queues_every_unfinished_trial_once_with_its_configuration(self, study: optuna.Study) -> None:
        plant(study, TrialState.COMPLETE, config_index=0)
        plant(study, TrialState.RUNNING)  # killed before its position was written
        plant(study, TrialState.FAIL, config_index=2, reason="interrupted")
        plant(study, TrialState.FAIL, config_index=3, reason="ValueError: no")
        plant(study, TrialState.PRUNED, config_index=4)
        plant(study, TrialState.RUNNING, config_index=5)
        finished = [t for t in study.trials if t.number in (0, 2, 3, 4)]
        assert revive(study) == 3
        queued = study.get_trials(states=(TrialState.WAITING,))
        assert [(t.user_attrs["config_index"], t.user_attrs["retry_of"]) for t in queued] == [
            (1, 1),
            (2, 2),
            (5, 5),
        ]
        killed = [study.trials[n] for n in (1, 5)]
        assert {(t.state, t.user_attrs["reason"]) for t in killed} == {(TrialState.FAIL, "interrupted")}
        assert [study.trials[t.number] for t in finished] == finished
        after = study.trials
        assert revive(study) == 0
        assert study.trials == after

    def test_a_retry_that_is_killed_is_queued_again(self, study: optuna.Study) -> None:
        plant(study, TrialState.COMPLETE)
        plant(study, TrialState.RUNNING)
        for attempt in range(1, 4):
            assert revive(study) == 1
            (queued,) = study.get_trials(states=(TrialState.WAITING,))
            kills = {"count": attempt, "epoch": 0}
            assert queued.user_attrs == {"config_index": 1, "retry_of": attempt, "kills": kills}
            assert study.ask().number == attempt + 1
        study.tell(4, 0.5)
        assert revive(study) == 0
        assert [t.state for t in study.trials].count(TrialState.FAIL) == 3

    @pytest.mark.parametrize("step", ["add_trial", "set_trial_user_attr", "tell"])
    def test_killed_in_between_it_queues_no_trial_twice(
        self, study: optuna.Study, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        plant(study, TrialState.RUNNING, config_index=0)

        def killed(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        owner = study._storage if step == "set_trial_user_attr" else study
        with monkeypatch.context() as context:
            context.setattr(owner, step, killed)
            with pytest.raises(KeyboardInterrupt):
                revive(study)
        revive(study)
        assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]
        assert study.trials[0].user_attrs["reason"] == "interrupted"


class TestPruner:
    def test_an_interrupted_trial_does_not_compete_with_its_retry(self, study: optuna.Study) -> None:
        """Best of two goes on: 0.4 beats 0.3, whether or not it was interrupted before."""

        def runs(value: float, end: TrialState) -> bool:
            trial = study.ask()
            trial.report(value, 3)
            pruned = trial.should_prune()
            if end == TrialState.FAIL:
                trial.set_user_attr("reason", "interrupted")
            study.tell(trial, state=end)
            return pruned

        study.pruner.base._bootstrap_count = 0
        runs(0.1, TrialState.PRUNED)
        runs(0.5, TrialState.FAIL)
        runs(0.5, TrialState.FAIL)
        # among 0.1, 0.4: promotable is the best one; with the interrupted ones it would be third
        assert not runs(0.4, TrialState.PRUNED)
        assert runs(0.3, TrialState.PRUNED)

    def test_decides_as_optunas_otherwise(self, storage: BaseStorage) -> None:
        spec = spec_of("scheduler.bootstrap_count=1", "scheduler.min_resource=1")
        (cell,) = cells_of(spec)
        create_cell(storage, spec, cell, {})
        study = load_cell(storage, spec, cell)
        plain = optuna.create_study(direction="maximize", pruner=study.pruner.base)
        decisions = []
        for number in range(12):
            pair = (study.ask(), plain.ask())
            for step in range(1, 5):
                for trial in pair:
                    trial.report((number * 7 % 12) / 12 + step / 100, step)
                decisions.append(tuple(trial.should_prune() for trial in pair))
            for owner, trial in zip((study, plain), pair, strict=True):
                owner.tell(trial, state=TrialState.PRUNED)
        assert {a == b for a, b in decisions} == {True}
        assert {a for a, _ in decisions} == {True, False}


class TestSampler:
    def test_random_search_goes_on_where_it_was(self, storage: BaseStorage) -> None:
        spec = spec_of()
        (cell,) = cells_of(spec)
        create_cell(storage, spec, cell, {})
        whole = load_cell(storage, spec, cell)
        drawn = [whole.ask().suggest_float("lr", 1e-4, 1.0, log=True) for _ in range(4)]
        other = spec_of("name=other")
        create_cell(storage, other, cells_of(other)[0], {})
        for index in range(4):  # a process of its own each
            again = load_cell(storage, other, cells_of(other)[0], slot=index)
            assert again.ask().suggest_float("lr", 1e-4, 1.0, log=True) == drawn[index]

    def test_a_resumed_tpe_does_not_draw_its_first_values_again(self, storage: BaseStorage) -> None:
        spec = spec_of("sampler=tpe")
        (cell,) = cells_of(spec)
        create_cell(storage, spec, cell, {})
        drawn = []
        for _ in range(3):
            study = load_cell(storage, spec, cell)
            trial = study.ask()
            drawn.append(trial.suggest_float("lr", 1e-4, 1.0, log=True))
            study.tell(trial, 0.5)
        assert len(set(drawn)) == 3


class TestToRetry:
    def test_a_lone_interrupted_trial_is_still_to_be_retried(self) -> None:
        study = optuna.create_study(direction="maximize")
        trial = study.ask()
        trial.set_user_attr("reason", "interrupted")
        study.tell(trial.number, state=TrialState.FAIL)
        assert [t.number for t in to_retry(study.get_trials())] == [0]
        assert revive(study) == 1
        assert to_retry(study.get_trials()) == []


class TestAsk:
    """Two machines ask at the same moment: no lock is shared, the later trial is withdrawn."""

    def test_one_beyond_the_budget_is_withdrawn(
        self, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = spec_of(budget="{trials: 2}")
        ledger = Ledger(study, spec)
        assert ask(study, spec, ledger) is not None
        looked = has_work(study, spec)  # and then the other machine takes the last one
        other = ask(study, spec, ledger)
        assert other is not None
        answers = iter([looked, False])
        monkeypatch.setattr(cell_study, "has_work", lambda *_: next(answers))
        assert ask(study, spec, ledger) is None
        trials = study.get_trials()
        assert [t.state for t in trials] == [TrialState.RUNNING] * 2 + [TrialState.FAIL]
        assert trials[1].user_attrs["config_index"] == 1
        assert to_retry(trials) == []
        assert revive(study, lambda _: True) == 0

    def test_of_two_retries_of_one_trial_the_first_is_trained(self, study: optuna.Study) -> None:
        spec = spec_of(budget="{trials: 1}")
        plant(study, TrialState.FAIL, reason="interrupted", config_index=0)
        for _ in range(2):  # both machines found it
            study.add_trial(
                create_trial(state=TrialState.WAITING, user_attrs={"config_index": 0, "retry_of": 0})
            )
        first = ask(study, spec, Ledger(study, spec))
        assert first is not None
        assert first.number == 1
        assert ask(study, spec, Ledger(study, spec)) is None
        trials = study.get_trials()
        assert [t.state for t in trials[1:]] == [TrialState.RUNNING, TrialState.FAIL]
        assert revive(study, lambda _: True) == 0
        assert len(study.get_trials()) == 3

    def test_what_goes_on_from_a_retry_is_no_second_one(self, study: optuna.Study) -> None:
        spec = spec_of(budget="{trials: 1}")
        plant(study, TrialState.FAIL, reason="interrupted", config_index=0)
        plant(study, TrialState.PRUNED, config_index=0, retry_of=0)
        resume(study, study.get_trials()[1], until=2)
        trial = ask(study, spec, Ledger(study, spec))
        assert trial is not None
        assert trial.user_attrs["resumed_from"] == 1
