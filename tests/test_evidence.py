from __future__ import annotations

import math

import numpy as np
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from planted import FOUR, PAIR, START, grown_storage, plant_cell, planted_spec, planted_storage, planted_trial

from optuna_ohgw.cells import Cell
from optuna_ohgw.evidence import Evidence, evidence_of, gather
from optuna_ohgw.records import read_records

SPEC = planted_spec(FOUR, range(8), pilot_seeds=(100, 101))


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return gather(grown_storage(SPEC), SPEC, "planted.yaml")


class TestWhole:
    def test_the_verdict_is_on_the_pilots_target(self, evidence: Evidence) -> None:
        assert evidence.pilot is not None
        assert evidence.primary == evidence.pilot
        assert evidence.targets == [0.9, evidence.pilot]
        assert len(evidence.sentences) == 3
        assert set(evidence.verdicts["variation"]) == set(FOUR) - {"asha-baseline"}

    def test_without_pilots_it_is_on_the_first_target(self) -> None:
        spec = planted_spec(seeds=range(3), target=0.7)
        found = gather(grown_storage(spec), spec, "x")
        assert (found.primary, found.pilot) == (0.7, None)

    def test_there_is_a_row_a_variation_in_the_files_order(self, evidence: Evidence) -> None:
        assert evidence.table["variation"].tolist() == list(FOUR)
        assert evidence.table["cells"].tolist() == [8] * 4
        assert evidence.table["finished"].tolist() == [8] * 4
        assert evidence.table["trials"].tolist() == [128] * 4

    def test_the_medians_and_quartiles_are_those_of_the_cells(self, evidence: Evidence) -> None:
        own = evidence.cells[evidence.cells["variation"] == "asha-ohgw-1step"]
        row = evidence.table.set_index("variation").loc["asha-ohgw-1step"]
        for name in ("best_val", "final_test", "overhead_s", "overhead_flops", "peak_ram"):
            low, middle, high = np.quantile(own[name], [0.25, 0.5, 0.75])
            assert (row[f"{name}_q1"], row[name], row[f"{name}_q3"]) == pytest.approx((low, middle, high))

    def test_a_known_median_of_times(self) -> None:
        spec = planted_spec(seeds=range(4))
        reached = {0: 100.0, 1: 300.0, 2: 500.0, 3: 9e9}
        cells = {(v, s): (t, 1000.0) for s, t in reached.items() for v in PAIR}
        row = gather(planted_storage(cells, spec), spec, "x").table.iloc[0]
        assert row["T@0.9_mbu"] == 400.0  # the curve stands at 1/2 from 300 to 500
        assert row["reached@0.9"] == 3
        assert row["sd@0.9_mbu"] == pytest.approx(np.std([100, 300, 500, 1000], ddof=1))
        # Up to 1000, when the fourth was given up.
        assert row["restricted_mean@0.9_mbu"] == pytest.approx((100 + 300 + 500 + 1000) / 4)

    def test_nothing_is_missing_but_what_diverged(self, evidence: Evidence) -> None:
        (line,) = evidence.missing
        diverged = evidence.records.trials["reason"].notna().sum()
        assert line == f"{diverged} of {34 * 16} trials diverged and were pruned."


