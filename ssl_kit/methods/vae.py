"""VAE: auto-encoding variational Bayes, and its variants as arguments.

Kingma & Welling 2013, arXiv:1312.6114.

The encoder gives each image a Gaussian over codes, q(z|x); the decoder gives each code a density over images, p(x|z).
Minimised is the negative evidence lower bound (eq. 3 and 10), with the KL divergence in closed form (appendix B):

    -ELBO = -E_q(z|x)[log p(x|z)] + KL(q(z|x) || N(0, I)),        z = mu + sigma * epsilon, epsilon ~ N(0, I)

    symbol    here        meaning
    x         target      image to be explained, (B, C, H, W) in [0, 1]; D = C H W numbers
    mu        mu          mean of q(z|x), (B, d): the code; the encoder's own classifier
    sigma^2   logvar      ln of the variances of q(z|x), (B, d); a second linear layer on the same pooled features
    epsilon   normal()    drawn from the batch key, so that it does not depend on the process
    beta      beta        weight of the KL: beta-VAE, Higgins et al. 2017, openreview.net/forum?id=Sy2fzU9gl

`loss` is the mean over the images of -ELBO / D: in nats per dimension of the image it has the same size for small and
large images, and so has the learning rate. `reconstruction` and `kl` beside it are in nats per image, unweighted.

Free bits: Kingma et al. 2016, arXiv:1606.04934, eq. 15. AAVAE: Falcon et al. 2021, arXiv:2107.12329: an augmented view
goes in, the clean image is what is to be explained, and the KL is left out (`augmented: true, beta: 0`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key, uniform
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.methods.likelihoods import (
    Likelihood,
    bernoulli_log_likelihood,
    check_values,
    gaussian_log_likelihood,
    logistic_log_likelihood,
)
from ssl_kit.methods.method import Method, Picture
from ssl_kit.training.chunked import Batch, data_of
from ssl_kit.training.distributed import all_gather
from ssl_kit.training.optim import Optim

_NOISE, _PREFIX, _IMPORTANCE, _SAMPLES = 1010, 1011, 1012, 1013  # streams of core/random.py
_ACTIVE_VARIANCE = 0.01  # of mu over images: below it a unit says nothing (Burda et al. 2016, section 5.2)
_ACTIVE_NATS = 0.01  # likewise, of a dimension's mean KL
_START = 4  # pixels: shorter side of the decoder's first grid, about
_WIDEST = 512  # channels of the decoder, at most
_GROUPS = 8  # of group normalisation
_SCALE_GAIN = 3.0  # Adam moves a parameter by about lr a step, too slowly for a scale that must shrink by half
_SHOWN_UNITS, _SHOWN_STEPS, _SHOWN_SAMPLES = 8, 7, 8


def kl_to_prior(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) in nats, per image and dimension (appendix B): (B, d) and (B, d) to (B, d)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def with_free_bits(kl: Tensor, free_bits: float) -> Tensor:
    """Sum over the dimensions of max(free_bits, mean KL): (B, d) to a scalar, in nats per image (eq. 15 of IAF).

    A dimension that says less than `free_bits` nats is not pressed further. The mean is over the images of all
    processes, as one process would have it.
    """
    if free_bits == 0:
        return kl.sum(dim=1).mean()
    return all_gather(kl).mean(dim=0).clamp(min=free_bits).sum()


def normal(key: Key, stream: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """(B, count) standard normal numbers, float32, a pure function of the key (Box & Muller 1958)."""
    half = -(-count // 2)
    draws = uniform(key, stream, 2 * half, device)
    radius = (-2 * torch.log1p(-draws[:, :half])).sqrt()  # 1 - u is in (0, 1]: never ln 0
    angle = 2 * math.pi * draws[:, half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def explained_variance(target: Tensor, prediction: Tensor) -> Tensor:
    """1 - mean squared error / variance around the batch's mean image, in (-inf, 1]: (B, C, H, W) twice to a scalar."""
    error = (target - prediction).square().mean()
    return 1 - error / target.var(dim=0, correction=0).mean().clamp(min=1e-12)


