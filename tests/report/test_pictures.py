from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from fabricated import HOSTILE, Page
from PIL import Image

from ssl_kit.report.page import strip_html
from ssl_kit.report.pictures import (
    MAP_BYTES,
    colours_of,
    draw_grid,
    draw_map,
    draw_neighbours,
    draw_views,
    encode,
    enlarged,
    framed,
    overlay,
    signed_overlay,
    to_image,
)


def plain(height, width, colour):
    return np.full((height, width, 3), colour, dtype=np.uint8)


def test_views_are_enlarged_by_an_integer_and_keep_their_values(tmp_path):
    checks = (np.indices((8, 8)).sum(0) % 2)[None, None].repeat(3, 1).astype(np.float32)  # (1, 3, 8, 8) of 0 and 1
    draw_views(tmp_path / "views.png", [plain(8, 8, (255, 0, 0))], [checks])
    with Image.open(tmp_path / "views.png") as sheet:
        pixels = np.asarray(sheet.convert("RGBA"))
    factor = 132 // 8
    cell = pixels[-8 * factor :, -8 * factor :, :3]
    assert np.array_equal(cell, np.kron(checks[0, 0], np.ones((factor, factor)))[..., None].repeat(3, 2) * 255)
    top = pixels[: 8 * factor, -8 * factor :]
    assert (top == (255, 0, 0, 255)).all()


def test_views_take_originals_of_any_size_grey_ones_and_values_out_of_range(tmp_path):
    originals = [plain(300, 40, 9), plain(3, 500, 9)[:, :, :1]]
    draw_views(tmp_path / "views.png", originals, [np.array([-1.0, 2.0]).reshape(2, 1, 1, 1) * np.ones((2, 1, 16, 24))])
    with Image.open(tmp_path / "views.png") as sheet:
        row = np.asarray(sheet)[-1]
    opaque = row[row[:, 3] == 255][:, 0]
    assert set(opaque.tolist()) == {0, 255} and len(opaque) == 2 * 24 * (132 // 24)


def test_a_grid_shows_its_images_in_order_and_says_what_they_are(tmp_path):
    grid = np.linspace(0, 1, 6).reshape(2, 3, 1, 1, 1) * np.ones((2, 3, 1, 32, 32))
    caption = "Original, masked, prediction; " + 20 * "a long explanation "
    draw_grid(tmp_path / "grid.png", grid, ("one", "two", "three"), caption)
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.info["Description"] == caption
        pixels = np.asarray(sheet.convert("RGBA"))
    flat = [pixels[y, x] for y in range(pixels.shape[0]) for x in (64, 64 + 134, 64 + 268)]
    shown = list(dict.fromkeys(int(pixel[0]) for pixel in flat if pixel[3] == 255 and pixel[0] not in {122}))
    assert shown == [0, 51, 102, 153, 204, 255]


def test_many_rows_of_few_images_become_few_rows_of_many(tmp_path):
    grid = np.linspace(0, 1, 6).reshape(3, 2, 1, 1, 1) * np.ones((3, 2, 1, 32, 32))
    draw_grid(tmp_path / "grid.png", grid, ("image", "again"), "told")
    with Image.open(tmp_path / "grid.png") as sheet:
        pixels = np.asarray(sheet.convert("RGBA"))
    cell, left = 4 * 32, pixels.shape[1] - 3 * 4 * 32 - 2 * 6  # the captions are on the left
    assert pixels.shape[0] == 2 * cell + 6 and left > 40
    shown = [
        [int(pixels[row * (cell + 6) + 64, left + column * (cell + 6) + 64, 0]) for column in range(3)]
        for row in (0, 1)
    ]
    assert shown == [[0, 102, 204], [51, 153, 255]]
    assert pixels[:, :left, 3].any() and sheet.info["Description"] == "told"


def test_neighbours_store_each_image_once_and_refer_to_it(tmp_path):
    asked = []
    queries, found = np.array([7, 3]), {"encoder": np.array([[3, 9], [7, 9]]), "pixels": np.array([[9, 3], [11, 7]])}
    labels = np.arange(20) % 3
    draw_neighbours(tmp_path, queries, found, lambda i: asked.append(i) or plain(100, 50, i), labels, ("a", "b", "c"))
    told = json.loads((tmp_path / "neighbours.json").read_text())
    assert sorted(asked) == told["indices"] == [3, 7, 9, 11]
    back = np.array(told["indices"])
    assert np.array_equal(back[told["queries"]], queries)
    assert all(np.array_equal(back[told["found"][name]], found[name]) for name in found)
    assert told["labels"] == labels[back].tolist()
    with Image.open(io.BytesIO(base64.b64decode(told["images"][1]))) as picture:
        assert picture.size == (50, 100)
        assert abs(np.asarray(picture.convert("RGB")).astype(int) - 7).max() <= 3


def test_a_map_of_2000_noisy_images_stays_under_3_mb(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2000, 48, 48, 3), dtype=np.uint8)  # nothing compresses worse
    labels = np.zeros(2000, dtype=np.int64)
    draw_map(tmp_path, rng.normal(size=(2000, 2)), labels, ("a",), lambda i: noise[i], np.arange(2000))
    assert (tmp_path / "map.json").stat().st_size < 3_000_000
    assert sum(map(len, json.loads((tmp_path / "map.json").read_text())["images"])) <= MAP_BYTES


