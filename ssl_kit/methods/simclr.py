"""SimCLR: a simple framework for contrastive learning of visual representations.

Chen, Kornblith, Norouzi & Hinton 2020, arXiv:2002.05709.

Two random views of each image pass through the encoder f and a projection head g. The loss (eq. 1, NT-Xent) asks each
view to find the other view of its image among the 2N - 1 other views of the batch. The head is thrown away afterwards:
h = f(x) is the representation.

    symbol  here          meaning
    N       B             images in the batch (all processes together)
    h_i     features      f(x_i), (2B, dim)
    z_i     z             g(h_i), L2-normalised, (2B, d)
    s_ij    s             z_i . z_j / tau
    tau     temperature   scale of the similarities

Like the authors' code and unlike eq. 1's sum over pairs, the loss is the mean over all 2N anchors, which is the same.

Two options go beyond the paper: the decoupled loss (Yeh et al. 2022, arXiv:2110.06848), which learns better from small
batches, and a nested code (Kusupati et al. 2022, arXiv:2205.13147), which can be cut to fewer dimensions afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.methods.method import Method
from ssl_kit.methods.parts import flatten_views, mlp
from ssl_kit.training.distributed import all_gather, counts, others, rank, world_size
from ssl_kit.training.optim import Optim


class SimCLR(Method):
    """SimCLR with a projection head of linear layers, batch norm and ReLU.

    Args:
        encoder: f.
        temperature: tau; the paper uses 0.5 for CIFAR-10 with long schedules and 0.1 for ImageNet.
        projection: widths of the head's layers; the last one is d.
        decoupled: leave the positive pair out of the denominator of the loss.
        dims: train a code of max(dims) values, the encoder's timm classifier, so that its first dims[0], dims[1], ...
            values serve alone: each prefix has its own head, and the loss is the mean of theirs.
        bfloat16: multiply in bfloat16 in the loss; see `nt_xent`.
        optim: optimiser and schedule.
    """

    num_views = 2
    compares_images = True

    def __init__(
        self,
        encoder: Encoder,
        temperature: float = 0.2,
        projection: tuple[int, ...] = (512, 128),
        decoupled: bool = False,
        dims: tuple[int, ...] | None = None,
        bfloat16: bool = False,
        optim: Optim = Optim(name="sgd", lr=0.5, weight_decay=5e-4),  # noqa: B008 (frozen)
    ):
        super().__init__(encoder, optim)
        if not temperature > 0:
            raise UserError(f"temperature {temperature}: wanted more than 0")
        if not projection or min(projection) < 1:
            raise UserError(f"projection {list(projection)}: wanted the widths of its layers, at least 1 each")
        if dims is not None:
            if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
                raise UserError(f"dims {list(dims)}: wanted different lengths of at least 1, such as [16, 64, 256]")
            encoder.set_code(max(dims))
        self.temperature, self.decoupled = temperature, decoupled
        self.in_bfloat16 = bfloat16  # Module.bfloat16 is a method
        self.dims = dims or (encoder.dim,)
        self.heads = nn.ModuleList(mlp(dim, projection, last_norm=True) for dim in self.dims)  # authors' `resnet_v2`

    def loss(self, views: list[Tensor], key: Key) -> dict[str, Tensor]:
        """NT-Xent between the two views."""
        return self.contrast(self.project(views, key), key.group)

    def project(self, views: list[Tensor], key: Key) -> Tensor:
        """The projections of all heads side by side, (2B, heads * d), first view above second."""
        features = self.encoder(flatten_views(views))  # (2B, dim)
        return torch.cat([head(features[:, :dim]) for head, dim in zip(self.heads, self.dims, strict=True)], dim=1)

    def contrast(self, z: Tensor, group: Tensor | None = None) -> dict[str, Tensor]:
        """The mean loss over the heads from their projections, (2B, heads * d), of images of `group` (B,)."""
        losses = [
            nt_xent(part, self.temperature, decoupled=self.decoupled, bfloat16=self.in_bfloat16, group=group)
            for part in z.chunk(len(self.heads), dim=1)
        ]
        return {"loss": torch.stack(losses).mean()}

    def chance_loss(self, batch_size: int) -> float:
        """ln(2N - 1): every view looks the same; ln(2N - 2) decoupled."""
        return math.log(max(1, 2 * batch_size - 1 - self.decoupled))


def nt_xent(
    z: Tensor, temperature: float, *, decoupled: bool = False, bfloat16: bool = False, group: Tensor | None = None
) -> Tensor:
    """Normalised temperature-scaled cross-entropy (SimCLR eq. 1), mean over all anchors of this process.

    With p(i) the other view of i's image, and the negatives of i all views of other images,

        loss_i = -log( exp(s_ip) / (exp(s_ip) + sum_negatives exp(s_ij)) ) = -log sigmoid(s_ip - n_i),
        n_i = log sum_negatives exp(s_ij);    decoupled (DCL, Yeh et al. 2022): n_i - s_ip

    `_LogNegatives` computes n without holding the matrix s, `_whole` with it, where that is faster.

    With several processes the other processes' views are negatives too: the mean of the losses over the processes, each
    weighted by its share of the images, and its gradient, are those of one process on the joined batch.

    Args:
        z: (2B, d) projections, first view in rows 0..B-1, second view of the same images in rows B..2B-1; any norm.
        temperature: tau > 0.
        decoupled: leave the positive pair out of the denominator.
        bfloat16: multiply in bfloat16, with sums in float32, from 512 rows on: the gradient is off by about 2e-4 of
            its norm and twice as fast at 4,096 rows on a CPU that has bfloat16. The default is float32.
        group: (B,) int64: images of one number, -1 aside, belong together and are no negatives of each other. Where
            none is left the loss is 0, decoupled -s_ip.

    Returns:
        Scalar, float32 or better; ln(2B - 1) when all projections are equal, ln(2B - 2) decoupled.

    Raises:
        UserError: there is one image only, hence no negative: the loss would be 0, or infinite decoupled.
    """
    if len(z) == 2 and world_size() == 1:
        raise UserError("the loss compares images: got a step of one image, wanted two or more; raise --batch-size")
    with torch.autocast(z.device.type, enabled=False):
        z = _unit(z.float() if z.dtype in (torch.bfloat16, torch.float16) else z)  # (2B, d)
        group = None if group is None else group.repeat(2)  # (2B,)
        everywhere = counts(len(z), per_image=2)
        if _fits(z, everywhere) and not decoupled:
            return _whole(z, temperature, group, everywhere)
        positive = (z * z.roll(len(z) // 2, dims=0)).sum(dim=1) / temperature  # (2B,)
        negative: Tensor = _LogNegatives.apply(z, temperature, bfloat16, group, everywhere)  # (2B,)
        if decoupled and group is not None:
            negative = torch.where(negative.isneginf(), 0.0, negative)
        losses = negative - positive if decoupled else -F.logsigmoid(positive - negative)
        return losses.mean()


def _fits(z: Tensor, everywhere: list[int]) -> bool:
    """Whether the whole matrix of similarities is faster than blocks of it; the same for all processes."""
    if z.is_cpu:
        return len(z) <= _SMALL and world_size() == 1
    return max(everywhere) * sum(everywhere) <= _MOST


def _whole(z: Tensor, temperature: float, group: Tensor | None, everywhere: list[int]) -> Tensor:
    """Eq. 1 as it stands: unit rows (2B, d) of this process against those of all, M = sum(everywhere)."""
    s = z @ all_gather(z, everywhere).T / temperature  # (2B, M)
    own = sum(everywhere[: rank()]) if world_size() > 1 else 0  # where this process's rows begin
    s.diagonal(own).fill_(-math.inf)  # a view is not its own candidate
    other = own + torch.arange(len(z), device=z.device).roll(len(z) // 2)
    if group is not None:
        groups = all_gather(group, everywhere)
        s = s.masked_fill(_together(group, groups).scatter(1, other[:, None], False), -math.inf)
    return F.cross_entropy(s, other)


def _together(rows: Tensor, others: Tensor) -> Tensor:
    """(R, M) bool: whether an image of group `rows` (R,) and one of group `others` (M,) belong together."""
    return (rows[:, None] == others) & (rows >= 0)[:, None]


def _unit(z: Tensor) -> Tensor:
    """(N, d) to rows of length 1; a row without direction stays 0 and gets no gradient, where F.normalize's is 1e12."""
    return torch.where(z.detach().norm(dim=1, keepdim=True) > 1e-12, F.normalize(z, dim=1), 0.0)


