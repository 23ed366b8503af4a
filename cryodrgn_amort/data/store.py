"""Preprocessed images: in memory, in a file, or on a GPU."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cryodrgn_amort.core import naming, on_gpu

if TYPE_CHECKING:
    from pathlib import Path


__all__ = ["FROM_STACK", "Room", "Store", "flipped", "packed_signs"]

FROM_STACK = "read from the stack in every epoch"
_GB = 1e9

Kept: TypeAlias = "np.ndarray | Tensor"
"""An array in memory or in a file, or a tensor on a GPU."""


@dataclass
class Store:
    """Preprocessed images. Row r holds image ``rows[r]``.

    Attributes
    ----------
    images
        Centred Hartley images `(n, S)`, single or half precision.
    ctf, flips
        CTF `(n, P / 2)`, and where it is negative, 8 pixels to a byte, `(n, S / 8)`; or None.
    shown
        What the encoder is shown instead of particles `(n, S)`, phases flipped; or None.
    where
        Row of each image of the data set, `(N,)`; None: all images are here, in order.
    """

    images: Kept
    ctf: Kept | None
    flips: Kept | None
    shown: Kept | None
    where: np.ndarray | None

    @property
    def on_device(self) -> bool:
        """Whether all is on a GPU, where batches are picked by rows that are there as well."""
        return isinstance(self.images, Tensor)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Return the rows of images by their positions in the data set."""
        return index if self.where is None else self.where[index]

    def read(self, index: np.ndarray, seen: np.ndarray | None, *, flips: bool) -> dict[str, Tensor]:
        """Return what ``pick`` needs: rows if all is on a GPU and they differ, else what is there.

        Parameters
        ----------
        index
            Positions of images in the data set, `(M,)`.
        seen
            Of others that a network is shown; None: it is shown none, or the same.
        flips
            Whether there is a network, which is shown flipped phases.
        """
        at = {"at": torch.from_numpy(self.rows(index))}
        if seen is not None and self.shown is None:
            at["seen_at"] = torch.from_numpy(self.rows(seen))
        if not self.on_device:
            return self.pick(at, flips=flips)
        return {name: value for name, value in at.items() if self.where is not None}

    def pick(self, at: dict[str, Tensor], *, flips: bool) -> dict[str, Tensor]:
        """Return ``y`` as it is kept, and as far as it is known ``ctf`` and what is shown.

        That is ``image``, or ``flips`` of the particles, or ``seen_y`` with its ``flips``.
        """
        found = {"y": _rows(self.images, at["at"])}
        if self.ctf is not None:
            found["ctf"] = _rows(self.ctf, at["at"])
        if self.shown is not None:
            found["image"] = _rows(self.shown, at["at"])
            return found
        if "seen_at" in at:
            found["seen_y"] = _rows(self.images, at["seen_at"])
        if flips and self.flips is not None:
            found["flips"] = _rows(self.flips, at.get("seen_at", at["at"]))
        return found

    def put(self, rows: slice, **values: Tensor) -> None:
        """Keep values of some rows, by the names of the attributes."""
        for name, value in values.items():
            kept: Any = getattr(self, name)
            kept[rows] = value.to(kept.dtype) if isinstance(kept, Tensor) else value.cpu().numpy()


def _rows(kept: Kept, at: Tensor) -> Tensor:
    return kept[at] if isinstance(kept, Tensor) else torch.from_numpy(kept[at.numpy()])


def packed_signs(values: Tensor) -> Tensor:
    """Return where values `(n, S)` are negative, 8 to a byte, high bit first: `(n, S / 8)`."""
    if not on_gpu(values.device):
        return torch.from_numpy(np.packbits(values.numpy() < 0, axis=1))
    bits = torch.nn.functional.pad((values < 0).byte(), (0, -values.shape[1] % 8))
    return (bits.view(len(bits), -1, 8) * _bits(values.device)).sum(2).byte()


def flipped(values: Tensor, flips: Tensor) -> Tensor:
    """Return values `(n, S)` with the other sign where ``packed_signs`` were negative."""
    if not on_gpu(flips.device):
        bits = np.unpackbits(flips.numpy(), axis=1, count=values.shape[1])
        return values * torch.from_numpy(1 - 2 * bits.astype(np.float32))
    negative = (flips[:, :, None] & _bits(flips.device)).bool().flatten(1)[:, : values.shape[1]]
    return torch.where(negative, -values, values)


@functools.cache
def _bits(device: torch.device) -> Tensor:
    return torch.tensor([1 << place for place in range(7, -1, -1)], dtype=torch.uint8).to(device)


@dataclass
class Room:
    """Where preprocessed images can be.

    Attributes
    ----------
    dtype
        Of their pixels, "float32" or "float16".
    with_ctf
        Whether there is room for their CTFs as well.
    needed
        Bytes that they take.
    folder
        Where they are in a file; None: they are in memory.
    device
        The GPU in whose memory they are; None: they are in this machine's.
    there_is
        Whether there is any.
    description
        For humans.
    """

    dtype: str
    with_ctf: bool
    needed: int
    folder: Path | None
    device: torch.device | None
    there_is: bool
    description: str

    @classmethod
    def find(
        cls,
        values: int,
        ctfs: int,
        memory: int,
        device_memory: int,
        folder: Path | None,
        device: torch.device,
    ) -> Room:
        """Find room for so many pixels, and for so many bytes of CTFs if that can be.

        On the GPU, in memory, or in a file in ``folder``: see ``BatchLoader``.
        """
        choices = [
            (kind, extra > 0, values * np.dtype(kind).itemsize + extra)
            for kind in ("float32", "float16")
            for extra in (ctfs, 0)
        ]
        places = (device, device_memory, f"on {device}"), (None, memory, "in memory")
        for place, most, where in places if device_memory else places[1:]:
            for kind, with_ctf, needed in choices:
                if needed <= most:
                    text = _described(where, kind, needed, most, with_ctf=with_ctf)
                    return cls(kind, with_ctf, needed, None, place, True, text)
        needed = 4 * values
        text = _described(f"in a temporary file in {folder}", "float32", needed, memory)
        there_is = folder is not None and shutil.disk_usage(folder).free >= 1.1 * needed
        if not there_is:
            text = f"{FROM_STACK}: {needed / _GB:.1f} GB fit neither memory nor disk"
        return cls("float32", False, needed, folder, None, there_is, text)

    def make(self, shape: tuple[int, int], dtype: str | None = None) -> Kept:
        """Make an array there. A file is gone when this process is."""
        kind = np.dtype(dtype or self.dtype)
        if self.device is not None:
            return torch.empty(shape, dtype=getattr(torch, kind.name), device=self.device)
        if self.folder is None:
            return np.empty(shape, kind)
        with naming(f"{self.folder}/"), tempfile.TemporaryFile(dir=self.folder) as file:
            _reserve(file.fileno(), shape[0] * shape[1] * kind.itemsize)
            return np.memmap(file, kind, "w+", shape=shape)


def _described(where: str, kind: str, needed: int, most: int, *, with_ctf: bool = False) -> str:
    detail = ", with their CTFs" if with_ctf else ""
    return (
        f"preprocessed once, {where} as {kind}{detail}: {needed / _GB:.2f} GB "
        f"(up to {most / _GB:.2f} GB of memory allowed)"
    )


def _reserve(file: int, size: int) -> None:
    """Take the room for a file now: a disk that is full later would kill this process."""
    try:
        os.posix_fallocate(file, 0, size)
    except AttributeError:  # not on this system
        return
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
