"""What is measured of a run itself: how its latents are used, and what they tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.evaluation.calibration import calibrate
from cryodrgn_amort.evaluation.fits import encoding_cost
from cryodrgn_amort.evaluation.truth_measures import noise_swap, truth_measures
from cryodrgn_amort.measures import (
    OF_LATENTS,
    Measure,
    Neighbours,
    aggregate_kl,
    calibration_measures,
    class_knn,
    coordinate_r2,
    kl_by_dimension,
    knn_coordinate,
    nuisances,
    single,
    spread,
    told_classes,
)

if TYPE_CHECKING:
    from cryodrgn_amort.evaluation.subject import Own, Subject
    from cryodrgn_amort.measures import Calibration


__all__ = ["calibrated", "run_measures"]


def run_measures(subject: Subject, own: Own) -> tuple[dict[str, Measure], dict[str, np.ndarray]]:
    """Measure latent use, the fit to the images and, where it is known, the heterogeneity.

    Returns measures by name, and arrays of values per particle `(N,)`.
    """
    z, logvar, near, known = own.z, own.logvar, own.near, subject.known
    found = [single(name, of(z), len(z)) for name, of in OF_LATENTS.items()]
    if np.isfinite(logvar).all():  # train_dec has no posteriors
        kl = kl_by_dimension(z, logvar).sum(1)
        aggregate = aggregate_kl(z, logvar, subject.options.seed)
        found += [
            subject.measure("kl", np.mean, kl),
            subject.measure("aggregate_kl", np.mean, aggregate),
        ]
    losses, null = own.losses["own"], float(own.losses["mean"].mean())
    found.append(subject.measure("reconstruction", np.mean, losses, null=null))
    arrays = {"reconstruction": spread(losses, subject.sample, len(z))}
    if known.labels is not None:
        shares = np.bincount(known.labels) / len(known.labels)
        right = class_knn(near.own, known.labels, near.rows)
        null = float((shares**2).sum())
        found.append(subject.measure("class_knn", np.mean, right, null=null))
    if known.coordinate is not None:
        told, true = knn_coordinate(near.own, known.coordinate), known.coordinate[near.rows]
        found.append(subject.measure("coordinate_r2", coordinate_r2, told, true))
    if known.truth is not None:
        more, more_arrays = truth_measures(subject, known.truth, z)
        found += more + noise_swap(subject, known.truth, z)
        arrays |= more_arrays
    found += _nuisance_leaks(subject, near)
    return {m.name: m for m in found}, arrays


def _nuisance_leaks(subject: Subject, near: Neighbours) -> list[Measure]:
    """Measure what neighbours in latent space tell of pose, defocus and shift."""
    p = subject.particles
    first = p.rows_of(torch.arange(p.n))[:: p.ntilts]  # of a tilt series, the first image
    rots, trans, ctf = (
        None if t is None else t[first].cpu().numpy() for t in (p.rots, p.trans, p.ctf_params)
    )
    assert rots is not None
    mixed = np.random.default_rng(subject.options.seed).permutation(p.n)
    found = []
    for name, values in nuisances(rots, trans, ctf).items():
        told, other = (knn_coordinate(near.own, v) for v in (values, values[mixed]))
        null = coordinate_r2(other, values[mixed][near.rows])
        found.append(
            subject.measure(f"nuisance_leak_{name}", coordinate_r2, told, values[near.rows],
                            null=null)
        )  # fmt: skip
    return found


def calibrated(subject: Subject, own: Own) -> tuple[dict[str, np.ndarray] | None, list[Measure]]:
    """Measure how far the encoder's intervals, and the decoder's images, can be believed.

    Returns where true latents lie in the encoder's posteriors (``Calibration.places``), and
    measures; nothing of either for images with corners and for tilt series, which are not made up.
    """
    if subject.particles.whole or subject.particles.tilts:
        return None, []
    seed = subject.run.settings.seed + 1  # not what an encoder may have been trained on
    others = subject.fitters.get("held-out", subject.fitters["training"])
    found = calibrate(subject.codec.model, subject.particles, own.z, own.logvar, others, seed)
    measures = calibration_measures(found, subject.opts)
    measures += _held_out_measures(subject, found, own.z)
    return found.places, [*measures, encoding_cost(others, subject.options.fit)]


def _held_out_measures(subject: Subject, found: Calibration, z: np.ndarray) -> list[Measure]:
    """Measure what neighbours among the training particles ``z`` tell of held-out ones."""
    known, held, sample = subject.known, subject.held_known, found.sample
    if held.labels is None and held.coordinate is None:
        return []
    near = Neighbours(z, np.arange(0)).of(found.means.astype(z.dtype))
    measures = []
    if held.labels is not None and known.labels is not None:
        truth = held.labels[sample]
        measures.append(told_classes("class_knn_held_out", near, known.labels, truth, subject.opts))
    if held.coordinate is not None and known.coordinate is not None:
        told, true = knn_coordinate(near, known.coordinate), held.coordinate[sample]
        measures.append(
            subject.measure("coordinate_r2_held_out", coordinate_r2, told, true)
        )  # fmt: skip
    return measures
