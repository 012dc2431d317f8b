"""Vision Transformers as masking methods see them: the tokens of a few patches, patches of pixels, fixed positions.

Any timm VisionTransformer or Eva with a plain patch embedding will do (vit_*, deit_*, eva02_*, vit_*_dinov3, ...).

    letter   meaning
    B, C     images, channels
    H, W     height and width of an image in pixels
    p, q     height and width of a patch in pixels
    L        patches of an image, H/p * W/q, numbered row by row
    K        patches that the transformer gets to see
    S        special tokens in front: class and register tokens; may be 0
"""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import Attention, AttentionRope, PatchEmbed
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_kit.core.errors import UserError
from ssl_kit.encoders.encoder import Encoder


def vision_transformer(encoder: Encoder) -> VisionTransformer | Eva:
    """The encoder's timm model, checked.

    Raises:
        UserError: it is neither a VisionTransformer nor an Eva, drops patches of its own accord, sees pixels of several
            patches in one token before its first block (a convolutional stem), or its patches do not tile its images.
    """
    model = encoder.model
    if not isinstance(model, VisionTransformer | Eva):
        raise UserError(
            f"{encoder.name} is a {type(model).__name__}; masking patches needs one of timm's VisionTransformers: "
            "choose for example --method.encoder.name vit_tiny_patch16_224"
        )
    if isinstance(model, Eva) and model.patch_drop is not None:  # inside the step that `tokens` asks for positions
        raise UserError(f"{encoder.name} drops patches itself: leave patch_drop_rate out of --method.encoder.args")
    if type(model.patch_embed) is not PatchEmbed:
        raise UserError(
            f"{encoder.name} embeds patches by {type(model.patch_embed).__name__}, which mixes the pixels of several; "
            "masking needs a plain patch embedding: choose for example --method.encoder.name vit_small_patch16_224"
        )
    (height, width), (p, q) = encoder.image_size, model.patch_embed.patch_size
    if height % p or width % q:
        raise UserError(
            f"images of {height} x {width} pixels are not whole patches of {p} x {q}; choose a multiple with "
            "--image-size, or another patch_size in --method.encoder.args"
        )
    return model


def tokens(
    encoder: Encoder, images: Tensor, keep: Tensor | None = None, instead: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The last layer's tokens, normalised, when the transformer sees the patches `keep` only.

    What the other patches show has no influence, nor what those show that `instead` covers. timm's own random dropping
    of patches (`patch_drop_rate`) is not applied in either case.

    Args:
        encoder: of a VisionTransformer or an Eva.
        images: (B, C, H, W) float in [0, 1].
        keep: (B, K) int64, numbers of the patches that are seen; None shows all, as timm's `forward_features`.
        instead: numbers of patches (B, M) int64, and the token (width,) that stands in the place of each.

    Returns:
        (B, S + K, width): the special tokens, then those of the kept patches in the order of `keep`.
    """
    model = vision_transformer(encoder)
    pixels = encoder.normalise(images)
    if keep is None and instead is None:
        return model.forward_features(pixels)
    embedded: Tensor = model.patch_embed(pixels)  # (B, L, width), or (B, H/p, W/q, width) of models for any size
    if instead is not None:
        numbers, token = instead
        flat = embedded.flatten(1, -2)
        places = numbers[:, :, None].expand(-1, -1, flat.shape[2])
        embedded = flat.scatter(1, places, token.to(flat.dtype).expand_as(places)).view_as(embedded)
    # the step of timm that adds positions and puts the special tokens in front has no public name
    # (B, S + L, width), of an Eva with its rotations
    placed: tuple[Tensor, Tensor | None] | Tensor = model._pos_embed(embedded)
    sequence, rotations = (placed, None) if isinstance(placed, Tensor) else placed
    special, patches = sequence.tensor_split([model.num_prefix_tokens], dim=1)
    if keep is None:
        keep = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
    sequence = model.norm_pre(torch.cat([special, take(patches, keep)], dim=1))  # (B, S + K, width)
    turns: list[dict[str, Tensor | None]] = [{}] * len(model.blocks)
    if isinstance(model, Eva):
        ropes = [None] * len(turns) if rotations is None else _rotations(rotations, keep, len(turns))
        turns = [{"rope": rope} for rope in ropes]
    for block, turn in zip(model.blocks, turns, strict=True):
        made = partial(block, **turn)
        sequence = checkpoint(made, sequence, use_reentrant=False) if model.grad_checkpointing else made(sequence)
    return model.norm(sequence)


def _rotations(whole: Tensor, keep: Tensor, depth: int) -> list[Tensor]:
    """Of each block the rotary embeddings (B, 1 or heads, K, D) of the kept patches; special tokens are not turned.

    Args:
        whole: (L, D) for all blocks, or (depth, heads, L, D): learned by each.
        keep: (B, K) int64.
        depth: blocks.
    """
    if whole.ndim == 2:
        return [whole[keep][:, None]] * depth
    return [block[:, keep].transpose(0, 1) for block in whole]  # (heads, L, D) to (B, heads, K, D)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows of each image by number: (B, N, D) and (B, K) int64 to (B, K, D)."""
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2]))


