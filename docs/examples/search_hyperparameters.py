"""Optuna over SimCLR's settings: `python search_hyperparameters.py DATA`. Needs `pip install optuna` and labels.

The score is kNN of labelled training images that the run holds out by itself. Test images are never opened.
"""

import os
import sys
from pathlib import Path

import optuna

import ssl_kit
from ssl_kit.training.curves import read_curves
from ssl_kit.views.recipe import ViewRecipe

TRIALS, EPOCHS = int(os.environ.get("TRIALS", "20")), float(os.environ.get("EPOCHS", "5"))


def score(trial: optuna.Trial) -> float:
    """Trains with the trial's settings; kNN top-1 of the held-out training images, in [0, 1]."""
    optim = {"name": "sgd", "lr": trial.suggest_float("lr", 0.05, 2.0, log=True), "weight_decay": 5e-4}
    temperature = trial.suggest_float("temperature", 0.05, 1.0, log=True)
    method = {
        "class_path": "ssl_kit.methods.simclr.SimCLR",
        "init_args": {"temperature": temperature, "optim": optim},
    }
    views = ViewRecipe(scale=(trial.suggest_float("smallest_crop", 0.08, 0.5), 1.0))
    run = f"runs/search/{trial.number}"
    ssl_kit.pretrain(sys.argv[1], run=run, overwrite=True, method=method, views=views, epochs=EPOCHS)
    return [row["knn_top1"] for row in read_curves(Path(run) / "metrics.csv") if "knn_top1" in row][-1]


study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
study.optimize(score, n_trials=TRIALS)
print(f"best of {TRIALS}: kNN {study.best_value:.3f} with {study.best_params}")
