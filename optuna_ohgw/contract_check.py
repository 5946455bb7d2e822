"""Whether a task behind the contract can be trained at all: it is tried before anything is made."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from optuna_ohgw.cell_study import distributions
from optuna_ohgw.errors import UserError
from optuna_ohgw.own import OwnWorkload
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.spec_kinds import ContractSpec, OwnSpec
from optuna_ohgw.tasks.contract import PARTS
from optuna_ohgw.tasks.network import NetworkTask
from optuna_ohgw.variations import take_gradients
from optuna_ohgw.warmstart import WarmStart, warm_start
from optuna_ohgw.workloads import workload


def structures(spec: StudySpec) -> list[dict[str, Any]]:
    """Return the structures to try before a study starts: each choice once, the others as they are."""
    fixed = spec.task.structure
    tried = [{**fixed, name: choice} for name, entry in spec.choices.items() for choice in entry.choices]
    return tried or [fixed]


def check_contract(spec: StudySpec) -> str:
    """Try a task behind the contract before anything is made of its study; return what it is, in words.

    It is built, trained on one mini-batch and evaluated, its state is saved and taken over, its loss
    evaluated, and differentiated where that is short or may fail.

    Raises:
        UserError: If any of it cannot be done; it says what.
    """
    assert isinstance(spec.task, ContractSpec)
    done = ""
    for structure in structures(spec):
        work = workload(spec, spec.seeds[0], structure, torch.device("cpu"))
        assert isinstance(work, OwnWorkload)
        done = _Trial(spec, work).run()
    return done


def differentiates_twice(spec: StudySpec) -> bool:
    """Return whether a warm start needs second derivatives of the network, which not every layer has."""
    settings, mixed = spec.warm_start, {"label_smoothing", "magnitude"} & set(spec.ranges)
    if not take_gradients(spec.variations) or settings.estimator not in (None, "lean", "exact"):
        return False
    return settings.horizon > 1 or (settings.estimator == "exact" and bool(mixed))


@dataclass(frozen=True)
class _Trial:
    """A task and the study that it is tried for, at the middle of the study's space."""

    spec: StudySpec
    work: OwnWorkload

    def run(self) -> str:
        """Try all; return what the task is, in words."""
        with self._step("batches_per_epoch"):
            if (count := self.work.batches_per_epoch) < 1:
                raise ValueError(f"batches_per_epoch is {count}; give a whole number from 1")
        with self._step("build"):
            state = self.work.start(self.spec.seeds[0], 0)
        if self.psi.get("dropout") and isinstance(self.work.own, NetworkTask) and not self.work.own.drops:
            raise UserError("space.dropout: the network has no layer that drops; take it out of the space")
        # A whole evaluation of this package's own tasks takes hours on a CPU (ImageNet): they keep to it.
        if self._is_users:
            self._evaluate(state)
        self._train(state)
        self._differentiate(state)
        metric = self.spec.metric
        measured = f"{metric.name} ({'higher' if metric.maximize else 'lower'} is better)"
        return f"{self.spec.task.summary}: {count} mini-batches an epoch, {measured}"

    @property
    def psi(self) -> dict[str, float]:
        """Values of all hyper-parameters."""
        return {**self.spec.constants, **self._middle}

    @property
    def _space(self) -> SearchSpace:
        return SearchSpace(distributions(self.spec))

    @property
    def _middle(self) -> dict[str, float]:
        space = self._space
        return space.to_floats((space.low + space.high) / 2)

    @property
    def _is_users(self) -> bool:
        return isinstance(self.spec.task, OwnSpec)

    @contextmanager
    def _step(self, step: str) -> Iterator[None]:
        """Tell in a line what failed in which part of the contract."""
        assert isinstance(self.spec.task, ContractSpec)
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            kind = type(error).__name__
            raise UserError(f"task.name: {self.spec.task.path}: {step} fails: {kind}: {reason}") from error

    def _evaluate(self, state: Any) -> None:
        low, high = self.spec.metric.low, self.spec.metric.high
        for part in PARTS:
            with self._step(f"evaluate({part!r})"):
                found = self.work.evaluate(state, part)
                measured = f"the metric of {part} is {found.metric}"
                if math.isnan(found.metric) or not math.isfinite(found.loss):
                    raise ValueError(f"{measured}, the loss {found.loss} before training")
                if (low is not None and found.metric < low) or (high is not None and found.metric > high):
                    raise ValueError(f"{measured}, outside of {low} to {high}")

    def _train(self, state: Any) -> None:
        with self._step("train"):
            once, _ = self.work.short_train(replace(state, psi=self.psi), 0, 1)
        with self._step("state_dict"):
            if self._is_users:
                # Trained on without a break, then from the state: only what it leaves out can differ.
                on, again = (self.work.short_train(once, 1, 1)[0].digest() for _ in range(2))
                if on != again:
                    raise ValueError(
                        "training on from a state differs from training on without a break; it must hold all "
                        "that training changes, and train must draw by the seed alone"
                    )
            torch.save(state.content(), kept := io.BytesIO())
            kept.seek(0)
            back = self.work.restore(torch.load(kept, weights_only=True))
            if self._is_users:
                self.work.evaluate(back, "warm")
        with self._step("build"):
            if self.work.start(self.spec.seeds[0], 0).digest() != state.digest():
                raise ValueError("two calls with one seed give different states; draw by the seed alone")

    def _differentiate(self, state: Any) -> None:
        settings, space = self.spec.warm_start, self._space
        with self._step("loss"):
            loss = self.work.loss(replace(state, psi=self.psi), 0, settings.horizon)
            value = torch.as_tensor(loss(space.to_native(space.to_search(self._middle))))
            if value.numel() != 1:
                raise ValueError(f"a loss of shape {tuple(value.shape)} is no scalar")
        tried = self._is_users and take_gradients(self.spec.variations)
        if hasattr(self.work.own, "loss") and (tried or differentiates_twice(self.spec)):
            with self._step("the gradient of loss"):
                how = WarmStart(estimator=settings.estimator)
                warm_start(loss, space, self._middle, how, torch.Generator().manual_seed(0))
