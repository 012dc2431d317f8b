"""What a score stands beside: raw pixels, PCA of the pixels (or of any features), the untrained network.

Pixels and the untrained network are encoders like any other, so one `embed` serves all; PCA works on arrays.
Letters: N rows, D dimensions, R kept dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

MAX_VALUES = 4_096  # pixel values kept per image; neighbours among larger pixel vectors are the same, only slower
_BLOCK = 4_096
_OVERSAMPLING = 10
_ITERATIONS = 12  # of the subspace iteration on D x D; cheap there, and exact enough for 512 directions of CIFAR-10


class Pixels(nn.Module):
    """Images as their own features: (B, C, H, W) in [0, 1] to (B, dim), the pixel values themselves.

    Args:
        image_size: (height, width) of the encoder that this stands beside; shrunk until 4,096 values are left.
        channels: of the images.

    Attributes:
        dim: height x width x channels of `image_size` as used.
        mean: (dim,) that is subtracted, None at first.
    """

    def __init__(self, image_size: tuple[int, int], channels: int):
        super().__init__()
        shrink = min(1.0, math.sqrt(MAX_VALUES / (image_size[0] * image_size[1] * channels)))
        self.image_size = (max(1, int(image_size[0] * shrink)), max(1, int(image_size[1] * shrink)))
        self.channels = channels
        self.dim = self.image_size[0] * self.image_size[1] * channels
        self.sha256: str | None = None
        self.mean: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C H W) float32."""
        pixels = images.flatten(1).float()
        return pixels if self.mean is None else pixels - self.mean


@dataclass
class Pca:
    """The leading principal directions of training features.

    Attributes:
        mean: (D,) float32.
        directions: (D, R) float32, orthonormal, by falling variance.
    """

    mean: np.ndarray
    directions: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, dim: int, seed: int = 0) -> Pca:
        """The first min(dim, D, N) directions of features (N, D).

        Subspace iteration on the covariance (Halko et al. 2011, https://arxiv.org/abs/0909.4061, algorithm 4.4 and
        5.3): the data are read once, where a randomised SVD of the data reads them at every iteration.
        """
        count, columns = features.shape
        dim = min(dim, columns, count)
        mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
        covariance = torch.zeros(columns, columns, dtype=torch.float64)
        for start in range(0, count, _BLOCK):
            rows = torch.from_numpy(features[start : start + _BLOCK] - mean)
            covariance += rows.T @ rows  # float32 products, float64 sums
        if columns <= 2 * (dim + _OVERSAMPLING):
            return cls(mean, torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :dim].float().numpy())
        total = covariance.diagonal().sum().clamp_min(torch.finfo(torch.float64).tiny)  # of images all alike it is 0
        covariance = (covariance / total).float()
        generator = torch.Generator().manual_seed(seed)
        basis = torch.randn(columns, dim + _OVERSAMPLING, generator=generator)
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(covariance @ basis).Q
        rotation = torch.linalg.eigh(basis.T @ covariance @ basis).eigenvectors.flip(1)[:, :dim]
        return cls(mean, (basis @ rotation).numpy())

    def apply(self, features: np.ndarray, dim: int | None = None) -> np.ndarray:
        """(N, D) to (N, min(dim, R)) float32."""
        directions = self.directions[:, :dim]
        reduced = np.empty((len(features), directions.shape[1]), dtype=np.float32)
        for start in range(0, len(features), _BLOCK):
            rows = slice(start, start + _BLOCK)
            np.matmul(features[rows] - self.mean, directions, out=reduced[rows])
        return reduced


def centre(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Subtracts the mean of `train` (N, D) from both, in place, and returns it (D,).

    Cosines of raw pixels see little but brightness.
    """
    mean = train.mean(axis=0, dtype=np.float64).astype(train.dtype)
    train -= mean
    test -= mean
    return mean


def random_projection(columns: int, dim: int, seed: int = 0) -> np.ndarray:
    """(columns, dim) float32, orthonormal columns in uniformly distributed directions; dim at most `columns`.

    QR of a Gaussian matrix; the signs of R's diagonal make it uniform (Mezzadri 2007, arXiv:math-ph/0609050).
    """
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(columns, dim, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float().numpy()
