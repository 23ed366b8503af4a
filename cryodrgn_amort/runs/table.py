"""Latents with the decoder of a run, as a run that everything opens that opens a run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from cryodrgn_amort.core import write_weights, write_z
from cryodrgn_amort.models import VLT, AmortVAE, LookupTable, build_model
from cryodrgn_amort.runs.config import model_args, write_config

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from cryodrgn_amort.data import Particles
    from cryodrgn_amort.runs.reader import Run


__all__ = ["write_table"]


def write_table(
    folder: Path,
    run: Run,
    particles: Particles,
    decoder: AmortVAE,
    posteriors: tuple[np.ndarray, np.ndarray],
    given: dict[str, Any],
) -> None:
    """Write config, latents and weights of a run with a frozen table, at the epoch of ``run``.

    Parameters
    ----------
    run
        Whose settings, and ``decoder``, it has.
    particles
        Those that the latents are of, or others with the same box and normalisation.
    posteriors
        Means and log variances, `(N, zdim)` each.
    given
        Settings that are others: where the particles are.
    """
    settings = replace(
        run.settings, encoder="vlt", recipe=None, holdout=None, outdir=str(folder.absolute()),
        extra={"table_freeze": True}, **given,
    )  # fmt: skip
    particles.held_out = None
    write_config(folder, settings, VLT, particles)
    mean, logvar = posteriors
    table = LookupTable(torch.from_numpy(mean), torch.from_numpy(logvar), None)
    args = model_args(settings, VLT, particles.D)
    model: AmortVAE = build_model(args, particles.lattice, table)
    model.decoder.load_state_dict(decoder.decoder.state_dict())
    for name in (f"z.{run.epoch}.pkl", "z.pkl"):
        write_z(folder / name, mean, logvar)
    for name in (f"weights.{run.epoch}.pkl", "weights.pkl"):
        write_weights(
            folder / name, run.epoch, model.host_state_dict(), encoder="vlt",
            encoder_state_dict=model.own_state_dict(), norm=list(particles.norm),
        )  # fmt: skip
