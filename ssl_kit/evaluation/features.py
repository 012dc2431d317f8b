"""The features that are scored side by side: the encoder's and its baselines', each image embedded once.

Features of networks are kept in RUN/features/KEY, an embeddings folder each; KEY names the weights, the images, their
labels and the preprocessing, so an entry is reused exactly when nothing that made it has changed.

A score stands beside those of raw pixels, PCA of the pixels (or of any features) and the untrained network. Pixels and
the untrained network are encoders like any other, so one `embed` serves all; PCA works on arrays.
Letters: N rows, D dimensions, R kept dimensions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ssl_kit.core.console import progress, say, warn
from ssl_kit.core.files import DamagedError
from ssl_kit.core.named import BASELINES
from ssl_kit.data.labels import spread
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.sources import Source, pixels
from ssl_kit.embeddings.embeddings import Embeddings, chosen_precision, embed, forward
from ssl_kit.embeddings.exact import to_device
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.wrapped import Wrapped, settled
from ssl_kit.evaluation.patches import Patches
from ssl_kit.views.recipe import View, plain

_BATCH = 256


@dataclass
class Network:
    """What made features, to make more of them from other views: (B, C, h, w) in [0, 1] to (B, D).

    Attributes:
        module: an `Encoder`, `Wrapped`, `Pixels` or `Patches`, in eval mode, on any device.
        layers: last stages or blocks that are concatenated.
    """

    module: Encoder | Wrapped | Pixels | Patches
    layers: int = 1

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of its input."""
        return self.module.image_size

    @property
    def channels(self) -> int:
        """Of its input."""
        return self.module.channels

    @property
    def sha256(self) -> str | None:
        """Of the weights, where there are some on disk."""
        return self.module.sha256

    def __call__(self, images: Tensor) -> np.ndarray:
        """(B, D) float32 on the host, in the precision that `embed` chooses."""
        return forward(self.module, images, self.layers, chosen_precision("auto", self.module))


@dataclass
class FeatureSet:
    """One kind of features of the same train and test images.

    Attributes:
        name: what a Result calls them.
        network: what made them, where it was one; PCA has none.
    """

    name: str
    train: Embeddings
    test: Embeddings
    network: Network | None = None


