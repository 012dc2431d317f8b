"""ResNets for small images, the protocol of every CIFAR table (SimCLR, arXiv:2002.05709, appendix B.9).

The stem is one 3x3 convolution of stride 1 and there is no max-pooling, so that a 32-px image enters the first stage
at full resolution. timm cannot express this through arguments, so the models are registered with timm's own registry:
`timm.create_model("resnet18_small", channels=(16, 32, 64, 128))` after `import ssl_kit.encoders`.
"""

from __future__ import annotations

from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

_STANDARD_CHANNELS = (64, 128, 256, 512)


def _config(size: int = 32) -> dict[str, Any]:
    return {
        "input_size": (3, size, size),
        "pool_size": (size // 8, size // 8),
        "num_classes": 0,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "first_conv": "conv1",
        "classifier": "fc",
    }


default_cfgs = generate_default_cfgs(
    {
        "resnet18_small.untrained": _config(),
        "resnet34_small.untrained": _config(),
        "resnet50_small.untrained": _config(),
    }
)


class SmallResNet(ResNet):
    """timm's ResNet with a 3x3 stem of `channels[0]` filters and no pooling after it.

    Args:
        block: timm's residual block.
        layers: blocks per stage.
        stem_stride: of the stem; 1 keeps the resolution, 2 buys twice the width for the same arithmetic.
        timm_arguments: as timm's ResNet takes them.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...],
        stem_stride: int = 1,
        **timm_arguments: Any,
    ):
        channels = tuple(timm_arguments.get("channels") or _STANDARD_CHANNELS)
        in_chans = timm_arguments.get("in_chans", 3)
        # timm fixes the plain stem at 64 filters; asked for a "deep" one it sizes everything after the stem by
        # 2 * stem_width, so that the stem that replaces it below can have as many filters as the first stage
        timm_arguments.update(channels=channels, stem_type="deep", stem_width=channels[0] // 2)
        super().__init__(block, layers, **timm_arguments)  # type: ignore[arg-type]  # timm's hint names instances
        stem = nn.Conv2d(in_chans, channels[0], kernel_size=3, stride=stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.conv1, self.maxpool = stem, nn.Identity()  # type: ignore[assignment]
        for info in cast(
            "list[dict[str, Any]]", self.feature_info
        ):  # timm states the reduction of each stage for a stem that divides by 4
            info["reduction"] = max(1, info["reduction"] // 4) * stem_stride


@register_model
def resnet18_small(pretrained: bool = False, **timm_arguments: Any) -> SmallResNet:
    """ResNet-18 for images below about 96 px; narrower or wider by `channels`."""
    return _create("resnet18_small", pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **timm_arguments)


@register_model
def resnet34_small(pretrained: bool = False, **timm_arguments: Any) -> SmallResNet:
    """ResNet-34 for images below about 96 px; narrower or wider by `channels`."""
    return _create("resnet34_small", pretrained, block=BasicBlock, layers=(3, 4, 6, 3), **timm_arguments)


@register_model
def resnet50_small(pretrained: bool = False, **timm_arguments: Any) -> SmallResNet:
    """ResNet-50 for images below about 96 px; narrower or wider by `channels`."""
    return _create("resnet50_small", pretrained, block=Bottleneck, layers=(3, 4, 6, 3), **timm_arguments)


def _create(variant: str, pretrained: bool, **timm_arguments: Any) -> SmallResNet:
    return build_model_with_cfg(SmallResNet, variant, pretrained, **timm_arguments)
