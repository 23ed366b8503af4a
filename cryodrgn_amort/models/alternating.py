"""An encoder that is trained in turns with the decoder: ``--encoder alternate``.

A table has the posteriors that the decoder is trained with. In turns with it a network is trained
on images that the decoder makes up, and its answers to the particles become the table's rows: it
has seen none of them, so it cannot follow their noise (the wake and sleep phases of Hinton et al.
1995, doi:10.1126/science.7761831; a generalised expectation maximisation).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cryodrgn_amort.core import InputError
from cryodrgn_amort.models.encoders import Encoder
from cryodrgn_amort.models.lookup_table import LookupTable, build_table
from cryodrgn_amort.models.second_stage import AnchoredEncoder
from cryodrgn_amort.models.synthetic import SyntheticBatch
from cryodrgn_amort.options import TurnFlags

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryodrgn_amort.data import Batch, Particles
    from cryodrgn_amort.options import TrainSettings


__all__ = ["AlternatingEncoder"]

_TABLE_RATES = {"table_lr": 0.1, "table_lr_end": 1e-3}  # unless others are given


class AlternatingEncoder(Encoder):
    """A table in training, a network for everything else.

    Attributes
    ----------
    table
        The posteriors that the decoder is trained with.
    network
        Encodes images, and in its turns learns from those that the decoder makes up.
    radius
        Up to which Fourier pixel latents are found; None: it has not been chosen yet.
    weights
        Of masked pixels while table and decoder are trained, `(P,)`: 1 / variance of the noise.
    turn
        What is trained: "table" and decoder, the "encoder", or the "decoder" alone.
    judged
        What the last round was found to be worth, and at which epoch; empty: nobody has looked.
    """

    replays = True
    weights: Tensor
    _shell: Tensor
    per_particle = frozenset({f"table.{name}" for name in LookupTable.per_particle - {"start"}} |
                             {"start"})  # fmt: skip

    def __init__(self, settings: TrainSettings, particles: Particles) -> None:
        super().__init__()
        flags, given = TurnFlags.of(settings.extra), {**_TABLE_RATES, **settings.extra}
        self._planned = settings.num_epochs, settings.batch_size, flags.rounds
        self.table = build_table(replace(settings, extra=given), particles)
        self.network = AnchoredEncoder(settings, particles)
        self.radius: int | None = flags.l_start
        frequency = particles.lattice.freqs2d[particles.mask].norm(dim=1) * particles.box
        self.register_buffer("weights", torch.ones(len(particles.mask)))
        self.register_buffer("_shell", frequency.round(), persistent=False)
        self.turn = "table"
        self.judged: dict[str, Any] = {}
        self.register_load_state_dict_pre_hook(_fit)  # type: ignore[no-untyped-call] # torch's

    def begin(self, turn: str) -> None:
        """Train what ``turn`` says from now on; the table is at rest but in its own."""
        if turn != "table":
            self.put(*self.table.latents())
        self.turn, self.table.fixed = turn, turn != "table"
        self.network.requires_grad_(turn == "encoder")

    def put(self, mean: Tensor, logvar: Tensor) -> None:
        """Let the posteriors of the own particles be these, `(N, zdim)` each."""
        self.table.put(mean, logvar)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Look up the rows of particles while these are trained on, and encode all else."""
        if self.training and not isinstance(batch, SyntheticBatch):
            rows: tuple[Tensor, Tensor] = self.table(batch)
            return rows
        self.network.decoder = self.decoder
        answers: tuple[Tensor, Tensor] = self.network(batch)
        return answers

    def after_backward(self, lost: Tensor | None = None) -> None:
        """Move the rows of the last batch, unless it is ``lost``."""
        self.table.after_backward(lost)

    def epoch_start(self, done: float) -> None:
        """Set the table's learning rate after a share of its turn."""
        if self.turn == "table":
            self.table.epoch_start(done)

    def epoch_metrics(self) -> dict[str, float]:
        """Return how far the table's means moved; ``latent_r2`` is known of the encoder's turn."""
        moved = {"table_moved": 0.0} if self.table.fixed else self.table.epoch_metrics()
        return {**moved, "latent_r2": float("nan")}

    def epoch_state(self) -> dict[str, Any]:
        """Return where the means were when the epoch began."""
        return {} if self.table.fixed else self.table.epoch_state()

    def set_epoch_state(self, state: dict[str, Any]) -> None:
        """Remember where the means were."""
        self.table.set_epoch_state(state)

    def latents(self) -> tuple[Tensor, Tensor]:
        """Return the posteriors that the decoder is trained with, each `(N, zdim)`."""
        return self.table.latents()

    def learn_from(self, mean: Tensor) -> None:
        """Scale the network's answers, and choose its anchors, by latents `(N, zdim)`.

        Once: other anchors, or these in another order, would be another network's.
        """
        if not self.network.anchors.any():
            self.network.learn_from(mean)

    def learn_noise(self, precision: Tensor) -> None:
        """Weigh pixels by the noise's precision `(P,)`, those beyond ``--l-start`` not at all."""
        assert self.radius is not None
        self.network.learn_noise(precision * (self._shell <= self.radius))

    def template_latents(self) -> Tensor:
        """Return the latents that the network compares particles with."""
        return self.network.template_latents()

    def get_extra_state(self) -> dict[str, Any]:
        """Return what the turns were planned by, and what the last round is worth."""
        return {"planned": list(self._planned), "judged": self.judged, "radius": self.radius}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up what the last round is worth, if the turns are those that were planned.

        Raises
        ------
        InputError
            If they are not.
        """
        for flag, was, now in zip(("-n", "-b", "--rounds"), state["planned"], self._planned,
                                  strict=True):  # fmt: skip
            if was != now:
                raise InputError(f"{flag} {now}: the run's turns were planned for {flag} {was}")
        self.judged, self.radius = dict(state["judged"]), state["radius"]


def _fit(encoder: AlternatingEncoder, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Make the table as long as that of a state: an encoder may be loaded for other particles."""
    table = encoder.table
    count = len(state.get(f"{prefix}table.weight", table.weight))
    if count != len(table.weight):
        encoder.table = table.sized(count)
