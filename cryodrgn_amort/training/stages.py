"""What is trained in which epoch: all of it in one stage, or decoder and encoder in turns."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cryodrgn_amort.core import InputError
from cryodrgn_amort.models import AlternatingEncoder, set_rate, unexplained
from cryodrgn_amort.options import TurnFlags
from cryodrgn_amort.training.implied_beta import ImpliedBeta
from cryodrgn_amort.training.setup import make_objective
from cryodrgn_amort.training.stepper import Stepper

if TYPE_CHECKING:
    from torch import Tensor

    from cryodrgn_amort.core import ProcessGroup
    from cryodrgn_amort.data import Particles
    from cryodrgn_amort.models import AmortVAE
    from cryodrgn_amort.options import TrainSettings
    from cryodrgn_amort.training.trainer import Trainer


__all__ = ["Stage", "begin_stage", "stages_of", "weigh_pixels"]

logger = logging.getLogger("cryodrgn_amort")

_IMAGES = 256_000  # made up for a turn of the encoder
_TOGETHER = 128  # of these in a step
_LEAST_SHARE = 6  # turns of the encoder take at most a third of all epochs, a round a sixth
_OF_DECODER = 0.15  # of the other epochs
_ENCODER_RATES = 1e-3, 2e-5
_FALLS_TO = 0.1  # of --lr, in turns of the decoder
_LOOK = 10  # of the table's epochs the first in so many sees all frequencies
_LEAST_RADIUS = 4
_LEAST_SIGNAL = 0.05  # of the noise, at frequencies where latents are found


@dataclass(frozen=True)
class Stage:
    """Epochs in which the same is trained.

    Attributes
    ----------
    what
        "all" that is trained at all, or what has its turn: "table", "encoder", "decoder".
    first, last
        Its epochs.
    lr, lr_end
        The common optimizer's learning rate falls from the first to the second; None: it does not.
    batches
        How many batches an epoch has at most; None: all.
    coarse
        Whether images are compared up to the radius of ``--l-start`` alone.
    part
        Of a turn that it shares with others: the share that is done before it, and after it.
    """

    what: str
    first: int
    last: int
    lr: float
    lr_end: float | None
    batches: int | None = None
    coarse: bool = False
    part: tuple[float, float] = (0.0, 1.0)

    def done(self, epoch: int) -> float:
        """Return what share of the turn is done when an epoch begins."""
        before, after = self.part
        return before + (after - before) * (epoch - self.first) / (self.last - self.first + 1)

    def set_rate(self, optimizer: torch.optim.Optimizer, epoch: int, halvings: int) -> None:
        """Set the learning rate with which an epoch begins, halved ``halvings`` times."""
        set_rate(optimizer, self.lr, self.lr_end, self.done(epoch), halvings)

    def images_made(self, batch_size: int) -> dict[str, int]:
        """Return ``copies`` and ``each_epoch`` of ``SyntheticImages``, where not one each."""
        if self.batches is None:
            return {}
        copies = _copies(batch_size)
        return {"copies": copies, "each_epoch": self.batches * batch_size * copies}


def _copies(batch_size: int) -> int:
    """Return how many images are made up for each particle of a batch, in turns of the encoder."""
    return max(1, _TOGETHER // batch_size)


def stages_of(settings: TrainSettings, n: int, *, in_turns: bool) -> list[Stage]:
    """Plan the epochs of a training.

    In turns: table and decoder, and then in ``--rounds`` the encoder, between two of its turns the
    decoder. A turn of the encoder has as many epochs as make up 256,000 images, at most a sixth of
    all; after ``--from`` the first turn is the encoder's.

    Parameters
    ----------
    n
        Number of particles.

    Raises
    ------
    InputError
        If there are too few epochs for as many rounds.
    """
    epochs, lr = settings.num_epochs, settings.lr
    if not in_turns:
        return [Stage("all", 1, epochs, lr, settings.lr_end)]
    flags = TurnFlags.of(settings.extra)
    rounds, whole = flags.rounds, settings.from_run is not None
    encoder, decoder, batches = _lengths(settings, n, rounds, whole=whole)
    rest = epochs - rounds * encoder - (rounds - 1) * decoder
    table, spare = (0, rest) if whole else (rest, 0)  # what is left of epochs after --from
    if (table < 1 and not whole) or rest < 0 or (rounds > 1 and decoder < 1):
        raise InputError(f"-n {epochs}: too few epochs for --rounds {rounds}")
    # without another turn that shows the decoder all frequencies, the table's does
    look = 0 if flags.l_start else -(-table // _LOOK)
    look = table if rounds == 1 else look
    share, steady = look / max(table, 1), (lr, settings.lr_end or lr)
    falling = lr, settings.lr_end or _FALLS_TO * lr
    found: list[Stage] = []

    def add(what: str, count: int, rates: tuple[float, float], **more: Any) -> None:
        first = found[-1].last + 1 if found else 1
        if count:
            found.append(Stage(what, first, first + count - 1, *rates, **more))

    add("table", look, steady, part=(0.0, share))
    add("table", table - look, steady, coarse=True, part=(share, 1.0))
    for left in reversed(range(rounds)):  # further rounds
        length = encoder if left else encoder + spare
        add("encoder", length, _ENCODER_RATES, batches=batches)
        if left:
            add("decoder", decoder, falling, coarse=left > 1)
    return found


def _lengths(settings: TrainSettings, n: int, rounds: int, *, whole: bool) -> tuple[int, int, int]:
    """Return the epochs of a turn of the encoder and of the decoder, and batches of the former's.

    ``whole``: whether there is no turn of the table, as the decoder is a finished run's.
    """
    epochs, size = settings.num_epochs, settings.batch_size
    steps, each = -(-_IMAGES // (size * _copies(size))), -(-n // size)  # of a turn, of an epoch
    encoder = min(-(-steps // each), max(1, epochs // (_LEAST_SHARE * rounds) * 2))
    batches = min(each, -(-steps // encoder))
    rest, between = epochs - rounds * encoder, max(1, rounds - 1)
    decoder = rest // between if whole else max(1, round(_OF_DECODER * rest / between))
    return encoder, 0 if rounds == 1 else decoder, batches


@torch.no_grad()
def _begin_turn(
    model: AmortVAE,
    stage: Stage,
    processes: ProcessGroup,
    particles: Particles,
    seed: int,
    *,
    begins: bool,
) -> tuple[Tensor, Tensor]:
    """Let what has its turn be trained, and nothing else; returns the latents of all particles.

    Parameters
    ----------
    begins
        Whether the turn begins. One that goes on has the encoder's state from its checkpoint.

    Returns
    -------
    mean, logvar
        `(n, zdim)` each, in every process.
    """
    encoder = model.amort
    assert isinstance(encoder, AlternatingEncoder)
    what = stage.what
    encoder.begin(what)
    model.decoder.requires_grad_(what != "encoder")
    own = torch.cat(encoder.latents(), 1)
    both = processes.spread(own, particles.n)
    mean, logvar = both[:, : model.zdim].contiguous(), both[:, model.zdim :].contiguous()
    if encoder.radius is None and (stage.coarse or what == "encoder"):
        encoder.radius = _radius(model, particles, mean, seed)
        logger.info(f"Latents are found at frequencies up to {encoder.radius} Fourier pixels")
    model.limit(encoder.radius if stage.coarse else None)
    model.weigh(encoder.weights)
    if what == "encoder" and begins:
        encoder.learn_from(mean)
    return mean, logvar


def _average(groups: Tensor, spectra: Tensor) -> Tensor:
    """Average spectra `(G, shells)` over the particles of all optics groups: `(shells,)`."""
    share = torch.bincount(groups).to(spectra)
    average: Tensor = (share / share.sum()) @ spectra
    return average


def _radius(model: AmortVAE, particles: Particles, mean: Tensor, seed: int) -> int:
    """Return up to which shell the decoder's images have a twentieth of the noise's power."""
    _, groups, left, explained = unexplained(model.fast, particles, mean, seed, quick=True)
    ratio = _average(groups, explained) / _average(groups, left).clamp(min=1e-12)
    enough = (ratio >= _LEAST_SIGNAL).nonzero()
    return max(_LEAST_RADIUS, int(enough.max()) + 1 if len(enough) else 0)


@torch.no_grad()
def weigh_pixels(trainer: Trainer) -> None:
    """Weigh pixels in a turn of table or decoder by the noise that there is, as an epoch begins.

    The noise is what the decoder leaves unexplained of a sample of the particles, by shells. With
    coloured noise taken for white, latents follow it where it is strong.
    """
    model, particles = trainer.model, trainer.particles
    encoder = model.amort
    if not isinstance(encoder, AlternatingEncoder) or trainer.stage.what == "encoder":
        return
    mean = trainer.processes.spread(encoder.latents()[0].contiguous(), particles.n)
    seed = trainer.settings.seed
    shells, groups, spectra, _ = unexplained(model.fast, particles, mean, seed, quick=True)
    variance = _average(groups, spectra)
    encoder.weights.copy_(1 / variance.clamp(min=1e-12)[shells.of_pixel])
    model.weigh(encoder.weights)


def begin_stage(trainer: Trainer, epoch: int) -> bool:
    """Begin the stage of an epoch, or go on in it; False: it is the present one."""
    stage = next((s for s in trainer.stages if epoch <= s.last), trainer.stages[-1])
    if stage is getattr(trainer, "stage", None):
        return False
    settings, particles, model = trainer.settings, trainer.particles, trainer.model
    trainer.stage, latents = stage, trainer.latents
    trainer.begins = epoch == stage.first and trainer.progress is None
    if trainer.encoder_spec.in_turns:
        latents = _begin_turn(
            model, stage, trainer.processes, particles, settings.seed, begins=trainer.begins
        )
    if isinstance(trainer.beta, ImpliedBeta) and trainer.begins and stage.what != "encoder":
        trainer.beta.begin(model.kept)
    trainer.objective = make_objective(
        settings, particles, model, latents, stage, begins=trainer.begins
    )
    parts = trainer.optimizer, trainer.objective, trainer.loader, trainer.poses, trainer.processes
    trainer.steps = Stepper(settings, model, *parts)
    return True