# The similarities in blocks. Plainly, n is
#
#     candidates = own rows, then those of the others           (M, d), the views of all processes
#     s = z @ candidates.T / tau                                (2B, M)
#     s[i, i] = s[i, p(i)] = -inf                               neither itself nor its other view, nor its group's
#     n = s.logsumexp(dim=1)                                    (2B,)
#
# and with g_i = dL/dn_i and P_ij = exp(s_ij - n_i) the gradient of the sum over processes is, s being symmetric,
#
#     dL/dz_i = 1/tau sum_j (g_i P_ij + g_j P_ji) z_j           j over the negatives of i
#
# Both passes go through s by blocks of rows. A block holds the columns from its own first row on, and what it is for
# its rows it is, transposed, for its columns: each pair is multiplied once. Nothing larger than a block is ever held,
# and processes exchange z, n and g, never s. Powers are of 2, because exp2 is four times as fast as exp on some CPUs
# (torch hands exp to MKL).

_SMALL = 512  # rows up to which the whole matrix is faster on CPUs (64: 0.4 against 1.1 ms, 256: 1.3 against 2.1)
_MOST = 2**26  # similarities up to which it is on accelerators (1,024 rows: 0.9 against 3.1 ms on an H200)
_BLOCK, _DEVICE_BLOCK = 256, 1_024  # rows: what stays in a cache, what keeps an accelerator busy
_SAFE = 60.0  # |s| in base 2 up to which powers, their sums and their reciprocals fit into float32: tau >= 0.024


