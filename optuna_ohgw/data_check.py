"""Whether a study's data can be read and its networks take them, seen before anything is made."""

from __future__ import annotations

import torch
from torch import nn

from optuna_ohgw.cells import cells_of
from optuna_ohgw.contract_check import check_contract, differentiates_twice
from optuna_ohgw.errors import UserError
from optuna_ohgw.spec import StudySpec
from optuna_ohgw.spec_kinds import ContractSpec
from optuna_ohgw.tasks.data import ImageData, cache_folder
from optuna_ohgw.tasks.image import load_image_arrays, split_images
from optuna_ohgw.tasks.models import build_model
from optuna_ohgw.tasks.replay import courses_of


def check_data(spec: StudySpec) -> None:
    """Raise a UserError unless the data can be read and every network takes them."""
    if spec.replays:
        for cell in cells_of(spec):
            courses_of(spec, cell)
        return
    if isinstance(spec.task, ContractSpec):
        check_contract(spec)
        return
    arrays = load_image_arrays(spec.image, cache_folder())
    data = split_images(spec.image, arrays, spec.seeds[0], torch.device("cpu"))
    for model in models_of(spec):
        _check_model(spec, data, model)


def models_of(spec: StudySpec) -> list[str]:
    """Return the names of the networks that a study trains."""
    models = spec.choices["model"].choices if "model" in spec.choices else (spec.image.model,)
    return [str(model) for model in models]


def _check_model(spec: StudySpec, data: ImageData, model: str) -> None:
    network = build_model(
        model,
        channels=data.channels,
        size=data.height,
        classes=data.classes,
        activation=spec.image.activation,
    )
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros_like(data.train_images[:2], dtype=torch.float32))
    except (RuntimeError, ValueError, AssertionError) as error:
        shape = tuple(data.train_images.shape[1:])
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"task.model: {model!r} cannot take pictures of {shape} ({reason}); "
            "give another model or another task.size"
        ) from None
    if differentiates_twice(spec):
        _check_second_derivatives(network, data, model)


def _check_second_derivatives(network: nn.Module, data: ImageData, model: str) -> None:
    weights = list(network.train().parameters())
    images = torch.zeros_like(data.train_images[:2], dtype=torch.float32)
    loss = nn.functional.cross_entropy(network(images), torch.zeros(2, dtype=torch.long))
    try:
        gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        squares = [g.square().sum() for g in gradients if g is not None]
        torch.autograd.grad(torch.stack(squares).sum(), weights, allow_unused=True)
    except RuntimeError as error:
        raise UserError(
            f"task.model: {model!r} has a layer that cannot be differentiated twice "
            f"({str(error).splitlines()[0]}); set warm_start.horizon to 1 with the estimator lean, or "
            "the estimator finite-difference"
        ) from None
