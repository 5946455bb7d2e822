"""``ohgw_suggest``: the warm start as one line of an Optuna objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from optuna.distributions import FloatDistribution
from optuna.trial import BaseTrial

from optuna_ohgw.history import CHECKPOINT, CONFIG_INDEX, RECORD
from optuna_ohgw.sampler import OhgwSampler, WarpRequest
from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.warmstart import Warmed, WarmStart, warm_start

PUBLISHED_RULE = WarmStart()
# By identity: a FrozenTrial cannot be hashed.
_STARTED: WeakValueDictionary[int, BaseTrial] = WeakValueDictionary()


def ohgw_suggest(
    trial: BaseTrial,
    space: Mapping[str, FloatDistribution],
    loss: Any = None,
    settings: WarmStart | None = PUBLISHED_RULE,
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
    cost, the names that were fixed and, where nothing moved, the reason.

    Values that the user fixed (``enqueue_trial``, ``FixedTrial``) are trained as they are, at every
    call. A retry that carries an earlier trial's parameters and record trains the same values again.

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
    return suggest_by(warm_start, trial, space, loss, settings, every_rung=every_rung, seed=seed)


def suggest_by(
    warm: Callable[..., Warmed],
    trial: BaseTrial,
    space: Mapping[str, FloatDistribution],
    loss: Any,
    settings: WarmStart | None,
    *,
    every_rung: bool,
    seed: int,
) -> dict[str, float]:
    """Return what :func:`ohgw_suggest` does, warmed by ``warm``, which takes what :func:`warm_start` does."""
    frozen_space = SearchSpace(dict(space))
    names = frozenset(frozen_space.names)
    records: list[dict[str, Any]] = list(trial.user_attrs.get(RECORD, []))
    position = int(trial.user_attrs.get(CONFIG_INDEX, trial.number))

    def warmed(values: dict[str, float], held: frozenset[str]) -> dict[str, float]:
        if settings is None or held == names:
            record: dict[str, Any] = {"suggested": values, "trained": values, "rule": None, "cost_mbu": 0.0}
            if held == names:
                record["reason"] = "fixed"
        elif loss is None:
            raise ValueError("loss is None but a warm start needs one; pass settings=None")
        else:
            generator = torch.Generator().manual_seed(
                derive_seed(seed, Purpose.CONTROL, position, len(records))
            )
            record = warm(loss, frozen_space, values, settings, generator, frozen=held).record
        records.append({**record, "fixed": sorted(held)})
        return dict(record["trained"])

    study = getattr(trial, "study", None)
    attrs: Mapping[str, Any] = {}
    if study is not None and not records:
        attrs = study.get_trials(deepcopy=False)[trial.number].system_attrs
    again = _STARTED.get(id(trial)) is trial
    known = sorted(names & trial.params.keys())
    # A retry whose first run stopped inside the warm start has parameters and no record.
    if known and study is not None and not (records or again or "failed_trial" in attrs):
        raise ValueError(
            f"{known} have been suggested before ohgw_suggest, too late for a warm start; "
            "let ohgw_suggest suggest them, and do not pass them to study.ask"
        )
    _STARTED[id(trial)] = trial
    if not records:
        psi = _first(trial, space, attrs.get("fixed_params", {}), warmed)
    else:
        for name in frozen_space.names:
            _suggest(trial, name, space[name])
        made = trial.user_attrs.get(CHECKPOINT)
        if not again:
            # What an interrupted run warmed after its checkpoint is warmed anew.
            del records[1 if made is None else made["warm_starts"] :]
        again = again or made is not None
        psi = dict(records[-1]["trained"])
        if again and every_rung:
            psi = warmed(psi, frozenset(records[0].get("fixed", ())))
    trial.set_user_attr(RECORD, records)
    return psi


def _first(
    trial: Any,
    space: Mapping[str, FloatDistribution],
    fixed: Mapping[str, float],
    warmed: Callable[[dict[str, float], frozenset[str]], dict[str, float]],
) -> dict[str, float]:
    study = getattr(trial, "study", None)
    held = frozenset(space) if study is None else frozenset(space) & frozenset(fixed)
    if study is not None and isinstance(study.sampler, OhgwSampler):
        kept = {**fixed, **trial.params}  # what an interrupted trial recorded is trained already
        held = frozenset(space) & frozenset(kept)
        if len(held) < len(space):
            drawn = trial.relative_params
            relative = {name: drawn.pop(name) for name in space if name in drawn}
            try:
                with WarpRequest(space, kept, relative, lambda values: warmed(values, held)).open():
                    return {name: _suggest(trial, name, space[name]) for name in space}
            finally:
                drawn.update(relative)
    return warmed({name: _suggest(trial, name, space[name]) for name in space}, held)


def _suggest(trial: BaseTrial, name: str, distribution: FloatDistribution) -> float:
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
