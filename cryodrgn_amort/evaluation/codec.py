"""A run's model at work: it encodes particles and copies of them, and decodes latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.core import Halving, ProcessGroup, bar
from cryodrgn_amort.data import Batch, read_ahead
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


@dataclass
class Images:
    """Some particles `(B,)` and their images `(M,)`: positions on the CPU, and all on the device.

    Attributes
    ----------
    raw
        Real-space images, `(M, box, box)`.
    """

    index: Tensor
    rows: Tensor
    sent: Tensor
    sent_rows: Tensor
    raw: Tensor

    def of(self, some: slice) -> Images:
        """Return those of some of the particles."""
        if some.stop - some.start == len(self.index):
            return self
        tilts = len(self.rows) // len(self.index)
        at = slice(some.start * tilts, some.stop * tilts)
        return Images(
            self.index[some], self.rows[at], self.sent[some], self.sent_rows[at], self.raw[at]
        )


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
        self._ctf_kept: dict[Transform, bool] = {}

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
        halving = Halving("Particles that are encoded")
        for images in self._read(bar(own.split(self.at_once), "encoding"), shown=True):
            todo = partial(self._encoded, images, transforms)
            for found in halving(todo, len(images.index)):
                for key, posterior in found.items():
                    parts[key].append(posterior)
        joined = {
            key: processes.collect(torch.cat(parts.pop(key)), particles.n).cpu().numpy()
            for key in keys
        }
        zdim = joined[_OWN].shape[1] // 2
        split = {key: (both[:, :zdim], both[:, zdim:]) for key, both in joined.items()}
        return *split.pop(_OWN), split

    def _encoded(
        self, whole: Images, transforms: Transforms, some: slice
    ) -> dict[tuple[str, str], Tensor]:
        """Encode some particles of a batch, and their copies."""
        images = whole.of(some)
        y, held = self.particles.hartley(images.raw), self._tables(images)
        found = {_OWN: self.posterior(self.batch(images, y, held))}
        for name, transform in transforms:
            copy = self._copy(images.raw, y, transform)
            for mode in MODES:
                tables = self._tables(images, transform, held) if mode == "follow" else held
                found[(name, mode)] = self.posterior(self.batch(images, copy, tables))
        return found

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
        latents = {n: torch.from_numpy(np.array(z, np.float32)).to(p.device) for n, z in zs.items()}
        found: dict[str, list[Tensor]] = {name: [] for name in zs}
        halving = Halving("Particles whose loss is measured")

        def measured(whole: Images, some: slice) -> None:
            images = whole.of(some)
            y = p.hartley(images.raw)
            y = y if transform is None else self._copy(images.raw, y, transform)
            batch = self.batch(images, y, self._tables(images, transform))
            each = [self.model.errors(batch, z[images.sent])[1] for z in latents.values()]
            for name, values in zip(found, each, strict=True):  # of all, or none if memory is full
                found[name].append(values)

        for images in self._read(iter(torch.from_numpy(sample).split(self.at_once))):
            list(halving(partial(measured, images), len(images.index)))
        # in units of the noise's standard deviation (the host's normalisation): nats
        return {n: (torch.cat(e).cpu().numpy() / 2).astype(np.float64) for n, e in found.items()}

    def _read(self, parts: Iterator[Tensor], *, shown: bool = False) -> Iterator[Images]:
        """Read particles ahead, some at a time, and send their images to the device.

        Parameters
        ----------
        shown
            Whether what a network is shown of them is wanted, not they themselves.
        """
        p, given = self.particles, self.shown if shown else None

        def read(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            rows = p.rows_of(index if given is None else given.rows(index))
            raw = None if given is None else given.raw(p.rows_of(index))
            raw = p.raw(rows) if raw is None else raw
            return index, rows, raw.pin_memory() if p.device.type == "cuda" else raw

        for read_of in read_ahead(read, ((index,) for index in parts), 1):
            yield self.sent(*read_of)

    def sent(self, index: Tensor, rows: Tensor, raw: Tensor) -> Images:
        """Send real-space images `(M, box, box)` of ``rows``, of particles ``index``."""
        device = self.particles.device
        there = [part.to(device, non_blocking=True) for part in (index, rows, raw)]
        return Images(index, rows, *there)

    def batch(self, images: Images, hartley: Tensor, tables: _Tables | None = None) -> Batch:
        """Make a batch of preprocessed images `(M, D, D)`, and their tables.

        Those of ``images`` as they are, unless given.
        """
        p = self.particles
        rot, trans, ctf = self._tables(images) if tables is None else tables
        y = p.centre(hartley, trans)
        return Batch(
            images.index, p.masked(y), p.flip(y, ctf), rot, p.half(ctf, images.rows),
            sent=images.sent,
        )  # fmt: skip

    def _copy(self, raw: Tensor, y: Tensor, transform: Transform) -> Tensor:
        """Transform images `(M, box, box)`, preprocessed as ``y`` `(M, D, D)`; to the latter."""
        copy = transform.hartley(y)
        return self.particles.hartley(transform.image(raw)) if copy is None else copy

    def _tables(
        self, images: Images, transform: Transform | None = None, held: _Tables | None = None
    ) -> _Tables:
        """Return rotation, translation and CTF of images, changed by a transform if given.

        ``held`` are those that are not changed, if known: the CTF may be as it was.
        """
        p, rows = self.particles, images.sent_rows
        rot = p.rots[rows]
        trans = None if p.trans is None else p.trans[rows]
        params = None if p.ctf_params is None else p.ctf_params[rows]
        if transform is not None:
            trans = rot.new_zeros(len(rows), 2) if trans is None else trans
            rot, trans = transform.pose(rot, trans)
        if transform is not None and params is not None:
            if held is not None and self._keeps_ctf(transform):
                return rot, trans, held[2]
            params = transform.ctf(params.clone())
        return rot, trans, p.ctf_of(params)

    def _keeps_ctf(self, transform: Transform) -> bool:
        """Whether a transform leaves all CTFs as they are."""
        if transform not in self._ctf_kept:
            params = self.particles.ctf_params
            assert params is not None
            self._ctf_kept[transform] = bool((transform.ctf(params.clone()) == params).all())
        return self._ctf_kept[transform]

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
