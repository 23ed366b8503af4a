"""A run's model at work: it encodes particles and copies of them, and decodes latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.core import ProcessGroup, bar
from cryodrgn_amort.data import Batch
from cryodrgn_amort.report import MODES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from cryodrgn_amort.data import EncoderInput, Particles, Transform
    from cryodrgn_amort.models import AmortVAE


__all__ = ["Codec", "Posteriors", "Transforms", "Volumes"]

Posteriors = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]
"""Name and mode of a transform -> means and log variances of the copies, each `(N, zdim)`."""

Transforms = list[tuple[str, "Transform"]]
"""Names, as on the command line, and what they name."""

Volumes = Callable[[], "Iterator[np.ndarray]"]
"""Gives volumes one by one, whenever it is called."""

_Tables = tuple["Tensor", "Tensor | None", "Tensor | None"]
"""Rotations, translations and CTFs, as ``Particles`` has them."""

_OWN = ("", "held")  # the particles themselves, among the copies
_VOXELS_KEPT = 250_000_000  # of the particles' own volumes: 1 GB


class Codec:
    """Encodes particles and transformed copies of them, and decodes latents.

    Parameters
    ----------
    shown
        What the model's encoder is shown; None: it is a table, and encodes nothing.
    batch_size
        How many images are worked on at a time.
    processes
        Processes that share the encoding.
    """

    def __init__(
        self,
        particles: Particles,
        model: AmortVAE,
        shown: EncoderInput | None,
        batch_size: int,
        processes: ProcessGroup | None = None,
    ) -> None:
        self.particles, self.model, self.shown = particles, model, shown
        self.processes = processes or ProcessGroup()
        self.at_once = max(1, batch_size // particles.ntilts)  # particles

    @torch.no_grad()
    def encode(self, transforms: Transforms) -> tuple[np.ndarray, np.ndarray, Posteriors]:
        """Encode all particles and all copies, from one reading of the images.

        Returns means and log variances of the particles, `(N, zdim)` each, and those of the copies.
        Of several processes, only the leading one gets all of them.
        """
        assert self.shown is not None
        particles, processes = self.particles, self.processes
        keys = [_OWN] + [(name, mode) for name, _ in transforms for mode in MODES]
        parts: dict[tuple[str, str], list[Tensor]] = {key: [] for key in keys}
        own = torch.arange(processes.rank, particles.n, processes.size)
        for index in bar(own.split(self.at_once), "encoding"):
            rows = particles.rows_of(self.shown.rows(index))
            raw = self.shown.raw(particles.rows_of(index))
            raw = particles.raw(rows) if raw is None else raw
            y, held = particles.hartley(raw), self._tables(rows)
            parts[_OWN].append(self.posterior(self.batch(index, rows, y, held)))
            for name, transform in transforms:
                copy = self._copy(raw, y, transform)
                for mode in MODES:
                    tables = self._tables(rows, transform, held) if mode == "follow" else held
                    batch = self.batch(index, rows, copy, tables)
                    parts[(name, mode)].append(self.posterior(batch))
        joined = {
            key: processes.collect(torch.cat(parts.pop(key)), particles.n).cpu().numpy()
            for key in keys
        }
        zdim = joined[_OWN].shape[1] // 2
        split = {key: (both[:, :zdim], both[:, zdim:]) for key, both in joined.items()}
        return *split.pop(_OWN), split

    def posterior(self, batch: Batch) -> Tensor:
        """Encode a batch; returns means and log variances side by side, `(B, 2 zdim)`."""
        return torch.cat(self.model.posterior(batch), 1).float()

    @torch.no_grad()
    def losses(
        self, zs: dict[str, np.ndarray], sample: np.ndarray, transform: Transform | None = None
    ) -> dict[str, np.ndarray]:
        """Measure the reconstruction loss of particles ``sample`` `(S,)` in nats, each `(S,)`.

        Parameters
        ----------
        zs
            Latents of all particles, `(N, zdim)`, by name.
        transform
            Changes the particles together with their poses and CTFs.
        """
        p = self.particles
        found: dict[str, list[np.ndarray]] = {name: [] for name in zs}
        for index in torch.from_numpy(sample).split(self.at_once):
            rows = p.rows_of(index)
            raw = p.raw(rows)
            y = p.hartley(raw)
            y = y if transform is None else self._copy(raw, y, transform)
            batch = self.batch(index, rows, y, self._tables(rows, transform))
            for name, z in zs.items():
                latent = torch.from_numpy(z[index.numpy()]).float().to(p.device)
                # in units of the noise's standard deviation (the host's normalisation): nats
                found[name].append(self.model.errors(batch, latent)[1].cpu().numpy() / 2)
        return {name: np.concatenate(parts).astype(np.float64) for name, parts in found.items()}

    def batch(
        self, index: Tensor, rows: Tensor, hartley: Tensor, tables: _Tables | None = None
    ) -> Batch:
        """Make a batch of particles `(B,)` from images `(M, D, D)` of ``rows``, and their tables.

        The tables are those of ``rows`` unless given.
        """
        p = self.particles
        rot, trans, ctf = self._tables(rows) if tables is None else tables
        y = p.centre(hartley, trans)
        return Batch(index, p.masked(y), p.flip(y, ctf), rot, p.half(ctf, rows))

    def _copy(self, raw: Tensor, y: Tensor, transform: Transform) -> Tensor:
        """Transform images `(M, box, box)`, preprocessed as ``y`` `(M, D, D)`; to the latter."""
        copy = transform.hartley(y)
        return self.particles.hartley(transform.image(raw)) if copy is None else copy

    def _tables(
        self, rows: Tensor, transform: Transform | None = None, held: _Tables | None = None
    ) -> _Tables:
        """Return rotation, translation and CTF of ``rows``, changed by a transform if given.

        ``held`` are those that are not changed, if known: the CTF may be as it was.
        """
        p = self.particles
        rot = p.rots[rows]
        trans = None if p.trans is None else p.trans[rows]
        params = None if p.ctf_params is None else p.ctf_params[rows]
        if transform is not None:
            trans = rot.new_zeros(len(rows), 2) if trans is None else trans
            rot, trans = transform.pose(rot, trans)
        if transform is not None and params is not None:
            own, params = params, transform.ctf(params.clone())
            if held is not None and bool((params == own).all()):
                return rot, trans, held[2]
        return rot, trans, p.ctf_of(params)

    def volumes(self, z: np.ndarray) -> Volumes:
        """Decode volumes `(box, box, box)` once if they fit into memory, else whenever needed."""
        if len(z) * self.particles.D**3 > _VOXELS_KEPT:
            return lambda: self.decode(z)
        kept = list(self.decode(z))
        return lambda: iter(kept)

    def decode(self, z: np.ndarray) -> Iterator[np.ndarray]:
        """Decode volumes `(box, box, box)` as ``cryodrgn eval_vol`` does, one by one."""
        latents = torch.from_numpy(z).float().to(self.particles.device)
        volumes = self.model.decode_volumes(latents, self.particles.norm)
        return (volume.numpy().astype(np.float32) for volume in bar(volumes, "volumes", len(z)))
