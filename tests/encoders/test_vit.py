"""Tokens of kept patches against timm's own forward pass; patches and positions against MAE's published values."""

import math

import pytest
import torch

from ssl_kit.core.errors import UserError
from ssl_kit.encoders import Encoder
from ssl_kit.encoders.vit import (
    checkpoint_activations,
    patchify,
    sincos_positions,
    take,
    tokens,
    unfuse_attention,
    unpatchify,
)

SMALL = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
VIT = "vit_tiny_patch16_224"
CASES = {  # name, arguments, size, channels
    "class token": (VIT, {**SMALL}, (16, 24), 3),
    "mean": (VIT, {**SMALL, "class_token": False, "global_pool": "avg", "fc_norm": False}, (24, 16), 1),
    "registers": (VIT, {**SMALL, "reg_tokens": 2, "no_embed_class": True, "pre_norm": True}, (16, 16), 4),
    "rotary and learned": ("eva02_tiny_patch14_224", {**SMALL, "use_fc_norm": False}, (16, 24), 3),
    "rotary alone": ("vit_small_patch16_dinov3", {**SMALL}, (24, 16), 3),
    "rotary, by block": ("vit_small_patch16_rope_mixed_224", {**SMALL}, (16, 16), 1),
    "another size": ("vit_small_patch16_dinov3", {**SMALL, "dynamic_img_size": True}, (16, 24), 3),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def encoder(request):
    name, args, size, channels = request.param
    torch.manual_seed(0)
    encoder = Encoder(name, args, size, channels, (0.4,), (0.2,)).eval()
    with torch.no_grad():  # timm starts special tokens at almost 0: here they must matter
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return encoder


def pictures(encoder, count=3):
    return torch.rand(count, encoder.channels, *encoder.image_size, generator=torch.Generator().manual_seed(1))


def shuffled(encoder, count=3):
    patches = encoder.model.patch_embed.num_patches
    return torch.stack([torch.randperm(patches, generator=torch.Generator().manual_seed(row)) for row in range(count)])


def test_all_patches_are_timms_own_forward_pass(encoder):
    images, order = pictures(encoder), shuffled(encoder)
    wanted = encoder.model.forward_features(encoder.normalise(images))
    assert torch.equal(tokens(encoder, images), wanted)
    special = encoder.model.num_prefix_tokens
    seen = tokens(encoder, images, order)  # masking nothing, in any order
    assert seen.shape == wanted.shape
    expected = torch.cat([wanted[:, :special], take(wanted[:, special:], order)], dim=1)
    assert (seen - expected).abs().max() <= 2e-6
    encoder.double()
    whole = tokens(encoder, images.double())
    expected = torch.cat([whole[:, :special], take(whole[:, special:], order)], dim=1)
    assert (tokens(encoder, images.double(), order) - expected).abs().max() <= 1e-12


def test_removed_pixels_have_no_influence(encoder):
    images, keep = pictures(encoder), shuffled(encoder)[:, :5]
    patches = patchify(images, (4, 4))
    noise = torch.rand(patches.shape)
    other = noise.scatter(1, keep[:, :, None].expand(-1, -1, noise.shape[2]), take(patches, keep))
    changed = unpatchify(other, (4, 4), encoder.model.patch_embed.grid_size)
    assert not torch.equal(changed, images)
    assert torch.equal(tokens(encoder, changed, keep), tokens(encoder, images, keep))
    assert not torch.equal(tokens(encoder, changed), tokens(encoder, images))


@pytest.mark.parametrize("shown", [None, 4])
def test_activations_that_are_not_kept_change_no_gradient(encoder, shown):
    images = pictures(encoder, 2)
    keep = None if shown is None else torch.arange(shown).expand(2, -1)
    gradients, kept = [], []
    for _ in range(2):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved: (sizes.append(saved.nbytes), saved)[1], lambda s: s
        ):
            loss = tokens(encoder.train(), images, keep).square().sum()
        encoder.zero_grad()
        loss.backward()
        gradients.append([weight.grad.clone() for weight in encoder.parameters() if weight.grad is not None])
        kept.append(sum(sizes))
        checkpoint_activations(encoder)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True)) and kept[1] < 0.5 * kept[0]


def test_batch_statistics_are_not_to_be_counted_twice():
    with pytest.raises(UserError, match="resnet18_small has batch statistics"):
        checkpoint_activations(Encoder("resnet18_small", {"channels": [4, 4, 4, 4]}, (16, 16)))


def test_unfused_attention_is_the_same(encoder):
    images, keep = pictures(encoder), shuffled(encoder)[:, :5]
    wanted = tokens(encoder, images, keep)
    assert unfuse_attention(encoder) == 2
    assert not any(block.attn.fused_attn for block in encoder.model.blocks)
    torch.testing.assert_close(tokens(encoder, images, keep), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "args", "size", "message"),
    [
        ("resnet18_small", {"channels": [8, 8, 8, 8]}, (16, 16), "resnet18_small is a SmallResNet; masking"),
        ("vit_tiny_r_s16_p8_224", {"depth": 1}, (32, 32), "HybridEmbed, which mixes"),
        ("eva02_tiny_patch14_224", {**SMALL, "patch_drop_rate": 0.5}, (16, 16), "leave patch_drop_rate out"),
        ("vit_tiny_patch16_224", SMALL, (18, 16), "18 x 16 pixels are not whole patches of 4 x 4"),
    ],
)
def test_what_cannot_be_masked_is_refused_by_name(name, args, size, message):
    with pytest.raises(UserError, match=message):
        tokens(Encoder(name, args, size), torch.rand(1, 3, *size))


@pytest.mark.parametrize(
    ("channels", "size", "patch"), [(3, (8, 12), (4, 4)), (1, (6, 4), (3, 2)), (5, (7, 7), (7, 1))]
)
def test_patches_and_back_is_bit_exact(channels, size, patch):
    images = torch.rand(2, channels, *size)
    patches = patchify(images, patch)
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    assert patches.shape == (2, rows * columns, patch[0] * patch[1] * channels)
    assert torch.equal(unpatchify(patches, patch, (rows, columns)), images)
    for number in range(rows * columns):  # row by row, channels last
        top, left = number // columns * patch[0], number % columns * patch[1]
        box = images[:, :, top : top + patch[0], left : left + patch[1]]
        assert torch.equal(patches[:, number], box.permute(0, 2, 3, 1).flatten(1))


def test_positions_are_those_of_the_authors_code():
    s, c, small, near = math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)
    first, moved = [0, 0, 1, 1], [s, small, c, near]
    wanted = torch.tensor([first + first, moved + first, first + moved, moved + moved])
    torch.testing.assert_close(sincos_positions(8, (2, 2)), wanted, atol=1e-7, rtol=0)
    assert sincos_positions(8, (2, 2))[1, :4].tolist() == pytest.approx([0.841471, 0.01, 0.540302, 0.99995], abs=1e-6)


def test_positions_of_a_grid_that_is_not_square():
    wide = sincos_positions(12, (2, 5))
    assert wide.shape == (10, 12) and len(wide.unique(dim=0)) == 10
    assert torch.equal(wide[7], torch.cat([sincos_positions(12, (1, 5))[2, :6], sincos_positions(12, (5, 1))[1, 6:]]))
    with pytest.raises(UserError, match="multiple of 4"):
        sincos_positions(10, (2, 2))
