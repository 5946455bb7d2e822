"""Tables: boosted trees by XGBoost, a few rounds more every epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optuna_ohgw.metric import ACCURACY
from optuna_ohgw.tasks.tables import Part, load_tables

_HELD_OUT = 0.2


class Boosting:
    """Classification of a table's rows, see ``tasks.contract`` and, for the options, ``BoostingSpec``.

    An epoch boosts the trees there are by ``rounds`` more. Trees have no gradient in ψ, so hyper-gradients
    are central differences of the loss after a few rounds on four fifths of the training rows, drawn
    anew, measured on the others.
    """

    metric = ACCURACY
    hyperparameters = {"lr": (0.0, 1.0)}  # noqa: RUF012 - a study's are those of BoostingSpec

    def __init__(
        self,
        *,
        seed: int,
        device: torch.device,
        epochs: int,
        data: str,
        target: str | None = None,
        rounds: int = 1,
        max_depth: int = 6,
        grow_policy: str = "depthwise",
        max_bin: int = 256,
        validation_share: float = 0.2,
        test_share: float = 0.2,
    ) -> None:
        self.tables = load_tables(data, target, seed=seed, validation=validation_share, test=test_share)
        self.batches_per_epoch = rounds
        self.classes = len(self.tables.labels)
        self.fixed: dict[str, Any] = {
            "objective": "multi:softprob",
            "num_class": self.classes,
            "tree_method": "hist",
            "device": str(device),
            "nthread": torch.get_num_threads(),
            "max_depth": max_depth,
            "grow_policy": grow_policy,
            "max_bin": max_bin,
            "verbosity": 0,
        }
        self.booster: Any = None
        self._held: NDArray[np.int64] = np.arange(0)

    def build(self, seed: int) -> None:
        """Begin without a tree."""
        self.booster, self._held = None, np.arange(0)

    def train(self, psi: Mapping[str, float], epoch: int, seed: int, batches: int | None = None) -> float:
        """Boost by some rounds; return the cross-entropy (nats) on the rows that were used.

        With ``batches``, by so many rounds on a part of the rows; the others are held out for ``warm``.
        """
        import xgboost

        part = self.tables.train
        if batches is not None:
            order = np.random.default_rng(seed).permutation(len(part.classes))
            held = max(1, round(_HELD_OUT * len(order)))
            self._held, part = order[:held], _rows(part, order[held:])
        own = {("eta" if name == "lr" else name): float(value) for name, value in psi.items()}
        # XGBoost takes shares above 0 alone.
        own |= {name: max(own[name], 1e-3) for name in ("subsample", "colsample_bytree") if name in own}
        settings = {**self.fixed, **own, "seed": seed % 2**31}
        rows = xgboost.DMatrix(part.features, label=part.classes)
        rounds = batches or self.batches_per_epoch
        self.booster = xgboost.train(settings, rows, num_boost_round=rounds, xgb_model=self.booster)
        return _cross_entropy(self.booster.predict(rows), part.classes)

    def evaluate(self, part: str) -> tuple[float, float]:
        """Return accuracy and cross-entropy (nats) on a part; without a tree, of equal chances."""
        import xgboost

        rows: Part = self.tables.train if part == "warm" else getattr(self.tables, part)
        if part == "warm" and len(self._held):
            rows = _rows(rows, self._held)
        chances = np.full((len(rows.classes), self.classes), 1 / self.classes)
        if self.booster is not None:
            chances = self.booster.predict(xgboost.DMatrix(rows.features))
        return float(np.mean(chances.argmax(1) == rows.classes)), _cross_entropy(chances, rows.classes)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trees, in XGBoost's binary format."""
        raw = bytearray() if self.booster is None else self.booster.save_raw("ubj")
        return {"trees": torch.tensor(list(raw), dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the trees."""
        import xgboost

        raw = bytearray(state["trees"].cpu().numpy().tobytes())
        self.booster, self._held = xgboost.Booster(self.fixed) if raw else None, np.arange(0)
        if raw:
            self.booster.load_model(raw)

    def trivial(self) -> tuple[str, float]:
        """Return the validation accuracy of always saying the training part's most frequent class."""
        most = np.bincount(self.tables.train.classes).argmax()
        return "majority class", float(np.mean(self.tables.validation.classes == most))


def _rows(part: Part, rows: NDArray[np.int64]) -> Part:
    return Part(part.features[rows], part.classes[rows])


def _cross_entropy(chances: NDArray[Any], classes: NDArray[np.int64]) -> float:
    own = np.take_along_axis(chances, classes[:, None], axis=1)
    return float(-np.log(np.clip(own, math.exp(-50), None)).mean())
