"""Several trials of one network as one batched network, to compare with processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vmap

from optuna_ohgw.tasks.image import ImageTask
from optuna_ohgw.tasks.precision import autocast
from optuna_ohgw.training import StateStack, TrainState, cosine


def fused_epoch(task: ImageTask, states: Sequence[TrainState]) -> StateStack:
    """Return the states after one more epoch, trained together under ``torch.func.vmap``.

    The same as ``train_epoch`` of each, to float tolerance: own mini-batches, own hyper-parameters
    (every one a tensor with an entry a trial), own momentum. The weights of all trials are one
    tensor ``[n, P]``, so the optimizer is four operations. Needs a network without dropout.

    Args:
        task: The task of all of them, its network in training mode.
        states: States at the same epoch, ``n`` of them.
    """
    stack = StateStack.of(states)
    names = list(stack.weights)
    sizes = [stack.weights[name][0].numel() for name in names]
    weights = _flat(stack.weights).requires_grad_()
    velocity = _flat(stack.velocity)
    # vmap has BatchNorm write its statistics in place.
    buffers = {name: b.clone() for name, b in stack.buffers.items()}

    def column(name: str) -> Tensor:
        return torch.tensor([s.psi[name] for s in states], dtype=weights.dtype, device=task.device)[:, None]

    lr, momentum, decay = column("lr"), column("momentum"), column("weight_decay")
    smoothing = column("label_smoothing")[:, 0]
    network = task.network().train()

    def forward(params: dict[str, Tensor], own: dict[str, Tensor], inputs: Tensor) -> Tensor:
        output: Tensor = functional_call(network, (params, own), (inputs,))
        return output

    together: Callable[..., Tensor] = vmap(forward)
    epochs = [task.epoch(s.seed, s.config_index, s.epoch, s.psi["magnitude"]) for s in states]
    steps, first = task.batches_per_epoch, states[0]
    for i, batches in enumerate(zip(*epochs, strict=True)):
        inputs = torch.stack([b[0] for b in batches])
        target = torch.stack([b[1] for b in batches])
        shaped = zip(names, torch.split(weights, sizes, 1), strict=True)
        params = {name: part.view_as(stack.weights[name]) for name, part in shaped}
        with autocast(task.device):
            logits = together(params, buffers, inputs)
        chances = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), 2)
        plain = -chances.gather(2, target[:, :, None]).mean((1, 2))
        loss = plain + smoothing * (-chances.mean((1, 2)) - plain)
        (gradient,) = torch.autograd.grad(loss.sum(), weights)
        rate = lr * cosine(first.epoch * steps + i, first.epochs * steps)
        with torch.no_grad():
            gradient.addcmul_(weights, decay)
            velocity.mul_(momentum).add_(gradient)
            weights.addcmul_(velocity, rate, value=-1.0)
    trained = zip(names, torch.split(weights.detach(), sizes, 1), strict=True)
    pushed = zip(names, torch.split(velocity, sizes, 1), strict=True)
    return StateStack(
        {name: part.view_as(stack.weights[name]) for name, part in trained},
        buffers,
        {name: part.view_as(stack.weights[name]) for name, part in pushed},
        stack.members,
    )


def _flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten(1) for t in named.values()], dim=1)
