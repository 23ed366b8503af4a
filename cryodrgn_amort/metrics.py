"""The measures, as pure functions of arrays. One definition each, used everywhere.

`z` are posterior means `(N, zdim)` of the particles, `moved` those of the same particles after a
transform of their images (or from another run), row by row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Measure",
    "aggregate_kl",
    "class_knn",
    "coordinate_r2",
    "displacement",
    "displacement_sigma",
    "fsc",
    "kl_by_dimension",
    "kmeans_ari",
    "knn_labels",
    "knn_overlap",
    "label_agreement",
    "latent_correlation",
    "linear_cka",
    "loss_fraction",
    "measure",
    "memorisation",
    "neighbourhood",
    "procrustes_disparity",
    "ratio_of_means",
    "retrieval_rank",
    "volume_change",
]

K = 15
"""Neighbours in all kNN measures."""
NEIGHBOURHOOD = 0.05
"""Neighbours that ``neighbourhood`` looks at, as a share of all particles."""
_BLOCK = 512
_PAIRS = 100_000
_MOST_COMPONENTS = 2000


@dataclass(frozen=True)
class Measure:
    """One number with all that is needed to read it.

    Attributes
    ----------
    low, high
        Bootstrap 95 % interval over particles; None where there is none.
    null, ideal
        Its value if the transform destroyed everything, and if it changed nothing.
    n
        Number of particles it was computed from.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    null: float | None
    ideal: float | None
    n: int


def measure(
    name: str,
    statistic: Callable[..., float],
    *arrays: np.ndarray,
    null: float | None,
    ideal: float | None,
    rounds: int = 500,
    seed: int = 0,
) -> Measure:
    """Compute ``statistic(*arrays)`` and its bootstrap interval over the rows of the arrays."""
    n = len(arrays[0])
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(rounds):
        rows = rng.integers(n, size=n)
        drawn.append(statistic(*(a[rows] for a in arrays)))
    low, high = map(float, np.percentile(drawn, [2.5, 97.5])) if drawn else (None, None)
    return Measure(name, float(statistic(*arrays)), low, high, null, ideal, n)


