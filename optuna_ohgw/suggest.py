"""``ohgw_suggest``: the warm start as one line of an Optuna objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from optuna.distributions import FloatDistribution
from optuna.trial import BaseTrial

from optuna_ohgw.sampler import CONFIG_INDEX, OhgwSampler, WarpRequest
from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.warmstart import WarmStart, warm_start

RECORD = "ohgw"
_STARTED: WeakSet[BaseTrial] = WeakSet()


def ohgw_suggest(
    trial: BaseTrial,
    space: Mapping[str, FloatDistribution],
    loss: Any = None,
    settings: WarmStart | None = WarmStart(),
    *,
    every_rung: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Return native values to train with: the suggestion, moved by a warm start.

    The first call of a trial suggests every parameter of ``space`` and warms it. A later call
    returns the same values or, with ``every_rung``, warms the values in use once more, from the
    present weights. Works with any sampler; then ``trial.params`` holds the suggestion. With
    :class:`OhgwSampler` it holds the trained values of the first call. The trial's ``ohgw``
    attribute is a list of records, one a warm start: suggestion, trained values, gradient, step,
    cost and, where nothing moved, the reason.

    Values that the user fixed (``enqueue_trial``, ``FixedTrial``) are trained as they are. A retry
    that carries an earlier trial's parameters and record trains the same values again.

    Args:
        trial: The running trial.
        space: Continuous parameters by name.
        loss: ψ ↦ scalar loss, such as :func:`lookahead_loss`; ψ holds 0-d native tensors.
        settings: What to do; None: suggest only and record that.
        every_rung: Warm again at each later call.
        seed: Seed of random controls, which also depend on the trial's position.

    Raises:
        ValueError: If a name was suggested before this call, or a warm start has no loss.
    """
    frozen_space = SearchSpace(dict(space))
    records: list[dict[str, Any]] = list(trial.user_attrs.get(RECORD, []))
    position = int(trial.user_attrs.get(CONFIG_INDEX, trial.number))

    def warmed(values: dict[str, float], held: frozenset[str]) -> dict[str, float]:
        if settings is None:
            records.append({"suggested": values, "trained": values, "rule": None, "cost_mbu": 0.0})
            return values
        if loss is None:
            raise ValueError("loss is None but a warm start needs one; pass settings=None")
        generator = torch.Generator().manual_seed(derive_seed(seed, Purpose.CONTROL, position, len(records)))
        result = warm_start(loss, frozen_space, values, settings, generator, frozen=held)
        records.append(result.record)
        return result.psi

    known = sorted(name for name in frozen_space.names if name in trial.params)
    again = trial in _STARTED
    _STARTED.add(trial)
    if records:
        for name in frozen_space.names:
            _suggest(trial, name, space[name])
        if not again:
            del records[1:]
        psi: dict[str, float] = dict(records[-1]["trained"])
        if again and every_rung:
            psi = warmed(psi, frozenset())
    elif known and hasattr(trial, "study"):
        raise ValueError(
            f"{known} have been suggested before ohgw_suggest, too late for a warm start; "
            "let ohgw_suggest suggest them, and do not pass them to study.ask"
        )
    else:
        psi = _first(trial, space, warmed)
    if not records:
        records.append({"suggested": psi, "trained": psi, "rule": None, "cost_mbu": 0.0, "reason": "fixed"})
    trial.set_user_attr(RECORD, records)
    return psi


def _first(
    trial: Any,
    space: Mapping[str, FloatDistribution],
    warmed: Callable[[dict[str, float], frozenset[str]], dict[str, float]],
) -> dict[str, float]:
    study = getattr(trial, "study", None)
    if isinstance(getattr(study, "sampler", None), OhgwSampler):
        drawn = trial.relative_params
        relative = {name: drawn.pop(name) for name in space if name in drawn}
        with WarpRequest(space, relative, warmed).open():
            return {name: _suggest(trial, name, space[name]) for name in space}
    suggested = {name: _suggest(trial, name, space[name]) for name in space}
    if study is None:
        return suggested
    fixed = study.get_trials(deepcopy=False)[trial.number].system_attrs.get("fixed_params", {})
    return warmed(suggested, frozenset(fixed) & frozenset(space))


def _suggest(trial: BaseTrial, name: str, distribution: FloatDistribution) -> float:
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
