"""What each of two ranks does in the tests of ``distributed``, and one process for comparison."""

from __future__ import annotations

import datetime
import itertools
import os
import socket
from pathlib import Path
from typing import Any

import optuna
import torch
import torch.distributed as dist
from optuna.distributions import FloatDistribution
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from optuna_ohgw import OhgwSampler, ohgw_suggest
from optuna_ohgw.distributed import distributed_loss
from optuna_ohgw.distributed_suggest import ohgw_suggest_distributed
from optuna_ohgw.hypergrad import ESTIMATORS
from optuna_ohgw.lookahead import lookahead_loss
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.warmstart import WarmStart, warm_start

RANKS = 2
BATCH = 12
DISTRIBUTIONS = {
    "lr": FloatDistribution(1e-3, 10.0, log=True),
    "momentum": FloatDistribution(0.0, 0.99),
    "weight_decay": FloatDistribution(1e-5, 1.0, log=True),
    "label_smoothing": FloatDistribution(0.0, 0.5),
    "magnitude": FloatDistribution(0.0, 2.0),
}
SPACE = SearchSpace(DISTRIBUTIONS)
PSI = {"lr": 0.1, "momentum": 0.6, "weight_decay": 0.02, "label_smoothing": 0.1, "magnitude": 0.7}
LOSSES = {
    f"{horizon}-{kind}": (horizon, kind)
    for horizon in (1, 3)
    for kind in ("at rest", "with momentum", "unsmoothed", "rough", "wrapped", "normalized")
}
SETTINGS = {
    "raw": WarmStart(eta_h=0.3),
    "three steps": WarmStart(eta_h=0.3, steps=3),
    "trust-region": WarmStart("trust-region"),
    "line-search": WarmStart("line-search", steps=2),
    "lr-grid": WarmStart("lr-grid", grid_horizon=2),
    "gaussian": WarmStart("gaussian"),
    "random raw": WarmStart(eta_h=0.3, random=True),
    "random line-search": WarmStart("line-search", random=True, steps=4),
    "frozen": WarmStart("trust-region", freeze=("momentum", "lr")),
    "snr": WarmStart("trust-region", snr_batches=3, min_snr=0.2),
}


def augment(inputs, magnitude):
    return inputs * (1 + 0.3 * magnitude * inputs.cos()) + 0.2 * magnitude.square() * inputs.sin()


def rough(inputs, magnitude):
    """Not differentiable in the magnitude, so that its component is a finite difference."""
    return augment(inputs, magnitude.detach())


def noisy(inputs, magnitude):
    return inputs + magnitude * torch.randn_like(inputs)


class Halves(nn.Module):
    """A network over halves of a mini-batch, each with statistics of its own, as ranks have them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return torch.cat([self.inner(half) for half in inputs.chunk(RANKS)])


def network(kind: str = "") -> nn.Module:
    torch.manual_seed(3)
    norm = nn.BatchNorm1d(8) if kind == "normalized" else nn.Identity()
    layers = nn.Sequential(nn.Linear(9, 8), norm, nn.SiLU(), nn.Linear(8, 3)).double()
    if not dist.is_initialized():
        return Halves(layers) if kind == "normalized" else layers
    return DistributedDataParallel(layers) if kind == "wrapped" else layers


def batches(rank: int | None = None, seed: int = 0):
    """Return mini-batches, of a rank its half."""

    def batch(position: int):
        generator = torch.Generator().manual_seed(1000 * seed + position)
        inputs = torch.randn(BATCH, 9, generator=generator, dtype=torch.float64)
        target = torch.randint(3, (BATCH,), generator=generator)
        if rank is None:
            return inputs, target
        half = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
        return inputs[half], target[half]

    return batch


def build(horizon: int, kind: str, rank: int | None = None):
    """Return the loss of a kind: of a rank's half or, without a rank, of the whole mini-batch."""
    model = network(kind)
    velocity = None
    if kind in ("with momentum", "wrapped"):
        torch.manual_seed(4)
        velocity = {n: 0.3 * torch.randn_like(p) for n, p in model.named_parameters()}
    loss = lookahead_loss(
        model,
        batches(rank),
        horizon=horizon,
        velocity=velocity,
        augment=rough if kind == "rough" else augment,
    )
    return loss if rank is None else distributed_loss(loss)


