"""The warm start: planted losses with known answers, and the record of what was done."""

import copy
import json
import math

import pytest
import torch
from optuna.distributions import FloatDistribution
from torch import nn

from optuna_ohgw.hypergrad import exact, finite_difference, lean
from optuna_ohgw.lookahead import lookahead_loss
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.warmstart import WarmStart, warm_start

LN10 = math.log(10.0)
RULES = ("raw", "trust-region", "line-search", "lr-grid", "gaussian")
GRADIENT_RULES = RULES[:3]
SIX_DIGITS = 5e-6  # a record keeps six significant digits of what is only read by people

# search bounds [-5, 0], [-6, -1], [0, 2]: widths 5, 5, 2
SPACE = SearchSpace(
    {
        "lr": FloatDistribution(1e-5, 1.0, log=True),
        "weight_decay": FloatDistribution(1e-6, 1e-1, log=True),
        "magnitude": FloatDistribution(0.0, 2.0),
    }
)
SUGGESTED = {"lr": 0.00317, "weight_decay": 0.000123, "magnitude": 0.7}
Z0 = SPACE.to_search(SUGGESTED)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def coordinates(psi):
    """Return the differentiable search vector of native tensors."""
    return torch.stack([psi["lr"].log10(), psi["weight_decay"].log10(), psi["magnitude"]])


def bowl(centre, curvature=(1.0, 1.0, 1.0)):
    """½·Σ a·(z − c)² in search coordinates, with gradient a·(z − c)."""
    return lambda psi: 0.5 * (vector(*curvature) * (coordinates(psi) - centre).square()).sum()


def moved(psi):
    return SPACE.to_search(psi) - Z0


def length_in_unit(psi):
    return float(torch.linalg.vector_norm(moved(psi) / SPACE.width))


