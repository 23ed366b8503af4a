"""What ``train_amort --encoder`` can name: encoders, and inputs for networks; lists, not code.

Imports nothing heavy: an encoder's own module is imported when one is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.core import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cryodrgn_amort.core import Registry
    from cryodrgn_amort.data import EncoderInput, Particles
    from cryodrgn_amort.models.encoders import Encoder
    from cryodrgn_amort.options import TrainSettings


__all__ = ["ENCODERS", "INPUTS", "VLT", "EncoderSpec", "InputSpec", "resolve"]


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder that ``train_amort --encoder NAME`` can use.

    Attributes
    ----------
    name, summary
        The name on the command line, and one line for humans.
    build
        Makes the encoder from the settings and the particles: those trained on, or others that it
        is to encode. PyTorch's global generators, of the CPU and of the GPU in use, are seeded by
        ``--seed`` meanwhile, and then as they were before. None: the host's own network of encode
        mode ``host_mode``.
    shown_images
        Whether it is shown images. A table is not: its amortization is "not applicable".
    flags
        Argument names (``TrainSettings``, ``settings.extra``) that apply to some encoders only,
        this one among them. A flag that only other encoders claim is refused by name.
    second_stage
        Whether it is for the decoder of a finished run: ``--from`` is needed.
    sleeps
        Whether, with ``--from``, it learns from images that the decoder makes up, the decoder
        staying as it is. Else both are trained on the particles. The encoder may have the methods
        for a second stage: ``Encoder.learn_from`` and so on.
    in_turns
        Whether it and the decoder are trained in turns; with ``--from`` they start from the run's.
    defaults
        Argument name -> value, where it is not that of ``train_vae``: with ``--from``, and
        ``in_turns``.
    """

    name: str
    summary: str
    build: Callable[[TrainSettings, Particles], Encoder] | None = None
    host_mode: str | None = None
    shown_images: bool = True
    flags: frozenset[str] = frozenset()
    second_stage: bool = False
    sleeps: bool = False
    in_turns: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.build is None) == (self.host_mode is None):
            raise ValueError(f"encoder {self.name!r}: give either build or host_mode")

    @property
    def told_pose(self) -> bool:
        """Whether ours, which compares particles with images at their poses, is told these."""
        return self.host_mode is None and (self.sleeps or self.in_turns)

    def make(self, settings: TrainSettings, particles: Particles) -> Encoder | None:
        """Make the encoder; None: it is the host's own network."""
        if self.build is None:
            return None
        import torch  # when it is needed: specs are listed without

        # of GPUs, the one that is used: torch.manual_seed would reseed all, and for good
        gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=gpus):
            torch.default_generator.manual_seed(settings.seed)
            if gpus:
                torch.cuda.manual_seed(settings.seed)
            return self.build(settings, particles)


@dataclass(frozen=True)
class InputSpec:
    """An encoder input that ``train_amort --encoder NAME`` can use.

    Attributes
    ----------
    build
        Makes it from the settings and the particles, without touching the global random state.
    flags
        As in ``EncoderSpec``.
    """

    name: str
    summary: str
    build: Callable[[TrainSettings, Particles], EncoderInput]
    flags: frozenset[str] = frozenset()


def resolve(settings: TrainSettings, plugins: Registry) -> tuple[EncoderSpec, InputSpec | None]:
    """Look up what ``--encoder`` names: the encoder, and what it is shown (None: nothing).

    Raises
    ------
    InputError
        If the name is unknown, or ``--encode-mode`` names no network of the host.
    """
    named = plugins.encoder(settings.encoder)
    if isinstance(named, EncoderSpec):
        return named, plugins.encoder_input("particle") if named.shown_images else None
    network = plugins.encoder(settings.encode_mode)
    if not isinstance(network, EncoderSpec) or network.host_mode is None:
        raise InputError(f"--encode-mode {settings.encode_mode}: not a network of the host")
    return network, named


def _table(settings: TrainSettings, particles: Particles) -> Encoder:
    from cryodrgn_amort.models.lookup_table import build_table

    return build_table(settings, particles)