def view_features(
    network: Network, source: Source, views: Sequence[View], rows: np.ndarray, seed: int = 0
) -> list[np.ndarray]:
    """Features (M, D) per view of the same images; row i of each is of image i of those that could be decoded.

    Args:
        network: in eval mode.
        source: the images; their position is the key of their views.
        views: at most 10, drawn independently.
        rows: positions in the source.
        seed: of the views.
    """
    found: list[list[np.ndarray]] = [[] for _ in views]
    plan = np.array_split(rows, -(-len(rows) // _BATCH))
    with progress(len(rows), f"views of {source.name}") as bar:
        for batch in ViewLoader(source, plan, views, seed=seed):
            for images, parts in zip(batch["views"], found, strict=True):
                parts.append(network(images))
            bar.advance(bar.task_ids[0], len(batch["label"]))
    return [np.concatenate(parts) for parts in found]


def feature_sets(
    encoder: Encoder | Wrapped,
    train: Source,
    test: Source,
    cache: Path,
    *,
    baselines: Sequence[str] = BASELINES,
    pretrained: Mapping[str, Encoder] | None = None,
    layers: int = 1,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Iterator[FeatureSet]:
    """The encoder's features first, then the baselines'; one kind is in memory at a time.

    Args:
        encoder: loaded from a folder, so that it knows its sha256; or anybody's module, whose features are not kept.
        train: labelled images.
        test: labelled images.
        cache: RUN/features.
        baselines: among `ASKED`. PCA is of the pixels, fitted on train, at the encoder's dimension.
        pretrained: further encoders to compare with, in eval mode, by the name of their features.
        layers: last stages or blocks of the network, and of the untrained one, that are concatenated.
        seed: of the untrained network and of PCA.
        batch_size: images per forward pass.
        device: of PCA; networks compute where their weights are.
    """
    parts = (train, test)
    prints = [fingerprint(part) for part in parts]
    cached = lambda network, weights: [
        _cached(cache, network, part, weights, of, batch_size) for part, of in zip(parts, prints, strict=True)
    ]
    trained = Network(encoder, layers)
    made = cached(trained, str(encoder.sha256))
    dim = made[0].vectors.shape[1]
    yield FeatureSet("encoder", made[0], made[1], trained)
    del made
    if "pixels" in baselines or "pca" in baselines:
        pixels = _pixels(encoder, train, test, batch_size)
        if "pixels" in baselines:
            yield pixels
        if "pca" in baselines:
            yield _reduced(pixels, Pca.of(pixels.train.vectors, dim, seed, device), dim, "pca")
        del pixels
    if "patches" in baselines:
        yield _of_patches(train, test, seed, device, batch_size)
    untrained = encoder.fresh(seed) if "random_init" in baselines else None
    if untrained is not None:
        device = next((weight.device for weight in encoder.parameters()), torch.device("cpu"))
        fresh = Network(untrained.to(device), layers)
        with settled(untrained, lambda: few_views(train, untrained.image_size)):
            made = cached(fresh, f"untrained {seed}, settled, of {encoder.sha256}")
            yield FeatureSet("random_init", made[0], made[1], fresh)
        del made, fresh, untrained
    for name, other in (pretrained or {}).items():
        network = Network(other)
        made = cached(network, f"{other.sha256} {other.name} {json.dumps(other.args, sort_keys=True)}")
        yield FeatureSet(name, made[0], made[1], network)
        del made


def few_views(source: Source, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) in [0, 1]: up to 256 whole images from all over the source."""
    some = source.subset(spread(len(source), _BATCH))
    return next(iter(ViewLoader(some, [np.arange(len(some))], (plain(size),))))["views"][0]


def pretrained_names(given: Sequence[str]) -> list[str]:
    """What a Result calls the features of pretrained models: `pretrained:NAME`.

    NAME is timm's, or that of the run or folder; all of what was typed where two would be called the same.
    """
    short = [_short(one) for one in given]
    return [f"pretrained:{one if short.count(one) == 1 else whole}" for one, whole in zip(short, given, strict=True)]


def _short(given: str) -> str:
    if given.startswith("timm:"):
        return given.removeprefix("timm:")
    folder = Path(given).resolve()
    return folder.parent.name if folder.name == "encoder" else folder.name


def reduced(
    features: FeatureSet, dims: Sequence[int], seed: int = 0, device: torch.device | str = "cpu"
) -> Iterator[FeatureSet]:
    """The same features reduced by PCA, fitted on train, to each of `dims` that is below their own dimension."""
    below = [dim for dim in dims if dim < features.train.vectors.shape[1]]
    if below:
        pca = Pca.of(features.train.vectors, max(below), seed, device)
        for dim in below:
            yield _reduced(features, pca, dim, features.name)


def fingerprint(source: Source) -> str:
    """Hex sha256 of ids, labels and images: pixels when they are in memory, otherwise file sizes and times."""
    digest = hashlib.sha256(
        json.dumps([source.ids(), source.classes, source.channels, source.reading.to_json()]).encode()
    )
    digest.update(source.labels().data)
    if source.in_memory:
        for image in (pixels(source, row) for row in range(len(source))):
            digest.update(str(image.shape).encode())
            digest.update(np.ascontiguousarray(image).data)
    else:
        for stamp in source.stamps():
            digest.update(f"{stamp} ".encode())
    return digest.hexdigest()


def _cached(cache: Path, network: Network, source: Source, weights: str, of: str, batch_size: int) -> Embeddings:
    encoder = network.module
    if not isinstance(encoder, Encoder):  # its weights alone do not say what it computes
        view = plain(encoder.image_size)
        return embed(encoder, source, view=view, batch_size=batch_size, label=source.name)
    made_of: list[object] = [weights, of, encoder.preprocessing()]
    if network.layers != 1:
        made_of.append(network.layers)
    folder = cache / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    if folder.is_dir():
        try:
            found = Embeddings.load(folder)
        except DamagedError as error:
            warn(f"{error}; embedding again")
        else:
            say(f"{source.name}: {len(found):,} feature vectors from {folder}")
            place = {name: row for row, name in enumerate(source.ids())}
            return replace(found, groups=source.groups(np.array([place[name] for name in found.ids], np.int64)))
    embeddings = embed(encoder, source, layers=network.layers, batch_size=batch_size, label=source.name)
    embeddings.save(folder)
    return embeddings


def _pixels(encoder: Encoder | Wrapped, train: Source, test: Source, batch_size: int) -> FeatureSet:
    module = Pixels(encoder.image_size, encoder.channels)
    view = plain(module.image_size)
    made = [embed(module, part, view=view, batch_size=batch_size, label="pixels") for part in (train, test)]
    mean = centre(made[0].vectors, made[1].vectors)
    module.mean = torch.from_numpy(mean)  # from now on it gives centred pixels too
    return FeatureSet("pixels", made[0], made[1], Network(module))


def _of_patches(train: Source, test: Source, seed: int, device: torch.device | str, batch_size: int) -> FeatureSet:
    module = Patches.of(train, seed, device).to(device)
    view = plain(module.image_size)
    made = [embed(module, part, view=view, batch_size=batch_size, label="patches") for part in (train, test)]
    return FeatureSet("patches", made[0], made[1], Network(module))


def _reduced(features: FeatureSet, pca: Pca, dim: int, name: str) -> FeatureSet:
    train, test = (replace(part, vectors=pca.apply(part.vectors, dim)) for part in (features.train, features.test))
    return FeatureSet(name, train, test)


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
        device: that multiplies.
    """

    mean: np.ndarray
    directions: np.ndarray
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, features: np.ndarray, dim: int, seed: int = 0, device: torch.device | str = "cpu") -> Pca:
        """The first min(dim, D, N) directions of features (N, D).

        Subspace iteration on the covariance (Halko et al. 2011, https://arxiv.org/abs/0909.4061, algorithm 4.4 and
        5.3): the data are read once, where a randomised SVD of the data reads them at every iteration.
        """
        count, columns = features.shape
        dim = min(dim, columns, count)
        mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
        covariance, centre = torch.zeros(columns, columns, dtype=torch.float64, device=device), to_device(mean, device)
        for start in range(0, count, _BLOCK):
            rows = to_device(features[start : start + _BLOCK], device) - centre
            covariance += rows.T @ rows  # float32 products, float64 sums
        if columns <= 2 * (dim + _OVERSAMPLING):
            directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :dim].float()
            return cls(mean, directions.cpu().numpy(), device)
        total = covariance.diagonal().sum().clamp_min(torch.finfo(torch.float64).tiny)  # of images all alike it is 0
        covariance = (covariance / total).float()
        generator = torch.Generator().manual_seed(seed)
        basis = torch.randn(columns, dim + _OVERSAMPLING, generator=generator).to(device)  # the same on every device
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(covariance @ basis).Q
        rotation = torch.linalg.eigh(basis.T @ covariance @ basis).eigenvectors.flip(1)[:, :dim]
        return cls(mean, (basis @ rotation).cpu().numpy(), device)

    def apply(self, features: np.ndarray, dim: int | None = None) -> np.ndarray:
        """(N, D) to (N, min(dim, R)) float32."""
        mean, directions = (to_device(part, self.device) for part in (self.mean, self.directions[:, :dim]))
        reduced = np.empty((len(features), directions.shape[1]), dtype=np.float32)
        for start in range(0, len(features), _BLOCK):
            rows = slice(start, start + _BLOCK)
            reduced[rows] = ((to_device(features[rows], self.device) - mean) @ directions).cpu().numpy()
        return reduced


@dataclass
class Scaling:
    """Zero mean and unit variance for each feature of the training set.

    Attributes:
        mean: (D,) float32.
        scale: (D,) float32, 1 / standard deviation; 0 for constant features, so that they have no say.
    """

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Scaling:
        """The scaling of features (N, D)."""
        mean = features.mean(axis=0, dtype=np.float64)
        squares = np.zeros_like(mean)
        for start in range(0, len(features), _BLOCK):
            squares += np.square(features[start : start + _BLOCK] - mean).sum(axis=0)
        deviation = np.sqrt(squares / len(features))
        varies = deviation > 1e-6 * np.abs(mean)  # below: the rounding of a constant
        scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0)
        return cls(mean.astype(np.float32), scale.astype(np.float32))

    def apply(self, features: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """(N, D) float32 on a device, a copy."""
        mean, scale = (to_device(part, device) for part in (self.mean, self.scale))
        scaled = torch.empty(features.shape, dtype=torch.float32, device=device)
        for start in range(0, len(features), _BLOCK):
            rows = slice(start, start + _BLOCK)
            torch.sub(to_device(features[rows], device), mean, out=scaled[rows]).mul_(scale)
        return scaled


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
