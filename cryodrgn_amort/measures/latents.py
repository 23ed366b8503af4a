"""The measures, as pure functions of arrays. One definition each, used everywhere.

`z` are posterior means `(N, zdim)` of the particles, `moved` those of the same particles after a
transform of their images (or from another run), row by row.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from cryodrgn_amort.measures.bootstrap import centred, ratio, resampled_by, resampled_means

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


__all__ = [
    "MOST_QUERIES",
    "OF_LATENTS",
    "Neighbours",
    "class_knn",
    "coordinate_r2",
    "knn_labels",
    "latent_correlation",
    "looked_up",
    "neighbourhood",
    "nuisances",
]

_ACTIVE_VARIANCE = 0.01  # Burda et al., arXiv 1509.00519
K = 15
"""Neighbours in all kNN measures."""
NEIGHBOURHOOD = 0.05
"""Neighbours that ``neighbourhood`` looks at, as a share of all particles."""
MOST_QUERIES = 10_000
"""Of more particles than these, so many random ones are looked up among all: ``looked_up``."""
_MOST_DIMENSIONS = 10  # in which a tree is faster than all distances


def looked_up(n: int, seed: int = 0) -> np.ndarray:
    """Positions of the particles that are looked up among all: all, or a random sample, `(M,)`.

    Looking up takes time in proportion to all particles for each of them. A sample changes no
    measure's definition, only the width of its interval.
    """
    return np.sort(np.random.default_rng(seed).permutation(n)[:MOST_QUERIES])


def _correlation(a: np.ndarray, b: np.ndarray, both: np.ndarray) -> np.ndarray:
    """Average the correlations by variance: variances and covariances `(..., zdim)` -> `(...)`."""
    size = np.sqrt(a * b)
    correlation = np.divide(both, size, out=np.zeros_like(size), where=size > 0)
    total = a.sum(-1)
    weighted: np.ndarray = (correlation * a).sum(-1)
    average: np.ndarray = np.divide(weighted, total, out=np.zeros_like(weighted), where=total > 0)
    return average


def _resampled_correlation(
    counts: Iterator[np.ndarray], z: np.ndarray, moved: np.ndarray
) -> np.ndarray:
    def columns(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.concatenate([a, b, a * a, b * b, a * b], 1)

    means = resampled_means(counts, columns, *centred(z, moved))
    a, b, aa, bb, ab = np.split(means, 5, axis=1)
    return _correlation((aa - a * a).clip(0), (bb - b * b).clip(0), ab - a * b)


@resampled_by(_resampled_correlation)
def latent_correlation(z: np.ndarray, moved: np.ndarray) -> float:
    """Correlation of z and its moved copy, averaged over dimensions by variance.

    Null 0, ideal 1. A dimension that is constant counts with weight 0.
    """
    a, b = centred(z, moved)
    means = [(x**2).mean(0) for x in (a, b)]
    return float(_correlation(means[0], means[1], (a * b).mean(0)))


class Neighbours:
    """The 15 nearest particles, for all kNN measures; searched for when asked.

    Parameters
    ----------
    z
        Where the particles are, `(N, zdim)`.
    rows
        Whose neighbours are wanted, `(M,)`.
    """

    def __init__(self, z: np.ndarray, rows: np.ndarray) -> None:
        self.rows, self._z, self._k = rows, z, min(K, len(z) - 1)

    @functools.cached_property
    def own(self) -> np.ndarray:
        """Positions of the nearest other particles of each of ``rows``, `(M, 15)`."""
        found = self._nearest(self._z[self.rows], self._k + 1)
        others = found != self.rows[:, None]
        others[others.all(1), 0] = False  # more than these lie where it lies
        positions: np.ndarray = found[others].reshape(len(self.rows), self._k)
        return positions

    def of(self, points: np.ndarray) -> np.ndarray:
        """Positions of the particles that are nearest to `(M, zdim)`: `(M, 15)`."""
        return self._nearest(points, self._k)

    @functools.cached_property
    def _tree(self) -> KDTree:
        return KDTree(self._z)

    def _nearest(self, points: np.ndarray, k: int) -> np.ndarray:
        found: np.ndarray
        if self._z.shape[1] <= _MOST_DIMENSIONS:
            threads = torch.get_num_threads()
            found = self._tree.query(points, np.arange(1, k + 1), workers=threads)[1]
        else:
            search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(self._z)
            found = search.kneighbors(points, return_distance=False)
        return found


def knn_labels(neighbours: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Majority label (integers from 0) of nearest particles `(M, k)`: `(M,)`."""
    votes = labels[neighbours]
    counts = np.stack([(votes == label).sum(1) for label in range(labels.max() + 1)], 1)
    winners: np.ndarray = counts.argmax(1)
    return winners


