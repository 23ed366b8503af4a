"""How far latents move when images do: the measures of one transform, from arrays alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort import metrics
from cryodrgn_amort.metrics import measure

if TYPE_CHECKING:
    from cryodrgn_amort.metrics import Measure, Neighbours

__all__ = ["MovedLosses", "moved_arrays", "moved_measures", "spread"]


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
    scale = metrics.pair_scale(z, seed)
    return {
        "retrieval_rank": spread(metrics.retrieval_rank(z, moved, queries), queries, len(z)),
        "displacement": metrics.displacement(z, moved, scale),
        "displacement_sigma": metrics.displacement_sigma(z, moved, logvar),
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
    shuffled = metrics.displacement(z, moved[other], metrics.pair_scale(z, seed))
    found = [
        measure("retrieval_rank", np.mean, rank, null=0.5, ideal=0.0, **opts),
        measure("top1", np.mean, (rank == 0).astype(float), null=1 / n, ideal=1.0, **opts),
        measure("displacement", np.median, arrays["displacement"],
                null=float(np.median(shuffled)), ideal=0.0, **opts),
        measure("displacement_sigma", np.median, arrays["displacement_sigma"],
                null=metrics.random_pair_sigma(z, logvar, seed), ideal=0.0, **opts),
        measure("latent_correlation", metrics.latent_correlation, z, moved,
                null=0.0, ideal=1.0, **opts),
    ]  # fmt: skip
    if labels is not None:
        before = metrics.knn_labels(near.own, labels)
        after = metrics.knn_labels(near.of(moved[rows]), labels)
        mixed = np.random.default_rng(seed).permutation(len(after))
        null = metrics.label_agreement(before, after[mixed])
        found.append(
            measure("label_agreement", metrics.label_agreement, before, after,
                    null=null, ideal=1.0, **opts)
        )  # fmt: skip
    if losses is not None:
        found += [
            measure("amortization_loss_fraction", metrics.loss_fraction, losses.moved, losses.own,
                    losses.mean, null=1.0, ideal=0.0, **opts),
            measure("control", np.mean, losses.control - losses.own, null=None, ideal=0.0, **opts),
        ]  # fmt: skip
    return {m.name: m for m in found}
