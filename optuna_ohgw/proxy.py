"""Optuna's gRPC proxy as a study's storage: a server between very many workers and their database."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import optuna
from optuna.storages import GrpcStorageProxy
from optuna.storages._grpc.client import GrpcClientCache
from optuna.trial import FrozenTrial, TrialState, create_trial

SCHEME, PORT = "grpc://", 13000  # Optuna's
_CALL_S = 60.0
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    # By itself it tries again after up to two minutes.
    ("grpc.max_reconnect_backoff_ms", 5000),
)


class ProxyStorage(GrpcStorageProxy):
    """Optuna's proxy storage whose calls end in time, and whose running trials have an owner from the start.

    Cost of a trial: some 40 calls to the server, of it to the database, and two an epoch, where a
    :class:`~optuna_ohgw.storage.BatchedStorage` takes two transactions.

    Args:
        host: Of the proxy's server.
        port: Of the proxy's server.
        sole: Whether no other process runs trials of the studies used here.
        owner: User attributes of every trial that runs here.
    """

    def __init__(
        self, host: str, port: int, *, sole: bool = False, owner: Mapping[str, Any] | None = None
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(host=host, port=port)
        self._sole, self._owner = sole, dict(owner or {})

    def for_trials(self, *, sole: bool, owner: Mapping[str, Any]) -> ProxyStorage:
        """Return a storage on the same server for a process that runs trials."""
        return ProxyStorage(self._host, self._port, sole=sole, owner=owner)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Make a trial; one that runs has its owner."""
        template = copy.copy(template_trial or create_trial(state=TrialState.RUNNING))
        if template.state == TrialState.RUNNING:
            template.user_attrs = {**template.user_attrs, **self._owner}
        return super().create_new_trial(study_id, template)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set the state; a trial that is taken has its owner before.

        Where two processes take the same one, it may name the one that did not get it until the other
        writes its own: both live.
        """
        if state == TrialState.RUNNING:
            found = self.get_trial(trial_id).state
            if found != TrialState.WAITING:
                # Alone, what runs was taken here, by a call whose answer was lost.
                return self._sole and found == TrialState.RUNNING
            for name, value in self._owner.items():
                self.set_trial_user_attr(trial_id, name, value)
        return super().set_trial_state_values(trial_id, state, values)

    def _setup(self) -> None:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # whoever waits for it says so in one line
        import grpc
        from optuna.storages._grpc.auto_generated import api_pb2_grpc

        class Limit(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
            """Ends a call that a cut network would never answer."""

            def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
                return continuation(details._replace(timeout=_CALL_S), request)

        plain = grpc.insecure_channel(f"{self._host}:{self._port}", options=list(_OPTIONS))
        self._channel = grpc.intercept_channel(plain, Limit())
        self._stub = api_pb2_grpc.StorageServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._cache = GrpcClientCache(self._stub)


def connect(url: str) -> ProxyStorage:
    """Return the storage behind a proxy at ``grpc://HOST:PORT``, after a first answer.

    Raises:
        ValueError: If the URL names more or less.
        ImportError: If grpcio or protobuf is missing.
    """
    parts = urlsplit(url)
    if not parts.hostname or parts.path.strip("/") or parts.query or "@" in parts.netloc:
        raise ValueError("write grpc://HOST:PORT")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    storage = ProxyStorage(host, parts.port or PORT)
    ping(storage)
    return storage


def ping(storage: GrpcStorageProxy) -> None:
    """Ask the server, and it its database, for what is not there."""
    try:
        storage.get_study_id_from_name("optuna-ohgw")
    except KeyError:
        return
