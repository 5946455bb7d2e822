from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from planted import RANGES, grown_storage, planted_spec

from optuna_ohgw.drift import benefit, benefit_correlation, divergence, knn_divergence, shift
from optuna_ohgw.records import Records, read_records

SPEC = planted_spec(seeds=range(6), pilot_seeds=(100,))


@pytest.fixture(scope="module")
def records() -> Records:
    return read_records(grown_storage(SPEC), SPEC)


class TestKnnDivergence:
    @pytest.mark.parametrize(
        ("mean", "sd", "dimensions"), [(0.0, 1.0, 1), (1.0, 1.0, 1), (0.5, 2.0, 1), (0.7, 1.5, 3)]
    )
    def test_of_two_normals_is_the_closed_form(self, mean: float, sd: float, dimensions: int) -> None:
        rng = np.random.default_rng(0)
        p = rng.normal(0, 1, (2000, dimensions))
        q = rng.normal(mean, sd, (2000, dimensions))
        exact = dimensions * (math.log(sd) + (1 + mean**2) / (2 * sd**2) - 0.5)
        # Over ten samples the standard deviation is at most 0.05, the bias at most 0.03.
        assert knn_divergence(p, q)[0] == pytest.approx(exact, abs=0.12)

    def test_of_a_part_of_a_uniform_law(self) -> None:
        rng = np.random.default_rng(1)
        p, q = rng.uniform(0, 0.25, (2000, 1)), rng.uniform(0, 1, (2000, 1))
        # Over forty samples: bias -0.07, standard deviation 0.03.
        assert knn_divergence(p, q)[0] == pytest.approx(math.log(4), abs=0.16)

    def test_of_laws_with_an_atom(self) -> None:
        rng = np.random.default_rng(2)
        p, q = (
            np.where(rng.uniform(size=(2000, 1)) < atom, 1.0, rng.uniform(size=(2000, 1)))
            for atom in (0.5, 0.25)
        )
        exact = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
        value, piled = knn_divergence(p, q)
        # Over forty samples: bias 0.02, standard deviation 0.02.
        assert value == pytest.approx(exact, abs=0.08)
        assert piled == int((p == 1.0).sum())

    def test_of_a_chosen_part_of_the_sample_itself(self) -> None:
        q = np.random.default_rng(2).uniform(0, 1, (2000, 1))
        twins = np.flatnonzero(q[:, 0] < 0.25)
        assert knn_divergence(q[twins], q, twins=twins)[0] == pytest.approx(math.log(4), abs=0.1)

    @pytest.mark.parametrize(("dimensions", "sd"), [(1, 0.5), (5, 0.8)])
    def test_a_random_part_of_the_sample_does_not_differ_from_it(self, dimensions: int, sd: float) -> None:
        n, values = 40, []
        for seed in range(40):
            q = np.random.default_rng(seed).uniform(0, 1, (128, dimensions))
            values.append(knn_divergence(q[:n], q, twins=np.arange(n))[0])
        # The form with two radii is off by -0.3 in five dimensions, the edges of the space being two.
        assert np.mean(values) == pytest.approx(0.0, abs=0.05)
        assert np.std(values) < sd / math.sqrt(n) * 1.2

    def test_what_did_not_move_has_not_diverged(self) -> None:
        q = np.random.default_rng(3).uniform(0, 1, (200, 3))
        assert knn_divergence(q, q, twins=np.arange(200)) == (0.0, 0)

    @pytest.mark.parametrize("dimensions", [1, 5])
    def test_a_small_move_of_each_is_a_small_divergence(self, dimensions: int) -> None:
        rng = np.random.default_rng(4)
        q = rng.uniform(0, 1, (500, dimensions))
        p = q + rng.normal(0, 1e-6, q.shape)
        assert abs(knn_divergence(p, q, twins=np.arange(500))[0]) < 1e-3
        # Without leaving out the twins the same samples seem to differ by ψ(6) - ψ(5) and more.
        assert knn_divergence(p, q)[0] < -0.09

    def test_leaving_out_the_twins_is_as_good_as_independent_samples(self) -> None:
        paired, independent = [], []
        for seed in range(20):
            rng = np.random.default_rng(seed)
            q, p = rng.normal(0, 1, (300, 1)), rng.normal(0, 1, (300, 1))
            paired.append(knn_divergence(q + 1.0, q, twins=np.arange(300))[0])
            independent.append(knn_divergence(p + 1.0, q)[0])
        # Standard error 0.03 each.
        assert np.mean(paired) == pytest.approx(0.5, abs=0.1)
        assert np.mean(paired) == pytest.approx(np.mean(independent), abs=0.12)

    def test_points_piled_up_at_a_bound_are_counted_and_seen(self) -> None:
        rng = np.random.default_rng(6)
        q = rng.uniform(0, 1, (400, 1))
        p = np.where(q > 0.9, 1.0, q)
        value, piled = knn_divergence(p, q, twins=np.arange(400))
        assert piled == int((q > 0.9).sum())
        assert value > 0.1

    @pytest.mark.parametrize(
        ("n", "m", "known"), [(6, 50, False), (7, 6, True), (50, 5, False), (7, 7, True)]
    )
    def test_takes_k_neighbours_of_each(self, n: int, m: int, known: bool) -> None:
        rng = np.random.default_rng(7)
        value, _ = knn_divergence(rng.uniform(size=(n, 1)), rng.uniform(size=(m, 1)))
        assert math.isfinite(value) == known


