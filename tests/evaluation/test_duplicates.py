"""Pairs, groups, outliers, planted copies, and the gap behind copies, on arrays."""

import numpy as np
import pytest
from PIL import Image

from ssl_kit.embeddings.exact import search
from ssl_kit.evaluation.alignment import EDITS, edits, thumbnail
from ssl_kit.evaluation.duplicates import (
    Around,
    apart,
    by_chance,
    groups,
    isolation,
    limits,
    near_duplicates,
    pairs_above,
    reach,
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


def test_edits_are_what_they_say_and_repeat():
    image = photograph(1, 50, 40)
    made = edits(image, 5)
    assert made["crop"].shape == (45, 36, 3) and made["jpeg"].shape == image.shape
    ratio = made["brightness"].astype(float).sum() / image.sum()
    assert abs(ratio - 1.05) < 0.01 or abs(ratio - 0.95) < 0.01
    assert all(np.array_equal(made[kind], edits(image, 5)[kind]) for kind in EDITS)
    assert len({edits(image, number)["crop"].tobytes() for number in range(5, 15)}) > 5  # of 30 places
    assert set(edits(image[:, :, :2], 5)) == {"crop", "brightness"}
    deep = edits(image.astype(np.uint16) * 257, 5)
    for kind, wide in deep.items():
        assert wide.dtype == np.uint16 and np.abs(wide / 257 - made[kind]).max() <= 0.51


def test_limits_let_most_planted_copies_through():
    limit = limits(np.linspace(0.9, 1, 101), np.linspace(0.8, 1, 101), np.linspace(0.1, 0.2, 101))
    assert limit == pytest.approx((0.901, 0.802, 0.105))
    assert limits(np.ones(3), np.ones(3), np.ones(0)).sure == -1  # more channels than JPEG has


def around(points, count=32):
    """(N, K) squared distances and rows of each point's neighbours; NaN for itself."""
    far, rows = search(points, points, count + 1, metric="l2")
    return np.where(rows == np.arange(len(rows))[:, None], np.nan, far), rows


def test_a_quick_look_finds_copies_and_nothing_among_pictures_of_one_kind():
    """Of 20 pictures there is a JPEG and a brighter copy."""
    photographs = [photograph(number) for number in range(200)]
    made = [edits(photographs[number], number)[name] for number in range(20) for name in ("jpeg", "brightness")]
    pictures = np.stack([thumbnail(image) for image in (*photographs, *made)])
    assert not len(near_duplicates(pictures[:200]))
    pairs = near_duplicates(pictures)
    assert [group.tolist() for group in groups(pairs, 240)] == [
        [number, 200 + 2 * number, 201 + 2 * number] for number in range(20)
    ]
    for few in (1, 2, 3):  # too few to have others to compare with
        assert not len(near_duplicates(pictures[:few]))
    assert near_duplicates(pictures[[0, 0, 1]]).tolist() == [[0, 1]]


def test_copies_reach_as_far_as_the_gap_behind_them():
    unlike = 0.3 + 0.02 * np.arange(20)
    rows = [
        [np.nan, 0.01, *unlike],
        [np.nan, 0.03, *unlike[:10], 0.01, *unlike[10:]],  # two copies, in no order
        [np.nan, 0.2, *(10 * unlike)],  # correlates by less than 0.9
        [np.nan, *unlike, 0.5],
    ]
    longest = max(map(len, rows))
    padded = np.array([[*row, *[np.nan] * (longest - len(row))] for row in rows])
    assert reach(padded) == pytest.approx([0.01, 0.03, -1, -1])
    assert reach(np.array([[np.nan, 0.001, 0.5], [np.nan, 0.1, 0.5]])).tolist() == [0.001, -1]  # little to compare with
    assert reach(np.array([[np.nan, 0.0]])).tolist() == [-1]


@pytest.mark.parametrize("dimension", [1, 2, 4, 8])
def test_pictures_at_random_seldom_see_a_gap_and_the_count_says_so(dimension):
    far, _ = around(np.random.default_rng(0).random((3_000, dimension), dtype=np.float32))
    far *= 0.09 / np.nanmax(far)  # all within the floor: only the gap speaks
    share = (reach(far) > 0).mean()
    assert share < 0.13  # 0.05 for the nearest alone, on one side
    assert share - 0.04 < by_chance(far) / len(far) < share + 0.06


@pytest.mark.parametrize("within", [True, False])
def test_both_images_of_a_pair_must_see_the_gap(within):
    table = 0.3 + 0.02 * np.abs(np.subtract.outer(np.arange(40), np.arange(40)))  # nobody is like anybody, but
    table[0, 1] = table[1, 0] = 0.001  # two copies, and
    table[2, 3] = table[3, 2] = 0.01  # an image that is like one of a crowd
    table[3, 4:] = table[4:, 3] = 0.012 + 0.002 * np.arange(36)
    far = lambda pairs: np.repeat(table[pairs[:, 0], pairs[:, 1]][:, None], 2, axis=1)
    every = np.arange(len(table))
    side = Around(every, np.tile(every, (len(every), 1)))
    pairs = np.array([[0, 1], [2, 3]])
    measure = far if within else lambda pairs: np.where(pairs[:, :1] == pairs[:, 1:], np.nan, far(pairs))
    copies, chance = apart(pairs, side, side, measure, -1.0, within=within)
    assert copies.tolist() == [True, False] and chance < 10
    assert apart(pairs, side, side, measure, 0.01, within=within)[0].all()  # surely, whatever lies around
