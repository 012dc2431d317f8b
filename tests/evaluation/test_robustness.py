"""Corruptions: closed forms, torchvision and simplejpeg, growing strength; the score of what they leave."""

import numpy as np
import pytest
import simplejpeg
import torch
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import rotate

from ssl_kit.core.errors import UserError
from ssl_kit.data.opening import open_source
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.evaluation.features import Network, Pixels
from ssl_kit.evaluation.neighbours import knn_accuracy
from ssl_kit.evaluation.robustness import CORRUPTIONS, STRENGTHS, corrupt, robustness
from ssl_kit.views.recipe import plain


@pytest.fixture(scope="module")
def images():
    """(12, 3, 48, 64) crops of two photographs, in [0, 1], multiples of 1/255."""
    crops = [
        photo[y : y + 48, x : x + 64]
        for photo in load_sample_images().images
        for y in (90, 200)
        for x in (50, 250, 450)
    ]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous().float() / 255


def rows(images):
    return np.arange(len(images)) + 100


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_stronger_is_farther_and_images_keep_their_form(images, name):
    kept = images.clone()
    changed = [corrupt(images, name, strength, index=rows(images)) for strength in STRENGTHS]
    assert torch.equal(images, kept)
    distances = [(one - images).square().mean().item() for one in changed]
    assert 0 < distances[0] < distances[1] < distances[2]
    for one in changed:
        assert one.shape == images.shape
        assert torch.allclose(255 * one, (255 * one).round(), atol=1e-4) and one.min() >= 0 and one.max() <= 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alike_in_any_batch_and_otherwise_by_another_seed(images, name):
    index = rows(images)
    whole = corrupt(images, name, 2, index=index)
    assert torch.allclose(corrupt(images[5:8], name, 2, index=index[5:8]), whole[5:8], atol=1e-6)
    random = name in ("noise", "rotation", "crop")
    assert torch.equal(corrupt(images, name, 2, seed=1, index=index), whole) != random


def test_closed_forms(images):
    index = rows(images)
    grey = torch.full((1, 3, 64, 64), 0.5)
    noise = corrupt(grey, "noise", 2, index=index[:1]) - grey
    pair = corrupt(grey.expand(2, 3, 64, 64), "noise", 2, index=index[:2]) - grey
    assert abs(torch.corrcoef(pair.flatten(1))[0, 1]) < 0.04  # images do not share their noise
    assert noise.std().item() == pytest.approx(0.08, rel=0.03) and abs(noise.mean()) < 0.004
    assert torch.allclose(corrupt(images, "brightness", 3, index=index), (images + 0.3).clamp(max=1), atol=0.002)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    assert torch.allclose(corrupt(images, "contrast", 2, index=index), (images + mean) / 2, atol=0.002)
    spot = torch.zeros(1, 1, 50, 50)
    spot[..., 25, 25] = 1
    spread = corrupt(spot, "blur", 3, index=index[:1])[0, 0]  # sigma of 2 pixels
    offsets = torch.arange(50) - 25.0
    assert spread[25, 25].item() == pytest.approx(1 / (8 * np.pi), abs=0.004)
    assert ((spread.sum(0) * offsets**2).sum() / spread.sum()).sqrt().item() == pytest.approx(2, abs=0.25)


def test_jpeg_is_what_a_file_would_hold(images):
    pixels = np.ascontiguousarray((255 * images[3]).round().byte().permute(1, 2, 0).numpy())
    wanted = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(pixels, quality=30))
    found = corrupt(images, "jpeg", 2, index=rows(images))[3]
    assert np.array_equal((255 * found).round().byte().permute(1, 2, 0).numpy(), wanted)


def test_rotation_is_torchvisions_inside_and_goes_both_ways(images):
    found = corrupt(images, "rotation", 2, index=rows(images))
    inside = (slice(None), slice(None), slice(16, 32), slice(20, 44))
    turned = [rotate(images, angle, InterpolationMode.BILINEAR) for angle in (15, -15)]
    errors = torch.stack([(found - one)[inside].abs().mean(dim=(1, 2, 3)) for one in turned])
    assert errors.min(dim=0).values.max() < 0.004
    assert 2 <= (errors[0] < errors[1]).sum() <= 10


def test_pixels_and_crops(images):
    blocks = corrupt(images[:, :, :, :48], "pixelate", 3, index=rows(images))
    assert torch.equal(blocks[:, :, ::4, ::4], blocks[:, :, 3::4, 3::4])
    assert torch.allclose(blocks[0, :, 0, 0], images[0, :, :4, :4].mean(dim=(1, 2)), atol=0.003)
    ramp = torch.linspace(0, 1, 64)[None, None, None].expand(8, 1, 48, 64)
    seen = corrupt(ramp, "crop", 3, index=np.arange(8))
    assert torch.allclose(seen.amax(dim=(1, 2, 3)) - seen.amin(dim=(1, 2, 3)), torch.tensor(0.6), atol=0.02)
    assert len(seen[:, 0, 0, 0].unique()) > 4


def test_what_does_not_exist_is_said(images):
    with pytest.raises(UserError, match="fog"):
        corrupt(images, "fog", 1, index=rows(images))
    with pytest.raises(UserError, match="strength 4"):
        corrupt(images, "noise", 4, index=rows(images))


def test_scores_of_clean_and_corrupted_images(labelled_folder):
    source = open_source(labelled_folder)
    train, test = source.subset(np.arange(160) % 2 == 0), source.subset(np.arange(160) % 2 == 1)
    network = Network(Pixels((16, 16), 3))
    gallery = embed(network.module, train, view=plain((16, 16)))
    result = robustness(gallery, test, network, k=5, features="pixels")
    vectors = embed(network.module, test, view=plain((16, 16))).vectors
    metrics = result.metrics
    assert metrics["clean"] == knn_accuracy(gallery.vectors, gallery.labels, vectors, test.labels(), k=5)
    assert metrics["top1"] == pytest.approx(np.mean([metrics[name] for name in CORRUPTIONS]))
    assert metrics["crop"] == pytest.approx(np.mean([metrics[f"crop_{strength}"] for strength in STRENGTHS]))
    assert metrics["crop_low"] <= metrics["crop"] <= metrics["crop_high"]
    assert metrics["brightness_1"] > metrics["clean"] - 0.2 and metrics["crop_3"] < metrics["clean"]
    assert robustness(gallery, test, network, k=5).metrics == metrics
    seen = corrupt(torch.from_numpy(vectors).view(-1, 3, 16, 16), "rotation", 3, index=np.arange(80))
    wanted = knn_accuracy(gallery.vectors, gallery.labels, network(seen), test.labels(), k=5)
    assert metrics["rotation_3"] == pytest.approx(wanted, abs=0.026)  # bfloat16 or not, two images at most