def checkpoint_activations(encoder: Encoder) -> None:
    """Lets a network keep only what enters its blocks, and compute the rest again in the backward pass.

    Chen et al. 2016, arXiv:1604.06174. Gradients are the same to the bit; of what a block makes nothing is kept.

    Raises:
        UserError: it has batch statistics, which the second pass would count twice, or no blocks that timm knows.
    """
    advice = "leave --activation-checkpointing out, or choose a ViT"
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in encoder.model.modules()):
        raise UserError(f"{encoder.name} has batch statistics, which would be counted twice; {advice}")
    try:
        encoder.model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:
        raise UserError(f"{encoder.name} has no blocks whose activations could be left out; {advice}") from error


def unfuse_attention(network: nn.Module) -> int:
    """Lets timm's attention layers multiply matrices instead of calling torch's fused kernel; how many there are.

    The result is the same up to rounding. In bfloat16 on a CPU the fused kernel is slow backwards (torch 2.14, one core
    with avx512_bf16, 64 tokens of 4 heads of 32, batch 256: 15 ms forward and 173 ms backward, against 10 and 15 ms),
    in float32 it is the better one. The price is memory: heads x tokens^2 numbers per image and layer are kept.
    """
    layers = [module for module in network.modules() if isinstance(module, Attention | AttentionRope | EvaAttention)]
    for layer in layers:
        layer.fused_attn = False  # type: ignore[misc]  # final for TorchScript, which is not used
    return len(layers)


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) to (B, L, p*q*C): patches row by row, in each of them pixels row by row, channels last.

    The order is that of MAE's code (`nhwpqc`). H and W are multiples of `patch_size`, (p, q).
    """
    (batch, channels, height, width), (p, q) = images.shape, patch_size
    split = images.reshape(batch, channels, height // p, p, width // q, q)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * q * channels)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (B, L, p*q*C) to (B, C, H, W); `grid` is (rows, columns) of patches."""
    (batch, _, values), (p, q), (rows, columns) = patches.shape, patch_size, grid
    split = patches.reshape(batch, rows, columns, p, q, values // (p * q))
    return split.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * p, columns * q)


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D positions: sines and cosines of the column in the first half, of the row in the second.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.5, once per axis; the order is that of MAE's code.

    Args:
        width: of a token, a multiple of 4.
        grid: (rows, columns) of patches.

    Returns:
        (L, width) float32; patch by patch, row by row.
    """
    if width % 4:
        raise UserError(f"tokens of width {width} cannot hold 2-D sine and cosine positions; wanted a multiple of 4")
    rate = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))  # radians per patch
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * rate for axis in (column, row)]  # (L, width/4) each
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()


def positions(encoder: Encoder, features: Tensor, images: Tensor) -> Tensor:
    """The model's last features of `images` as (B, D, h, w), whatever it is; without special tokens.

    Raises:
        UserError: the model has no positions in a grid.
    """
    model = encoder.model
    if features.ndim == 4:
        return features.movedim(3, 1) if getattr(model, "output_fmt", "NCHW") == "NHWC" else features
    places = grid(encoder, images)
    return features[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, places)


def grid(encoder: Encoder, images: Tensor) -> tuple[int, int]:
    """(rows, columns) of a transformer's patches.

    Raises:
        UserError: its tokens are not known to be a grid.
    """
    if not isinstance(encoder.model, VisionTransformer | Eva):
        raise UserError(f"{encoder.name} is a {type(encoder.model).__name__}, whose tokens are not known to be a grid")
    return encoder.model.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))
