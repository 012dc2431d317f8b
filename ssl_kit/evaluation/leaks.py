"""Leakage: test images of which a near-duplicate is among the training images. A score on them is memory, not skill.

Images are compared as small thumbnails, each without its own mean and of length 1, so that the inner product is the
correlation of their pixels: blind to brightness and contrast, hardly moved by compression, and independent of the
encoder that is being judged. A correlation alone does not do: all ones of MNIST look alike. A near-duplicate is

    1 - c_1 <= (1 - c_4) / 3  and  c_1 >= 0.9        or  c_1 >= 0.9999

with c_i the correlation with the i-th nearest training image: three times as near as the fourth, so that up to three
copies are seen as such. On CIFAR-10 this finds 2.5 % of the test images, every pair of one class (Barz & Denzler 2020,
https://arxiv.org/abs/1902.00423, found 3.3 % by hand); on MNIST's digits, which have none, 1 %.

Letters: N training images, M test images, D thumbnail values, L leaked test images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ssl_kit.data.sources import Source
from ssl_kit.embeddings import Embeddings, embed
from ssl_kit.evaluation.baselines import Pixels
from ssl_kit.evaluation.neighbours import search
from ssl_kit.views.recipe import plain

SIDE = 16  # pixels of a thumbnail
LEAST = 0.9  # correlation of a near-duplicate
SURE = 0.9999  # of copies, however many there are
_COPIES = 3  # of one image in train that are still seen
_NEARER = 1 / 3
_FLAT = 0.02  # standard deviation of a thumbnail without anything to see, in [0, 1]


class Thumbnails(Pixels):
    """Images as their thumbnails: (B, C, 16, 16) in [0, 1] to (B, D), zero mean and length 1; flat images are zero."""

    def __init__(self, channels: int):
        super().__init__((SIDE, SIDE), channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C h w) float32."""
        centred = images.flatten(1).float()
        centred = centred - centred.mean(dim=1, keepdim=True)
        lengths = centred.norm(dim=1, keepdim=True)
        flat = lengths < _FLAT * centred.shape[1] ** 0.5
        return centred / lengths.masked_fill(flat, 1.0) * ~flat


@dataclass
class Leaks:
    """Near-duplicates between test and train.

    Attributes:
        test_ids: (L,) ids of the test images that have one.
        train_ids: (L,) the nearest training image of each.
        correlations: (L,) float32, at least `LEAST`.
        num_test: M.
    """

    test_ids: list[str]
    train_ids: list[str]
    correlations: np.ndarray
    num_test: int

    def without(self, test: Embeddings) -> Embeddings:
        """The test embeddings whose images have no near-duplicate in train."""
        leaked = set(self.test_ids)
        kept = np.array([name not in leaked for name in test.ids])
        ids = [name for name in test.ids if name not in leaked]
        return replace(test, vectors=test.vectors[kept], labels=test.labels[kept], ids=ids)


def find_leaks(train: Source, test: Source, *, batch_size: int = 256) -> Leaks:
    """Compares every test image with every training image; both are read once more, at 16 pixels.

    Args:
        train: labels are not used.
        test: labels are not used.
        batch_size: images read at once.
    """
    module = Thumbnails(test.channels)
    view = plain(module.image_size)
    known, asked = (embed(module, part, view=view, batch_size=batch_size, label="thumbnails") for part in (train, test))
    return leaks_between(known, asked)


def leaks_between(train: Embeddings, test: Embeddings) -> Leaks:
    """The same for embeddings of `Thumbnails`."""
    correlations, ids = search(train.vectors, test.vectors, _COPIES + 1)
    nearest, other = correlations[:, 0], correlations[:, -1]
    alone = correlations.shape[1] <= _COPIES  # so few training images that there is no other to compare with
    apart = (nearest >= LEAST) & (alone | (1 - nearest <= _NEARER * (1 - other)))
    leaked = np.flatnonzero(apart | (nearest >= SURE))
    return Leaks(
        [test.ids[row] for row in leaked],
        [train.ids[row] for row in ids[leaked, 0]],
        nearest[leaked],
        len(test),
    )
