"""How far the latents of two runs of the same particles agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from cryodrgn_amort.measures.bootstrap import centred, resampled_by, resampled_means
from cryodrgn_amort.measures.latents import K, Neighbours, looked_up

if TYPE_CHECKING:
    from collections.abc import Iterator


__all__ = ["kmeans_ari", "knn_overlap", "linear_cka", "procrustes_disparity"]


def knn_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Share of a particle's 15 nearest neighbours in `a` that are so in `b`.

    `a` and `b` are latents of the same particles, of any dimensions. Of each of ``looked_up(N)``:
    `(M,)`. Null k / N, ideal 1; the null if a set has collapsed, so that all are as near.
    """
    rows, n = looked_up(len(a)), len(a)
    if _collapsed(a) or _collapsed(b):
        return np.full(len(rows), min(K, n - 1) / max(n - 1, 1))
    first, second = (Neighbours(z, rows).own for z in (a, b))
    shared = (first[:, :, None] == second[:, None, :]).any(2)
    overlap: np.ndarray = shared.mean(1)
    return overlap


def _alignment(a: np.ndarray, b: np.ndarray, both: np.ndarray) -> np.ndarray:
    """Linear CKA of covariances, each `(..., d, d)` -> `(...)`."""
    own, other, shared = (np.linalg.norm(m, axis=(-2, -1)) for m in (a, b, both))
    size = own * other
    cka: np.ndarray = np.divide(shared**2, size, out=np.zeros_like(size), where=size > 0)
    return cka


def _resampled_cka(counts: Iterator[np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    width = a.shape[1]

    def columns(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        both = np.concatenate([a, b], 1)
        products = both[:, :, None] * both[:, None, :]
        return np.concatenate([both, products.reshape(len(both), -1)], 1)

    means = resampled_means(counts, columns, *centred(a, b))
    mean = means[:, : width + b.shape[1]]
    products = means[:, mean.shape[1] :].reshape(len(means), mean.shape[1], -1)
    covariance = products - mean[:, :, None] * mean[:, None, :]
    own, other = covariance[:, :width, :width], covariance[:, width:, width:]
    return _alignment(own, other, covariance[:, :width, width:])


@resampled_by(_resampled_cka)
def linear_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Linear centred kernel alignment of two sets of latents. Null about 0, ideal 1.

    Kornblith et al., arXiv 1905.00414, equation 3 with linear kernels.
    """
    a, b = centred(a, b)
    return float(_alignment(a.T @ a, b.T @ b, a.T @ b))


def procrustes_disparity(a: np.ndarray, b: np.ndarray) -> float:
    """Squared distance left after the best translation, scaling and rotation. Null 1, ideal 0.

    The set of fewer dimensions is padded with zeros; both are scaled to unit size.
    """
    a, b = a - a.mean(0), b - b.mean(0)
    norms = np.linalg.norm(a), np.linalg.norm(b)
    if min(norms) == 0:
        return 1.0
    # with sets of unit size the optimum is 1 - (sum of singular values)^2; padding changes nothing
    singular = np.linalg.svd((a / norms[0]).T @ (b / norms[1]), compute_uv=False)
    return float(1 - singular.sum() ** 2)


def kmeans_ari(a: np.ndarray, b: np.ndarray, k: int, seed: int = 0) -> float:
    """Adjusted Rand index of k-means clusters of two sets of latents. Null 0, ideal 1.

    The null if a set has collapsed, and fewer clusters if it has fewer latents that differ.
    """
    if _collapsed(a) or _collapsed(b):
        return 0.0
    counts = (min(k, len(np.unique(z, axis=0))) for z in (a, b))
    clusters = (
        KMeans(count, n_init=4, random_state=seed).fit_predict(z)
        for count, z in zip(counts, (a, b), strict=True)
    )
    return float(adjusted_rand_score(*clusters))


def _collapsed(z: np.ndarray) -> bool:
    """Tell whether all latents are the same."""
    return not bool((z != z[0]).any())
