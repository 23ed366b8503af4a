"""The second stage, ``--from RUN``: an encoder for the decoder of a finished run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.core import InputError, write_json
from cryodrgn_amort.models import AlternatingEncoder, SyntheticImages
from cryodrgn_amort.runs import NOISE, load_run

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from cryodrgn_amort.core import ProcessGroup, Registry
    from cryodrgn_amort.data import Particles
    from cryodrgn_amort.models import AmortVAE, EncoderSpec
    from cryodrgn_amort.options import TrainSettings


__all__ = ["compare_images", "synthetic_images", "take_over"]
logger = logging.getLogger("cryodrgn_amort")


def take_over(
    model: AmortVAE,
    settings: TrainSettings,
    encoder: EncoderSpec,
    particles: Particles,
    plugins: Registry,
    processes: ProcessGroup,
) -> tuple[Tensor, Tensor] | None:
    """Give a model the decoder of RUN, and tell the encoder of the latents of RUN.

    With ``encoder.sleeps`` the decoder stays as it is.

    Returns
    -------
    tuple or None
        Mean and log variance of these latents, each `(N, zdim)`; the latter is -inf if RUN has no
        posteriors. None without ``--from``.

    Raises
    ------
    InputError
        If RUN cannot be read, or its decoder does not fit.
    """
    if not settings.from_run:
        return None
    name = f"--from {settings.from_run}"
    run = load_run(str(settings.from_run), plugins, flag="--from")
    if particles.whole and encoder.sleeps:
        raise InputError(f"--enc-mask -1: {name} makes up no corners of images")
    try:
        model.decoder.load_state_dict(run.load_decoder()[0].decoder.state_dict())
    except RuntimeError:
        raise InputError(f"{name}: its decoder is another one than was asked for") from None
    model.fast.forget()
    mean, logvar = (torch.from_numpy(part).to(particles.device) for part in run.z(complete=True))
    if not logvar.isfinite().all():  # of train_dec: it has no posteriors
        logvar = torch.full_like(mean, -np.inf)
    if encoder.sleeps:
        model.fix_decoder()
        if model.amort is not None:
            with torch.no_grad():
                model.amort.learn_from(mean)
    if isinstance(model.amort, AlternatingEncoder):
        own = slice(processes.rank, None, processes.size)
        with torch.no_grad():
            model.amort.put(mean[own], logvar[own])
    return mean, logvar


def synthetic_images(
    model: AmortVAE,
    particles: Particles,
    latents: tuple[Tensor, Tensor],
    seed: int,
    *,
    begins: bool,
    made: Mapping[str, int],
) -> SyntheticImages:
    """Make what an encoder learns from in place of particles: images that the decoder makes up.

    Parameters
    ----------
    latents
        Mean and log variance of those that images are made up for, each `(N, zdim)`.
    begins
        Whether training begins. One that goes on has the encoder's state from its checkpoint.
    made
        ``copies`` and ``each_epoch``, as of ``SyntheticImages``.
    """
    amort = model.amort
    copies, each_epoch = made.get("copies", 1), made.get("each_epoch")
    templates = None if amort is None else amort.template_latents()
    images = SyntheticImages(
        model.fast, particles, *latents, templates, seed, copies=copies, each_epoch=each_epoch
    )
    if amort is not None and begins:
        with torch.no_grad():
            amort.learn_noise(images.noise.precision())
    return images


def compare_images(
    images: SyntheticImages, folder: Path, within: int | None, *, goes_on: bool
) -> None:
    """Write how alike images made up and the particles are; warn if they are not.

    A training that goes on has done so before.

    Parameters
    ----------
    within
        In how many shells they are compared; None: all.
    """
    if goes_on and (folder / NOISE).is_file():
        return
    images.epoch_start(1)
    found = images.agreement(within)
    write_json(folder / NOISE, {**images.noise.facts(), **found.facts()})
    ratio = found.power_ratio
    logger.info(
        f"Images made up have {ratio.min():.2f} to {ratio.max():.2f} times the particles' power"
    )
    if warning := found.warning():
        logger.warning(warning)
