"""Several processes that train one run: who has which particles, and what they tell each other.

Started by ``torchrun``, which sets RANK, WORLD_SIZE and LOCAL_RANK. Particle i, and its row of
every table, belongs to process i mod WORLD_SIZE. All processes draw the same random numbers and go
through the same batches; each does its own particles of a batch, and the gradients are added up. So
the result does not depend on their number, but for rounding.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from cryodrgn_amort.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Set as AbstractSet

    from torch.nn import Module, Parameter


__all__ = ["Overlapping", "ProcessGroup", "alone", "join"]

_NEEDED = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(hours=2)  # within common work, one may preprocess while the others wait
_ENDLESS = timedelta(days=3650)  # what one does alone takes as long as it takes
_waiting: list[dist.ProcessGroup] = []  # the group that has such patience, once there is one


@dataclass(frozen=True)
class ProcessGroup:
    """The place of this process among those that share the work; alone unless told otherwise."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and log lines."""
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """How many of the processes are on this machine; all, if nobody says."""
        return _number("LOCAL_WORLD_SIZE", self.size) if self.size > 1 else 1

    def rows(self, index: Tensor) -> Tensor:
        """Return where a particle stands among the particles of its process."""
        return index if self.size == 1 else index // self.size

    def own(self, index: Tensor) -> Tensor:
        """Return the places in ``index`` of this process's particles."""
        return (index % self.size == self.rank).nonzero()[:, 0]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over all processes, in place, in one message."""
        if self.size == 1:
            return
        parts = list(tensors)
        flat = torch.cat([t.reshape(-1) for t in parts])
        dist.all_reduce(flat)
        _put_back(parts, flat)

    def max(self, value: int) -> int:
        """Return the largest of all processes' numbers."""
        if self.size == 1:
            return value
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        found = torch.tensor(value, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def gather(self, values: list[int]) -> list[int]:
        """Return the lists of all processes, one after the other."""
        if self.size == 1:
            return values
        lists: list[list[int]] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, values)
        return [value for part in lists for value in part]

    def collect(self, rows: Tensor, n: int) -> Tensor:
        """Put the rows `(n / size, ...)` of all processes together: `(n, ...)`.

        Only the leading process gets them; the others get an empty tensor.
        """
        if self.size == 1:
            return rows
        most = -(-n // self.size)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.leads else None
        dist.gather(padded, parts)
        if parts is None:
            return rows.new_empty(0, *rows.shape[1:])
        return torch.stack(parts, 1).flatten(0, 1)[:n]

    def spread(self, rows: Tensor, n: int) -> Tensor:
        """Put the rows of all processes together as ``collect`` does, in every process."""
        if self.size == 1:
            return rows
        whole = rows.new_zeros(n, *rows.shape[1:])
        whole[self.rank :: self.size] = rows
        self.sum_([whole])
        return whole

    def split(self, module: Module, names: AbstractSet[str]) -> None:
        """Of the buffers ``names``, which have a row per particle, keep this process's rows."""
        if self.size == 1:
            return
        held = dict(module.named_buffers())
        for name in names & held.keys():
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, self._own(held[name]).clone())

    def own_rows(self, state: Mapping[str, Any], names: AbstractSet[str]) -> dict[str, Any]:
        """Of a state that holds the rows of all processes, in ``names``, pick this one's."""
        return {k: self._own(v) if k in names else v for k, v in state.items()}

    def _own(self, rows: Tensor) -> Tensor:
        return rows[self.rank :: self.size]

    def rows_of_all(
        self, state: Mapping[str, Any], names: AbstractSet[str], n: int
    ) -> dict[str, Any]:
        """Put the rows of all processes together, ``n`` in each of ``names``, as ``collect``."""
        return {k: self.collect(v, n) if k in names else v for k, v in state.items()}

    def end_process(self) -> None:
        """End a command's process when all is done, if it is one of several: for commands alone.

        Python's own ending is left out: gloo's threads may still let go of tensors then, and crash
        (pytorch/pytorch#179291; 1 of 23 launches here).
        """
        if self.size > 1:
            self.wait()
            _waiting.clear()
            dist.destroy_process_group()
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def wait(self) -> None:
        """Wait until all processes have come here, however long one works alone before."""
        if self.size > 1:
            dist.barrier(group=_waiting[0])


