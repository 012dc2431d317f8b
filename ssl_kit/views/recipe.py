"""What may happen to an image, as numbers: `View` for one view, `ViewRecipe` for what a method asks for.

A preset is a few lines with its source; all methods share them. Units: probabilities and fractions in [0, 1],
sizes in pixels (height, width), blur sigma in pixels of the view, hue in turns of the colour circle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ssl_kit.core.console import say
from ssl_kit.core.errors import UserError

Preset = Literal["simclr", "byol", "dino", "mae", "vae", "aavae", "gray", "overhead", "plain"]

_PROBABILITIES = ("crop", "flip_x", "flip_y", "turn", "jitter", "gray", "blur", "solarize", "erase", "drop")
_COLOUR = ("saturation", "hue", "gray")  # operations that mean something for red, green and blue only
_SMALL = 96  # pixels: below it SimCLR halves the colour jitter and does not blur (arXiv:2002.05709, appendix B.9)
_SMALL_SCALE = (0.2, 1.0)  # below it a crop of 8 % of the area holds a handful of pixels
_CROPPED = ("simclr", "byol", "gray", "aavae")  # presets with crops of 8 % of the area and more
_LOCAL = 96 / 224  # side of DINO's local crops as a share of the global ones
_COLOURFUL = ("simclr", "byol", "dino", "aavae")  # presets that change saturation and hue
MAX_VIEWS = 10  # a view owns 100 of the 1,000 random streams that belong to views; see ssl_kit/core/random.py


@dataclass(frozen=True)
class View:
    """One view, in the order in which it is made; every operation has torchvision's semantics.

    Args:
        size: (height, width) of the view.
        crop: probability of a random resized crop; otherwise the centre box of the view's aspect ratio is taken.
        scale: area of the random crop as a fraction of the image, drawn uniformly.
        ratio: width / height of the random crop, drawn log-uniformly.
        fraction: side of the centre box as a fraction of the largest that fits (0.875 for "resize 256, crop 224").
        flip_x: probability of a left-right mirror.
        flip_y: probability of an upside-down mirror.
        turn: probability of a turn by 90, 180 or 270 degrees, drawn uniformly (0.75 makes the four poses equal).
        jitter: probability of the colour jitter: the next four, in an order drawn per image.
        brightness: factor drawn from [max(0, 1 - x), 1 + x].
        contrast: as brightness.
        saturation: as brightness.
        hue: shift drawn from [-x, x] turns, at most 0.5.
        gray: probability of dropping colour (the channels stay, all equal).
        blur: probability of a Gaussian blur.
        sigma: of the blur, drawn uniformly, in pixels of the view; the kernel ends at 3 sigma.
        solarize: probability of inverting what is at least `threshold`.
        threshold: of solarize, in [0, 1].
        erase: probability of setting a random box of the view to 0.
        erase_scale: area of the erased box as a fraction of the view.
        erase_ratio: height / width of the erased box, drawn log-uniformly.
        bands: channels whose brightness and contrast are each drawn apart; 0 = those of all together.
        drop: probability of setting one of the bands to 0.
    """

    size: tuple[int, int]
    crop: float = 0.0
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    fraction: float = 1.0
    flip_x: float = 0.0
    flip_y: float = 0.0
    turn: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gray: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    threshold: float = 128 / 255
    erase: float = 0.0
    erase_scale: tuple[float, float] = (0.02, 0.33)
    erase_ratio: tuple[float, float] = (0.3, 3.3)
    bands: int = 0
    drop: float = 0.0

    def __post_init__(self) -> None:
        for name in _PROBABILITIES:
            _want(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; a probability is in [0, 1]")
        for name in ("brightness", "contrast", "saturation"):
            _want(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; wanted 0 (off) or more")
        _want(0 <= self.hue <= 0.5, f"hue is {self.hue} turns; wanted 0 (off) to 0.5")
        _want(min(self.size) >= 1, f"size is {self.size}; wanted (height, width) of at least 1 pixel")
        for name in ("scale", "erase_scale"):
            low, high = getattr(self, name)
            _want(0 < low <= high <= 1, f"{name} is ({low}, {high}); wanted (smallest, largest) area in (0, 1]")
        for name in ("ratio", "erase_ratio", "sigma"):
            low, high = getattr(self, name)
            _want(0 < low <= high, f"{name} is ({low}, {high}); wanted (smallest, largest), both above 0")
        _want(0 < self.fraction <= 1, f"fraction is {self.fraction}; wanted a share in (0, 1]")
        _want(0 <= self.threshold <= 1, f"threshold is {self.threshold}; pixels are in [0, 1]")
        _want(
            self.bands >= 0 and (self.bands > 1 or not self.drop),
            "drop leaves out one of many channels; the images have 1 or 3: set it to 0",
        )
        square = self.size[0] == self.size[1]
        _want(square or self.turn == 0, f"turn needs a square view, size is {self.size}; set turn to 0")

    def check_channels(self, channels: int) -> None:
        """Raises `UserError` naming the colour operations when the images are not RGB (`channels` != 3)."""
        used = [name for name in _COLOUR if getattr(self, name) > 0 and (name == "gray" or self.jitter > 0)]
        _want(
            channels == 3 or not used,
            f"{', '.join(used)} need 3 channels (red, green, blue), the images have {channels}; set them to 0",
        )

    def without_colour(self, channels: int) -> View:
        """The same for other images than RGB: no saturation, hue or loss of colour."""
        return self if channels == 3 else replace(self, saturation=0.0, hue=0.0, gray=0.0)


@dataclass(frozen=True)
class ViewRecipe:
    """What stands under `views:` in a recipe; None means the preset's own value.

    Args:
        preset: where the numbers come from: simclr, byol (asymmetric pair, also MoCo v3), dino (two global and
            further local crops), mae, vae, aavae (simclr's view, then the clean image, which no setting below touches),
            gray (simclr's without colour), overhead (no up and down, no hue), plain
            (evaluation).
            None stands for the method's own in training, and for simclr elsewhere.
        strength: factor on the colour jitter (SimCLR's s); None is 1, in training 0.5 below 96 px.
        blur: probability of the blur; 0 for small images.
        scale: (smallest, largest) area of the crop as a fraction of the image; in training (0.2, 1) below 96 px.
        hue: largest shift, in turns, before `strength`.
        gray: probability of dropping colour.
        flip_x: probability of a left-right mirror; 0 for digits and text.
        flip_y: probability of an upside-down mirror.
        solarize: probability of solarizing.
        turn: probability of a quarter, half or three-quarter turn.
        erase: probability of erasing a box.
        drop: probability of dropping one channel of many.
        local_size: side of the local crops of `dino` in pixels; the default is 96/224 of the view.
    """

    preset: Preset | None = None
    strength: float | None = None
    blur: float | None = None
    scale: tuple[float, float] | None = None
    hue: float | None = None
    gray: float | None = None
    flip_x: float | None = None
    flip_y: float | None = None
    solarize: float | None = None
    turn: float | None = None
    erase: float | None = None
    drop: float | None = None
    local_size: int | None = None

    def fitted(self, preset: Preset, size: tuple[int, int], channels: int) -> ViewRecipe:
        """What is left open here, chosen for a method's `preset` and images of `size` (height, width), `channels`."""
        chosen = self.preset or preset
        if channels != 3 and chosen in _COLOURFUL:
            say(f"views: saturation, hue and loss of colour are left out of {chosen} (no red, green and blue)")
        if min(size) >= _SMALL:
            return replace(self, preset=chosen)
        given: dict[str, Any] = {"strength": 0.5, "blur": 0.0} | ({"scale": _SMALL_SCALE} if chosen in _CROPPED else {})
        left_open = {name: value for name, value in given.items() if getattr(self, name) is None}
        return replace(self, preset=chosen, **left_open)

    def build(self, size: tuple[int, int], channels: int, count: int) -> tuple[View, ...]:
        """The `count` views (1 to 10) of one image; `size` (height, width) is that of the global ones.

        Raises:
            UserError: naming what does not fit: a number out of range, colour operations for `channels` != 3.
        """
        _want(1 <= count <= MAX_VIEWS, f"{count} views were asked for; wanted 1 to {MAX_VIEWS}")
        preset, strength = self.preset or "simclr", 1.0 if self.strength is None else self.strength
        _want(strength >= 0, f"strength is {strength}; wanted 0 (no colour jitter) or more")
        _want(preset in _PRESETS, f"preset is {preset!r}; wanted one of {', '.join(_PRESETS)}")
        local = [round(side * _LOCAL) if self.local_size is None else self.local_size for side in size]
        views = _PRESETS[preset](size, (max(1, local[0]), max(1, local[1])))
        made = [views[min(which, len(views) - 1)] for which in range(count)]
        made = [self._changed(view.without_colour(channels), channels) for view in made]
        for view in made:
            view.check_channels(channels)
        return tuple(made)

    def _changed(self, view: View, channels: int) -> View:
        if self.preset == "aavae" and view == plain(view.size):
            return view
        s = 1.0 if self.strength is None else self.strength
        changes: dict[str, Any] = {
            "brightness": view.brightness * s,
            "contrast": view.contrast * s,
            "saturation": view.saturation * s,
            "hue": min(0.5, (view.hue if self.hue is None else self.hue) * s),
        }
        own = {field.name for field in fields(self)} - {"preset", "strength", "hue", "local_size"}
        changes |= {name: getattr(self, name) for name in sorted(own) if getattr(self, name) is not None}
        if channels not in (1, 3) and (view.jitter > 0 or self.drop):
            changes["bands"] = channels
        if self.preset == "dino" and "scale" in changes and view.scale == _DINO_LOCAL:
            del changes["scale"]  # `scale` speaks of the global crops
        return replace(view, **changes)


def plain(size: tuple[int, int], fraction: float = 1.0) -> View:
    """Evaluation: the shorter side resized (antialiased), the centre cropped; no randomness.

    Args:
        size: (height, width) of the view.
        fraction: share of the shorter side that is kept; 1 keeps all of it.
    """
    return View(size=size, fraction=fraction)


_Views = tuple[View, ...]
_DINO_LOCAL = (0.05, 0.4)


def _simclr(size: tuple[int, int], local: tuple[int, int]) -> _Views:
    """Chen et al. 2020, arXiv:2002.05709, appendix A."""
    jittered = View(size, crop=1, flip_x=0.5, jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    return (replace(jittered, gray=0.2, blur=0.5),)


def _byol(size: tuple[int, int], local: tuple[int, int]) -> _Views:
    """Grill et al. 2020, arXiv:2006.07733, table 6; MoCo v3 (arXiv:2104.02057) uses the same pair."""
    jittered = View(size, crop=1, flip_x=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    return replace(jittered, gray=0.2, blur=1.0), replace(jittered, gray=0.2, blur=0.1, solarize=0.2)


def _dino(size: tuple[int, int], local: tuple[int, int]) -> _Views:
    """Caron et al. 2021, arXiv:2104.14294, section 3.1: BYOL's pair on large crops, then small local crops."""
    first, second = (replace(view, scale=(0.4, 1.0)) for view in _byol(size, local))
    return first, second, replace(first, size=local, scale=_DINO_LOCAL, blur=0.5)


def _mae(size: tuple[int, int], local: tuple[int, int]) -> _Views:
    """He et al. 2022, arXiv:2111.06377, appendix A.1 (there bicubic, here bilinear)."""
    return (View(size, crop=1, scale=(0.2, 1.0), flip_x=0.5),)


def _vae(size: tuple[int, int], local: tuple[int, int]) -> _Views:
    """Mild, because the view is also what is to be reconstructed; colours stay as they are."""
    return (View(size, crop=1, scale=(0.8, 1.0), flip_x=0.5),)


def _aavae(size: tuple[int, int], local: tuple[int, int]) -> _Views:
    """Falcon et al. 2021, arXiv:2107.12329, section 3: SimCLR's view goes in, the clean image is to come out."""
    return *_simclr(size, local), plain(size)


def _gray(size: tuple[int, int], local: tuple[int, int]) -> _Views:
    """SimCLR's without saturation, hue and loss of colour."""
    return (View(size, crop=1, flip_x=0.5, jitter=0.8, brightness=0.8, contrast=0.8, blur=0.5),)


def _overhead(size: tuple[int, int], local: tuple[int, int]) -> _Views:
    """Satellite and microscopy images: no up and down, sizes mean something, colours carry information."""
    turned = View(size, crop=1, scale=(0.2, 1.0), flip_x=0.5, flip_y=0.5, turn=0.75 if size[0] == size[1] else 0.0)
    return (replace(turned, jitter=0.8, brightness=0.4, contrast=0.4, blur=0.5),)


def _plain(size: tuple[int, int], local: tuple[int, int]) -> _Views:
    """No randomness: what evaluation sees."""
    return (plain(size),)


# view number `which` follows the entry of that number, and the last one from there on
_PRESETS: dict[str, Callable[[tuple[int, int], tuple[int, int]], _Views]] = {
    "simclr": _simclr,
    "byol": _byol,
    "dino": _dino,
    "mae": _mae,
    "vae": _vae,
    "aavae": _aavae,
    "gray": _gray,
    "overhead": _overhead,
    "plain": _plain,
}


def _want(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"views: {message}")
