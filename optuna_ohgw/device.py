"""The device that a study names."""

from __future__ import annotations

import re

import torch

from optuna_ohgw.errors import UserError


def resolve_device(name: str) -> torch.device:
    """Return the device that a spec names; ``auto`` is a GPU where there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name_of(device: torch.device) -> str:
    """Return a GPU's product name, else ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def check_device(name: str, field: str) -> None:
    """Raise a UserError that names the field unless the device is there."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"{field}: {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"{field}: {name!r} is not available here; use auto or cpu")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise UserError(f"{field}: {name!r} is not among the {torch.cuda.device_count()} here; use cuda")
