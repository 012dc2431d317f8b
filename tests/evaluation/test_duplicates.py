"""Pairs, groups, outliers, and the comparison of pictures, on arrays."""

import numpy as np
import pytest
from PIL import Image

from ssl_kit.evaluation.duplicates import (
    EDITS,
    SIDE,
    correlations,
    edits,
    groups,
    isolation,
    limits,
    pairs_above,
    thumbnail,
)


def photograph(number, height=48, width=60):
    """Smooth random colours: no two alike."""
    small = np.random.default_rng(number).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def test_pairs_are_given_once_and_never_with_themselves():
    cosines = np.array([[1, 0.95, 0.2], [1, 0.95, 0.9], [1, 0.9, 0.1], [1, 0.99, 0.99]])
    rows = np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0], [3, -1, -1]])
    assert pairs_above(cosines, rows, 0.9).tolist() == [[0, 1], [1, 2]]
    assert pairs_above(cosines, rows, 0.94).tolist() == [[0, 1]]
    assert pairs_above(cosines, rows, 1.0, within=False).tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_groups_are_what_chains_of_pairs_connect():
    pairs = np.array([[5, 7], [1, 2], [2, 9], [7, 8]])
    assert [group.tolist() for group in groups(pairs, 10)] == [[1, 2, 9], [5, 7, 8]]
    assert groups(np.empty((0, 2), np.int64), 10) == []


def test_isolation_leaves_the_image_itself_out():
    cosines = np.array([[1, 0.8, 0.6], [0.9, 0.9, 0.9]])
    rows = np.array([[0, 1, 5], [3, 4, -1]])
    assert isolation(cosines, rows) == pytest.approx([0.3, 0.1])


@pytest.mark.parametrize("kind", EDITS)
def test_edited_copies_correlate_and_others_do_not(kind):
    images = [photograph(number) for number in range(40)]
    originals = np.stack([thumbnail(image) for image in images])
    copies = np.stack([thumbnail(edits(image, number)[kind]) for number, image in enumerate(images)])
    own = correlations(originals, copies)
    others = correlations(originals, np.roll(copies, 1, axis=0))
    assert own.min() > max(0.95, others.max() + 0.02) and np.median(others) < 0.6
    assert np.allclose(correlations(copies, originals), own, atol=1e-5)  # whichever is the crop


def test_a_crop_is_aligned():
    image = photograph(3, 80, 80)
    crop = image[8:, :72]  # 90 % of each side, bottom left: one of the tried places
    plain = np.corrcoef(thumbnail(image).ravel(), thumbnail(crop).ravel())[0, 1]
    assert correlations(thumbnail(image)[None], thumbnail(crop)[None])[0] > max(0.998, plain + 0.01)


def test_pictures_without_contrast_equal_their_like_only():
    white, black = np.full((SIDE, SIDE), 255, np.float32), np.zeros((SIDE, SIDE), np.float32)
    logo = white.copy()
    logo[1:4, 1:4] = 0  # crops of the rest are white
    first, second = np.stack([white, white, logo, white]), np.stack([white, black, white, logo])
    assert correlations(first, second).tolist() == [1, 0, 0, 0]


def test_edits_are_what_they_say_and_repeat():
    image = photograph(1, 50, 40)
    made = edits(image, 5)
    assert made["crop"].shape == (45, 36, 3) and made["jpeg"].shape == image.shape
    ratio = made["brightness"].astype(float).sum() / image.sum()
    assert abs(ratio - 1.05) < 0.01 or abs(ratio - 0.95) < 0.01
    assert all(np.array_equal(made[kind], edits(image, 5)[kind]) for kind in EDITS)
    assert not np.array_equal(made["crop"], edits(image, 6)["crop"])
    assert set(edits(image[:, :, :2], 5)) == {"crop", "brightness"}


def test_limits_let_most_planted_copies_through():
    limit = limits(np.linspace(0.9, 1, 101), np.linspace(0.8, 1, 101))
    assert limit == pytest.approx((0.902, 0.804))