def space_of(kind: str) -> SearchSpace:
    names = [n for n in DISTRIBUTIONS if n != "label_smoothing"] if kind == "unsmoothed" else DISTRIBUTIONS
    return SearchSpace({n: DISTRIBUTIONS[n] for n in names})


def gradients(rank: int | None = None) -> dict[str, Any]:
    """Return loss, gradient, methods and cost by loss and estimator."""
    found = {}
    for label, (horizon, kind) in LOSSES.items():
        loss, space = build(horizon, kind, rank), space_of(kind)
        z = space.to_search({n: PSI[n] for n in space.names})
        for name, estimator in ESTIMATORS.items():
            result = estimator(loss, space, z)
            found[f"{label} {name}"] = result.loss, result.gradient, result.methods, result.cost_mbu
    return found


def warmed(rank: int | None = None) -> dict[str, Any]:
    """Return the trained ψ and the record by rule."""
    found = {}
    for label, settings in SETTINGS.items():
        loss, generator = build(1, "at rest", rank), torch.Generator().manual_seed(7)
        result = warm_start(loss, SPACE, {**PSI, "lr": 0.01}, settings, generator)
        found[label] = result.psi, result.record
    return found


def plain(rank: int | None = None) -> dict[str, Any]:
    """Return the results of the estimators on a plain function, one part of which has no gradient."""
    inputs = batches(rank)(0)[0]

    def bowl(psi):
        rounded = round(psi["momentum"].item() * 1000) / 1000
        return (psi["lr"].log() * inputs.sum(1) + 1).square().mean() + rounded + psi["weight_decay"]

    loss = bowl if rank is None else distributed_loss(bowl)
    z = SPACE.to_search(PSI)
    results = {name: ESTIMATORS[name](loss, SPACE, z) for name in ("exact", "finite-difference")}
    return {n: (r.loss, r.gradient, r.methods, r.cost_mbu) for n, r in results.items()}


