"""Random batches of images that are read from front to back (``--shuffler-size``)."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


__all__ = ["Shuffler"]

_Parts = tuple[Tensor, ...]
"""Particles `(B,)`, positions of their images `(B, tilts)`, the images `(B, tilts, box, box)`."""


class Shuffler:
    """Goes through all particles once, in random blocks of successive ones, mixed within.

    While batches are drawn from one block the next one is read: reading is in long runs, as disks
    and network file systems like it, and memory holds ``size`` images. The last batch has what is
    left.

    Parameters
    ----------
    n, batch_size
        Particles, and how many of them make a batch.
    size
        Particles in memory: two blocks. At least two batches.
    rows_of
        Tells the images of particles: `(B,)` -> `(M,)`.
    read
        Reads images. Runs in another thread.
    generator
        Draws the order; None: the global one.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        size: int,
        rows_of: Callable[[Tensor], Tensor],
        read: Callable[[Tensor], Tensor],
        generator: torch.Generator | None,
    ) -> None:
        self.n, self.batch_size, self.block = n, batch_size, size // 2
        self.rows_of, self.read, self.generator = rows_of, read, generator

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield particles `(B,)`, their images' positions `(M,)`, and these images."""
        # one draw, whatever follows: batches can be drawn ahead
        seed = torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        own = torch.Generator().manual_seed(int(seed))
        left: _Parts | None = None
        for parts, last in self._blocks(own):
            if left is not None:
                parts = tuple(torch.cat(both) for both in zip(left, parts, strict=True))
            order = torch.randperm(len(parts[0]), generator=own)
            whole = len(order) if last else len(order) - len(order) % self.batch_size
            for first in range(0, whole, self.batch_size):
                at = order[first : min(first + self.batch_size, whole)]
                index, rows, images = (part[at] for part in parts)
                yield index, rows.flatten(), images.flatten(0, 1)
            left = tuple(part[order[whole:]] for part in parts)

    def _blocks(self, generator: torch.Generator) -> Iterator[tuple[_Parts, bool]]:
        """Yield the blocks in random order, and whether it is the last, each read ahead."""
        blocks = torch.arange(self.n).split(self.block)
        order = torch.randperm(len(blocks), generator=generator).tolist()
        with ThreadPoolExecutor(1, "shuffler") as pool:

            def begin(number: int) -> tuple[Tensor, Tensor, Future[Tensor]]:
                rows = self.rows_of(blocks[number])
                return blocks[number], rows, pool.submit(self.read, rows)

            coming = begin(order[0])
            for following in [*order[1:], None]:
                index, rows, images = coming
                read = images.result()
                if following is not None:
                    coming = begin(following)
                n = len(index)
                yield (
                    (index, rows.view(n, -1), read.view(n, -1, *read.shape[1:])),
                    following is None,
                )
