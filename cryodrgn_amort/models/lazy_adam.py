"""Adam over all rows of a table, at the cost of those that are used."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cryodrgn_amort.core import on_gpu

if TYPE_CHECKING:
    from collections.abc import Iterator


__all__ = ["Begun", "LazyAdam"]

_AT_REST = 1e-12  # of what momentum moves a row: so little is neglected
_NODES = 8
_CHUNK_ROWS = 1024  # fit the cache; too few for torch to split among threads
_GPU_ROWS = 1 << 17


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
    m, v
        Moments `(n, width)` of each row when it took its last step.
    last
        That step's number `(n,)`, from 1; 0: none yet.
    """

    m: Tensor
    v: Tensor
    last: Tensor
    steps: Tensor

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
        self.register_buffer("m", torch.zeros(n, width))
        self.register_buffer("v", torch.zeros(n, width))
        self.register_buffer("last", torch.zeros(n, dtype=torch.int32))
        # numbers that change from step to step are on the device: all steps are the same work
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self._constants: tuple[Tensor, ...] | None = None
        self._settled = True

    @property
    def t(self) -> int:
        """Steps taken. Asking a GPU for it waits."""
        return int(self.steps)

    @t.setter
    def t(self, value: int) -> None:
        self.steps.fill_(value)

    def get_extra_state(self) -> dict[str, float]:
        """Return the number of steps taken, the rate, and that the table holds places of rest."""
        return {"t": self.t, "lr": self.lr, "at_rest": True}

    def set_extra_state(self, state: dict[str, float]) -> None:
        """Restore the number of steps taken, and the rate at which they were."""
        self.t = int(state["t"])
        self._set_rate(float(state.get("lr", self.lr)))
        self._settled = "at_rest" in state

    def _set_rate(self, lr: float) -> None:
        self.lr = lr
        if self._constants is not None:
            self._constants[0].fill_(lr)

    def read(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Return where ``rows`` `(B,)` of ``weight`` are at the present step, `(B, width)`."""
        return self.begin(weight, rows).present

    def begin(self, weight: Tensor, rows: Tensor) -> Begun:
        """Return the same, and what ``step`` with these rows goes on with."""
        t = self.steps + 1
        moments, rule = self._moments(rows, t), self._rule(t)
        present = weight.index_select(0, rows) + _way(*moments, rule)
        return Begun(rows, present.to(weight.dtype), moments, t, rule)

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
        before = self.lr
        if before == lr:
            return
        self._set_rate(lr)
        for rows in self._moving():
            further = self._left(rows) * (1 - before / lr)
            weight.index_copy_(0, rows, (weight[rows] - further).to(weight.dtype))

    def step(self, weight: Tensor, begun: Begun, grad: Tensor, lost: Tensor | None = None) -> None:
        """Take one step: ``grad`` `(B, width)` on the rows of ``begun``, on others momentum alone.

        The rows must be distinct. ``lost``: whether there is no step after all, a scalar; None:
        there is one.
        """
        rows, (m, v), grad = begun.rows, begun.moments, grad.double()
        m = torch.add(m, grad, alpha=1 - self.betas[0])
        v = torch.addcmul(v, grad, grad, value=1 - self.betas[1])
        rest = begun.present - _way(m, v, begun.rule)
        last = begun.t.to(self.last.dtype).expand(len(rows))
        for held, new in ((weight, rest), (self.m, m), (self.v, v), (self.last, last)):
            new = new.to(held.dtype)
            if lost is not None:
                new = torch.where(lost, held.index_select(0, rows), new)
            held.index_copy_(0, rows, new)
        self.steps += 1 if lost is None else ~lost

    def rest(self) -> None:
        """Forget all momentum: every row is where ``weight`` has it."""
        self.m.zero_()
        self.v.zero_()

    def settle(self, weight: Tensor) -> None:
        """Make ``weight`` hold places of rest if it comes from an older checkpoint.

        That holds where each row was at step ``last``.
        """
        if self._settled:
            return
        for t in self.last.unique().tolist():
            for rows in (self.last == t).nonzero()[:, 0].split(_CHUNK_ROWS):
                weight[rows] -= self._left(rows, self.steps * 0 + t).to(weight.dtype)
        self._settled = True

    def _moving(self) -> Iterator[Tensor]:
        """Yield the rows that are not at rest yet, in pieces; on a GPU all: nobody waits then."""
        if on_gpu(self.last.device):
            rows = torch.arange(len(self.last), device=self.last.device)
            yield from rows.split(_GPU_ROWS)
            return
        resting = max(0, self.t - _horizon(*self.betas))
        yield from (self.last > resting).nonzero()[:, 0].split(_CHUNK_ROWS)

    def _left(self, rows: Tensor, t: Tensor | None = None) -> Tensor:
        """Return the way left to ``rows`` after step ``t``, the present one unless given."""
        following = (self.steps if t is None else t) + 1
        return _way(*self._moments(rows, following), self._rule(following))

    def _moments(self, rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Decay the moments of ``rows`` to step ``t``: `(B, width)` each, in double precision."""
        steps = (t - self.last.index_select(0, rows)).double()[:, None]
        m, v = self.m.index_select(0, rows), self.v.index_select(0, rows)
        return m * self.betas[0] ** steps, v * self.betas[1] ** steps

    def _rule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return how momentum moves rows in step ``t`` and all later ones: see ``_way``.

        With the moments m and v at step t, the updates of steps t + j, j = 0, 1, ..., add up to
        lr * m * sum of weight_j / (sqrt(v) * spread_j + eps), where weight_j = beta1^j / (1 -
        beta1^(t + j)) and spread_j^2 = beta2^j / (1 - beta2^(t + j)). A few j stand for all.
        Returned are lr * weight_j / spread_j, and eps / spread_j.
        """
        if self._constants is None or self._constants[0].device != t.device:
            parts = (np.asarray(self.lr), *_rules(*self.betas))
            self._constants = tuple(torch.from_numpy(part).to(t.device) for part in parts)
        rate, *rules = self._constants
        at = t.clamp(max=len(rules[0])).view(1) - 1
        weights, decays = (part.index_select(0, at)[0] for part in rules)
        spreads = (decays / (1 - self.betas[1] ** t.double() * decays)).sqrt()
        return rate * weights / spreads, self.eps / spreads


class Begun(NamedTuple):
    """Rows of a table that are about to take a step."""

    rows: Tensor  # (B,)
    present: Tensor  # where they are, (B, width)
    moments: tuple[Tensor, Tensor]  # at that step, in double precision
    t: Tensor  # its number
    rule: tuple[Tensor, Tensor]


def _way(m: Tensor, v: Tensor, rule: tuple[Tensor, Tensor]) -> Tensor:
    """Return how far momentum moves rows against ``m``, by a rule of ``LazyAdam``.

    Parameters
    ----------
    m, v
        Moments, `(B, width)` in double precision.
    """
    weights, least = rule
    return m * (weights / (v.sqrt()[..., None] + least)).sum(-1)


def _horizon(beta1: float, beta2: float) -> int:
    """Return after how many steps without a gradient a row is at rest."""
    return math.ceil(math.log(_AT_REST) / math.log(max(beta1, 1e-9) / math.sqrt(beta2)))


@functools.lru_cache(maxsize=4)
def _rules(beta1: float, beta2: float) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and decays for each step `(T, nodes)`, as ``_quadrature`` has them, from 1.

    From step T on they are those of T: the weights are beta1^j.
    """
    both = [_quadrature(t, beta1, beta2) for t in range(1, 2 * _horizon(beta1, beta2) + 1)]
    weights, decays = zip(*both, strict=True)
    return np.stack(weights), np.stack(decays)


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