def suggested(rank: int | None = None) -> dict[str, Any]:
    """Return ψ of two rungs of three trials under two samplers, and the trials where they are."""
    found: dict[str, Any] = {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for label in ("random", "ohgw"):
        base = optuna.samplers.RandomSampler(seed=5)
        study = optuna.create_study(sampler=OhgwSampler(base) if label == "ohgw" else base)
        found[label] = []
        for settings in (WarmStart("trust-region"), WarmStart("trust-region", random=True), None):
            trial = None if rank else study.ask()
            loss = build(1, "at rest", rank)
            for _ in range(2):
                if rank is None:
                    psi = ohgw_suggest(trial, DISTRIBUTIONS, loss, settings, every_rung=True, seed=3)
                else:
                    psi = ohgw_suggest_distributed(
                        trial, DISTRIBUTIONS, loss, settings, every_rung=True, seed=3
                    )
                found[label].append((psi, None if trial is None else dict(trial.params)))
    return found


class Broken(torch.autograd.Function):
    """Fails where it is differentiated."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise MemoryError("no room for a gradient")


class BrokenSampler(optuna.samplers.RandomSampler):
    def sample_independent(self, *_):
        raise OSError("the sampler's disk is full")


def failures(rank: int) -> dict[str, str]:
    """Return what each rank raises, by what is wrong; each leaves the group fit for the next."""

    def read(position):
        if rank == 1 and position == 1:
            raise KeyError("no such shard")
        return batches(rank)(position)

    def pruned(psi):
        if rank == 0:
            raise optuna.TrialPruned("out of memory")
        return psi["lr"]

    def broken(inputs, magnitude):
        return Broken.apply(inputs + magnitude) if rank == 1 else inputs + magnitude

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    wide = nn.Linear(9, 3 + rank).double()
    synchronised = nn.Sequential(nn.Linear(9, 3), nn.SyncBatchNorm(3))
    cases: dict[str, dict[str, Any]] = {
        "reading": {"loss": lookahead_loss(network(), read)},
        "differentiating": {"loss": lookahead_loss(network(), batches(rank), augment=broken)},
        "sampling": {"loss": build(1, "at rest", rank), "sampler": BrokenSampler()},
        "pruning": {"loss": pruned},
        "no trial": {"loss": build(1, "at rest", rank), "trial": None},
        "two trials": {"loss": build(1, "at rest", rank), "trial": study.ask()},
        "no loss on rank 1": {"loss": build(1, "at rest", rank) if rank == 0 else None},
        "other models": {"loss": lookahead_loss(wide, batches(rank))},
        "synchronised": {"loss": lookahead_loss(synchronised, batches(rank))},
    }
    raised = {}
    for label, case in cases.items():
        study = optuna.create_study(sampler=case.get("sampler", optuna.samplers.RandomSampler(seed=0)))
        trial = case.get("trial", study.ask() if rank == 0 else None)
        try:
            ohgw_suggest_distributed(trial, DISTRIBUTIONS, case["loss"], WarmStart("trust-region"))
            raised[label] = "nothing"
        except Exception as error:
            raised[label] = f"{type(error).__name__}: {error}"
    return raised


def anywhere(rank: int) -> dict[str, str]:
    """Return what each rank raises where one of them fails at its n-th mini-batch, by rank and n."""
    raised = {}
    settings = WarmStart("line-search", lengths=(0.1, 0.2), estimator="exact")
    for failing, n in itertools.product(range(RANKS), range(13)):
        served = itertools.count()

        def read(position, failing=failing, n=n, served=served):
            if next(served) == n and rank == failing:
                raise OSError(f"gone at {n}")
            return batches(rank)(position)

        trial = optuna.create_study().ask() if rank == 0 else None
        try:
            loss = lookahead_loss(network(), read, horizon=2, augment=augment)
            ohgw_suggest_distributed(trial, DISTRIBUTIONS, loss, settings)
            raised[f"{failing} {n}"] = "nothing"
        except Exception as error:
            raised[f"{failing} {n}"] = f"{type(error).__name__}: {error}"
    return raised


def noise(rank: int) -> list[float]:
    """Return the mean loss, twice, of ranks with the same data and random augmentation, and the own."""
    own = lookahead_loss(network(), batches(), augment=noisy, fixed={"lr": 0.1})
    loss, psi = distributed_loss(own), {"magnitude": torch.tensor(0.5, dtype=torch.float64)}
    return [float(loss(psi)), float(loss(psi)), float(own(psi))]


def trained(rank: int) -> dict[str, Any]:
    """Return the weights after a step of DDP and what one look-ahead step of the loss predicts of them."""
    model = DistributedDataParallel(network())
    loss = distributed_loss(lookahead_loss(model, batches(rank), cross_entropy, fixed={"lr": 0.2}))
    predicted = float(loss({}))
    inputs, target = batches(rank)(0)
    cross_entropy(model(inputs), target).backward()
    torch.optim.SGD(model.parameters(), lr=0.2).step()
    inputs, target = batches()(1)
    return {"predicted": predicted, "reached": float(cross_entropy(model.module(inputs), target))}


def documented(source: str) -> dict[str, Any]:
    """Run the page's example and return what came of it."""
    names: dict[str, Any] = {}
    exec(compile(source, "<docs/library.md>", "exec"), names)
    study = names.get("shared")
    return {"trials": None if study is None else [(t.state.name, t.params) for t in study.trials]}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def environment_of_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the variables that ``torchrun`` sets."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return {**place, "RANK": str(rank), "WORLD_SIZE": str(ranks)}


def main(rank: int, folder: Path, example: str, port: int) -> None:
    """Run every job as one of two ranks; what came out is written to the folder."""
    torch.set_num_threads(1)
    os.environ.update(environment_of_rank(rank, RANKS, port))
    store = dist.FileStore(str(folder / "store"), RANKS)
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=patience)
    try:
        jobs = (gradients, warmed, plain, suggested, failures, anywhere, noise, trained)
        results = {job.__name__: job(rank) for job in jobs}
    finally:
        dist.destroy_process_group()
    torch.save({**results, "documented": documented(example)}, folder / f"rank-{rank}.pt")
