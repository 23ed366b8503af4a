"""Tilt series: several images of one particle, which share its latent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from cryodrgn_amort import host


__all__ = ["TiltSeries"]


class TiltSeries:
    """Which images belong to which particle, and which of them are used.

    Parameters
    ----------
    images
        The host's data set, with the dose and the angle per tilt that it was given.
    ntilts
        Images that are used of each particle.
    random
        Whether training draws them anew each time; else they are the first ones in the file.

    Attributes
    ----------
    n
        Number of particles.
    members
        Images of each particle, positions in the data set.
    weighted
        Whether decoded images are weighted by dose and tilt angle (``--dose-per-tilt``).
    """

    def __init__(self, images: host.TiltSeriesData, ntilts: int, *, random: bool) -> None:
        self.members: list[np.ndarray] = images.particles
        self.n, self.ntilts, self.random = len(self.members), ntilts, random
        self.weighted = images.dose_per_tilt is not None
        self._images: Any = images
        self._first = torch.from_numpy(np.stack([own[:ntilts] for own in self.members]))
        self._owner = torch.empty(images.N, dtype=torch.long)
        for particle, own in enumerate(self.members):
            self._owner[own] = particle

    def rows(self, index: Tensor, rng: np.random.RandomState | None = None) -> Tensor:
        """Return images of particles `(B,)`, those of a particle together: `(B * ntilts,)`.

        ``rng`` draws them as the host does; without it they are the first ones.
        """
        if rng is None:
            return self._first[index].flatten()
        drawn = [rng.choice(self.members[i], self.ntilts, replace=False) for i in index.tolist()]
        return torch.from_numpy(np.concatenate(drawn)) if drawn else index

    def owner(self, rows: Tensor) -> Tensor:
        """Return the particles that images `(M,)` are of, `(M,)`."""
        return self._owner[rows]

    def usable(self, index: Tensor) -> Tensor:
        """Return all images of particles `(B,)` that ``rows`` may return, `(M,)`."""
        if not self.random:
            return self.rows(index)
        return torch.from_numpy(np.concatenate([self.members[i] for i in index.tolist()]))

    def weights(self, rows: Tensor, lattice: host.Lattice, apix: float) -> Tensor:
        """Return how much dose and tilt leave of each frequency, as the host has it: `(M, D * D)`.

        Grant & Grigorieff, eLife 4, e06980 (2015), times the cosine of the tilt angle.

        Parameters
        ----------
        apix
            Angstroms per pixel.
        """
        if not len(rows):  # the host cannot
            return torch.zeros(0, lattice.D**2, device=lattice.device)
        found = torch.as_tensor(self._images.get_dose_filters(rows.numpy(), lattice, apix))
        return found.to(lattice.device)
