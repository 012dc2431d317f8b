from __future__ import annotations

import numpy as np

from ssl_kit.report.heat import colours_of, enlarged, framed, overlay, signed_overlay


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
    assert (
        overlay(np.zeros_like(image), np.zeros((1, 1)), 0.0, 1.0).max() < overlay(image, np.zeros((1, 1)), 0, 1).max()
    )


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
