"""How often posteriors hold the truth, and what particles lack next to images made up.

Simulation-based calibration by the band of Säilynoja, Bürkner & Vehtari, arXiv 2103.10522; ranks
of the likelihood: Modrák et al., arXiv 2211.02383; of distances to a point: Lemos et al., arXiv
2302.03026.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy.special import bdtr, bdtrc
from scipy.stats import binom

from cryodrgn_amort.measures.bootstrap import Measure, measure, measure_ratio, single
from cryodrgn_amort.measures.two_samples import energy_distance

__all__ = [
    "LEVELS",
    "Calibration",
    "calibration_measures",
    "coverage",
    "ecdf",
    "ecdf_band",
    "uniformity",
]

LEVELS = (50, 80, 95)
_SURE = 5.0  # standard errors
_AT = np.arange(1, 100) / 100
_SIMULATED = 2000


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
    distance_ranks, likelihood_ranks
        What share of the posterior's draws is nearer to a point that has nothing to do with the
        image than its true latent, and explains the image worse: `(L,)` each, as uniform.
    powers, particle_powers
        Power of images made up, and of particles, by shell: `(M, shells)` each.
    """

    ranks: np.ndarray
    sample: np.ndarray
    means: np.ndarray
    gains: np.ndarray
    particle_gains: np.ndarray
    distance_ranks: np.ndarray
    likelihood_ranks: np.ndarray
    powers: np.ndarray
    particle_powers: np.ndarray

    @property
    def places(self) -> dict[str, np.ndarray]:
        """All that is uniform if the posteriors are right, by name."""
        found = {f"latent {i}": column for i, column in enumerate(self.ranks.T)}
        return found | {"distance": self.distance_ranks, "likelihood": self.likelihood_ranks}


def ecdf(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return points from 0 to 1, and what share of some values is at most each."""
    return _AT, np.searchsorted(np.sort(values), _AT, "right") / len(values)


def _tails(counts: np.ndarray, n: int) -> np.ndarray:
    """Return the least probability of counts `(..., points)` up to points, of n uniform values."""
    tails: np.ndarray = np.minimum(bdtr(counts, n, _AT), bdtrc(counts - 1, n, _AT)).min(-1)
    return tails


@cache
def _usual_tails(n: int) -> np.ndarray:
    """Return what ``_tails`` are of uniform values, sorted."""
    each = np.random.default_rng(0).multinomial(n, np.full(100, 0.01), _SIMULATED)
    return np.sort(_tails(each[:, :-1].cumsum(1), n))


def uniformity(values: np.ndarray) -> float:
    """Return how likely uniform values are as far from uniform as these: p."""
    n = len(values)
    own = _tails(np.rint(ecdf(values)[1] * n), n)
    return float((1 + np.searchsorted(_usual_tails(n), own, "right")) / (1 + _SIMULATED))


def ecdf_band(n: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return what ``ecdf`` of n uniform values lies between, everywhere, with a probability."""
    tail = np.quantile(_usual_tails(n), 1 - level)
    return binom.ppf(tail, n, _AT) / n, binom.ppf(1 - tail, n, _AT) / n


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
    places = found.places.values()
    likely = min(1.0, len(places) * min(map(uniformity, places)))
    measures.append(single("calibration_p", likely, len(found.ranks)))
    measures.append(measure("likelihood_rank", np.mean, found.likelihood_ranks, **opts))
    measures.append(energy_distance("made_up_distance", found.particle_powers, found.powers))
    theirs = found.particle_gains[np.isfinite(found.particle_gains)]
    error = found.gains.std() / np.sqrt(len(found.gains))
    if len(theirs) and found.gains.mean() > _SURE * error:  # else it reads no images made up
        measures.append(measure_ratio("gain_ratio", theirs, found.gains, **opts))
    return measures
