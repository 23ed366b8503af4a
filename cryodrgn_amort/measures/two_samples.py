"""Whether images that are made up can be told from particles.

By energy distance (Szekely & Rizzo, J. Stat. Plan. Inference 143, 1249, 2013).
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from cryodrgn_amort.measures.bootstrap import Measure, ratio, single

__all__ = ["energy_distance"]

_PERMUTED = 200
_LEAST = 1e-12


def energy_distance(name: str, first: np.ndarray, second: np.ndarray, seed: int = 0) -> Measure:
    """Measure how far two samples of images are from each other by their power in shells.

    Powers `(N, shells)` and `(M, shells)` are taken as logarithms, each shell in units of its
    spread. The value is from 0 to 1: what images of different samples are farther from each other
    than images of one, as a share. The null is exceeded by one of 20 random divisions of both.
    """
    first, second = (a[np.isfinite(a).all(1)] for a in (first, second))
    n, m = len(first), len(second)
    both = np.log(np.maximum(np.concatenate([first, second]).astype(np.float64), _LEAST))
    both /= np.maximum(both.std(0), _LEAST)
    apart = cdist(both, both)
    of = np.r_[np.full(n, 1 / n), np.full(m, -1 / m)]
    rng = np.random.default_rng(seed)
    signs = np.stack([of, *(rng.permutation(of) for _ in range(_PERMUTED))])
    within = -((signs @ apart) * signs).sum(1)  # 2 E|x - y| - E|x - x'| - E|y - y'|
    null = float(np.quantile(within[1:], 0.95))
    scale = 2 * float(apart[:n, n:].mean())
    return single(name, ratio(within[0], scale), min(n, m), null=ratio(null, scale))
