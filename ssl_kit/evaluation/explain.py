"""What an encoder looks at: attention, features as colours, where a similarity comes from, typical images.

Functions of an encoder in eval mode and of images, without any randomness. `ssl-kit evaluate --only looks` draws them
for the report. They explain a number of this encoder (an attention, a cosine), not the image.

    letter   meaning
    B, C     images, channels
    H, W     height and width of an image in pixels
    T        tokens of a transformer: special ones (class, registers) in front, then patches row by row
    h, w     rows and columns of patches, or of the positions of a CNN's last feature map
    D        width of the features at one position
    N, K     images, classes
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ssl_kit.core.errors import UserError
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.vit import grid, positions

_STEPS = 32  # of the path of integrated gradients: Gauss-Legendre nodes
_AT_ONCE = 64  # images of that path per forward and backward pass
_OUTLIERS = 0.01  # of the positions at each end of a component, which take its extreme colour


def attends(encoder: Encoder) -> bool:
    """Whether `attention` can be read: the last block is a timm VisionTransformer's, with timm's plain attention."""
    model = encoder.model
    return isinstance(model, VisionTransformer) and isinstance(getattr(model.blocks[-1], "attn", None), Attention)


@torch.no_grad()
def attention(encoder: Encoder, images: Tensor) -> Tensor:
    """Attention of the last block, (B, heads, T, T): row t says how token t divides its attention; rows sum to 1.

    Args:
        encoder: one that `attends`.
        images: (B, C, H, W) float in [0, 1].
    """
    assert attends(encoder), encoder.name
    layer, found = encoder.model.blocks[-1].attn, []
    fused = layer.fused_attn
    hook = layer.attn_drop.register_forward_hook(lambda module, inputs, output: found.append(output))
    layer.fused_attn = False  # torch's fused kernel never holds the attention itself
    try:
        encoder.model.forward_features(encoder.normalise(images))
    finally:
        layer.fused_attn = fused
        hook.remove()
    return found[0].float()


def class_attention(encoder: Encoder, images: Tensor) -> Tensor:
    """(B, h, w): the share of the class token's attention that each patch gets, the mean over the heads.

    Caron et al. 2021, https://arxiv.org/abs/2104.14294, figure 1 (there one map per head). What special tokens get is
    missing from the sum of 1.
    """
    model = encoder.model
    assert model.has_class_token, f"{encoder.name} has no class token"
    rows = attention(encoder, images)[:, :, 0, model.num_prefix_tokens :].mean(dim=1)  # (B, h w)
    return rows.unflatten(1, grid(encoder, images))


@torch.no_grad()
def feature_map(encoder: Encoder, images: Tensor) -> Tensor:
    """(B, D, h, w): the last layer's features at every position; patches of a transformer, without special tokens.

    Raises:
        UserError: the model has no positions in a grid.
    """
    return positions(encoder, encoder.model.forward_features(encoder.normalise(images)), images).float()


def cosine_to(maps: Tensor, place: tuple[int, int]) -> Tensor:
    """(B, h, w) in [-1, 1]: the cosine of each position's features (B, D, h, w) to those at (row, column) `place`."""
    units = F.normalize(maps, dim=1)
    return (units * units[:, :, place[0], place[1], None, None]).sum(dim=1)


def feature_colours(maps: Tensor) -> Tensor:
    """(B, h, w, 3) in [0, 1]: features (B, D, h, w) as colours, equal where the features are equal.

    The first three principal components of all positions of all images are red, green and blue, each stretched over its
    range without the outermost 1 % (Oquab et al. 2023, https://arxiv.org/abs/2304.07193, figure 1, without its
    thresholding of the background). A component's sign is chosen so that its long tail is bright.
    """
    points = maps.movedim(1, 3).flatten(0, 2)  # (B h w, D)
    centred = points - points.mean(dim=0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:3]  # (<= 3, D)
    scores = centred @ directions.T  # (B h w, <= 3)
    scores = scores * torch.where(scores.pow(3).sum(dim=0) < 0, -1.0, 1.0)
    ends = torch.tensor([_OUTLIERS, 1 - _OUTLIERS])
    low, high = torch.quantile(scores, ends.to(scores), dim=0)
    spread = torch.where(high - low > 1e-6 * scores.abs().max(), high - low, torch.inf)  # one colour for a constant
    colours = ((scores - low) / spread).clamp(0, 1)
    colours = F.pad(colours, (0, 3 - colours.shape[1]), value=0.5)
    return colours.unflatten(0, (maps.shape[0], *maps.shape[2:]))


