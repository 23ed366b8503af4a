"""How far latents move when images do: the measures of one transform, from arrays alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort.measures.bootstrap import measure
from cryodrgn_amort.measures.latents import knn_labels, latent_correlation
from cryodrgn_amort.measures.losses import loss_fraction

if TYPE_CHECKING:
    from cryodrgn_amort.measures.bootstrap import Measure
    from cryodrgn_amort.measures.latents import Neighbours


__all__ = [
    "MovedLosses",
    "displacement",
    "displacement_sigma",
    "label_agreement",
    "moved_arrays",
    "moved_measures",
    "pair_scale",
    "random_pair_sigma",
    "retrieval_rank",
    "spread",
]

_BLOCK = (256, 4096)  # of distances: 8 MB
_PAIRS = 100_000


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


def label_agreement(before: np.ndarray, after: np.ndarray) -> float:
    """Share of particles whose kNN label is the same before and after."""
    return float((before == after).mean())


@dataclass(frozen=True)
class MovedLosses:
    """Reconstruction losses in nats of the same images, each `(M,)`.

    Attributes
    ----------
    own, mean
        Of the images: at their own latents, and at the mean latent.
    moved, control
        Of the transformed images, explained by what is transformed with them: at the latents of
        the transformed images, and at those of the images.
    """

    own: np.ndarray
    mean: np.ndarray
    moved: np.ndarray
    control: np.ndarray


def spread(values: np.ndarray, rows: np.ndarray, n: int) -> np.ndarray:
    """Put the values of a sample at their images: `(n,)`, NaN elsewhere."""
    found = np.full(n, np.nan)
    found[rows] = values
    return found


def moved_arrays(
    z: np.ndarray, logvar: np.ndarray, moved: np.ndarray, queries: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Return values per image `(N,)`; ranks are NaN but for ``queries``.

    Parameters
    ----------
    z, logvar, moved
        Posterior means and log variances of the images, and means of their copies: `(N, zdim)`.
    """
    scale = pair_scale(z, seed)
    return {
        "retrieval_rank": spread(retrieval_rank(z, moved, queries), queries, len(z)),
        "displacement": displacement(z, moved, scale),
        "displacement_sigma": displacement_sigma(z, moved, logvar),
    }


def moved_measures(
    z: np.ndarray,
    logvar: np.ndarray,
    moved: np.ndarray,
    arrays: dict[str, np.ndarray],
    near: Neighbours,
    labels: np.ndarray | None,
    losses: MovedLosses | None,
    *,
    rounds: int,
    seed: int,
) -> dict[str, Measure]:
    """Measure how far the copies are from their images, by name.

    Parameters
    ----------
    arrays
        Of ``moved_arrays``, whose queries are the rows of ``near``, the neighbours in ``z``.
    labels
        Classes `(N,)`, integers from 0, if they are known.
    """
    n, rows = len(z), near.rows
    other = np.random.default_rng(seed).permutation(n)
    opts: dict[str, Any] = {"rounds": rounds, "seed": seed}
    rank = arrays["retrieval_rank"][rows]
    shuffled = displacement(z, moved[other], pair_scale(z, seed))
    found = [
        measure("retrieval_rank", np.mean, rank, **opts),
        measure("top1", np.mean, (rank == 0).astype(float), null=1 / n, **opts),
        measure("displacement", np.median, arrays["displacement"],
                null=float(np.median(shuffled)), **opts),
        measure("displacement_sigma", np.median, arrays["displacement_sigma"],
                null=random_pair_sigma(z, logvar, seed), **opts),
        measure("latent_correlation", latent_correlation, z, moved, **opts),
    ]  # fmt: skip
    if labels is not None:
        before = knn_labels(near.own, labels)
        after = knn_labels(near.of(moved[rows]), labels)
        mixed = np.random.default_rng(seed).permutation(len(after))
        null = label_agreement(before, after[mixed])
        found.append(
            measure("label_agreement", label_agreement, before, after,
                    null=null, **opts)
        )  # fmt: skip
    if losses is not None:
        found += [
            measure("amortization_loss_fraction", loss_fraction, losses.moved, losses.own,
                    losses.mean, **opts),
            measure("control", np.mean, losses.control - losses.own, **opts),
        ]  # fmt: skip
    return {m.name: m for m in found}
