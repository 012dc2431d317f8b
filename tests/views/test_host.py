"""The host executor against Pillow and torchvision at fixed parameters, and its promises about batches and threads."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as oracle
from views_oracle import LEVEL, identity, photo, tensor, torchvision_policy

from ssl_kit.core.errors import UserError
from ssl_kit.views import sample as col
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import View, ViewRecipe
from ssl_kit.views.sample import sample


def everything(size: tuple[int, int], channels: int = 3) -> View:
    """A view in which every operation happens often."""
    view = ViewRecipe().build(size, 3, 1)[0]
    turn = 0.5 if size[0] == size[1] else 0.0
    view = replace(view, flip_y=0.5, turn=turn, jitter=1.0, gray=0.3, solarize=0.3, erase=0.3)
    return view if channels == 3 else replace(view, saturation=0.0, hue=0.0, gray=0.0)


def batch(
    count: int, height: int, width: int, size: tuple[int, int], channels: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    images = np.stack([photo(height, width, channels, seed=n) for n in range(count)])
    sizes = np.full(count, height), np.full(count, width)
    return images, sample(everything(size, channels), 7, 0, np.arange(count), 0, *sizes)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_whole_policy_is_torchvisions_in_all_24_orders(strength: float) -> None:
    view = replace(
        ViewRecipe(strength=strength, solarize=0.3, erase=0.3, turn=0.5).build((48, 48), 3, 1)[0], jitter=1.0
    )
    images = np.stack([photo(64, 80, seed=n) for n in range(96)])
    params = sample(view, 3, 0, np.arange(96), 0, np.full(96, 64), np.full(96, 80))
    params[:, col.ORDER : col.ORDER + 4] = [order for order in permutations(range(4)) for _ in range(4)]
    got = apply_host(images, params, view.size)
    wanted = np.stack([torchvision_policy(*pair, view.size) for pair in zip(images, params, strict=True)])
    difference = np.abs(got - wanted)
    assert difference.mean() <= 0.05 * LEVEL
    assert np.quantile(difference, 0.99) <= 0.1 * LEVEL
    assert difference.max() <= 2 * LEVEL


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (224, 224), (31, 57)])
@pytest.mark.parametrize("stored", [(64, 64), (500, 333), (31, 57)])
def test_crop_and_resize_are_pillows(stored: tuple[int, int], size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    image = photo(*stored)
    heights, widths = rng.integers(1, stored[0] + 1, 12), rng.integers(1, stored[1] + 1, 12)
    heights[0], widths[0] = stored
    params = identity(12, *stored)
    params[:, col.HEIGHT], params[:, col.WIDTH] = heights, widths
    params[:, col.TOP] = rng.integers(0, stored[0] - heights + 1)
    params[:, col.LEFT] = rng.integers(0, stored[1] - widths + 1)
    out = np.empty((12, 3, *size), np.uint8)
    got = apply_host([image] * 12, params, size, out=out)
    for n, (top, left, height, width) in enumerate(params[:, : col.WIDTH + 1].astype(int).tolist()):
        cropped = Image.fromarray(image).crop((left, top, left + width, top + height))
        wanted = np.asarray(cropped.resize((size[1], size[0]), Image.BILINEAR)).transpose(2, 0, 1)
        assert np.abs(got[n].astype(int) - wanted).max() <= 1, (top, left, height, width)


def test_a_fractional_box_samples_a_ramp_where_it_says() -> None:
    """On brightness = (x + 2 y) / 255 every pixel is known: the position of its centre in the stored image."""
    y, x = np.mgrid[:40, :50]
    image = (x + 2 * y).astype(np.uint8)[None, :, :, None]
    params = identity(1, 40, 50)
    params[0, : col.WIDTH + 1] = top, left, height, width = 3.25, 7.75, 18.5, 22.125
    got = apply_host(image, params, (37, 61))[0, 0] * 255
    row = top + (np.arange(37) + 0.5) * height / 37 - 0.5
    column = left + (np.arange(61) + 0.5) * width / 61 - 0.5
    wanted = column[None, :] + 2 * row[:, None]
    assert np.abs(got - wanted)[1:-1, 2:-2].max() < 1e-3


def one(image: np.ndarray, size: tuple[int, int], **changes: float) -> torch.Tensor:
    """(C, h, w): the whole image with one thing changed."""
    params = identity(1, *image.shape[:2])
    for name, value in changes.items():
        params[0, col.NAMES.index(name)] = value
    return torch.from_numpy(apply_host(image[None], params, size)[0])


OPERATIONS = {
    "flip_x": (1.0, oracle.hflip),
    "flip_y": (1.0, oracle.vflip),
    "turns": (1.0, lambda x: oracle.rotate(x, 90)),
    "brightness": (1.7, lambda x: oracle.adjust_brightness(x, 1.7)),
    "contrast": (0.3, lambda x: oracle.adjust_contrast(x, 0.3)),
    "saturation": (1.8, lambda x: oracle.adjust_saturation(x, 1.8)),
    "hue": (-0.17, lambda x: oracle.adjust_hue(x, -0.17)),
    "gray": (1.0, lambda x: oracle.rgb_to_grayscale(x, 3)),
    "sigma": (1.3, lambda x: oracle.gaussian_blur(x, [9, 9], [1.3, 1.3])),
    "solarize": (0.5, lambda x: oracle.solarize(x, 0.5)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name: str) -> None:
    value, wanted = OPERATIONS[name]
    image = photo(45, 45)
    assert (one(image, (45, 45), **{name: value}) - wanted(tensor(image))).abs().max() <= 1e-5


def test_every_hue_of_every_colour_is_torchvisions() -> None:
    levels = np.array([0, 1, 63, 128, 200, 254, 255], np.uint8)
    image = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(7, 49, 3)
    for turns in np.linspace(-0.5, 0.5, 21):
        difference = one(image, (7, 49), hue=turns) - oracle.adjust_hue(tensor(image), float(np.float32(turns)))
        assert difference.abs().max() <= 1e-5, turns


@pytest.mark.parametrize("sigma", [0.1, 0.34, 0.7, 1.0, 1.9, 2.0, 3.4])
def test_blur_of_a_point_is_the_product_of_two_gaussians(sigma: float) -> None:
    image = np.zeros((41, 41, 1), np.uint8)
    image[20, 20] = 255
    g = np.exp(-0.5 * (np.arange(-20, 21) / sigma) ** 2) * (np.abs(np.arange(-20, 21)) <= np.ceil(3 * sigma))
    assert np.abs(one(image, (41, 41), sigma=sigma)[0].numpy() - np.outer(g, g) / g.sum() ** 2).max() < 1e-6


def test_erase_sets_its_box_to_zero_and_nothing_else() -> None:
    image = np.full((20, 30, 3), 200, np.uint8)
    got = one(image, (20, 30), erase_top=3, erase_left=5, erase_height=7, erase_width=11)
    wanted = torch.full((3, 20, 30), 200 / 255)
    wanted[:, 3:10, 5:16] = 0
    assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_channels_are_resampled_alike(channels: int) -> None:
    """Each channel of a picture with C channels comes out as it does alone."""
    images, params = batch(8, 40, 52, (24, 36), channels)
    params[:, col.CONTRAST : col.HUE + 1] = 1, 1, 0  # contrast and colour look at the other channels
    params[:, col.GRAY] = 0
    got = apply_host(images, params, (24, 36))
    for c in range(channels):
        alone = apply_host(np.ascontiguousarray(images[..., c : c + 1]), params, (24, 36))
        assert np.abs(got[:, c] - alone[:, 0]).max() < 1e-5


def test_contrast_of_other_channel_numbers_uses_their_mean() -> None:
    image = photo(20, 20, 1)
    assert torch.allclose(one(image, (20, 20), contrast=1.6), oracle.adjust_contrast(tensor(image), 1.6), atol=1e-5)
    image = photo(20, 20, 2)
    x = tensor(image)
    assert torch.allclose(one(image, (20, 20), contrast=1.6), (1.6 * x - 0.6 * x.mean()).clamp(0, 1), atol=1e-5)


def test_one_image_is_the_same_alone_and_in_any_batch_order_and_thread_count() -> None:
    images, params = batch(33, 50, 41, (32, 32))
    together = apply_host(images, params, (32, 32))
    alone = np.concatenate([apply_host(images[n : n + 1], params[n : n + 1], (32, 32)) for n in range(33)])
    assert np.array_equal(together, alone)
    for threads in (2, 3, 64):
        assert np.array_equal(together, apply_host(images, params, (32, 32), threads=threads))
    rows = np.random.default_rng(0).permutation(33)
    assert np.array_equal(together[rows], apply_host((images, rows), params[rows], (32, 32), threads=2))
    assert np.array_equal(together[rows], apply_host([images[n] for n in rows], params[rows], (32, 32)))


def test_images_of_different_sizes_need_no_padding() -> None:
    rng = np.random.default_rng(0)
    images = [photo(*rng.integers(1, 90, 2), seed=n) for n in range(40)]
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    params = sample(everything((33, 33)), 0, 0, np.arange(40), 0, heights, widths)
    got = apply_host(images, params, (33, 33))
    for n, image in enumerate(images):
        assert np.array_equal(got[n], apply_host(image[None], params[n : n + 1], (33, 33))[0])
    backwards = [np.asfortranarray(image[::-1]) for image in images]
    upright = [np.ascontiguousarray(image) for image in backwards]
    assert np.array_equal(apply_host(backwards, params, (33, 33)), apply_host(upright, params, (33, 33)))


def test_uint8_output_is_the_rounded_float_output() -> None:
    images, params = batch(20, 30, 30, (16, 24))
    floats = apply_host(images, params, (16, 24))
    for threads in (1, 2):
        out = np.empty((20, 3, 16, 24), np.uint8)
        assert apply_host(images, params, (16, 24), out=out, threads=threads) is out
        assert np.array_equal(out, np.floor(floats * np.float32(255) + np.float32(0.5)).astype(np.uint8))


@pytest.mark.parametrize("stored", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 200)])
@pytest.mark.parametrize("size", [(1, 1), (1, 8), (8, 1), (5, 5), (64, 64)])
@pytest.mark.parametrize("fill", [None, 0, 255])
def test_degenerate_pictures_stay_finite_and_in_range(
    stored: tuple[int, int], size: tuple[int, int], fill: int | None
) -> None:
    images, params = batch(16, *stored, size)
    if fill is not None:
        images[:] = fill
    got = apply_host(images, params, size)
    assert np.isfinite(got).all()
    assert got.min() >= 0
    assert got.max() <= 1 + 1e-6


def test_what_does_not_fit_is_refused_by_name() -> None:
    images, params = batch(2, 10, 12, (8, 8))
    wrong = params.copy()
    wrong[1, col.LEFT] = 12
    fine = np.ones_like(params)
    fine[:, col.SATURATION] = 0.5
    refused = {
        "float32": lambda: apply_host(images.astype(np.float32), params, (8, 8)),
        "wanted uint8 or uint16 .images, height": lambda: apply_host(images[0], params, (8, 8)),
        "shape .1, 22.; wanted .2, 22": lambda: apply_host(images, params[:1], (8, 8)),
        "of image 1 .top, left, height, width. leaves": lambda: apply_host(images, wrong, (8, 8)),
        "NaN": lambda: apply_host(images, params * np.nan, (8, 8)),
        "out is float64": lambda: apply_host(images, params, (8, 8), out=np.empty((2, 3, 8, 8))),
        "rows 0 to 2": lambda: apply_host((images, np.array([0, 2])), params, (8, 8)),
        "channels; wanted one": lambda: apply_host([images[0], images[1, ..., :1]], params, (8, 8)),
        "saturation, hue, gray need 3 channels": lambda: apply_host(images[..., :1], fine, (8, 8)),
    }
    for message, call in refused.items():
        with pytest.raises(UserError, match=message):
            call()


def test_no_images_give_no_views() -> None:
    assert apply_host(np.empty((0, 4, 4, 3), np.uint8), identity(0, 4, 4), (8, 8)).shape == (0, 3, 8, 8)
