"""The study's data and networks, by what a run does before it starts."""

from __future__ import annotations

from optuna_ohgw.doctor.check import Check, size
from optuna_ohgw.spec import StudySpec


def check_data(spec: StudySpec, counted: list[int]) -> list[Check]:
    """Return lines on data set and networks; they are read, decoded and built, nothing is trained.

    Args:
        spec: The study.
        counted: Where the networks' numbers of parameters are put.

    Raises:
        UserError: If they cannot be used.
    """
    from optuna_ohgw import data_check
    from optuna_ohgw.contract_check import check_contract
    from optuna_ohgw.spec_kinds import ContractSpec

    if isinstance(spec.task, ContractSpec):
        return [Check("data", "task", "ok", check_contract(spec))]
    data_check.check_data(spec)
    if spec.replays:
        return [Check("data", "data", "ok", spec.task.summary)]
    from optuna_ohgw.tasks.data import cache_folder
    from optuna_ohgw.tasks.image import load_image_arrays
    from optuna_ohgw.tasks.models import build_model

    arrays = load_image_arrays(spec.image, cache_folder())  # in the cache by now
    _, channels, height, width = arrays.train_images.shape
    counts = {}
    for name in data_check.models_of(spec):
        network = build_model(
            name,
            channels=channels,
            size=height,
            classes=arrays.classes,
            activation=spec.image.activation,
        )
        counts[name] = sum(p.numel() for p in network.parameters())
    counted += counts.values()
    pictures = f"{len(arrays.train_images):,} and {len(arrays.test_images):,} pictures"
    held = size(arrays.train_images.nbytes + arrays.test_images.nbytes)
    shape = f"{channels}x{height}x{width} pixels, {arrays.classes} classes, {held}"
    data = f"{spec.image.data}: {pictures} of {shape}"
    networks = ", ".join(f"{name} of {count:,} parameters" for name, count in counts.items())
    return [Check("data", "data", "ok", data), Check("data", "networks", "ok", networks)]
