"""Batches of particles: preprocessed once if there is room, and always read ahead."""

from __future__ import annotations

import logging
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cryodrgn_amort import host
from cryodrgn_amort.core import InputError, ProcessGroup
from cryodrgn_amort.data.particles import Batch, Share, odd_images, spans
from cryodrgn_amort.data.shuffler import Shuffler
from cryodrgn_amort.data.store import Store, make_room

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from cryodrgn_amort.data.inputs import EncoderInput
    from cryodrgn_amort.data.particles import Particles

    Progress = Callable[[Iterator[Any], int], Iterator[Any]]

__all__ = ["BatchLoader"]
logger = logging.getLogger("cryodrgn_amort")

_Read = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Particles of a whole batch, images of this process's share of it, and what was read of these."""
_CHUNK_PIXELS = 1 << 20
_GB = 1e9


class BatchLoader:
    """Hands out batches of particles with what an encoder is shown.

    Parameters
    ----------
    shown
        What a network is shown; None for tables.
    memory
        How many bytes preprocessed particles may take; 0: they are read from the stack whenever
        they are needed.
    folder
        Where a file of preprocessed particles may be put if they do not fit into memory.
    progress
        Wraps the preprocessing: takes an iterator and its length.

    Attributes
    ----------
    description
        Where the particles are kept, for humans.
    """

    def __init__(
        self,
        particles: Particles,
        shown: EncoderInput | None,
        *,
        memory: int,
        folder: Path | None = None,
        processes: ProcessGroup | None = None,
        progress: Progress = lambda items, total: items,
    ) -> None:
        self.particles, self.shown = particles, shown
        self.processes = processes or ProcessGroup()
        self._store: Store | None = None
        self._odd: dict[str, list[int]] = {"not finite": [], "constant": []}
        self.description = "read from the stack in every epoch"
        if memory > 0:
            self._prepare(memory, folder, progress)

    @property
    def from_stack(self) -> bool:
        """Whether images are read and preprocessed in every epoch."""
        return self._store is None

    def _prepare(self, memory: int, folder: Path | None, progress: Progress) -> None:
        """Preprocess the particles of this process, wherever there is room for them."""
        p, shown = self.particles, self.shown
        own = torch.arange(self.processes.rank, p.n, self.processes.size)
        others = shown is not None and shown.raw(p.rows_of(own[:1])) is not None
        rows, where = own if p.tilts is None else p.tilts.usable(own), None
        if self.processes.size > 1 and shown is not None and not others:
            rows = torch.cat([rows, p.rows_of(shown.rows(own))]).unique()
        if len(rows) != p.images.N or p.tilts is not None:
            where = np.full(p.images.N, -1, np.int64)
            where[rows.numpy()] = np.arange(len(rows))
        size, half, shared = len(p.pixels), len(p.mask) // 2, p.prepared
        values = len(rows) * size * ((shared is None) + others)
        new_ctfs = shared is None and p.ctf_params is not None
        ctfs = len(rows) * (4 * half + -(-size // 8)) if new_ctfs else 0
        choices = [  # type, with CTFs, bytes
            (np.dtype(kind), extra > 0, values * np.dtype(kind).itemsize + extra)
            for kind in ("float32", "float16")
            for extra in (ctfs, 0)
        ]
        choice = next((c for c in choices if c[2] <= memory), None)
        dtype, with_ctf, needed = choice or (np.dtype("float32"), False, 4 * values)
        in_file = choice is None
        if in_file and (folder is None or shutil.disk_usage(folder).free < 1.1 * needed):
            self.description += f": {needed / _GB:.1f} GB fit neither memory nor disk"
            return
        place = f"in a temporary file in {folder}" if in_file else "in memory"
        detail = ", with their CTFs" if with_ctf else ""
        self.description = (
            f"preprocessed once, {place} as {dtype}{detail}: {needed / _GB:.2f} GB "
            f"(up to {memory / _GB:.2f} GB of memory allowed)"
        )
        room = (len(rows), size), dtype, folder if in_file else None
        store = (
            replace(shared, shown=None)
            if shared
            else Store(make_room(*room), None, None, None, where)
        )
        if with_ctf:
            store.ctf = np.empty((len(rows), half), np.float32)
            store.flips = np.empty((len(rows), -(-size // 8)), np.uint8)
        if others:
            store.shown = make_room(*room)
        chunks = torch.arange(len(rows)).split(max(1, _CHUNK_PIXELS // p.D**2))
        for at in progress(iter(chunks), len(chunks)) if needed else ():
            self._fill(store, at.numpy(), rows[at], particles=shared is None)
        self._report_odd()
        self._store = store
        if self.processes.size == 1:
            p.prepared = store

    def _fill(self, store: Store, at: np.ndarray, rows: Tensor, *, particles: bool) -> None:
        """Preprocess what the encoder is shown, and the ``particles``, unless that was done."""
        p = self.particles
        ctf = p.ctf(rows) if store.ctf is not None or store.shown is not None else None
        if particles:
            raw = p.raw(rows)
            store.images[at] = p.centred(rows, raw).cpu().numpy()
            span = spans(raw)
            self._odd["not finite"] += rows[~span.isfinite()].tolist()
            self._odd["constant"] += rows[span == 0].tolist()
        if particles and store.ctf is not None and store.flips is not None and ctf is not None:
            half = p.half(ctf, rows)
            assert half is not None
            store.ctf[at] = half.cpu().numpy()
            store.flips[at] = np.packbits(ctf.cpu().numpy() < 0, axis=1)
        if store.shown is not None and self.shown is not None:
            image = p.centred(rows, self.shown.raw(rows))
            store.shown[at] = p.flip(image, ctf).cpu().numpy()

    def _report_odd(self) -> None:
        """Refuse images with pixels that are not finite; warn of those that are constant."""
        for what, found in self._odd.items():
            if not found:
                continue
            stack = self.particles.images.ind
            text = odd_images(found if stack is None else stack[found].tolist(), what)
            if what != "constant":
                raise InputError(f"PARTICLES: {text}; leave them out by --ind")
            logger.warning(f"PARTICLES: {text}")

    def read(self, index: Tensor) -> Batch:
        """Return some particles, by their positions in the data set `(B,)`."""
        return self._batch(*self._read(index, self.particles.rows_of(index)))

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool,
        shuffle_seed: int | None = None,
        threads: int = 1,
        rng: np.random.RandomState | None = None,
        shuffler_size: int = 0,
    ) -> Batches:
        """Go through all particles, in the host's order: its own loader draws the indices.

        Parameters
        ----------
        threads
            How many batches are read at a time, if they are read from the stack.
        rng
            Draws tilts; None: the first ones are used.
        shuffler_size
            Of the ``Shuffler`` that reads and orders the particles; 0: none does.
        """
        threads = threads if self.from_stack else 1
        rows_of = partial(self.particles.rows_of, rng=rng)
        if shuffler_size:
            own = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)
            shuffler = Shuffler(
                self.particles.n, batch_size, shuffler_size, rows_of, self.particles.raw, own
            )
            return Batches(shuffler, own, self._read, self._batch, threads)
        with host.quiet():
            ordered = host.make_dataloader(
                _Positions(self.particles.n),
                batch_size=batch_size,
                shuffle=shuffle,
                seed=shuffle_seed,
            )
        generator = getattr(ordered.sampler.sampler, "generator", None)
        return Batches(_Loaded(ordered, rows_of), generator, self._read, self._batch, threads)

    def _read(self, whole: Tensor, rows: Tensor, raw: Tensor | None = None) -> _Read:
        """Read what the batch of particles ``whole`` needs, images ``rows``, unless they are there.

        Runs in several threads.
        """
        if self.processes.size > 1:
            own = self.processes.own(whole)
            index, rows = whole[own], rows.view(len(whole), -1)[own].flatten()
        else:
            index = whole
        seen = None if self.shown is None else self._rows_shown(index, rows)
        if self._store is not None:
            found = self._store.read(rows.numpy(), None if seen is None else seen.numpy())
            return whole, rows, found
        images = self.particles.images
        if not len(index):  # all of the batch is other processes'
            return whole, rows, {"raw": torch.zeros(0, images.D, images.D)}
        raw = images.src.images(rows.numpy()) if raw is None else raw
        found = {"raw": host.preprocess(images, raw)}
        if seen is not None and self.shown is not None:
            raw = self.shown.raw(rows)
            if raw is None and not torch.equal(seen, rows):
                raw = images.src.images(seen.numpy())
            if raw is not None:
                found["raw_image"] = host.preprocess(images, raw)
        return whole, rows, found

    def _rows_shown(self, index: Tensor, rows: Tensor) -> Tensor:
        """Return which images a network is shown for particles `(B,)` with images ``rows``."""
        assert self.shown is not None
        others = self.shown.rows(index)
        return rows if torch.equal(others, index) else self.particles.rows_of(others)

    def _batch(self, index: Tensor, rows: Tensor, read: dict[str, Tensor]) -> Batch:
        """Finish on the device what was read."""
        p, processes = self.particles, self.processes
        share = None
        if processes.size > 1:
            places, size = processes.own(index), len(index)
            index = index[places]
            share = Share(processes.rows(index), places, size)
        read = {name: value.to(p.device, non_blocking=True) for name, value in read.items()}
        if "raw" in read:
            y = p.centre(read["raw"], None if p.trans is None else p.trans[rows])
        else:
            y = read["y"]
        ctf, half = None, read.get("ctf")
        if half is None:
            ctf = p.ctf(rows)
            half = p.half(ctf, rows)
        image = read.get("image")
        if self.shown is not None and image is None:
            image = self._shown(index, rows, y, ctf, read.get("raw_image"))
        return Batch(index, p.masked(y), image, p.rots[rows], half, share, rows)

    def _shown(
        self, index: Tensor, rows: Tensor, y: Tensor, ctf: Tensor | None, raw: Tensor | None
    ) -> Tensor:
        """Return what a network is shown if it was not prepared: `(B, S)`."""
        p = self.particles
        seen = self._rows_shown(index, rows)
        if not torch.equal(seen, rows):
            ctf = p.ctf(seen)
        if raw is not None:
            y = p.centre(raw, None if p.trans is None else p.trans[seen])
        elif not torch.equal(seen, rows):
            assert self._store is not None
            y = self._store.read(seen.numpy(), None)["y"].to(p.device)
        return p.flip(y, ctf)


@dataclass
class Batches:
    """Batches, some read while others are worked on.

    Attributes
    ----------
    positions
        Particles and images of each batch, and perhaps the images themselves. It draws random
        numbers: in none of the threads.
    generator
        The generator that shuffles, if there is one of its own.
    """

    positions: _Loaded | Shuffler
    generator: torch.Generator | None
    read: Callable[..., _Read]
    finish: Callable[[Tensor, Tensor, dict[str, Tensor]], Batch]
    threads: int

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Generator[Batch]:
        positions = iter(self.positions)
        # in these PyTorch starts no further ones
        with ThreadPoolExecutor(self.threads, "read", torch.set_num_threads, (1,)) as pool:
            coming = deque(pool.submit(self.read, *at) for at in islice(positions, self.threads))
            while coming:
                read = coming.popleft().result()
                coming.extend(pool.submit(self.read, *at) for at in islice(positions, 1))
                yield self.finish(*read)


@dataclass
class _Loaded:
    """Positions in the order of the host's loader."""

    loader: Any
    rows_of: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((at, self.rows_of(at)) for at in iter(self.loader))


class _Positions(torch.utils.data.Dataset[Any]):
    """What the loader loads: where the particles of a batch are in the data set."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, positions: list[int]) -> Tensor:
        return torch.tensor(positions)
