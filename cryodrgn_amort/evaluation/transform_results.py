"""What is measured of transformed copies: latents, losses and volumes, next to the particles'."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cryodrgn_amort.measures import (
    MovedLosses,
    fsc,
    moved_arrays,
    moved_measures,
    volume_change,
    with_before,
)
from cryodrgn_amort.report import MODES, TransformResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryodrgn_amort.evaluation.codec import Posteriors, Volumes
    from cryodrgn_amort.evaluation.subject import Own, Subject
    from cryodrgn_amort.measures import Measure


__all__ = ["transform_results"]

_Pairs = tuple[np.ndarray, np.ndarray]


def transform_results(
    subject: Subject, own: Own, copies: Posteriors, volumes: Volumes
) -> list[TransformResult]:
    """Measure every transform in every mode; ``volumes`` are those of ``volume_sample``."""
    options, codec, labels = subject.options, subject.codec, subject.known.labels
    found = []
    with subject.clock.stage("volumes"):
        pairs = _pairs(volumes())
    for number, (name, transform) in enumerate(subject.transforms):
        shown = len(subject.labelled) if number < options.maps else 0
        zs = {"control": own.z, **{mode: copies[(name, mode)][0] for mode in MODES}}
        with subject.clock.stage("reconstruction"):
            losses = codec.losses(zs, subject.sample, transform)
        for mode in MODES:
            z, logvar = copies[(name, mode)]
            arrays = moved_arrays(own.z, own.logvar, z, subject.queries, options.seed)
            of_losses = MovedLosses(
                own.losses["own"], own.losses["mean"], losses[mode], losses["control"]
            )
            measures = moved_measures(
                own.z, own.logvar, z, arrays, own.near, labels, of_losses, **subject.opts
            )
            with subject.clock.stage("volumes"):
                of_copies = codec.decode(z[subject.volume_sample])
                more, first = _compare_volumes(subject, volumes(), of_copies, pairs, shown)
            control = transform.undone_by_centring and mode == "follow"
            found.append(
                TransformResult(
                    name, transform.title, mode, z, logvar, measures | more, arrays, first, control
                )
            )
    return found


def _compare_volumes(
    subject: Subject,
    own: Iterator[np.ndarray],
    copies: Iterator[np.ndarray],
    pairs: _Pairs,
    shown: int,
) -> tuple[dict[str, Measure], np.ndarray]:
    """Compare volumes with those of the copies; also returns the first ``shown`` of these."""
    changed, areas = [], []
    first: list[np.ndarray] = []
    for volume, copy in zip(own, copies, strict=True):
        changed.append(np.linalg.norm(volume - copy))
        areas.append(1 - fsc(volume, copy)[1:].mean())
        if len(first) < shown:
            first.append(copy)
    distances, losses = pairs
    found = [
        subject.measure("volume_change", volume_change, np.array(changed), distances),
        subject.measure("volume_fsc_loss", np.mean, np.array(areas),
                        null=float(losses.mean())),
    ]  # fmt: skip
    box = subject.particles.box
    return {m.name: m for m in found}, np.array(first, np.float32).reshape(-1, box, box, box)


def _pairs(volumes: Iterator[np.ndarray]) -> _Pairs:
    """Return distance, and 1 minus mean FSC, of each volume from the one before it, `(M,)` each."""
    found = [
        (np.linalg.norm(own - before), 1 - fsc(own, before)[1:].mean())
        for own, before in with_before(volumes)
    ]
    distances, losses = np.roll(np.array(found), 1, axis=0).T
    return distances, losses
