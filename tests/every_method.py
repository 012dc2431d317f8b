"""All methods, found by themselves: every class in `ssl_kit/methods/` that derives from Method; small ones of each."""

import importlib
import inspect
import pkgutil

import ssl_kit.methods
from ssl_kit.encoders import Encoder
from ssl_kit.methods.method import Method

SIZE = (16, 16)


def methods():
    """The classes, in the order of their files."""
    files = [f"ssl_kit.methods.{one.name}" for one in pkgutil.iter_modules(ssl_kit.methods.__path__)]
    kinds = [kind for name in files for _, kind in inspect.getmembers(importlib.import_module(name), inspect.isclass)]
    return [kind for kind in dict.fromkeys(kinds) if issubclass(kind, Method) and kind is not Method]


def build(kind):
    """The method with its own kind of encoder, narrow where that is a ResNet."""
    name, args = kind.default_encoder(SIZE)
    if name == "resnet18_small":
        args = {**args, "channels": [8, 8, 16, 16]}
    return kind(encoder=Encoder(name, args, SIZE))
