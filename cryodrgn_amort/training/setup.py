"""What a training is made of, before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cryodrgn_amort import host
from cryodrgn_amort.core import InputError, available_memory, bar, free_memory, half_precision
from cryodrgn_amort.data import BatchLoader
from cryodrgn_amort.models import AmortVAE, Objective, build_model
from cryodrgn_amort.runs import model_args
from cryodrgn_amort.training.augment import Augmented
from cryodrgn_amort.training.implied_beta import ImpliedBeta
from cryodrgn_amort.training.pose_refinement import RefinedPoses
from cryodrgn_amort.training.random_state import RandomState
from cryodrgn_amort.training.second_stage import synthetic_images

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

    from cryodrgn_amort.core import ProcessGroup
    from cryodrgn_amort.data import Batches, EncoderInput, Particles
    from cryodrgn_amort.models import Encoder, EncoderSpec
    from cryodrgn_amort.options import TrainSettings
    from cryodrgn_amort.training.stages import Stage


__all__ = [
    "check_processes",
    "make_beta",
    "make_model",
    "make_objective",
    "open_loader",
    "shuffled_batches",
]


def check_processes(settings: TrainSettings, processes: ProcessGroup) -> None:
    """Check that nothing is asked for that several processes cannot do.

    Raises
    ------
    InputError
        If it is.
    """
    if processes.size > 1 and settings.beta_control is not None:
        raise InputError("--beta-control: not with several processes, whose KL it does not add")
    if processes.size > 1 and settings.shuffler_size:
        raise InputError("--shuffler-size: not with several processes")
    if processes.size > 1 and settings.do_pose_sgd:
        raise InputError("--do-pose-sgd: not with several processes")


def make_beta(settings: TrainSettings, particles: Particles) -> Any:
    """Make the weight of the KL divergence: what tells it of the number of particles seen."""
    value = settings.beta_value()
    return ImpliedBeta(particles) if value == "implied" else host.get_beta_schedule(value)


def make_model(
    settings: TrainSettings, particles: Particles, spec: EncoderSpec, amort: Encoder | None
) -> tuple[RandomState, RefinedPoses | None, AmortVAE]:
    """Seed the random numbers, and make poses and model in the host's order.

    ``amort`` is the encoder that ``spec`` made; None: the model makes a network of the host.
    """
    tilts = particles.tilts is not None and particles.tilts.random
    random_state = RandomState(settings.seed, particles.device, tilts=tilts)
    poses = RefinedPoses(particles, settings.pose_lr) if settings.do_pose_sgd else None
    args = model_args(settings, spec, particles.D)
    precision = settings.matmul_precision(half_precision(particles.device))
    return random_state, poses, build_model(args, particles.lattice, amort, precision)


def open_loader(
    settings: TrainSettings,
    particles: Particles,
    shown: EncoderInput | None,
    processes: ProcessGroup,
    folder: Path | None,
) -> BatchLoader:
    """Preprocess the particles, in memory or into a file in ``folder``, unless ``--lazy``.

    Raises
    ------
    InputError
        If images cannot be read, or have pixels that are not finite.
    """
    memory = available_memory() // 2 // processes.local_size
    on_device = (free_memory(particles.device) or 0) // 2  # a card is this process's alone
    if settings.memory is not None:
        memory = int(settings.memory * 1e9)
        on_device = min(memory, on_device)

    def progress(items: Iterable[Any], total: int) -> Iterator[Any]:
        return bar(items, "preprocessing", total, silent=not processes.leads)

    memory = 0 if settings.lazy else memory
    return BatchLoader(
        particles, shown, memory=memory, device_memory=on_device, folder=folder,
        processes=processes, progress=progress,
    )  # fmt: skip


def shuffled_batches(
    settings: TrainSettings, loader: BatchLoader, random_state: RandomState
) -> Batches:
    """Make the batches of the epochs; ``random_state`` is told what shuffles them."""
    batches = loader.batches(
        settings.batch_size,
        shuffle=True,
        shuffle_seed=settings.shuffle_seed,
        threads=2 if settings.num_workers is None else max(1, settings.num_workers),
        rng=random_state.tilts,
        shuffler_size=settings.shuffler_size,
    )
    random_state.shuffle = batches.generator
    return batches


def make_objective(
    settings: TrainSettings,
    particles: Particles,
    model: AmortVAE,
    latents: tuple[Tensor, Tensor] | None,
    stage: Stage,
    *,
    begins: bool,
) -> Objective:
    """Make what the model learns from in a stage.

    ``latents`` and ``begins`` are as of ``synthetic_images``.
    """
    if latents is not None and (stage.what == "encoder" or model.decoder_fixed):
        made = stage.images_made(settings.batch_size)
        return synthetic_images(model, particles, latents, settings.seed, begins=begins, made=made)
    if settings.augment is not None:
        return Augmented(particles, settings.augment, settings.consistency)
    return Objective()
