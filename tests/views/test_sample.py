"""The sampler: golden values, torchvision's distributions, independence, and no dependence on the batch."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomErasing, RandomResizedCrop

from ssl_kit.core.errors import UserError
from ssl_kit.views import sample as col
from ssl_kit.views.recipe import View, ViewRecipe, plain
from ssl_kit.views.sample import sample, tries

MANY = 100_000
ALL = View(
    (32, 32),
    **dict.fromkeys(("crop", "jitter"), 1.0),
    **dict.fromkeys(("flip_x", "flip_y", "turn", "gray", "blur", "solarize", "erase"), 0.5),
    **{"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2},
)


def draw(view: View, count: int = MANY, *, seed: int = 0, epoch: int = 0, which: int = 0, size: int = 96) -> np.ndarray:
    return sample(view, seed, epoch, np.arange(count), which, np.full(count, size), np.full(count, size))


def test_the_numbers_are_part_of_the_format() -> None:
    """Golden values: a change here changes the views of every run that is resumed or repeated."""
    got = sample(ALL, 1, 2, np.array([0, 3, 1_000_000]), 1, np.array([375, 32, 64]), np.array([500, 32, 3000]))
    assert np.abs(got - np.array(GOLDEN)).max() < 2e-5


GOLDEN = [
    [182, 27, 168, 204, 0, 0, 1, 1.08677, 0.89179, 1.10821, -0.03382, 1, 2, 0, 3, 0, 0, 0.50196, 2, 20, 17, 10],
    [1, 14, 18, 15, 1, 0, 1, 1.11194, 0.83183, 1.48681, -0.17103, 0, 2, 1, 3, 1, 0.91343, 2, 0, 0, 0, 0],
    [0, 1457, 64, 85, 1, 1, 0, 0.48506, 1.32676, 0.98753, -0.18362, 2, 1, 0, 3, 0, 0, 0.50196, 0, 0, 0, 0],
]


def test_a_view_depends_on_its_key_alone() -> None:
    index = np.random.default_rng(0).permutation(40_000)
    sizes = 20 + index % 50, 20 + index % 70
    together = sample(ALL, 5, 6, index, 3, *sizes)
    for part in (slice(0, 1), slice(1, 7), slice(16_380, 16_390), slice(39_999, 40_000)):
        assert np.array_equal(together[part], sample(ALL, 5, 6, index[part], 3, sizes[0][part], sizes[1][part]))


def test_drawn_area_and_log_aspect_are_uniform_before_fitting() -> None:
    area, aspect = tries(0, 0, np.arange(MANY), 1, (0.08, 1.0), (3 / 4, 4 / 3))
    assert stats.kstest(area, stats.uniform(0.08, 0.92).cdf).pvalue > 0.01
    width = np.log(16 / 9)
    assert stats.kstest(np.log(aspect), stats.uniform(np.log(3 / 4), width).cdf).pvalue > 0.01
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 4 / np.sqrt(MANY)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (300, 90), (40, 200)])
def test_fitted_boxes_follow_torchvision(height: int, width: int) -> None:
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    wanted = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    count = 20_000
    view = View((32, 32), crop=1, scale=(0.2, 1.0))
    got = sample(view, 1, 0, np.arange(count), 0, np.full(count, height), np.full(count, width))
    for column in range(4):
        assert stats.ks_2samp(got[:, column], wanted[:, column]).pvalue > 0.01
    assert stats.ks_2samp(got[:, 2] * got[:, 3], wanted[:, 2] * wanted[:, 3]).pvalue > 0.01


def test_erased_boxes_follow_torchvision() -> None:
    torch.manual_seed(0)
    image = torch.empty(1, 60, 20)
    wanted = [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(4000)]
    view = View((60, 20), erase=1)
    got = draw(view, 20_000)[:, col.ERASE_TOP :]
    for column in range(4):
        assert stats.ks_2samp(got[:, column], np.array(wanted)[:, column]).pvalue > 0.01


def test_ten_misses_give_torchvisions_centre_box() -> None:
    view = View((32, 32), crop=1, scale=(0.99, 1.0), ratio=(0.9, 1.1))
    torch.manual_seed(0)
    for height, width in ((10, 300), (300, 10), (7, 91)):
        wanted = RandomResizedCrop.get_params(torch.empty(1, height, width), (0.99, 1.0), (0.9, 1.1))
        got = sample(view, 0, 0, np.arange(50), 0, np.full(50, height), np.full(50, width))
        assert (got[:, :4] == np.array(wanted)).all()


def within_four_sigma(hits: np.ndarray, probability: float) -> bool:
    return abs(hits.mean() - probability) <= 4 * np.sqrt(probability * (1 - probability) / len(hits))


def test_probabilities() -> None:
    params = draw(replace(ALL, crop=0.3, jitter=0.8, gray=0.2))
    assert within_four_sigma(params[:, col.HEIGHT] < 96, 0.3 * (1 - 0.005))  # a crop of 96 x 96 is rare
    assert within_four_sigma(params[:, col.FLIP_X], 0.5)
    assert within_four_sigma(params[:, col.FLIP_Y], 0.5)
    assert within_four_sigma(params[:, col.GRAY], 0.2)
    assert within_four_sigma(params[:, col.BRIGHTNESS] != 1, 0.8)
    assert within_four_sigma(params[:, col.SIGMA] > 0, 0.5)
    assert within_four_sigma(params[:, col.SOLARIZE] <= 1, 0.5)
    assert within_four_sigma(params[:, col.ERASE_HEIGHT] > 0, 0.5)
    for turns in (1, 2, 3):
        assert within_four_sigma(params[:, col.TURNS] == turns, 0.5 / 3)


def test_factors_and_orders_are_uniform() -> None:
    params = draw(ALL)
    for column in (col.BRIGHTNESS, col.CONTRAST, col.SATURATION):
        assert stats.kstest(params[:, column], stats.uniform(0.2, 1.6).cdf).pvalue > 0.01
    assert stats.kstest(params[:, col.HUE], stats.uniform(-0.2, 0.4).cdf).pvalue > 0.01
    sigma = params[params[:, col.SIGMA] > 0, col.SIGMA]
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 0.01
    codes = params[:, col.ORDER : col.ORDER + 4] @ np.array([1000, 100, 10, 1])
    wanted = sorted(int("".join(map(str, order))) for order in permutations(range(4)))
    found, counts = np.unique(codes, return_counts=True)
    assert found.tolist() == wanted
    assert stats.chisquare(counts).pvalue > 0.01


def test_strength_above_one_keeps_factors_above_zero() -> None:
    params = draw(replace(ALL, brightness=1.6), 10_000)
    assert params[:, col.BRIGHTNESS].min() >= 0
    assert params[:, col.BRIGHTNESS].max() > 2.5


def test_views_neighbours_epochs_and_seeds_are_uncorrelated() -> None:
    first = draw(ALL)
    others = {
        "the other view": draw(ALL, which=1),
        "the next epoch": draw(ALL, epoch=1),
        "the next seed": draw(ALL, seed=1),
        "the next image": np.roll(first, 1, axis=0),
    }
    moving = first.std(axis=0) > 0
    for name, other in others.items():
        for column in np.flatnonzero(moving):
            correlation = np.corrcoef(first[:, column], other[:, column])[0, 1]
            assert abs(correlation) < 4.5 / np.sqrt(MANY), (name, col.NAMES[column])


def test_columns_of_one_view_are_uncorrelated() -> None:
    params = draw(ALL)
    columns = [
        col.FLIP_X,
        col.FLIP_Y,
        col.TURNS,
        *range(col.BRIGHTNESS, col.HUE + 1),
        col.GRAY,
        col.SIGMA,
        col.SOLARIZE,
    ]
    correlations = np.corrcoef(params[:, [col.TOP, col.HEIGHT, *columns]].T)
    correlations[0, 1] = correlations[1, 0] = 0  # a large box leaves little room
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 4.5 / np.sqrt(MANY)


def test_plain_takes_the_largest_centred_box() -> None:
    heights, widths = np.array([375, 500, 32, 1]), np.array([500, 375, 32, 7])
    boxes = sample(plain((224, 224)), 0, 0, np.arange(4), 0, heights, widths)[:, :4]
    assert boxes.tolist() == [[0, 62, 375, 375], [62, 0, 375, 375], [0, 0, 32, 32], [0, 3, 1, 1]]
    boxes = sample(plain((100, 200), fraction=0.5), 0, 0, np.arange(1), 0, np.array([100]), np.array([400]))[:, :4]
    assert boxes.tolist() == [[25, 150, 50, 100]]
    drawn = np.delete(draw(plain((32, 32)), 100), np.arange(col.ORDER, col.ORDER + 4), axis=1)
    assert (drawn == drawn[0]).all()  # but for the order, in which nothing happens


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="view number 10"):
        draw(ALL, 1, which=10)
    with pytest.raises(UserError, match="one entry per image"):
        sample(ALL, 0, 0, np.arange(3), 0, np.full(2, 9), np.full(3, 9))


def test_all_presets_stay_inside_their_image() -> None:
    for preset in ("simclr", "byol", "dino", "mae", "vae", "overhead"):
        for which, view in enumerate(ViewRecipe(preset=preset).build((32, 32), 3, 3)):
            heights, widths = np.arange(2000) % 61 + 1, np.arange(2000) % 53 + 1
            top, left, height, width = sample(view, 0, 0, np.arange(2000), which, heights, widths)[:, :4].T
            assert (top >= 0).all()
            assert (left >= 0).all()
            assert (height >= 1).all()
            assert (width >= 1).all()
            assert (top + height <= heights).all()
            assert (left + width <= widths).all()