class TestShift:
    def test_says_what_was_planted(self, records: Records) -> None:
        table = shift(records.trials, SPEC.ranges).set_index(["variation", "parameter"])
        assert set(table.index.get_level_values("variation")) == {"asha-ohgw-1step"}
        row = table.loc[("asha-ohgw-1step", "magnitude")]
        assert (row["n"], row["moved"], row["coarse"], row["clipped"]) == (96, 1.0, 1.0, 0.0)
        own = records.trials[records.trials["variation"] == "asha-ohgw-1step"]
        assert row["step"] == pytest.approx(-1e-3 * np.median(own["gradient_magnitude"]), rel=1e-6)
        assert table.loc[("asha-ohgw-1step", "lr"), "coarse"] == 0.0
        # The learning rate spans four decades, the magnitude ten units.
        sizes = table["unit_size"].droplevel(0)
        assert sizes["lr"] / sizes["magnitude"] == pytest.approx(10 / 4)
        assert row["step_q1"] < row["step"] < row["step_q3"] < 0
        assert row["unit_q1"] == pytest.approx(row["step_q1"] / 10)
        assert row["unit_size"] == pytest.approx(-row["unit"])

    def test_counts_what_was_clipped_and_what_moved_nothing(self, records: Records) -> None:
        trials = records.trials.copy()
        own = trials.index[trials["variation"] == "asha-ohgw-1step"]
        trials.loc[own[:24], "clipped"] = "lr,magnitude"
        trials.loc[own[:48], "no_step"] = "the loss is nan"
        trials.loc[own[:48], "step_lr"] = 0.0
        table = shift(trials, SPEC.ranges).set_index("parameter")
        assert table["clipped"].to_dict() == {"lr": 0.25, "momentum": 0.0, "magnitude": 0.25}
        assert table.loc["lr", ["moved", "no_step"]].tolist() == [0.5, 0.5]

    def test_of_a_study_without_a_warm_start_is_empty(self, records: Records) -> None:
        only = records.trials[records.trials["variation"] == "asha-baseline"]
        assert shift(only, SPEC.ranges).empty


class TestDivergence:
    def test_of_a_study(self, records: Records) -> None:
        table = divergence(records.trials, SPEC.ranges, first_rung=3)
        assert len(table) == 2 * 3 * (len(RANGES) + 1)
        table = table.set_index(["variation", "of", "from", "parameter"])["kl"].sort_index()
        # Nothing moves in the baseline; a step of 1e-4 is next to nothing.
        assert (table.loc["asha-baseline", "trained", "suggested"] == 0).all()
        assert table.loc["asha-ohgw-1step", "trained", "suggested"].abs().max() < 0.05

    def test_a_planted_move_of_one_parameter(self, records: Records) -> None:
        trials = records.trials.copy()
        trials["trained_momentum"] = 0.5 * trials["suggested_momentum"]
        table = divergence(trials, SPEC.ranges, first_rung=3)
        table = table[(table["variation"] == "asha-baseline") & (table["of"] == "trained")]
        kl = table.set_index("parameter")["kl"]
        # A uniform law on half of its range; with some 100 points the standard deviation is 0.08.
        assert kl["momentum"] == pytest.approx(math.log(2), abs=0.2)
        assert kl["lr"] == kl["magnitude"] == 0
        assert kl["jointly"] > 0.2

    def test_the_promoted_are_those_that_went_on(self, records: Records) -> None:
        trials = records.trials.copy()
        high = trials["trained_momentum"] > 0.5
        trials["epochs"] = np.where(high, 9, 3)
        table = divergence(trials, SPEC.ranges, first_rung=3)
        own = table[(table["variation"] == "asha-baseline") & (table["of"] == "promoted")]
        kl = own[own["from"] == "suggested"].set_index("parameter")["kl"]
        baseline = trials["variation"] == "asha-baseline"
        assert own["n"].iloc[0] == int((high & baseline).sum())
        # About half of a uniform law: ln 2.
        assert kl["momentum"] == pytest.approx(math.log(99 / 49), abs=0.25)
        assert abs(kl["lr"]) < 0.3

    def test_of_too_few_points_says_so(self, records: Records) -> None:
        trials = records.trials.copy()
        trials["epochs"] = np.where(trials["trial"] == 0, 9, 3)
        table = divergence(trials, SPEC.ranges, first_rung=3)
        promoted = table[table["of"] == "promoted"]
        assert promoted[["kl", "noise"]].isna().all(axis=None)
        assert set(promoted["why"]) == {"6 points: 5 neighbours take 7"}
        assert table.loc[table["of"] == "trained", "why"].isna().all()

    def test_trials_whose_values_are_not_known_are_left_aside(self, records: Records) -> None:
        trials = records.trials.copy()
        own = trials.index[trials["variation"] == "asha-ohgw-1step"]
        trials.loc[own[:10], "trained_lr"] = math.nan
        table = divergence(trials, SPEC.ranges, first_rung=3)
        table = table[(table["variation"] == "asha-ohgw-1step") & (table["of"] == "trained")]
        assert set(zip(table["n"], table["m"], strict=True)) == {(86, 85)}
        assert table["kl"].notna().all()

    def test_of_nothing_is_empty(self, records: Records) -> None:
        assert divergence(records.trials.iloc[:0], SPEC.ranges, first_rung=3).empty


