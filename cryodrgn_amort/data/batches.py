"""Batches on their way: read ahead, sent to the device, and finished there."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from cryodrgn_amort.data.particles import Batch
    from cryodrgn_amort.data.shuffler import Shuffler


__all__ = ["Batches", "Loaded", "Ordered", "Positions", "read_ahead"]
T = TypeVar("T")


@dataclass
class Loaded:
    """What was read of a batch, before it is made images and CTFs.

    Attributes
    ----------
    whole, whole_rows
        Its particles, those of all processes, and their images: positions in the data set, `(B,)`
        and `(M,)`, on the CPU.
    index, rows
        Those of this process.
    parts
        All that ``BatchLoader.finish`` works on, among it ``index`` and ``rows``: of batches that
        were sent, on the device.
    """

    whole: Tensor
    whole_rows: Tensor
    index: Tensor
    rows: Tensor
    parts: dict[str, Tensor]

    @property
    def size(self) -> int:
        """Number of particles in the batch, all processes together."""
        return len(self.whole)


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
    read, send, finish
        The steps from positions to a batch: in threads, and then on the device.
    threads
        How many batches are read at a time; 0: there is nothing to read ahead.
    """

    positions: Ordered | Shuffler
    generator: torch.Generator | None
    read: Callable[..., Loaded]
    send: Callable[[Loaded], Loaded]
    finish: Callable[[Loaded], Batch]
    threads: int

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.finish, self.loaded())

    def loaded(self) -> Generator[Loaded]:
        """Yield batches that were sent to the device, for ``finish``."""
        positions = iter(self.positions)
        if not self.threads:
            for at in positions:
                yield self.send(self.read(*at))
            return
        for read in read_ahead(self.read, positions, self.threads):
            yield self.send(read)


def read_ahead(
    read: Callable[..., T], positions: Iterator[tuple[Any, ...]], threads: int
) -> Generator[T]:
    """Yield what ``read`` gives for each of ``positions``, some of which are read in threads."""
    # in these PyTorch starts no further ones
    with ThreadPoolExecutor(threads, "read", torch.set_num_threads, (1,)) as pool:
        coming = deque(pool.submit(read, *at) for at in islice(positions, threads))
        while coming:
            found = coming.popleft().result()
            coming.extend(pool.submit(read, *at) for at in islice(positions, 1))
            yield found


@dataclass
class Ordered:
    """Positions in the order of the host's loader."""

    loader: Any
    rows_of: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((at, self.rows_of(at)) for at in iter(self.loader))


class Positions(torch.utils.data.Dataset[Any]):
    """What the loader loads: where the particles of a batch are in the data set."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, positions: list[int]) -> Tensor:
        return torch.tensor(positions)
