"""One training step, SGD with momentum: eager, or on a GPU captured once and replayed."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from optuna_ohgw.errors import CaptureError
from optuna_ohgw.lookahead import uniform_cross_entropy
from optuna_ohgw.peak_memory import restart_peak
from optuna_ohgw.tasks.base import Task
from optuna_ohgw.tasks.precision import autocast, needs_scaler

Tensors = dict[str, Tensor]
TRAINED = ("lr", "momentum", "weight_decay", "label_smoothing")
_WARM_UP = 2
_KEPT = "_ohgw_captured_step"  # on the network, whose life it shares
_graphs = True
log = logging.getLogger("optuna_ohgw.steps")


class Step(Protocol):
    """A training step of the network that a task has, from its present weights."""

    def __call__(self, inputs: Tensor, target: Tensor, rate: float) -> Tensor:
        """Train on a mini-batch at a learning rate; return its loss, a scalar without a graph."""
        ...

    def velocity(self) -> Tensors:
        """Return the momentum buffers by parameter name."""
        ...

    def scaler(self) -> dict[str, Any]:
        """Return the state of the loss scaler; empty without one."""
        ...


class EagerStep:
    """A step by ``torch.optim.SGD``; under float16 autocast the loss is scaled.

    Args:
        task: The task, for its loss.
        network: Its network, in training mode, holding the weights.
        psi: lr, momentum, weight_decay, label_smoothing.
        velocity: Momentum buffers by parameter name; copied.
        scaler: What ``scaler()`` returned after the epoch before.
    """

    def __init__(
        self,
        task: Task,
        network: nn.Module,
        psi: Mapping[str, float],
        velocity: Mapping[str, Tensor],
        scaler: Mapping[str, Any],
    ) -> None:
        self._task, self._network, self._smoothing = task, network, psi["label_smoothing"]
        self._optimizer = torch.optim.SGD(
            network.parameters(),
            lr=psi["lr"],
            momentum=psi["momentum"],
            weight_decay=psi["weight_decay"],
            fused=True,
        )
        for name, weight in network.named_parameters():
            # In the weight's memory format: the fused step takes for granted that they agree.
            buffer = torch.empty_like(weight).copy_(velocity[name])
            self._optimizer.state[weight]["momentum_buffer"] = buffer
        self._scaler: torch.amp.GradScaler | None = None
        if needs_scaler(task.device):
            self._scaler = torch.amp.GradScaler(task.device.type)
            if scaler:
                self._scaler.load_state_dict(dict(scaler))

    def __call__(self, inputs: Tensor, target: Tensor, rate: float) -> Tensor:
        """Train on a mini-batch."""
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.zero_grad()
        with autocast(self._task.device):
            loss = self._task.training_loss(self._network(inputs), target, self._smoothing)
        if self._scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
        else:
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self._scaler.step(self._optimizer)
            self._scaler.update()
        return loss.detach()

    def velocity(self) -> Tensors:
        """Return the momentum buffers."""
        state, named = self._optimizer.state, self._network.named_parameters()
        return {name: state[weight]["momentum_buffer"] for name, weight in named}

    def scaler(self) -> dict[str, Any]:
        """Return the state of the loss scaler."""
        return self._scaler.state_dict() if self._scaler is not None else {}


class TensorStep:
    """The same step with each hyper-parameter a 0-d tensor, so that all trials can share it.

    It writes to memory of its own and of the network alone: ``velocity`` and ``psi`` by name.
    """

    def __init__(self, task: Task, network: nn.Module) -> None:
        self._task, self._network = task, network
        self.weights = dict(network.named_parameters())
        self.velocity = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.psi = {name: torch.zeros((), device=task.device) for name in TRAINED}

    def __call__(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Train on a mini-batch at ``psi``; return its loss, a scalar without a graph."""
        psi, weights = self.psi, list[Tensor](self.weights.values())
        velocity = list(self.velocity.values())
        with autocast(self._task.device):
            output = self._network(inputs)
            plain = self._task.criterion(output, target)
            loss = plain + psi["label_smoothing"] * (uniform_cross_entropy(output, target) - plain)
        gradients = list(torch.autograd.grad(loss, weights))
        with torch.no_grad():
            # Not the other way round: two weights may have one tensor as their gradient.
            decayed = _times(weights, psi["weight_decay"])
            _add(decayed, gradients)
            torch._foreach_mul_(velocity, psi["momentum"])
            _add(velocity, decayed)
            _add(weights, _times(velocity, -psi["lr"]))
        return loss.detach()