class Overlapping(ProcessGroup):
    """The same, which begins to add up gradients of some parameters as soon as all are known.

    While others are still computed. Whoever takes a step calls ``sum_`` on all of them, as ever.

    Parameters
    ----------
    groups
        Parameters whose gradients are known together.
    """

    _begun: dict[int, tuple[list[Tensor], Tensor, Any]]

    def __init__(self, processes: ProcessGroup, groups: Iterable[list[Parameter]]) -> None:
        super().__init__(processes.rank, processes.size)
        object.__setattr__(self, "_begun", {})  # of a frozen class
        for number, group in enumerate(groups if self.size > 1 else ()):
            for parameter in group:
                parameter.register_post_accumulate_grad_hook(
                    functools.partial(self._came, number, group)
                )

    def _came(self, number: int, group: list[Parameter], _: Tensor) -> None:
        """Begin, once the gradients of the whole group are there."""
        gradients = [p.grad for p in group if p.grad is not None]
        if len(gradients) == len(group):
            flat = torch.cat([g.reshape(-1) for g in gradients])
            self._begun[number] = gradients, flat, dist.all_reduce(flat, async_op=True)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors, and end what has begun."""
        rest = {id(tensor): tensor for tensor in tensors}
        for gradients, flat, work in self._begun.values():
            work.wait()
            _put_back(gradients, flat)
            for gradient in gradients:
                del rest[id(gradient)]
        self._begun.clear()
        if rest:
            super().sum_(rest.values())


def _put_back(tensors: list[Tensor], flat: Tensor) -> None:
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def join() -> ProcessGroup:
    """Become one of the processes that ``torchrun`` started, or the only one.

    Raises
    ------
    InputError
        If what the environment says of several processes is incomplete, or makes no sense.
    """
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    if size == 1 and rank == 0:
        return ProcessGroup()
    if missing := [name for name in _NEEDED if not os.environ.get(name)]:
        given = ", ".join(f"{n} {os.environ[n]}" for n in _NEEDED[:2] if os.environ.get(n))
        raise InputError(
            f"{given}: is set, {' and '.join(missing)} not: start several processes by torchrun, "
            f"which sets all; for a single one, unset {' and '.join(_NEEDED[:2])}"
        )
    if rank >= size:
        raise InputError(f"RANK {rank}: must be below WORLD_SIZE, {size}")
    _number("MASTER_PORT", 0)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = _number("LOCAL_RANK", 0)
    if gpus > 1 and not os.environ.get("LOCAL_RANK"):
        raise InputError(f"LOCAL_RANK: is not set, and this machine has {gpus} GPUs")
    if gpus and local >= gpus:
        raise InputError(f"LOCAL_RANK {local}: this machine has {gpus} GPUs, one for each process")
    if not dist.is_initialized():
        if gpus:
            torch.cuda.set_device(local)
        try:
            dist.init_process_group("nccl" if gpus else "gloo", timeout=_PATIENCE)
        except RuntimeError as err:  # among them all that torch.distributed has
            where = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT"
            reason = str(err).splitlines()[0]
            raise InputError(f"{where} {os.environ['MASTER_PORT']}: {reason}") from None
    if not _waiting:  # of gloo with any backend: a GPU would be kept busy by waiting
        _waiting.append(dist.new_group(backend="gloo", timeout=_ENDLESS))
    return ProcessGroup(dist.get_rank(), size)


def alone() -> None:
    """Forget that this process is one of several: what it starts is not."""
    for name in _NEEDED[:2]:
        os.environ.pop(name, None)


def _number(name: str, default: int) -> int:
    """Read a variable of the environment; empty, it is not set."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or (name.endswith("SIZE") and int(text) == 0):
        raise InputError(f"{name} {text}: a whole number is needed")
    return int(text)