def retrieval_rank(z: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Fraction of the other particles that are nearer to ``moved[i]`` than z[i] is: `(N,)`.

    Null 0.5, ideal 0. A tie counts half, so that latents which are all the same (a collapsed
    encoder) get the null. Works in blocks; memory grows with N, not with its square.
    """
    z, moved = np.asarray(z, np.float64), np.asarray(moved, np.float64)
    n = len(z)
    norms = (z**2).sum(1)
    rank = np.empty(n)
    for start in range(0, n, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, n))
        # squared distances, but for a summand that is the same for all j
        distances = norms - 2 * moved[rows] @ z.T
        own = distances[np.arange(len(rows)), rows][:, None]
        ties = (distances == own).sum(1) - 1  # j != i
        rank[rows] = ((distances < own).sum(1) + 0.5 * ties) / max(n - 1, 1)
    return rank


def pair_scale(z: np.ndarray, seed: int = 0) -> float:
    """Median distance of random pairs of particles in latent space."""
    i, j = _pairs(len(z), seed)
    return float(np.median(np.linalg.norm(z[i] - z[j], axis=1)))


def _pairs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    count = min(_PAIRS, 20 * n)
    i = rng.integers(n, size=count)
    j = (i + 1 + rng.integers(n - 1, size=count)) % n if n > 1 else i
    return i, j


def displacement(z: np.ndarray, moved: np.ndarray, scale: float) -> np.ndarray:
    """Distance that each latent moved, in units of ``pair_scale``: `(N,)`. Ideal 0."""
    moved_by: np.ndarray = np.linalg.norm(moved - z, axis=1) / scale
    return moved_by


def displacement_sigma(z: np.ndarray, moved: np.ndarray, logvar: np.ndarray) -> np.ndarray:
    """Distance that each latent moved, in its own posterior standard deviations: `(N,)`."""
    moved_by: np.ndarray = np.linalg.norm((moved - z) * np.exp(-0.5 * logvar), axis=1)
    return moved_by


def random_pair_sigma(z: np.ndarray, logvar: np.ndarray, seed: int = 0) -> float:
    """Return the median of ``displacement_sigma`` for random pairs instead of copies."""
    i, j = _pairs(len(z), seed)
    return float(np.median(displacement_sigma(z[i], z[j], logvar[i])))


def latent_correlation(z: np.ndarray, moved: np.ndarray) -> float:
    """Correlation of z and its moved copy, averaged over dimensions by variance.

    Null 0, ideal 1. A dimension that is constant counts with weight 0.
    """
    a, b = z - z.mean(0), moved - moved.mean(0)
    weight = (a**2).mean(0)
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    correlation = np.divide((a * b).sum(0), size, out=np.zeros(z.shape[1]), where=size > 0)
    return float((correlation * weight).sum() / weight.sum()) if weight.sum() > 0 else 0.0


def _neighbours(reference: np.ndarray, query: np.ndarray | None) -> np.ndarray:
    """Positions of the nearest reference points; ``query`` None: of each other point."""
    k = min(K, len(reference) - 1)
    index = NearestNeighbors(n_neighbors=k).fit(reference)
    found: np.ndarray = index.kneighbors(query, return_distance=False)
    return found


def knn_labels(z: np.ndarray, labels: np.ndarray, query: np.ndarray | None = None) -> np.ndarray:
    """Majority label (integers from 0) of the 15 nearest particles: `(N,)`.

    ``query`` None: each particle's own, leave-one-out.
    """
    votes = labels[_neighbours(z, query)]
    counts = np.stack([(votes == label).sum(1) for label in range(labels.max() + 1)], 1)
    winners: np.ndarray = counts.argmax(1)
    return winners


def class_knn(z: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the leave-one-out kNN class is right, per particle: `(N,)` of 0 and 1.

    Its mean is the accuracy; null: sum of squared class shares.
    """
    right: np.ndarray = (knn_labels(z, labels) == labels).astype(float)
    return right


def coordinate_r2(predicted: np.ndarray, truth: np.ndarray) -> float:
    """R^2 of a predicted coordinate. Null 0, ideal 1."""
    return float(1 - ((truth - predicted) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def knn_coordinate(z: np.ndarray, coordinate: np.ndarray) -> np.ndarray:
    """Mean coordinate of the 15 nearest other particles: `(N,)`."""
    mean: np.ndarray = coordinate[_neighbours(z, None)].mean(1)
    return mean


def label_agreement(before: np.ndarray, after: np.ndarray) -> float:
    """Share of particles whose kNN label is the same before and after."""
    return float((before == after).mean())


def loss_fraction(moved: np.ndarray, original: np.ndarray, constant: np.ndarray) -> float:
    """Return the share of what the latent explains that is lost after the transform.

    (rec(Tx; T pose, z') - rec(x; z)) / (rec(x; mean z) - rec(x; z)), of sums over particles.
    Null 1 or more, ideal 0.
    """
    return float((moved - original).mean() / (constant - original).mean())


def memorisation(homogeneous: np.ndarray, run: np.ndarray, real: np.ndarray) -> float:
    """Return the share of what latents explain that is explained without the particle's image.

    (rec(hom) - rec(run)) / (rec(hom) - rec(real)) of sums over particles: ``homogeneous`` has one
    volume for all, the encoder of ``run`` is not shown the particle, that of ``real`` is. Null 0.
    """
    gained = (homogeneous - real).mean()
    return float((homogeneous - run).mean() / gained) if gained else math.nan


def ratio_of_means(values: np.ndarray, reference: np.ndarray) -> float:
    """Mean of some values over that of others."""
    mean = reference.mean()
    return float(values.mean() / mean) if mean else math.nan


def volume_change(moved: np.ndarray, pairs: np.ndarray) -> float:
    """Median distance |v(z_i) - v(z'_i)| over median |v(z_i) - v(z_j)|. Null 1, ideal 0."""
    return float(np.median(moved) / np.median(pairs))


def fsc(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Fourier shell correlation of two volumes `(D, D, D)`, shells 0 to D / 2: `(D / 2 + 1,)`."""
    size = a.shape[0]
    fa, fb = (np.fft.fftshift(np.fft.fftn(v)) for v in (a, b))
    axis = np.arange(size) - size // 2
    radius = np.sqrt(sum(np.meshgrid(axis**2, axis**2, axis**2, indexing="ij")))
    shell = np.round(radius).astype(int).ravel()
    keep = shell <= size // 2

    def per_shell(values: np.ndarray) -> np.ndarray:
        return np.bincount(shell[keep], values.ravel()[keep], size // 2 + 1)

    cross = per_shell((fa * fb.conj()).real)
    power = per_shell(np.abs(fa) ** 2) * per_shell(np.abs(fb) ** 2)
    curve: np.ndarray = np.divide(cross, np.sqrt(power), out=np.zeros_like(cross), where=power > 0)
    return curve


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
        others = np.ones((len(part), n), bool)
        others[np.arange(len(part)), part] = False
        in_truth = cdist(truth[part], truth)
        is_near = others & (in_truth <= _kth(in_truth, others, k))
        in_z = cdist(z[part], z)
        border = _kth(in_z, others, k)
        inside, tied = others & (in_z < border), others & (in_z == border)
        share = (k - inside.sum(1)) / tied.sum(1)
        hits = (inside & is_near).sum(1) + share * (tied & is_near).sum(1)
        overlap.append(hits / k)
        near.append(is_near.sum(1) / (n - 1))
    return np.concatenate(overlap), float(np.concatenate(near).mean())


def _kth(distances: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    """Return the k-th smallest of the allowed distances of each row, `(M, 1)`."""
    kth: np.ndarray = np.partition(np.where(allowed, distances, np.inf), k - 1, axis=1)[:, k - 1]
    return kth[:, None]


def knn_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Share of each particle's 15 nearest neighbours in `a` that are so in `b`: `(N,)`.

    `a` and `b` are latents of the same particles, of any dimensions. Null k / N, ideal 1.
    """
    first, second = _neighbours(a, None), _neighbours(b, None)
    shared = (first[:, :, None] == second[:, None, :]).any(2)
    overlap: np.ndarray = shared.mean(1)
    return overlap


def linear_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Linear centred kernel alignment of two sets of latents. Null about 0, ideal 1.

    Kornblith et al., arXiv 1905.00414, equation 3 with linear kernels.
    """
    a, b = a - a.mean(0), b - b.mean(0)
    size = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    return float(np.linalg.norm(a.T @ b) ** 2 / size) if size > 0 else 0.0


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
    """Adjusted Rand index of k-means clusters of two sets of latents. Null 0, ideal 1."""
    clusters = (KMeans(k, n_init=4, random_state=seed).fit_predict(z) for z in (a, b))
    return float(adjusted_rand_score(*clusters))
