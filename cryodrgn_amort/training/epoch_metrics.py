"""What has been done of an epoch: sums over its particles, and where it can go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from cryodrgn_amort.core import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from cryodrgn_amort.data import Particles
    from cryodrgn_amort.models import Encoder, Objective
    from cryodrgn_amort.options import TrainSettings


__all__ = ["EpochProgress"]

_ACTIVE_VARIANCE = 0.01  # Burda et al., arXiv 1509.00519: an active unit


def _batches_depend_on(settings: TrainSettings, n: int) -> list[str]:
    """Say what the batches of an epoch depend on: the number of particles ``n``, and flags."""
    flags = {
        "-b": settings.batch_size,
        "--shuffle-seed": settings.shuffle_seed,
        "--augment": settings.augment,
        "--from": None if settings.from_run is None else "RUN",
    }
    if settings.tilted:
        flags |= {"--ntilts": settings.ntilts, "--random-tilts": settings.random_tilts}
    if settings.shuffler_size:
        flags["--shuffler-size"] = settings.shuffler_size
    texts = (f"no {flag}" if v is None else f"{flag} {v}" for flag, v in flags.items())
    return [f"{n} particles", *texts]


@dataclass
class EpochProgress:
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
        What its batches depend on: particles and flags.
    encoder, lesson
        States within the epoch of the encoder, and of the objective; named as checkpoints have it.
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
    def new(
        cls, begin: dict[str, Any], settings: TrainSettings, particles: Particles
    ) -> EpochProgress:
        """Begin an epoch with the random state ``begin``."""
        sums = torch.zeros(3, dtype=torch.float64, device=particles.device)
        moments = torch.zeros(2, settings.zdim, dtype=torch.float64, device=particles.device)
        return cls(begin, sums, moments, given=_batches_depend_on(settings, particles.n))

    @classmethod
    def from_checkpoint(
        cls, kept: dict[str, Any], settings: TrainSettings, particles: Particles, name: str
    ) -> EpochProgress:
        """Take up the part of an epoch that a checkpoint holds; ``name`` names it.

        Raises
        ------
        InputError
            If the batches of the epoch are others now.
        """
        progress, given = cls(**kept), _batches_depend_on(settings, particles.n)
        for was, now in zip_longest(progress.given, given, fillvalue="nothing more"):
            if was != now:
                raise InputError(f"{name}: stopped within an epoch, with {was}, not {now}")
        torch.Generator().set_state(progress.begin["torch"])  # fails if it is no state
        return progress

    def to(self, device: torch.device, *, keep_sums: bool) -> EpochProgress:
        """Move the sums to ``device``, and set them to 0 unless this process keeps them for all."""
        self.sums, self.moments = self.sums.to(device), self.moments.to(device)
        if not keep_sums:
            self.sums.zero_()
            self.moments.zero_()
        return self

    def hand_over(self, encoder: Encoder | None, objective: Objective) -> None:
        """Give the encoder and the objective the states that they had in this epoch."""
        if encoder is not None:
            encoder.set_epoch_state(self.encoder)
        objective.set_epoch_state(self.lesson)

    def count(self, size: int) -> None:
        """Count a batch of so many particles."""
        self.seen += size
        self.batches += 1

    @property
    def counted(self) -> int:
        """Number of particles in the sums."""
        return self.seen - self.left_out

    def averages(self) -> tuple[float, float, float]:
        """Return gen_loss, KL and total, each per particle."""
        gen_loss, kld, total = (self.sums / max(self.counted, 1)).tolist()
        return gen_loss, kld, total

    def metrics(self, epoch: int, seconds: float, images: int) -> dict[str, float]:
        """Return the epoch's columns of metrics.csv; it took ``seconds`` for so many images."""
        gen_loss, kld, total = self.averages()
        return {
            "epoch": epoch,
            "gen_loss": gen_loss,
            "kld": kld,
            "loss": total,
            "seconds": round(seconds, 3),
            "images_per_second": round(images / seconds, 1),
            "active_units": self.active_units(),
        }

    def active_units(self) -> int:
        """Return the number of latent dimensions whose posterior means vary (by 0.01 or more)."""
        first, second = self.moments / self.counted
        return int((second - first.square() > _ACTIVE_VARIANCE).sum())
