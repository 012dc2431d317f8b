"""Linear probe: multinomial logistic regression on standardised features, the whole l2 path in one batched solve.

    objective(W, b) = mean cross-entropy of softmax(Z W + b) + l2 / 2 ||W||^2        (scikit-learn: l2 = 1 / (C N))

With class weights the mean is a weighted one.

What makes it fast. (1) L-BFGS starts from the inverse of S / C + l2 I, S the second moment of the features: the
Hessian at equal probabilities, by a Cholesky factor per candidate. That takes tens of passes over the data where the
identity takes hundreds. (2) All l2 candidates share each pass: their weights stand side by side in one matrix
product. (3) With fewer images than dimensions everything is solved among the images' coordinates in the space they
span (`spanned`). Letters: N rows, D dimensions, C classes, L candidates, A candidates that are not finished yet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ssl_kit.core.random import permutation
from ssl_kit.evaluation.features import Scaling
from ssl_kit.evaluation.metrics import probability_metrics
from ssl_kit.evaluation.result import Result, classification_metrics, holdout, labelled_groups, labelled_parts, made_by

if TYPE_CHECKING:
    from ssl_kit.embeddings.embeddings import Embeddings

L2_PATH = tuple(10.0**exponent for exponent in range(-6, 2))
_ROWS = 4_096  # whose second moment is added at once
_CURVATURE_ROWS = 20_000  # a sample of so many rows preconditions as well as all of them
_STREAM_CURVATURE = 100_003  # of core/random.py
_RIDGE = 1e-6  # of the preconditioner alone, relative to the largest variance: its moment has float32 products
_MEMORY = 10  # pairs that L-BFGS remembers
_BLOCK_LOGITS = 2**19  # logits computed at once: 2 MB stay in the cache between product, softmax and product
_DEVICE_BLOCK_LOGITS = 2**26  # elsewhere: large products, few of them
_STATE_BYTES = 2**29  # of the L-BFGS pairs; more candidates than fit are solved one after another
_SUFFICIENT = 1e-4  # Armijo's constant
_ROUNDING = 1e-7  # relative error of a float32 loss: decreases below it are noise


@dataclass
class LogisticFit:
    """Solutions of all candidates, in the coordinates of the features that were passed.

    Attributes:
        weights: (L, C, D) float32.
        bias: (L, C) float32.
        objective: (L,) mean cross-entropy + penalty, float64.
        passes: over the data, for all candidates together.
        converged: (L,) bool.
    """

    weights: Tensor
    bias: Tensor
    objective: np.ndarray
    passes: int
    converged: np.ndarray

    def probabilities(self, features: Tensor, candidate: int = 0) -> np.ndarray:
        """(N, C) float32 of one candidate; rows sum to 1."""
        weights, bias = self.weights[candidate], self.bias[candidate]
        blocks = [torch.addmm(bias, rows, weights.T).softmax(dim=1) for rows in features.split(_block_rows(bias))]
        return torch.cat(blocks).cpu().numpy()

    def predict(self, features: Tensor) -> np.ndarray:
        """(L, N) int64 classes of features (N, D)."""
        blocks = [
            (rows @ self.weights.flatten(0, 1).T + self.bias.flatten()).view(len(rows), *self.bias.shape).argmax(dim=2)
            for rows in features.split(_block_rows(self.bias))
        ]
        return torch.cat(blocks).T.cpu().numpy()


def linear_probe(
    train: Embeddings,
    test: Embeddings,
    *,
    l2: float | Sequence[float] = L2_PATH,
    balanced: bool = False,
    seed: int = 0,
    features: str = "encoder",
    keep_probabilities: bool = False,
    device: torch.device | str = "cpu",
) -> Result:
    """Scores of a linear classifier on frozen features, with 95 % intervals.

    Top-1, balanced accuracy, macro-F1; AUROC, average precision and calibration error (`scores.probability_metrics`).

    Args:
        train: features to fit on; rows without a label are left out. The scaling uses all of them, labels apart.
        test: read once, after everything is chosen; rows without a label are left out.
        l2: penalty, or candidates: the best top-1 on a held-out fifth of train is chosen (equal scores: the largest)
            and refitted on all of train.
        balanced: weigh images so that every class counts alike, and choose by balanced accuracy.
        seed: of the held-out split and the bootstrap.
        features: what the vectors are, for the record.
        keep_probabilities: leave (N, C) of them in the result; of many images and classes they are large.
        device: that solves; it must have float64.
    """
    started = time.perf_counter()
    vectors, labels, test_vectors, test_labels, num_classes = labelled_parts(train, test)
    scaling = Scaling.of(vectors)
    scaled, test_scaled = spanned(*(scaling.apply(part, device) for part in (vectors, test_vectors)))
    candidates = [float(l2)] if isinstance(l2, int | float) else sorted(map(float, l2), reverse=True)
    groups = labelled_groups(train)
    final, chosen = fit_chosen(scaled, labels, num_classes, candidates, balanced=balanced, seed=seed, groups=groups)
    probabilities = final.probabilities(test_scaled)
    predictions = probabilities.argmax(axis=1)
    metrics = classification_metrics(test_labels, predictions, num_classes, seed=seed)
    metrics |= probability_metrics(test_labels, probabilities, seed=seed)
    settings = {
        **chosen,
        "balanced": balanced,
        "objective": float(final.objective[0]),
        "converged": bool(final.converged.all()),
        "num_train": len(labels),
        "num_test": len(test_labels),
        "dim": vectors.shape[1],
        "seed": seed,
    }
    seconds = time.perf_counter() - started
    confidences, kept = probabilities.max(axis=1), probabilities if keep_probabilities else None
    return Result("linear", features, metrics, settings, made_by(train, test), seconds, predictions, confidences, kept)


def spanned(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """points (N, D) and others (M, D) by their coordinates in the span of `points` when that is smaller: (., N).

    The penalised solution is a combination of the rows that it is fitted on, so solving there is exact.
    """
    if len(points) >= points.shape[1]:
        return points, others
    basis = torch.linalg.qr(points.T).Q  # (D, N), orthonormal
    return points @ basis, others @ basis


def fit_chosen(
    scaled: Tensor,
    labels: np.ndarray,
    num_classes: int,
    candidates: Sequence[float],
    *,
    balanced: bool = False,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> tuple[LogisticFit, dict[str, object]]:
    """Fits on all rows with the l2 that is best on a held-out fifth of them.

    Args:
        scaled: (N, D) float32, centred.
        labels: (N,) int64 in [0, C).
        num_classes: C.
        candidates: l2, descending: of equal scores the first is taken.
        balanced: as in `linear_probe`.
        seed: of the held-out split.
        groups: that it keeps together, see `holdout`.

    Returns:
        The fit, and how its l2 came about, for the record.
    """
    targets, moment = torch.from_numpy(labels).to(scaled.device), curvature(scaled)
    weigh = lambda rows: class_weights(labels[rows], num_classes).to(scaled.device) if balanced else None
    settings: dict[str, object] = {"l2_candidates": list(candidates)}
    start, best = None, 0
    if len(candidates) > 1:
        fitted, held = holdout(labels, seed=seed, groups=groups)
        path = fit_logistic(scaled[fitted], targets[fitted], num_classes, candidates, moment, row_weights=weigh(fitted))
        right = path.predict(scaled[held]) == labels[held]
        counted = weigh(held)
        scores = right.mean(axis=1) if counted is None else right @ counted.cpu().numpy().astype(np.float64) / len(held)
        best = int(scores.argmax())
        start = (path.weights[best : best + 1], path.bias[best : best + 1])
        name = "held_out_balanced_accuracy" if balanced else "held_out_top1"
        settings |= {"held_out": 0.2, name: scores.tolist(), "at_edge": best in (0, len(candidates) - 1)}
    rows = np.arange(len(labels))
    only = candidates[best : best + 1]
    final = fit_logistic(scaled, targets, num_classes, only, moment, start=start, row_weights=weigh(rows))
    return final, {**settings, "l2": candidates[best]}


def class_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """(N,) float32 with mean 1: every class that occurs weighs the same, as scikit-learn's class_weight="balanced"."""
    counts = np.bincount(labels, minlength=num_classes)
    return torch.from_numpy((len(labels) / (np.count_nonzero(counts) * counts[labels])).astype(np.float32))


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    l2: Sequence[float],
    moment: Tensor,
    *,
    start: tuple[Tensor, Tensor] | None = None,
    row_weights: Tensor | None = None,
    max_passes: int = 300,
    tolerance: float = 1e-7,
) -> LogisticFit:
    """Minimises the objective at the top of this file for every l2.

    Args:
        features: (N, D) float32, centred.
        labels: (N,) int64 in [0, C).
        num_classes: C.
        l2: (L,) penalties, all positive.
        moment: (D, D) of the features or a sample of them (`curvature`); it sets the speed, not the solution.
        start: weights (1, C, D) and bias (1, C) to begin from; zeros otherwise.
        row_weights: (N,) factors on the cross-entropy of each row, with mean 1; None counts all alike.
        max_passes: over the data, at most.
        tolerance: a candidate is done when the decrease that its quadratic model promises is below this.
    """
    dim = features.shape[1]
    state_bytes = 4 * (2 * _MEMORY * (dim + 1) * num_classes + dim * dim)
    group = max(1, _STATE_BYTES // state_bytes)
    fits = []
    for first in range(0, len(l2), group):
        some = l2[first : first + group]
        solver = _Solver(features, labels, num_classes, some, moment, start=start, row_weights=row_weights)
        fits.append(solver.run(max_passes, tolerance))
    return LogisticFit(
        torch.cat([fit.weights for fit in fits]),
        torch.cat([fit.bias for fit in fits]),
        np.concatenate([fit.objective for fit in fits]),
        sum(fit.passes for fit in fits),
        np.concatenate([fit.converged for fit in fits]),
    )


def curvature(features: Tensor, seed: int = 0) -> Tensor:
    """(D, D) float64 second moment of centred features (N, D); of a seeded sample of rows when N is large."""
    count = max(_CURVATURE_ROWS, 4 * features.shape[1])
    if count < len(features):
        features = features[torch.from_numpy(np.sort(permutation(seed, 0, len(features), _STREAM_CURVATURE)[:count]))]
    moment = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for rows in features.split(_ROWS):
        moment += rows.T @ rows  # float32 products, float64 sums
    return moment / len(features)


class _Solver:
    """L-BFGS (Nocedal & Wright, algorithm 7.4) for L problems at once, each with its own steps and memory.

    Parameters are (L, C, D + 1), the bias in the last column, in coordinates in which the Hessian at equal
    probabilities is the identity: U = W F with F F^T = S / C + l2 I (Cholesky). In a pass every unfinished candidate
    tries its step; those that decreased enough move and remember, the others halve it and try again in the next pass.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        num_classes: int,
        l2: Sequence[float],
        moment: Tensor,
        *,
        start: tuple[Tensor, Tensor] | None = None,
        row_weights: Tensor | None = None,
    ):
        self.features, self.labels = features, labels
        self.row_weights = features.new_ones(len(features)) if row_weights is None else row_weights
        size, dim = len(l2), features.shape[1]
        penalised = features.new_ones(dim + 1)
        penalised[-1] = 0
        self.penalty = features.new_tensor(l2)[:, None, None] * penalised
        self.factors = features.new_empty(size, dim, dim)
        for factor, penalty in zip(self.factors, l2, strict=True):  # float64: with a small l2 the matrix is singular
            factor.copy_(_cholesky(moment / num_classes, penalty, _RIDGE * float(moment.diagonal().max())))
        self.bias_factor = num_classes**-0.5  # the bias sees a column of ones, and no penalty
        self.point = features.new_zeros(size, num_classes, dim + 1)
        if start is not None:
            self.point[..., :-1], self.point[..., -1] = start[0] @ self.factors, start[1] * self.bias_factor
        self.steps = features.new_zeros(_MEMORY, size, num_classes, dim + 1)
        self.changes = features.new_zeros(_MEMORY, size, num_classes, dim + 1)
        self.rho = features.new_zeros(_MEMORY, size)
        self.gamma = features.new_ones(size)

    def run(self, max_passes: int, tolerance: float) -> LogisticFit:
        every = torch.arange(len(self.point), device=self.point.device)
        active = every
        value, gradient = self.evaluate(self.point, active)
        direction = self.direction(gradient, active)
        length = self.gamma.new_ones(len(active))
        passes = 1
        while len(active) and passes < max_passes:
            slope = (gradient[active] * direction[active]).sum(dim=(1, 2))
            unfinished = -slope / 2 > tolerance
            unfinished &= length[active] > 1e-6  # no decrease left above rounding
            active, slope = active[unfinished], slope[unfinished]
            if not len(active):
                break
            step = length[active, None, None] * direction[active]
            trial = self.point[active] + step
            new_value, new_gradient = self.evaluate(trial, active)
            passes += 1
            bound = value[active] + _SUFFICIENT * length[active] * slope + _ROUNDING * value[active].abs()
            moved = new_value <= bound
            length[active[~moved]] *= 0.5
            rows = active[moved]
            self.remember(rows, step[moved], new_gradient[moved] - gradient[rows])
            self.point[rows], value[rows], gradient[rows] = trial[moved], new_value[moved], new_gradient[moved]
            direction[rows] = self.direction(gradient, rows)
            length[rows] = 1.0
        converged = np.ones(len(self.point), dtype=bool)
        converged[active.cpu().numpy()] = False
        solution = self.weights(self.point, every)
        return LogisticFit(solution[..., :-1], solution[..., -1], value.cpu().numpy(), passes, converged)

    def evaluate(self, point: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Objective (A,) float64 and gradient (A, C, D + 1) at points of A candidates, in one pass over the data."""
        candidates, classes, columns = point.shape
        solution = self.weights(point, rows)
        weights = solution[..., :-1].reshape(candidates * classes, columns - 1)
        bias = solution[..., -1].reshape(candidates * classes)
        total = point.new_zeros(candidates, dtype=torch.float64)
        gradient = point.new_zeros(candidates * classes, columns)
        size = _block_rows(bias)
        blocks = zip(self.features.split(size), self.labels.split(size), self.row_weights.split(size), strict=True)
        for features, labels, row_weights in blocks:
            logits = torch.addmm(bias, features, weights.T).view(len(features), candidates, classes)
            logits -= logits.amax(dim=2, keepdim=True)
            index = labels[:, None, None].expand(-1, candidates, 1)
            at_label = logits.gather(2, index)
            sums = logits.exp_().sum(dim=2, keepdim=True)
            weight = row_weights[:, None, None]
            total += (weight * (sums.log() - at_label)).sum(dim=(0, 2), dtype=torch.float64)
            logits *= weight / sums
            logits.scatter_add_(2, index, -weight.expand_as(at_label))  # weight x (softmax - one-hot)
            residual = logits.flatten(1)
            gradient[:, :-1].addmm_(residual.T, features)  # this orientation is twice as fast for few columns
            gradient[:, -1] += residual.sum(dim=0)
        gradient = (gradient / len(self.features)).view(candidates, classes, columns)
        penalty = self.penalty[rows]
        value = total / len(self.features) + 0.5 * (penalty * solution.square()).sum(dim=(1, 2), dtype=torch.float64)
        gradient += penalty * solution
        gradient[..., -1] /= self.bias_factor
        for position, row in enumerate(rows.tolist()):  # dJ/dU = dJ/dW F^-T
            one = gradient[position, :, :-1]
            one[:] = torch.linalg.solve_triangular(self.factors[row], one.T, upper=False).T
        return value, gradient

    def weights(self, point: Tensor, rows: Tensor) -> Tensor:
        """The weights W = U F^-1 and biases (A, C, D + 1) of points of the candidates `rows`."""
        solution = point / self.bias_factor
        for position, row in enumerate(rows.tolist()):
            one = point[position, :, :-1]
            solution[position, :, :-1] = torch.linalg.solve_triangular(self.factors[row].T, one.T, upper=True).T
        return solution

    def direction(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """Minus the inverse Hessian of the memory times the gradient: (A, C, D + 1) for the candidates `rows`."""
        q = gradient[rows].clone()
        steps, changes, rho = self.steps[:, rows], self.changes[:, rows], self.rho[:, rows]
        alphas = []
        for s, y, r in zip(steps.flip(0), changes.flip(0), rho.flip(0), strict=True):  # newest first; empty: r = 0
            alpha = r * (s * q).sum(dim=(1, 2))
            q -= alpha[:, None, None] * y
            alphas.append(alpha)
        q *= self.gamma[rows, None, None]
        for s, y, r, alpha in zip(steps, changes, rho, reversed(alphas), strict=True):
            q += (alpha - r * (y * q).sum(dim=(1, 2)))[:, None, None] * s
        return -q

    def remember(self, rows: Tensor, step: Tensor, change: Tensor) -> None:
        """Adds a pair per candidate in `rows` in place of its oldest one."""
        curvature = (step * change).sum(dim=(1, 2))
        useful = curvature > 1e-12 * step.square().sum(dim=(1, 2))  # convex: false only when rounding is all there is
        rows, step, change, curvature = rows[useful], step[useful], change[useful], curvature[useful]
        for store, newest in ((self.steps, step), (self.changes, change), (self.rho, 1 / curvature)):
            store[:-1, rows] = store[1:, rows].clone()
            store[-1, rows] = newest
        self.gamma[rows] = curvature / change.square().sum(dim=(1, 2))


def _cholesky(moment: Tensor, penalty: float, ridge: float) -> Tensor:
    """The factor of moment + (penalty + ridge) I, (D, D) float64.

    Float32 products leave eigenvalues of a singular moment below zero by up to 1e-7 of the largest one, which for
    thousands of equal columns (grey images as RGB) is more than the ridge: it then grows until the matrix is positive.
    """
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(moment + (penalty + ridge) * identity)
        if not failed:
            return factor
        ridge = max(10 * ridge, 1e-12)


def _block_rows(bias: Tensor) -> int:
    """Rows whose logits are computed at once; there are as many per row as `bias` has numbers."""
    if bias.device.type != "cpu":
        return max(64, _DEVICE_BLOCK_LOGITS // bias.numel())
    return min(4_096, max(64, _BLOCK_LOGITS // bias.numel()))
