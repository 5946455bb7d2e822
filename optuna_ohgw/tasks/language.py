"""Language modelling: a small Transformer that predicts the next token."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from optuna_ohgw.lookahead import LookaheadLoss
from optuna_ohgw.metric import PERPLEXITY
from optuna_ohgw.tasks.network import Batches, NetworkTask
from optuna_ohgw.tasks.text import load_text, tokens_of

_WARM_BATCHES = 4
_MOST_NATS = 50.0


class Block(nn.Module):
    """Causal attention and a perceptron, each normalised before and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.read, self.write = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, T, width]``."""
        batch, length, width = x.shape
        parts = self.read(self.before(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        share = self.drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=share, is_causal=True)
        x = x + self.drop(self.write(mixed.transpose(1, 2).reshape(batch, length, width)))
        changed: Tensor = x + self.drop(self.perceptron(self.between(x)))
        return changed


class Transformer(nn.Module):
    """A decoder: tokens ``[B, T]`` ↦ logits ``[B·T, V]`` of the tokens that follow."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.after, self.predict = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.twice = False  # whether a second derivative is to be taken: torch's fast attention has none
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        if self.twice:
            with sdpa_kernel(SDPBackend.MATH):
                return self._rest(x)
        return self._rest(x)

    def _rest(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.predict(self.after(x))
        return logits.flatten(0, 1)


class Language(NetworkTask):
    """Next-token prediction; see ``NetworkTask`` and, for the options, ``LanguageSpec``.

    An epoch visits every window of ``context`` tokens of the training text once, in a random order, or
    ``batches`` mini-batches of them. Validation and test read their text window by window. The metric is
    the perplexity of a token of this BPE, which compares with no other vocabulary's.
    """

    metric = PERPLEXITY
    hyperparameters = {"lr": (0.0, 1.0)}  # noqa: RUF012 - a study's are those of LanguageSpec

    def __init__(
        self,
        *,
        seed: int,
        device: torch.device,
        epochs: int,
        data: str,
        train_file: str = "train.txt",
        validation_file: str = "valid.txt",
        test_file: str = "test.txt",
        text_column: str = "text",
        train_characters: int | None = None,
        evaluation_characters: int | None = None,
        vocabulary: int = 2048,
        context: int = 64,
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        batch_size: int = 16,
        batches: int | None = None,
        optimizer: str = "adamw",
    ) -> None:
        super().__init__(optimizer, device, epochs)
        if width % heads:
            raise ValueError(f"task.width: {width} is no multiple of task.heads {heads}; give one that is")
        files = {"train": train_file, "validation": validation_file, "test": test_file}
        limits = {"train": train_characters}
        limits |= dict.fromkeys(("validation", "test"), evaluation_characters)
        tokens, self.vocabulary = tokens_of(load_text(data, files, text_column, limits), vocabulary)
        self.windows = {part: _windows(ids, context, part).to(device) for part, ids in tokens.items()}
        self.counts = torch.bincount(tokens["train"], minlength=self.vocabulary)
        self.size = (context, width, layers, heads)
        self.batch_size = min(batch_size, len(self.windows["train"]))
        whole = len(self.windows["train"]) // self.batch_size
        self.batches_per_epoch = min(batches or whole, whole)
        self.network = nn.Identity()

    def make_network(self) -> nn.Module:
        """Return a Transformer with new weights."""
        return Transformer(self.vocabulary, *self.size)

    def order(self, seed: int) -> Tensor:
        """Return the windows of an epoch, in order."""
        order = torch.randperm(len(self.windows["train"]), generator=torch.Generator().manual_seed(seed))
        return order[: self.batches_per_epoch * self.batch_size]

    def epoch_batches(self, seed: int) -> Batches:
        """Return position ↦ tokens ``[B, T]`` and those that follow ``[B·T]``."""
        order = self.order(seed).to(self.device)

        def batch(position: int) -> tuple[Tensor, Tensor]:
            rows = order[position * self.batch_size : (position + 1) * self.batch_size]
            return _pair(self.windows["train"][rows])

        return batch

    def warm_batches(self, seed: int) -> Batches:
        """Return position ↦ a mini-batch of distinct training windows."""
        windows = self.windows["train"]

        def batch(position: int) -> tuple[Tensor, Tensor]:
            generator = torch.Generator().manual_seed(seed + position)
            rows = torch.randperm(len(windows), generator=generator)[: self.batch_size].to(self.device)
            return _pair(windows[rows])

        return batch

    def train(self, psi: Mapping[str, float], epoch: int, seed: int, batches: int | None = None) -> float:
        """Train an epoch; return the mean loss (nats a token)."""
        self._attend(twice=False)
        return super().train(psi, epoch, seed, batches)

    def loss(self, psi: Mapping[str, float], epoch: int, seed: int, horizon: int) -> LookaheadLoss:
        """Return the look-ahead loss."""
        self._attend(twice=True)
        return super().loss(psi, epoch, seed, horizon)

    def evaluate(self, part: str) -> tuple[float, float]:
        """Return perplexity and cross-entropy (nats a token) on a part; ``warm``: on some training text."""
        windows = self.windows["train" if part == "warm" else part]
        if part == "warm":
            windows = windows[: _WARM_BATCHES * self.batch_size]
        self._attend(twice=False)
        self.network.eval()
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        with torch.inference_mode():
            for rows in torch.split(windows, 4 * self.batch_size):
                tokens, follow = _pair(rows)
                total += F.cross_entropy(self.network(tokens), follow, reduction="sum").double()
        nats = float(total) / (len(windows) * (windows.shape[1] - 1))
        return math.exp(min(nats, _MOST_NATS)), nats

    def trivial(self) -> tuple[str, float]:
        """Return the validation perplexity of the training text's token frequencies, one added to each."""
        chances = (self.counts + 1).double() / (self.counts + 1).sum()
        follow = self.windows["validation"][:, 1:].flatten().cpu()
        return "unigram", float((-chances.log()[follow].mean()).exp())

    def _attend(self, *, twice: bool) -> None:
        assert isinstance(self.network, Transformer)
        self.network.twice = twice


def _windows(tokens: Tensor, context: int, part: str) -> Tensor:
    """Return windows of ``context`` tokens and the one that follows, ``[n, context + 1]``."""
    count = (len(tokens) - 1) // context
    if count < 1:
        raise ValueError(
            f"task.context: the {part} part has {len(tokens)} tokens, fewer than a window of {context}; "
            "give more text or a shorter context"
        )
    return tokens[: count * context + 1].unfold(0, context + 1, context).contiguous()


def _pair(windows: Tensor) -> tuple[Tensor, Tensor]:
    return windows[:, :-1], windows[:, 1:].flatten()
