"""The ELBO of single particles, with the decoder as it is, and bounds on their likelihood.

Whatever has ``errors(batch, z)`` and ``errors_at`` can be a model here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from cryodrgn_amort.models import kl_divergence

if TYPE_CHECKING:
    from cryodrgn_amort.data import Batch


__all__ = [
    "Decoder",
    "ElboScale",
    "Posterior",
    "anchored",
    "drawn",
    "elbo",
    "importance_bound",
    "importance_ratios",
]

Posterior = tuple[Tensor, Tensor]
"""Means and log variances, each `(B, zdim)`."""


class Decoder(Protocol):
    """What explains the particles: see ``LatentModel.errors``."""

    def errors(self, batch: Batch, z: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return the total error, differentiable by z, and that of each particle `(B,)`."""
        ...

    def errors_at(self, batch: Batch, z: Tensor, /) -> Tensor:
        """Return the error of each particle at several latents `(K, B, zdim)`: `(K, B)`."""
        ...


@dataclass(frozen=True)
class ElboScale:
    """In what the ELBO is measured: -(error + beta KL) / (2 variance), in nats.

    Up to the same constant for all latents. With beta = 2 variance this is the ELBO of a model
    whose noise has that variance in each pixel.

    Attributes
    ----------
    beta
        Weight of the KL divergence, as in training.
    variance
        Of the noise; the host's normalisation makes that of the images 1.
    """

    beta: float
    variance: float = 1.0

    @classmethod
    def implied(cls, variance: float) -> ElboScale:
        """Return that of a model with this variance of the noise: its beta is implied."""
        return cls(2 * variance, variance)

    def elbo(self, error: Tensor, kl: Tensor) -> Tensor:
        """Return the ELBO of each particle, `(B,)`."""
        return (error + self.beta * kl) / (-2 * self.variance)


def drawn(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Return latents of a posterior `(B, zdim)`, one for each standard normal number."""
    return mean + noise * torch.exp(0.5 * logvar)


@torch.no_grad()
def elbo(
    model: Decoder, batch: Batch, posterior: Posterior, elbo_scale: ElboScale, draws: Tensor
) -> Tensor:
    """Measure the ELBO of each particle in nats, `(B,)`.

    Parameters
    ----------
    draws
        Standard normal noise `(K, B, zdim)`, used together with its opposite; the same for all
        posteriors that are to be compared.
    """
    mean, logvar = posterior
    z = drawn(mean, logvar, torch.cat([draws, -draws]))
    error = model.errors_at(batch, z).mean(0)
    return elbo_scale.elbo(error, kl_divergence(mean, logvar).to(error.dtype))


@torch.no_grad()
def importance_ratios(
    model: Decoder, batch: Batch, posterior: Posterior, elbo_scale: ElboScale, noise: Tensor
) -> Tensor:
    """Return log p(x, z) - log q(z) of K latents drawn from a posterior q: `(K, B)`.

    In nats up to the constant of the ELBO.

    Parameters
    ----------
    noise
        Standard normal, `(K, B, zdim)`.
    """
    mean, logvar = posterior
    z = drawn(mean, logvar, noise)
    prior, own = (-0.5 * at.square().sum(2) for at in (z, noise))
    log_q = own - 0.5 * logvar.sum(1)
    error = model.errors_at(batch, z)
    weight = elbo_scale.beta / (2 * elbo_scale.variance)
    return error / (-2 * elbo_scale.variance) + weight * (prior - log_q).to(error.dtype)


def importance_bound(ratios: Tensor) -> Tensor:
    """Estimate log p(x) from below by importance sampling (Burda et al., arXiv 1509.00519).

    In nats up to the constant of the ELBO, `(B,)`; it is tighter the more samples there are.

    Parameters
    ----------
    ratios
        See ``importance_ratios``, `(K, B)`.
    """
    return torch.logsumexp(ratios, 0) - math.log(len(ratios))


@torch.no_grad()
def anchored(
    model: Decoder, batch: Batch, anchors: Tensor, variance: float
) -> tuple[Tensor, Tensor]:
    """Return the mean of some latents, weighted by how well they explain each particle.

    Parameters
    ----------
    anchors
        `(K, zdim)`; all are equally likely beforehand.
    variance
        Of the noise.

    Returns
    -------
    mean
        `(B, zdim)`.
    least
        Smallest error of each particle at an anchor, `(B,)`.
    """
    size = len(batch.index)
    error = model.errors_at(batch, anchors[:, None].expand(-1, size, -1))
    weights = torch.softmax(error / (-2 * variance), 0).nan_to_num(1 / len(anchors))
    return weights.to(anchors.dtype).T @ anchors, error.amin(0)