def class_knn(neighbours: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Whether the kNN class is right, for each of ``rows``: `(M,)` of 0 and 1.

    ``neighbours`` are their own. The mean is the leave-one-out accuracy; null: sum of squared
    class shares.
    """
    right: np.ndarray = (knn_labels(neighbours, labels) == labels[rows]).astype(float)
    return right


def coordinate_r2(predicted: np.ndarray, truth: np.ndarray) -> float:
    """R^2 of a predicted coordinate, `(M,)` or `(M, d)`. Null 0, ideal 1; NaN of a constant."""
    left, all_of_it = ((truth - other) ** 2 for other in (predicted, truth.mean(0)))
    return 1 - ratio(left.sum(), all_of_it.sum())


def knn_coordinate(neighbours: np.ndarray, coordinate: np.ndarray) -> np.ndarray:
    """Mean coordinate of nearest particles `(M, k)`: `(M,)`."""
    mean: np.ndarray = coordinate[neighbours].mean(1)
    return mean


def nuisances(
    rots: np.ndarray, trans_px: np.ndarray | None, ctf: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Return what the latents should not know, by name: each `(N, d)`.

    Parameters
    ----------
    rots, trans_px, ctf
        `(N, 3, 3)`, `(N, 2)` or None, CTF parameters `(N, 8)` or None. An image is the projection
        along the third row of its rotation, which is the direction of view; turning the image
        turns the first two entries of the third column.
    """
    turned = rots[:, :2, 2]
    size = np.linalg.norm(turned, axis=1, keepdims=True)
    found = {"view": rots[:, 2], "inplane": turned / np.maximum(size, 1e-6)}
    if ctf is not None:
        found["defocus"] = ctf[:, 1:3].mean(1, keepdims=True)
    if trans_px is not None:
        found["shift"] = trans_px
    return {name: values for name, values in found.items() if (values != values[0]).any()}


def neighbourhood(z: np.ndarray, truth: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Share of the nearest particles in z that are near in truth, too, for each of ``rows``.

    k is 5 % of the particles. Near in truth are the k nearest and all that are as near as the k-th:
    of particles of one and the same structure, none is preferred. Of particles that are equally
    far in z, each counts in part.

    Parameters
    ----------
    truth
        Coordinates `(N, d)` in which Euclidean distances are those of the true structures.

    Returns
    -------
    overlap
        `(M,)`. Ideal 1.
    null
        The mean share of all others that are near in truth: k / (N - 1) unless some are equal.

    References
    ----------
    CryoBench (Jeon et al., arXiv 2408.05526), "neighborhood similarity".
    """
    n = len(z)
    k = max(1, round(NEIGHBOURHOOD * n))
    overlap, near = [], []
    for part in np.array_split(rows, -(-len(rows) * n // 2_000_000)):  # bounds the memory
        in_truth, border = _to_others(truth, part, k)
        is_near = in_truth <= border
        in_z, border = _to_others(z, part, k)
        inside, tied = in_z < border, in_z == border
        share = (k - inside.sum(1)) / tied.sum(1)
        hits = (inside & is_near).sum(1) + share * (tied & is_near).sum(1)
        overlap.append(hits / k)
        near.append(is_near.sum(1) / (n - 1))
    return np.concatenate(overlap), float(np.concatenate(near).mean())


def _to_others(points: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return distances of ``rows`` from all, `(M, N)`, and the k-th smallest of each, `(M, 1)`.

    The distance of a row from itself is infinite.
    """
    distances: np.ndarray = cdist(points[rows], points)
    distances[np.arange(len(rows)), rows] = np.inf
    return distances, np.partition(distances, k - 1, axis=1)[:, k - 1, None]


def active_units(z: np.ndarray) -> int:
    """Count the dimensions in which latents `(N, zdim)` vary (by 0.01 or more)."""
    return int((z.var(0, dtype=np.float64) > _ACTIVE_VARIANCE).sum())


OF_LATENTS: dict[str, Callable[[np.ndarray], float]] = {"active_units": active_units}
"""Measures that are taken of the latents `(N, zdim)` of every run, and need nothing else."""
