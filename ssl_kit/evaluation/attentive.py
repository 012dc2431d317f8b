"""Probes that are trained step by step: one that attends to tokens, and the literature's linear probe by SGD.

`attentive_probe`: a classifier that attends to the tokens of a frozen encoder before it averages them.
Psomas et al. 2025, arXiv:2506.10178 ("efficient probing"): Q learned queries meet the tokens themselves, without key
projection; each pools one part of their values. Masked autoencoders keep what they know in patch tokens, so that a
linear probe of their mean understates them. With one query of zeros it is the linear probe of the mean token.

    a_q = softmax(t u_q / sqrt(D))    pooled = concat_q(V_q a_q t)    logits = W pooled + b

`sgd_probe`: stochastic gradient descent for 90 epochs, its learning rate chosen on held-out train.
As in MoCo (He et al. 2020, https://arxiv.org/abs/1911.05722, section 4.1) and MAE (He et al. 2022,
https://arxiv.org/abs/2111.06377, appendix A.1): momentum 0.9, no weight decay, cosine schedule, features standardised
by the training set as MAE's batch norm without affine does. What differs: features are computed once and not augmented,
all learning rates are trained side by side in one matrix product, and none is chosen on test. `linear.linear_probe`
solves the same model exactly and sooner; this is for comparison with published tables.

Letters: N images, T tokens per image, D width of a token, Q queries, C classes, L learning rates, B images of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_kit.core.console import progress
from ssl_kit.core.errors import UserError
from ssl_kit.core.random import permutation
from ssl_kit.embeddings.embeddings import Embeddings, tensor_to
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation.features import Scaling
from ssl_kit.evaluation.linear import LogisticFit
from ssl_kit.evaluation.metrics import probability_metrics
from ssl_kit.evaluation.result import Result, classification_metrics, holdout, labelled_groups, labelled_parts, made_by

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
_QUERIES = 8
_EPOCHS = 12
_BATCH = 512
_WEIGHT_DECAY = 1e-2
_BLOCK = 2_048  # images predicted at once
_STREAM = 100_010  # of core/random.py


class Tokens(nn.Module):
    """All tokens of an encoder's last layer as one long vector: (B, C, h, w) in [0, 1] to (B, T * D), for `embed`.

    A ViT's special tokens and patches, or the positions of a CNN's last feature map.

    Attributes:
        width: D.
        dim: T * D.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        self.sha256 = encoder.sha256
        device = next(encoder.parameters()).device
        with torch.inference_mode():
            shape = self._tokens(torch.zeros(1, encoder.channels, *encoder.image_size, device=device)).shape
        self.width: int = shape[2]  # not of the pooled features: a head may have layers of its own
        self.dim: int = shape[1] * shape[2]

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, h, w) to (B, T * D) float32."""
        return self._tokens(images).flatten(1).float()

    def _tokens(self, images: Tensor) -> Tensor:
        features = self.encoder.model.forward_features(self.encoder.normalise(images))
        if getattr(self.encoder.model, "output_fmt", "NCHW") == "NHWC":  # of the Swin transformers
            return features.flatten(1, 2)
        return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features  # (B, T, D)


class AttentivePooling(nn.Module):
    """Tokens (B, T, D), standardised, to logits (B, C).

    Args:
        width: D.
        num_classes: C.
        queries: Q, a divisor of D.
    """

    def __init__(self, width: int, num_classes: int, queries: int):
        super().__init__()
        if width % queries:
            raise UserError(f"{queries} queries do not divide tokens of width {width}; choose a divisor")
        self.queries = nn.Parameter(torch.zeros(queries, width))
        self.values = nn.Parameter(torch.empty(queries, width // queries, width))
        self.classifier = nn.Linear(width, num_classes)
        nn.init.normal_(self.values, std=width**-0.5)
        nn.init.normal_(self.queries, std=0.02)  # nearly the mean: different enough to part
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def attention(self, tokens: Tensor) -> Tensor:
        """(B, T, D) to (B, Q, T), rows sum to 1: where each query looks."""
        return (self.queries @ tokens.transpose(1, 2) * tokens.shape[2] ** -0.5).softmax(dim=2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, D) to (B, C)."""
        seen = self.attention(tokens) @ tokens  # (B, Q, D)
        pooled = torch.einsum("bqd,qvd->bqv", seen, self.values).flatten(1)  # (B, D)
        return self.classifier(F.layer_norm(pooled, pooled.shape[1:]))


