"""The Variational Lookup Table: a mean and a log variance per particle instead of a network.

Edelberg & Lederman, arXiv 2303.07487, Section 3.2.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cryodrgn_amort.core import InputError, latest_z, odd_rows, odd_text, read_z, without_odd
from cryodrgn_amort.models.encoders import Encoder
from cryodrgn_amort.models.objective import falling_rate
from cryodrgn_amort.options import TableFlags

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryodrgn_amort.data import Batch, Particles
    from cryodrgn_amort.options import TrainSettings


__all__ = ["LazyAdam", "LookupTable", "build_table"]
logger = logging.getLogger("cryodrgn_amort")

_AT_REST = 1e-12  # of what momentum moves a row: so little is neglected
_NODES = 8
_CHUNK_ROWS = 1024  # fit the cache; too few for torch to split among threads


class LazyAdam(nn.Module):
    """Adam over all rows of a table at the cost of the rows that are used.

    Dense Adam moves every row at every step: momentum keeps moving the rows that are not in the
    batch. Without a gradient ``m`` and ``v`` only decay, so the place where such a row comes to
    rest is known when it takes its step. The table holds that place; a row that is read before it
    has come to rest is moved back by the way that is left (``_way``). The result equals dense Adam.

    Parameters
    ----------
    n, width
        Shape of the table.
    lr, betas, eps
        As in Kingma & Ba, arXiv 1412.6980, Algorithm 1. beta1^2 < beta2, as in their Theorem 4.1:
        else rows do not come to rest.

    Attributes
    ----------
    t
        Steps taken.
    m, v
        Moments `(n, width)` of each row when it took its last step.
    last
        That step's number `(n,)`, from 1; 0: none yet.
    """

    m: Tensor
    v: Tensor
    last: Tensor

    def __init__(
        self,
        n: int,
        width: int,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        if not 0 <= betas[0] ** 2 < betas[1] < 1:
            raise ValueError(f"betas {betas}: beta1^2 < beta2 < 1 is needed")
        self.lr, self.betas, self.eps = lr, betas, eps
        self.t = 0
        self.register_buffer("m", torch.zeros(n, width))
        self.register_buffer("v", torch.zeros(n, width))
        self.register_buffer("last", torch.zeros(n, dtype=torch.int32))
        self._settled = True

    def get_extra_state(self) -> dict[str, float]:
        """Return the number of steps taken, the rate, and that the table holds places of rest."""
        return {"t": self.t, "lr": self.lr, "at_rest": True}

    def set_extra_state(self, state: dict[str, float]) -> None:
        """Restore the number of steps taken, and the rate at which they were."""
        self.t = int(state["t"])
        self.lr = float(state.get("lr", self.lr))
        self._settled = "at_rest" in state

    def read(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Return where ``rows`` `(B,)` of ``weight`` are at the present step, `(B, width)`."""
        way = self._way(*self._moments(rows, self.t + 1), self.t + 1)
        return (weight.index_select(0, rows) + way).to(weight.dtype)

    def read_all(self, weight: Tensor) -> Tensor:
        """Return a copy of ``weight`` with every row where it is at the present step."""
        present = weight.clone()
        for rows in self._moving():
            present.index_copy_(0, rows, self.read(weight, rows))
        return present

    def change_rate(self, weight: Tensor, lr: float) -> None:
        """Change the learning rate.

        Rows that momentum still moves go the rest of their way at the new rate: their places of
        rest, which ``weight`` holds, change.
        """
        before, self.lr = self.lr, lr
        if before == lr:
            return
        for rows in self._moving():
            further = self._way(*self._moments(rows, self.t + 1), self.t + 1) * (1 - before / lr)
            weight[rows] -= further.to(weight.dtype)

    def step(self, weight: Tensor, rows: Tensor, present: Tensor, grad: Tensor) -> None:
        """Take one step: ``grad`` `(B, width)` on ``rows``, momentum alone on all others.

        The rows must be distinct, ``present`` what ``read`` returned for them.
        """
        self.t += 1
        m, v = self._moments(rows, self.t)
        m += (1 - self.betas[0]) * grad
        v += (1 - self.betas[1]) * grad.double().square()
        rest = present - self._way(m, v, self.t)
        for held, new in ((weight, rest), (self.m, m), (self.v, v)):
            held.index_copy_(0, rows, new.to(held.dtype))
        self.last.index_fill_(0, rows, self.t)

    def settle(self, weight: Tensor) -> None:
        """Make ``weight`` hold places of rest if it comes from an older checkpoint.

        That holds where each row was at step ``last``.
        """
        if self._settled:
            return
        for t in self.last.unique().tolist():
            for rows in (self.last == t).nonzero()[:, 0].split(_CHUNK_ROWS):
                weight[rows] -= self._way(*self._moments(rows, t + 1), t + 1).to(weight.dtype)
        self._settled = True

    def _moving(self) -> Iterator[Tensor]:
        """Yield the rows that are not at rest yet, in pieces."""
        resting = max(0, self.t - _horizon(*self.betas))
        yield from (self.last > resting).nonzero()[:, 0].split(_CHUNK_ROWS)

    def _moments(self, rows: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Decay the moments of ``rows`` to step ``t``: `(B, width)` each, in double precision."""
        steps = (t - self.last.index_select(0, rows)).double()[:, None]
        m, v = self.m.index_select(0, rows), self.v.index_select(0, rows)
        return m * self.betas[0] ** steps, v * self.betas[1] ** steps

    def _way(self, m: Tensor, v: Tensor, t: int) -> Tensor:
        """Return how far momentum moves rows against ``m``: in step ``t`` and all later ones.

        Parameters
        ----------
        m, v
            Moments at step ``t``, `(B, width)` in double precision.
        """
        size, way = v.sqrt(), torch.zeros_like(m)
        for weight, spread in _rule(t, *self.betas):
            way.addcdiv_(m, size + self.eps / spread, value=self.lr * weight / spread)
        return way


def _horizon(beta1: float, beta2: float) -> int:
    """Return after how many steps without a gradient a row is at rest."""
    return math.ceil(math.log(_AT_REST) / math.log(max(beta1, 1e-9) / math.sqrt(beta2)))


@functools.lru_cache(maxsize=4)
def _rule(t: int, beta1: float, beta2: float) -> list[tuple[float, float]]:
    """Return few pairs (weight, spread) that stand for the many steps from ``t`` on.

    With the moments m and v at step t, the updates of steps t + j, j = 0, 1, ..., add up to
    lr * m * sum of weight_j / (sqrt(v) * spread_j + eps), where weight_j = beta1^j / (1 -
    beta1^(t + j)) and spread_j^2 = beta2^j / (1 - beta2^(t + j)).
    """
    first = min(t, 2 * _horizon(beta1, beta2))  # from then on the weights are beta1^j
    weights, decays = _quadrature(first, beta1, beta2)
    spreads = np.sqrt(decays / (1 - beta2**t * decays))
    return list(zip(weights.tolist(), spreads.tolist(), strict=True))


@functools.lru_cache(maxsize=4)
def _quadrature(t: int, beta1: float, beta2: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights and the beta2^j of few j, not integer, that stand for all j.

    Gauss quadrature (Golub & Welsch 1969) of the discrete measure weight_j in the variable
    log spread_j, in which the updates are smooth at any t. Eight nodes agree with the sum over
    all j to 1e-11, and for betas further from the usual ones to 1e-6.
    """
    j = np.arange(_horizon(beta1, beta2), dtype=float)
    weights, decays = beta1**j / (1 - beta1 ** (t + j)), beta2**j
    if beta1 > beta2**2:  # the updates differ too much: all j
        return weights, decays
    logs = np.log(decays / (1 - beta2**t * decays)) / 2
    powers = np.vander(logs, _NODES, increasing=True)
    basis, _ = np.linalg.qr(np.sqrt(weights)[:, None] * powers)
    nodes, vectors = np.linalg.eigh(basis.T * logs @ basis)
    return weights.sum() * vectors[0] ** 2, 1 / (np.exp(-2 * nodes) + beta2**t)


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
    """

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
        self._rows: Tensor | None = None
        self._index: Tensor | None = None
        self._epoch_start: Tensor | None = None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Look up the batch's rows; in training they are leaves whose gradient moves the table."""
        index = batch.rows.to(self.weight.device)
        if self.adam is None:
            rows = self.weight[index]
        else:
            rows = self.adam.read(self.weight, index)
            if self.training and torch.is_grad_enabled():
                rows.requires_grad_()
                self._rows, self._index = rows, index
        return rows[:, : self.zdim], rows[:, self.zdim :]

    def after_backward(self) -> None:
        """Move the rows of the last batch."""
        if self.adam is None or self._rows is None or self._index is None:
            return
        rows, index = self._rows, self._index
        self._rows = self._index = None
        assert rows.grad is not None, "after_backward before backward"
        self.adam.step(self.weight, index, rows.detach(), rows.grad)

    def latents(self) -> tuple[Tensor, Tensor]:
        """Return all means and log variances, each `(N, zdim)`."""
        rows = self.weight if self.adam is None else self.adam.read_all(self.weight)
        return rows[:, : self.zdim], rows[:, self.zdim :]

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
    elif start == "zeros":
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
