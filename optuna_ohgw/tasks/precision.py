"""The number format in which a device trains."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return autocast to bfloat16 on a GPU, to float16 on one that lacks it; nothing elsewhere."""
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", torch.float16 if needs_scaler(device) else torch.bfloat16)


def needs_scaler(device: torch.device) -> bool:
    """Return whether training is in float16, whose small gradients need a scaled loss."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # which torch asks, whatever device is meant
        return not torch.cuda.is_bf16_supported(including_emulation=False)
