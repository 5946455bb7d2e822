"""Where an epoch's time goes: the training loop once more, with a clock between its parts."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import optuna
import torch
from torch import Tensor

from optuna_ohgw.bench.cases import PSI, SPACE
from optuna_ohgw.bench.clock import synchronize
from optuna_ohgw.curve import Curve
from optuna_ohgw.history import CURVE
from optuna_ohgw.hypergrad import lean
from optuna_ohgw.opening import open_database
from optuna_ohgw.seeds import Purpose, derive_seed
from optuna_ohgw.storage import BatchedStorage
from optuna_ohgw.tasks.image import ImageTask, RawImages
from optuna_ohgw.tasks.precision import autocast
from optuna_ohgw.training import TrainState, cosine, load, state_loss

DATA, AUGMENTATION, FORWARD, BACKWARD, OPTIMIZER = (
    "data (order and draws)",
    "augmentation",
    "forward",
    "backward",
    "optimizer",
)
STATE, EVALUATION, WARM_START, STORAGE = "state in and out", "evaluation", "warm start", "storage"
PARTS = (DATA, AUGMENTATION, FORWARD, BACKWARD, OPTIMIZER, STATE, EVALUATION, WARM_START, STORAGE)
# These grow with the number of pictures; the others are the same whatever an epoch's length.
_PER_PICTURE = (DATA, AUGMENTATION, FORWARD, BACKWARD, OPTIMIZER, EVALUATION)
_PER_TRIAL = (WARM_START, STORAGE)


class Parts:
    """Seconds by part; of a part within another only the inner one is charged."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[str] = []
        self._last = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge what is done inside to a part, a GPU's work included."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now


class TimedTask(ImageTask):
    """A task like another, with a network of its own, that charges augmentation to its part."""

    def __init__(self, task: ImageTask) -> None:
        self.parts = Parts(task.device)
        super().__init__(task.spec, task.data, task.model_name, task.batch_size)

    def augment(self, inputs: RawImages, magnitude: Tensor) -> Tensor:
        """Return augmented, normalised pictures."""
        with self.parts.part(AUGMENTATION):
            return super().augment(inputs, magnitude)


def timed_epoch(task: TimedTask, state: TrainState) -> TrainState:
    """Return what ``train_epoch`` does, and charge the time to ``task.parts``."""
    part, psi, steps = task.parts.part, state.psi, task.batches_per_epoch
    with part(STATE):
        network = load(task, state)
        lr, momentum, decay = psi["lr"], psi["momentum"], psi["weight_decay"]
        optimizer = torch.optim.SGD(
            network.parameters(), lr=lr, momentum=momentum, weight_decay=decay, fused=True
        )
        for name, weight in network.named_parameters():
            buffer = torch.empty_like(weight).copy_(state.velocity[name])
            optimizer.state[weight]["momentum_buffer"] = buffer
    total = torch.zeros((), device=task.device)
    cuda = [task.device] if task.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        key = derive_seed(state.seed, Purpose.MODEL, state.config_index, state.epoch)
        torch.default_generator.manual_seed(key)
        batches = task.epoch(state.seed, state.config_index, state.epoch, psi["magnitude"])
        for i in range(steps):
            with part(DATA):
                inputs, target = next(batches)
            with part(FORWARD), autocast(task.device):
                loss = task.training_loss(network(inputs), target, psi["label_smoothing"])
            with part(BACKWARD):
                loss.backward()  # type: ignore[no-untyped-call]
            with part(OPTIMIZER):
                factor = cosine(state.epoch * steps + i, state.epochs * steps)
                optimizer.param_groups[0]["lr"] = psi["lr"] * factor
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach()
    with part(STATE):
        kept = network.state_dict().keys()
        after = replace(
            state,
            weights={n: p.detach().clone() for n, p in network.named_parameters()},
            buffers={n: b.detach().clone() for n, b in network.named_buffers() if n in kept},
            velocity={n: optimizer.state[w]["momentum_buffer"] for n, w in network.named_parameters()},
            epoch=state.epoch + 1,
        )
        float(total)
    return after


def timed_parts(
    task: ImageTask, states: Iterator[TrainState], *, repeats: int, epochs: int
) -> list[dict[str, float]]:
    """Return the seconds of an epoch by part, one dictionary a repeat, after one that does not count.

    ``WARM_START`` is one whole warm start, lean and of horizon 1; ``STORAGE`` all that a trial of
    so many epochs asks of SQLite: its making, its parameters, a report an epoch, its curve and its
    end.
    """
    timed, measured = TimedTask(task), []
    z = SPACE.to_search(PSI)
    with tempfile.TemporaryDirectory() as folder:
        store_trial = _storing(Path(folder), epochs)
        for state in islice(states, repeats + 1):
            timed.parts = parts = Parts(task.device)
            timed_epoch(timed, state)
            with parts.part(EVALUATION):
                timed.evaluate("validation")
            with parts.part(WARM_START):
                lean(state_loss(task, state, 0, 1), SPACE, z)
            with parts.part(STORAGE):
                store_trial()
            measured.append(parts.seconds)
    return measured[1:]


def full_epoch(
    seconds: Mapping[str, float], *, scale: float, epochs: float, warm_starts: float
) -> dict[str, float]:
    """Return the seconds by part of a full epoch, with its share of what a trial does once.

    Args:
        seconds: Those of a measured epoch, with the trial's whole warm start and storage.
        scale: Measured epochs in a full one, by pictures.
        epochs: Epochs of the mean trial.
        warm_starts: Warm starts of the mean trial.
    """
    full = {name: s * (scale if name in _PER_PICTURE else 1.0) for name, s in seconds.items()}
    for name in _PER_TRIAL:
        full[name] /= epochs
    full[WARM_START] *= warm_starts
    return full


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return each part's share of the sum."""
    total = sum(seconds.values())
    return {name: s / total for name, s in seconds.items()}


def _storing(folder: Path, epochs: int) -> Callable[[], None]:
    """Return the storing of a trial of so many epochs."""
    database = open_database(f"sqlite:///{folder / 'bench.db'}", create=True)
    study = optuna.create_study(storage=BatchedStorage(database, sole=True), study_name="bench")

    def store_trial() -> None:
        trial, curve = study.ask(dict(SPACE.distributions)), Curve()
        for epoch in range(1, epochs + 1):
            curve.append(**dict.fromkeys(curve.columns, 0.123456))
            trial.report(0.9, epoch)
        trial.set_user_attr(CURVE, curve.columns)
        study.tell(trial, 0.9)

    return store_trial
