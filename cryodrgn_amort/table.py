"""The Variational Lookup Table: a mean and a log variance per particle instead of a network.

Edelberg & Lederman, arXiv 2303.07487, Section 3.2.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cryodrgn_amort.checkpoints import latest_z, read_z
from cryodrgn_amort.encoders import Encoder, EncoderSpec
from cryodrgn_amort.errors import InputError

if TYPE_CHECKING:
    import argparse

    from cryodrgn_amort.particles import Batch, Particles
    from cryodrgn_amort.settings import TrainSettings

__all__ = ["DEFAULT_LOGVAR", "DEFAULT_LR", "VLT", "LazyAdam", "LookupTable", "add_table_args"]

DEFAULT_LR = 3e-2
DEFAULT_LOGVAR = -4.0
_FLUSH_ROWS = 4096
_HORIZON = 200  # beta1^200 < 1e-9: later momentum moves nothing in float32


class LazyAdam(nn.Module):
    """Adam over all rows of a table at the cost of the rows that are used.

    Dense Adam moves every row at every step: momentum keeps moving the rows that are not in the
    batch. Here a row's missed updates are applied when it is next read, in closed form, because
    without a gradient ``m`` and ``v`` only decay. The result equals dense Adam.

    Parameters
    ----------
    n, width
        Shape of the table.
    lr, betas, eps
        As in Kingma & Ba, arXiv 1412.6980, Algorithm 1.
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
        self.lr, self.betas, self.eps = lr, betas, eps
        self.t = 0
        self.register_buffer("m", torch.zeros(n, width))
        self.register_buffer("v", torch.zeros(n, width))
        self.register_buffer("last", torch.zeros(n, dtype=torch.int64))

    def get_extra_state(self) -> dict[str, int]:
        """Return the number of steps taken."""
        return {"t": self.t}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore the number of steps taken."""
        self.t = int(state["t"])

    def catch_up(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Bring ``rows`` `(B,)` of ``weight`` to the present step and return them `(B, width)`."""
        last = self.last[rows]
        missed = self.t - last
        horizon = min(_HORIZON, self.t)  # not missed.max(): that would wait for the device
        if horizon == 0:
            return weight[rows]
        b1, b2 = self.betas
        j = torch.arange(1, horizon + 1, dtype=torch.float64, device=weight.device)
        when = last[:, None] + j  # absolute step numbers, (B, J)
        momentum = b1**j / (1 - b1**when) * (j <= missed[:, None])
        spread = (b2**j / (1 - b2**when)).sqrt()
        m, v = self.m[rows], self.v[rows]
        size = v.double().sqrt()[:, None, :] * spread[:, :, None] + self.eps
        moved = (momentum[:, :, None] / size).sum(1) * m.double() * self.lr
        current = (weight[rows] - moved).to(weight.dtype)
        weight[rows] = current
        self.m[rows] = (m * b1 ** missed[:, None].double()).to(m.dtype)
        self.v[rows] = (v * b2 ** missed[:, None].double()).to(v.dtype)
        self.last[rows] = self.t
        return current

    def step(self, weight: Tensor, rows: Tensor, grad: Tensor) -> None:
        """Take one step: ``grad`` `(B, width)` on ``rows``, momentum alone on all others.

        The rows must be caught up and distinct.
        """
        self.t += 1
        b1, b2 = self.betas
        m = self.m[rows].lerp(grad, 1 - b1)
        v = self.v[rows].mul(b2).addcmul(grad, grad, value=1 - b2)
        size = (v / (1 - b2**self.t)).sqrt() + self.eps
        weight[rows] -= self.lr / (1 - b1**self.t) * m / size
        self.m[rows], self.v[rows] = m, v
        self.last[rows] = self.t

    def flush(self, weight: Tensor) -> None:
        """Bring every row to the present step."""
        behind = (self.last < self.t).nonzero()[:, 0]
        for rows in behind.split(_FLUSH_ROWS):
            self.catch_up(weight, rows)


