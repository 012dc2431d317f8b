"""Six of timm's families, one for each way to work or not; `benchmarks/families.py` tries all of them."""

import pytest

from benchmarks.families import SIDE, keep, train
from ssl_kit.core.errors import UserError
from ssl_kit.methods.dino import DINO
from ssl_kit.methods.mae import MAE
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.methods.vae import VAE


def test_a_head_with_a_layer_of_its_own_is_trained_and_kept(tmp_path):
    encoder = train(VAE, "lcnet_035", {})
    for way in ("load", "timm", "onnx"):
        keep(encoder, way, tmp_path)


def test_rotary_positions_are_masked_and_kept(tmp_path):
    args = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
    keep(train(MAE, "vit_small_patch16_dinov3", args), "timm", tmp_path)


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        (SimCLR, "efficientformer_l1", f"cannot train on views of {SIDE} x {SIDE} pixels: The size of tensor a"),
        (DINO, "test_convnext", "Kernel size can't be greater"),  # than a small crop after 32 times fewer pixels
        (MAE, "eva02_tiny_patch14_224", "are not whole patches of 14 x 14"),
        (MAE, "test_convnext", "masking patches needs one of timm's VisionTransformers"),
    ],
)
def test_what_cannot_work_is_refused_before_training(kind, name, reason):
    with pytest.raises(UserError) as refused:
        train(kind, name, {})
    assert reason in str(refused.value) and "\n" not in str(refused.value)
