"""Exceptions that mean "the user can fix this", and the numbers that verbs take."""

import math
from collections.abc import Mapping

from ssl_kit.core.options import dashed

# Options that mean the same in every verb -> least and largest value; (: and ): the bound itself is too much
_RANGES = {
    **dict.fromkeys(("batch_size", "contrastive_batch", "threads", "channels", "image_size", "patience"), "[1, inf)"),
    **dict.fromkeys(("count", "views_per_image", "layers", "unfamiliar"), "[1, inf)"),
    **dict.fromkeys(("epochs", "minutes", "lr"), "(0, inf)"),
    **dict.fromkeys(("evaluate_every", "checkpoint_minutes", "weight_decay", "warmup_epochs"), "[0, inf)"),
    **dict.fromkeys(("mixup", "cutmix", "lora", "epoch", "outliers", "freeze"), "[0, inf)"),
    **dict.fromkeys(("fraction", "layer_decay", "recall"), "(0, 1]"),
    "limit": "[2, inf)",
    "processes": "[1, inf)",
    "per_machine": "[1, inf)",
    **dict.fromkeys(("ema", "level"), "(0, 1)"),
    "smoothing": "[0, 1)",
    "max_bad": "[0, 1]",
    "threshold": "[-1, 1]",
    "seed": f"[0, {2**32 - 1}]",  # of NumPy's and Lightning's generators
}


class UserError(ValueError):
    """A user's mistake: one line that says what was got, what was wanted and what to do.

    The command line prints the message and exits with 2; any other exception is our own mistake and exits with 1.
    """


class DamagedError(UserError):
    """A file that is missing, cut short or altered since it was written."""


def check_numbers(options: Mapping[str, object]) -> None:
    """Raises `UserError` for the first option whose number is out of its range, NaN or infinite.

    Args:
        options: of a verb, by name; what is None, no number, or has no range is left alone.
    """
    for name, value in options.items():
        numbers = value if isinstance(value, list | tuple) else (value,)
        for number in numbers if name in _RANGES else ():
            if not isinstance(number, int | float) or isinstance(number, bool):
                continue
            wanted = _RANGES[name]
            low, high = (float(bound) for bound in wanted[1:-1].split(","))
            above = number >= low if wanted[0] == "[" else number > low
            below = number <= high if wanted[-1] == "]" else number < high
            if not (math.isfinite(number) and above and below):
                raise UserError(f"{dashed(name)} {number}: wanted a number in {wanted}")
