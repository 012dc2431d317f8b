"""A reader of one's own: `--reader hounsfield:read --allow hounsfield`. CT slices as Hounsfield units, in floats."""

import io

import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut


def read(data: bytes, name: str) -> np.ndarray:
    """(H, W) float32: what the scanner measured, whatever window it was saved for. `name` is the image's id."""
    scan = pydicom.dcmread(io.BytesIO(data))
    return np.asarray(apply_modality_lut(scan.pixel_array, scan), np.float32)