def attentive_probe(
    train: Embeddings,
    test: Embeddings,
    *,
    width: int,
    lr: float | Sequence[float] = LEARNING_RATES,
    epochs: int = _EPOCHS,
    queries: int = _QUERIES,
    seed: int = 0,
    features: str = "encoder",
    device: torch.device | str = "cpu",
) -> Result:
    """Top-1, balanced accuracy and macro-F1 of an attentive classifier on frozen tokens, with 95 % intervals.

    Args:
        train: vectors (N, T * D), tokens as `Tokens` lays them out; rows without a label are left out.
        test: read once, after everything is chosen.
        width: D.
        lr: peak learning rate of AdamW, or candidates: the best top-1 on a held-out fifth of train is chosen (equal
            scores: the smallest) and trained again on all of train.
        epochs: passes over train, cosine schedule.
        queries: Q.
        seed: of the held-out split, the initial weights, the order and the bootstrap.
        features: what the vectors are, for the record.
        device: that trains; tokens go there at once if they take at most half of what is free, else batch by batch.
    """
    started = time.perf_counter()
    vectors, labels, test_vectors, test_labels, num_classes = labelled_parts(train, test)
    if vectors.shape[1] % width:
        raise UserError(f"vectors of {vectors.shape[1]} numbers are no whole tokens of width {width}")
    tokens = _placed(vectors.reshape(len(vectors), -1, width), device)
    candidates = [float(lr)] if isinstance(lr, int | float) else sorted(map(float, lr))
    settings: dict[str, object] = {"lr_candidates": candidates, "epochs": epochs, "queries": queries}
    settings["batch_size"] = _BATCH
    fit = lambda rows, rate: _fit(tokens, labels, rows, num_classes, rate, epochs, queries, seed, device)
    seen = lambda fitted, held: [_predict(fit(fitted, rate), tokens[held]) for rate in candidates]
    rate, told = _chosen(candidates, labels, labelled_groups(train), seed, seen)
    probe = fit(np.arange(len(labels)), rate)
    predictions = _predict(probe, torch.from_numpy(test_vectors.reshape(len(test_vectors), -1, width)))
    metrics = classification_metrics(test_labels, predictions, num_classes, seed=seed)
    settings |= {**told, "lr": rate, "num_train": len(labels), "num_test": len(test_labels)}
    settings |= {"tokens": tokens.shape[1], "dim": width, "seed": seed}
    seconds = time.perf_counter() - started
    return Result("attentive", features, metrics, settings, made_by(train, test), seconds, predictions)


def _chosen(
    candidates: Sequence[float],
    labels: np.ndarray,
    groups: np.ndarray | None,
    seed: int,
    predicted: Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray] | np.ndarray],
) -> tuple[float, dict[str, object]]:
    """The learning rate with the best top-1 on a held-out fifth, of equal ones the first, and how it came about.

    Args:
        candidates: one of them is taken as it is.
        labels: (N,).
        groups: that the held-out split keeps together, see `holdout`.
        seed: of it.
        predicted: given the rows to fit on and the rows held out, the classes of the latter by each candidate.
    """
    if len(candidates) == 1:
        return candidates[0], {}
    fitted, held = holdout(labels, seed=seed, groups=groups)
    scores = [float((classes == labels[held]).mean()) for classes in predicted(fitted, held)]
    best = int(np.argmax(scores))
    return candidates[best], {"held_out": 0.2, "held_out_top1": scores, "at_edge": best in (0, len(candidates) - 1)}


class _Probe(nn.Module):
    """Standardises tokens by the training set's statistics, then pools."""

    mean: Tensor
    scale: Tensor

    def __init__(self, pooling: AttentivePooling, mean: Tensor, scale: Tensor):
        super().__init__()
        self.pooling = pooling
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.pooling((tokens - self.mean) * self.scale)


def _placed(tokens: np.ndarray, device: torch.device | str) -> Tensor:
    """(N, T, D), on the device if there is room; otherwise the host picks the images of every step."""
    found = torch.from_numpy(tokens)
    room = torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else 0
    return found.to(device) if 2 * tokens.nbytes <= room else found


