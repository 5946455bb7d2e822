"""One loss of ψ over several ranks: the mean of their losses, with exact gradients of any order.

What all ranks hold alike (weights, ψ, values) is *shared*; what each computes from its own part of a
mini-batch is *local*. Two linear maps lead from one to the other, each the adjoint of the other::

    copy: shared → local, x ↦ (x, …, x)          mean: local → shared, (x_1, …, x_R) ↦ Σ x_r / R

so a loss between them has shared derivatives of every order, and an estimator written for one process
gives on each rank what it would give on the whole mini-batch. Every exchange is preceded by one of four
integers, in which a rank says what it is about to do, or that it failed: no rank waits for another that
will not come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from optuna_ohgw.lookahead import LookaheadLoss
from optuna_ohgw.updates import Psi


class RankError(RuntimeError):
    """Another rank failed, or the ranks do different things; raised on every other rank.

    Attributes:
        kinds: Names of the exception types that the failed ranks raised.
    """

    def __init__(self, message: str, kinds: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.kinds = tuple(kinds)


class _Act(IntEnum):
    """What a rank is about to do; the greatest is heard by all."""

    REDUCE = 0
    TELL = 1
    FAILED = 2


@dataclass(frozen=True)
class Ranks:
    """The ranks that train one trial, seen from this one.

    Attributes:
        group: Their process group; None: the default one.
        device: Where the weights are.
    """

    group: dist.ProcessGroup | None
    device: torch.device

    def __post_init__(self) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "torch.distributed has no process group; call torch.distributed.init_process_group first"
            )

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return dist.get_rank(self.group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of one rank on all, as :class:`RankError` on the others, wherever they wait.

        Other exchanges within the group have no place in the block, and the process group's own failures
        (a rank that was killed, a network that is gone) are its own to report.
        """
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            self._signal(_Act.FAILED)
            self._failures(error)
            raise

    def tell(self, content: Any) -> None:
        """Send an object from rank 0 to the others, each of which calls :meth:`hear`."""
        self._broadcast(content)

    def hear(self) -> Any:
        """Return the next object that rank 0 tells."""
        return self._broadcast(None)

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the means over ranks of tensors of one device, in one exchange, without a graph."""
        flat = torch.cat([t.detach().flatten() for t in tensors])
        self._meet(_Act.REDUCE, flat.numel())
        summed = flat.to(self._reached(flat.device))
        dist.all_reduce(summed, group=self.group)
        whole = summed / dist.get_world_size(self.group)
        parts = torch.split(whole, [t.numel() for t in tensors])
        return [p.view(t.shape).to(t) for p, t in zip(parts, tensors, strict=True)]

    def _broadcast(self, content: Any) -> Any:
        self._meet(_Act.TELL, 0)
        # mypy knows None as the default group only since torch 2.7.
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        box = [content]
        dist.broadcast_object_list(box, src=source, group=self.group, device=self._reached(self.device))
        return box[0]

    def _meet(self, act: _Act, size: int) -> None:
        acts, sizes = self._signal(act, size)
        if max(acts) == _Act.FAILED:
            raise self._failures(None)
        if acts[0] != acts[1] or sizes[0] != sizes[1]:
            raise RankError(
                "the ranks do different things; give each the same model, loss, space and settings, "
                "and mini-batches of the same number"
            )

    def _signal(self, act: _Act, size: int = 0) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (greatest, least) of the ranks' acts and sizes."""
        signal = torch.tensor([act, -act, size, -size], device=self._reached(self.device))
        dist.all_reduce(signal, dist.ReduceOp.MAX, group=self.group)
        act_most, act_least, size_most, size_least = signal.tolist()
        return (act_most, -act_least), (size_most, -size_least)

    def _failures(self, own: Exception | None) -> RankError:
        said: list[Any] = [None] * dist.get_world_size(self.group)
        mine: Any = own and (type(own).__name__, str(own))
        dist.all_gather_object(said, mine, group=self.group)
        failed = [(rank, *words) for rank, words in enumerate(said) if words is not None]
        message = "; ".join(f"rank {rank} failed with {kind}: {text}" for rank, kind, text in failed)
        return RankError(message, [kind for _, kind, _ in failed])

    def _reached(self, device: torch.device) -> torch.device:
        """Return the device over which the group exchanges what is on ``device``."""
        if device.type == "cpu" and dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return device


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        ctx.set_materialize_grads(False)
        return tuple(ranks.mean(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_known(copy_to_ranks, ctx.ranks, gradients)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_known(mean_over_ranks, ctx.ranks, gradients)


def mean_over_ranks(ranks: Ranks, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the means of local tensors, shared by all ranks; one exchange, differentiable."""
    return tuple(_Mean.apply(ranks, *tensors))


def copy_to_ranks(ranks: Ranks, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return shared tensors as local ones, whose gradients are averaged in one exchange."""
    return tuple(_Copy.apply(ranks, *tensors))


def _known(
    apply: Callable[[Ranks, Sequence[Tensor]], tuple[Tensor, ...]],
    ranks: Ranks,
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Apply a map to the gradients that there are; an absent one stays absent, not zero."""
    known = [g for g in gradients if g is not None]
    mapped = iter(apply(ranks, known) if known else ())
    return [None if g is None else next(mapped) for g in gradients]


@dataclass(frozen=True, kw_only=True)
class DistributedLookaheadLoss(LookaheadLoss):
    """A :class:`LookaheadLoss` over several ranks, made by :func:`distributed_loss`."""

    ranks: Ranks

    def training_terms(self, params: Mapping[str, Tensor], psi: Psi, step: int) -> tuple[Tensor, Tensor]:
        """Return the means over ranks of the terms on training mini-batch ``step``."""
        *local, magnitude = copy_to_ranks(self.ranks, [*params.values(), self.value(psi, "magnitude")])
        weights = dict(zip(params, local, strict=True))
        terms = super().training_terms(weights, {**psi, "magnitude": magnitude}, step)
        plain, difference = mean_over_ranks(self.ranks, terms)
        return plain, difference

    def validation_loss(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the mean over ranks of the criterion on the mini-batch after the training ones."""
        local = copy_to_ranks(self.ranks, list(params.values()))
        value = super().validation_loss(dict(zip(params, local, strict=True)))
        return mean_over_ranks(self.ranks, [value])[0]

    def _seed(self, step: int) -> int:
        # Parts of a mini-batch draw their augmentation and dropout apart, as its rows do. Not by higher
        # bits: a CPU generator takes 32 alone.
        return super()._seed(step) + (self.ranks.rank << 20)


@dataclass(frozen=True)
class DistributedLoss:
    """The mean over ranks of any loss of ψ, made by :func:`distributed_loss`."""

    loss: Callable[[Psi], Any]
    ranks: Ranks

    @property
    def cost_mbu(self) -> float:
        """Cost of one evaluation."""
        return float(getattr(self.loss, "cost_mbu", 1 / 3))

    @property
    def exact_cost_mbu(self) -> float:
        """Cost of the value and its gradient."""
        return float(getattr(self.loss, "exact_cost_mbu", 1.0))

    def __call__(self, psi: Psi) -> Tensor:
        """Return the mean over ranks, a scalar, differentiable in ψ where the losses are."""
        local = copy_to_ranks(self.ranks, list(psi.values()))
        value = self.loss(dict(zip(psi, local, strict=True)))
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=torch.float64)
        return mean_over_ranks(self.ranks, [value])[0]


def distributed_loss(
    loss: Any, group: dist.ProcessGroup | None = None
) -> DistributedLookaheadLoss | DistributedLoss:
    """Return the mean over the ranks of a group of each rank's loss of ψ.

    With ``lookahead_loss(model, batches, …)``, where ``batches`` gives the rank's own part of every
    mini-batch, each look-ahead step is one with the averaged gradient, so every estimator and every rule
    gives what one process would on the whole mini-batch, to rounding, when the parts are of equal size.
    BatchNorm takes the statistics of the rank's part, as it does in ``DistributedDataParallel``; a model
    so wrapped is taken out of its wrapper. Augmentation and dropout draw differently on each rank.

    All ranks must hold the same weights and call with the same ψ and the same draws. Cost: as that of
    the loss on one rank's part, an exchange of the weights' size for each gradient in weights, of two
    numbers for each value, and one of four integers before each.

    Args:
        loss: ψ ↦ scalar, on each rank its own; returned as it is if it is distributed already.
        group: The process group; None: the default one.

    Raises:
        ValueError: If there is no process group, or the model has ``SyncBatchNorm``, whose own exchanges
            have no second derivative and would wait for a rank that failed.
    """
    if isinstance(loss, (DistributedLookaheadLoss, DistributedLoss)):
        return loss
    ranks = ranks_of(loss, group)
    if not isinstance(loss, LookaheadLoss):
        return DistributedLoss(loss, ranks)
    if any(isinstance(module, nn.SyncBatchNorm) for module in loss.model.modules()):
        raise ValueError("the model has SyncBatchNorm, which is not supported; use BatchNorm")
    known = {f.name: getattr(loss, f.name) for f in fields(LookaheadLoss)}
    if isinstance(loss.model, DistributedDataParallel):
        known["model"] = loss.model.module
        if loss.velocity is not None:
            known["velocity"] = _bare(loss.velocity)
        if loss.slots is not None:
            known["slots"] = {slot: _bare(named) for slot, named in loss.slots.items()}
    return DistributedLookaheadLoss(**known, ranks=ranks)


def _bare(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in named.items()}


def ranks_of(loss: Any, group: dist.ProcessGroup | None) -> Ranks:
    """Return the ranks of a group, on the device of a look-ahead loss's weights, else on the CPU.

    Raises:
        ValueError: If there is no process group.
    """
    if isinstance(loss, (DistributedLookaheadLoss, DistributedLoss)):
        return loss.ranks
    if isinstance(loss, LookaheadLoss):
        return Ranks(group, next(loss.model.parameters()).device)
    return Ranks(group, torch.device("cpu"))
