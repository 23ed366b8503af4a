"""How the decoder's work is cut into pieces that fit a cache, and shared among threads."""

from __future__ import annotations

import functools
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from cryodrgn_amort.core import free_memory, on_gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


__all__ = ["Buffers", "Piece", "rows_at_once", "shares", "side_by_side", "slices"]
_T = TypeVar("_T")

Piece: TypeAlias = tuple[slice, slice]
"""Some images, and some of their pixels."""
_CPU_ROWS, _GPU_ROWS = 1 << 12, 1 << 18  # pixels at a time: a cache's worth, a GPU's worth
_GPU_SHARE = 4  # of a GPU's free memory, what buffers take: one part of so many
_FEWEST_ROWS = 256  # below, products are slow
_WORTH = 5e7  # multiplications in a product that is worth a thread of its own


class Buffers:
    """Memory that is made once, and used again in every call, by each thread for itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[Any, Tensor] = {}

    def __call__(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Return `(rows, width)` numbers of any value, the same memory whenever ``name`` is."""
        key = (threading.get_ident(), name, width, dtype)
        found = self._held.get(key)
        if found is None or len(found) < rows:
            found = torch.empty(rows, width, dtype=dtype, device=self._device)
            self._held[key] = found
        return found[:rows]

    def held(self) -> list[Tensor]:
        """Return all that is held now."""
        return list(self._held.values())


def rows_at_once(device: torch.device, row_bytes: int) -> int:
    """Return how many pixels to work on at a time, each of which takes ``row_bytes`` of buffers."""
    if not on_gpu(device):
        return _CPU_ROWS
    free = free_memory(device)
    if free is None:
        return _GPU_ROWS
    return max(_CPU_ROWS, min(_GPU_ROWS, free // _GPU_SHARE // row_bytes))


def shares(images: int, pixels: int, width: int, most: int, *, cpu: bool) -> list[list[Piece]]:
    """Cut `(images, pixels)` into pieces, and give each thread that works its share, in order.

    Parameters
    ----------
    width
        Of the layers: on it depends whether several threads are worth it.
    most
        How many pixels at a time, ``rows_at_once``.
    """
    threads = _threads(images, pixels, width) if cpu else 1
    pieces = list(_pieces(images, pixels, threads, most))
    threads = min(threads, len(pieces))
    ends = [len(pieces) * k // threads for k in range(threads + 1)] if threads else []
    return [pieces[a:b] for a, b in itertools.pairwise(ends)]


def _threads(images: int, pixels: int, width: int) -> int:
    """Return how many threads of a processor work side by side, each on pieces of its own.

    That is faster than several threads for each product, which the rest has to wait for, once
    products take so long that the threads do not wait for the interpreter.
    """
    threads = torch.get_num_threads()
    rows = min(_CPU_ROWS, images * pixels // threads)
    return threads if rows * width**2 >= _WORTH else 1


def _pieces(images: int, pixels: int, threads: int, most: int) -> Iterator[Piece]:
    """Cut `(images, pixels)` into several whole images, or parts of one, at a time."""
    most = max(min(most, -(-images * pixels // threads)), min(most, _FEWEST_ROWS))
    together = max(1, most // pixels)
    parts = -(-pixels // most)
    step = -(-pixels // parts)
    for a in range(0, images, together):
        for r in range(0, pixels, step):
            yield slice(a, min(a + together, images)), slice(r, min(r + step, pixels))


def side_by_side(do: Callable[[list[Piece]], _T], shares: list[list[Piece]]) -> list[_T]:
    """Do each share in a thread of its own; returns what they gave, in order."""
    if len(shares) <= 1:
        return [do(share) for share in shares]

    def alone(share: list[Piece]) -> _T:
        with torch.no_grad():  # of this thread
            return do(share)

    return list(_pool(torch.get_num_threads()).map(alone, shares))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads in which PyTorch starts no further ones."""
    return ThreadPoolExecutor(threads, "decoding", initializer=torch.set_num_threads, initargs=(1,))


def slices(count: int, step: int) -> list[slice]:
    """Cut so many into parts of at most ``step``."""
    return [slice(a, min(a + step, count)) for a in range(0, count, step)]
