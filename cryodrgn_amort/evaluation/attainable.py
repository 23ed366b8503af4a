"""What the data allow: what the exact posterior over true structures reaches on some particles."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.measures import (
    StructurePosterior,
    coordinate_r2,
    fve_voxels,
    structure_posterior,
    volume_fve,
)

if TYPE_CHECKING:
    from cryodrgn_amort.data import Particles
    from cryodrgn_amort.evaluation.subject import Subject
    from cryodrgn_amort.measures import Measure
    from cryodrgn_amort.simulation import Imaging, Truth


__all__ = ["TruePosterior", "attainable"]
logger = logging.getLogger("cryodrgn_amort")

_AT_ONCE = 64  # images
_NODES = (5, 9, 17, 33, 65, 129)
_TRIED = 32  # particles by which their number is chosen
_CONVERGED = 0.002
_UNIFORM = 1 / 12  # variance of a coordinate from 0 to 1
_SURELY, _LEAST = 5, 0.02  # standard errors, and share by which the posterior is wrong, at least


class TruePosterior:
    """The posterior of class and coordinate by the true volumes, poses, CTFs and noise.

    The prior is that of the simulation: shares of the classes, coordinates uniform from 0 to 1.

    The coordinate has as many nodes as it takes: on some particles, with twice as many, neither
    class probabilities nor the mean coordinate change by more than 0.002 on average.

    Parameters
    ----------
    rows
        The particles, `(n,)`, sorted; of the first 32 of them the nodes are chosen.

    Attributes
    ----------
    nodes
        Coordinates at which structures are projected, `(T,)`; one, if nothing moves.
    """

    def __init__(
        self, particles: Particles, truth: Truth, imaging: Imaging, rows: np.ndarray
    ) -> None:
        assert truth.model is not None
        self._particles, self._imaging, self._model = particles, imaging, truth.model()
        shares = self._model.shares if imaging.shares is None else imaging.shares
        self.shares: np.ndarray = shares / shares.sum()
        self.nodes = np.full(1, 0.5) if truth.coordinate is None else self._chosen(rows[:_TRIED])

    def _chosen(self, rows: np.ndarray) -> np.ndarray:
        """Return nodes that are close enough."""
        for count, twice in itertools.pairwise(_NODES):
            nats = self._log_likelihood(rows, np.linspace(0, 1, twice))
            fine = structure_posterior(nats, self.shares)
            coarse = structure_posterior(nats[:, :, ::2], self.shares)
            change = np.abs(fine.classes - coarse.classes).max(1).mean()
            moved = np.abs(fine.coordinate - coarse.coordinate).mean()
            if max(change, moved) < _CONVERGED:
                return np.linspace(0, 1, count)
        return np.linspace(0, 1, _NODES[-1])

    def of(self, rows: np.ndarray) -> StructurePosterior:
        """Return the posterior of particles `(n,)`, sorted."""
        size = max(1, _AT_ONCE // self._particles.ntilts)
        parts = (rows[start : start + size] for start in range(0, len(rows), size))
        each = (self._log_likelihood(part, self.nodes) for part in parts)
        return StructurePosterior.joined([structure_posterior(n, self.shares) for n in each])

    def _log_likelihood(self, rows: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """Return the log likelihood of particles `(n,)`, `(n, K, T)`: the sum of their images'."""
        p, classes = self._particles, len(self.shares)
        labels = np.repeat(np.arange(classes), len(nodes))
        coordinate = np.tile(nodes, classes)
        index = torch.from_numpy(rows)
        images = index if p.tilts is None else p.tilts.usable(index)
        owners = index if p.tilts is None else p.tilts.owner(images)
        of_images = self._imaging.log_likelihood(
            self._model, p.raw(images), images.numpy(), labels, coordinate
        )
        found = np.zeros((len(rows), classes * len(nodes)))
        np.add.at(found, np.searchsorted(rows, owners.numpy()), of_images)
        return found.reshape(len(rows), classes, len(nodes))

    def volume_errors(
        self, truth: Truth, rows: np.ndarray, found: StructurePosterior
    ) -> np.ndarray:
        """Squared distances of true volumes from posterior mean ones, `(n,)`; see VolumeErrors."""
        structures = itertools.product(range(len(self.shares)), self.nodes)
        voxels = np.stack([fve_voxels(truth.render(k, float(t))) for k, t in structures])
        errors = [
            np.linalg.norm(fve_voxels(volume) - weights.ravel().astype(np.float32) @ voxels) ** 2
            for weights, volume in zip(found.weights, truth.volumes(rows), strict=True)
        ]
        return np.array(errors)


def attainable(subject: Subject, truth: Truth, spreads: np.ndarray | None) -> list[Measure]:
    """Measure what the exact posterior tells of class, coordinate and volume.

    Nothing where the truth is not made of a few classes; and, but for a line in the log, if it
    contradicts the truth: then the images are not what the simulation's folder says.

    Parameters
    ----------
    spreads
        Of ``VolumeErrors``, of ``Subject.truth_sample``; None: all volumes are the same.
    """
    if truth.model is None:
        return []
    sample, theirs, options = subject.sample, subject.truth_sample, subject.options
    rows = np.union1d(sample, theirs)
    assert subject.imaging is not None
    posterior = TruePosterior(subject.particles, truth, subject.imaging, rows)
    every = posterior.of(rows)
    at, of_volumes = (np.searchsorted(rows, some) for some in (sample, theirs))
    labels = truth.labels[sample]
    right = (every.classes[at].argmax(1) == labels).astype(float)
    surprises = [every.classes[at].max(1) - right]
    told = every.coordinate[at]
    if truth.coordinate is not None:
        off = (told - truth.coordinate[sample]) ** 2
        surprises.append((off - every.variance[at]) / _UNIFORM)
    if any(_surely_above_0(values) for values in surprises):
        logger.warning(f"--truth {options.truth}: what the data allow is left out: the particles' "
                       "images are not what the folder says of them")  # fmt: skip
        return []
    found = []
    if len(posterior.shares) > 1 and options.labels is None:
        largest = float(posterior.shares.max())
        found.append(subject.measure("attainable_class", np.mean, right, null=largest))
    if truth.coordinate is not None and options.coordinate is None:
        true = truth.coordinate[sample]
        found.append(subject.measure("attainable_r2", coordinate_r2, told, true))
    if spreads is not None:
        errors = posterior.volume_errors(truth, theirs, every.at(of_volumes))
        found.append(subject.measure("attainable_fve", volume_fve, errors, spreads))
    return found


def _surely_above_0(values: np.ndarray) -> bool:
    """Tell whether the mean of values `(n,)` is surely, and by a difference that counts, above 0.

    Values are how often the posterior expects to be right minus how often it is, or by how much it
    is further off than it expects.
    """
    error = values.std() / np.sqrt(len(values))
    return bool(values.mean() > max(_LEAST, _SURELY * error))
