"""A training's checkpoints: all that it needs to go on to the last bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cryodrgn_amort.core import INTERRUPTED, InputError, recorded, write_weights, write_z
from cryodrgn_amort.models import plain_state
from cryodrgn_amort.runs import METRICS
from cryodrgn_amort.training.epoch_metrics import EpochProgress
from cryodrgn_amort.training.implied_beta import ImpliedBeta

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from cryodrgn_amort.core import ProcessGroup
    from cryodrgn_amort.data import EncoderInput, Particles
    from cryodrgn_amort.models import AmortVAE, Objective
    from cryodrgn_amort.options import TrainSettings
    from cryodrgn_amort.runs import RunFolder
    from cryodrgn_amort.training.pose_refinement import RefinedPoses
    from cryodrgn_amort.training.random_state import RandomState


__all__ = ["Checkpoints", "Place"]


class Place(NamedTuple):
    """Where a training goes on."""

    epoch: int  # epochs that are complete
    random: dict[str, Any]  # random states before the next batch
    progress: EpochProgress | None  # what is done of the next epoch


@dataclass
class Checkpoints:
    """Writes checkpoints of a training, and takes up what one holds.

    Of several processes all have to call its methods; the leading one writes.
    """

    settings: TrainSettings
    files: RunFolder
    processes: ProcessGroup
    particles: Particles
    model: AmortVAE
    optimizer: torch.optim.Optimizer
    shown: EncoderInput | None
    poses: RefinedPoses | None
    random_state: RandomState
    beta: Any

    def write(self, epoch: int, z: tuple[np.ndarray, np.ndarray], random: dict[str, Any]) -> Path:
        """Write a checkpoint after an epoch; returns the path of its weights.

        They come last, after z.EPOCH.pkl: a checkpoint is complete once both exist.

        Parameters
        ----------
        z
            Posteriors of all particles, each `(N, zdim)`.
        random
            Random states that the next epoch begins with.
        """
        folder, encoder_state = self.files.path, self._encoder_state()
        names = [f"{kind}.{epoch}.pkl" for kind in ("z", "pose", "weights")]
        if not self.processes.leads:
            return folder / names[2]
        with recorded(folder, *names, METRICS):
            write_z(folder / names[0], *z)
            if self.poses is not None:
                self.poses.write(folder / names[1])
            self._write_weights(names[2], epoch, random, encoder_state)
        (folder / INTERRUPTED).unlink(missing_ok=True)
        self.files.drop_replaced()
        return folder / names[2]

    def write_within(self, epoch: int, progress: EpochProgress, objective: Objective) -> None:
        """Write a checkpoint within ``epoch``, of which ``progress`` is done."""
        encoder = self.model.amort
        if encoder is not None:
            state = encoder.epoch_state()
            progress.encoder = self.processes.rows_of_all(
                state, encoder.per_particle, self.particles.n
            )
        progress.lesson = objective.epoch_state()
        self.processes.sum_([progress.sums, progress.moments])
        random, encoder_state = self.random_state.state(), self._encoder_state()
        if not self.processes.leads:
            return
        with recorded(self.files.path, INTERRUPTED, METRICS):
            self._write_weights(INTERRUPTED, epoch - 1, random, encoder_state, part=vars(progress))
        self.files.drop_replaced()

    def _write_weights(
        self,
        name: str,
        epoch: int,
        random: dict[str, Any],
        encoder_state: dict[str, Any],
        **more: Any,
    ) -> None:
        """Write the state after ``epoch`` epochs, and whatever more there is to keep."""
        more |= {} if self.poses is None else {"poses": self.poses.state_dict()}
        more |= {"beta": self.beta.value} if isinstance(self.beta, ImpliedBeta) else {}
        write_weights(
            self.files.path / name, epoch, self.model.host_state_dict(),
            plain_state(self.optimizer), encoder=self.settings.encoder, random=random,
            norm=list(self.particles.norm), encoder_state_dict=encoder_state,
            input_state={} if self.shown is None else self.shown.state_dict(), **more,
        )  # fmt: skip

    def _encoder_state(self) -> dict[str, Any]:
        """Return the state of an encoder of ours, rows of all processes together."""
        encoder = self.model.amort
        if encoder is None:
            return {}
        state = self.model.own_state_dict()
        return self.processes.rows_of_all(state, encoder.per_particle, self.particles.n)

    def restore(self, checkpoint: dict[str, Any], own: dict[str, Any]) -> Place:
        """Take up what a checkpoint holds; ``own`` is our part of it.

        Raises
        ------
        InputError
            If it is damaged, or of a training that this one cannot continue.
        """
        name = f"--load {self.settings.load}"
        self._restore_model(checkpoint, own, name)
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        except (KeyError, ValueError) as err:
            raise InputError(f"{name}: optimizer of another model ({err})") from None
        if self.shown is not None and "input_state" in own:
            try:
                self.shown.load_state_dict(own["input_state"])
            except InputError as err:
                raise InputError(f"{name}: {err}") from None
        if isinstance(self.beta, ImpliedBeta):
            self.beta.value = float(own.get("beta", 0.0))
        if self.poses is not None:
            self.poses.restore(own.get("poses"), name)
        random, epoch = own.get("random", {}), int(checkpoint["epoch"])
        try:
            if "torch" in random:
                torch.Generator().set_state(random["torch"])  # fails if it is no state
            progress = self._restored_progress(own["part"], name) if "part" in own else None
        except InputError:
            raise
        except Exception as err:  # whatever a damaged one leads to
            reason = f"{type(err).__name__}: {err}".splitlines()[0]
            raise InputError(f"{name}: a damaged checkpoint ({reason})") from None
        return Place(epoch, random, progress)

    def _restore_model(self, checkpoint: dict[str, Any], own: dict[str, Any], name: str) -> None:
        """Load the weights; a decoder that is not trained has to be the one that is there."""
        state, model = own.get("encoder_state_dict", {}), self.model
        if model.amort is not None:
            state = self.processes.own_rows(state, model.amort.per_particle)
        decoder = model.decoder.state_dict().values() if model.decoder_fixed else ()
        fixed = [value.clone() for value in decoder]
        model.restore(checkpoint["model_state_dict"], state, name)
        if not all(map(torch.equal, fixed, model.decoder.state_dict().values())):
            raise InputError(
                f"--from {self.settings.from_run}: its decoder is not the one that {name} was "
                "trained for: it has been trained since; begin anew with --overwrite"
            )

    def _restored_progress(self, kept: dict[str, Any], name: str) -> EpochProgress:
        """Take up what is done of an epoch, this process's share."""
        progress = EpochProgress.from_checkpoint(kept, self.settings, self.particles, name)
        encoder = self.model.amort
        if encoder is not None:
            progress.encoder = self.processes.own_rows(progress.encoder, encoder.per_particle)
        return progress.to(self.particles.device, keep_sums=self.processes.leads)