def steps_of(*rows: tuple[str, int, int, int, float]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["variation", "seed", "config_index", "epoch", "val_metric"])
    return table.assign(counted=True)


class TestBenefit:
    def test_pairs_trials_at_their_last_common_epoch(self) -> None:
        a, b = SPEC.variations
        steps = steps_of(
            *((a, 0, 0, e, 0.1 * e) for e in (1, 2, 3)),
            *((b, 0, 0, e, 0.2 * e) for e in (1, 2)),
            (a, 0, 1, 1, 0.5),
            (b, 0, 1, 1, 0.4),
            (b, 0, 1, 2, 0.9),
            (a, 1, 0, 1, 0.3),  # nothing to pair it with
            (b, 2, 0, 1, 0.3),
        )
        keys = [(b, 0, 0, 5.0, True), (b, 0, 1, 7.0, True), (b, 2, 0, 1.0, True), (a, 0, 0, math.nan, True)]
        trials = pd.DataFrame(keys, columns=["variation", "seed", "config_index", "gradient_norm", "counted"])
        table = benefit(steps, trials)
        assert table["epoch"].tolist() == [2, 1]
        assert table["gradient_norm"].tolist() == [5.0, 7.0]
        assert table["benefit"].tolist() == pytest.approx([0.4 - 0.2, 0.4 - 0.5])

    def test_an_epoch_without_a_finite_accuracy_is_no_common_one(self) -> None:
        a, b = SPEC.variations
        steps = steps_of((a, 0, 0, 1, 0.1), (a, 0, 0, 2, 0.2), (b, 0, 0, 1, 0.3), (b, 0, 0, 2, math.nan))
        trials = pd.DataFrame(
            [(b, 0, 0, 1.0, True)], columns=["variation", "seed", "config_index", "gradient_norm", "counted"]
        )
        assert benefit(steps, trials)["epoch"].tolist() == [1]

    def test_of_a_study_pairs_everything(self, records: Records) -> None:
        table = benefit(records.steps, records.trials)
        assert len(table) == 96
        assert table["benefit"].abs().max() == 0.0  # the same curves were planted in both
        assert benefit_correlation(table)["correlation"].isna().all()

    def test_a_planted_correlation_comes_back_with_an_interval_over_seeds(self) -> None:
        rng = np.random.default_rng(0)
        size = rng.lognormal(size=400)
        table = pd.DataFrame({"variation": "b", "seed": np.arange(400) % 20, "gradient_norm": size})
        table["benefit"] = np.log(size) + rng.normal(0, 1, 400)
        table["none"] = rng.normal(0, 1, 400)
        # Spearman's for a normal correlation r: 6/pi asin(r/2), r = 1/sqrt(2).
        exact = 6 / math.pi * math.asin(1 / math.sqrt(2) / 2)
        (row,) = benefit_correlation(table).to_dict("records")
        assert row["low"] < exact < row["high"]
        assert row["high"] - row["low"] < 0.25
        assert (row["pairs"], row["seeds"]) == (400, 20)
        (row,) = benefit_correlation(table.assign(benefit=table["none"])).to_dict("records")
        assert row["low"] < 0 < row["high"]

    def test_one_seed_has_no_interval(self) -> None:
        values = [1.0, 2.0, 3.0]
        table = pd.DataFrame({"variation": "b", "seed": 0, "gradient_norm": values, "benefit": values})
        (row,) = benefit_correlation(table).to_dict("records")
        assert row["correlation"] == pytest.approx(1.0)
        assert math.isnan(row["low"])


def test_a_correlation_that_some_resamples_lack_has_no_interval_and_no_warning() -> None:
    table = pd.DataFrame(
        {
            "variation": "one",
            "seed": [0, 0, 1, 1],
            "config_index": [0, 1, 0, 1],
            "gradient_norm": [1.0, 2.0, 3.0, 4.0],
            "benefit": [0.0, 0.0, 0.1, 0.2],
        }
    )
    (row,) = benefit_correlation(table).to_dict("records")
    assert math.isfinite(row["correlation"])
    assert math.isnan(row["low"])
