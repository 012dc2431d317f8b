"""The literature's linear probe: stochastic gradient descent for 90 epochs, its learning rate chosen on held-out train.

As in MoCo (He et al. 2020, https://arxiv.org/abs/1911.05722, section 4.1) and MAE (He et al. 2022,
https://arxiv.org/abs/2111.06377, appendix A.1): momentum 0.9, no weight decay, cosine schedule, features standardised
by the training set as MAE's batch norm without affine does. What differs: features are computed once and not augmented,
all learning rates are trained side by side in one matrix product, and none is chosen on test. `linear.linear_probe`
solves the same model exactly and sooner; this is for comparison with published tables.

Letters: N images, D dimensions, C classes, L learning rates, B images of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ssl_kit.core.console import progress
from ssl_kit.core.errors import UserError
from ssl_kit.core.random import permutation
from ssl_kit.evaluation.linear import LogisticFit, Scaling
from ssl_kit.evaluation.result import Result, classification_metrics, holdout, labelled, made_by
from ssl_kit.evaluation.scores import probability_metrics

if TYPE_CHECKING:
    from ssl_kit.embeddings import Embeddings

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)  # for 256 images a step
EPOCHS = 90
BATCH_SIZE = 256
_MOMENTUM = 0.9
_STREAM = 100_040  # of core/random.py


def sgd_probe(
    train: Embeddings,
    test: Embeddings,
    *,
    lr: float | Sequence[float] = LEARNING_RATES,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    features: str = "encoder",
) -> Result:
    """Scores of a linear classifier trained by SGD on frozen features, with 95 % intervals; metrics as `linear_probe`.

    Args:
        train: features to fit on; rows without a label are left out.
        test: read once, after everything is chosen; rows without a label are left out.
        lr: at the start, for 256 images a step, or candidates: the best top-1 on a held-out fifth of train is chosen
            (equal scores: the smallest) and trained again on all of train. The last epoch counts, never the best one.
        epochs: passes over train.
        batch_size: images per step.
        seed: of the held-out split, the order and the bootstrap.
        features: what the vectors are, for the record.
    """
    started = time.perf_counter()
    if epochs < 1 or batch_size < 1:
        raise UserError(f"SGD probe: {epochs} epochs in steps of {batch_size} images; wanted at least 1 of both")
    vectors, labels = labelled(train, "train")
    test_vectors, test_labels = labelled(test, "test")
    num_classes = int(max(len(train.classes), labels.max() + 1, test_labels.max() + 1))
    scaling = Scaling.of(vectors)
    scaled, targets = scaling.apply(vectors), torch.from_numpy(labels)
    candidates = [float(lr)] if isinstance(lr, int | float) else sorted(map(float, lr))
    settings: dict[str, Any] = {"lr_candidates": candidates, "epochs": epochs, "batch_size": batch_size}
    best = 0
    if len(candidates) > 1:
        fitted, held = holdout(labels, seed=seed)
        path = train_linear(scaled[fitted], targets[fitted], num_classes, candidates, epochs, batch_size, seed)
        scores = (path.predict(scaled[held]) == labels[held]).mean(axis=1)
        best = int(scores.argmax())
        settings |= {"held_out": 0.2, "held_out_top1": scores.tolist(), "at_edge": best in (0, len(candidates) - 1)}
    final = train_linear(scaled, targets, num_classes, candidates[best : best + 1], epochs, batch_size, seed)
    probabilities = final.probabilities(scaling.apply(test_vectors))
    predictions, confidences = probabilities.argmax(axis=1), probabilities.max(axis=1)
    metrics = classification_metrics(test_labels, predictions, num_classes, seed=seed)
    metrics |= probability_metrics(test_labels, probabilities, seed=seed)
    settings |= {"lr": candidates[best], "momentum": _MOMENTUM, "num_train": len(labels), "num_test": len(test_labels)}
    settings |= {"dim": vectors.shape[1], "seed": seed}
    seconds = time.perf_counter() - started
    return Result("sgd", features, metrics, settings, made_by(train, test), seconds, predictions, confidences)


def train_linear(
    features: Tensor, labels: Tensor, num_classes: int, lr: Sequence[float], epochs: int, batch_size: int, seed: int
) -> LogisticFit:
    """Trains L linear classifiers from zeros, each with its own learning rate, on the same batches.

    Args:
        features: (N, D) float32, standardised.
        labels: (N,) int64 in [0, C).
        num_classes: C.
        lr: (L,) at the start, for 256 images a step; falls to 0 along a cosine.
        epochs: passes over the data.
        batch_size: B.
        seed: of the order.
    """
    count, dim = features.shape
    weights, bias = torch.zeros(len(lr), num_classes, dim), torch.zeros(len(lr), num_classes)
    speeds = torch.zeros_like(weights), torch.zeros_like(bias)
    rates = torch.tensor(lr) * min(batch_size, count) / 256
    steps = epochs * -(-count // batch_size)
    step, loss = 0, torch.zeros(len(lr), dtype=torch.float64)
    with progress(epochs, "linear probe by SGD") as bar:
        for epoch in range(epochs):
            order = torch.from_numpy(permutation(seed, epoch, count, _STREAM))
            loss.zero_()
            for rows in order.split(batch_size):
                rate = rates * 0.5 * (1 + math.cos(math.pi * step / steps))
                x, y = features[rows], labels[rows]
                logits_BLC = torch.addmm(bias.flatten(), x, weights.flatten(0, 1).T).view(len(x), *bias.shape)
                log_p = logits_BLC.log_softmax(dim=2)
                index = y[:, None, None].expand(-1, len(lr), 1)
                loss -= log_p.gather(2, index).sum(dim=(0, 2), dtype=torch.float64)
                residual = log_p.exp_().scatter_add_(2, index, torch.full(index.shape, -1.0)) / len(x)
                speeds[0].mul_(_MOMENTUM).add_((residual.flatten(1).T @ x).view_as(weights))
                speeds[1].mul_(_MOMENTUM).add_(residual.sum(dim=0))
                weights -= rate[:, None, None] * speeds[0]
                bias -= rate[:, None] * speeds[1]
                step += 1
            bar.advance(bar.task_ids[0])
    finite = np.isfinite(loss.numpy())
    return LogisticFit(weights, bias, loss.numpy() / count, epochs, finite)
