"""Preprocessed images, in memory or in a file."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.core import naming

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


__all__ = ["Store", "make_room"]


@dataclass
class Store:
    """Preprocessed images. Row r holds image ``rows[r]``.

    Attributes
    ----------
    images
        Centred Hartley images `(n, S)`, float32 or float16, in memory or in a file.
    ctf, flips
        CTF `(n, P / 2)`, and where it is negative, 8 pixels to a byte, `(n, S / 8)`; or None.
    shown
        What the encoder is shown instead of particles `(n, S)`, phases flipped; or None.
    where
        Row of each image of the data set, `(N,)`; None: all images are here, in order.
    """

    images: np.ndarray
    ctf: np.ndarray | None
    flips: np.ndarray | None
    shown: np.ndarray | None
    where: np.ndarray | None

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Return the rows of images by their positions in the data set."""
        return index if self.where is None else self.where[index]

    def read(self, index: np.ndarray, shown: np.ndarray | None) -> dict[str, Tensor]:
        """Return ``y`` and, as far as it is known, ``ctf`` and the ``image`` that is shown."""
        rows = self.rows(index)
        found = {"y": self.images[rows].astype(np.float32, copy=False)}
        if self.ctf is not None:
            found["ctf"] = self.ctf[rows]
        if self.shown is not None:
            found["image"] = self.shown[rows].astype(np.float32, copy=False)
        elif shown is not None and self.flips is not None:
            same = np.array_equal(shown, index)
            at = rows if same else self.rows(shown)
            image = found["y"] if same else self.images[at].astype(np.float32)
            bits = np.unpackbits(self.flips[at], axis=1, count=image.shape[1])
            found["image"] = image * (1 - 2 * bits.astype(np.float32))
        return {name: torch.from_numpy(value) for name, value in found.items()}


def make_room(shape: tuple[int, int], dtype: np.dtype, folder: Path | None) -> np.ndarray:
    """Return an array for images: in memory, or in a file that is gone when this process is.

    Parameters
    ----------
    folder
        Where the file is put; None: the array is in memory.
    """
    if folder is None:
        return np.empty(shape, dtype)
    with naming(f"{folder}/"), tempfile.TemporaryFile(dir=folder) as file:
        _reserve(file.fileno(), shape[0] * shape[1] * dtype.itemsize)
        return np.memmap(file, dtype, "w+", shape=shape)


def _reserve(file: int, size: int) -> None:
    """Take the room for a file now: a disk that is full later would kill this process."""
    try:
        os.posix_fallocate(file, 0, size)
    except AttributeError:  # not on this system
        return
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
