"""From a spec to what its trials train."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from optuna_ohgw.errors import UserError
from optuna_ohgw.own import OwnWorkload
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.spec_kinds import ContractSpec, OwnSpec
from optuna_ohgw.tasks.contract import load_class
from optuna_ohgw.tasks.data import cache_folder
from optuna_ohgw.tasks.image import ImageTask, load_image_arrays, split_images
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
