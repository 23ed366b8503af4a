"""Is an encoder as sure as it may be? Its posteriors of images whose latents are known.

The images are made up by the run's own decoder (``sleep``), so that their latents are true by
construction: simulation-based calibration (Talts et al., arXiv 1804.06788). Of a Gaussian posterior
the rank of the true latent among infinitely many draws is known without drawing any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort.feed import Feed
from cryodrgn_amort.metrics import Measure, measure
from cryodrgn_amort.repair import AnchoredEncoder
from cryodrgn_amort.sleep import Sleep

if TYPE_CHECKING:
    from cryodrgn_amort.model import AmortVAE
    from cryodrgn_amort.particles import Particles

__all__ = ["LEVELS", "calibration_ranks", "coverage", "coverage_measures"]

LEVELS = (50, 80, 95)
_POSES = 32
_IMAGES = 1024
_BATCH = 128


@torch.no_grad()
def calibration_ranks(
    model: AmortVAE, particles: Particles, z: np.ndarray, logvar: np.ndarray, seed: int
) -> np.ndarray:
    """Return where the true latents of made-up images are in their posteriors.

    Parameters
    ----------
    z, logvar
        The run's posteriors `(N, zdim)`, from which the true latents are drawn.
    seed
        Of the images. With the same one, an encoder that was trained on such has seen them.

    Returns
    -------
    numpy.ndarray
        Cumulative probabilities `(M, zdim)`: uniform from 0 to 1 if the posteriors are right.
    """
    amort, device = model.amort, particles.device
    templates = amort.templates if isinstance(amort, AnchoredEncoder) else None
    means, logvars = (torch.from_numpy(part).to(device) for part in (z, logvar))
    lesson = Sleep(model.fast, particles, means, logvars, templates, seed, poses=_POSES)
    lesson.epoch_start(1)
    feed, found = Feed(particles, None, memory=0), []
    index = np.random.default_rng(seed).integers(particles.n, size=_IMAGES)
    for part in torch.from_numpy(index).split(_BATCH):
        dream = lesson.dream(feed.read(part))
        mean, log_variance = (part.double() for part in model.posterior(dream))
        assert dream.z is not None
        found.append(torch.special.ndtr((dream.z - mean) * torch.exp(-0.5 * log_variance)))
    ranks: np.ndarray = torch.cat(found).cpu().numpy()
    return ranks


def coverage(ranks: np.ndarray, level: float) -> np.ndarray:
    """Share of the latent dimensions of each image `(M,)` within the central interval."""
    inside: np.ndarray = (np.abs(ranks - 0.5) <= level / 200).mean(1)
    return inside


def coverage_measures(ranks: np.ndarray, opts: dict[str, Any]) -> list[Measure]:
    """Measure how often the central intervals of posteriors hold the truth."""
    return [
        measure(f"coverage_{level}", np.mean, coverage(ranks, level),
                null=None, ideal=level / 100, **opts)
        for level in LEVELS
    ]  # fmt: skip