def similarity_map(encoder: Encoder, images: Tensor, others: Tensor) -> Tensor:
    """(B, h, w): what each position of the last feature map adds to the cosine of image b and other image b.

    Grad-CAM of a similarity (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, eq. 1 and 2, there of a class):

        alpha_k = mean over positions of dS / dA_k        map = h w sum_k alpha_k A_k

    of feature map A, without the paper's ReLU: negative positions speak against the similarity. S is the cosine, its
    derivative taken with the lengths of the two feature vectors held fixed. A cosine ignores the length, so that its
    full gradient is orthogonal to the features, and where one region is all there is, Grad-CAM would be 0. Then, and
    with the factor h w, the mean of the map is the cosine itself where features are the mean over positions
    (Stylianou et al. 2019, https://arxiv.org/abs/1901.00536).

    Args:
        encoder: with positions in a grid; one that pools by a class token gives patches no say of their own.
        images: (B, C, H, W) float in [0, 1].
        others: (B, C, H, W), what each is similar to.
    """
    with torch.no_grad():
        wanted = F.normalize(encoder(others), dim=1)
        features = encoder.model.forward_features(encoder.normalise(images))
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        vectors = encoder.head(features)
        cosines = (vectors * wanted).sum(dim=1) / vectors.detach().norm(dim=1).clamp_min(1e-12)
        gradient = torch.autograd.grad(cosines.sum(), features)[0]
    maps, slopes = (positions(encoder, each, images) for each in (features.detach(), gradient))
    alpha = slopes.mean(dim=(2, 3), keepdim=True)
    return (alpha * maps).sum(dim=1) * maps[0, 0].numel()


def integrated_gradients(
    encoder: Encoder, images: Tensor, others: Tensor, *, steps: int = _STEPS
) -> tuple[Tensor, Tensor]:
    """What each pixel adds to the cosine of image b and other image b, beginning at an image of the mean colour.

    Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365, by captum. The gradients are averaged along the straight
    path from the encoder's mean colour to the image; completeness: the attributions sum to the gain, up to the error
    of so many steps.

    Args:
        encoder: any.
        images: (B, C, H, W) float in [0, 1].
        others: (B, C, H, W), what each is similar to.
        steps: of the path.

    Returns:
        attributions (B, H, W), summed over channels, in units of the cosine; the gain in cosine (B,).

    Raises:
        UserError: the `explain` extra is missing.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise UserError(
            f"integrated gradients need the package {error.name}: pip install 'ssl-kit[explain]'"
        ) from error
    with torch.no_grad():
        wanted = F.normalize(encoder(others), dim=1)
    similarity = lambda pixels, unit: (F.normalize(encoder(pixels), dim=1) * unit).sum(dim=1)
    start = encoder.mean.expand_as(images).contiguous()
    with torch.enable_grad():
        attributions = IntegratedGradients(similarity).attribute(
            images, start, additional_forward_args=(wanted,), n_steps=steps, internal_batch_size=_AT_ONCE
        )
    with torch.no_grad():
        gain = similarity(images, wanted) - similarity(start, wanted)
    return attributions.sum(dim=1).detach(), gain


def prototypes(vectors: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per class the image nearest to the class's mean direction, and the image of another class nearest to it.

    An explanation by example and counter-example: what the features take for typical of a class, and what they take
    for the class although it is none. After Kim et al. 2016 (NeurIPS, "Examples are not enough, learn to criticize"),
    simpler: nearness is the cosine.

    Args:
        vectors: (N, D) features.
        labels: (N,) int64 in [0, K), -1 unknown: such images are neither.
        num_classes: K.

    Returns:
        Rows of the prototypes (K,) and counter-examples (K,) int64, -1 where there is none; their cosines (K, 2).
    """
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    rows = np.full((num_classes, 2), -1)
    cosines = np.full((num_classes, 2), np.nan)
    for label in range(num_classes):
        mean = units[labels == label].sum(axis=0)  # nothing where the class has no image
        scores = units @ (mean / max(float(np.linalg.norm(mean)), 1e-12))
        for side, members in enumerate((labels == label, (labels != label) & (labels >= 0))):
            if members.any() and (labels == label).any():
                rows[label, side] = np.flatnonzero(members)[scores[members].argmax()]
                cosines[label, side] = scores[rows[label, side]]
    return rows[:, 0], rows[:, 1], cosines
