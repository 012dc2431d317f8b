"""Presets against the tables of their papers, and what a recipe refuses."""

import pytest

from ssl_kit.core.errors import UserError
from ssl_kit.views.recipe import View, ViewRecipe, plain


def test_simclr_is_appendix_a() -> None:
    first, second = ViewRecipe(strength=0.5).build((96, 96), 3, 2)
    assert first == second
    assert (first.brightness, first.contrast, first.saturation, first.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (first.jitter, first.gray, first.blur, first.flip_x, first.scale) == (0.8, 0.2, 0.5, 0.5, (0.08, 1.0))


def test_byol_is_asymmetric_as_table_6() -> None:
    first, second = ViewRecipe(preset="byol").build((224, 224), 3, 2)
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert (first.saturation, first.hue) == (0.2, 0.1)


def test_dino_has_two_global_and_further_local_crops() -> None:
    views = ViewRecipe(preset="dino", scale=(0.3, 1.0)).build((224, 224), 3, 10)
    assert [view.size for view in views] == [(224, 224)] * 2 + [(96, 96)] * 8
    assert [view.scale for view in views] == [(0.3, 1.0)] * 2 + [(0.05, 0.4)] * 8
    assert ViewRecipe(preset="dino", local_size=48).build((224, 224), 3, 3)[2].size == (48, 48)


def test_a_recipe_overrides_its_preset() -> None:
    recipe = ViewRecipe(preset="mae", scale=(0.5, 1.0), blur=0.25, gray=0.1, hue=0.4, strength=0.5)
    (view,) = recipe.build((32, 32), 3, 1)
    assert (view.scale, view.blur, view.gray, view.hue) == ((0.5, 1.0), 0.25, 0.1, 0.2)
    assert ViewRecipe(strength=9).build((8, 8), 3, 1)[0].hue == 0.5


def test_plain_is_the_plain_preset() -> None:
    assert ViewRecipe(preset="plain").build((32, 48), 3, 1) == (plain((32, 48)),)


@pytest.mark.parametrize("preset", ["mae", "vae", "gray", "overhead", "plain"])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_presets_without_colour_take_any_channels(preset: str, channels: int) -> None:
    assert len(ViewRecipe(preset=preset).build((32, 40), channels, 2)) == 2  # type: ignore[arg-type]


def test_colour_is_refused_by_name_for_other_channels() -> None:
    with pytest.raises(UserError, match=r"saturation, hue, gray need 3 channels .* the images have 1"):
        ViewRecipe().build((32, 32), 1, 2)
    with pytest.raises(UserError, match=r"views: gray need"):
        View((8, 8), gray=0.1).check_channels(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip_x": 1.5}, "flip_x is 1.5"),
        ({"hue": 0.6}, "hue is 0.6"),
        ({"contrast": -1.0}, "contrast is -1.0"),
        ({"scale": (0.0, 1.0)}, "scale is"),
        ({"ratio": (2.0, 1.0)}, "ratio is"),
        ({"sigma": (0.0, 1.0)}, "sigma is"),
        ({"fraction": 0.0}, "fraction is"),
        ({"threshold": 2.0}, "threshold is"),
        ({"size": (0, 4)}, "size is"),
        ({"size": (4, 8), "turn": 0.5}, "turn needs a square"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        View(**{"size": (8, 8), **changes})


def test_recipes_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="11 views"):
        ViewRecipe().build((8, 8), 3, 11)
    with pytest.raises(UserError, match="strength is -1"):
        ViewRecipe(strength=-1).build((8, 8), 3, 1)
    with pytest.raises(UserError, match="preset is 'simlcr'"):
        ViewRecipe(preset="simlcr").build((8, 8), 3, 1)  # type: ignore[arg-type]
