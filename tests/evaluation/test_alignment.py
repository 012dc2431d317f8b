"""Thumbnails, and how alike two of them are when one may be a crop of the other."""

import numpy as np
import pytest
from PIL import Image

from ssl_kit.evaluation.alignment import EDITS, SIDE, correlations, distances, edits, thumbnail


def photograph(number, height=48, width=60):
    """Smooth random colours: no two alike."""
    small = np.random.default_rng(number).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def test_a_thumbnail_has_the_channels_of_its_image():
    image = photograph(0)
    whole = thumbnail(image)
    assert whole.shape == (SIDE, SIDE, 3) and whole.dtype == np.uint8
    for channels in ([1], [2, 0], [0, 1, 2, 1, 0]):
        assert np.array_equal(thumbnail(np.ascontiguousarray(image[:, :, channels])), whole[:, :, channels])


@pytest.mark.parametrize("kind", EDITS)
def test_edited_copies_correlate_and_others_do_not(kind):
    images = [photograph(number) for number in range(40)]
    originals = np.stack([thumbnail(image) for image in images])
    copies = np.stack([thumbnail(edits(image, number)[kind]) for number, image in enumerate(images)])
    own = correlations(originals, copies)
    others = correlations(originals, np.roll(copies, 1, axis=0))
    assert own.min() > max(0.95, others.max() + 0.02) and np.median(others) < 0.6
    assert np.allclose(correlations(copies, originals), own, atol=1e-5)  # whichever is the crop
    far = distances(originals, copies)
    assert far[:, 0].max() < 0.01 < 0.1 < distances(originals, np.roll(copies, 1, axis=0)).min()
    assert np.allclose(distances(copies, originals), far, atol=1e-5)
    assert (far[:, 1].min() > 0.02) == (kind == "crop")  # as they lie


@pytest.mark.parametrize("kept", [0.97, 0.92, 0.88])
def test_a_crop_is_fitted_wherever_it_lies(kept):
    """Between the scales and places that are tried; fine detail shows by how much it is missed."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        image = np.asarray(Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8)).resize((240, 240)))
        side = round(kept * 240)
        top, left = rng.integers(0, 240 - side + 1, 2)
        pair = (
            thumbnail(image)[None],
            thumbnail(np.ascontiguousarray(image[top : top + side, left : left + side]))[None],
        )
        assert distances(*pair)[0, 0] < 0.03 and distances(*pair[::-1])[0, 0] < 0.03


def test_a_crop_is_aligned():
    image = photograph(3, 80, 80)
    crop = image[8:, :72]  # 90 % of each side, bottom left: one of the tried places
    small = thumbnail(image), thumbnail(np.ascontiguousarray(crop))
    plain = np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1]
    assert correlations(small[0][None], small[1][None])[0] > max(0.998, plain + 0.01)


def test_pictures_in_other_colours_are_others():
    disc = np.full((SIDE, SIDE, 3), 255, np.uint8)
    y, x = np.mgrid[:SIDE, :SIDE]
    inside = (x - 16) ** 2 + (y - 16) ** 2 < 80
    red, blue = disc.copy(), disc.copy()
    red[inside], blue[inside] = (200, 40, 40), (40, 40, 200)
    assert correlations(red[None], blue[None])[0] > 0.999 and distances(red[None], blue[None]).min() > 0.2


def test_pictures_without_contrast_equal_their_like_only():
    white, black = np.full((SIDE, SIDE, 1), 255, np.uint8), np.zeros((SIDE, SIDE, 1), np.uint8)
    logo = white.copy()
    logo[1:4, 1:4] = 0  # crops of the rest are white
    first, second = np.stack([white, white, logo, white]), np.stack([white, black, white, logo])
    assert correlations(first, second).tolist() == [1, 0, 0, 0]
    assert distances(first, second).tolist() == [[0, 0], [1, 1], [1, 1], [1, 1]]
