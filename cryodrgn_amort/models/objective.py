"""The training objective and its terms.

The ELBO (Kingma & Welling, arXiv 1312.6114; equation 8 of arXiv 2303.07487), scaled as cryoDRGN
scales it: mean squared error over the masked pixels plus ``beta`` KL / number of pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Losses", "divergence", "falling_rate", "kl_divergence", "losses"]


@dataclass(frozen=True)
class Losses:
    """One batch's objective, as scalar tensors: ``total`` is what is minimised.

    Attributes
    ----------
    gen_loss
        Mean error per pixel: of particles, the squared error of the masked Hartley image.
    kld
        KL divergence to the prior N(0, 1), in nats per particle.
    beta
        Weight of the KL divergence in this batch.
    """

    total: Tensor
    gen_loss: Tensor
    kld: Tensor
    beta: float | Tensor

    def clone(self) -> Losses:
        """Return copies that stay as they are."""
        return Losses(self.total.clone(), self.gen_loss.clone(), self.kld.clone(), self.beta)

    def detach(self) -> Losses:
        """Return the values without their graph."""
        return Losses(self.total.detach(), self.gen_loss.detach(), self.kld.detach(), self.beta)


def falling_rate(start: float, end: float, done: float) -> float:
    """Return the learning rate after a share of the training, from ``start`` to ``end``.

    Along half a cosine (Loshchilov & Hutter, arXiv 1608.03983, equation 5).
    """
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each row, in nats: `(B, zdim)` -> `(B,)`."""
    return -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp(), dim=1)


def divergence(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """KL of Gaussians ``a`` from ``b``, each mean and log variance `(B, zdim)`, in nats: `(B,)`."""
    ratio = torch.exp(a[1] - b[1])
    distance = (a[0] - b[0]).square() * torch.exp(-b[1])
    return 0.5 * (ratio + distance - 1 - a[1] + b[1]).sum(1)


def losses(
    mean: Tensor,
    logvar: Tensor,
    error: Tensor,
    pixels: int,
    size: int,
    beta: float | Tensor,
    beta_control: float | None = None,
) -> Losses:
    """Compute the objective of one batch, or one process's share of it, which are to be added up.

    Parameters
    ----------
    mean, logvar
        The posterior, `(B, zdim)`.
    error
        -2 log p(x | z) up to a constant, summed over the particles, a scalar: the squared error of
        their masked pixels, and of a tilt series its mean over the tilts, as the host has it.
    pixels, size
        Masked pixels of an image; particles in the whole batch.
    beta_control
        If given, ``beta`` is the KL that the objective pulls to, with this weight (the host's
        ``--beta-control``).
    """
    gen_loss = error / (pixels * size)
    kld = kl_divergence(mean, logvar).sum(dim=0) / size
    if beta_control is None:
        total = gen_loss + beta * kld / pixels
    else:
        total = gen_loss + beta_control * (beta - kld) ** 2 / pixels
    return Losses(total, gen_loss, kld, beta)
