"""One thread: the tests' problems are small, and threads that wait for each other cost more.

And a cache of pictures that is not the user's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from optuna_ohgw.tasks.data import CACHE

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def unpaused(tmp_path_factory):
    """What every configuration of ``cell_runs`` comes to without a pause; costs some seconds, once."""
    from cell_runs import unpaused_courses

    return unpaused_courses(tmp_path_factory.mktemp("unpaused"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(tmp_path_factory.mktemp("cache")))
        yield
