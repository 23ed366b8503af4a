"""The lines of run.log; ``cryodrgn analyze`` reads those of epochs."""

from __future__ import annotations

import logging
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from cryodrgn_amort import host
from cryodrgn_amort.core import __version__, device_name, half_precision
from cryodrgn_amort.models import AlternatingEncoder, SyntheticImages
from cryodrgn_amort.runs import HOLDOUT
from cryodrgn_amort.training.second_stage import compare_images

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryodrgn_amort.models import Losses
    from cryodrgn_amort.training.epoch_metrics import EpochProgress
    from cryodrgn_amort.training.trainer import Trainer


__all__ = ["log_batch", "log_epoch", "log_stage", "log_start"]
logger = logging.getLogger("cryodrgn_amort")

_TURNS = {
    "table": "table and decoder are trained on the particles",
    "encoder": "the encoder is trained on images that the decoder makes up",
    "decoder": "the decoder is trained on the particles, with the encoder's answers",
}


def log_start(trainer: Trainer, progress: EpochProgress | None) -> None:
    """Say what is trained on what, and where it goes on: after ``progress`` in an epoch."""
    logger.info(" ".join(sys.argv))
    device = trainer.device
    precision = trainer.settings.matmul_precision(half_precision(device))
    logger.info(
        f"cryodrgn_amort {__version__}, cryodrgn {host.VERSION}, {device_name(device)}, "
        f"matrix products in {precision}"
    )
    logger.info(trainer.settings)
    particles, model, files = trainer.particles, trainer.model, trainer.files
    each = "" if particles.tilts is None else f" in {particles.ntilts} tilts each"
    logger.info(f"{particles.n} particles of {particles.box} px{each}, norm {particles.norm}")
    logger.info(f"Particles: {trainer.loader.description}")
    if particles.held_out is not None:
        logger.info(f"{len(particles.held_out)} more are held out: {trainer.folder / HOLDOUT}")
    if trainer.processes.size > 1:
        logger.info(f"{trainer.processes.size} processes")
    for name, module in (("encoder", model.amort or model.encoder), ("decoder", model.decoder)):
        count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        logger.info(f"{count} parameters in {name}")
    epochs = trainer.settings.num_epochs
    if len(trainer.stages) > 1:
        logger.info(f"{epochs} epochs in turns: {_turns(trainer)}")
    elif isinstance(trainer.objective, SyntheticImages):
        logger.info(
            f"{epochs} epochs of {particles.n} images made up each, {epochs * particles.n} in all "
            "(-n makes it fewer)"
        )
    for line in trainer.settings.ignored:
        logger.warning(line)
    for reason in files.skipped:
        logger.warning(f"Skipped {reason}")
    if progress is not None:
        logger.info(f"Continuing in epoch {trainer.epoch + 1} after {progress.batches} batches")
    elif trainer.epoch:
        logger.info(f"Continuing after epoch {trainer.epoch} of {trainer.settings.load}")
    if files.replaced.is_dir():
        names = ", ".join(sorted(p.name for p in files.replaced.iterdir()))
        logger.info(f"To be replaced once there is a new checkpoint: {names}")


def _turns(trainer: Trainer) -> str:
    """Say what takes its turn for how long, and how many images the encoder's turns make up."""
    said, size = [], trainer.settings.batch_size
    for stage in trainer.stages:
        what = f"{stage.what} {stage.last - stage.first + 1}"
        if stage.coarse:
            what += " at low frequencies"
        if stage.what == "encoder":
            each = stage.images_made(size).get("each_epoch", trainer.particles.n)
            what += f" of {each:,} images made up"
        said.append(what)
    return ", ".join(said)


def log_stage(trainer: Trainer) -> None:
    """Say what is trained now, and compare images made up for it with the particles."""
    stage = trainer.stage
    if len(trainer.stages) > 1:
        some = ", at low frequencies" if stage.coarse else ""
        logger.info(f"Epochs {stage.first} to {stage.last}: {_TURNS[stage.what]}{some}")
    if trainer.processes.leads and isinstance(trainer.objective, SyntheticImages):
        encoder = trainer.model.amort
        within = encoder.radius if isinstance(encoder, AlternatingEncoder) else None
        compare_images(trainer.objective, trainer.folder, within, goes_on=not trainer.begins)


def log_batch(trainer: Trainer, seen: int, losses: Losses) -> None:
    """Say what the losses of a batch were, after ``seen`` particles of the epoch."""
    logger.info(
        f"# [Train Epoch: {trainer.epoch}/{trainer.settings.num_epochs}] "
        f"[{seen}/{trainer.particles.n} particles] gen loss={losses.gen_loss.item():.6f}, "
        f"kld={losses.kld.item():.6f}, beta={losses.beta:.6f}, loss={losses.total.item():.6f}"
    )


def log_epoch(row: Mapping[str, float], seconds: float) -> None:
    """Say what an epoch's row of metrics.csv says."""
    logger.info(
        f"# =====> Epoch: {row['epoch']} Average gen loss = {row['gen_loss']:.6}, "
        f"KLD = {row['kld']:.6f}, total loss = {row['loss']:.6f}; "
        f"Finished in {timedelta(seconds=seconds)}"
    )