class Slope(nn.Module):
    """One weight w; the output is x·w, so every gradient in w is the mean of x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, inputs):
        return self.w * inputs


def mean_output(output, target):
    return output.mean()


def noisy_batch(position):
    """Training inputs (1, ξ) with noise ξ of the position; the held-out input is 1."""
    xi = torch.randn(1, generator=generator(position), dtype=torch.float64)
    return torch.stack([torch.ones_like(xi), xi], dim=1), torch.zeros(1, dtype=torch.long)


def mix(inputs, magnitude):
    return inputs[:, :1] + magnitude * inputs[:, 1:]


def planted_noise(read=None):
    """A look-ahead loss w − lr·(1 + magnitude·ξ + wd·w): signal in lr, pure noise in magnitude."""

    def batches(position):
        if read is not None:
            read.append(position)
        return noisy_batch(position)

    return lookahead_loss(Slope(), batches, mean_output, augment=mix, prepare=lambda inputs: inputs[:, :1])


def network():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.SiLU(), nn.Dropout(0.3), nn.Linear(6, 3))
    return model.double()


def digits(position):
    inputs = torch.randn(8, 4, generator=generator(position + 50), dtype=torch.float64)
    return inputs, torch.randint(3, (8,), generator=generator(position + 90))


def jitter(inputs, magnitude):
    return inputs + magnitude * torch.randn_like(inputs)


def look_ahead(read=None, horizon=1):
    def batches(position):
        if read is not None:
            read.append(position)
        return digits(position)

    return lookahead_loss(network(), batches, horizon=horizon, augment=jitter)


@pytest.mark.parametrize("steps", [1, 3])
def test_raw_steps_on_a_quadratic_loss_by_closed_form(steps):
    centre, curvature = vector(-1.0, -4.0, 1.5), (1.0, 0.5, 2.0)
    settings = WarmStart(rule="raw", eta_h=0.3, steps=steps)
    result = warm_start(bowl(centre, curvature), SPACE, SUGGESTED, settings, generator())
    # each step shrinks z − c by 1 − η·a
    expected = centre + (1 - 0.3 * vector(*curvature)) ** steps * (Z0 - centre)
    assert SPACE.to_search(result.psi).tolist() == pytest.approx(expected.tolist(), rel=1e-13)
    step = [result.record["step"][n] for n in SPACE.names]
    assert step == pytest.approx((expected - Z0).tolist(), rel=SIX_DIGITS)
    before = centre + (1 - 0.3 * vector(*curvature)) ** (steps - 1) * (Z0 - centre)
    last = vector(*curvature) * (before - centre)
    gradient = [result.record["gradient"][n] for n in SPACE.names]
    assert gradient == pytest.approx(last.tolist(), rel=SIX_DIGITS)
    value = float(0.5 * (last * (before - centre)).sum())
    assert result.record["loss"] == pytest.approx(value, rel=SIX_DIGITS)
    assert result.record["cost_mbu"] == steps


def test_raw_steps_stop_at_the_bounds_and_the_record_names_them():
    settings = WarmStart(rule="raw", eta_h=1e9)
    result = warm_start(bowl(Z0 + vector(1.0, -1.0, 0.0)), SPACE, SUGGESTED, settings, generator())
    assert result.psi == {"lr": 1.0, "weight_decay": 1e-6, "magnitude": 0.7}
    assert result.record["at_bound"] == ["lr", "weight_decay"]


def test_a_trust_region_step_is_the_radius_along_minus_the_gradient_in_unit_coordinates():
    gradient = vector(0.2, -0.6, 0.5)
    settings = WarmStart(rule="trust-region", radius=0.15)
    result = warm_start(
        lambda psi: (gradient * coordinates(psi)).sum(), SPACE, SUGGESTED, settings, generator()
    )
    # in unit coordinates the gradient is (1, −3, 1), of norm √11
    expected = vector(-1.0, 3.0, -1.0) * 0.15 / math.sqrt(11)
    assert (moved(result.psi) / SPACE.width).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    assert length_in_unit(result.psi) == pytest.approx(0.15, rel=1e-12)


@pytest.mark.parametrize("planted", [0.05, 0.1, 0.2, 0.4])
def test_a_line_search_finds_a_planted_optimum(planted):
    # isotropic in unit coordinates, so the gradient points at the optimum
    away = vector(0.6, -0.48, 0.64) * SPACE.width
    centre = Z0 + planted * away
    settings = WarmStart(rule="line-search")
    result = warm_start(bowl(centre, (1 / 25, 1 / 25, 1 / 4)), SPACE, SUGGESTED, settings, generator())
    assert SPACE.to_search(result.psi).tolist() == pytest.approx(centre.tolist(), rel=1e-12)
    # the gradient, then five evaluations of a forward pass each
    assert result.record["cost_mbu"] == pytest.approx(1 + 5 / 3, rel=1e-14)


def test_a_line_search_stays_where_every_length_is_too_long():
    centre = Z0 + 0.01 * SPACE.width
    settings = WarmStart(rule="line-search")
    result = warm_start(bowl(centre, (1 / 25, 1 / 25, 1 / 4)), SPACE, SUGGESTED, settings, generator())
    assert result.psi == SUGGESTED
    assert result.record["reason"] is None


def test_a_line_search_evaluates_on_the_mini_batches_of_its_gradient():
    read = []
    warm_start(look_ahead(read), SPACE, SUGGESTED, WarmStart(rule="line-search", steps=2), generator())
    assert set(read) == {0, 1, 2, 3}
    half = read.index(2)
    assert set(read[:half]) == {0, 1}
    assert set(read[half:]) == {2, 3}


@pytest.mark.parametrize("rule", GRADIENT_RULES)
@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda psi: psi["lr"] * math.nan, "the loss is nan"),
        (lambda psi: psi["lr"] * math.inf, "the loss is inf"),
        (lambda psi: (psi["magnitude"] - 0.7).sqrt(), "the hyper-gradient is not finite"),
        (lambda psi: 1e200 * coordinates(psi).sum(), "the norm of the hyper-gradient overflows"),
    ],
    ids=["nan", "inf", "gradient", "overflow"],
)
def test_what_is_not_finite_moves_nothing_and_says_why(loss, reason, rule):
    settings = WarmStart(rule=rule, eta_h=1.0, steps=3)
    result = warm_start(loss, SPACE, SUGGESTED, settings, generator())
    assert result.psi == SUGGESTED
    assert result.record["reason"] == reason
    assert result.record["trained"] == SUGGESTED
    assert set(result.record["step"].values()) == {0.0}
    assert result.record["cost_mbu"] > 0
    json.dumps(result.record, allow_nan=False)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_a_zero_gradient_moves_nothing_bit_for_bit(rule, random):
    def flat(psi):
        return 0.0 * sum(psi.values()) + 1.0

    settings = WarmStart(rule=rule, eta_h=1.0, random=random, steps=2)
    result = warm_start(flat, SPACE, SUGGESTED, settings, generator())
    assert result.psi == SUGGESTED
    assert set(result.record["step"].values()) == {0.0}
    assert result.record["reason"] is None


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_parameters_left_alone_keep_their_exact_float_and_the_others_move(rule, random):
    loss = bowl(vector(-1.0, -2.0, 1.9))
    lossy = moves = 0
    for seed in range(20):
        a, b, c = torch.rand(3, generator=generator(seed), dtype=torch.float64).tolist()
        suggested = {"lr": 1e-3 * (1 + a), "weight_decay": 1e-4 * (1 + b), "magnitude": 0.5 + c}
        # a value that does not survive the round trip shows whether its float was kept
        round_trip = SPACE.to_floats(SPACE.to_search(suggested))
        lossy += round_trip["weight_decay"] != suggested["weight_decay"]
        settings = WarmStart(rule=rule, eta_h=0.1, steps=2, random=random, freeze=("weight_decay",))
        result = warm_start(loss, SPACE, suggested, settings, generator(seed), frozen={"magnitude"})
        assert result.psi["weight_decay"] == suggested["weight_decay"]
        assert result.psi["magnitude"] == suggested["magnitude"]
        assert result.record["step"]["weight_decay"] == result.record["step"]["magnitude"] == 0.0
        moves += result.psi["lr"] != suggested["lr"]
    assert lossy > 0
    # two random steps along one axis may cancel, and a line search along a wrong one stays
    assert (moves > 0) if random else (moves == 20)


@pytest.mark.parametrize("rule", RULES)
def test_when_everything_is_frozen_nothing_moves(rule):
    settings = WarmStart(rule=rule, eta_h=1.0)
    result = warm_start(
        bowl(vector(-1.0, -2.0, 1.9)), SPACE, SUGGESTED, settings, generator(), frozen=SPACE.names
    )
    assert result.psi == SUGGESTED


def planted_gradients(count):
    """Return the gradients [count, 3] of the planted loss by hand, in search coordinates."""
    lr, wd, magnitude = SUGGESTED.values()
    rows = []
    for draw in range(count):
        xi = float(noisy_batch(2 * draw)[0][0, 1])
        d_lr = -(1 + magnitude * xi + wd * 2.0)
        rows.append((lr * LN10 * d_lr, -lr * 2.0 * wd * LN10, -lr * xi))
    return vector(*rows)


def test_the_gradient_is_averaged_and_its_signal_to_noise_ratio_recorded():
    settings = WarmStart(rule="raw", estimator="exact", snr_batches=8)
    record = warm_start(planted_noise(), SPACE, SUGGESTED, settings, generator()).record
    rows = planted_gradients(8)
    mean, deviation = rows.mean(0), rows.std(0, correction=1)
    for i, name in enumerate(SPACE.names):
        assert record["gradient"][name] == pytest.approx(float(mean[i]), rel=SIX_DIGITS)
    for i, name in ((0, "lr"), (2, "magnitude")):
        ratio = abs(float(mean[i])) / (float(deviation[i]) / math.sqrt(8))
        assert record["snr"][name] == pytest.approx(ratio, rel=SIX_DIGITS)
    # every draw pays: K + 1 steps and K double backwards
    assert record["cost_mbu"] == 8 * 4.0


def test_min_snr_refuses_a_component_of_pure_noise_and_keeps_a_strong_one():
    loud = {"rule": "raw", "eta_h": 10.0, "snr_batches": 16}
    free = warm_start(planted_noise(), SPACE, SUGGESTED, WarmStart(**loud), generator())
    assert free.psi["magnitude"] != SUGGESTED["magnitude"]
    snr = free.record["snr"]
    assert snr["magnitude"] < 3.0 < snr["lr"]
    held = warm_start(planted_noise(), SPACE, SUGGESTED, WarmStart(**loud, min_snr=3.0), generator())
    assert held.psi["magnitude"] == SUGGESTED["magnitude"]
    assert held.psi["lr"] == free.psi["lr"] != SUGGESTED["lr"]
    assert held.record["snr"] == snr
    for factor, moves in [(0.999, True), (1.001, False)]:
        settings = WarmStart(**loud, min_snr=factor * snr["magnitude"])
        psi = warm_start(planted_noise(), SPACE, SUGGESTED, settings, generator()).psi
        assert (psi["magnitude"] != SUGGESTED["magnitude"]) is moves


@pytest.mark.parametrize("rule", ["raw", "trust-region"])
def test_the_random_control_is_as_long_as_the_gradient_step_and_charged_the_same(rule):
    common = {"rule": rule, "eta_h": 1e-2, "radius": 0.1}
    gradient = warm_start(look_ahead(), SPACE, SUGGESTED, WarmStart(**common), generator())
    seen = set()
    for seed in range(5):
        settings = WarmStart(**common, random=True)
        control = warm_start(look_ahead(), SPACE, SUGGESTED, settings, generator(seed))
        lengths = [
            float(torch.linalg.vector_norm(moved(r.psi) / (1.0 if rule == "raw" else SPACE.width)))
            for r in (gradient, control)
        ]
        # round trips of a few ε on coordinates up to 6, against steps of 1e-4 and more
        assert lengths[1] == pytest.approx(lengths[0], rel=1e-9)
        assert control.psi != gradient.psi
        assert control.record["gradient"] == gradient.record["gradient"]
        assert control.record["cost_mbu"] == gradient.record["cost_mbu"] > 0
        assert gradient.record["cost_uncharged_mbu"] == gradient.record["cost_mbu"]
        assert control.record["cost_uncharged_mbu"] == 0.0
        assert (control.record["random"], gradient.record["random"]) == (True, False)
        seen.add(tuple(control.psi.values()))
    assert len(seen) == 5


@pytest.mark.parametrize("rule", ["raw", "trust-region"])
def test_random_controls_are_uniform_in_the_coordinates_of_their_rule(rule):
    settings = WarmStart(rule=rule, random=True, eta_h=0.1, radius=0.1)
    scale = torch.ones(3, dtype=torch.float64) if rule == "raw" else SPACE.width
    loss, count = bowl(Z0 + 0.5), 400
    steps = torch.stack(
        [
            moved(warm_start(loss, SPACE, SUGGESTED, settings, generator(seed)).psi) / scale
            for seed in range(count)
        ]
    )
    unit = steps / torch.linalg.vector_norm(steps, dim=1, keepdim=True)
    # uniform on the sphere: means 0 with variance 1/3, mean squares 1/3 with variance 4/45
    assert float(unit.mean(0).abs().max()) < 5 * math.sqrt(1 / 3 / count)
    assert float((unit.square().mean(0) - 1 / 3).abs().max()) < 5 * math.sqrt(4 / 45 / count)


def test_a_random_line_search_pays_for_its_evaluations_and_is_charged_the_gradient_beside():
    records = [
        warm_start(
            look_ahead(), SPACE, SUGGESTED, WarmStart(rule="line-search", random=random), generator()
        ).record
        for random in (False, True)
    ]
    search, gradient = 5 * (1 + 1 / 3), lean(look_ahead(), SPACE, Z0).cost_mbu
    assert [r["cost_mbu"] for r in records] == pytest.approx([gradient + search] * 2, rel=1e-14)
    assert records[0]["cost_uncharged_mbu"] == pytest.approx(gradient + search, rel=1e-14)
    assert records[1]["cost_uncharged_mbu"] == pytest.approx(search, rel=1e-14)


@pytest.mark.parametrize("rule", [*GRADIENT_RULES, "gaussian"])
def test_random_rules_repeat_with_their_generator(rule):
    settings = WarmStart(rule=rule, random=True, radius=0.1, steps=2)
    different = set()
    for seed in range(4):
        first, second = (
            warm_start(look_ahead(), SPACE, SUGGESTED, settings, generator(seed)) for _ in range(2)
        )
        assert first.psi == second.psi
        assert first.record["step"] == second.record["step"]
        different.add(tuple(first.psi.values()))
    assert len(different) > 1


@pytest.mark.parametrize("rule", [*GRADIENT_RULES, "lr-grid"])
def test_gradients_and_grids_draw_nothing_from_the_generator(rule):
    stream = generator(4)
    before = stream.get_state()
    warm_start(look_ahead(), SPACE, SUGGESTED, WarmStart(rule=rule, steps=2), stream)
    assert torch.equal(stream.get_state(), before)


def test_a_random_control_moves_only_components_that_have_a_gradient():
    settings = WarmStart(rule="trust-region", random=True)
    for seed in range(10):
        result = warm_start(
            lambda psi: psi["lr"] + 0.0 * psi["weight_decay"] + psi["magnitude"],
            SPACE,
            SUGGESTED,
            settings,
            generator(seed),
        )
        assert result.psi["weight_decay"] == SUGGESTED["weight_decay"]
        assert result.psi["magnitude"] != SUGGESTED["magnitude"]


def test_gaussian_noise_costs_nothing_and_has_its_deviation():
    settings = WarmStart(rule="gaussian", sigma=0.05, steps=4)
    steps = torch.stack(
        [moved(warm_start(None, SPACE, SUGGESTED, settings, generator(seed)).psi) for seed in range(400)]
    )
    # four steps add up to 0.05·√4; 1200 values, standard error 1/√2400 = 2%
    assert float(steps.std()) == pytest.approx(0.1, rel=0.1)
    record = warm_start(None, SPACE, SUGGESTED, settings, generator()).record
    assert record["cost_mbu"] == record["cost_uncharged_mbu"] == 0.0
    assert record["gradient"] is record["loss"] is record["methods"] is None


def test_the_learning_rate_grid_is_scored_by_the_longer_loss():
    read = []
    result = warm_start(look_ahead(read), SPACE, SUGGESTED, WarmStart(rule="lr-grid"), generator())
    assert read == [*range(6)] * 5
    offsets = (0.0, -0.4, -0.2, 0.2, 0.4)
    # an independent loss of five steps, at lr·10^(5·offset), inside the bounds
    rates = [min(1.0, max(1e-5, SUGGESTED["lr"] * 10 ** (5 * o))) for o in offsets]
    longer = look_ahead(horizon=5)
    psi = {n: torch.tensor(v, dtype=torch.float64) for n, v in SUGGESTED.items()}
    values = [float(longer({**psi, "lr": torch.tensor(r, dtype=torch.float64)})) for r in rates]
    best = min(range(5), key=values.__getitem__)
    assert best != 0, "the test would not see a grid that stays"
    assert result.psi["lr"] == pytest.approx(rates[best], rel=1e-12)
    assert result.psi["weight_decay"] == SUGGESTED["weight_decay"]
    assert result.psi["magnitude"] == SUGGESTED["magnitude"]
    assert result.record["cost_mbu"] == pytest.approx(5 * (5 + 1 / 3), rel=1e-14)
    assert result.record["cost_uncharged_mbu"] == result.record["cost_mbu"]


@pytest.mark.parametrize(
    ("planted", "expected"), [(-0.4, -0.4), (-0.17, -0.2), (0.0, 0.0), (0.23, 0.2), (0.9, 0.4)]
)
def test_the_learning_rate_grid_takes_the_offset_nearest_a_planted_optimum(planted, expected):
    loss = bowl(Z0 + vector(5 * planted, 1.0, 1.0))
    result = warm_start(loss, SPACE, SUGGESTED, WarmStart(rule="lr-grid"), generator())
    assert moved(result.psi).tolist() == pytest.approx([5 * expected, 0.0, 0.0], abs=1e-12)
    assert result.record["cost_mbu"] == pytest.approx(5 / 3, rel=1e-14)


def test_a_grid_without_a_learning_rate_to_move_costs_nothing():
    bare = SearchSpace({"weight_decay": SPACE.distributions["weight_decay"]})
    settings = WarmStart(rule="lr-grid")
    results = [
        warm_start(look_ahead(), SPACE, SUGGESTED, settings, generator(), frozen=["lr"]),
        warm_start(look_ahead(), bare, {"weight_decay": 1e-3}, settings, generator()),
    ]
    for result in results:
        assert result.psi == result.record["suggested"]
        assert result.record["cost_mbu"] == 0.0


def test_three_steps_use_three_sets_of_mini_batches():
    read = []
    settings = WarmStart(rule="raw", steps=3, estimator="exact", freeze=("magnitude",))
    warm_start(look_ahead(read, horizon=2), SPACE, SUGGESTED, settings, generator())
    assert read == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_averaged_steps_use_fresh_mini_batches_as_well():
    read = []
    settings = WarmStart(rule="raw", steps=3, estimator="exact", snr_batches=2)
    warm_start(look_ahead(read), SPACE, SUGGESTED, settings, generator())
    assert read == [*range(12)]


def test_three_grid_steps_use_three_sets_of_mini_batches():
    read = []
    settings = WarmStart(rule="lr-grid", steps=3, grid=(0.1,), grid_horizon=2)
    warm_start(look_ahead(read), SPACE, SUGGESTED, settings, generator())
    assert read == [0, 1, 2] * 2 + [3, 4, 5] * 2 + [6, 7, 8] * 2


@pytest.mark.parametrize(
    ("settings", "estimator"),
    [
        (WarmStart(), lean),
        (WarmStart(estimator="lean"), lean),
        (WarmStart(estimator="exact"), exact),
        (WarmStart(estimator="finite-difference"), finite_difference),
    ],
)
def test_the_estimator_is_the_one_named_and_lean_by_default(settings, estimator):
    record = warm_start(look_ahead(), SPACE, SUGGESTED, settings, generator()).record
    expected = estimator(look_ahead(), SPACE, Z0)
    gradient = expected.gradient.tolist()
    assert list(record["gradient"].values()) == pytest.approx(gradient, rel=SIX_DIGITS)
    assert record["methods"] == expected.methods
    assert record["cost_mbu"] == expected.cost_mbu
    assert record["loss"] == pytest.approx(expected.loss, rel=SIX_DIGITS)


def test_a_plain_callable_is_differentiated_exactly_by_default():
    record = warm_start(bowl(Z0 + 1.0), SPACE, SUGGESTED, WarmStart(), generator()).record
    assert set(record["methods"].values()) == {"exact"}
    assert list(record["gradient"].values()) == pytest.approx([-1.0] * 3, rel=1e-12)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_the_record_is_json_and_complete(rule, random):
    settings = WarmStart(rule=rule, random=random, snr_batches=2, min_snr=0.1, steps=2)
    result = warm_start(look_ahead(), SPACE, SUGGESTED, settings, generator())
    record = result.record
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["suggested"] == SUGGESTED
    assert record["trained"] == result.psi
    assert record["rule"] == rule
    assert list(record["step"].values()) == pytest.approx(
        moved(result.psi).tolist(), rel=SIX_DIGITS, abs=1e-14
    )
    assert record["seconds"] >= 0.0
    assert type(record["peak_bytes"]) is int
    assert record["peak_bytes"] > 2**20
    assert all(type(v) is float for v in result.psi.values())


def test_a_ratio_without_noise_is_recorded_as_unknown_not_as_infinity():
    settings = WarmStart(rule="raw", snr_batches=2, min_snr=5.0, eta_h=0.1)
    result = warm_start(bowl(Z0 + 1.0), SPACE, SUGGESTED, settings, generator())
    assert result.record["snr"] == dict.fromkeys(SPACE.names)
    assert moved(result.psi).tolist() == pytest.approx([0.1] * 3, rel=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_a_warm_start_leaves_weights_buffers_and_random_streams_alone(rule):
    loss = look_ahead()
    loss.model.eval()
    before = copy.deepcopy(loss.model.state_dict())
    state = torch.get_rng_state()
    warm_start(loss, SPACE, SUGGESTED, WarmStart(rule=rule, steps=2, random=True), generator())
    after = loss.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not loss.model.training
    assert all(p.grad is None for p in loss.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_suggestion_is_copied_not_kept():
    suggested = dict(SUGGESTED)
    result = warm_start(bowl(Z0 + 1.0), SPACE, suggested, WarmStart(), generator())
    suggested["lr"] = 9.0
    assert result.record["suggested"] == SUGGESTED


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta_h": 0.0}, "eta_h must be positive but got 0.0"),
        ({"eta_h": math.nan}, "eta_h must be positive but got nan"),
        ({"radius": -0.2}, "radius must be positive but got -0.2"),
        ({"sigma": -1.5}, "sigma must be positive but got -1.5"),
        ({"steps": 0}, "steps must be at least 1 but got 0"),
        ({"steps": -3}, "steps must be at least 1 but got -3"),
        ({"estimator": "magic"}, "estimator must be one of .*'lean'.* but got 'magic'"),
        ({"snr_batches": 1}, "snr_batches must be 0 or at least 2 but got 1"),
        ({"snr_batches": -2}, "snr_batches must be 0 or at least 2 but got -2"),
        ({"min_snr": 2.0}, "min_snr needs snr_batches of at least 2 but got 0"),
    ],
)
def test_settings_out_of_range_are_refused_with_the_value_received(settings, message):
    with pytest.raises(ValueError, match=message):
        WarmStart(**settings)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"rule must be one of .* but got 'magic'"):
        WarmStart(rule="magic")


def test_the_control_is_as_long_as_a_step_that_the_bounds_cut():
    """A gradient far beyond the bounds: the twin moves to a bound, its control no further."""
    space = SearchSpace({"a": FloatDistribution(-1.0, 1.0), "b": FloatDistribution(-50.0, 50.0)})
    start = {"a": 0.4, "b": 0.0}
    lengths = []
    for random in (False, True):
        settings = WarmStart(random=random)
        generator = torch.Generator().manual_seed(3)
        warmed = warm_start(lambda psi: 1e6 * psi["a"] + 1e-3 * psi["b"], space, start, settings, generator)
        lengths.append(math.hypot(*(warmed.psi[n] - start[n] for n in start)))
    assert lengths[0] == pytest.approx(1.4, rel=1e-6)
    assert 0 < lengths[1] <= 1.4 + 1e-9


def test_a_layer_that_cannot_be_differentiated_twice_is_told_with_what_to_do():
    def loss(psi):
        weight = torch.ones((), dtype=torch.float64, requires_grad=True)
        hard = nn.functional.hardsigmoid(weight * psi["lr"])
        (inner,) = torch.autograd.grad(hard, weight, create_graph=True)
        return inner**2

    with pytest.raises(
        RuntimeError, match=r"not implemented: .* set horizon 1 and lean, or finite-difference"
    ):
        warm_start(loss, SPACE, SUGGESTED, WarmStart(), torch.Generator().manual_seed(0))