class LookupTable(Encoder):
    """A mean and a log variance per particle.

    Parameters
    ----------
    mean, logvar
        Start values, each `(N, zdim)`.
    lr
        Learning rate of the table's own optimizer. None: the table stays as it is.
    """

    weight: Tensor

    def __init__(self, mean: Tensor, logvar: Tensor, lr: float | None) -> None:
        super().__init__()
        self.zdim = mean.shape[1]
        self.register_buffer("weight", torch.cat([mean, logvar], 1).float())
        self.adam = None if lr is None else LazyAdam(len(mean), 2 * self.zdim, lr)
        self._rows: Tensor | None = None
        self._index: Tensor | None = None
        self._epoch_start: Tensor | None = None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Look up the batch's rows; in training they are leaves whose gradient moves the table."""
        index = batch.index.to(self.weight.device)
        if self.adam is None:
            rows = self.weight[index]
        else:
            rows = self.adam.catch_up(self.weight, index)
            if self.training and torch.is_grad_enabled():
                rows = rows.detach().requires_grad_()
                self._rows, self._index = rows, index
        return rows[:, : self.zdim], rows[:, self.zdim :]

    def after_backward(self, grad_scale: float = 1.0) -> None:
        """Move the rows of the last batch."""
        if self.adam is None or self._rows is None or self._index is None:
            return
        grad = self._rows.grad
        assert grad is not None, "after_backward before backward"
        if grad_scale != 1.0:
            grad = grad / grad_scale
            if not torch.isfinite(grad).all():  # mixed precision overflowed: as GradScaler, skip
                self._rows = self._index = None
                return
        self.adam.step(self.weight, self._index, grad)
        self._rows = self._index = None

    def latents(self) -> tuple[Tensor, Tensor]:
        """Return all means and log variances, each `(N, zdim)`."""
        if self.adam is not None:
            self.adam.flush(self.weight)
        return self.weight[:, : self.zdim], self.weight[:, self.zdim :]

    def epoch_start(self) -> None:
        """Remember where the means are."""
        self._epoch_start = self.latents()[0].clone()

    def epoch_metrics(self) -> dict[str, float]:
        """Return how far the means moved in this epoch: root mean square distance per particle."""
        if self._epoch_start is None:
            return {"table_moved": 0.0}
        moved = (self.latents()[0] - self._epoch_start).square().sum(1).mean().sqrt()
        return {"table_moved": float(moved)}


def build_table(settings: TrainSettings, particles: Particles) -> LookupTable:
    """Make the table that ``--table-*`` ask for."""
    given = settings.extra
    shape = (particles.n, settings.zdim)
    start = given.get("table_init", "normal")
    logvar = torch.full(shape, float(given.get("table_logvar", DEFAULT_LOGVAR)))
    if start == "normal":
        generator = torch.Generator().manual_seed(settings.seed)
        mean = torch.randn(shape, generator=generator)
    elif start == "zeros":
        mean = torch.zeros(shape)
    else:
        path = latest_z(start, "--table-init") if os.path.isdir(start) else start
        mean, from_file = (torch.from_numpy(a) for a in read_z(path, "--table-init"))
        if mean.shape != shape:
            raise InputError(
                f"--table-init {path}: holds {len(mean)} particles of zdim {mean.shape[1]}, "
                f"these are {shape[0]} of zdim {shape[1]}"
            )
        if "table_logvar" not in given:
            logvar = from_file
    if not math.isfinite(given.get("table_logvar", 0.0)):
        raise InputError(f"--table-logvar {given['table_logvar']}: must be finite")
    lr = float(given.get("table_lr", DEFAULT_LR))
    if not 0 < lr < math.inf:
        raise InputError(f"--table-lr {lr}: must be positive; --table-freeze keeps the table fixed")
    if given.get("table_freeze") and "table_lr" in given:
        raise InputError("--table-lr and --table-freeze exclude each other")
    return LookupTable(mean, logvar, None if given.get("table_freeze") else lr)


def add_table_args(parser: argparse.ArgumentParser) -> None:
    """Add the table's flags to ``train_amort``."""
    import argparse

    group = parser.add_argument_group("Lookup table (--encoder vlt)")
    group.add_argument(
        "--table-init",
        metavar="normal|zeros|PATH",
        type=lambda start: start if start in ("normal", "zeros") else os.path.abspath(start),
        default=argparse.SUPPRESS,
        help="Start of the means: N(0,1), 0, or the means and log variances of a z.pkl or of a\n"
        "finished run's folder (default: normal)",
    )
    group.add_argument(
        "--table-logvar",
        type=float,
        default=argparse.SUPPRESS,
        help=f"Start of the log variances (default: {DEFAULT_LOGVAR:g}, or those of --table-init)",
    )
    group.add_argument(
        "--table-lr",
        type=float,
        default=argparse.SUPPRESS,
        help="Learning rate of the table's own Adam. A row is visited once per epoch, so at the\n"
        f"decoder's rate it would hardly move (default: {DEFAULT_LR:g})",
    )
    group.add_argument(
        "--table-freeze",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Keep the table as it starts and train the decoder only",
    )


VLT = EncoderSpec(
    "vlt",
    "lookup table: a trained mean and log variance per particle",
    build=build_table,
    shown_images=False,
    flags=frozenset({"table_init", "table_logvar", "table_lr", "table_freeze"}),
)
