from __future__ import annotations

import gc
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from typing import Any

import pytest

from optuna_ohgw import processes
from optuna_ohgw.processes import SIGNALS, context, deaf

PRELOADED = ("optuna_ohgw.worker", "torch._dynamo", "sklearn.model_selection", "alembic.command")


def in_worker(expression: str) -> Any:
    """Return the value of an expression in a fresh worker, evaluated before anything is imported."""
    with deaf():
        executor = ProcessPoolExecutor(1, mp_context=context("cpu"))
        future = executor.submit(eval, expression)
    with executor:
        return future.result(timeout=120)


def test_a_worker_starts_with_its_imports_done() -> None:
    modules = in_worker("set(__import__('sys').modules)")
    assert {*PRELOADED} <= modules


def test_what_is_preloaded_exists() -> None:
    assert [import_module(n).__name__ for n in processes._PRELOADED]  # else it would be passed over


def test_a_worker_s_garbage_collector_is_on() -> None:
    assert in_worker("__import__('gc').isenabled()")


def test_the_garbage_collector_is_on_again_after_an_import_that_failed() -> None:
    with pytest.raises(ModuleNotFoundError), processes.uncollected():
        import_module("optuna_ohgw.nowhere")
    assert gc.isenabled()


def test_a_worker_is_deaf_until_it_can_ignore_signals() -> None:
    mask = in_worker("__import__('signal').pthread_sigmask(__import__('signal').SIG_BLOCK, [])")
    assert {*SIGNALS} <= {signal.Signals(number) for number in mask}
    assert not {*SIGNALS} & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_worker_s_torch_has_not_asked_for_a_gpu() -> None:
    assert in_worker("__import__('torch').cuda.is_initialized()") is False


def test_on_a_gpu_workers_start_afresh() -> None:
    assert context("cuda").get_start_method() == "spawn"


def test_without_a_fork_server_workers_start_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    processes.prepare()
    assert context("cpu").get_start_method() == "spawn"
