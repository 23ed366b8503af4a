"""How often posteriors hold the truth, and what particles lack next to images made up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cryodrgn_amort.measures.bootstrap import Measure, measure, measure_ratio

__all__ = ["LEVELS", "Calibration", "calibration_measures", "coverage"]

LEVELS = (50, 80, 95)
_SURE = 5.0  # standard errors


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


def coverage(ranks: np.ndarray, level: float) -> np.ndarray:
    """Share of the latent dimensions of each image `(M,)` within the central interval."""
    inside: np.ndarray = (np.abs(ranks - 0.5) <= level / 200).mean(1)
    return inside


def calibration_measures(found: Calibration, opts: dict[str, Any]) -> list[Measure]:
    """Measure how often central intervals hold the truth, and what particles lack."""
    measures = [
        measure(f"coverage_{level}", np.mean, coverage(found.ranks, level), **opts)
        for level in LEVELS
    ]  # fmt: skip
    theirs = found.particle_gains[np.isfinite(found.particle_gains)]
    error = found.gains.std() / np.sqrt(len(found.gains))
    if len(theirs) and found.gains.mean() > _SURE * error:  # else it reads no images made up
        measures.append(measure_ratio("gain_ratio", theirs, found.gains, **opts))
    return measures
