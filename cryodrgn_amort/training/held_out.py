"""Whether another round of turns helped, by particles that were held out."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.core import OWN_KEY, read_weights
from cryodrgn_amort.data import BatchLoader, load_particles
from cryodrgn_amort.models import AlternatingEncoder, kl_divergence
from cryodrgn_amort.runs import source_of

if TYPE_CHECKING:
    from torch import Tensor

    from cryodrgn_amort.training.trainer import Trainer


__all__ = ["another_round_helped", "take_back"]
logger = logging.getLogger("cryodrgn_amort")

_SAMPLE = 1000
_CHUNK = 64
_DRAWS = 2  # each with its opposite


@torch.no_grad()
def _elbo(trainer: Trainer, variance: float | None) -> tuple[Tensor, float]:
    """Return the ELBO of a sample of the particles held out, in nats `(M,)`.

    By the model's encoder, which has seen no particle, and decoder, but for a constant.

    Parameters
    ----------
    variance
        Of the noise in a pixel; None: what the decoder leaves unexplained, which is returned, too.
    """
    settings, model, mine = trainer.settings, trainer.model, trainer.particles
    source = replace(source_of(settings), norm=mine.norm, held_out=True)
    held = load_particles(source, trainer.device, whole=settings.enc_mask == -1)
    encoder = trainer.encoder_spec.make(settings, held)
    assert encoder is not None
    encoder.to(trainer.device).load_state_dict(model.own_state_dict())
    encoder.decoder = model.fast
    encoder.eval()
    sample = np.random.default_rng(settings.seed).permutation(held.n)[:_SAMPLE]
    loader, generator = BatchLoader(held, None, memory=0), torch.Generator().manual_seed(0)
    errors, kl = [], []
    for index in torch.from_numpy(np.sort(sample)).split(_CHUNK):
        batch = loader.read(index)
        mean, logvar = encoder(batch)
        normal = torch.randn(_DRAWS, *mean.shape, generator=generator).to(mean)
        draws = mean + torch.cat([normal, -normal]) * torch.exp(0.5 * logvar)
        errors.append(torch.stack([model.errors(batch, z)[1] for z in draws]).mean(0).double())
        kl.append(kl_divergence(mean, logvar).double())
    error = torch.cat(errors)
    if variance is None:
        variance = float(error.nanmean()) / len(mine.mask)
    return (error / (-2 * variance) - torch.cat(kl)).cpu(), variance


def another_round_helped(trainer: Trainer) -> bool:
    """Tell whether the round that has just ended improved the ELBO of particles held out.

    By more than the standard error of the mean of the differences. True as well if it was the
    first one, or none are held out. The encoder keeps what the next round is compared with.
    """
    encoder = trainer.model.amort
    assert isinstance(encoder, AlternatingEncoder)
    if trainer.particles.held_out is None:
        return True
    before = encoder.judged
    elbo, variance = _elbo(trainer, before.get("variance"))
    encoder.judged = {"elbo": elbo, "variance": variance, "epoch": trainer.epoch}
    mean = float(elbo.nanmean())
    if not before:
        logger.info(f"ELBO of {len(elbo)} particles held out: {mean:.3f} nats, up to a constant")
        return True
    gain = elbo - before["elbo"]
    gain = gain[gain.isfinite()]
    more, error = float(gain.mean()), float(gain.std() / max(len(gain), 1) ** 0.5)
    logger.info(
        f"ELBO of {len(elbo)} particles held out: {mean:.3f} nats, {more:+.3f} (standard error "
        f"{error:.3f}) by this round"
    )
    return more > error


def take_back(trainer: Trainer, epoch: int) -> None:
    """Let an earlier epoch, of which there is a checkpoint, be the last one."""
    logger.info(f"Held-out particles are not explained better: the run ends with epoch {epoch}")
    checkpoint = read_weights(trainer.folder / f"weights.{epoch}.pkl", "-o")
    trainer.restore(checkpoint, checkpoint[OWN_KEY])
    if trainer.processes.leads:
        trainer.files.drop_after(epoch)
