"""What the data allow: the posterior of class and coordinate, given what the images are made of.

No estimate of the class is right more often than its most probable value, and none of the
coordinate or the volume has a smaller mean squared error than its posterior mean: Berger,
Statistical Decision Theory and Bayesian Analysis (1985), chapter 4.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import CubicSpline

from cryodrgn_amort.measures.catalogue import ATTAINABLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cryodrgn_amort.measures.bootstrap import Measure

__all__ = ["StructurePosterior", "structure_posterior", "with_attainable"]

_BETWEEN, _FEWEST = 8, 257  # coordinates per node, and in all, at which the posterior is evaluated


@dataclass(frozen=True)
class StructurePosterior:
    """Posterior of class and coordinate of `n` particles, K classes, T coordinates.

    Attributes
    ----------
    classes
        Probability of each class, `(n, K)`.
    coordinate, variance
        Mean and variance of the coordinate, `(n,)`.
    weights
        What the volumes at the nodes add to the mean volume, `(n, K, T)`.
    """

    classes: np.ndarray
    coordinate: np.ndarray
    variance: np.ndarray
    weights: np.ndarray

    def at(self, places: np.ndarray) -> StructurePosterior:
        """Return some of the particles, by their places, `(m,)`."""
        return replace(self, **{k: getattr(self, k)[places] for k in _names()})

    @staticmethod
    def joined(parts: Sequence[StructurePosterior]) -> StructurePosterior:
        """Put the particles of several posteriors one after the other."""
        return StructurePosterior(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in _names())
        )


def _names() -> list[str]:
    return [field.name for field in fields(StructurePosterior)]


def structure_posterior(log_likelihood: np.ndarray, shares: np.ndarray) -> StructurePosterior:
    """Return the posterior of class and coordinate.

    The prior is that of the classes times a uniform one of the coordinate, from 0 to 1. Between the
    nodes, log likelihoods are cubic splines, and so are volumes.

    Parameters
    ----------
    log_likelihood
        Of each particle in nats, but for a constant of each, `(n, K, T)`: of K classes at T
        coordinates, equally far apart from 0 to 1; of one coordinate, nothing moves.
    shares
        Relative shares of the classes, `(K,)`.
    """
    nodes = log_likelihood.shape[2]
    at, basis, width = np.full(1, 0.5), np.ones((1, 1)), np.ones(1)
    if nodes > 1:
        at = np.linspace(0, 1, max(_FEWEST, _BETWEEN * (nodes - 1) + 1))
        basis = CubicSpline(np.linspace(0, 1, nodes), np.eye(nodes))(at)
        width = np.ones(len(at))
        width[[0, -1]] = 0.5  # trapezoids
    with np.errstate(divide="ignore"):  # a class without a share
        prior = np.log(shares / shares.sum())[:, None] + np.log(width / width.sum())
    logs = log_likelihood @ basis.T + prior
    joint = np.exp(logs - logs.max((1, 2), keepdims=True))
    joint /= joint.sum((1, 2), keepdims=True)
    marginal = joint.sum(1)
    mean = marginal @ at
    variance = (marginal * (at - mean[:, None]) ** 2).sum(1)
    return StructurePosterior(joint.sum(2), mean, variance, joint @ basis)


def with_attainable(
    measures: Mapping[str, Measure], reached: Mapping[str, Measure]
) -> dict[str, Measure]:
    """Return measures with what the data allow beside those that ``ATTAINABLE`` names."""
    found = {}
    for name, m in measures.items():
        most = reached.get(ATTAINABLE.get(name, ""))
        found[name] = m if most is None else replace(m, attainable=most.value)
    return found
