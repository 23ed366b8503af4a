"""Particles that the decoder cannot explain at any latent: noise, other molecules, wrong sign."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.core import bar
from cryodrgn_amort.inference import anchored

if TYPE_CHECKING:
    from torch import Tensor

    from cryodrgn_amort.data import Batch
    from cryodrgn_amort.study.validation.case import Case, Fits, Whitened


__all__ = ["misfits", "share_of_misfits"]

_TOGETHER = 64
_MADE = 1000


@torch.no_grad()
def misfits(case: Case, fits: Fits) -> tuple[np.ndarray, np.ndarray]:
    """Return how well each particle of a case is explained, and how likely less is: `(N,)` each.

    With the best of some latents, weighted by how well they explain the particle, f is what the
    decoder expects of it and y what it is, in units of the noise. Of a particle that is as f says,
    (f y - f f) / |f| has mean 0 and variance 1, whatever its CTF and view; of noise its mean is
    -|f|. The second result is the rank of a particle's value among those of images made up.
    """
    white = case.whitened(fits.spectrum)
    draw = case.generator()
    made = []
    repeats = -(-_MADE // len(fits.rows))
    for at in torch.arange(len(fits.rows)).repeat(repeats).split(_TOGETHER):
        made.append(_explained(case, white, case.made_up(fits, at, None, draw)[0]))
    own = [
        _explained(case, white, case.loader.read(index))
        for index in bar(torch.arange(case.particles.n).split(_TOGETHER), "misfits")
    ]
    values, known = (torch.cat(part).double().cpu().numpy() for part in (own, made))
    known = np.sort(known)
    values = np.where(np.isfinite(values), values, -np.inf)
    p = (1 + np.searchsorted(known, values, "right")) / (1 + len(known))
    return values, p


def _explained(case: Case, white: Whitened, batch: Batch) -> Tensor:
    z = anchored(white, batch, case.anchors, 1.0)[0]
    shown = case.decoded(batch, z) * white.gain
    size = shown.square().sum(1).sqrt().clamp(min=1e-6)
    return ((batch.y * white.gain - shown) * shown).sum(1) / size


def share_of_misfits(p: np.ndarray) -> float:
    """Return the share of particles that are not as the decoder says: more small p than by chance.

    Of particles as it says p is uniform: twice those above 0.5 are their number (Storey, J. R.
    Stat. Soc. B 64, 479, 2002).
    """
    return float(np.clip(1 - 2 * (p > 0.5).mean(), 0, 1))
