"""Choices of the machine are stated and can be overridden."""

import pytest
import torch

from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import available_cores, choose_device, choose_precision, fast_bfloat16, lightning_precision


def test_precision_is_as_asked_or_what_is_fast():
    for wanted in ("float32", "bfloat16", "float16"):
        assert choose_precision(wanted, "cpu").value == wanted
        assert lightning_precision(wanted)
    chosen = choose_precision("auto", "cpu")
    assert chosen.value == ("bfloat16" if fast_bfloat16() else "float32") and chosen.reason
    assert choose_precision("auto", "mps").value == "float32"
    with pytest.raises(UserError, match="bf16"):
        choose_precision("bf16", "cpu")


def test_device_and_cores():
    assert choose_device().value == ("cuda" if torch.cuda.is_available() else choose_device().value)
    assert 1 <= available_cores() <= 4096
