"""What no network is needed for: k-means of whitened patches (Coates, Lee & Ng 2011, AISTATS, section 3).

Small patches of the training images, each with its brightness and contrast taken out, are whitened and clustered. An
image is described by how near its patches lie to the centres ("triangle", eq. 2), summed over its four quarters. With
4,000 centres a linear classifier on that reaches 0.796 on CIFAR-10; here there are 400, and every second place.
Letters: B images, C channels, P patches of p x p pixels, K centres, D = p p C.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_kit.core.machine import full_float32
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.sources import Source
from ssl_kit.views.recipe import plain

SIDE = 32  # pixels of the images that patches are cut from, whatever they have
_PATCH, _STRIDE = 6, 2  # pixels; at every pixel they take four times as long for 0.036
_IMAGES, _EACH = 2_000, 50  # training images that the centres come from, and patches of each
_CENTRES, _ITERATIONS = 400, 15
_CONTRAST = 10 / 255**2  # added to the variance of a patch (10 of grey values in 0..255)
_WHITEN = 0.1  # added to the variances of patches of contrast 1
_BATCH = 64  # images at once: their distances to all centres take 50 MB


class Patches(nn.Module):
    """(B, C, 32, 32) in [0, 1] to (B, 4 K): how near patches are to each centre, in each quarter of the image.

    Attributes:
        dim: 4 K.
    """

    mean: Tensor
    whiten: Tensor
    centres: Tensor

    def __init__(self, mean: Tensor, whiten: Tensor, centres: Tensor, channels: int):
        super().__init__()
        self.image_size, self.channels, self.dim = (SIDE, SIDE), channels, 4 * len(centres)
        self.sha256: str | None = None
        for name, values in (("mean", mean), ("whiten", whiten), ("centres", centres)):
            self.register_buffer(name, values)

    @classmethod
    def of(cls, train: Source, seed: int = 0, device: torch.device | str = "cpu") -> Patches:
        """The centres of the patches of up to 2,000 training images, spread evenly."""
        rows = np.linspace(0, len(train) - 1, min(_IMAGES, len(train))).astype(np.int64)
        generator = torch.Generator().manual_seed(seed)
        found = []
        for batch in ViewLoader(train, np.array_split(rows, max(1, len(rows) // 256)), (plain((SIDE, SIDE)),)):
            patches = _normalised(batch["views"][0])  # (B, P, D)
            chosen = torch.rand(patches.shape[:2], generator=generator).topk(_EACH, dim=1).indices
            found.append(patches.gather(1, chosen[:, :, None].expand(-1, -1, patches.shape[2])).flatten(0, 1))
        points = torch.cat(found).to(device)
        with full_float32():
            mean = points.mean(dim=0)
            values, vectors = torch.linalg.eigh((points - mean).T.double().cov())
            whiten = (vectors / (values.clamp_min(0) + _WHITEN).sqrt() @ vectors.T).float()
            return cls(mean, whiten, _k_means((points - mean) @ whiten, generator), train.channels)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, C, 32, 32) to (B, 4 K) float32."""
        return torch.cat([self._near(part) for part in images.float().split(_BATCH)])

    def _near(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False), full_float32():
            rows = (_normalised(images) - self.mean) @ self.whiten  # (B, P, D)
            distances = torch.cdist(rows, self.centres.expand(len(rows), -1, -1))  # (B, P, K)
            near = (distances.mean(dim=2, keepdim=True) - distances).clamp_min(0)
            places = (SIDE - _PATCH) // _STRIDE + 1
            maps = near.transpose(1, 2).unflatten(2, (places, places))  # (B, K, y, x)
            return F.adaptive_avg_pool2d(maps, 2).flatten(1)


def _normalised(images: Tensor) -> Tensor:
    """(B, C, H, W) to all patches (B, P, D), each less its mean, over its contrast."""
    patches = F.unfold(images, _PATCH, stride=_STRIDE).transpose(1, 2)
    patches = patches - patches.mean(dim=2, keepdim=True)
    return patches / (patches.square().mean(dim=2, keepdim=True) + _CONTRAST).sqrt()


def _k_means(points: Tensor, generator: torch.Generator) -> Tensor:
    """(K, D) centres of (N, D) points by Lloyd's algorithm; one that no point is nearest to stays where it was."""
    centres = points[torch.randperm(len(points), generator=generator)[:_CENTRES].to(points.device)]
    for _ in range(_ITERATIONS):
        nearest = torch.cat([torch.cdist(part, centres).argmin(dim=1) for part in points.split(10_000)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres
