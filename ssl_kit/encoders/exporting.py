"""Encoders for programs without ssl_kit: an ONNX file, and what proves that it gives the same features.

Letters: B images, (H, W) stored size, C channels, (h, w) the encoder's size, D features.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_kit.core.errors import UserError
from ssl_kit.core.process import prepare
from ssl_kit.core.reading import Range
from ssl_kit.encoders.encoder import Encoder

IMAGES, PIXELS, FEATURES = "images", "pixels", "features"  # names of inputs and of the output


def _range(encoder: Encoder) -> Range:
    """The values of images that are 0 and 1: those of the kind that the encoder was trained on."""
    return next(iter(encoder.reading.ranges.values()), ((0.0, 255.0),))


def stored_values(pixels: np.ndarray, encoder: Encoder) -> np.ndarray:
    """What `FromPixels` takes for pixels (B, H, W, C) as they are read: uint8, or float32 values in the range."""
    if not encoder.reading.ranges:
        return pixels
    low, high = np.array(_range(encoder)).T
    return (low + pixels / np.iinfo(pixels.dtype).max * (high - low)).astype(np.float32)


class FromPixels(nn.Module):
    """An encoder with its preprocessing: the largest centred box of the encoder's shape, resized with antialiasing.

    Resizing is linear, so it is a product with one matrix of triangular weights for the rows and one for the columns;
    they are computed from the size of the input, which may be any.
    """

    low: Tensor
    high: Tensor

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        low, high = torch.tensor(_range(encoder)).T
        self.register_buffer("low", low)  # (C,) or (1,)
        self.register_buffer("high", high)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, H, W, C) uint8, or values as stored where the encoder knows their range, to (B, D)."""
        height, width = (torch.scalar_tensor(pixels.shape[axis], dtype=torch.float32) for axis in (1, 2))
        aspect = self.encoder.image_size[1] / self.encoder.image_size[0]
        kept = torch.minimum(height, width / aspect)
        rows = _resizing(pixels.shape[1], torch.round(kept), height, self.encoder.image_size[0])
        columns = _resizing(pixels.shape[2], torch.round(kept * aspect), width, self.encoder.image_size[1])
        images = torch.clamp((pixels.float() - self.low) / (self.high - self.low), 0, 1).permute(0, 3, 1, 2)
        return self.encoder(rows @ images @ columns.T)


def _resizing(length: int, kept: Tensor, whole: Tensor, size: int) -> Tensor:
    """(size, length): the weights of `length` pixels in each of `size`, which cover the central `kept` of them."""
    kept = torch.minimum(torch.clamp(kept, min=1), whole)
    start = torch.floor((whole - kept) / 2)
    scale = kept / size
    centres = start + (torch.arange(size) + 0.5) * scale
    places = torch.arange(length) + 0.5
    weights = 1 - (places[None, :] - centres[:, None]).abs() / torch.clamp(scale, min=1)
    inside = (places > start) & (places < start + kept)
    weights = torch.relu(weights) * inside[None, :]
    return weights / weights.sum(dim=1, keepdim=True)


def write_onnx(encoder: Encoder, path: Path, *, from_pixels: bool = False) -> None:
    """Writes an encoder as one ONNX file with any number of images per call.

    Args:
        encoder: on the CPU, in evaluation mode.
        path: of the file.
        from_pixels: take `pixels` (B, H, W, C) of any size, uint8 or as stored, not `images` (B, C, h, w) in [0, 1].

    Raises:
        UserError: the `onnx` extra is missing, or the model cannot be exported.
    """
    prepare()
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs the package {error.name}: pip install 'ssl-kit[onnx]'") from error
    height, width = encoder.image_size
    dynamic = torch.export.Dim.DYNAMIC
    example: Tensor
    if from_pixels:
        model: nn.Module = FromPixels(encoder).eval()
        example = torch.zeros(2, height + 3, width + 5, encoder.channels)  # no size like another
        example = example if encoder.reading.ranges else example.to(torch.uint8)
        shapes: dict[str, Any] = {PIXELS: {0: dynamic, 1: dynamic, 2: dynamic}}
    else:
        model, example, shapes = encoder, torch.zeros(2, encoder.channels, height, width), {IMAGES: {0: dynamic}}
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (example,),
                path,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=[PIXELS if from_pixels else IMAGES],
                output_names=[FEATURES],
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"torch cannot export {encoder.name} to ONNX: {line}; --format timm works") from error
    finally:
        exporter.setLevel(level)


def run_onnx(path: Path, *batches: np.ndarray) -> np.ndarray:
    """(B, D) float32: what ONNX Runtime makes of batches of the file's one input, together."""
    prepare()  # or it would write an id of this machine to the disk, and tell its maker of each model
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("checking an ONNX file needs onnxruntime: pip install 'ssl-kit[onnx]'") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: batch})[0] for batch in batches])
