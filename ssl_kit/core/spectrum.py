"""Spectra of feature matrices: effective rank and the power-law exponent, through the d x d second moment.

Shared by the monitor (every few hundred steps) and the evaluation (millions of rows): memory is one block of rows
and d^2 float64, whatever N. Symbols: N rows, d columns, sigma_i singular values, lambda_i eigenvalues, descending.
"""

from __future__ import annotations

import numpy as np

_BLOCK = 8_192  # rows converted to float64 at once


def second_moment(features: np.ndarray, *, centred: bool) -> np.ndarray:
    """(d, d) float64: X^T X / N, or the covariance when `centred`.

    Args:
        features: (N, d), any float type.
        centred: subtract the column means. They are subtracted before the product: afterwards, features with a
            large common offset would lose every digit of their covariance.
    """
    count, dim = features.shape
    mean = features.mean(axis=0, dtype=np.float64) if centred else np.zeros(dim)
    total = np.zeros((dim, dim))
    for start in range(0, count, _BLOCK):
        rows = features[start : start + _BLOCK].astype(np.float64) - mean
        total += rows.T @ rows
    return total / count


def eigenvalues(features: np.ndarray, *, centred: bool) -> np.ndarray:
    """(min(N, d),) float64, descending, never negative: the spectrum of `second_moment`.

    Values below d * machine epsilon * the largest are rounding and set to 0.
    """
    count, dim = features.shape
    if count < dim:  # the N x N Gram matrix has the same non-zero eigenvalues
        mean = features.mean(axis=0, dtype=np.float64) if centred else 0.0
        rows = features.astype(np.float64) - mean
        moment = rows @ rows.T / count
    else:
        moment = second_moment(features, centred=centred)
    values = np.linalg.eigvalsh(moment)[::-1]
    return np.where(values > dim * np.finfo(np.float64).eps * values[0], values, 0.0)


def effective_rank(features: np.ndarray) -> float:
    """RankMe: exp of the Shannon entropy of the singular values of X divided by their sum, in [1, min(N, d)].

    Garrido et al. 2023, https://arxiv.org/abs/2210.02885, eq. 1-2. The paper adds 1e-7 to each p_i so that log(0) is
    defined; added after the division it makes p sum to more than 1 and the rank exceed d (by 0.5 % at d = 4,096, and
    by a third with the 1e-5 seen in public code), so here 0 log 0 = 0 is used instead. X is not centred, as in the
    paper: constant features have rank 1. All-zero features return 1.

    Args:
        features: (N, d). 25,600 rows suffice in the paper; only runs of one method are comparable.
    """
    sigma = np.sqrt(eigenvalues(features, centred=False))
    if sigma[0] == 0:
        return 1.0
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def alpha_exponent(features: np.ndarray, *, first: int = 1, last: int = 100) -> float:
    """alpha of lambda_i ~ i^-alpha, the decay of the covariance spectrum (alpha-ReQ, Agrawal et al. 2022).

    https://openreview.net/forum?id=ii9X4vtZGTZ: representations that transfer have alpha near 1; below it the tail
    is noise, far above it few directions carry everything. Fitted in log-log by least squares with weights 1/i, so
    that each octave of i counts alike. Not meaningful for rank-deficient features: zero eigenvalues are left out.

    Args:
        features: (N, d), N well above d.
        first: index of the first eigenvalue used, from 1.
        last: index of the last one used; the tail beyond about 100 is the part most bent by a finite N.

    Returns:
        alpha, or nan when fewer than two eigenvalues are left.
    """
    values = eigenvalues(features, centred=True)[first - 1 : last]
    values = values[values > 0]
    if len(values) < 2:
        return float("nan")
    index = np.arange(first, first + len(values))
    slope, _ = np.polyfit(np.log(index), np.log(values), deg=1, w=np.sqrt(1 / index))  # polyfit squares its weights
    return float(-slope)
