"""Measures of reconstruction losses, and of divergences from the prior."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

from cryodrgn_amort.measures.bootstrap import ratio

__all__ = [
    "aggregate_kl",
    "difference_of_means",
    "gained_share",
    "kl_by_dimension",
    "loss_fraction",
    "memorisation",
]

_MOST_COMPONENTS = 2000


def loss_fraction(moved: np.ndarray, original: np.ndarray, constant: np.ndarray) -> float:
    """Return the share of what the latent explains that is lost after the transform.

    (rec(Tx; T pose, z') - rec(x; z)) / (rec(x; mean z) - rec(x; z)), of sums over particles.
    Null 1 or more, ideal 0; NaN if a constant explains as much.
    """
    return ratio((moved - original).mean(), (constant - original).mean())


def gained_share(gained: np.ndarray, possible: np.ndarray) -> float:
    """Share of what could be gained that is; both in nats per particle, `(M,)`.

    Null 0, ideal 1. With the gains of the encoder's latents and of fitted ones over one latent for
    all, on particles never seen, this is the held-out score (GEN). NaN if nothing can be gained.
    """
    return ratio(gained.sum(), possible.sum())


def difference_of_means(values: np.ndarray, reference: np.ndarray) -> float:
    """Difference of two means over as many particles."""
    return float(values.mean() - reference.mean())


def memorisation(homogeneous: np.ndarray, run: np.ndarray, real: np.ndarray) -> float:
    """Return the share of what latents explain that is explained without the particle's image.

    (rec(hom) - rec(run)) / (rec(hom) - rec(real)) of sums over particles: ``homogeneous`` has one
    volume for all, the encoder of ``run`` is not shown the particle, that of ``real`` is. Null 0.
    """
    return ratio((homogeneous - run).mean(), (homogeneous - real).mean())


def kl_by_dimension(mean: np.ndarray, logvar: np.ndarray) -> np.ndarray:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each latent dimension, in nats: `(N, zdim)`."""
    mean, logvar = np.asarray(mean, np.float64), np.asarray(logvar, np.float64)
    divergence: np.ndarray = 0.5 * (mean**2 + np.exp(logvar) - logvar - 1)
    return divergence


def aggregate_kl(mean: np.ndarray, logvar: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return terms whose mean estimates KL(q(z) || N(0, I)), in nats: `(M,)`.

    q(z) is the mixture of the posteriors. The divergence is the posteriors' mean divergence, which
    is exact, minus what a latent tells of its particle, E log q_i(z) / q(z), from one z per
    particle. Of more than 2,000 particles a random 2,000 are used; by convexity, fewer particles
    give more, on average.

    References
    ----------
    Hoffman & Johnson, "ELBO surgery" (NIPS workshop on approximate inference, 2016), section 1.
    """
    rng = np.random.default_rng(seed)
    used = np.sort(rng.permutation(len(mean))[:_MOST_COMPONENTS])
    mean, logvar = np.asarray(mean[used], np.float64), np.asarray(logvar[used], np.float64)
    z = mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape)
    precision = np.exp(-logvar)
    # log q_j(z_i) but for a constant that cancels: (i, j)
    squares = z**2 @ precision.T - 2 * z @ (mean * precision).T + (mean**2 * precision).sum(1)
    log_density = -0.5 * (squares + logvar.sum(1))
    mixture = logsumexp(log_density, axis=1) - np.log(len(used))
    told: np.ndarray = np.diagonal(log_density) - mixture
    terms: np.ndarray = kl_by_dimension(mean, logvar).sum(1) - told
    return terms