def test_a_map_keeps_order_labels_and_positions(tmp_path):
    positions, labels, indices = np.array([[0.5, -1], [2, 3]]), np.array([1, -1]), np.array([40, 2])
    draw_map(tmp_path, positions, labels, ("a", "b"), lambda i: plain(32, 32, i), indices, "PCA")
    told = json.loads((tmp_path / "map.json").read_text())
    assert (told["x"], told["y"], told["labels"], told["indices"]) == ([0.5, 2.0], [-1.0, 3.0], [1, -1], [40, 2])
    with Image.open(io.BytesIO(base64.b64decode(told["images"][0]))) as picture:
        assert abs(np.asarray(picture).astype(int) - 40).max() <= 3


def test_a_position_that_is_no_number_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        draw_map(
            tmp_path, np.array([[np.nan, 0]]), np.zeros(1, int), ("a",), lambda i: plain(8, 8, 0), np.zeros(1, int)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_images_of_any_channel_count_become_rgb(shape):
    picture = to_image(np.zeros(shape, dtype=np.uint8))
    assert (picture.mode, picture.size) == ("RGB", (7, 5))


def test_encode_never_enlarges():
    with Image.open(io.BytesIO(base64.b64decode(encode(plain(10, 20, 5), 64, 80)))) as picture:
        assert picture.size == (20, 10)


def test_the_search_page_escapes_loads_nothing_and_keeps_the_order(tmp_path):
    image = plain(20, 20, 90)
    results = [[("a/1.jpg", 0.98, image), (f"{HOSTILE}.jpg", -0.2, None), ("gone.jpg", 1.0000001, image)], []]
    strip_html(tmp_path / "page.html", HOSTILE, [(f'"{HOSTILE}', image), ("second", image)], results)
    page = Page((tmp_path / "page.html").read_text())
    assert len(page.all("script")) == 1 and "alert" not in page.scripts[0]
    assert all((one.get("src") or "data:").startswith("data:image/webp;base64,") for one in page.all("img"))
    assert page.words.index("0.980") < page.words.index("-0.200") < page.words.index("1.000")
    assert page.text.count(HOSTILE) >= 3 and "not readable" in page.words and "Nothing found." in page.words
    assert [one["style"] for one in page.all("i")] == ["width: 98.0%", "width: 0.0%", "width: 100.0%"]


def test_small_images_are_enlarged_by_an_integer_and_large_ones_stay():
    image = np.random.default_rng(0).integers(0, 256, (28, 20, 3), dtype=np.uint8)
    assert np.array_equal(enlarged(image), np.kron(image, np.ones((5, 5, 1), np.uint8)))
    large = np.zeros((150, 200, 1), dtype=np.uint8)
    assert enlarged(large).shape == (150, 200, 3)


def test_more_is_brighter_everywhere_and_the_image_shines_through():
    image = np.full((32, 32, 3), 128, dtype=np.uint8)
    drawn = overlay(image, np.linspace(0, 1, 8)[None].repeat(2, 0), 0.0, 1.0)
    grey = drawn.astype(float) @ (0.299, 0.587, 0.114)
    assert drawn.shape == enlarged(image).shape
    steps = grey[0, :: drawn.shape[1] // 8]
    assert (np.diff(steps) > 10).all()
    dark, bright = (overlay(one, np.zeros((1, 1)), 0.0, 1.0).max() for one in (np.zeros_like(image), image))
    assert dark < bright


def test_values_beyond_the_scale_are_clipped_and_a_constant_map_is_no_error():
    image = np.zeros((16, 16, 1), dtype=np.uint8)
    high, beyond = overlay(image, np.full((2, 2), 1.0), 0, 1), overlay(image, np.full((2, 2), 9.0), 0, 1)
    assert np.array_equal(high, beyond)
    assert overlay(image, np.zeros((2, 2)), 0.0, 0.0).max() < 10


def test_a_smooth_map_has_no_steps():
    image, heat = np.zeros((112, 112, 1), dtype=np.uint8), np.array([[0.0, 1.0]])
    rough, smooth = (overlay(image, heat, 0, 1, smooth=smooth).astype(int)[0, :, 0] for smooth in (False, True))
    assert len(set(rough.tolist())) == 2 and np.abs(np.diff(smooth)).max() < np.abs(np.diff(rough)).max() / 5


def test_signs_have_their_colours_and_nothing_is_the_grey_image():
    image = np.full((112, 112, 3), 100, dtype=np.uint8)
    plus, minus, none = (signed_overlay(image, np.full((1, 1), value), 0.5)[0, 0].astype(int) for value in (1, -1, 0))
    assert plus[0] > plus[2] + 100 and minus[2] > minus[0] + 100  # orange, blue
    assert none.tolist() == [40, 40, 40]


def test_colours_are_squares_in_their_places():
    colours = np.zeros((2, 2, 3))
    colours[0, 1] = (1, 0, 0.5)
    drawn = colours_of(colours, (10, 20))
    assert drawn.shape == (10, 20, 3) and drawn[4, 10].tolist() == [255, 0, 128] and drawn[5, 10].max() == 0


def test_a_frame_surrounds_its_position_only():
    image = np.full((112, 112, 3), 50, dtype=np.uint8)
    drawn = framed(image, (1, 2), (4, 4))
    changed = np.argwhere((drawn != image).any(axis=2))
    assert changed.min(axis=0).tolist() == [28, 56] and changed.max(axis=0).tolist() == [55, 83]
    assert (drawn[30:54, 58:82] == 50).all() and image.max() == 50
