"""Encoders: what yields q(z_i) = N(mu_i, diag exp(log variance_i)) for particle i."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cryodrgn_amort.decoding import FastDecoder
    from cryodrgn_amort.particles import Batch, Particles
    from cryodrgn_amort.settings import TrainSettings

__all__ = ["NETWORKS", "SLEEP_DEFAULTS", "Encoder", "EncoderSpec"]


class Encoder(nn.Module, ABC):
    """Base of every encoder that is not one of the host's own networks.

    Parameters (``nn.Parameter``) are trained together with the decoder. What needs an optimizer
    of its own, as a table's rows do, takes its step in ``after_backward``. Buffers, parameters
    and ``get_extra_state`` are all that a checkpoint keeps.

    Attributes
    ----------
    per_particle
        Names of buffers, and of tensors in ``epoch_state``, with one row per particle. When several
        processes train, each holds the rows of its own particles: those of a batch are at
        ``batch.rows``.
    decoder
        The decoder of the model that it is part of, for encoders that compare images; the model
        puts it here.
    """

    per_particle: ClassVar[frozenset[str]] = frozenset()
    decoder: FastDecoder | None = None

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

    def epoch_state(self) -> dict[str, Any]:
        """Return what ``epoch_metrics`` needs and a checkpoint lacks, when training stops early."""
        return {}

    def set_epoch_state(self, state: dict[str, Any]) -> None:
        """Go on in an epoch, after ``epoch_start``."""

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
        Makes the encoder from the settings and the particles: those trained on, or others that it
        is to encode. PyTorch's global generators, of the CPU and of the GPU in use, are seeded by
        ``--seed`` meanwhile, and then as they were before. None: the host's own network of encode
        mode ``host_mode``.
    shown_images
        Whether it is shown images. A table is not: its amortization is "not applicable".
    flags
        Argument names (``TrainSettings``, ``settings.extra``) that apply to some encoders only,
        this one among them. A flag that only other encoders claim is refused by name.
    second_stage
        Whether it is for the decoder of a finished run: ``--from`` is needed.
    sleeps
        Whether, with ``--from``, it learns from images that the decoder makes up (``sleep``),
        the decoder staying as it is. Else both are trained on the particles.
    defaults
        With ``--from``: argument name -> value, where it is not that of ``train_vae``.
    """

    name: str
    summary: str
    build: Callable[[TrainSettings, Particles], Encoder] | None = None
    host_mode: str | None = None
    shown_images: bool = True
    flags: frozenset[str] = frozenset()
    second_stage: bool = False
    sleeps: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.build is None) == (self.host_mode is None):
            raise ValueError(f"encoder {self.name!r}: give either build or host_mode")

    def make(self, settings: TrainSettings, particles: Particles) -> Encoder | None:
        """Make the encoder; None: it is the host's own network."""
        if self.build is None:
            return None
        # of GPUs, the one that is used: torch.manual_seed would reseed all, and for good
        gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=gpus):
            torch.default_generator.manual_seed(settings.seed)
            if gpus:
                torch.cuda.manual_seed(settings.seed)
            return self.build(settings, particles)


SLEEP_DEFAULTS: Mapping[str, Any] = {"qdim": 256, "lr": 1e-3, "lr_end": 2e-5, "batch_size": 128}
_NETWORK_FLAGS = frozenset({"encode_mode", "qlayers", "qdim", "enc_mask", "from_run"})
_TILT_FLAGS = frozenset({"t_emb_dim", "tlayers", "tdim"})


def _network(name: str, summary: str) -> EncoderSpec:
    return EncoderSpec(
        name, summary, host_mode=name, flags=_NETWORK_FLAGS, sleeps=True, defaults=SLEEP_DEFAULTS
    )


NETWORKS = (
    _network("resid", "the host's residual network (default)"),
    _network("mlp", "the host's plain network"),
    EncoderSpec(
        "tilt",
        "the host's network for tilt series",
        host_mode="tilt",
        flags=(_NETWORK_FLAGS | _TILT_FLAGS) - {"from_run"},
    ),
)
