"""From a spec to what its trials train, and whether that can be trained at all."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from optuna_ohgw.cell_study import distributions
from optuna_ohgw.errors import UserError
from optuna_ohgw.own import OwnWorkload
from optuna_ohgw.space import SearchSpace
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.spec_kinds import ContractSpec, OwnSpec
from optuna_ohgw.tasks.contract import PARTS, load_class
from optuna_ohgw.tasks.data import cache_folder
from optuna_ohgw.tasks.image import ImageTask, load_image_arrays, split_images
from optuna_ohgw.tasks.network import NetworkTask
from optuna_ohgw.tasks.sources import one_line
from optuna_ohgw.workload import BatchWorkload, Workload


def workload(spec: StudySpec, seed: int, structure: Mapping[str, Any], device: torch.device) -> Workload:
    """Return what the trials of a study seed train, with structural parameters.

    Raises:
        UserError: If a package, the data or a part of the contract is missing.
    """
    if isinstance(spec.task, ContractSpec):
        return OwnWorkload(_own(spec.task, seed, structure, device), device)
    data = split_images(spec.image, load_image_arrays(spec.image, cache_folder()), seed, device)
    task = ImageTask(spec.image, data, structure["model"], structure["batch_size"])
    return BatchWorkload(task, spec.task.epochs)


def structures(spec: StudySpec) -> list[dict[str, Any]]:
    """Return the structures to try before a study starts: each choice once, the others as they are."""
    fixed = spec.task.structure
    tried = [{**fixed, name: choice} for name, entry in spec.choices.items() for choice in entry.choices]
    return tried or [fixed]


def check_contract(spec: StudySpec) -> str:
    """Try a task behind the contract before anything is made of its study; return what it is, in words.

    It is built, trained on one mini-batch and evaluated, its state is saved and taken over, its loss
    evaluated.

    Raises:
        UserError: If any of it cannot be done; it says what.
    """
    assert isinstance(spec.task, ContractSpec)
    done = ""
    for structure in structures(spec):
        done = _try(spec, workload(spec, spec.seeds[0], structure, torch.device("cpu")))
    return done


def _own(task: ContractSpec, seed: int, structure: Mapping[str, Any], device: torch.device) -> Any:
    if task.needs is not None:
        module, extra = task.needs
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"task.name: {task.name!r} needs {module}, which is not installed; "  # type: ignore[attr-defined]
                f"pip install 'optuna-ohgw[{extra}]'"
            )
    made, options = load_class(task.path), {**task.options, **structure}
    try:
        return made(seed=seed, device=device, epochs=task.epochs, **options)
    except TypeError as error:
        raise UserError(f"task.options: {task.path} cannot be made: {error}") from error
    except UserError:
        raise
    except Exception as error:
        if isinstance(task, OwnSpec):
            raise UserError(f"task.options: {task.path} cannot be made: {one_line(error)}") from error
        if isinstance(error, ValueError):  # it names field and remedy
            raise UserError(str(error)) from error
        raise


def _try(spec: StudySpec, work: Workload) -> str:
    assert isinstance(work, OwnWorkload)
    own, path = work.own, spec.task.path  # type: ignore[union-attr]
    space = SearchSpace(distributions(spec))
    middle = space.to_floats((space.low + space.high) / 2)
    psi = {**spec.constants, **middle}
    step = "batches_per_epoch"
    try:
        if work.batches_per_epoch < 1:
            raise ValueError(f"batches_per_epoch is {own.batches_per_epoch}; give a whole number from 1")
        step = "build"
        state = work.start(spec.seeds[0], 0)
        if psi.get("dropout") and isinstance(own, NetworkTask) and not own.drops:
            raise UserError("space.dropout: the network has no layer that drops; take it out of the space")
        # A whole evaluation of this package's own tasks takes hours on a CPU (ImageNet): they keep to it.
        for part in PARTS if isinstance(spec.task, OwnSpec) else ():
            step = f"evaluate({part!r})"
            found = work.evaluate(state, part)
            if math.isnan(found.metric) or not math.isfinite(found.loss):
                raise ValueError(
                    f"the metric of {part} is {found.metric}, the loss {found.loss} before training"
                )
            low, high = spec.metric.low, spec.metric.high
            if (low is not None and found.metric < low) or (high is not None and found.metric > high):
                raise ValueError(f"the metric of {part} is {found.metric}, outside of {low} to {high}")
        step = "train"
        once, _ = work.short_train(replace(state, psi=psi), 0, 1)
        step = "state_dict"
        if isinstance(spec.task, OwnSpec):
            # Trained on without a break, then from the state: only what it leaves out can differ.
            on, again = (work.short_train(once, 1, 1)[0].digest() for _ in range(2))
            if on != again:
                raise ValueError(
                    "training on from a state differs from training on without a break; it must hold all "
                    "that training changes, and train must draw by the seed alone"
                )
        torch.save(state.content(), kept := io.BytesIO())
        kept.seek(0)
        back = work.restore(torch.load(kept, weights_only=True))
        if isinstance(spec.task, OwnSpec):
            work.evaluate(back, "warm")
        if work.start(spec.seeds[0], 0).digest() != state.digest():
            step = "build"
            raise ValueError("two calls with one seed give different states; draw by the seed alone")
        step = "loss"
        loss = work.loss(replace(state, psi=psi), 0, spec.warm_start.horizon)
        value = torch.as_tensor(loss(space.to_native(space.to_search(middle))))
        if value.numel() != 1:
            raise ValueError(f"a loss of shape {tuple(value.shape)} is no scalar")
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise UserError(f"task.name: {path}: {step} fails: {type(error).__name__}: {reason}") from error
    measured = f"{spec.metric.name} ({'higher' if spec.metric.maximize else 'lower'} is better)"
    return f"{spec.task.summary}: {work.batches_per_epoch} mini-batches an epoch, {measured}"
