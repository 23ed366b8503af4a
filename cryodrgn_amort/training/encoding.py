"""Posteriors of all particles, as the model has them by now."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cryodrgn_amort.models import AlternatingEncoder
from cryodrgn_amort.training.held_out import another_round_helped

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from cryodrgn_amort.data import Batch
    from cryodrgn_amort.training.trainer import Trainer


__all__ = ["encode", "end_turn"]

_BATCH = 256


def _all_batches(trainer: Trainer) -> Iterator[Batch]:
    """Go through the own particles in order."""
    # a loader draws a seed from the global generator, as the host's eval_z does
    size = max(1, _BATCH // trainer.particles.ntilts)
    batches = trainer.loader.batches(size, shuffle=False, rng=trainer.random_state.tilts)
    return map(trainer.steps.posed, batches)


@torch.no_grad()
def encode(trainer: Trainer) -> tuple[np.ndarray, np.ndarray]:
    """Return the posterior means and log variances of all particles, each `(N, zdim)`.

    Of several processes, only the leading one gets them.
    """
    both = trainer.model.eval().posteriors(_all_batches(trainer))
    both = trainer.processes.collect(both, trainer.particles.n).cpu().numpy()
    return both[:, : trainer.settings.zdim], both[:, trainer.settings.zdim :]


@torch.no_grad()
def end_turn(trainer: Trainer) -> int:
    """Let the encoder's answers to the particles be what the decoder learns from.

    Returns the epoch that was best: the present one, or, if the last round did not help, that
    before it.
    """
    model = trainer.model.eval()
    encoder, zdim = model.amort, trainer.settings.zdim
    assert isinstance(encoder, AlternatingEncoder)
    parts = [torch.cat(model.posterior(batch), 1).float() for batch in _all_batches(trainer)]
    both = torch.cat(parts)
    before = encoder.judged.get("epoch", trainer.epoch)
    encoder.put(both[:, :zdim], both[:, zdim:])
    return trainer.epoch if another_round_helped(trainer) else int(before)
