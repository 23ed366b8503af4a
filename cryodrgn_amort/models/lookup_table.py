"""The Variational Lookup Table: a mean and a log variance per particle instead of a network.

Edelberg & Lederman, arXiv 2303.07487, Section 3.2.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cryodrgn_amort.core import (
    InputError,
    latest_z,
    odd_rows,
    odd_text,
    read_z,
    without_odd,
)
from cryodrgn_amort.models.encoders import Encoder
from cryodrgn_amort.models.lazy_adam import LazyAdam
from cryodrgn_amort.models.objective import falling_rate
from cryodrgn_amort.options import STARTS, TableFlags

if TYPE_CHECKING:
    from cryodrgn_amort.data import Batch, Particles
    from cryodrgn_amort.models.lazy_adam import Begun
    from cryodrgn_amort.options import TrainSettings


__all__ = ["LookupTable", "build_table"]
logger = logging.getLogger("cryodrgn_amort")


class LookupTable(Encoder):
    """A mean and a log variance per particle.

    Parameters
    ----------
    mean, logvar
        Start values, each `(N, zdim)` or expanded to it.
    lr
        Learning rate of the table's own optimizer. None: the table stays as it is.
    lr_end
        What it falls to by the end of the training (``falling_rate``). None: it stays the same.

    Attributes
    ----------
    weight
        Where each row comes to rest, `(N, 2 zdim)`; ``latents`` tells where it is.
    fixed
        Whether rows stay where they are for now, all at rest.
    """

    replays = True
    per_particle = frozenset({"weight", "adam.m", "adam.v", "adam.last", "start"})
    weight: Tensor

    def __init__(
        self, mean: Tensor, logvar: Tensor, lr: float | None, lr_end: float | None = None
    ) -> None:
        super().__init__()
        self.zdim = mean.shape[1]
        self.register_buffer("weight", torch.cat([mean, logvar], 1).float())
        self.adam = None if lr is None else LazyAdam(len(mean), 2 * self.zdim, lr)
        self._rates = (lr, lr if lr_end is None else lr_end)
        self.register_load_state_dict_post_hook(_settle)  # type: ignore[no-untyped-call] # torch's
        self._begun: Begun | None = None
        self._epoch_start: Tensor | None = None
        self.fixed = self.adam is None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Look up the batch's rows; in training they are leaves whose gradient moves the table."""
        index = batch.device_rows
        if self.adam is None or self.fixed:
            rows = self.weight[index]
        else:
            begun = self.adam.begin(self.weight, index)
            rows = begun.present
            if self.training and torch.is_grad_enabled():
                rows.requires_grad_()
                self._begun = begun
        return rows[:, : self.zdim], rows[:, self.zdim :]

    def after_backward(self, lost: Tensor | None = None) -> None:
        """Move the rows of the last batch, unless it is ``lost``."""
        begun, self._begun = self._begun, None
        if self.adam is None or begun is None:
            return
        grad = begun.present.grad
        assert grad is not None, "after_backward before backward"
        with torch.no_grad():
            self.adam.step(self.weight, begun, grad, lost)

    def latents(self) -> tuple[Tensor, Tensor]:
        """Return all means and log variances, each `(N, zdim)`."""
        rows = self.weight if self.adam is None else self.adam.read_all(self.weight)
        return rows[:, : self.zdim], rows[:, self.zdim :]

    def put(self, mean: Tensor, logvar: Tensor) -> None:
        """Let all rows be at rest at a mean and a log variance, each `(N, zdim)`."""
        self.weight.copy_(torch.cat([mean, logvar], 1))
        if self.adam is not None:
            self.adam.rest()

    def sized(self, count: int) -> LookupTable:
        """Return a table with so many rows, whose state is to be loaded."""
        rows = self.weight.new_zeros(count, self.zdim)
        return LookupTable(rows, rows, *self._rates)

    def epoch_start(self, done: float) -> None:
        """Set the learning rate, and remember where the means are."""
        if self.adam is not None:
            start, end = self._rates
            assert start is not None
            assert end is not None
            self.adam.change_rate(self.weight, falling_rate(start, end, done))
            self._epoch_start = self.latents()[0].clone()  # not a view: the log variances can go

    def epoch_state(self) -> dict[str, Any]:
        """Return where the means were when the epoch began."""
        return {} if self._epoch_start is None else {"start": self._epoch_start}

    def set_epoch_state(self, state: dict[str, Any]) -> None:
        """Remember where the means were."""
        self._epoch_start = state["start"].to(self.weight) if "start" in state else None

    def epoch_metrics(self) -> dict[str, float]:
        """Return how far the means moved in this epoch: root mean square distance per particle."""
        if self._epoch_start is None:
            return {"table_moved": 0.0}
        moved = (self.latents()[0] - self._epoch_start).square_().sum(1).mean().sqrt()
        return {"table_moved": float(moved)}


def _settle(table: LookupTable, _: object) -> None:
    if table.adam is not None:
        table.adam.settle(table.weight)


def build_table(settings: TrainSettings, particles: Particles) -> LookupTable:
    """Make the table that ``--table-*`` ask for.

    Raises
    ------
    InputError
        If a value is out of bounds, or what ``--table-init`` names does not fit.
    """
    given = TableFlags.of(settings.extra)
    shape = (particles.n, settings.zdim)
    start, logvar = given.table_init, torch.tensor(float(given.table_logvar)).expand(shape)
    if start == "normal":
        generator = torch.Generator().manual_seed(settings.seed)
        mean = torch.randn(shape, generator=generator)
    elif start in STARTS:  # linear: not known yet
        mean = torch.zeros(shape)
    else:
        path = latest_z(start, "--table-init") if os.path.isdir(start) else start
        found = read_z(path, "--table-init")
        if len(odd := odd_rows(*found)):
            logger.warning(f"--table-init {path}: at the mean of the others start {odd_text(odd)}")
        mean, from_file = (torch.from_numpy(part) for part in without_odd(*found))
        if mean.shape != shape:
            raise InputError(
                f"--table-init {path}: holds {len(mean)} particles of zdim {mean.shape[1]}, "
                f"these are {shape[0]} of zdim {shape[1]}"
            )
        if "table_logvar" not in settings.extra and from_file.isfinite().all():
            logvar = from_file
    for name in ("table_lr", "table_lr_end"):
        if given.table_freeze and name in settings.extra:
            raise InputError(f"--{name.replace('_', '-')} and --table-freeze exclude each other")
    rate = None if given.table_freeze else given.table_lr
    return LookupTable(mean, logvar, rate, given.table_lr_end)
