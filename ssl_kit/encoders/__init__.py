"""Encoders are timm models that normalise their own input and travel as a timm folder.

Importing this package registers the small-image ResNets (`resnet18_small`, ...) with timm, so that
`timm.create_model("local-dir:RUN/encoder", pretrained=True)` finds them.
"""

from ssl_kit.core.named import find_encoder
from ssl_kit.encoders import small
from ssl_kit.encoders.encoder import Encoder

__all__ = ["Encoder", "find_encoder", "small"]