class VAE(Method):
    """VAE with a convolutional decoder; beta-VAE, free bits, nested codes and AAVAE are arguments.

    The code is `mu`, so `embed(images)`, `encoder(images)` and one line of timm on the exported folder return it.

    Args:
        encoder: its classifier becomes the mu head.
        dim: d, length of the code.
        dims: train so that the first n numbers of the code are a code too, for each n of these (Matryoshka, Kusupati et
            al. 2022, arXiv:2205.13147); d is the largest. Each image's z is cut behind a length drawn from the key and
            continued by the prior mean 0 (nested dropout, Rippel et al. 2014, arXiv:1402.0915). The KL is always over
            the whole code: what is cut is still paid for, or it would be free to leave the prior.
        augmented: two views: the first goes in, the second is to be explained (AAVAE; views.preset aavae).
        likelihood: p(x|z). `gaussian`: one learned scale for all pixels, a density in nats. `bernoulli`: pixels that
            are 0 or 1. `logistic`: 256 levels, for pixels as stored (no crop or resize), one learned scale; the only
            one that gives bits per dimension.
        beta: weight of the KL; 1 is the VAE, 0 an autoencoder with noise in its code.
        free_bits: nats of KL per dimension that cost nothing.
        anneal_epochs: over which the weight of the KL rises linearly from 0 to `beta` (Bowman et al. 2016,
            arXiv:1511.06349); evaluation outside of training uses `beta`.
        decoder_width: channels of the decoder at half the image's resolution; doubled with every halving, up to 512.
        optim: optimiser and schedule.
    """

    kl_weight: Tensor
    prefixes: Tensor

    takes_groups = False  # a second view is what the decoder is to make of the first: the same image
    shows = (
        "Each image is squeezed into a short code and drawn again from it. What is lost, and what does each number of "
        "the code change?"
    )

    def __init__(
        self,
        encoder: Encoder,
        dim: int = 64,
        dims: tuple[int, ...] | None = None,
        augmented: bool = False,
        likelihood: Likelihood = "gaussian",
        beta: float = 1.0,
        free_bits: float = 0.0,
        anneal_epochs: float = 0.0,
        decoder_width: int = 64,
        optim: Optim = Optim(name="adamw", lr=1e-3, weight_decay=1e-4),  # noqa: B008 (frozen)
    ):
        super().__init__(encoder, optim)
        _check(dim, dims, beta, free_bits, anneal_epochs, decoder_width)
        self.dims = tuple(sorted(dims)) if dims else (dim,)
        self.augmented, self.likelihood = augmented, likelihood
        self.beta, self.free_bits, self.anneal_epochs = beta, free_bits, anneal_epochs
        self.num_views = 2 if augmented else 1
        encoder.set_code(self.dims[-1])
        self.logvar = nn.Linear(encoder.num_features, encoder.dim)
        nn.init.zeros_(self.logvar.weight)  # begin at the prior's variance, 1
        nn.init.zeros_(self.logvar.bias)
        self.decoder = Decoder(encoder.dim, encoder.channels, encoder.image_size, decoder_width)
        if likelihood != "bernoulli":
            self.scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("kl_weight", torch.tensor(float(beta)), persistent=False)
        self.register_buffer("prefixes", torch.tensor(self.dims), persistent=False)
        self._checked = False

    @property
    def preset(self) -> str:
        """Mild views, which are also what is to be reconstructed; SimCLR's, and clean targets, when `augmented`."""
        return "aavae" if self.augmented else "vae"

    def loss(self, views: list[Tensor], key: Key) -> dict[str, Tensor]:
        """-ELBO / D with the weight of the KL of this step.

        Returns:
            loss: nats per dimension of the image.
            reconstruction, kl: -log p(x|z) and KL in nats per image, unweighted; their sum is -ELBO.
            explained_variance: of the target by the decoder, 1 - mean squared error / variance over the batch: 0 where
                the code is ignored, 1 at best, whatever the likelihood.
            active_units: fraction of the dimensions of mu whose variance over the batch exceeds 0.01 (Burda et al.
                2016, arXiv:1509.00519, section 5.2).
            bits_per_dim: of the ELBO, with `likelihood: logistic` only.

        Raises:
            UserError: the target has not the encoder's size; at the first step, it holds values that the likelihood is
                not for.
        """
        target = self._target(views)
        mu, logvar = self.posterior(views[0])
        z = mu + (0.5 * logvar).exp() * normal(key, _NOISE, self.encoder.dim, mu.device)
        prediction = self.decode(self._cut(z, key))
        reconstruction = -self.log_likelihood(target, prediction).mean()
        kl = kl_to_prior(mu, logvar)  # (B, d)
        numbers = target[0].numel()
        loss = (reconstruction + self.kl_weight * with_free_bits(kl, self.free_bits)) / numbers
        with torch.no_grad():
            pieces = {
                "reconstruction": reconstruction.detach(),
                "kl": kl.sum(dim=1).mean(),
                "explained_variance": explained_variance(target, self.pixels(prediction)),
                "active_units": (mu.var(dim=0, correction=0) > _ACTIVE_VARIANCE).float().mean(),
            }
            if self.likelihood == "logistic":
                pieces["bits_per_dim"] = (pieces["reconstruction"] + pieces["kl"]) / (numbers * math.log(2))
        return {"loss": loss, **pieces}

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """q(z|x): (B, C, h, w) in [0, 1] to mu and logvar, (B, d) each, float32."""
        pooled = self.encoder.pooled(images)  # (B, num_features)
        return self.encoder.code(pooled), self.logvar(pooled).float()

    def decode(self, z: Tensor) -> Tensor:
        """p(x|z): (B, d) to the locations of its pixels, (B, C, H, W) float32; logits for `bernoulli`."""
        out = self.decoder(z).float()
        return out if self.likelihood == "bernoulli" else self.encoder.mean + self.encoder.std * out

    def pixels(self, prediction: Tensor) -> Tensor:
        """What `decode` gives as the mean image, (B, C, H, W); to be clipped to [0, 1] for the eye."""
        return prediction.sigmoid() if self.likelihood == "bernoulli" else prediction

    def log_likelihood(self, target: Tensor, prediction: Tensor) -> Tensor:
        """log p(x|z) in nats, for what `decode` gives: (B, C, H, W) twice to (B,)."""
        if self.likelihood == "bernoulli":
            return bernoulli_log_likelihood(target, prediction)
        if self.likelihood == "gaussian":
            return gaussian_log_likelihood(target, prediction, self.log_scale())
        return logistic_log_likelihood(target, prediction, self.log_scale())

    def log_scale(self) -> Tensor:
        """ln of the learned scale of p(x|z), in units of pixels in [0, 1]; begins at the spread of the images."""
        begin = 0.5 * self.encoder.std.square().mean().log()
        if self.likelihood == "logistic":
            begin = begin + math.log(math.sqrt(3) / math.pi)  # standard deviation = scale * pi / sqrt(3)
        return begin + _SCALE_GAIN * self.scale

    @torch.no_grad()
    def importance_weighted_nll(self, views: list[Tensor], key: Key, samples: int = 64, rows: int = 256) -> Tensor:
        """An upper bound on -log p(x), tighter than -ELBO and exact for many samples (arXiv:1509.00519, eq. 8).

        To be called in eval mode. Not weighted by `beta`, not cut by `dims`.

        Args:
            views: as `loss` takes them.
            key: the samples are drawn from it.
            samples: codes per image, k.
            rows: codes decoded at once; memory grows with it and not with `samples`.

        Returns:
            (B,) nats per image.
        """
        target = self._target(views)
        mu, logvar = self.posterior(views[0])
        dim, together = mu.shape[1], max(1, rows // samples)  # images drawn for at once
        bounds = []
        for first in range(0, len(mu), together):
            part = slice(first, first + together)
            own = Key(key.seed, key.epoch, key.index[part])
            epsilon = normal(own, _IMPORTANCE, samples * dim, mu.device).view(-1, dim)  # (images * k, d)
            image = torch.arange(len(own.index), device=mu.device).repeat_interleave(samples)
            weights = [
                self._log_weight(target[part][which], mu[part][which], logvar[part][which], drawn)
                for which, drawn in zip(image.split(rows), epsilon.split(rows), strict=True)
            ]
            bounds.append(torch.cat(weights).view(-1, samples).logsumexp(dim=1) - math.log(samples))
        return -torch.cat(bounds)

    def _log_weight(self, target: Tensor, mu: Tensor, logvar: Tensor, epsilon: Tensor) -> Tensor:
        """ln p(x|z) + ln p(z) - ln q(z|x) at z = mu + sigma epsilon; the (2 pi)^(d/2) cancel. (N, ...) to (N,)."""
        z = mu + (0.5 * logvar).exp() * epsilon
        ratio = 0.5 * (epsilon.square() + logvar - z.square()).sum(dim=1)
        return self.log_likelihood(target, self.decode(z)) + ratio

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Sets the weight of the KL for this step; a tensor, so that a compiled step need not be compiled again."""
        if self.anneal_epochs > 0:
            batches = self.trainer.global_step * self.trainer.accumulate_grad_batches
            epochs = batches / data_of(self.trainer).steps_per_epoch
            self.kl_weight.fill_(self.beta * min(1.0, epochs / self.anneal_epochs))

    def on_train_end(self) -> None:
        """What follows is evaluation: the full weight."""
        self.kl_weight.fill_(self.beta)

    def pictures(self, views: list[Tensor], key: Key) -> dict[str, Picture]:
        """Reconstructions, samples of the prior, interpolations and a traversal per active unit, by the decoder."""
        mu, logvar = self.posterior(views[0])
        made = {"reconstructions": self._reconstructions(views, mu)}
        if self.beta > 0:  # otherwise nothing ties the codes to the prior
            made["samples"] = self._samples(key)
        if len(mu) > 1:
            made["interpolations"] = self._interpolations(views[0], mu)
        activity = kl_to_prior(mu, logvar).mean(dim=0)  # (d,)
        if (activity > _ACTIVE_NATS).any():
            made["traversals"] = self._traversals(mu, logvar, activity)
        return made

    def _draw(self, codes: Tensor) -> Tensor:
        """(R, K, d) codes to (R, K, C, H, W) images in [0, 1]."""
        return self.pixels(self.decode(codes.flatten(0, 1))).clamp(0, 1).unflatten(0, codes.shape[:2])

    def _reconstructions(self, views: list[Tensor], mu: Tensor) -> Picture:
        kept = torch.arange(mu.shape[1], device=mu.device) < self.prefixes[:, None]  # (P, d)
        drawn = self._draw(mu[:, None] * kept)  # (B, P, C, H, W)
        given = torch.stack([F.interpolate(view, drawn.shape[-2:]) for view in views], dim=1)  # (B, V, C, H, W)
        names = ("input", "target") if self.augmented else ("image",)
        lengths = tuple(f"from {length}" for length in self.dims)
        caption = f"Decoded from mu, without noise, cut to so many of {mu.shape[1]} numbers; mean of p(x|z), clipped."
        return Picture(torch.cat([given, drawn], dim=1), (*names, *lengths), caption)

    def _samples(self, key: Key) -> Picture:
        rows = Key(key.seed, 0, torch.arange(_SHOWN_SAMPLES, device=key.index.device))
        dim = self.encoder.dim
        codes = normal(rows, _SAMPLES, _SHOWN_SAMPLES * dim, self.device).view(_SHOWN_SAMPLES, _SHOWN_SAMPLES, dim)
        return Picture(self._draw(codes), (), "Decoded from codes drawn from the prior, the same at every look.")

    def _interpolations(self, images: Tensor, mu: Tensor) -> Picture:
        pairs = len(mu) // 2
        start, end = mu[: 2 * pairs : 2, None], mu[1 : 2 * pairs : 2, None]  # (pairs, 1, d)
        share = torch.linspace(0, 1, _SHOWN_STEPS, device=mu.device)[:, None]
        drawn = self._draw(start + share * (end - start))
        shown = F.interpolate(images, drawn.shape[-2:])[:, None]  # (B, 1, C, H, W)
        grid = torch.cat([shown[: 2 * pairs : 2], drawn, shown[1 : 2 * pairs : 2]], dim=1)
        columns = ("image", *(f"{value:.2f}" for value in share.flatten().tolist()), "image")
        return Picture(grid, columns, "Decoded along the straight line between the codes of two images.")

    def _traversals(self, mu: Tensor, logvar: Tensor, activity: Tensor) -> Picture:
        units = activity.argsort(descending=True)[:_SHOWN_UNITS]
        units = units[activity[units] > _ACTIVE_NATS]  # (R,)
        middle, spread = mu.mean(dim=0), (mu.var(dim=0, correction=0) + logvar.exp().mean(dim=0)).sqrt()
        steps = torch.linspace(-3, 3, _SHOWN_STEPS, device=mu.device)
        codes = mu[:1].expand(len(units), _SHOWN_STEPS, -1).clone()  # the first image's
        rows = torch.arange(len(units), device=mu.device)
        codes[rows, :, units] = middle[units, None] + spread[units, None] * steps  # (R, K)
        told = ", ".join(f"{unit} ({activity[unit]:.1f})" for unit in units.tolist())
        caption = (
            "One dimension of the first image's code at a time, in standard deviations from its mean over the shown "
            f"images; most active first, dimension (KL in nats): {told}."
        )
        return Picture(self._draw(codes), tuple(f"{step:+.0f}" for step in steps.tolist()), caption)

    def _cut(self, z: Tensor, key: Key) -> Tensor:
        """z (B, d) with everything behind a drawn length of `dims` set to the prior mean, 0."""
        if len(self.dims) == 1:
            return z
        drawn = (uniform(key, _PREFIX, 1, z.device) * len(self.dims)).long()  # (B, 1)
        return z * (torch.arange(z.shape[1], device=z.device) < self.prefixes[drawn])

    def _target(self, views: list[Tensor]) -> Tensor:
        """The view that is to be explained, (B, C, H, W) float32, checked against the decoder and the likelihood."""
        target = views[-1].float()
        if tuple(target.shape[-2:]) != self.encoder.image_size:
            height, width = self.encoder.image_size
            raise UserError(
                f"VAE reconstructs images of {height} x {width} pixels, the views have {target.shape[-2]} x "
                f"{target.shape[-1]}; leave --grow out"
            )
        if not self._checked:  # once: it waits for the device
            check_values(target, self.likelihood)
            self._checked = True
        return target


class Decoder(nn.Module):
    """(B, d) to (B, C, H, W), any image size: a linear layer to a small grid, then transposed 4x4 convolutions.

    Each stage doubles the resolution and cuts the result to the next size (of sizes halved with rounding up). Group
    normalisation: no batch statistics, so that W processes equal one. The last stage gives the image straight from half
    its resolution: feature maps at full resolution would cost more than all the rest.

    Args:
        dim: d.
        channels: C.
        image_size: (H, W) in pixels.
        width: channels at half the resolution, a multiple of 8; doubled with every halving, up to 512.
    """

    def __init__(self, dim: int, channels: int, image_size: tuple[int, int], width: int):
        super().__init__()
        self.sizes = [image_size]  # from the image down to the first grid
        while min(self.sizes[-1]) > _START or len(self.sizes) == 1:
            height, width_px = self.sizes[-1]
            self.sizes.append((-(-height // 2), -(-width_px // 2)))
        widths = [min(width * 2**stage, max(width, _WIDEST)) for stage in range(len(self.sizes) - 1)]
        first_height, first_width = self.sizes[-1]
        self.first = nn.Linear(dim, first_height * first_width * widths[-1])
        outs = [channels, *widths[:-1]]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(_GROUPS, ins), nn.SiLU(), nn.ConvTranspose2d(ins, out, kernel_size=4, stride=2, padding=1)
            )
            for ins, out in reversed(list(zip(widths, outs, strict=True)))
        )
        with torch.no_grad():  # begin near the mean image, where a decoder without a code sits
            self.stages[-1].get_parameter("2.weight").mul_(0.1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, d) to (B, C, H, W)."""
        height, width = self.sizes[-1]
        # channels last in memory already: no copy before the first convolution
        out = self.first(z).view(len(z), height, width, -1).permute(0, 3, 1, 2)
        for stage, (height, width) in zip(self.stages, reversed(self.sizes[:-1]), strict=True):
            out = stage(out)[:, :, :height, :width]
        return out


def _check(
    dim: int, dims: tuple[int, ...] | None, beta: float, free_bits: float, anneal_epochs: float, decoder_width: int
) -> None:
    if dim < 1 or (dims is not None and (not dims or min(dims) < 1 or len(set(dims)) < len(dims))):
        raise UserError(f"VAE: got dim {dim} and dims {dims}; wanted lengths of at least 1, each once")
    if min(beta, free_bits, anneal_epochs) < 0:
        raise UserError(
            f"VAE: got beta {beta}, free_bits {free_bits}, anneal_epochs {anneal_epochs}; wanted 0 or more each"
        )
    if decoder_width < _GROUPS or decoder_width % _GROUPS:
        raise UserError(f"VAE: got decoder_width {decoder_width}; wanted a multiple of {_GROUPS}")
