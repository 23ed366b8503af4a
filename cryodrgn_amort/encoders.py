"""Encoders: what yields q(z_i) = N(mu_i, diag exp(log variance_i)) for particle i."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from cryodrgn_amort.particles import Batch, Particles
    from cryodrgn_amort.settings import TrainSettings

__all__ = ["NETWORKS", "Encoder", "EncoderSpec"]


class Encoder(nn.Module, ABC):
    """Base of every encoder that is not one of the host's own networks.

    Parameters (``nn.Parameter``) are trained together with the decoder. What needs an optimizer
    of its own, as a table's rows do, takes its step in ``after_backward``. Buffers, parameters
    and ``get_extra_state`` are all that a checkpoint keeps.

    Attributes
    ----------
    per_particle
        Names of buffers with one row per particle. When several processes train, each holds the
        rows of its own particles: those of a batch are at ``batch.rows``.
    """

    per_particle: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the posterior's mean and log variance, each `(B, zdim)`."""

    def after_backward(self) -> None:
        """Take the step of an own optimizer."""

    def epoch_start(self, done: float) -> None:
        """Be told that an epoch begins, and what share of the training is done: 0 to below 1."""

    def epoch_metrics(self) -> dict[str, float]:
        """Return further columns for metrics.csv, always the same ones."""
        return {}

    def latents(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return all means and log variances `(N, zdim)` if they are known without any images.

        When several processes train, those of the own particles.
        """
        return None


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder that ``train_amort --encoder NAME`` can use.

    Attributes
    ----------
    name, summary
        The name on the command line, and one line for humans.
    build
        Makes the encoder from the settings and the particles, without touching the global random
        state. None: the host's own network of encode mode ``host_mode``.
    shown_images
        Whether it is shown images. A table is not: its amortization is "not applicable".
    flags
        Argument names (``TrainSettings``, ``settings.extra``) that apply to some encoders only,
        this one among them. A flag that only other encoders claim is refused by name.
    """

    name: str
    summary: str
    build: Callable[[TrainSettings, Particles], Encoder] | None = None
    host_mode: str | None = None
    shown_images: bool = True
    flags: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if (self.build is None) == (self.host_mode is None):
            raise ValueError(f"encoder {self.name!r}: give either build or host_mode")


_NETWORK_FLAGS = frozenset({"encode_mode", "qlayers", "qdim", "enc_mask"})
NETWORKS = (
    EncoderSpec(
        "resid", "the host's residual network (default)", host_mode="resid", flags=_NETWORK_FLAGS
    ),
    EncoderSpec("mlp", "the host's plain network", host_mode="mlp", flags=_NETWORK_FLAGS),
)
