"""Robustness: kNN top-1 when the test images are corrupted, 8 ways at 3 strengths, and the gallery stays clean.

After Hendrycks & Dietterich 2019 (https://arxiv.org/abs/1903.12261), with strengths that mean the same at any size:
lengths are fractions of the shorter side. Corruptions act on what the encoder sees, (B, C, h, w) in [0, 1], and are
rounded to 1/255 like the image file they stand for. Everything is a function of (seed, image, corruption, strength).

Letters: B images, C channels, (h, w) pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from ssl_kit.core.console import progress
from ssl_kit.core.errors import UserError
from ssl_kit.core.random import uniform_array
from ssl_kit.data.loader import ViewLoader
from ssl_kit.evaluation.features import Network
from ssl_kit.evaluation.health import sample_rows
from ssl_kit.evaluation.neighbours import knn_predict
from ssl_kit.evaluation.result import Result, intervals, labelled, versions
from ssl_kit.views.recipe import plain

if TYPE_CHECKING:
    from ssl_kit.data.sources import Source
    from ssl_kit.embeddings.embeddings import Embeddings

STRENGTHS = (1, 2, 3)
_BATCH = 250
_STREAM = 100_030  # of core/random.py

_SIGMA = (0.04, 0.08, 0.16)  # of the noise, in [0, 1]
_BLUR = (0.01, 0.02, 0.04)  # sigma as a fraction of the shorter side
_BRIGHTER = (0.1, 0.2, 0.3)  # added
_CONTRAST = (0.75, 0.5, 0.25)  # factor on the distance to the image's mean
_QUALITY = (60, 30, 15)  # of the JPEG
_PIXELS = (0.6, 0.4, 0.25)  # of the side that pixelation keeps
_ANGLE = (5.0, 15.0, 30.0)  # degrees, to one side or the other
_CROP = (0.9, 0.75, 0.6)  # side of the crop, anywhere in the image


def robustness(
    train: Embeddings,
    source: Source,
    network: Network,
    *,
    count: int = 2_000,
    k: int = 20,
    temperature: float | None = 0.07,
    seed: int = 0,
    features: str = "encoder",
    device: torch.device | str = "cpu",
) -> Result:
    """Top-1 of the kNN vote on corrupted test images, with 95 % intervals over images.

    Metrics: `top1`, the mean over all corruptions and strengths; `clean`, of the same images untouched; one of each
    corruption, the mean over its strengths, and `NAME_1` to `NAME_3` of each strength.

    Args:
        train: the gallery, clean; rows without a label are left out.
        source: test images with labels; those that cannot be decoded are left out.
        network: what made `train`.
        count: test images used at most, drawn by the seed.
        k: neighbours; not chosen, so that nothing is.
        temperature: T of exp(cos / T).
        seed: of the sample, the corruptions and the bootstrap.
        features: what the network is, for the record.
        device: that searches.
    """
    started = time.perf_counter()
    gallery, labels = labelled(train, "train")
    rows = sample_rows(np.flatnonzero(source.labels() >= 0), count, seed)
    if not len(rows):
        raise UserError(f"{source.name} has no labels; give class folders or a `label` column")
    found: dict[tuple[str, int], list[np.ndarray]] = {}  # features of each batch
    wanted: list[np.ndarray] = []
    plan = np.array_split(rows, -(-len(rows) // _BATCH))
    names = [name for name in CORRUPTIONS if name != "jpeg" or network.channels in (1, 3)]
    conditions = [("clean", 0), *((name, strength) for name in names for strength in STRENGTHS)]
    with progress(len(rows) * len(conditions), f"corruptions, {features}") as bar:
        for batch in ViewLoader(source, plan, (plain(network.image_size),), seed=seed):
            images, index = batch["views"][0], batch["key"].index.numpy()
            wanted.append(batch["label"].numpy())
            for name, strength in conditions:
                seen = corrupt(images, name, strength, seed=seed, index=index) if strength else images
                found.setdefault((name, strength), []).append(network(seen))
                bar.advance(bar.task_ids[0], len(index))
    predict = partial(knn_predict, gallery, labels, k=k, temperature=temperature, device=device)
    correct = {
        condition: (predict(np.concatenate(parts)) == np.concatenate(wanted)).astype(np.float64)
        for condition, parts in found.items()
    }
    settings = {"k": k, "temperature": temperature, "num_train": len(gallery), "num_test": len(correct["clean", 0])}
    settings |= {"dim": gallery.shape[1], "strengths": len(STRENGTHS), "seed": seed}
    made = {"encoder_sha256": network.sha256, "train": train.info.get("source"), "test": source.name}
    made["versions"] = versions()
    metrics = _metrics(correct, names, seed)
    return Result("robustness", features, metrics, settings, made, time.perf_counter() - started)


def _metrics(correct: dict[tuple[str, int], np.ndarray], names: list[str], seed: int) -> dict[str, float]:
    every = np.array([correct[name, strength] for name in names for strength in STRENGTHS])
    values = {"top1": every.mean(axis=0), "clean": correct["clean", 0]}
    values |= {name: np.mean([correct[name, strength] for strength in STRENGTHS], axis=0) for name in names}
    values |= {f"{name}_{strength}": correct[name, strength] for name in names for strength in STRENGTHS}
    return intervals(values, seed)


def corrupt(images: Tensor, name: str, strength: int, *, seed: int = 0, index: np.ndarray) -> Tensor:
    """One corruption of images (B, C, h, w) float in [0, 1], of the same shape, rounded to 1/255.

    Args:
        images: left as they are.
        name: of `CORRUPTIONS`.
        strength: 1, 2 or 3.
        seed: with `index` it determines all random numbers.
        index: (B,) position of each image in its source.
    """
    if name not in CORRUPTIONS or strength not in STRENGTHS:
        raise UserError(f"corruption {name}, strength {strength}: wanted {', '.join(CORRUPTIONS)}; 1 to 3")
    changed = CORRUPTIONS[name](images, strength - 1, seed, np.asarray(index))
    return (changed.clamp(0, 1) * 255).round() / 255


def _noise(images: Tensor, level: int, seed: int, index: np.ndarray) -> Tensor:
    """Gaussian, independent for every pixel and channel."""
    noise = [
        np.random.default_rng((seed, _STREAM, level, row)).standard_normal(images.shape[1:], dtype=np.float32)
        for row in index.tolist()
    ]
    return images + _SIGMA[level] * torch.from_numpy(np.stack(noise))


def _blur(images: Tensor, level: int, seed: int, index: np.ndarray) -> Tensor:
    sigma = _BLUR[level] * min(images.shape[2:])
    size = min(2 * math.ceil(3 * sigma) + 1, 2 * min(images.shape[2:]) - 1)  # the border is reflected once
    return gaussian_blur(images, [size, size], [sigma, sigma])


def _brightness(images: Tensor, level: int, seed: int, index: np.ndarray) -> Tensor:
    return images + _BRIGHTER[level]


def _contrast(images: Tensor, level: int, seed: int, index: np.ndarray) -> Tensor:
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + _CONTRAST[level] * (images - mean)


def _jpeg(images: Tensor, level: int, seed: int, index: np.ndarray) -> Tensor:
    space = "RGB" if images.shape[1] == 3 else "GRAY"
    stored = np.ascontiguousarray((images * 255).round().byte().permute(0, 2, 3, 1).numpy())
    decoded = [
        simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(one, quality=_QUALITY[level], colorspace=space), space)
        for one in stored
    ]
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255


def _pixelate(images: Tensor, level: int, seed: int, index: np.ndarray) -> Tensor:
    small = [max(1, round(side * _PIXELS[level])) for side in images.shape[2:]]
    return F.interpolate(F.interpolate(images, small, mode="area"), images.shape[2:], mode="nearest-exact")


def _rotation(images: Tensor, level: int, seed: int, index: np.ndarray) -> Tensor:
    """Left or right, by a draw per image; beyond the border the image is mirrored."""
    left = uniform_array(seed, level, index, _STREAM + 1, 1)[:, 0] < 0.5
    angle = torch.from_numpy(np.where(left, 1.0, -1.0).astype(np.float32)) * math.radians(_ANGLE[level])
    height, width = images.shape[2:]
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(len(angle))
    # grid_sample's coordinates are in [-1, 1] along both sides: a turn in pixels is not one in them
    rows = (torch.stack((cos, -sin * height / width, zero), 1), torch.stack((sin * width / height, cos, zero), 1))
    return _warped(images, torch.stack(rows, 1))


def _crop(images: Tensor, level: int, seed: int, index: np.ndarray) -> Tensor:
    """A box of the same shape at a place drawn per image, enlarged back."""
    side = _CROP[level]
    place = torch.from_numpy(uniform_array(seed, level, index, _STREAM + 2, 2)) * 2 - 1  # in [-1, 1)
    affine = torch.zeros(len(images), 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = side
    affine[:, :, 2] = place * (1 - side)
    return _warped(images, affine)


def _warped(images: Tensor, affine: Tensor) -> Tensor:
    """Bilinear; `affine` (B, 2, 3) takes coordinates of the result to those of the image."""
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


CORRUPTIONS: dict[str, Callable[[Tensor, int, int, np.ndarray], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "jpeg": _jpeg,
    "pixelate": _pixelate,
    "rotation": _rotation,
    "crop": _crop,
}
