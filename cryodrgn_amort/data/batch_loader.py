"""Batches of particles: preprocessed once if there is room, and always read ahead."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cryodrgn_amort import host
from cryodrgn_amort.core import InputError, ProcessGroup, on_gpu
from cryodrgn_amort.data.batches import Batches, Loaded, Ordered, Positions
from cryodrgn_amort.data.particles import Batch, Share, odd_images, spans
from cryodrgn_amort.data.shuffler import Shuffler
from cryodrgn_amort.data.store import FROM_STACK, Room, Store, flipped, packed_signs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cryodrgn_amort.data.inputs import EncoderInput
    from cryodrgn_amort.data.particles import Particles

    Progress = Callable[[Iterator[Any], int], Iterator[Any]]

__all__ = ["BatchLoader"]
logger = logging.getLogger("cryodrgn_amort")

_CHUNK_PIXELS = 1 << 20


class BatchLoader:
    """Hands out batches of particles with what an encoder is shown.

    Parameters
    ----------
    shown
        What a network is shown; None for tables.
    memory, device_memory
        How many bytes preprocessed particles may take, of this machine's memory and of a GPU's;
        0 of the first: they are read from the stack whenever they are needed.
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
        device_memory: int = 0,
        folder: Path | None = None,
        processes: ProcessGroup | None = None,
        progress: Progress = lambda items, total: items,
    ) -> None:
        self.particles, self.shown = particles, shown
        self.processes = processes or ProcessGroup()
        self._store: Store | None = None
        self._copies: Any = None  # a CUDA stream
        self._odd: dict[str, list[int]] = {"not finite": [], "constant": []}
        self.description = FROM_STACK
        if memory > 0:
            self._prepare(memory, device_memory, folder, progress)

    @property
    def from_stack(self) -> bool:
        """Whether images are read and preprocessed in every epoch."""
        return self._store is None

    @property
    def replays(self) -> bool:
        """Whether ``finish`` is always the same work on a GPU."""
        p, store = self.particles, self._store
        weighted = p.tilts is not None and p.tilts.weighted
        return store is not None and not (weighted and store.ctf is None)

    def _prepare(
        self, memory: int, device_memory: int, folder: Path | None, progress: Progress
    ) -> None:
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
        size, half = len(p.pixels), len(p.mask) // 2
        for shared in (p.prepared, None):
            new_ctfs = shared is None and p.ctf_params is not None
            values = len(rows) * size * ((shared is None) + others)
            ctfs = len(rows) * (4 * half + -(-size // 8)) if new_ctfs else 0
            there = device_memory if shared is None or shared.on_device else 0
            room = Room.find(values, ctfs, memory, there, folder, p.device)
            if shared is None or shared.on_device == (room.device is not None):
                break
        self.description = room.description
        if not room.there_is:
            return
        store = (
            replace(shared, shown=None)
            if shared
            else Store(room.make((len(rows), size)), None, None, None, where)
        )
        if room.with_ctf:
            store.ctf = room.make((len(rows), half), "float32")
            store.flips = room.make((len(rows), -(-size // 8)), "uint8")
        if others:
            store.shown = room.make((len(rows), size))
        step = max(1, _CHUNK_PIXELS // p.D**2)
        chunks = [slice(first, first + step) for first in range(0, len(rows), step)]
        for at in progress(iter(chunks), len(chunks)) if room.needed else ():
            self._fill(store, at, rows[at], particles=shared is None)
        self._report_odd()
        self._store = store
        if self.processes.size == 1:
            p.prepared = store

    def _fill(self, store: Store, at: slice, rows: Tensor, *, particles: bool) -> None:
        """Preprocess what the encoder is shown, and the ``particles``, unless that was done."""
        p, there = self.particles, rows.to(self.particles.device)
        ctf = p.ctf(there) if store.ctf is not None or store.shown is not None else None
        if particles:
            raw = p.raw(rows).to(p.device)
            store.put(at, images=p.centred(there, raw))
            span = spans(raw).cpu()
            self._odd["not finite"] += rows[~span.isfinite()].tolist()
            self._odd["constant"] += rows[span == 0].tolist()
        if particles and store.ctf is not None and ctf is not None:
            half = p.half(ctf, rows)
            assert half is not None
            store.put(at, ctf=half, flips=packed_signs(ctf))
        if store.shown is not None and self.shown is not None:
            raw_shown = self.shown.raw(rows)
            assert raw_shown is not None
            store.put(at, shown=p.flip(p.centred(there, raw_shown), ctf))

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
        return self.finish(self._sent(self._read(index, self.particles.rows_of(index))))

    def reload(self, loaded: Loaded) -> Loaded:
        """Read a batch again, and send it."""
        return self._sent(self._read(loaded.whole, loaded.whole_rows))

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
            return Batches(shuffler, own, self._read, self._sent, self.finish, threads)
        with host.quiet():
            ordered = host.make_dataloader(
                Positions(self.particles.n),
                batch_size=batch_size,
                shuffle=shuffle,
                seed=shuffle_seed,
            )
        generator = getattr(ordered.sampler.sampler, "generator", None)
        threads = 0 if self._store is not None and self._store.on_device else threads
        positions = Ordered(ordered, rows_of)
        return Batches(positions, generator, self._read, self._sent, self.finish, threads)

    def _read(self, whole: Tensor, rows: Tensor, raw: Tensor | None = None) -> Loaded:
        """Read what the batch of particles ``whole`` needs, images ``rows``, unless they are there.

        Runs in several threads.
        """
        index, whole_rows, parts = whole, rows, dict[str, Tensor]()
        if self.processes.size > 1:
            own = self.processes.own(whole)
            index, rows = whole[own], rows.view(len(whole), -1)[own].flatten()
            parts = {"own_rows": self.processes.rows(index), "places": own}
        parts["index"] = index
        if rows is not index:
            parts["rows"] = rows
        seen = None if self.shown is None else self._others_shown(index, rows)
        if seen is not None:
            parts["seen"] = seen
        if self._store is not None:
            others = None if seen is None else seen.numpy()
            parts |= self._store.read(rows.numpy(), others, flips=self.shown is not None)
        else:
            parts |= self._read_stack(rows, seen, raw)
        if self.particles.device.type == "cuda":  # else a copy would wait for the device
            parts = {name: value.pin_memory() for name, value in parts.items()}
        elif not on_gpu(self.particles.device):
            parts = self._widened(parts)
        return Loaded(whole, whole_rows, index, rows, parts)

    def _read_stack(
        self, rows: Tensor, seen: Tensor | None, raw: Tensor | None
    ) -> dict[str, Tensor]:
        """Read images, and what a network is shown instead; preprocess them if there is no GPU."""
        images = self.particles.images
        if not len(rows):  # all of the batch is other processes'
            return {"y": torch.zeros(0, images.D, images.D)}
        found = {"raw": images.src.images(rows.numpy()) if raw is None else raw}
        if self.shown is not None:
            other = self.shown.raw(rows)
            if other is None and seen is not None:
                other = images.src.images(seen.numpy())
            if other is not None:
                found["seen_raw"] = other
        if on_gpu(self.particles.device):
            return found
        names = {"raw": "y", "seen_raw": "seen_y"}
        return {names[name]: host.preprocess(images, one) for name, one in found.items()}

    def _others_shown(self, index: Tensor, rows: Tensor) -> Tensor | None:
        """Return which images a network is shown for particles `(B,)` with images ``rows``.

        None: these.
        """
        assert self.shown is not None
        others = self.shown.rows(index)
        return None if torch.equal(others, index) else self.particles.rows_of(others)

    def _widened(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make of what was kept numbers in single precision, and of flipped phases images."""
        if self._store is None:
            return parts
        parts = dict(parts)
        for name in {"y", "image", "seen_y"} & parts.keys():
            parts[name] = parts[name].float()
        if "flips" in parts:
            shown = parts.pop("seen_y") if "seen_y" in parts else parts["y"]
            parts["image"] = flipped(shown, parts.pop("flips"))
        return parts

    def _sent(self, loaded: Loaded) -> Loaded:
        """Send what was read to the device, once."""
        device, few = self.particles.device, self._store is not None and self._store.on_device
        if device.type != "cuda" or few:
            parts = {name: v.to(device, non_blocking=True) for name, v in loaded.parts.items()}
            return replace(loaded, parts=parts)
        self._copies = self._copies or torch.cuda.Stream(device)
        with torch.cuda.stream(self._copies):  # while earlier steps still run
            parts = {name: v.to(device, non_blocking=True) for name, v in loaded.parts.items()}
        steps = torch.cuda.current_stream(device)
        steps.wait_stream(self._copies)
        for value in parts.values():
            value.record_stream(steps)
        return replace(loaded, parts=parts)

    def finish(self, loaded: Loaded) -> Batch:
        """Make a batch of what was sent: on a GPU, all work is there."""
        p, parts = self.particles, loaded.parts
        if on_gpu(p.device):
            if self._store is not None and self._store.on_device:
                at = {"at": parts.get("at", parts.get("rows", parts["index"]))}
                if "seen" in parts and self._store.shown is None:
                    at["seen_at"] = parts.get("seen_at", parts["seen"])
                parts = {**parts, **self._store.pick(at, flips=self.shown is not None)}
            parts = self._widened(parts)
        index = parts["index"]
        rows, share = parts.get("rows", index), None
        if self.processes.size > 1:
            share = Share(parts["own_rows"], parts["places"], loaded.size)
        y = self._centred(parts, "", rows)
        ctf, half = None, parts.get("ctf")
        if half is None:
            ctf = p.ctf(rows)
            half = p.half(ctf, loaded.rows)
        image = parts.get("image")
        if self.shown is not None and image is None:
            seen = parts.get("seen")
            if seen is not None:
                ctf = p.ctf(seen)
            other = "seen_y" in parts or "seen_raw" in parts
            image = self._centred(parts, "seen_", rows if seen is None else seen) if other else y
            image = p.flip(image, ctf)
        rot = p.rots[rows]
        return Batch(
            loaded.index, p.masked(y), image, rot, half, share, images=loaded.rows, sent=index,
            sent_images=rows,
        )  # fmt: skip

    def _centred(self, parts: dict[str, Tensor], which: str, rows: Tensor) -> Tensor:
        """Return centred Hartley images `(M, S)` of what was read."""
        p, y = self.particles, parts.get(f"{which}y")
        if self._store is not None and y is not None:
            return y
        y = p.hartley(parts[f"{which}raw"]) if y is None else y
        return p.centre(y, None if p.trans is None else p.trans[rows])
