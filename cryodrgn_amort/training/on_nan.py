"""What happens at a batch whose loss is no usable number: ``--on-nan``.

Single particles are to blame if their losses are not finite and those of others are; else the
weights are: training has diverged.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort.core import InputError, epochs, read_weights
from cryodrgn_amort.data import odd_images
from cryodrgn_amort.models import kl_divergence

if TYPE_CHECKING:
    from pathlib import Path

    from cryodrgn_amort.core import ProcessGroup
    from cryodrgn_amort.data import Batch, Particles
    from cryodrgn_amort.models import AmortVAE


__all__ = ["RollbackError", "diverged", "last_checkpoint", "leave_out", "without_loss"]
logger = logging.getLogger("cryodrgn_amort")

_MOST_LEFT_OUT = 0.1  # of the particles in an epoch, by --on-nan skip
_MOST_ROLLBACKS = 5


class RollbackError(Exception):
    """Training is to go back to the last checkpoint."""


def without_loss(
    model: AmortVAE, batch: Batch, particles: Particles, processes: ProcessGroup
) -> str | None:
    """Name the particles of a batch that have no loss; None: the weights are to blame."""
    mean, logvar = model.posterior(batch)
    each = model.errors(batch, mean)[1] + kl_divergence(mean, logvar)
    bad = processes.gather(batch.index[~each.isfinite().cpu()].tolist())
    if not 0 < len(bad) < batch.size:
        return None
    rows = np.array(sorted(bad))
    rows = rows if particles.ind is None else particles.ind[rows]
    noun = "image" if particles.tilts is None else "particle"
    return odd_images(rows.tolist(), "without a loss", noun)


def diverged(folder: Path, epoch: int) -> str:
    """Say that the loss of an epoch is no usable number."""
    kept = f"epoch {epochs(folder)[-1]}" if epochs(folder) else "none"
    return (
        f"the loss of epoch {epoch} is no usable number: training has diverged (last good "
        f"checkpoint: {kept}); try a smaller --lr"
    )


def leave_out(on_nan: str, why: str, left_out: int, n: int) -> None:
    """Let training go on without a batch, if ``on_nan`` is "skip".

    Raises
    ------
    RollbackError
        If it is "rollback".
    InputError
        If it is "stop", or more than a tenth of the ``n`` particles are ``left_out`` already.
    """
    if on_nan == "rollback":
        raise RollbackError(why)
    if on_nan != "skip":
        raise InputError(why)
    logger.warning(f"Batch left out: {why}")
    if left_out > _MOST_LEFT_OUT * n:
        raise InputError(f"more than a tenth of the particles have no loss: {why}")


def last_checkpoint(folder: Path, rollbacks: int, why: str) -> dict[str, Any]:
    """Read the checkpoint to go back to, for the ``rollbacks``-th time.

    Raises
    ------
    InputError
        If there is none, or it was gone back to too often.
    """
    known = epochs(folder)
    if not known or rollbacks > _MOST_ROLLBACKS:
        raise InputError(f"{why}; --on-nan rollback: " + (
            f"{_MOST_ROLLBACKS} times were not enough" if known else "there is no checkpoint"
        ))  # fmt: skip
    return read_weights(folder / f"weights.{known[-1]}.pkl", "-o")
