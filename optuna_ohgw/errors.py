"""What ends a command: a user's mistake, a cell that cannot go on, a storage that is away."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave, said in one line: where, what came, what to do."""


class AnotherStudy(UserError):
    """The storage or the output folder is that of another study."""


class CellFailed(RuntimeError):
    """A cell cannot go on; others can."""


class StorageLost(RuntimeError):
    """The storage did not answer for longer than ``execution.patience_s``."""


class CaptureError(RuntimeError):
    """A CUDA graph's capture failed, after which this process can do nothing more on its GPU.

    Attributes:
        memory: Whether it ran out of memory; in another process it may not.
    """

    def __init__(self, message: str, *, memory: bool = False) -> None:
        super().__init__(message)
        self.memory = memory
