"""Whether an encoder is as sure as it may be, and whether particles have what the decoder shows.

Both are asked with images that the run's own decoder makes up (``sleep``), so that their latents
are true by construction: simulation-based calibration (Talts et al., arXiv 1804.06788). Of a
Gaussian posterior the rank of the true latent among infinitely many draws is known without drawing
any. And where the decoder is right, latents gain as much of particles as of images made up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort import metrics
from cryodrgn_amort.feed import Feed
from cryodrgn_amort.inference import errors_at
from cryodrgn_amort.metrics import Measure, measure
from cryodrgn_amort.repair import AnchoredEncoder
from cryodrgn_amort.sleep import Sleep

if TYPE_CHECKING:
    from torch import Tensor

    from cryodrgn_amort.model import AmortVAE
    from cryodrgn_amort.particles import Batch, Particles
    from cryodrgn_amort.posteriors import Fitter

__all__ = ["LEVELS", "Calibration", "calibrate", "calibration_measures", "coverage"]

LEVELS = (50, 80, 95)
_SURE = 5.0  # standard errors
IMAGES = 1024
"""That are made up."""
_BATCH = 128


@dataclass(frozen=True)
class Calibration:
    """What an encoder makes of images made up, and of particles.

    Attributes
    ----------
    ranks
        Where the true latents of images made up are in their posteriors: cumulative probabilities
        `(M, zdim)`, uniform from 0 to 1 if the posteriors are right.
    sample, means
        Positions of the particles to compare with, `(M,)`, and the encoder's means `(M, zdim)`.
    gains, particle_gains
        By how much the encoder's latents explain images made up, and particles, better than the
        mean of all latents does: in nats, `(M,)` each.
    """

    ranks: np.ndarray
    sample: np.ndarray
    means: np.ndarray
    gains: np.ndarray
    particle_gains: np.ndarray


@torch.no_grad()
def calibrate(
    model: AmortVAE,
    particles: Particles,
    z: np.ndarray,
    logvar: np.ndarray,
    others: Fitter,
    seed: int,
) -> Calibration:
    """Compare an encoder's answers to images made up with the truth, and with those to particles.

    Parameters
    ----------
    particles, z, logvar
        Of the run: posteriors `(N, zdim)`, from which the true latents are drawn.
    others
        Holds the particles to compare with: held-out ones, if there are any.
    seed
        Of the images. With the same one, an encoder that was trained on such has seen them.
    """
    amort, device = model.amort, particles.device
    templates = amort.templates if isinstance(amort, AnchoredEncoder) else None
    means, logvars = (torch.from_numpy(part).to(device) for part in (z, logvar))
    # what images gain depends on the pose: each has its own, so that they are independent
    lesson = Sleep(model.fast, particles, means, logvars, templates, seed, poses=_BATCH, signals=1)
    feed = Feed(particles, None, memory=0)
    index = np.random.default_rng(seed).integers(particles.n, size=IMAGES)
    ranks, gains, centre = [], [], means.mean(0)
    for number, part in enumerate(torch.from_numpy(index).split(lesson.poses)):
        dream = lesson.dream_apart(feed.read(part), number)
        mean, log_variance = (part.double() for part in model.posterior(dream))
        assert dream.z is not None
        ranks.append(torch.special.ndtr((dream.z - mean) * torch.exp(-0.5 * log_variance)))
        gains.append(_gain(model, dream, mean.to(centre), centre))
    sample = np.sort(np.random.default_rng(seed).permutation(others.particles.n)[:IMAGES])
    answers, theirs = [], []
    for part in torch.from_numpy(sample).split(_BATCH):
        batch = others.feed.read(part)
        answer = others.answer(batch)
        assert answer is not None
        mean = answer[0].to(centre)
        answers.append(mean)
        theirs.append(_gain(others.model, batch, mean, centre))

    def joined(parts: list[Tensor]) -> np.ndarray:
        values: np.ndarray = torch.cat(parts).cpu().numpy()
        return values

    return Calibration(joined(ranks), sample, joined(answers), joined(gains), joined(theirs))


def _gain(model: AmortVAE, batch: Batch, mean: Tensor, centre: Tensor) -> Tensor:
    errors = errors_at(model, batch, torch.stack([centre.expand_as(mean), mean]))
    return -0.5 * errors.diff(dim=0)[0]


def coverage(ranks: np.ndarray, level: float) -> np.ndarray:
    """Share of the latent dimensions of each image `(M,)` within the central interval."""
    inside: np.ndarray = (np.abs(ranks - 0.5) <= level / 200).mean(1)
    return inside


def calibration_measures(found: Calibration, opts: dict[str, Any]) -> list[Measure]:
    """Measure how often central intervals hold the truth, and what particles lack."""
    measures = [
        measure(f"coverage_{level}", np.mean, coverage(found.ranks, level),
                null=None, ideal=level / 100, **opts)
        for level in LEVELS
    ]  # fmt: skip
    theirs = found.particle_gains[np.isfinite(found.particle_gains)]
    error = found.gains.std() / np.sqrt(len(found.gains))
    if len(theirs) and found.gains.mean() > _SURE * error:  # else it reads no images made up
        measures.append(
            metrics.measure_ratio("gain_ratio", theirs, found.gains, null=0.0, ideal=1.0, **opts)
        )
    return measures
