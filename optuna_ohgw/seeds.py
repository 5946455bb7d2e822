"""Seeds derived from what they are for, never drawn in sequence."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a random stream is used for; the value is part of the key and never changes."""

    SPLIT = 0
    LABEL_NOISE = 1
    SUGGEST = 2
    WEIGHTS = 3
    ORDER = 4
    AUGMENT = 5
    MODEL = 6
    WARM_START = 7
    CONTROL = 8
    STRUCTURE = 9


def derive_seed(seed: int, purpose: Purpose, *key: int) -> int:
    """Return a 63-bit seed that depends on nothing but its arguments.

    Streams of different purposes or keys are independent, so a resumed run, another
    worker or a warm start can never shift the draws of training.

    Args:
        seed: The study seed; 0 is valid.
        purpose: What the stream is for.
        key: Position of the stream, for example ``(config_index, epoch)``.

    Returns:
        An integer in ``[0, 2**63)``, derived with ``numpy.random.SeedSequence``.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(int(purpose), *key))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