class CapturedStep:
    """A :class:`TensorStep` as a CUDA graph: one launch, whatever the trial.

    A graph is captured at the first mini-batch of each shape, which takes some steps; it stays
    good for the network's life, since a trial's weights, momentum and ψ are copied into place.
    """

    def __init__(self, task: Task, network: nn.Module) -> None:
        self._network, self._step = network, TensorStep(task, network)
        self._graphs: dict[torch.Size, Callable[[Tensor, Tensor], Tensor]] = {}
        self._places = _places(network)
        self.peak_bytes = 0

    def begin(self, psi: Mapping[str, float], velocity: Mapping[str, Tensor]) -> None:
        """Copy a trial's ψ and momentum into place."""
        for name, place in self._step.psi.items():
            place.fill_(psi[name])
        for name, place in self._step.velocity.items():
            place.copy_(velocity[name])

    def fits(self, network: nn.Module) -> bool:
        """Return whether the network's tensors are still where the graphs expect them."""
        return _places(network) == self._places

    def __call__(self, inputs: Tensor, target: Tensor, rate: float) -> Tensor:
        """Train on a mini-batch."""
        self._step.psi["lr"].fill_(rate)
        if inputs.shape not in self._graphs:
            self.capture(inputs, target)
        return self._graphs[inputs.shape](inputs, target)

    def velocity(self) -> Tensors:
        """Return copies of the momentum buffers."""
        return {name: v.clone() for name, v in self._step.velocity.items()}

    def scaler(self) -> dict[str, Any]:
        """Return nothing: bfloat16 and float32 need none."""
        return {}

    def capture(self, inputs: Tensor, target: Tensor) -> None:
        """Capture the step for mini-batches of this shape.

        Weights, momentum and the random streams stay as they are.

        Raises:
            RuntimeError: If it cannot be captured, since it waits for the device; training can go on.
            CaptureError: If the capture began and failed: up to torch 2.11 its allocator is unusable then.
        """
        device, step = inputs.device, self._step
        own_inputs, own_target = inputs.clone(), target.clone()
        changed = [*self._network.state_dict().values(), *step.velocity.values()]
        before = [tensor.clone() for tensor in changed]
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            try:
                with _beside(device) as side:
                    for _ in range(_WARM_UP):
                        step(own_inputs, own_target)
                    with _waiting_barred():
                        step(own_inputs, own_target)
                held = torch.cuda.memory_allocated(device)
                restart_peak(device)
                graph = torch.cuda.CUDAGraph()
                first: Exception | None = None
                try:
                    with torch.cuda.graph(graph, stream=side):
                        try:
                            loss = step(own_inputs, own_target)
                        except Exception as error:
                            first = error  # the end of a failed capture fails in words of its own
                            raise
                except Exception as error:
                    raise _capture_error(first or error) from error
            finally:
                with torch.no_grad():
                    for tensor, value in zip(changed, before, strict=True):
                        tensor.copy_(value)
        self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(device) - held)

        def replay(inputs: Tensor, target: Tensor) -> Tensor:
            own_inputs.copy_(inputs)
            own_target.copy_(target)
            graph.replay()
            return loss

        self._graphs[inputs.shape] = replay


def step_for(
    task: Task,
    network: nn.Module,
    psi: Mapping[str, float],
    velocity: Mapping[str, Tensor],
    scaler: Mapping[str, Any],
) -> Step:
    """Return the step to train an epoch with: captured on a GPU, eager elsewhere.

    Arguments as of :class:`EagerStep`. A network that cannot be captured is trained eagerly, which
    is said once.
    """
    if task.device.type != "cuda" or needs_scaler(task.device) or not _graphs:
        return EagerStep(task, network, psi, velocity, scaler)
    known: CapturedStep | None = getattr(network, _KEPT, None)
    if not hasattr(network, _KEPT) or (known is not None and not known.fits(network)):
        known = _try_capture(task, network, psi)
        setattr(network, _KEPT, known)
    if known is None:
        return EagerStep(task, network, psi, velocity, scaler)
    known.begin(psi, velocity)
    return known


def use_graphs(use: bool) -> None:
    """Let the steps of this process that begin from now on be captured, or be eager everywhere."""
    global _graphs  # noqa: PLW0603 - one a process
    _graphs = use


def captured_bytes(network: nn.Module) -> int:
    """Return the peak bytes of a captured step, which the allocator's statistics do not show."""
    step: CapturedStep | None = getattr(network, _KEPT, None)
    return step.peak_bytes if step is not None else 0


def _try_capture(task: Task, network: nn.Module, psi: Mapping[str, float]) -> CapturedStep | None:
    """Return a captured step, tried on the first warm-start mini-batch; None if it is impossible."""
    raw, target = task.warm_batches(0, 0, 0)(0)
    step = CapturedStep(task, network)
    step.begin(psi, {name: torch.zeros_like(w) for name, w in network.named_parameters()})
    try:
        step.capture(task.prepare(raw), target)
    except (CaptureError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        log.warning("the training step cannot be captured in a CUDA graph (%s); it runs eagerly", reason)
        return None
    return step


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of a device to capture on: libraries keep memory for each that they see."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _beside(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Work on another stream, after what is queued; what comes later waits for it, however it ends."""
    side, current = _side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            yield side
    finally:
        current.wait_stream(side)


@contextmanager
def _waiting_barred() -> Iterator[None]:
    """Raise RuntimeError where the host waits for the device, as a capture would, but without its damage."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not see every such operation
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _capture_error(error: BaseException) -> CaptureError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CaptureError(
        f"the training step failed while it was captured in a CUDA graph ({reason}); "
        "use execution.cuda_graphs=false",
        memory=isinstance(error, torch.OutOfMemoryError),
    )


def _times(tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    return list(torch._foreach_mul(tensors, factor))


def _add(to: list[Tensor], tensors: list[Tensor]) -> None:
    torch._foreach_add_(to, tensors)


def _places(network: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in network.state_dict().values()]