def _sleep(settings: TrainSettings, particles: Particles) -> Encoder:
    from cryodrgn_amort.models.second_stage import SleepEncoder

    return SleepEncoder(settings, particles)


def _anchored(settings: TrainSettings, particles: Particles) -> Encoder:
    from cryodrgn_amort.models.second_stage import AnchoredEncoder

    return AnchoredEncoder(settings, particles)


def _alternate(settings: TrainSettings, particles: Particles) -> Encoder:
    from cryodrgn_amort.models.alternating import AlternatingEncoder

    return AlternatingEncoder(settings, particles)


def _semi(settings: TrainSettings, particles: Particles) -> Encoder:
    from cryodrgn_amort.models.second_stage import build_semi

    return build_semi(settings, particles)


def _particle(settings: TrainSettings, particles: Particles) -> EncoderInput:
    from cryodrgn_amort.data import EncoderInput

    return EncoderInput()


def _twin(settings: TrainSettings, particles: Particles) -> EncoderInput:
    from cryodrgn_amort.data import Twin

    return Twin(particles.n, settings.seed)


def _noise(settings: TrainSettings, particles: Particles) -> EncoderInput:
    from cryodrgn_amort.data import Noise

    mean, std = particles.raw_mean_std
    return Noise(particles.box, mean, std, settings.seed)


_SLEEP_DEFAULTS: Mapping[str, Any] = {"qdim": 256, "lr": 1e-3, "lr_end": 2e-5, "batch_size": 128}
_NETWORK_FLAGS = frozenset({"encode_mode", "qlayers", "qdim", "enc_mask", "from_run"})
_TILT_FLAGS = frozenset({"t_emb_dim", "tlayers", "tdim"})


def _network(name: str, summary: str) -> EncoderSpec:
    return EncoderSpec(
        name, summary, host_mode=name, flags=_NETWORK_FLAGS, sleeps=True, defaults=_SLEEP_DEFAULTS
    )


VLT = EncoderSpec(
    "vlt",
    "lookup table: a trained mean and log variance per particle",
    build=_table,
    shown_images=False,
    flags=frozenset({"table_init", "table_logvar", "table_lr", "table_lr_end", "table_freeze"}),
)
ENCODERS = (
    _network("resid", "the host's residual network (default)"),
    _network("mlp", "the host's plain network"),
    EncoderSpec(
        "tilt",
        "the host's network for tilt series",
        host_mode="tilt",
        flags=(_NETWORK_FLAGS | _TILT_FLAGS) - {"from_run"},
    ),
    VLT,
    EncoderSpec(
        "sleep",
        "second stage: a network that is told the pose, trained on images made up by a decoder",
        build=_sleep,
        second_stage=True,
        sleeps=True,
        defaults=_SLEEP_DEFAULTS,
        flags=frozenset({"from_run", "qlayers", "qdim"}),
    ),
    EncoderSpec(
        "anchored",
        "second stage: compares the particle with images of some latents at its pose",
        build=_anchored,
        second_stage=True,
        sleeps=True,
        defaults=_SLEEP_DEFAULTS,
        flags=frozenset({"from_run", "qlayers", "qdim", "anchors"}),
    ),
    EncoderSpec(
        "semi",
        "second stage: a lookup table that starts from a run's answers, trained with its decoder",
        build=_semi,
        shown_images=False,
        second_stage=True,
        flags=VLT.flags | {"from_run"},
    ),
    EncoderSpec(
        "alternate",
        "decoder and encoder in turns: a table, then an encoder that has seen no particle, ...",
        build=_alternate,
        in_turns=True,
        defaults={"qdim": 256, "beta": "implied"},
        flags=frozenset(
            {
                "from_run",
                "qlayers",
                "qdim",
                "anchors",
                "rounds",
                "l_start",
                "table_lr",
                "table_lr_end",
            }
        ),
    ),
)
INPUTS = (
    InputSpec("particle", "the particle itself", _particle),
    InputSpec("twin", "another particle, by one fixed permutation", _twin),
    InputSpec("noise", "one fixed noise image per particle", _noise),
)
