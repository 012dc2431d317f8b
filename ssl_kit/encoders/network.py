"""Anybody's network as a model that timm knows by name, so that it trains, travels and loads like every other encoder.

An encoder folder says the name only: who loads it registers the network first. Nothing is imported because a folder
says so.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import timm
from timm.models import register_model
from torch import Tensor, nn

from ssl_kit.core.errors import UserError
from ssl_kit.core.sealed import Entries

Network: TypeAlias = nn.Module | Callable[[], nn.Module]

_OF_TIMM = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # what its factory hands on to every model
_GIVEN: dict[str, Callable[[], nn.Module]] = {}  # networks of this process, by name


class Given(nn.Module):
    """A network behind timm's interface: (B, C, H, W) to (B, dim), or to a map (B, dim, h, w) that is averaged.

    Args:
        module: the network; images come normalised.
        dim: length of its features.
        num_classes: outputs of a linear head on them; 0 = none.
    """

    def __init__(self, module: nn.Module, dim: int, num_classes: int = 0):
        super().__init__()
        self.module = module
        self.num_features = self.head_hidden_size = dim
        self.pretrained_cfg: Entries = {}
        self.reset_classifier(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, num_classes or dim)."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """What the network makes of images."""
        return self.module(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled, and through the head unless `pre_logits`."""
        pooled = features.mean((2, 3)) if features.ndim == 4 else features
        return pooled if pre_logits else self.head(pooled)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Another head."""
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


def register(network: Network, name: str | None = None) -> str:
    """Makes a network known by name in this process; registered again, the newer one counts.

    Args:
        network: a module with a number `dim`, the length of its features (B, dim); or a function that makes one. Of a
            module copies with fresh weights are made.
        name: by default that of its class.

    Returns:
        The name: letters, digits and underscores, lower case.

    Raises:
        UserError: it has no `dim`, or timm has a model of that name.
    """
    make = network if not isinstance(network, nn.Module) else lambda: _fresh(network)
    one = network if isinstance(network, nn.Module) else network()
    plain = re.sub(r"\W", "_", name or type(one).__name__).lower()
    if timm.is_model(plain) and plain not in _GIVEN:
        raise UserError(f"timm has a model called {plain!r}: give the network another name")
    dim = getattr(one, "dim", None)
    if not isinstance(dim, int) or dim < 1:
        raise UserError(f"{plain} states no `dim`: wanted a number, the length of its features (B, dim)")
    if plain not in _GIVEN:

        def build(pretrained: bool = False, num_classes: int = 0, in_chans: int = 3, **args: Any) -> Given:
            args = {key: value for key, value in args.items() if key not in _OF_TIMM}
            if args:
                raise UserError(f"{plain} takes no arguments, got {', '.join(args)}; see encoder.args")
            made = _GIVEN[plain]()
            return Given(made, int(made.dim), num_classes)  # type: ignore[arg-type]

        build.__name__ = plain
        register_model(build)
    _GIVEN[plain] = make
    return plain


def _fresh(module: nn.Module) -> nn.Module:
    """A copy with weights of its own, drawn anew where its layers know how."""
    made = copy.deepcopy(module)
    for part in made.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
    return made
