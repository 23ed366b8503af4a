"""The measures, as pure functions of arrays. One definition each, used everywhere.

`z` are posterior means `(N, zdim)` of the particles, `moved` those of the same particles after a
transform of their images (or from another run), row by row.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = [
    "MOST_QUERIES",
    "Measure",
    "Neighbours",
    "aggregate_kl",
    "class_knn",
    "coordinate_r2",
    "difference_of_means",
    "displacement",
    "displacement_sigma",
    "fsc",
    "gained_share",
    "kl_by_dimension",
    "kmeans_ari",
    "knn_labels",
    "knn_overlap",
    "label_agreement",
    "latent_correlation",
    "linear_cka",
    "looked_up",
    "loss_fraction",
    "measure",
    "measure_ratio",
    "memorisation",
    "neighbourhood",
    "nuisances",
    "procrustes_disparity",
    "ratio",
    "ratio_of_means",
    "retrieval_rank",
    "volume_change",
    "with_before",
]

K = 15
"""Neighbours in all kNN measures."""
NEIGHBOURHOOD = 0.05
"""Neighbours that ``neighbourhood`` looks at, as a share of all particles."""
MOST_QUERIES = 10_000
"""Of more particles than these, so many random ones are looked up among all: ``looked_up``."""
_BLOCK = (256, 4096)  # of distances: 8 MB
_MOST_DIMENSIONS = 10  # in which a tree is faster than all distances
_PAIRS = 100_000
_MOST_COMPONENTS = 2000
_COUNTS_KEPT = 1 << 26  # bytes

_T = TypeVar("_T")


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
    """Compute ``statistic(*arrays)`` and its bootstrap interval over the rows of the arrays.

    Those statistics that are computed from all particles are resampled without touching the rows
    one by one, as counts of how often each was drawn; the draws are the same.
    """
    n = len(arrays[0])
    fast = _RESAMPLED.get(statistic)
    if not rounds:
        drawn = np.empty(0)
    elif fast is not None and all(np.isfinite(a).all() for a in arrays):
        drawn = fast(_counts(n, rounds, seed), *arrays)
    else:
        draws = _draws(n, rounds, seed)
        drawn = np.array([statistic(*(a[rows] for a in arrays)) for rows in draws])
    low, high = map(float, np.percentile(drawn, [2.5, 97.5])) if rounds else (None, None)
    return Measure(name, float(statistic(*arrays)), low, high, null, ideal, n)


def measure_ratio(
    name: str,
    values: np.ndarray,
    reference: np.ndarray,
    *,
    null: float | None,
    ideal: float | None,
    rounds: int = 500,
    seed: int = 0,
) -> Measure:
    """Compute the ratio of the means of two samples `(N,)` and `(M,)`, each resampled by itself."""
    low, high = None, None
    if rounds:
        drawn = (
            _resampled_mean(_counts(len(sample), rounds, seed + k), sample)
            for k, sample in enumerate((values, reference))
        )
        ratios = [ratio(float(a), float(b)) for a, b in zip(*drawn, strict=True)]
        low, high = map(float, np.percentile(ratios, [2.5, 97.5]))
    value = ratio_of_means(values, reference)
    return Measure(name, value, low, high, null, ideal, len(values))


def ratio(value: float, reference: float) -> float:
    """Return one number over another; NaN over 0, as where a run has collapsed."""
    return float(value / reference) if reference else math.nan


def _draws(n: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """Draw rows with replacement, `(n,)` in each round."""
    rng = np.random.default_rng(seed)
    return (rng.integers(n, size=n) for _ in range(rounds))


def _counts(n: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """Count how often each row is drawn, `(R, n)`, for some rounds at a time."""
    if n * rounds <= _COUNTS_KEPT:
        yield _kept_counts(n, rounds, seed)
        return
    draws = _draws(n, rounds, seed)
    step = max(1, _COUNTS_KEPT // n)
    for start in range(0, rounds, step):
        yield _counted(draws, min(step, rounds - start), n)


@functools.lru_cache(maxsize=4)  # measures of as many rows have the same draws
def _kept_counts(n: int, rounds: int, seed: int) -> np.ndarray:
    return _counted(_draws(n, rounds, seed), rounds, n)


def _counted(draws: Iterator[np.ndarray], rounds: int, n: int) -> np.ndarray:
    counts = np.empty((rounds, n), np.uint8)  # where n > 255, a count above 255 is no event
    for row in counts:
        row[:] = np.bincount(next(draws), minlength=n)
    return counts


def _means(
    counts: Iterator[np.ndarray], columns: Callable[..., np.ndarray], *arrays: np.ndarray
) -> np.ndarray:
    """Average ``columns(*arrays)``, `(n, C)`, over the rows drawn in each round: `(rounds, C)`."""
    width = columns(*(a[:1] for a in arrays)).shape[1]
    found = []
    for part in counts:
        n = part.shape[1]
        step = max(64, 1_000_000 // max(width, len(part)))
        sums = np.zeros((len(part), width))
        for start in range(0, n, step):
            rows = slice(start, start + step)
            sums += part[:, rows].astype(np.float64) @ columns(*(a[rows] for a in arrays))
        found.append(sums / n)
    return np.concatenate(found)


def _resampled_mean(counts: Iterator[np.ndarray], values: np.ndarray) -> np.ndarray:
    return _means(counts, lambda part: part[:, None].astype(np.float64), values)[:, 0]


def _resampled_median(counts: Iterator[np.ndarray], values: np.ndarray) -> np.ndarray:
    n, order = len(values), np.argsort(values)
    ordered = values[order].astype(np.float64)
    middle = np.array([(n - 1) // 2, n // 2])
    # how many of the drawn values are up to each of the ordered ones
    reached = (row[order].cumsum(dtype=np.int64) for part in counts for row in part)
    at = np.stack([row.searchsorted(middle, "right") for row in reached])
    medians: np.ndarray = ordered[at].mean(1)
    return medians


def _centred(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    wide = (np.asarray(a, np.float64) for a in arrays)
    return tuple(a - a.mean(0) for a in wide)


def looked_up(n: int, seed: int = 0) -> np.ndarray:
    """Positions of the particles that are looked up among all: all, or a random sample, `(M,)`.

    Looking up takes time in proportion to all particles for each of them. A sample changes no
    measure's definition, only the width of its interval.
    """
    return np.sort(np.random.default_rng(seed).permutation(n)[:MOST_QUERIES])


def retrieval_rank(
    z: np.ndarray,
    moved: np.ndarray,
    rows: np.ndarray | None = None,
    others: np.ndarray | None = None,
) -> np.ndarray:
    """Fraction of the other particles that are nearer to ``moved[i]`` than z[i] is.

    For each of ``rows``, `(M,)`, or of all; among all particles, or a random sample ``others``.
    Null 0.5, ideal 0. A tie counts half, so that latents which are all the same (a collapsed
    encoder) get the null. Works in blocks of fixed size.
    """
    rows = np.arange(len(z)) if rows is None else rows
    others = np.arange(len(z)) if others is None else others
    z, moved = np.asarray(z, np.float64), np.asarray(moved, np.float64)[rows]
    centre = z.mean(0)
    z, moved = z - centre, moved - centre
    norms = (z**2).sum(1)
    # squared distances, but for a summand that is the same for all j, as one matrix product
    reference = torch.from_numpy(np.column_stack([z, norms])[others].T.copy())
    queries = torch.from_numpy(np.column_stack([-2 * moved, np.ones(len(rows))]))
    own = torch.from_numpy(norms[rows] - 2 * (moved * z[rows]).sum(1))[:, None]
    largest = float(norms.max() + (moved**2).sum(1).max())
    rounding = 16 * np.finfo(np.float64).eps * largest
    signs = torch.zeros(len(rows), dtype=torch.float64)
    height, width = _BLOCK
    buffer = torch.empty(_BLOCK, dtype=torch.float64)
    for start in range(0, len(rows), height):
        part = slice(start, start + height)
        for columns in reference.split(width, 1):
            found = buffer[: len(queries[part]), : columns.shape[1]]
            torch.addmm(-own[part], queries[part], columns, out=found)
            # -1: nearer than the own one, 0: as near, 1: farther
            torch.ops.aten.hardshrink(found, rounding, out=found)
            signs[part] += found.sign_().sum(1)
    among = np.isin(rows, others).astype(float)  # the own one is as near as itself
    nearer_and_half_of_equal = (len(others) - signs.numpy() - among) / 2
    rank: np.ndarray = nearer_and_half_of_equal / np.maximum(len(others) - among, 1)
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
    """Distance that each latent moved, in units of ``pair_scale``: `(N,)`. Ideal 0.

    NaN if all latents are the same.
    """
    moved_by: np.ndarray = np.linalg.norm(moved - z, axis=1) / (scale or np.nan)
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
    a, b = _centred(z, moved)
    means = [(x**2).mean(0) for x in (a, b)]
    return float(_correlation(means[0], means[1], (a * b).mean(0)))


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

    means = _means(counts, columns, *_centred(z, moved))
    a, b, aa, bb, ab = np.split(means, 5, axis=1)
    return _correlation((aa - a * a).clip(0), (bb - b * b).clip(0), ab - a * b)


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


def label_agreement(before: np.ndarray, after: np.ndarray) -> float:
    """Share of particles whose kNN label is the same before and after."""
    return float((before == after).mean())


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


def memorisation(homogeneous: np.ndarray, run: np.ndarray, real: np.ndarray) -> float:
    """Return the share of what latents explain that is explained without the particle's image.

    (rec(hom) - rec(run)) / (rec(hom) - rec(real)) of sums over particles: ``homogeneous`` has one
    volume for all, the encoder of ``run`` is not shown the particle, that of ``real`` is. Null 0.
    """
    return ratio((homogeneous - run).mean(), (homogeneous - real).mean())


def ratio_of_means(values: np.ndarray, reference: np.ndarray) -> float:
    """Mean of some values over that of others."""
    return ratio(values.mean(), reference.mean())


def volume_change(moved: np.ndarray, pairs: np.ndarray) -> float:
    """Median distance |v(z_i) - v(z'_i)| over median |v(z_i) - v(z_j)|. Null 1, ideal 0.

    NaN if all volumes are the same.
    """
    return ratio(np.median(moved), np.median(pairs))


def with_before(items: Iterable[_T]) -> Iterator[tuple[_T, _T]]:
    """Pair each of some volumes with the one before it; holds three at a time.

    The pairs are those of ``zip(items, np.roll(items, 1, axis=0))``, but the first one comes last.
    """
    items = iter(items)
    first = before = next(items)
    for item in items:
        yield item, before
        before = item
    yield first, before


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


def linear_cka(a: np.ndarray, b: np.ndarray) -> float:
    """Linear centred kernel alignment of two sets of latents. Null about 0, ideal 1.

    Kornblith et al., arXiv 1905.00414, equation 3 with linear kernels.
    """
    a, b = _centred(a, b)
    return float(_alignment(a.T @ a, b.T @ b, a.T @ b))


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

    means = _means(counts, columns, *_centred(a, b))
    mean = means[:, : width + b.shape[1]]
    products = means[:, mean.shape[1] :].reshape(len(means), mean.shape[1], -1)
    covariance = products - mean[:, :, None] * mean[:, None, :]
    own, other = covariance[:, :width, :width], covariance[:, width:, width:]
    return _alignment(own, other, covariance[:, :width, width:])


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


_RESAMPLED: dict[Callable[..., float], Callable[..., np.ndarray]] = {
    np.mean: _resampled_mean,
    np.median: _resampled_median,
    latent_correlation: _resampled_correlation,
    linear_cka: _resampled_cka,
}
"""How statistics of all particles are bootstrapped: from counts and arrays, one value a round."""
