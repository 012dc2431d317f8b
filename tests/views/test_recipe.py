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


@pytest.mark.parametrize(
    ("recipe", "preset", "side", "channels", "wanted"),
    [
        (ViewRecipe(), "simclr", 224, 3, ("simclr", None, None)),
        (ViewRecipe(), "simclr", 32, 3, ("simclr", 0.5, 0.0)),
        (ViewRecipe(strength=1.0, blur=0.5), "simclr", 32, 3, ("simclr", 1.0, 0.5)),
        (ViewRecipe(), "simclr", 224, 1, ("simclr", None, None)),
        (ViewRecipe(), "mae", 224, 1, ("mae", None, None)),
        (ViewRecipe(preset="simclr"), "mae", 224, 1, ("simclr", None, None)),
    ],
)
def test_what_a_recipe_leaves_open_follows_method_and_images(recipe, preset, side, channels, wanted) -> None:
    fitted = recipe.fitted(preset, (side, side), channels)
    assert (fitted.preset, fitted.strength, fitted.blur) == wanted


def test_aavae_keeps_its_second_view_clean_whatever_else_is_asked() -> None:
    recipe = ViewRecipe(preset="aavae", strength=0.5, blur=0.3, gray=0.4, flip_x=1.0, scale=(0.2, 1.0), erase=0.5)
    first, target = recipe.build((32, 32), 3, 2)
    assert target == plain((32, 32))
    assert (first.crop, first.scale, first.jitter, first.hue) == (1, (0.2, 1.0), 0.8, 0.1)
    assert (first.blur, first.gray, first.flip_x, first.erase) == (0.3, 0.4, 1.0, 0.5)
    assert ViewRecipe(preset="plain", flip_x=0.5).build((32, 32), 3, 1)[0].flip_x == 0.5


def test_aavae_of_other_channels_has_no_colour_and_a_clean_target() -> None:
    fitted = ViewRecipe().fitted("aavae", (32, 32), 1)
    first, target = fitted.build((32, 32), 1, 2)
    assert (first.crop, first.brightness, first.saturation) == (1, 0.4, 0) and target == plain((32, 32))


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
    refused = (({"hue": 0.1}, "hue need"), ({"gray": 0.2}, "gray need"), ({"drop": 0.5}, "drop leaves out"))
    for asked, message in refused:
        with pytest.raises(UserError, match=message):
            ViewRecipe(**asked).build((32, 32), 1, 2)
    with pytest.raises(UserError, match=r"views: gray need"):
        View((8, 8), gray=0.1).check_channels(4)


def test_a_preset_leaves_colour_out_of_other_images_and_says_so(capsys) -> None:
    assert ViewRecipe("simclr").build((32, 32), 1, 2) == ViewRecipe("gray").build((32, 32), 1, 2)
    many = ViewRecipe("simclr", drop=0.3).build((32, 32), 5, 2)[0]
    assert (many.saturation, many.hue, many.gray, many.bands, many.drop) == (0, 0, 0, 5, 0.3)
    assert many.brightness == ViewRecipe("simclr").build((32, 32), 3, 1)[0].brightness
    assert ViewRecipe("mae").build((32, 32), 5, 1)[0].bands == 0  # it jitters nothing
    local = ViewRecipe("dino").build((32, 32), 5, 4)
    assert [view.size[0] for view in local] == [32, 32, 14, 14] and all(view.hue == 0 for view in local)
    ViewRecipe().fitted("simclr", (224, 224), 5)
    assert "left out of simclr" in capsys.readouterr().out
    ViewRecipe().fitted("mae", (224, 224), 5)
    assert capsys.readouterr().out == ""


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
