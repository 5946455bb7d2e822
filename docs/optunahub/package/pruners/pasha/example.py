"""Learning rates of a linear classifier, by PASHA: trials pause, and the best of them go on."""

import tempfile

import optuna
import optunahub
import torch
from optuna.artifacts import FileSystemArtifactStore
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

pasha = optunahub.load_module("pruners/pasha")
EPOCHS = 27

images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
images = images.float() / 16
batches = list(zip(images[:1280].split(128), labels[:1280].split(128), strict=True))
store = FileSystemArtifactStore(tempfile.mkdtemp())  # in earnest: a folder that stays


def objective(trial: optuna.Trial) -> float:
    """Return the accuracy after the last epoch."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 10)
    rate = trial.suggest_float("lr", 1e-4, 10, log=True)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=trial.suggest_float("momentum", 0, 0.99))
    accuracy = 0.0
    for epoch in pasha.epochs(trial, EPOCHS, store, model=model, optimizer=optimizer):
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        accuracy = float((model(images[1280:]).argmax(1) == labels[1280:]).float().mean())
        trial.report(accuracy, epoch)  # after every epoch
    return accuracy


if __name__ == "__main__":
    pruner = pasha.PashaPruner(max_resource=EPOCHS)
    sampler = pasha.OhgwSampler(optuna.samplers.TPESampler(seed=0))  # to TPE a resumed trial is one point
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=30)
    # PASHA may have trained none to the end; a paused trial's value is its last.
    best = pasha.best_trial(study)
    print(f"{best.value:.3f} after {best.last_step} of {EPOCHS} epochs with {best.params}")
