"""Attention, colours, maps of a similarity and prototypes: sums that must hold, and places where they must lie."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_kit.core.errors import UserError
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation.explain import (
    attends,
    attention,
    class_attention,
    cosine_to,
    feature_colours,
    feature_map,
    integrated_gradients,
    prototypes,
    similarity_map,
)

SMALL = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "reg_tokens": 2}


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    encoder = Encoder("vit_tiny_patch16_224", SMALL, (16, 24), 3, (0.4,), (0.2,)).eval()
    with torch.no_grad():  # timm starts special tokens at almost 0: here they must matter
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return encoder


@pytest.fixture
def convolutional():
    torch.manual_seed(0)
    return Encoder("resnet18_small", {"channels": [4, 4, 8, 8]}, (16, 16), 3, (0.4,), (0.2,)).eval()


def pictures(encoder, count=3, seed=1):
    return torch.rand(count, encoder.channels, *encoder.image_size, generator=torch.Generator().manual_seed(seed))


def test_attention_rows_sum_to_one_and_the_network_stays_as_it_was(transformer):
    images = pictures(transformer)
    layer = transformer.model.blocks[-1].attn
    before, fused = transformer(images), layer.fused_attn
    found = attention(transformer, images)
    tokens = 3 + 4 * 6  # class and registers, then 4 rows of 6 patches
    assert found.shape == (3, 3, tokens, tokens) and (found >= 0).all()
    assert (found.sum(dim=3) - 1).abs().max() < 1e-6
    assert layer.fused_attn == fused and not layer.attn_drop._forward_hooks
    assert torch.equal(transformer(images), before)


def test_attention_is_what_the_last_block_multiplies_its_values_by(transformer):
    images, layer, seen = pictures(transformer), transformer.model.blocks[-1].attn, []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    found = attention(transformer, images)
    hook.remove()
    (tokens, output), heads = seen[0], layer.num_heads
    values = layer.qkv(tokens).unflatten(2, (3, heads, -1))[:, :, 2].transpose(1, 2)  # (B, heads, T, d)
    assert torch.allclose(layer.proj((found @ values).transpose(1, 2).flatten(2)), output, atol=1e-5)


def test_the_class_tokens_share_is_in_the_grid_of_the_patches(transformer):
    images = pictures(transformer)
    shares = class_attention(transformer, images)
    assert shares.shape == (3, 4, 6)
    rows = attention(transformer, images)[:, :, 0].mean(dim=1)
    assert torch.allclose(shares.flatten(1), rows[:, 3:])
    assert torch.allclose(shares.sum(dim=(1, 2)) + rows[:, :3].sum(dim=1), torch.ones(3))


def test_only_plain_transformers_attend(transformer, convolutional):
    assert attends(transformer) and not attends(convolutional)


def test_a_feature_map_is_row_by_row(transformer, convolutional):
    images = pictures(transformer)
    tokens = transformer.model.forward_features(transformer.normalise(images))
    maps = feature_map(transformer, images)
    assert maps.shape == (3, 24, 4, 6) and torch.equal(maps[:, :, 1, 2], tokens[:, 3 + 6 + 2])
    assert feature_map(convolutional, pictures(convolutional)).shape == (3, 8, 2, 2)
    channels_last = Encoder("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 1],
                            "window_size": 4}, (32, 32)).eval()  # fmt: skip
    assert feature_map(channels_last, pictures(channels_last, 1)).shape == (1, 24, 4, 4)


def test_tokens_without_a_grid_are_refused():
    mixer = Encoder("mixer_s32_224", image_size=(32, 32)).eval()
    with pytest.raises(UserError, match="not known to be a grid"):
        feature_map(mixer, pictures(mixer))


def test_cosines_to_a_place():
    maps = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    found = cosine_to(maps, (2, 1))
    assert torch.allclose(found[:, 2, 1], torch.ones(2))
    assert torch.allclose(found[1, 0, 3], F.cosine_similarity(maps[1, :, 2, 1], maps[1, :, 0, 3], dim=0))


def test_colours_are_equal_where_features_are_and_do_not_depend_on_the_basis():
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(4, 8, generator=generator)  # four kinds of places
    where = torch.randint(4, (2, 6, 6), generator=generator)
    colours = feature_colours(kinds[where].movedim(3, 1))
    assert colours.shape == (2, 6, 6, 3) and colours.min() == 0 and colours.max() == 1
    each = torch.stack([colours[where == kind][0] for kind in range(4)])
    assert torch.allclose(each[where], colours, atol=1e-5)
    assert torch.cdist(each, each)[~torch.eye(4, dtype=bool)].min() > 0.3
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    turned = feature_colours((kinds @ rotation + 3)[where].movedim(3, 1))
    assert torch.allclose(turned, colours, atol=1e-4)


def test_features_that_do_not_vary_have_one_colour():
    colours = feature_colours(torch.ones(2, 8, 3, 3) + 1e-9)
    assert torch.isfinite(colours).all() and torch.equal(colours, colours[:1, :1, :1].expand_as(colours))
    assert torch.equal(feature_colours(torch.arange(4.0).reshape(1, 1, 2, 2))[..., 1:], torch.full((1, 2, 2, 2), 0.5))


class Edges(nn.Module):
    """Two fixed filters that give 0 where an image is flat, then the mean over positions."""

    num_features = 2

    def forward_features(self, images):
        horizontal = torch.tensor([[0.0, 0, 0], [-1, 1, 0], [0, 0, 0]])
        filters = torch.stack([horizontal, horizontal.T])[:, None]
        return F.conv2d(images.mean(dim=1, keepdim=True), filters, padding=1).square()

    def forward_head(self, features, pre_logits):
        return features.mean(dim=(2, 3))


def textured(top, left, seed):
    """A grey image of 20 px with a noisy square of 6 px."""
    image = torch.full((1, 3, 20, 20), 0.5)
    image[:, :, top : top + 6, left : left + 6] += 0.2 * torch.randn(1, 1, 6, 6, generator=seed)
    return image


def test_the_map_of_a_similarity_lies_on_the_only_informative_square(convolutional):
    seed = torch.Generator().manual_seed(0)
    convolutional.model = Edges()
    convolutional.mean.fill_(0.5)  # so that the border of the padding is flat too
    images = torch.cat([textured(3, 9, seed), textured(11, 2, seed)])
    others = torch.cat([textured(8, 8, seed), textured(0, 0, seed)])
    found = similarity_map(convolutional, images, others)
    assert found.shape == (2, 20, 20)
    for one, (top, left) in zip(found, ((3, 9), (11, 2)), strict=True):
        outside = one.clone()
        outside[top : top + 7, left : left + 7] = 0  # a filter of 3 px also answers one pixel behind the square
        assert outside.abs().max() == 0 and one.max() > 0
    # the mean over positions is the cosine itself
    wanted = F.cosine_similarity(convolutional(images), convolutional(others))
    assert torch.allclose(found.mean(dim=(1, 2)), wanted, atol=1e-5)


def test_the_map_of_a_real_network_sums_to_its_cosine_and_leaves_no_gradient(convolutional):
    images, others = pictures(convolutional), pictures(convolutional, seed=2)
    found = similarity_map(convolutional, images, others)
    wanted = F.cosine_similarity(convolutional(images), convolutional(others))
    assert torch.allclose(found.mean(dim=(1, 2)), wanted, atol=1e-5)
    assert not found.requires_grad and all(parameter.grad is None for parameter in convolutional.parameters())
    code = Encoder("resnet18_small", {"channels": [4, 4, 8, 8], "num_classes": 5}, (16, 16)).eval()
    assert similarity_map(code, images, others).isfinite().all()


def test_integrated_gradients_sum_to_the_gain(transformer):
    pytest.importorskip("captum")
    images, others = pictures(transformer, 2), pictures(transformer, 2, seed=2)
    attributions, gain = integrated_gradients(transformer, images, others)
    assert attributions.shape == (2, 16, 24) and not attributions.requires_grad
    start = transformer.mean.expand_as(images)
    wanted = [F.cosine_similarity(transformer(pixels), transformer(others)) for pixels in (images, start)]
    assert torch.allclose(gain, wanted[0] - wanted[1], atol=1e-5) and gain.abs().min() > 0.01
    assert (attributions.sum(dim=(1, 2)) - gain).abs().max() < 0.01 * gain.abs().max()


def test_without_captum_the_extra_is_named(transformer, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(UserError, match=r"captum.*ssl-kit\[explain\]"):
        integrated_gradients(transformer, pictures(transformer), pictures(transformer))


def test_prototypes_are_nearest_to_their_class_and_counterexamples_are_of_another():
    vectors = np.array([[1, 0], [1, 0.1], [1, -0.9], [0, 1], [0.2, 1], [1, 0.02], [0.6, 1]], dtype=np.float32)
    labels = np.array([0, 0, 0, 1, 1, -1, 1])
    rows, counters, cosines = prototypes(vectors, labels, 3)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    means = [units[labels == label].sum(axis=0) for label in (0, 1)]
    for label, mean in enumerate(means):
        scores = units @ (mean / np.linalg.norm(mean))
        assert scores[rows[label]] == scores[labels == label].max()
        assert scores[counters[label]] == scores[labels == 1 - label].max()
        assert np.allclose(cosines[label], scores[[rows[label], counters[label]]])
    assert rows[2] == counters[2] == -1 and np.isnan(cosines[2]).all()  # a class without images
    assert 5 not in rows and 5 not in counters  # without a label, though nearest of all to class 0
    alone = prototypes(vectors, np.zeros(7, dtype=np.int64), 1)
    assert alone[0][0] >= 0 and alone[1].tolist() == [-1]
