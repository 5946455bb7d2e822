"""The log of a worker in the folder of the cell that it works on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def logged(folder: Path, number: int, level: int) -> Iterator[None]:
    """Log to a file in a cell's folder while inside.

    Args:
        folder: The cell's; made if another machine made the cell and does not share it.
        number: Of the worker among those of its run on this machine.
        level: The lowest that is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"worker-{number}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("optuna_ohgw")
    logger.setLevel(level)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
