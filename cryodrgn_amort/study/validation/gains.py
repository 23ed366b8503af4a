"""Is there heterogeneity: what latents gain of unseen particles, and what two halves agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from cryodrgn_amort.measures import measure, ratio

if TYPE_CHECKING:
    from cryodrgn_amort.measures import Measure
    from cryodrgn_amort.runs import Run
    from cryodrgn_amort.study.validation.case import Case, Fits


__all__ = ["agreement", "clusters", "gain", "volume_spread"]

_CLUSTERED, _DIMENSIONS, _MOST = 2000, 4, 10


def gain(name: str, fits: Fits, rounds: int, seed: int) -> Measure:
    """Measure by how much latents of their own explain particles better than one for all."""
    return measure(name, np.mean, fits.elbo - fits.constant, rounds=rounds, seed=seed)


def volume_spread(case: Case) -> float:
    """Return the variance of the volumes of a run's latents over the power of their mean."""
    values = case.sampled(case.run.z()[0][:1000])
    mean = values.mean(0)
    return float(((values - mean) ** 2).sum(1).mean() / (mean**2).sum())


def clusters(z: np.ndarray, seed: int) -> int:
    """Count the clusters of latents `(N, zdim)`: Gaussians, by the least BIC, at most 10."""
    some = z[np.sort(np.random.default_rng(seed).permutation(len(z))[:_CLUSTERED])]
    some = PCA(min(_DIMENSIONS, *some.shape)).fit_transform(some)
    counts = range(1, max(2, min(_MOST, len(some) // 10) + 1))
    fits = (GaussianMixture(k, random_state=seed, reg_covar=1e-5).fit(some) for k in counts)
    return 1 + int(np.argmin([fit.bic(some) for fit in fits]))


def agreement(
    case: Case, fits: Fits, other: Run, rounds: int, seed: int
) -> tuple[Measure, Measure]:
    """Measure whether two halves find the same of a particle.

    Its volume by this half, which has not seen it, is compared with that by the half that was
    trained on it, each minus the mean over the particles: the correlation of both up to 16 Fourier
    pixels, and the same with another particle's, which is the null.
    """
    there, latents = case.latents_of(other, fits.rows)
    mine = case.sampled(fits.mean[there])
    theirs = case.sampled(latents, other)
    mine, theirs = mine - mine.mean(0), theirs - theirs.mean(0)
    crossed = np.roll(theirs, 1, 0)
    found = []
    for name, with_these in (("halves_agreement", theirs), ("halves_agreement_others", crossed)):
        terms = [(mine * with_these).sum(1), (mine**2).sum(1), (with_these**2).sum(1)]
        found.append(measure(name, _correlation, *terms, null=0.0, ideal=1.0, rounds=rounds,
                             seed=seed))  # fmt: skip
    return found[0], found[1]


def _correlation(products: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    return ratio(products.sum(), float(np.sqrt(first.sum() * second.sum())))
