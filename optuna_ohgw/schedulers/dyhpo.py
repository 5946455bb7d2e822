"""DyHPO: one step at a time, where a deep-kernel Gaussian process expects the most improvement."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from optuna_ohgw.schedulers import deep_kernel
from optuna_ohgw.schedulers.choosing import Array, Choice, Chooser
from optuna_ohgw.schedulers.deep_kernel import SEEN, WIDTH, Inputs, State

INITIAL = 4  # random starts
TRAINED_ON, EVIDENCE = 256, 1024  # most observations in the likelihood, in the posterior
FIRST_STEPS, FIRST_LR = 200, 1e-2  # from scratch
STEPS_EACH, MOST_STEPS, LR = 12, 50, 3e-3  # refinement, for each new observation
TRIES = 3
CLIP = 1.0  # distance of the worst score from the median, in those of the median from the best


class Observations(NamedTuple):
    """All that was seen, one row an observation.

    Attributes:
        configs: Candidate ``[n]``.
        places: Place in the candidate's curve ``[n]``, from 0.
        resources: Where it was observed ``[n]``.
        losses: Minimised ``[n]``; ∞ where it diverged.
        last: Whether it is the candidate's last ``[n]``.
    """

    configs: list[int]
    places: list[int]
    resources: list[int]
    losses: Array
    last: Array


class Dyhpo(Chooser):
    """DyHPO: "Supervising the Multi-Fidelity Race of Hyperparameter Configurations".

    Wistuba, Kadra and Grabocka 2022, Advances in Neural Information Processing Systems 35.

    A Gaussian process predicts the value of each candidate after its next step from its configuration,
    that budget and its curve so far (the paper's deep kernel, see :mod:`.deep_kernel`). The candidate
    with the largest multi-fidelity expected improvement is trained one step further; the incumbent is
    the best value observed at the same budget, else the best observed at all.

    Departures:

    - Losses are minimised. What the curves hold and, standardised, what is predicted, is their score
      between 0 and 1, see :func:`scaled`.
    - A diverged candidate is evidence, with the worst score, but no candidate.
    - The first four starts are random, and all until something finite is seen; the paper has one.
    - Running candidates count as observed, at their predicted value.
    - The network is trained by 200 steps of Adam at 0.01 from scratch, and goes on by 12 steps at
      0.003 for each new observation, at most 50; the authors' code takes 1000 in each of the first
      ten rounds, then 50, at 0.001.
    - The likelihood is that of at most 256 observations, drawn anew each time; the posterior has at
      most 1024, the last of each candidate before the others.
    - Training begins anew where it fails, and where refinement ends with a likelihood below that of
      independent noise; after three failures the choice is random, and its rule says so.

    The choice follows from pool, seed, events and ``state``. Asked again without a new event it is the
    same, and so it is in another process that is handed ``state``. It is computed on one thread, since
    sums depend on their number. Torch's generator and number of threads are left as they were.

    Cost: a refinement step takes a Cholesky factor of 256², a choice two more of 1024²; no training
    where nothing was observed since ``state``. With 500 of 600 candidates started, 1500 observations
    and 8 hyper-parameters: 0.3 s after one new report, 0.6 s after four or more, 3 s from scratch.

    Args:
        max_resource: Resource of full training.
        candidates: Configurations ``[n, d]`` in the unit cube.
        maximize: Whether higher values are better.
        seed: Seed of the random starts, of new weights and of the draws of observations.
        step: Units of resource by which a candidate goes on.
        state: Weights to go on from, of a scheduler of the same pool and seed; None to begin anew.

    Attributes:
        state: Weights after the last choice: float32 by name, 42 KB for 20 hyper-parameters, with
            the number of observations that they have seen. None before the first trained choice.

    Raises:
        ValueError: If an argument is out of its range, or the state has another number of
            hyper-parameters.
    """

    name = "dyhpo"

    def __init__(
        self,
        max_resource: int,
        candidates: Array,
        *,
        maximize: bool = False,
        seed: int = 0,
        step: int = 1,
        state: State | None = None,
    ) -> None:
        super().__init__(max_resource, candidates, maximize=maximize, seed=seed)
        if step < 1:
            raise ValueError(f"step is {step}; give 1 or more")
        if state is not None and (found := deep_kernel.dimension(state)) != candidates.shape[1]:
            raise ValueError(f"state has {found} hyper-parameters, the candidates {candidates.shape[1]}")
        self.step = step
        self.state = state
        self._begin = state  # where training begins while no event happens
        self._begin_events = 0

    def choose(self) -> Choice | None:
        """Return the candidate with the largest expected improvement; None if nothing is left."""
        anyone = [*self.fresh, *self.paused]
        if not anyone:
            return None
        if self._begin_events != self._events:
            self._begin, self._begin_events = self.state, self._events
        until = [min(self._resource(c) + self.step, self.max_resource) for c in anyone]
        seen = self._observations()
        fresh = len(self.candidates) - len(self.courses)
        known = len(seen.losses) > 1 and bool(np.isfinite(seen.losses).any())
        if not known or (fresh and len(self.courses) < INITIAL):
            # Fresh ones come first.
            place = int(self._rng(0, seen).integers(fresh or len(anyone)))
            return Choice(anyone[place], until[place], None, "initial design")
        with _apart():
            scores = self._improvements(anyone, until, seen)
        if scores is None:
            place = int(self._rng(0, seen).integers(len(anyone)))
            return Choice(anyone[place], until[place], None, "random: training failed")
        place = int(scores.argmax())
        return Choice(anyone[place], until[place], float(scores[place]), "expected improvement")

    def dump(self) -> dict[str, Any] | None:
        """Return the weights as text, some 60 KB for 20 hyper-parameters."""
        if self.state is None:
            return None
        return {"weights": base64.b64encode(save(self.state)).decode()}

    def load(self, memory: Mapping[str, Any]) -> None:
        """Take over what ``dump`` returned, in this or another process; not that of another space."""
        state = load(base64.b64decode(memory["weights"]))
        if deep_kernel.dimension(state) == self.candidates.shape[1]:
            self.state = state

    def _resource(self, config: int) -> int:
        return self.courses[config].resource if config in self.courses else 0

    def _rng(self, purpose: int, seen: Observations) -> np.random.Generator:
        key = purpose, len(self.courses), len(seen.losses)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def _observations(self) -> Observations:
        rows = [(c, i) for c, course in self.courses.items() for i in range(len(course.losses))]
        return Observations(
            [c for c, _ in rows],
            [i for _, i in rows],
            [self.courses[c].resources[i] for c, i in rows],
            np.array([self.courses[c].losses[i] for c, i in rows], dtype=float),
            np.array([i == len(self.courses[c].losses) - 1 for c, i in rows], dtype=bool),
        )

    def _improvements(self, anyone: list[int], until: list[int], seen: Observations) -> Tensor | None:
        """Return the expected improvement of each ``[m]``, in standard deviations; None without a model."""
        scores = scaled(seen.losses)
        curves: dict[int, list[float]] = {}
        for config, score in zip(seen.configs, scores.tolist(), strict=True):
            curves.setdefault(config, []).append(score)
        before = [curves[c][:i] for c, i in zip(seen.configs, seen.places, strict=True)]
        inputs = self._inputs(seen.configs, seen.resources, before)
        values = torch.from_numpy((scores - scores.mean()) / max(float(scores.std()), 1e-6)).float()
        state = self._trained(inputs, values, seen)
        if state is None:
            return None
        self.state = state

        kept = self._evidence(seen)
        known, targets = inputs.at(kept), values[kept]
        running = [c for c, course in self.courses.items() if course.running]
        if running:
            sent = [self.courses[c].until for c in running]
            pending = self._inputs(running, sent, [curves.get(c, []) for c in running])
            found = deep_kernel.posterior(state, known, targets, pending)
            if found is None:
                return None
            known, targets = known.with_rows(pending), torch.cat([targets, found[0].float()])
        found = deep_kernel.posterior(
            state, known, targets, self._inputs(anyone, until, [curves.get(c, []) for c in anyone])
        )
        if found is None:
            return None
        best: dict[int, float] = {}
        for resource, value in zip(seen.resources, values.tolist(), strict=True):
            best[resource] = max(value, best.get(resource, value))
        overall = max(best.values())
        incumbent = torch.tensor([best.get(u, overall) for u in until], dtype=torch.float64)
        return deep_kernel.expected_improvement(*found, incumbent)

    def _inputs(
        self, configs: Sequence[int], budgets: Sequence[int], curves: Sequence[Sequence[float]]
    ) -> Inputs:
        """Return where candidates are observed, the curves being those before the budgets."""
        # As many zeros as a filter is wide follow every curve, so that its length does not matter.
        length = max((len(course.losses) for course in self.courses.values()), default=0) + WIDTH
        padded = np.zeros((len(configs), length))
        for row, curve in enumerate(curves):
            padded[row, : len(curve)] = curve
        shares = np.array(budgets, dtype=float)[:, None] / self.max_resource
        points = np.hstack([self.candidates[list(configs)], shares])
        return Inputs(torch.from_numpy(points).float(), torch.from_numpy(padded).float())

    def _evidence(self, seen: Observations) -> Tensor:
        """Return which observations the posterior has, the last of each candidate before the others."""
        drawn = self._rng(2, seen).permutation(len(seen.losses))
        first = drawn[np.argsort(np.logical_not(seen.last[drawn]), kind="stable")]
        return torch.from_numpy(np.sort(first[:EVIDENCE]))

    def _trained(self, inputs: Inputs, values: Tensor, seen: Observations) -> State | None:
        """Return the state trained on all that was seen; None if that fails."""
        count, begin = len(seen.losses), self._begin
        before = 0 if begin is None else int(begin[SEEN])
        if begin is not None and before == count:
            return begin
        rng = self._rng(1, seen)
        kept = torch.from_numpy(np.sort(rng.permutation(count)[:TRAINED_ON]))
        inputs, values = inputs.at(kept), values[kept]
        for attempt in range(TRIES):
            if attempt:
                begin = None
            steps = FIRST_STEPS if begin is None else min(STEPS_EACH * max(count - before, 1), MOST_STEPS)
            lr = FIRST_LR if begin is None else LR
            torch.default_generator.manual_seed(int(rng.integers(2**31)))
            state = deep_kernel.fit(inputs, values, begin, steps=steps, lr=lr, seen=count)
            if state is not None:
                return state
        return None


def scaled(losses: Array) -> Array:
    """Return scores ``[n]`` of losses ``[n]``: 1 for the best, 0 from twice as far from it as the median.

    NaN and ∞ score 0. The distance of the worst, which may be 1e34, does not matter.
    """
    finite = np.sort(losses[np.isfinite(losses)])
    best, median = float(finite[0]), float(finite[(len(finite) - 1) // 2])
    span = (1 + CLIP) * (median - best)
    if not 0 < span < np.inf:
        span = max(abs(best), 1.0)
    clipped = np.minimum(np.where(np.isfinite(losses), losses, np.inf), best + span)
    return 1 - (clipped - best) / span


@contextmanager
def _apart() -> Iterator[None]:
    """Compute on one thread, and put back torch's number of threads and its generator of the processor."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
