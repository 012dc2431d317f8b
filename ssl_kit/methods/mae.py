"""MAE: masked autoencoders are scalable vision learners.

He, Chen, Xie, Li, Dollár & Girshick 2021, arXiv:2111.06377; the authors' code: github.com/facebookresearch/mae.

An image is cut into patches and most of them are removed. A Vision Transformer sees the rest; a small decoder sees its
tokens, with one mask token in each removed place, and predicts the pixels that were there. The decoder is thrown away
afterwards: the encoder of whole images is the representation.

    symbol  here         meaning
    r       mask_ratio   fraction of the patches that is removed
    L       num_patches  patches of an image
    K       num_kept     patches that the encoder sees, int(L (1 - r))
    M       L - K        patches that are removed and predicted
    P       values       numbers in a patch: p*q*C
    S       -            special tokens in front (class token, registers, or the code's); may be 0

The authors put the decoder's tokens back into the order of the image, predict all patches and mask the loss. A
transformer does not care for the order of its tokens, only for their positions: here the kept ones stay in front, the
positions are put into that order instead, and only removed patches are predicted. The numbers are the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key, uniform
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.vit import patchify, sincos_positions, take, tokens, unpatchify, vision_transformer
from ssl_kit.methods.method import Method, Picture
from ssl_kit.training.optim import Optim

_MASK, _LENGTH = 1_000, 1_001  # random streams
_GREY = 0.5  # of removed patches in pictures
_EPSILON = 1e-6  # of the variance, as in the authors' code


class Masking(NamedTuple):
    """Which patches are kept: `order` (B, L) int64 is a permutation of the patches, the `num_kept` kept ones first."""

    order: Tensor
    num_kept: int

    @property
    def keep(self) -> Tensor:
        """(B, K) int64, numbers of the kept patches."""
        return self.order[:, : self.num_kept]

    @property
    def removed(self) -> Tensor:
        """(B, M) int64, numbers of the removed patches."""
        return self.order[:, self.num_kept :]

    @property
    def restore(self) -> Tensor:
        """(B, L) int64, the inverse permutation (the authors' `ids_restore`): where in `order` each patch is."""
        return self.order.argsort(dim=1)

    @property
    def mask(self) -> Tensor:
        """(B, L) int64: 0 is kept, 1 is removed."""
        return (self.restore >= self.num_kept).long()


def random_masking(key: Key, num_patches: int, mask_ratio: float, device: torch.device | str | None = None) -> Masking:
    """Removes patches at random, each image for itself: the order of uniform noise drawn from its key (section 3).

    Keeps int(num_patches * (1 - mask_ratio)), as the authors' code does.
    """
    noise = uniform(key, _MASK, num_patches, device)  # (B, L)
    # stable: equal draws (24 bits) must not be ordered differently by another device
    return Masking(noise.argsort(dim=1, stable=True), int(num_patches * (1 - mask_ratio)))


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (unbiased variance + 1e-6) of each patch, (..., P) to (..., 1) each."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + _EPSILON).sqrt()


def reconstruction_loss(predicted: Tensor, patches: Tensor, norm_pix_loss: bool) -> Tensor:
    """Mean squared error over the removed patches (section 3, "Reconstruction target").

    Args:
        predicted: (B, M, P).
        patches: (B, M, P), pixels in [0, 1].
        norm_pix_loss: the target is the patch minus its mean, divided by its standard deviation.

    Returns:
        Scalar, float32 or better; with `norm_pix_loss`, (P - 1) / P for predictions of 0.
    """
    target = patches.float() if patches.dtype in (torch.bfloat16, torch.float16) else patches
    if norm_pix_loss:
        mean, deviation = patch_statistics(target)
        target = (target - mean) / deviation
    return F.mse_loss(predicted.to(target.dtype), target)


class Decoder(nn.Module):
    """Predicts the pixels of removed patches from the tokens of kept ones (section 3, "MAE decoder").

    Args:
        encoder_width: of the tokens that come in.
        values: P.
        grid: (rows, columns) of patches.
        depth: transformer blocks.
        width: of a token.
        heads: of the attention.
    """

    positions: Tensor

    def __init__(self, encoder_width: int, values: int, grid: tuple[int, int], depth: int, width: int, heads: int):
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("positions", sincos_positions(width, grid), persistent=False)  # (L, width)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, values)

    def forward(self, special: Tensor, kept: Tensor, masking: Masking) -> Tensor:
        """(B, S, width) special tokens and (B, K, width) embedded kept ones to the removed patches, (B, M, P)."""
        positions = self.positions[masking.order]  # (B, L, width), kept patches first
        kept = kept + positions[:, : masking.num_kept]
        removed = self.mask_token + positions[:, masking.num_kept :]
        sequence = self.blocks(torch.cat([special, kept, removed], dim=1))  # (B, S + L, width)
        return self.predict(self.norm(sequence[:, special.shape[1] + masking.num_kept :]))


class MAE(Method):
    """Masked autoencoder on one lightly augmented view.

    The representation is the encoder's own for whole images, as timm's argument `global_pool` has it: `token`, the
    class token, or `avg`, the mean of the patch tokens (`default_encoder`, which has no class token). With `avg` give
    `fc_norm: false` too: timm then normalises tokens before the mean, where the loss trains that norm.

    With `dims` the representation is a code of max(dims) numbers that can be cut at each of `dims`, by nested dropout
    (Rippel, Gelbart & Adams 2014, arXiv:1402.0915, section 2): the pooled tokens of the kept patches are mapped to
    the code by the encoder's classifier; of each image's code only the first k numbers are used and the rest is 0, k
    drawn uniformly from `dims`; a linear map of that is the one special token of the decoder, in place of the encoder's
    own. So each prefix learns what helps the decoder beyond the kept patches' tokens, which it sees as well.

    A new encoder gets the initialisation of the authors' code and fixed sine and cosine positions; one that was loaded
    from a folder keeps its weights. Positions are never trained.

    Args:
        encoder: any timm VisionTransformer with a plain patch embedding.
        mask_ratio: fraction of the patches that is removed; the paper's is 0.75.
        decoder_depth: transformer blocks of the decoder; the paper uses 8.
        decoder_width: of its tokens; the paper uses 512.
        decoder_heads: of its attention; the paper uses 16.
        norm_pix_loss: predict patches normalised by their own mean and standard deviation, which learns more.
        dims: lengths at which the code can be cut; None trains no code.
        optim: optimiser and schedule.
    """

    num_views = 1
    preset = "mae"
    judged_by = (
        "finetune",
        "attentive",
        "linear",
        "knn",
    )  # kNN below raw pixels, yet best fine-tuned
    shows = (
        "Most patches of an image are hidden; the encoder sees the others, and a decoder fills in what is hidden. "
        "Does it fill in what belongs there?"
    )
    lengths: Tensor

    def __init__(
        self,
        encoder: Encoder,
        mask_ratio: float = 0.75,
        decoder_depth: int = 2,
        decoder_width: int = 128,
        decoder_heads: int = 4,
        norm_pix_loss: bool = True,
        dims: tuple[int, ...] | None = None,
        optim: Optim = Optim(name="adamw", lr=1e-3, weight_decay=0.05, warmup_epochs=5),  # noqa: B008 (frozen)
    ):
        super().__init__(encoder, optim)
        model = vision_transformer(encoder)
        self.patch_size: tuple[int, int] = model.patch_embed.patch_size
        self.grid: tuple[int, int] = model.patch_embed.grid_size
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_special = model.num_prefix_tokens
        self.values = self.patch_size[0] * self.patch_size[1] * encoder.channels
        self.mask_ratio, self.norm_pix_loss, self.dims = mask_ratio, norm_pix_loss, dims
        _check(encoder, self.num_patches, self.values, mask_ratio, decoder_width, decoder_heads, norm_pix_loss, dims)
        if dims is not None:
            encoder.set_code(max(dims))
            self.register_buffer("lengths", torch.tensor(dims), persistent=False)
            self.code_token = nn.Linear(max(dims), decoder_width)
            initialise(self.code_token)
        self.decoder = Decoder(
            encoder.num_features, self.values, self.grid, decoder_depth, decoder_width, decoder_heads
        )
        initialise(self.decoder)
        nn.init.normal_(self.decoder.mask_token, std=0.02)
        if encoder.sha256 is None:
            initialise(model)
            if model.cls_token is not None:
                nn.init.normal_(model.cls_token, std=0.02)
            fix_positions(encoder)
        if encoder.model.pos_embed is not None:
            encoder.model.pos_embed.requires_grad_(False)

    @classmethod
    def default_encoder(cls, image_size: tuple[int, int]) -> tuple[str, dict[str, object]]:
        """ViTs without class token: 2.7 M parameters and patches of 4 (up to 48 px) or 8 (128 px), ViT-S/16 above."""
        pooling = {"class_token": False, "global_pool": "avg", "fc_norm": False}
        if max(image_size) > 128:
            return "vit_small_patch16_224", pooling
        patch_size = 4 if max(image_size) <= 48 else 8
        small = {"patch_size": patch_size, "embed_dim": 192, "depth": 6, "num_heads": 3}
        return "vit_tiny_patch16_224", {**small, **pooling}

    @classmethod
    def smaller_encoder(cls, image_size: tuple[int, int], narrow: int) -> tuple[str, dict[str, object]]:
        """0.8 M parameters, those of `mae_cifar10_tiny`; large images have none."""
        name, args = cls.default_encoder(image_size)
        return name, args | ({"embed_dim": 128, "depth": 4, "num_heads": 4} if "embed_dim" in args else {})

    def loss(self, views: list[Tensor], key: Key) -> dict[str, Tensor]:
        """Mean squared error of the removed patches."""
        masking = random_masking(key, self.num_patches, self.mask_ratio, views[0].device)
        used = None if self.dims is None else used_numbers(key, self.lengths, max(self.dims))
        predicted = self.predict(views[0], masking, used)
        patches = take(patchify(views[0], self.patch_size), masking.removed)
        return {"loss": reconstruction_loss(predicted, patches, self.norm_pix_loss)}

    def predict(self, images: Tensor, masking: Masking, used: Tensor | None = None) -> Tensor:
        """The removed patches from the kept ones, (B, M, P): normalised as the loss has it, or in [0, 1] roughly.

        Args:
            images: (B, C, H, W) in [0, 1].
            masking: of B images.
            used: (B, max(dims)) bool, numbers of the code that the decoder gets; None gives it all of them.
        """
        seen = tokens(self.encoder, images, masking.keep)  # (B, S + K, encoder width)
        special, kept = self.decoder.embed(seen).tensor_split([self.num_special], dim=1)
        if self.dims is not None:
            code = self.encoder.code(self.encoder.model.forward_head(seen, pre_logits=True))  # (B, max(dims))
            code = code if used is None else code * used
            special = self.code_token(code)[:, None]  # (B, 1, width)
        return self.decoder(special, kept, masking)

    def chance_loss(self, batch_size: int) -> float | None:
        """(P - 1) / P with `norm_pix_loss`: nothing is known of a patch; lower where images have flat patches."""
        return (self.values - 1) / self.values if self.norm_pix_loss else None

    @torch.no_grad()
    def pictures(self, views: list[Tensor], key: Key) -> dict[str, Picture]:
        """Image, what the encoder sees of it, and the decoder's prediction pasted where patches were removed."""
        images = views[0].float()
        masking = random_masking(key, self.num_patches, self.mask_ratio, images.device)
        patches = patchify(images, self.patch_size)  # (B, L, P)
        predicted = self.predict(images, masking).float()
        units = "Pixels as the decoder predicts them."
        if self.norm_pix_loss:
            mean, deviation = patch_statistics(take(patches, masking.removed))
            predicted = predicted * deviation + mean
            units = (
                "The decoder predicts patches without mean and contrast: both are taken from the original, so that "
                "only the structure inside a patch is predicted."
            )
        kept = take(patches, masking.keep)
        shown = [torch.full_like(predicted, _GREY), predicted.clamp(0, 1)]
        filled = [take(torch.cat([kept, removed], dim=1), masking.restore) for removed in shown]  # (B, L, P) each
        columns = [images, *(unpatchify(patches, self.patch_size, self.grid) for patches in filled)]
        caption = (
            f"Image; the {masking.num_kept} of {self.num_patches} patches that the encoder sees; the others filled in "
            f"by the decoder, visible ones as they are. {units}"
        )
        return {"reconstruction": Picture(torch.stack(columns, dim=1), ("image", "seen", "filled in"), caption)}


def used_numbers(key: Key, lengths: Tensor, dim: int) -> Tensor:
    """Nested dropout: (B, dim) bool, True for the first k numbers of each image's code, k drawn from `lengths`."""
    choice = (uniform(key, _LENGTH, 1, lengths.device) * len(lengths)).long()  # (B, 1)
    return torch.arange(dim, device=lengths.device) < lengths[choice]


def initialise(network: nn.Module) -> None:
    """The authors' `initialize_weights`, where it differs from timm's."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, PatchEmbed):
            nn.init.xavier_uniform_(module.proj.weight.flatten(1))  # a linear map of the patch's pixels


def fix_positions(encoder: Encoder) -> None:
    """Sets the encoder's position embedding to sines and cosines, if it has one; that of special tokens to 0."""
    model = encoder.model
    if model.pos_embed is None:
        return
    patches = sincos_positions(model.embed_dim, model.patch_embed.grid_size)
    special = patches.new_zeros(model.pos_embed.shape[1] - len(patches), model.embed_dim)
    with torch.no_grad():
        model.pos_embed.copy_(torch.cat([special, patches])[None])


def _check(
    encoder: Encoder,
    num_patches: int,
    values: int,
    mask_ratio: float,
    decoder_width: int,
    decoder_heads: int,
    norm_pix_loss: bool,
    dims: tuple[int, ...] | None,
) -> None:
    """Raises `UserError` for settings under which nothing would be seen, predicted or trained."""
    num_kept = int(num_patches * (1 - mask_ratio))
    if not 1 <= num_kept < num_patches:
        raise UserError(
            f"mask_ratio {mask_ratio:g} of {num_patches} patches keeps {num_kept}; wanted "
            "at least one kept and one removed: change --method.mask-ratio, or make patches smaller (patch_size)"
        )
    if decoder_width % decoder_heads:
        raise UserError(f"decoder_width {decoder_width} is not a multiple of decoder_heads {decoder_heads}")
    if norm_pix_loss and values < 2:
        raise UserError("norm_pix_loss needs patches of several numbers, got 1; choose a larger patch_size")
    if dims is not None and (not dims or min(dims) < 1):
        raise UserError(f"dims {dims}: wanted lengths of at least 1")
    model = encoder.model
    if model.pos_embed is None and getattr(model, "rope", None) is None:
        raise UserError(f"{encoder.name} has no position embedding; leave pos_embed out of --method.encoder.args")
    after = [part for part in (model.fc_norm, model.attn_pool, model.head) if part is not None and dims is None]
    if any(len(list(part.parameters())) for part in after):
        norm = "use_fc_norm" if isinstance(model, Eva) else "fc_norm"
        raise UserError(
            f"{encoder.name} has weights after its patch tokens that MAE would leave untrained; add {norm}: false "
            "to --method.encoder.args, choose global_pool avg or token, leave num_classes out, or train a code (dims)"
        )
