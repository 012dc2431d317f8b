"""Leaks between train and test: planted copies are found, look-alikes are not, and dropping drops them."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from ssl_kit.data.opening import open_labelled, open_source
from ssl_kit.data.sources import pixels
from ssl_kit.evaluation.duplicates import find_leaks


@pytest.fixture(scope="module")
def patches():
    """(600, 32, 32, 3) uint8: patches of two photographs that do not overlap."""
    cut = [
        photo[y : y + 32, x : x + 32]
        for photo in load_sample_images().images
        for y in range(0, 416, 32)
        for x in range(0, 640, 32)
    ]
    return np.stack(cut)[np.random.default_rng(0).permutation(len(cut))][:500]


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=50)
    return np.asarray(Image.open(file))


ALTERED = {
    "copied": lambda image: image,
    "compressed": jpeg,
    "brighter": lambda image: np.clip(image.astype(int) + 13, 0, 255).astype(np.uint8),
    "paler": lambda image: (0.9 * image + 12).astype(np.uint8),
}


@pytest.mark.parametrize("kind", ALTERED)
def test_planted_copies_are_found_and_nothing_else(patches, kind):
    train, test = patches[:400], patches[400:].copy()
    varied = np.flatnonzero(test.std(axis=(1, 2, 3)) > 10)[:20]
    originals = np.flatnonzero(train.std(axis=(1, 2, 3)) > 25)[: len(varied)]
    for place, original in zip(varied, originals, strict=True):
        test[place] = ALTERED[kind](train[original])
    leaks = find_leaks(open_source(train), open_source(test))
    found = dict(zip(map(int, leaks.test_ids), map(int, leaks.train_ids), strict=True))
    planted = dict(zip(varied.tolist(), originals.tolist(), strict=True))
    assert planted.items() <= found.items()
    assert len(found) <= len(planted) + 2  # patches of one and the same sky
    assert leaks.correlations.min() >= 0.9 and leaks.num_test == 100


def test_three_copies_in_train_are_still_a_leak(patches):
    train, test = patches[:200].copy(), patches[400:410].copy()
    busiest = int(train.std(axis=(1, 2, 3)).argmax())
    train[[0, 1]], test[4] = train[busiest], jpeg(train[busiest])
    assert find_leaks(open_source(train), open_source(test)).test_ids == ["4"]


def test_images_that_are_all_alike_or_all_flat_are_not_leaks():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    ones = np.stack([255 * (np.abs(x - 16 - shift) < 3) * (np.abs(y - 16) < 11) for shift in rng.normal(0, 0.7, 80)])
    ones = np.clip(ones[..., None] + rng.normal(0, 20, (80, 32, 32, 3)), 0, 255).astype(np.uint8)
    assert len(find_leaks(open_source(ones[:60]), open_source(ones[60:])).test_ids) <= 1
    flat = np.full((20, 32, 32, 3), 200, np.uint8)
    assert find_leaks(open_source(flat[:10]), open_source(flat[10:])).test_ids == []


def test_what_lies_at_one_place_of_an_empty_canvas_is_no_copy_and_a_copy_still_is():
    """Digits of 28 px on 64 px of black: without the second look dozens are called copies."""
    train, test = open_labelled("mnist64")
    known = np.stack([pixels(train, row) for row in range(len(train))])
    asked = np.stack([pixels(test, row) for row in range(len(test))])
    for row, kind in enumerate(list(ALTERED) * 5):
        asked[row] = ALTERED[kind](known[100 * row])
    found = find_leaks(open_source(known), open_source(asked))
    pairs = dict(zip(map(int, found.test_ids), map(int, found.train_ids), strict=True))
    assert pairs == {row: 100 * row for row in range(20)}
