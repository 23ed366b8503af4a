"""``--table-init linear``: a table that begins with the latents of a linear model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from cryodrgn_amort.core import bar
from cryodrgn_amort.models import LinearModel, LookupTable
from cryodrgn_amort.options import LINEAR, TableFlags

if TYPE_CHECKING:
    from cryodrgn_amort.training.trainer import Trainer


__all__ = ["start_linearly"]

logger = logging.getLogger("cryodrgn_amort")
_TOGETHER = 256
_WINDOW = 0.85  # of half a box, where the host's images are not cut off


@torch.no_grad()
def start_linearly(trainer: Trainer) -> None:
    """Let the table of a training that begins hold a linear model's posteriors, if asked for.

    Latents beyond those that the model finds start as their prior.
    """
    settings, table, particles = trainer.settings, trainer.model.amort, trainer.particles
    flags = TableFlags.of(settings.extra)
    if trainer.epoch or trainer.progress is not None:  # it goes on
        return
    if flags.table_init != LINEAR or not isinstance(table, LookupTable):
        return
    mask = settings.window_r if settings.window else _WINDOW
    processes = trainer.processes
    model = LinearModel(trainer.loader, settings.zdim, settings.seed, mask, processes)
    logger.info("Linear model of the particles: mean and principal components")

    def tell(radius: int, gain: float, count: int) -> None:
        logger.info(
            f"Up to {radius} Fourier pixels: {count} components gain {gain:.3g} nats for each "
            "particle that is held back"
        )

    model.fit(tell)
    own = torch.arange(processes.rank, particles.n, processes.size)
    mean = torch.zeros(len(own), settings.zdim, device=particles.device)
    logvar = torch.zeros_like(mean)
    parts = torch.arange(len(own)).split(_TOGETHER)
    for at in bar(parts, "latents of the linear model", silent=not processes.leads):
        found, covariance = model.posterior(trainer.loader.read(own[at]))
        mean[at, : found.shape[1]] = found
        logvar[at, : found.shape[1]] = covariance.diagonal(dim1=1, dim2=2).log()
    if "table_logvar" in settings.extra:
        logvar.fill_(flags.table_logvar)
    table.put(mean, logvar)
    logger.info(
        f"The table starts with {model.found} components up to {model.radius} Fourier pixels"
    )
