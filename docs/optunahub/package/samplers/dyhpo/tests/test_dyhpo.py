"""What the sampler trains, on curves whose order is known: the package is loaded as the hub loads it."""

from pathlib import Path

import optuna
import optunahub
from optuna.artifacts import FileSystemArtifactStore

dyhpo = optunahub.load_local_module("samplers/dyhpo", registry_root=str(Path(__file__).parents[3]))


def test_the_best_of_known_curves_is_trained_furthest(tmp_path):
    store = FileSystemArtifactStore(str(tmp_path))

    def objective(trial):
        loss = x = trial.suggest_float("x", 0, 1)
        for epoch in dyhpo.epochs(trial, 9, store):
            loss = x + 1 / epoch
            trial.report(loss, epoch)
        return loss

    sampler = dyhpo.DyHPOSampler(max_resource=9, seed=0)
    study = optuna.create_study(sampler=sampler, pruner=sampler.pruner)
    study.optimize(objective, n_trials=40)
    length = {}
    for trial in study.trials:
        length[trial.params["x"]] = max(length.get(trial.params["x"], 0), trial.last_step or 0)
    furthest = max(length.values())
    best = sorted(length)[: max(len(length) // 2, 1)]
    assert furthest > 1
    assert any(length[x] == furthest for x in best)