class _Context(FunctionCtx):
    temperature: float
    bfloat16: bool
    group: Tensor | None
    everywhere: list[int]
    saved_tensors: tuple[Tensor, Tensor, Tensor]


class _LogNegatives(torch.autograd.Function):
    """(2B, d) unit rows of two images or more, first view above second, to n (2B,)."""

    @staticmethod
    def forward(
        context: _Context, z: Tensor, temperature: float, bfloat16: bool, group: Tensor | None, everywhere: list[int]
    ) -> Tensor:
        context.temperature, context.bfloat16, context.everywhere = temperature, bfloat16, everywhere
        candidates = _own_first(z, everywhere)
        group = None if group is None else _own_first(group, everywhere)
        context.group = group
        n = z.new_full((len(z),), -math.inf)  # base 2
        for here, s in _blocks(z, candidates, temperature, bfloat16, group):
            below = slice(here.stop, len(z))
            mirrored = s[:, len(s) : len(z) - here.start]  # for the rows below, whose own blocks lack it
            if _safe(temperature):
                s.exp2_()
                sums = s.sum(dim=1).log2(), mirrored.sum(dim=0).log2()
            else:
                sums = _log2_sum(s, 1), _log2_sum(mirrored, 0)
            n[here] = torch.logaddexp2(n[here], sums[0])
            n[below] = torch.logaddexp2(n[below], sums[1])
        context.save_for_backward(z, candidates, n)
        return n * math.log(2)

    @staticmethod
    @once_differentiable
    def backward(context: _Context, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        z, candidates, n = context.saved_tensors
        temperature, bfloat16 = context.temperature, context.bfloat16
        n, g = _own_first(torch.stack([n, g], dim=1), context.everywhere).unbind(dim=1)  # (M,) each
        if context.group is not None:  # where no negative is left g is 0, and 0 times infinity would be NaN
            n = torch.where(n.isneginf(), 0.0, n)
        scaled = g * torch.exp2(-n)
        gradient = torch.zeros_like(z)
        weights = z.new_empty(_block(z) * len(candidates))
        low = candidates.bfloat16() if bfloat16 else candidates
        for here, s in _blocks(z, candidates, temperature, bfloat16, context.group):
            w, after = weights[: s.numel()].view_as(s), slice(here.start, None)
            if _safe(temperature):  # powers of s once, for both directions
                torch.add(scaled[here, None], scaled[after], out=w)
                w.mul_(s.exp2_())
            else:
                torch.mul(torch.exp2(s - n[here, None]), g[here, None], out=w)
                w.addcmul_(torch.exp2(s - n[after]), g[after])
            w = w.to(low.dtype)
            gradient[here] += w @ low[after]
            gradient[here.stop :] += w[:, len(s) : len(z) - here.start].T @ low[here]
        return gradient.div_(temperature), None, None, None, None


def _blocks(
    z: Tensor, candidates: Tensor, temperature: float, bfloat16: bool, group: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Rows a..b-1 of z and their s (b - a, M - a) in base 2, from column a on; -inf where there is no negative."""
    pairs = len(z) // 2
    scaled = z / (temperature * math.log(2))
    if bfloat16:
        scaled, candidates = scaled.bfloat16(), candidates.bfloat16()
    block = _block(z)
    buffer = z.new_empty(block * len(candidates))
    for start in range(0, len(z), block):
        here = slice(start, min(start + block, len(z)))
        shape = (here.stop - start, len(candidates) - start)
        s = buffer[: math.prod(shape)].view(shape)
        if bfloat16:
            s.copy_(scaled[here] @ candidates[start:].T)
        else:
            torch.mm(scaled[here], candidates[start:].T, out=s)
        s.diagonal().fill_(-math.inf)  # itself
        s.diagonal(pairs)[: max(0, pairs - start)].fill_(-math.inf)  # the second view of a first one
        s.diagonal(-pairs).fill_(-math.inf)  # the first view of a second one, where one block holds both
        if group is not None:
            s.masked_fill_(_together(group[here], group[start:]), -math.inf)
        yield here, s


def _block(z: Tensor) -> int:
    return min(len(z), _BLOCK if z.is_cpu else _DEVICE_BLOCK)


def _own_first(rows: Tensor, everywhere: list[int]) -> Tensor:
    """(2B, ...) of this process, then the rows of the others: (M, ...)."""
    return torch.cat([rows, others(rows, everywhere)]) if world_size() > 1 else rows


def _safe(temperature: float) -> bool:
    return 1 / (temperature * math.log(2)) <= _SAFE


def _log2_sum(s: Tensor, dim: int) -> Tensor:
    """log2 of the sum of 2^s along `dim`, for s of any size; -inf where all are."""
    most = s.amax(dim=dim, keepdim=True).clamp_min(torch.finfo(s.dtype).min)
    return torch.exp2(s - most).sum(dim=dim).log2() + most.squeeze(dim)
