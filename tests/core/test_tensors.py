"""Tensors of strangers: headers are judged before anything is read, weights before they are set."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from ssl_kit.core.errors import DamagedError
from ssl_kit.core.tensors import check_finite, check_weights, count_values, read_tensors, tensor_shapes

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.ones(4, dtype=torch.bfloat16)}


def file(tmp_path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype, shape, *offsets):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_shapes_come_from_the_header(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    shapes = tensor_shapes(tmp_path / "x.safetensors")
    assert {name: (shape.dtype, shape.size) for name, shape in shapes.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()
    }
    assert count_values(shapes) == 11
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in read_tensors(tmp_path / "x.safetensors").items())


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({}, b"", 2**63),
        ({}, b"", 3),
        ([], b"", None),
        (b"{" + b" " * (8 * 2**20) + b"}", b"", None),
        ({"a": entry("F8_E8M0", [4], 0, 4)}, bytes(4), None),
        ({"a": entry("F32", [-1], 0, 4)}, bytes(4), None),
        ({"a": entry("F32", [True], 0, 4)}, bytes(4), None),
        ({"a": entry("F32", [1.0], 0, 4)}, bytes(4), None),
        ({"a": entry("F32", [2**50], 0, 4)}, bytes(4), None),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12), None),
        ({"a": entry("F32", [1], 0, 4)}, bytes(99), None),
        ({"a": entry("F32", [1000], 0, 4000)}, bytes(4), None),
        ({"a": 5}, b"", None),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, data, length):
    with pytest.raises(DamagedError, match=r"x\.safetensors"):
        read_tensors(file(tmp_path, header, data, length))


@pytest.mark.parametrize(
    "entries", [entry("F8_E8M0", [4]), *(entry("F32", [n]) for n in (-1, True, 1.0, 2**50, "1")), 5]
)
def test_a_header_alone_tells(tmp_path, entries):
    with pytest.raises(DamagedError, match="'a' has type"):
        tensor_shapes(file(tmp_path, {"a": entries}, bytes(4)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_value_that_is_none_is_found(dtype):
    good = {"w": torch.randn(1_000).to(dtype), "count": torch.tensor([5]), "empty": torch.zeros(0)}
    check_finite(good | {"large": torch.full((1_000,), torch.finfo(dtype).max, dtype=dtype)}, "x")  # their sum is not
    for value in (float("nan"), float("inf"), float("-inf")):
        bad = good["w"].clone()
        bad[700] = value
        with pytest.raises(DamagedError, match="'w' holds NaN or infinite"):
            check_finite({**good, "w": bad}, "x")


def test_weights_must_be_those_of_the_model():
    own = torch.nn.BatchNorm1d(4).state_dict()
    check_weights(dict(own), own, "x")
    wrong = {
        "other type": {**own, "num_batches_tracked": torch.tensor(0.0)},
        "whole numbers": {**own, "weight": torch.ones(4, dtype=torch.int64)},
        "other shape": {**own, "weight": torch.ones(1, 4)},
        "left out": {name: value for name, value in own.items() if name != "bias"},
        "too many": {**own, "more": torch.zeros(1)},
        "no tensor": {**own, "weight": [1.0] * 4},
        "NaN": {**own, "weight": torch.full((4,), float("nan"))},
        "nothing": None,
    }
    for found in wrong.values():
        with pytest.raises(DamagedError):
            check_weights(found, own, "x")
