"""What an encoder loses next to posteriors fitted particle by particle: numbers from arrays.

Cremer, Li & Duvenaud, arXiv 1801.03558; Zhang, Hayes & Barber, arXiv 2205.11640.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cryodrgn_amort.measures.bootstrap import Measure, measure
from cryodrgn_amort.measures.importance import SAMPLES, khat_limit
from cryodrgn_amort.measures.latents import Neighbours, knn_labels
from cryodrgn_amort.measures.losses import difference_of_means, gained_share

__all__ = ["FitValues", "class_measures", "fit_measures", "told_classes"]


@dataclass
class FitValues:
    """Values of the particles that were fitted, each `(M,)` but for ``z`` and ``own``.

    Attributes
    ----------
    gap
        ELBO of the fit minus that of the encoder; NaN where there is no encoder's answer.
    tighter
        Importance-weighted bound minus ELBO of the fit; NaN if it was not wanted.
    constant, encoder, fitted
        Reconstruction losses in nats: at the mean of all latents, the encoder's, the fitted ones.
    own, z
        The encoder's and the fitted means, `(M, zdim)`.
    khat, worth
        Of the importance weights: see ``tail_shapes``; NaN where they are not known.
    """

    gap: np.ndarray
    tighter: np.ndarray
    converged: np.ndarray
    constant: np.ndarray
    encoder: np.ndarray
    fitted: np.ndarray
    own: np.ndarray
    z: np.ndarray
    khat: np.ndarray
    worth: np.ndarray


def fit_measures(found: FitValues, seen: FitValues | None, opts: dict[str, Any]) -> list[Measure]:
    """Measure one set of particles; ``seen`` are those of the training if these are not.

    Each measure leaves out particles without a loss; those not trained on are compared with as
    many others.
    """
    measures = []
    known = np.isfinite(found.gap)
    if known.any():
        measures.append(measure("amortization_gap", np.mean, found.gap[known], **opts))
    if seen is not None and (both := known & np.isfinite(seen.gap)).any():
        measures.append(
            measure("generalisation_gap", difference_of_means, found.gap[both],
                    seen.gap[both], **opts)
        )  # fmt: skip
    if known.any():
        gained, possible = found.constant - found.encoder, found.constant - found.fitted
        name = "training_score" if seen is None else "held_out_score"
        measures.append(
            measure(name, gained_share, gained[known], possible[known], **opts)
        )  # fmt: skip
    known = np.isfinite(found.tighter)
    if known.any():
        measures.append(
            measure("approximation_gap", np.mean, found.tighter[known],
                    **opts)
        )  # fmt: skip
    known = np.isfinite(found.khat)
    if known.any():
        high = found.khat[known] > khat_limit(SAMPLES)
        measures += [
            measure("khat", np.median, found.khat[known], **opts),
            measure("khat_high", np.mean, high.astype(float), **opts),
            measure("effective_samples", np.mean, found.worth[known], **opts),
        ]
    converged = measure("converged", np.mean, found.converged, **opts)
    return [*measures, converged]


def class_measures(
    z: np.ndarray, labels: np.ndarray, found: FitValues, truth: np.ndarray, opts: dict[str, Any]
) -> list[Measure]:
    """Measure how well neighbours among the training particles tell the class of others.

    Parameters
    ----------
    z, labels
        Latents and classes of the training particles, `(N, zdim)` and `(N,)`.
    truth
        Classes of the others, `(M,)`.
    """
    near = Neighbours(z, np.arange(0))
    measures = []
    for name, latents in (("class_knn_encoder", found.own), ("class_knn_fitted", found.z)):
        known = np.isfinite(latents).all(1)
        if known.any():
            rows = near.of(latents[known].astype(np.float32))
            measures.append(told_classes(name, rows, labels, truth[known], opts))
    return measures


def told_classes(
    name: str, near: np.ndarray, labels: np.ndarray, truth: np.ndarray, opts: dict[str, Any]
) -> Measure:
    """Measure how often the neighbours of others tell their class.

    Parameters
    ----------
    near
        Positions of neighbours among the training particles, `(M, K)`.
    labels, truth
        Classes of the training particles `(N,)`, and of the others `(M,)`.
    """
    shares = np.bincount(labels) / len(labels)
    null = float((np.append(shares, np.zeros(truth.max() + 1))[truth]).mean())
    right = (knn_labels(near, labels) == truth).astype(float)
    return measure(name, np.mean, right, null=null, **opts)
