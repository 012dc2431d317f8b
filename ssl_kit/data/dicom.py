"""DICOM by pydicom (extra `science`): slope, intercept, window, MONOCHROME1."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from ssl_kit.core.reading import Reading
from ssl_kit.data.limits import UNREADABLE, BadImageError, check_cost, short
from ssl_kit.data.samples import Samples, depth, inverted

if TYPE_CHECKING:
    from pydicom import Dataset


def is_mine(data: bytes) -> bool:
    """Whether a file is DICOM with its preamble."""
    return data[128:132] == b"DICM"


def size(data: bytes) -> tuple[int, int]:
    """(height, width).

    Raises:
        BadImageError: see `read`.
    """
    told = _header(data)
    return int(told.Rows), int(told.Columns)


def read(data: bytes, reading: Reading) -> Samples:
    """The first frame: values after slope and intercept; its full range is the window, where the file has one.

    Raises:
        BadImageError: damaged, too large, without pixels, or pydicom is missing.
    """
    told = _header(data)
    try:
        from pydicom.pixels import apply_color_lut, pixel_array

        values = pixel_array(told, index=0)
        if told.PhotometricInterpretation == "PALETTE COLOR":
            values = apply_color_lut(values, told)
        note = "the first of several frames is read" if int(told.get("NumberOfFrames", 1) or 1) > 1 else ""
        if values.ndim == 3:
            return Samples(values, 8 * values.dtype.itemsize, 3, note=note, what="DICOM")
        values, bits, full = _rescaled(told, values[:, :, None])
    except UNREADABLE as error:
        raise BadImageError(f"DICOM: {short(error)}") from error
    return Samples(values, bits, 1, full=full, note=note, what="DICOM")


def _header(data: bytes) -> Dataset:
    try:
        import pydicom
        from pydicom.errors import BytesLengthException, InvalidDicomError
    except ImportError as error:
        raise BadImageError("DICOM is read by pydicom, which is missing: pip install 'ssl-kit[science]'") from error
    try:
        told = pydicom.dcmread(io.BytesIO(data))
        held = 12 * int(told.get("SamplesPerPixel", 1)) * max(1, int(told.get("NumberOfFrames", 1) or 1))
        check_cost("DICOM", int(told.Columns), int(told.Rows), held, data)
    except BadImageError:
        raise
    except (InvalidDicomError, BytesLengthException, *UNREADABLE) as error:
        raise BadImageError(f"DICOM: {short(error)}") from error
    return told


def _rescaled(told: Dataset, values: np.ndarray) -> tuple[np.ndarray, int, tuple[float, float]]:
    """Values, bits and full range after slope, intercept and window (DICOM PS3.3, C.11.1 and C.11.2.1.2)."""
    bits = int(told.get("BitsStored", 8 * values.dtype.itemsize))
    slope, intercept = float(told.get("RescaleSlope", 1) or 1), float(told.get("RescaleIntercept", 0) or 0)
    low, high = (end * slope + intercept for end in depth(values.dtype, bits))
    full = min(low, high), max(low, high)
    if (window := _window(told)) is not None:
        full = window
    if told.PhotometricInterpretation == "MONOCHROME1":  # the mirror of all values, and of the range with them
        values, full = inverted(values, bits), (low + high - full[1], low + high - full[0])
    if (slope, intercept) != (1, 0):
        whole = slope.is_integer() and intercept.is_integer()
        values = (values * slope + intercept).astype(np.int32 if whole else np.float32)
    return values, bits, full


def _window(told: Dataset) -> tuple[float, float] | None:
    """The ends of the first window."""
    centre, width = (np.atleast_1d(np.array(told.get(name, []), float)) for name in ("WindowCenter", "WindowWidth"))
    if not len(centre) or not len(width) or width[0] <= 1:
        return None
    half = (width[0] - 1) / 2
    return float(centre[0] - 0.5 - half), float(centre[0] - 0.5 + half)
