"""The weight of the KL divergence that the particles' own noise implies: ``--beta implied``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.data import BatchLoader

if TYPE_CHECKING:
    from torch import Tensor

    from cryodrgn_amort.data import Particles


__all__ = ["ImpliedBeta"]

_SAMPLE = 512
_CHUNK = 64


class ImpliedBeta:
    """Twice the variance of the noise in a pixel: with it the loss is the ELBO, but for a factor.

    The variance is that of noise within the window (``Particles.windowed``). The noise is what the
    decoder leaves unexplained of the pixels that are compared: in the first epoch all, then what it
    left in the last one. The images of a tilt series share one KL divergence.

    Attributes
    ----------
    value
        The present one; 0: not known yet.
    """

    def __init__(self, particles: Particles) -> None:
        self._particles = particles
        self.value = 0.0

    def __call__(self, seen: int) -> float:
        """Return the present one, however many particles were ``seen``."""
        return self.value

    def begin(self, kept: Tensor | None = None) -> None:
        """Measure the power of a sample of the particles.

        Parameters
        ----------
        kept
            Which of the masked pixels are compared, `(P',)`; None: all.
        """
        p, total, pixels = self._particles, 0.0, 0
        sample = np.random.default_rng(0).permutation(p.n)[:_SAMPLE]
        loader = BatchLoader(p, None, memory=0)
        for index in torch.from_numpy(np.sort(sample)).split(_CHUNK):
            y = loader.read(index).y
            y = y if kept is None else y[:, kept]
            each = y.double().square().sum(1)
            sound = each[each.isfinite()]
            total, pixels = total + float(sound.sum()), pixels + len(sound) * y.shape[1]
        self.value = 0.0  # of other pixels
        self.learn(total / max(pixels, 1))

    def learn(self, unexplained: float) -> None:
        """Be told how large the squared error of a pixel is; it never rises."""
        p = self._particles
        value = 2 * unexplained / p.windowed / p.ntilts
        self.value = min(value, self.value) if self.value else value
