from __future__ import annotations

import pytest

from optuna_ohgw.variations import (
    WARM_STARTS,
    base_of,
    baseline_among,
    eta_of,
    scheduler_of,
    takes_eta,
    warm_start_of,
)


@pytest.mark.parametrize(
    ("name", "base", "eta"),
    [
        ("asha-ohgw-1step@3e-4", "asha-ohgw-1step", 3e-4),
        ("asha-ohgw-1step@0.0003", "asha-ohgw-1step", 3e-4),
        ("asha-ohgw-3step@.5", "asha-ohgw-3step", 0.5),
        ("asha-random-warm@1E+1", "asha-random-warm", 10.0),
        ("asha-random-3step@2", "asha-random-3step", 2.0),
        ("asha-ohgw-1step", "asha-ohgw-1step", None),
        ("asha-baseline", "asha-baseline", None),
    ],
)
def test_name_is_base_and_step_size(name, base, eta):
    assert base_of(name) == base
    assert eta_of(name) == eta


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan", "inf", "1e999", "1_0", "1e-3@2", " 1", "1e"])
def test_no_positive_number_is_refused_with_the_name(text):
    with pytest.raises(ValueError, match="no positive number after the @; give one"):
        eta_of(f"asha-ohgw-1step@{text}")


def test_only_the_published_rule_and_its_control_have_a_step_size():
    able = {name for name in WARM_STARTS if takes_eta(name)}
    assert able == {"random-warm", "ohgw-1step", "ohgw-3step", "random-3step"}
    assert takes_eta("asha-ohgw-1step@3e-4")


@pytest.mark.parametrize(
    ("name", "scheduler", "warm"),
    [
        ("asha-baseline", "asha", "baseline"),
        ("asha-promotion-ohgw-1step@3e-4", "asha-promotion", "ohgw-1step"),
        ("pasha-lr-grid", "pasha", "lr-grid"),
        ("random-warm", None, "random-warm"),
        ("hyperband-synchronous-random-linesearch", "hyperband-synchronous", "random-linesearch"),
        ("pilot", None, None),
        ("asha-2step", None, None),
    ],
)
def test_name_is_scheduler_and_warm_start(name, scheduler, warm):
    assert (scheduler_of(name), warm_start_of(name)) == (scheduler, warm)


def test_no_warm_start_ends_like_another():
    assert all(warm_start_of(f"x-{name}") == name for name in WARM_STARTS)


def test_the_baseline_has_the_scheduler_of_the_others():
    assert baseline_among(["pilot", "pasha-ohgw-1step", "pasha-ohgw-3step"]) == "pasha-baseline"
    assert baseline_among([]) == "asha-baseline"
