"""Retrieval: do the nearest images show the same class, and is another crop of the same image found.

Within classes, as Musgrave et al. 2020 (https://arxiv.org/abs/2003.08505, section 3.2) score metric learning: with R
the number of other images of the query's class,

    R-precision = hits among the first R / R      mAP@R = 1/R sum_{i <= R} (hits among the first i / i) [i is a hit]

Between crops no label is needed: the right answer is the other crop of the same image. Similarity is the cosine.
Letters: Q queries, N gallery rows, D dimensions, K results of a query.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ssl_kit.core.errors import UserError
from ssl_kit.embeddings.exact import normalised, search, without
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.wrapped import Wrapped
from ssl_kit.evaluation.features import Network, Pixels, view_features
from ssl_kit.evaluation.health import sample_rows
from ssl_kit.evaluation.result import Result, intervals, labelled, made_by, versions
from ssl_kit.views.recipe import View

if TYPE_CHECKING:
    from ssl_kit.data.sources import Source
    from ssl_kit.embeddings.embeddings import Embeddings

KS = (1, 5, 10)
MAX_QUERIES = 10_000
CROP_AREA = (0.2, 1.0)  # of the image, as the crops of masked autoencoders
_BLOCK_BYTES = 64 * 2**20
_RESULT_BYTES = 64  # per query and result: score, id, label, hits and what is made of them


def retrieval(
    gallery: Embeddings,
    queries: Embeddings | None = None,
    *,
    ks: Sequence[int] = KS,
    seed: int = 0,
    features: str = "encoder",
    device: torch.device | str = "cpu",
) -> Result:
    """recall_at_k, precision_at_k, r_precision and map_at_r within classes, means over queries with 95 % intervals.

    recall_at_k is the fraction of queries with at least one image of their class among the first k; precision_at_k the
    mean fraction of the first k that is of the query's class.

    Args:
        gallery: rows without a label are left out.
        queries: None = every gallery row asks for the others (the usual protocol, on the test images). Of more than
            10,000 queries a seeded sample asks.
        ks: cut-offs; those beyond the number of images that can be found are left out, `settings` lists the rest.
        seed: of the sample and the bootstrap.
        features: what the vectors are, for the record.
        device: that searches.

    Raises:
        UserError: no query has an image of its class to find.
    """
    started = time.perf_counter()
    vectors, labels = labelled(gallery, "the gallery")
    units = normalised(vectors)
    rows = None if queries is not None else sample_rows(np.arange(len(units)), MAX_QUERIES, seed)
    if queries is None:
        asked, asked_labels = units[rows], labels[rows]
    else:
        asked, asked_labels = labelled(queries, "the queries")
        chosen = sample_rows(np.arange(len(asked)), MAX_QUERIES, seed)
        asked, asked_labels = normalised(asked[chosen]), asked_labels[chosen]
    ks = [k for k in ks if k <= len(units) - (queries is None)]
    scores = _within_classes(units, labels, asked, asked_labels, rows, ks, device)
    metrics = intervals(scores, seed)
    settings = {"ks": list(ks), "num_queries": len(asked), "num_gallery": len(units), "dim": units.shape[1]}
    settings |= {"within": queries is None, "seed": seed}
    made = made_by(gallery, gallery if queries is None else queries)
    return Result("retrieval", features, metrics, settings, made, time.perf_counter() - started)


def _within_classes(
    units: np.ndarray,
    labels: np.ndarray,
    asked: np.ndarray,
    asked_labels: np.ndarray,
    rows: np.ndarray | None,
    ks: Sequence[int],
    device: torch.device | str,
) -> dict[str, np.ndarray]:
    """Scores of every query that has something to find, (Q,) each; `rows` are the queries' own gallery rows."""
    own = 0 if rows is None else 1
    counts = np.bincount(labels, minlength=int(asked_labels.max()) + 1)
    findable = np.flatnonzero(counts[asked_labels] > own)
    if not len(findable):
        raise UserError("no class has a second image: retrieval within classes has nothing to find")
    right = counts[asked_labels] - own
    longest = min(len(units) - own, max((int(right[findable].max()), *ks)))
    block = max(1, _BLOCK_BYTES // (_RESULT_BYTES * longest))
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(findable), block):
        these = findable[start : start + block]
        ids = search(units, asked[these], longest + own, device=device)[1]
        if rows is not None:
            ids = without(ids, rows[these])
        hits = labels[ids] == asked_labels[these, None]
        for name, values in _ranked(hits, right[these], ks).items():
            found.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in found.items()}


