"""What a worker imports until its first optimizer, split and storage: two thirds of its start."""

from importlib import import_module

from optuna_ohgw.processes import uncollected

with uncollected():
    for name in ("optuna_ohgw.worker", "torch._dynamo", "sklearn.model_selection", "alembic.command"):
        import_module(name)
