"""An accelerator where there is none: `pretended = pytest.fixture(accelerator)`."""

from collections import Counter

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Pretended(TorchFunctionMode):
    """Work for "cuda" is done here, so that its way through the code can be followed where there is none.

    Attributes:
        sent: values that went there, by their type.
    """

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        here = lambda one: "cpu" if isinstance(one, str | torch.device) and torch.device(one).type == "cuda" else one
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.to and here(args[1]) is not args[1]:
            self.sent[args[0].dtype] += args[0].numel()
        devices = {name: here(one) for name, one in (kwargs or {}).items() if name == "device"}
        args = tuple(map(here, args)) if func is Tensor.to else args
        return func(*args, **{**(kwargs or {}), **devices})


def accelerator():
    """An accelerator, as far as the code can tell."""
    with Pretended() as mode:
        yield mode
