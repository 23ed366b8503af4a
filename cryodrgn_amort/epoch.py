"""What has been done of an epoch: sums over its particles, and where it can go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from cryodrgn_amort.objective import Losses
    from cryodrgn_amort.particles import Batch

__all__ = ["Part"]

_ACTIVE_VARIANCE = 0.01  # Burda et al., arXiv 1509.00519: an active unit


@dataclass
class Part:
    """The part of an epoch that has been done. A checkpoint within the epoch holds its fields.

    Attributes
    ----------
    begin
        Random state when it began.
    sums
        Of gen_loss, KL and total over the particles.
    moments
        Of the posterior means, for the active units: sums of z and z^2, `(2, zdim)`.
    batches, seen, seconds
        Batches done, particles in them, time needed.
    left_out
        Particles among these whose batch had no loss.
    given
        What its batches depend on: number of particles and flags.
    encoder, lesson
        States within the epoch of the encoder, and of what it learns from.
    """

    begin: dict[str, Any]
    sums: Tensor
    moments: Tensor
    batches: int = 0
    seen: int = 0
    left_out: int = 0
    given: list[str] = field(default_factory=list)
    seconds: float = 0.0
    encoder: dict[str, Any] = field(default_factory=dict)
    lesson: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def new(cls, begin: dict[str, Any], zdim: int, device: torch.device, given: list[str]) -> Part:
        """Begin an epoch."""
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        moments = torch.zeros(2, zdim, dtype=torch.float64, device=device)
        return cls(begin, sums, moments, given=given)

    def to(self, device: torch.device, *, keep_sums: bool) -> Part:
        """Go on with it on ``device``, for one of several processes without the sums of all."""
        self.sums, self.moments = self.sums.to(device), self.moments.to(device)
        if not keep_sums:
            self.sums.zero_()
            self.moments.zero_()
        return self

    def add(self, batch: Batch, losses: Losses, mean: Tensor) -> None:
        """Count a batch: its losses, and the posterior means `(B, zdim)` of its own particles."""
        self._count(batch)
        each = torch.stack([losses.gen_loss, losses.kld, losses.total])
        self.sums += batch.size * each.double()
        self.moments[0] += mean.sum(0)
        self.moments[1] += mean.square().sum(0)

    def leave_out(self, batch: Batch) -> None:
        """Count a batch that has no loss."""
        self._count(batch)
        self.left_out += batch.size

    def _count(self, batch: Batch) -> None:
        self.seen += batch.size
        self.batches += 1

    @property
    def counted(self) -> int:
        """Number of particles in the sums."""
        return self.seen - self.left_out

    def averages(self) -> tuple[float, float, float]:
        """Return gen_loss, KL and total, each per particle."""
        gen_loss, kld, total = (self.sums / max(self.counted, 1)).tolist()
        return gen_loss, kld, total

    def active_units(self) -> int:
        """Return the number of latent dimensions whose posterior means vary (by 0.01 or more)."""
        first, second = self.moments / self.counted
        return int((second - first.square() > _ACTIVE_VARIANCE).sum())
