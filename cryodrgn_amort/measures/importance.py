"""Whether importance weights can be believed: the shape of their tail.

Vehtari, Simpson, Gelman, Yao & Gabry, Pareto smoothed importance sampling, arXiv 1507.02646.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import numpy as np

__all__ = ["SAMPLES", "khat_limit", "tail_shapes"]
logger = logging.getLogger("cryodrgn_amort")

SAMPLES = 500
"""Of each posterior."""
_ALIKE = 1e-2  # nats: rounding


def khat_limit(samples: int) -> float:
    """Return the k-hat above which so many samples say nothing that can be relied on."""
    return min(1 - 1 / math.log10(samples), 0.7)


@cache
def _library() -> Any:
    """Import what tells, when it is needed: it takes a second; None: there is none."""
    try:
        from arviz_stats.base import array_stats
    except ImportError:  # of Python 3.10
        logger.warning("k-hat is not told: arviz-stats is not installed")
        return None
    return array_stats


def tail_shapes(ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return k-hat of each particle, and what share of its samples the weights are worth.

    Parameters
    ----------
    ratios
        Logarithms of importance weights, up to a constant, `(K, M)`.

    Returns
    -------
    khat
        Shape of the tail, `(M,)`; 0 where all weights are the same, NaN where they are no numbers.
    worth
        Effective sample size over K, after the tail was smoothed, `(M,)`.
    """
    khat, worth = np.full((2, ratios.shape[1]), np.nan)
    stats = _library()
    if stats is None:
        return khat, worth
    for m, column in enumerate(ratios.T.astype(np.float64)):
        if not np.isfinite(column).all():
            continue
        if np.ptp(column) < _ALIKE:
            khat[m], worth[m] = 0.0, 1.0
            continue
        try:
            with np.errstate(all="ignore"):
                smoothed, shape = stats.psislw(-column)
        except ValueError:  # the tail has no shape: not known
            continue
        weights = np.exp(smoothed - smoothed.max())
        if np.isfinite(weights).all():  # else the tail has none either
            khat[m] = shape
            worth[m] = weights.sum() ** 2 / (weights**2).sum() / len(weights)
    return khat, worth
