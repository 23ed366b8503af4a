"""The networks of Appendix B, behind the same interfaces as those of particles."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cryodrgn_amort.models import Encoder, LatentModel
from cryodrgn_amort.study.digits.data import BOX

if TYPE_CHECKING:
    from cryodrgn_amort.data import Batch


__all__ = ["BETA", "DigitNetwork", "DigitVAE"]

WIDTH = 256
ENCODER_LAYERS, DECODER_LAYERS = 3, 2

BETA = 2.0
"""Weight of the KL divergence. Errors are -2 log p(x | z), so that with 2 the ELBO is minimised."""


def _layers(sizes: list[int]) -> list[nn.Module]:
    """Make linear layers of these sizes, each with a ReLU."""
    pairs = itertools.pairwise(sizes)
    return [part for a, b in pairs for part in (nn.Linear(a, b), nn.ReLU())]


class DigitNetwork(Encoder):
    """Three hidden layers and a linear head each for mean and log variance (equation 18)."""

    def __init__(self, zdim: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(*_layers([BOX**2] + [WIDTH] * ENCODER_LAYERS))
        self.mean = nn.Linear(WIDTH, zdim)
        self.logvar = nn.Linear(WIDTH, zdim)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Encode what the batch shows."""
        assert batch.image is not None
        hidden = self.hidden(batch.image)
        return self.mean(hidden), self.logvar(hidden)


class DigitVAE(LatentModel, nn.Module):
    """Any encoder, and a decoder of two hidden layers whose pixels are Bernoulli probabilities.

    Attributes
    ----------
    decoder
        Latents `(B, zdim)` to the logits of the pixels, `(B, 784)`.
    """

    amort: Encoder

    def __init__(self, amort: Encoder, zdim: int) -> None:
        super().__init__()
        self.amort = amort
        last = nn.Linear(WIDTH, BOX**2)
        self.decoder = nn.Sequential(*_layers([zdim] + [WIDTH] * DECODER_LAYERS), last)

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z), each `(B, zdim)`."""
        mean, logvar = self.amort(batch)
        return mean, logvar

    def errors(self, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
        """Compare by twice the cross entropy; see ``LatentModel.errors``."""
        return cross_entropies(self.decoder(z), batch.y)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Return the pictures `(B, 28, 28)` that latents decode to, from 0 to 1."""
        logits: Tensor = self.decoder(z)
        return logits.sigmoid().view(-1, BOX, BOX)


def cross_entropies(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return twice the cross entropies `(B,)` of pictures `(B, 784)`, and before it their sum."""
    entropies = nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
    each = 2 * entropies.sum(1)
    return each.sum(), each.detach()
