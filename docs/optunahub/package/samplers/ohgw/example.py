"""Learning rate and weight decay of a small network, moved by one hyper-gradient before training."""

import optuna
import optunahub
import torch
from optuna.distributions import FloatDistribution
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

ohgw = optunahub.load_module("samplers/ohgw")

images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
images = images.float() / 16
batches = list(zip(images[:1280].split(128), labels[:1280].split(128), strict=True))
space = {
    "lr": FloatDistribution(1e-3, 1.0, log=True),
    "weight_decay": FloatDistribution(1e-6, 1e-1, log=True),
}


def objective(trial: optuna.Trial) -> float:
    """Return the accuracy after the last epoch."""
    torch.manual_seed(trial.number)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    loss = ohgw.lookahead_loss(model, batches, cross_entropy)  # of the hyper-parameters, differentiable
    psi = ohgw.ohgw_suggest(trial, space, loss)  # in place of trial.suggest_float
    optimizer = torch.optim.SGD(model.parameters(), lr=psi["lr"], weight_decay=psi["weight_decay"])
    accuracy = 0.0
    for epoch in range(1, 10):
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        accuracy = float((model(images[1280:]).argmax(1) == labels[1280:]).float().mean())
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy


if __name__ == "__main__":
    study = optuna.create_study(
        direction="maximize",
        sampler=ohgw.OhgwSampler(optuna.samplers.TPESampler(seed=0)),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    )
    study.optimize(objective, n_trials=12)
    record = study.best_trial.user_attrs["ohgw"][0]
    print(f"{study.best_value:.3f}: suggested {record['suggested']}, trained {study.best_params}")
