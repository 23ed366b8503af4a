"""Table 1 of the paper: the time that an epoch takes, side by side.

Trainings take turns, a few batches each, so that whatever else the machine does meets them alike.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.core import (
    InputError,
    default_device,
    matrix_products,
    text_table,
    write_json,
)
from cryodrgn_amort.runs import source_of
from cryodrgn_amort.training.trainer import Trainer

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from cryodrgn_amort.data import Particles, ParticleSource
    from cryodrgn_amort.options import TimingOptions
    from cryodrgn_amort.runs import Run


__all__ = ["endless_steps", "time_epochs", "times_table", "write_times"]


def time_epochs(runs: Sequence[Run], options: TimingOptions) -> dict[str, np.ndarray]:
    """Time the training step of several runs' configurations, in turn.

    Each trains anew, from its start, and nothing of that is kept. Preprocessing and checkpoints are
    not counted: they do not belong to an epoch.

    Returns
    -------
    dict
        Folder -> seconds per epoch in each round `(rounds,)`: those of a batch times their number.

    Raises
    ------
    InputError
        If their inputs are gone, or their training is none of ours.
    """
    for run in runs:
        if not run.origin.encoder:
            raise InputError(f"RUN {run.folder}: a run of cryodrgn {run.origin.command}: only "
                             "epochs of train_amort and train_vae can be timed")  # fmt: skip
    trainers: dict[str, Trainer] = {}
    opened: dict[tuple[ParticleSource, bool], Particles] = {}
    for run in runs:
        source = (
            source_of(run.settings),
            run.settings.enc_mask == -1,
        )  # all that particles depend on
        settings = replace(run.settings, overwrite=True)  # which it says, but does not do
        trainer = Trainer(settings, run.plugins, opened.get(source))
        trainers[str(run.folder)], opened[source] = trainer, trainer.particles
    steps = {name: endless_steps(trainer) for name, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(options.rounds + 1):
        for name, trainer in trainers.items():
            _wait(trainer.device)
            began = time.perf_counter()
            for _ in range(options.batches):
                next(steps[name])
            _wait(trainer.device)
            took = (time.perf_counter() - began) / options.batches
            if turn:
                seconds[name].append(took * len(trainer.batches))
    return {name: np.array(values) for name, values in seconds.items()}


def endless_steps(trainer: Trainer) -> Iterator[None]:
    """Take optimizer steps of a training, epoch after epoch, and keep nothing."""
    trainer.prepare_particles(None)
    trainer.model.train()
    trainer.epoch = trainer.settings.pretrain  # poses move, if they are refined
    lost = trainer.steps.lost
    while True:
        if trainer.model.amort is not None:
            trainer.model.amort.epoch_start(0.0)
        trainer.objective.epoch_start(1)
        for loaded in trainer.batches.loaded():
            with matrix_products():
                trainer.steps.take(loaded, trainer.beta(0), moving=trainer.moving)
            if lost is not None and lost.due:
                lost.look()
            yield


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times_table(seconds: Mapping[str, np.ndarray]) -> str:
    """Return the times as a table of plain text."""
    rows = [("run", "seconds per epoch", "fastest to slowest", "relative")]
    first = float(np.median(next(iter(seconds.values()))))
    for name, values in seconds.items():
        middle = float(np.median(values))
        spread = f"{values.min():.3g} to {values.max():.3g}"
        rows.append((Path(name).name, f"{middle:.3g}", spread, f"{middle / first:.2f}"))
    return text_table(rows)


def write_times(seconds: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Write the times as JSON."""
    facts = {
        "seconds_per_epoch": seconds,
        "threads": torch.get_num_threads(),
        "device": str(default_device()),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)
