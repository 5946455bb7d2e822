"""Tables: a multilayer perceptron on standardised columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optuna_ohgw.metric import ACCURACY
from optuna_ohgw.tasks.network import Batches, NetworkTask
from optuna_ohgw.tasks.tables import Part, load_tables

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU}
_WARM_ROWS = 256


class Tabular(NetworkTask):
    """Classification of a table's rows; see ``NetworkTask`` and, for the options, ``TabularSpec``."""

    metric = ACCURACY
    hyperparameters = {"lr": (0.0, 1.0)}  # noqa: RUF012 - a study's are those of TabularSpec

    def __init__(
        self,
        *,
        seed: int,
        device: torch.device,
        epochs: int,
        data: str,
        target: str | None = None,
        hidden: int = 64,
        layers: int = 2,
        activation: str = "relu",
        batch_size: int = 32,
        optimizer: str = "sgd",
        validation_share: float = 0.2,
        test_share: float = 0.2,
    ) -> None:
        super().__init__(optimizer, device, epochs)
        self.tables = load_tables(data, target, seed=seed, validation=validation_share, test=test_share)
        self.parts = {
            name: _tensors(getattr(self.tables, name), device) for name in ("train", "validation", "test")
        }
        self.hidden, self.layers, self.activation = hidden, layers, activation
        rows = len(self.parts["train"][0])
        self.batch_size = min(batch_size, rows)
        self.batches_per_epoch = rows // self.batch_size
        self.network = nn.Identity()

    def make_network(self) -> nn.Module:
        """Return a perceptron with dropout before its last layer."""
        width, layers = self.parts["train"][0].shape[1], list[nn.Module]()
        for _ in range(self.layers):
            layers += [nn.Linear(width, self.hidden), _ACTIVATIONS[self.activation]()]
            width = self.hidden
        return nn.Sequential(*layers, nn.Dropout(0.0), nn.Linear(width, len(self.tables.labels)))

    def order(self, seed: int) -> Tensor:
        """Return the rows of an epoch, in order; a last incomplete mini-batch is left out."""
        rows = torch.randperm(len(self.parts["train"][0]), generator=torch.Generator().manual_seed(seed))
        return rows[: self.batches_per_epoch * self.batch_size]

    def epoch_batches(self, seed: int) -> Batches:
        """Return position ↦ rows and classes."""
        order = self.order(seed).to(self.device)
        features, classes = self.parts["train"]

        def batch(position: int) -> tuple[Tensor, Tensor]:
            rows = order[position * self.batch_size : (position + 1) * self.batch_size]
            return features[rows], classes[rows]

        return batch

    def warm_batches(self, seed: int) -> Batches:
        """Return position ↦ distinct training rows, and classes."""
        features, classes = self.parts["train"]

        def batch(position: int) -> tuple[Tensor, Tensor]:
            generator = torch.Generator().manual_seed(seed + position)
            rows = torch.randperm(len(features), generator=generator)[: self.batch_size].to(self.device)
            return features[rows], classes[rows]

        return batch

    def evaluate(self, part: str) -> tuple[float, float]:
        """Return accuracy and cross-entropy (nats) on a part; ``warm``: on some training rows."""
        features, classes = self.parts["train" if part == "warm" else part]
        if part == "warm":
            features, classes = features[:_WARM_ROWS], classes[:_WARM_ROWS]
        self.network.eval()
        with torch.inference_mode():
            output = self.network(features)
            accuracy = (output.argmax(1) == classes).double().mean()
            return float(accuracy), float(F.cross_entropy(output, classes))

    def trivial(self) -> tuple[str, float]:
        """Return the validation accuracy of always saying the training part's most frequent class."""
        most = self.parts["train"][1].bincount().argmax()
        return "majority class", float((self.parts["validation"][1] == most).double().mean())


def _tensors(part: Part, device: torch.device) -> tuple[Tensor, Tensor]:
    features = torch.from_numpy(part.features).to(device, torch.get_default_dtype())
    return features, torch.from_numpy(part.classes).to(device)