def _fit(
    tokens: Tensor,
    labels: np.ndarray,
    rows: np.ndarray,
    num_classes: int,
    lr: float,
    epochs: int,
    queries: int,
    seed: int,
    device: torch.device | str,
) -> _Probe:
    """Trains on tokens[rows], (N, T, D); a pure function of its arguments."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # the same start on every device
        torch.manual_seed(seed)
        pooling = AttentivePooling(tokens.shape[2], num_classes, queries)
    sample = tokens[rows[: 8 * _BLOCK]].cpu().numpy().reshape(-1, tokens.shape[2])
    deviation = sample.std(axis=0)
    mean, scale = torch.from_numpy(sample.mean(axis=0)), torch.from_numpy(1 / np.maximum(deviation, 1e-6))
    probe = _Probe(pooling, mean, scale).to(device)
    optimiser = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=_WEIGHT_DECAY, fused=True)
    steps = epochs * -(-len(rows) // _BATCH)
    rising = 0.1 if steps > 10 else 0.15  # a tenth of 10 steps would be a first phase of length 0, and divides by it
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, total_steps=steps, pct_start=rising, anneal_strategy="cos"
    )
    targets = torch.from_numpy(labels).to(device)
    for epoch in range(epochs):
        order = rows[permutation(seed, epoch, len(rows), _STREAM)]
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            loss = F.cross_entropy(probe(tensor_to(tokens[chosen], torch.device(device))), targets[chosen])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    return probe.eval()


def _predict(probe: _Probe, tokens: Tensor) -> np.ndarray:
    parts = tokens.split(_BLOCK)
    with torch.inference_mode():
        return torch.cat([probe(tensor_to(part, probe.mean.device)).argmax(1) for part in parts]).cpu().numpy()


SGD_LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)  # for 256 images a step
EPOCHS = 90
BATCH_SIZE = 256
_MOMENTUM = 0.9
_SGD_STREAM = 100_040  # of core/random.py


def sgd_probe(
    train: Embeddings,
    test: Embeddings,
    *,
    lr: float | Sequence[float] = SGD_LEARNING_RATES,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    features: str = "encoder",
    device: torch.device | str = "cpu",
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
        device: that trains; it must have float64.
    """
    started = time.perf_counter()
    if epochs < 1 or batch_size < 1:
        raise UserError(f"SGD probe: {epochs} epochs in steps of {batch_size} images; wanted at least 1 of both")
    vectors, labels, test_vectors, test_labels, num_classes = labelled_parts(train, test)
    scaling = Scaling.of(vectors)
    scaled, targets = scaling.apply(vectors, device), torch.from_numpy(labels).to(device)
    candidates = [float(lr)] if isinstance(lr, int | float) else sorted(map(float, lr))
    settings: dict[str, object] = {"lr_candidates": candidates, "epochs": epochs, "batch_size": batch_size}
    fit = lambda rows, rates: train_linear(scaled[rows], targets[rows], num_classes, rates, epochs, batch_size, seed)
    seen = lambda fitted, held: fit(fitted, candidates).predict(scaled[held])
    rate, told = _chosen(candidates, labels, labelled_groups(train), seed, seen)
    final = fit(slice(None), [rate])
    probabilities = final.probabilities(scaling.apply(test_vectors, device))
    predictions, confidences = probabilities.argmax(axis=1), probabilities.max(axis=1)
    metrics = classification_metrics(test_labels, predictions, num_classes, seed=seed)
    metrics |= probability_metrics(test_labels, probabilities, seed=seed)
    settings |= {**told, "lr": rate, "momentum": _MOMENTUM, "num_train": len(labels), "num_test": len(test_labels)}
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
    weights, bias = features.new_zeros(len(lr), num_classes, dim), features.new_zeros(len(lr), num_classes)
    speeds = torch.zeros_like(weights), torch.zeros_like(bias)
    rates = features.new_tensor(lr) * min(batch_size, count) / 256
    steps = epochs * -(-count // batch_size)
    step, loss = 0, features.new_zeros(len(lr), dtype=torch.float64)
    with progress(epochs, "linear probe by SGD") as bar:
        for epoch in range(epochs):
            order = torch.from_numpy(permutation(seed, epoch, count, _SGD_STREAM)).to(features.device)
            loss.zero_()
            for rows in order.split(batch_size):
                rate = rates * 0.5 * (1 + math.cos(math.pi * step / steps))
                x, y = features[rows], labels[rows]
                logits_BLC = torch.addmm(bias.flatten(), x, weights.flatten(0, 1).T).view(len(x), *bias.shape)
                log_p = logits_BLC.log_softmax(dim=2)
                index = y[:, None, None].expand(-1, len(lr), 1)
                loss -= log_p.gather(2, index).sum(dim=(0, 2), dtype=torch.float64)
                residual = log_p.exp_().scatter_add_(2, index, features.new_full(index.shape, -1.0)) / len(x)
                speeds[0].mul_(_MOMENTUM).add_((residual.flatten(1).T @ x).view_as(weights))
                speeds[1].mul_(_MOMENTUM).add_(residual.sum(dim=0))
                weights -= rate[:, None, None] * speeds[0]
                bias -= rate[:, None] * speeds[1]
                step += 1
            bar.advance(bar.task_ids[0])
    losses = loss.cpu().numpy()
    return LogisticFit(weights, bias, losses / count, epochs, np.isfinite(losses))