def _ranked(hits: np.ndarray, right: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Scores (Q,) of hits (Q, K) bool, best result first; `right` (Q,) is R, at most K."""
    places = np.arange(1, hits.shape[1] + 1)
    counted = hits & (places <= right[:, None])
    precision = np.cumsum(hits, axis=1) / places
    scores: dict[str, np.ndarray] = {
        f"recall_at_{k}": np.asarray(hits[:, :k].any(axis=1), dtype=np.float64) for k in ks
    }
    scores |= {f"precision_at_{k}": precision[:, k - 1] for k in ks if k > 1}  # at 1 it is the recall
    scores["r_precision"] = counted.sum(axis=1) / right
    scores["map_at_r"] = (precision * counted).sum(axis=1) / right
    return scores


def instance_retrieval(
    network: Network,
    source: Source,
    *,
    count: int = 2_000,
    area: tuple[float, float] = CROP_AREA,
    ks: Sequence[int] = KS,
    seed: int = 0,
    features: str = "encoder",
) -> Result:
    """Is one crop of an image found by another: recall_at_k and the mean reciprocal rank, with 95 % intervals.

    Two random crops, mirrored half of the time, of each of M images; every first crop asks among all second crops.

    Args:
        network: the encoder, or a baseline that has one.
        source: images, labels are not used; those that cannot be decoded are left out.
        count: M at most, drawn by the seed.
        area: of the crops as a fraction of the image, (smallest, largest).
        ks: cut-offs.
        seed: of the sample, the crops and the bootstrap.
        features: what the network is, for the record.
    """
    started = time.perf_counter()
    view = View(network.image_size, crop=1, scale=area, flip_x=0.5)
    rows = sample_rows(np.arange(len(source)), count, seed)
    first, second = (normalised(part) for part in view_features(network, source, (view, replace(view)), rows, seed))
    ranks = _ranks(first, second)
    scores = {f"recall_at_{k}": (ranks <= k).astype(np.float64) for k in ks} | {"mean_reciprocal_rank": 1 / ranks}
    metrics = intervals(scores, seed)
    settings = {"ks": list(ks), "num_images": len(first), "area": list(area), "dim": first.shape[1], "seed": seed}
    made = {"encoder_sha256": network.sha256, "train": None, "test": source.name, "versions": versions()}
    return Result("instances", features, metrics, settings, made, time.perf_counter() - started)


class TwoCrops(nn.Module):
    """Wide images, (B, C, h, W), to the features of their left and their right crop of (h, w), (B, 2 D).

    Args:
        network: (B, C, h, w) to (B, D).

    Attributes:
        size: (h, W) of the wide images: of each crop half is in the other, too.
        dim: 2 D.
    """

    def __init__(self, network: Encoder | Wrapped | Pixels):
        super().__init__()
        height, width = network.image_size
        self.network, self.size, self.dim = network, (height, width + width // 2), 2 * network.dim

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, h, W) to (B, 2 D)."""
        width = self.network.image_size[1]
        crops = (images[..., :width], images[..., -width:])
        return torch.cat([self.network(crop.contiguous(memory_format=torch.channels_last)) for crop in crops], dim=1)


def crops_top1(features: np.ndarray) -> float:
    """The fraction of images whose left crop is nearer to its own right crop than to all others.

    By cosine around the mean of each side: cosines of pixels, and of a network that has learnt nothing, see little but
    what all images have in common.

    Args:
        features: (N, 2 D) of `TwoCrops`.
    """
    left, right = (normalised(side - side.mean(axis=0)) for side in np.split(features, 2, axis=1))
    return float((_ranks(left, right) == 1).mean())


def _ranks(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """(Q,) rank of gallery row i for query i, from 1; among equal similarities the middle one, so ties win nothing."""
    ranks = np.empty(len(queries))
    block = max(1, _BLOCK_BYTES // (_RESULT_BYTES * len(gallery)))
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        cosines = queries[rows] @ gallery.T
        own = cosines[np.arange(len(cosines)), np.arange(start, start + len(cosines))][:, None]
        ranks[rows] = 1 + (cosines > own).sum(axis=1) + ((cosines == own).sum(axis=1) - 1) / 2
    return ranks