class TestPartial:
    def test_an_empty_storage(self) -> None:
        found = gather(InMemoryStorage(), SPEC, "x")
        assert found.missing == ["No cell of planted is in the storage yet."]
        assert found.table.empty
        assert found.comparisons.empty
        assert found.sentences == []

    def test_a_running_study(self) -> None:
        storage = grown_storage(planted_spec(FOUR, range(3), pilot_seeds=(100,)))
        cell = plant_cell(storage, Cell("planted", "asha-baseline", 3), SPEC)
        storage.create_new_trial(cell, template_trial=planted_trial(0, [0.4], state=TrialState.RUNNING))
        found = gather(storage, SPEC, "x")
        assert found.primary is None
        assert "asha-baseline: seed 3 of 8 not finished; what there is of them counts." in found.missing
        assert "asha-baseline: seeds 4, 5, 6, 7 of 8 not begun." in found.missing
        assert "pilot: seed 101 of 2 not begun." in found.missing
        assert "The pilots are not finished: there is no τ* and no verdict yet." in found.missing
        assert found.table["cells"].tolist() == [4, 3, 3, 3]
        assert found.verdicts.empty
        # What there is is compared all the same.
        assert (found.comparisons["pairs"] == 3).all()
        assert not found.comparisons["enough"].any()

    def test_a_missing_variation(self) -> None:
        storage = grown_storage(planted_spec(FOUR[:3], range(8), pilot_seeds=(100, 101)))
        found = gather(storage, SPEC, "x")
        assert "asha-ohgw-3step: none of its 8 cells has begun." in found.missing
        assert found.table["variation"].tolist() == list(FOUR[:3])

    def test_a_study_without_a_baseline(self) -> None:
        spec = planted_spec(FOUR[1:], range(8))
        found = gather(grown_storage(spec), spec, "x")
        assert any("asha-baseline is not in the study" in line for line in found.missing)
        baseline = found.comparisons[found.comparisons["kind"] == "baseline"]
        assert (baseline["pairs"] == 0).all()
        assert all("nothing to compare" in sentence for sentence in found.sentences)

    def test_one_seed(self) -> None:
        spec = planted_spec(FOUR, [5])
        found = gather(grown_storage(spec), spec, "x")
        assert "There is one seed: no spread and no test." in found.missing
        assert set(found.verdicts["outcome"]) == {"undecided"}
        assert all("too few pairs" in s or "nothing can be said" in s for s in found.sentences)
        assert math.isnan(found.table["sd@0.9_mbu"].iloc[0])

    def test_a_cell_whose_every_trial_failed(self) -> None:
        storage = grown_storage(planted_spec(FOUR, range(7), pilot_seeds=(100, 101)))
        for variation in FOUR:
            cell = plant_cell(storage, Cell("planted", variation, 7), SPEC)
            for k in range(3):
                failed = planted_trial(k, [], state=TrialState.FAIL, reason="ValueError: no")
                storage.create_new_trial(cell, template_trial=failed)
        found = gather(storage, SPEC, "x")
        assert "asha-ohgw-1step: every trial failed in seed 7 (ValueError: no)." in found.missing
        assert found.table["cells"].tolist() == [8] * 4
        assert found.table["failed"].tolist() == [3] * 4
        own = found.times[found.times["seed"] == 7]
        assert not own["reached"].any()
        assert (own["budget_mbu"] == 0).all()
        at = found.comparisons[found.comparisons["budget"] == "mbu"]
        assert (at["pairs"] == 8).all()
        assert (at["unknown"] >= 1).all()

    def test_accuracies_that_are_not_finite(self) -> None:
        spec = planted_spec(seeds=range(6))
        storage = InMemoryStorage()
        for seed in spec.seeds:
            for variation in PAIR:
                cell = plant_cell(storage, Cell("planted", variation, seed), spec)
                diverged = [planted_trial(k, [None], start=START + 10 * k) for k in range(2)]
                for trial in diverged:
                    storage.create_new_trial(cell, template_trial=trial)
        found = gather(storage, spec, "x")
        assert "24 of 24 trials diverged and were pruned." in found.missing
        assert found.table["best_val"].isna().all()
        assert found.table["reached@0.9"].tolist() == [0, 0]
        assert np.isinf(found.table["T@0.9_mbu"]).all()

    def test_what_moved_nothing_is_said(self) -> None:
        spec = planted_spec(seeds=range(2))
        storage = grown_storage(spec)
        records = read_records(storage, spec)
        records.trials.loc[records.trials["warm_starts"] > 0, "no_step"] = "the loss is nan"
        assert "32 warm starts moved nothing (the loss is nan)." in evidence_of(records, "x").missing
