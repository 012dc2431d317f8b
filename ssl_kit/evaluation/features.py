"""The features that are scored side by side: the encoder's and its baselines', each image embedded once.

Features of networks are kept in RUN/features/KEY, an embeddings folder each; KEY names the weights, the images, their
labels and the preprocessing, so an entry is reused exactly when nothing that made it has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ssl_kit.core.console import say, warn
from ssl_kit.core.files import DamagedError
from ssl_kit.data.listing import unescape
from ssl_kit.data.sources import Source
from ssl_kit.embeddings import Embeddings, embed
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation.baselines import Pca, Pixels, centre
from ssl_kit.views.recipe import plain

BASELINES = ("pixels", "pca", "random_init")


@dataclass
class FeatureSet:
    """One kind of features of the same train and test images; `name` is what a Result calls them."""

    name: str
    train: Embeddings
    test: Embeddings


def feature_sets(
    encoder: Encoder,
    train: Source,
    test: Source,
    cache: Path,
    *,
    baselines: Sequence[str] = BASELINES,
    seed: int = 0,
    batch_size: int = 256,
) -> Iterator[FeatureSet]:
    """The encoder's features first, then the baselines'; one kind is in memory at a time.

    Args:
        encoder: loaded from a folder, so that it knows its sha256.
        train: labelled images.
        test: labelled images.
        cache: RUN/features.
        baselines: among `BASELINES`. PCA is of the pixels, fitted on train, at the encoder's dimension.
        seed: of the untrained network and of PCA.
        batch_size: images per forward pass.
    """
    parts = (train, test)
    prints = [fingerprint(part) for part in parts]
    made = [
        _cached(cache, encoder, part, str(encoder.sha256), of, batch_size)
        for part, of in zip(parts, prints, strict=True)
    ]
    yield FeatureSet("encoder", *made)
    del made
    if "pixels" in baselines or "pca" in baselines:
        pixels = _pixels(encoder, train, test, batch_size)
        if "pixels" in baselines:
            yield pixels
        if "pca" in baselines:
            yield _reduced(pixels, Pca.of(pixels.train.vectors, encoder.dim, seed), encoder.dim, "pca")
        del pixels
    if "random_init" in baselines:
        device = next(encoder.parameters()).device
        fresh = encoder.fresh(seed).to(device)
        weights = f"untrained {seed} of {encoder.sha256}"
        made = [_cached(cache, fresh, part, weights, of, batch_size) for part, of in zip(parts, prints, strict=True)]
        yield FeatureSet("random_init", *made)


def reduced(features: FeatureSet, dims: Sequence[int], seed: int = 0) -> Iterator[FeatureSet]:
    """The same features reduced by PCA, fitted on train, to each of `dims` that is below their own dimension."""
    below = [dim for dim in dims if dim < features.train.vectors.shape[1]]
    if below:
        pca = Pca.of(features.train.vectors, max(below), seed)
        for dim in below:
            yield _reduced(features, pca, dim, features.name)


def fingerprint(source: Source) -> str:
    """Hex sha256 of ids, labels and images: pixels when they are in memory, otherwise file sizes and times."""
    digest = hashlib.sha256(json.dumps([source.ids, source.classes, source.channels]).encode())
    digest.update(np.ascontiguousarray(source.labels).data)
    if source.images is not None:
        for image in source.images:
            digest.update(str(image.shape).encode())
            digest.update(np.ascontiguousarray(image).data)
    else:
        assert source.root is not None, "a source without files has its images in memory"
        root = os.fsencode(source.root)
        for name in source.ids:
            try:
                status = os.stat(os.path.join(root, unescape(name)))
            except OSError:  # listed in a manifest, not there: decoding will skip it
                digest.update(b"missing ")
            else:
                digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
    return digest.hexdigest()


def _cached(cache: Path, encoder: Encoder, source: Source, weights: str, of: str, batch_size: int) -> Embeddings:
    key = hashlib.sha256(json.dumps([weights, of, encoder.preprocessing()]).encode()).hexdigest()[:16]
    folder = cache / key
    if folder.is_dir():
        try:
            found = Embeddings.load(folder)
        except DamagedError as error:
            warn(f"{error}; embedding again")
        else:
            say(f"{source.name}: {len(found):,} feature vectors from {folder}")
            return found
    embeddings = embed(encoder, source, batch_size=batch_size, label=source.name)
    embeddings.save(folder)
    return embeddings


def _pixels(encoder: Encoder, train: Source, test: Source, batch_size: int) -> FeatureSet:
    module = Pixels(encoder.image_size, encoder.channels)
    view = plain(module.image_size)
    made = [embed(module, part, view=view, batch_size=batch_size, label="pixels") for part in (train, test)]
    centre(made[0].vectors, made[1].vectors)
    return FeatureSet("pixels", *made)


def _reduced(features: FeatureSet, pca: Pca, dim: int, name: str) -> FeatureSet:
    train, test = (replace(part, vectors=pca.apply(part.vectors, dim)) for part in (features.train, features.test))
    return FeatureSet(name, train, test)
