"""What a training run is made from: the flags of ``train_amort``, checked against each other."""

from __future__ import annotations

import math
import os
import random
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.decoding import PRECISIONS
from cryodrgn_amort.encoders import EncoderSpec
from cryodrgn_amort.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cryodrgn_amort.inputs import InputSpec
    from cryodrgn_amort.plugins import Plugins

__all__ = ["ON_NAN", "TrainSettings", "flag_name", "settings_from_flags"]

ON_NAN = ("stop", "skip", "rollback")
# Flags of train_vae that this version refuses, and what to say.
REFUSED = {
    "multigpu": "start one process per GPU instead, by torchrun",
    "use_real": "real-space encoders are not supported: networks are shown Hartley images",
}
_FLAG = {  # argument name -> flag, where the host's parser names them differently
    "qlayers": "--enc-layers",
    "qdim": "--enc-dim",
    "players": "--dec-layers",
    "pdim": "--dec-dim",
    "invert_data": "--uninvert-data",
    "window": "--no-window",
    "amp": "--no-amp",
    "do_analysis": "--no-analysis",
    "outdir": "-o",
    "particles": "PARTICLES",
    "from_run": "--from",
}


_WINDOW_EDGE = 0.99  # outer radius of the host's window
_PATHS = ("particles", "outdir", "poses", "ctf", "ind", "datadir", "from_run")
_OF_TILTS = (
    "ntilts", "random_tilts", "t_emb_dim", "tlayers", "tdim", "dose_per_tilt", "angle_per_tilt",
)  # fmt: skip


_OF_NETWORK = frozenset(
    {"qlayers", "qdim", "enc_mask", "encode_mode", "t_emb_dim", "tlayers", "tdim"}
)
"""Flags of the host that concern its network alone."""
_OF_POSES = ("pretrain", "emb_type", "pose_lr")


def _check_mode(mode: str) -> None:
    if mode == "conv":
        raise InputError(f"--encode-mode {mode}: {REFUSED['use_real']}")


def flag_name(dest: str) -> str:
    """Return the command-line flag of an argument name: ``qdim`` -> ``--enc-dim``."""
    return _FLAG.get(dest, "--" + dest.replace("_", "-"))


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides a training run. Names and defaults are those of ``train_vae``.

    Attributes
    ----------
    encoder
        Name of an encoder, or of an encoder input for the network ``encode_mode``.
    precision
        Of the decoder's matrix products: see ``matmul_precision``.
    lr_end
        What ``lr`` falls to by the last epoch, along half a cosine; None: it stays the same.
    from_run
        Run whose decoder is taken over.
    augment
        Train a network on copies of the particles, turned, and rolled by up to so many pixels;
        None: on the particles as they are.
    consistency
        With ``augment``: how much the posteriors of copy and particle are pulled together.
    holdout
        Particles that are not trained on: a fraction, or a file of their indices in the stack.
    emb_type
        What rotations are while they are refined. The host takes "s2s2" whatever its flag says.
    on_nan
        What to do when the loss of a batch is not a number, one of ``ON_NAN``.
    memory
        GB that preprocessed particles may take; None: half of what is free.
    ignored
        What to say of flags that were given and have no effect here.
    extra
        Flags that plugins added (hook ``train_args``; the lookup table's flags are such), by
        argument name; only those that were given.
    """

    particles: str
    outdir: str
    poses: str
    zdim: int
    ctf: str | None = None
    load: str | None = None
    overwrite: bool = False
    encoder: str = "resid"
    recipe: str | None = None
    do_analysis: bool = True
    checkpoint: int = 1
    log_interval: int = 1000
    verbose: bool = False
    seed: int = 0
    shuffle_seed: int | None = None
    ind: str | None = None
    invert_data: bool = True
    window: bool = True
    window_r: float = 0.85
    datadir: str | None = None
    lazy: bool = False
    shuffler_size: int = 0
    num_workers: int | None = None
    max_threads: int = 16
    num_epochs: int = 20
    batch_size: int = 16
    wd: float = 0.0
    lr: float = 1e-4
    lr_end: float | None = None
    beta: float | str | None = None
    beta_control: float | None = None
    norm: tuple[float, float] | None = None
    do_pose_sgd: bool = False
    pretrain: int = 1
    emb_type: str = "s2s2"
    pose_lr: float = 3e-4
    augment: int | None = None
    consistency: float = 0.0
    holdout: str | None = None
    from_run: str | None = None
    amp: bool = True
    precision: str | None = None
    on_nan: str = "stop"
    memory: float | None = None
    ntilts: int = 10
    random_tilts: bool = False
    dose_per_tilt: float | None = None
    angle_per_tilt: float = 3.0
    t_emb_dim: int = 64
    tlayers: int = 3
    tdim: int = 1024
    qlayers: int = 3
    qdim: int = 1024
    encode_mode: str = "resid"
    enc_mask: int | None = None
    players: int = 3
    pdim: int = 1024
    pe_type: str = "gaussian"
    feat_sigma: float = 0.5
    pe_dim: int | None = None
    domain: str = "fourier"
    activation: str = "relu"
    ignored: tuple[str, ...] = field(default=(), compare=False)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least_one = (
            "zdim", "num_epochs", "batch_size", "log_interval", "qdim", "players",
            "pdim", "pe_dim", "ntilts", "t_emb_dim", "tdim",
        )  # fmt: skip
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{flag_name(name)} {value}: must be at least 1")
        for name in ("lr", "pose_lr", "feat_sigma"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{flag_name(name)} {getattr(self, name)}: must be positive")
        if self.lr_end is not None and not 0 < self.lr_end < math.inf:
            raise InputError(f"--lr-end {self.lr_end}: must be positive")
        for name in (
            "qlayers", "wd", "seed", "shuffle_seed", "num_workers", "augment", "consistency",
            "shuffler_size", "dose_per_tilt", "angle_per_tilt", "tlayers", "pretrain", "checkpoint",
            "window_r",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**63:
                raise InputError(f"{flag_name(name)} {value}: must not be negative, nor huge")
        if self.window_r > _WINDOW_EDGE:
            raise InputError(f"--window-r {self.window_r}: at most {_WINDOW_EDGE}, where it ends")
        if self.beta_control is not None and not math.isfinite(self.beta_control):
            raise InputError(f"--beta-control {self.beta_control}: must be finite")
        if self.norm is not None and not (
            math.isfinite(self.norm[0]) and 0 < self.norm[1] < math.inf
        ):
            given = f"{self.norm[0]} {self.norm[1]}"
            raise InputError(f"--norm {given}: an offset and a positive scale are needed")
        if self.load and self.overwrite:
            raise InputError("--load and --overwrite exclude each other: continue or start anew")
        _check_mode(self.encode_mode)
        if self.pe_type == "none" and self.domain == "fourier":
            raise InputError("--pe-type none: the host's Fourier decoder cannot take it; give "
                             "--domain hartley or another encoding")  # fmt: skip
        if self.shuffler_size and not self.lazy:
            raise InputError(f"--shuffler-size {self.shuffler_size}: only with --lazy; otherwise "
                             "particles are preprocessed once")  # fmt: skip
        if self.shuffler_size and self.shuffler_size < 2 * self.batch_size:
            raise InputError(f"--shuffler-size {self.shuffler_size}: at least two batches are "
                             f"needed, {2 * self.batch_size} particles")  # fmt: skip
        if self.consistency and self.augment is None:
            raise InputError(f"--consistency {self.consistency}: needs copies, --augment")
        if self.precision not in (None, *PRECISIONS):
            raise InputError(f"--precision {self.precision}: not one of {', '.join(PRECISIONS)}")
        if self.on_nan not in ON_NAN:
            raise InputError(f"--on-nan {self.on_nan}: not one of {', '.join(ON_NAN)}")
        if self.memory is not None and not 0 < self.memory < math.inf:
            raise InputError(f"--memory {self.memory}: gigabytes are needed, above 0")
        if self.memory is not None and self.lazy:
            raise InputError("--memory and --lazy exclude each other: --lazy keeps nothing")
        self.beta_value()

    def is_checkpoint(self, epoch: int) -> bool:
        """Tell whether ``--checkpoint`` asks for one after an epoch; 0: after none."""
        return self.checkpoint > 0 and epoch % self.checkpoint == 0

    @property
    def tilted(self) -> bool:
        """Whether the particles are tilt series."""
        return self.encode_mode == "tilt"

    def matmul_precision(self, device: str) -> str:
        """Return the precision to use: single on CPUs; bfloat16 on GPUs, where --amp is on."""
        if self.precision is not None:
            return self.precision
        return "bf16" if device == "cuda" and self.amp else "fp32"

    def beta_value(self) -> float | str:
        """Return the KL weight: 1/zdim unless given; one of the host's schedules a-d by name."""
        if self.beta is None:
            return 1.0 / self.zdim
        try:
            beta = float(self.beta)
        except ValueError:
            if self.beta not in ("a", "b", "c", "d"):
                raise InputError(
                    f"--beta {self.beta}: neither a number nor a schedule of the host (a, b, c, d)"
                ) from None
            if self.beta_control is None:
                raise InputError(f"--beta {self.beta}: a schedule needs --beta-control") from None
            return self.beta
        if not 0 <= beta < math.inf:
            raise InputError(f"--beta {self.beta}: must not be negative, nor infinite")
        return beta

    def resolve(self, plugins: Plugins) -> tuple[EncoderSpec, InputSpec | None]:
        """Look up what ``--encoder`` names: the encoder, and what it is shown (None: nothing).

        Raises
        ------
        InputError
            If the name is unknown, or a flag was given that does not apply to it.
        """
        named = plugins.encoder(self.encoder)
        if not isinstance(named, EncoderSpec):
            return self._encoder_spec(plugins, self.encode_mode), named
        return named, plugins.encoder_input("particle") if named.shown_images else None

    @staticmethod
    def _encoder_spec(plugins: Plugins, name: str) -> EncoderSpec:
        spec = plugins.encoder(name)
        if not isinstance(spec, EncoderSpec) or spec.host_mode is None:
            raise InputError(f"--encode-mode {name}: not a network of the host")
        return spec

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python types, for config.yaml."""
        values = asdict(self)
        del values["ignored"]
        values["extra"] = dict(self.extra)
        if self.norm is not None:
            values["norm"] = [float(v) for v in self.norm]
        return values


def settings_from_flags(given: Mapping[str, Any], plugins: Plugins) -> TrainSettings:
    """Make settings from the flags that the user gave, and no others.

    Order: the flags given, over the recipe's, over the host's defaults.

    Raises
    ------
    InputError
        If a flag does not apply, by name.
    """
    for dest in given:
        if dest in REFUSED:
            raise InputError(f"{flag_name(dest)}: {REFUSED[dest]}")
    _check_mode(given.get("encode_mode", "resid"))
    values = dict(given)
    if values.get("recipe"):
        recipe = plugins.recipe(values["recipe"])
        if recipe.command != "train_amort":
            raise InputError(f"--recipe {recipe.name}: is nothing to train; study_amort runs it")
        for dest in recipe.parents:
            if dest not in given:
                raise InputError(f"--recipe {recipe.name}: needs {flag_name(dest)}")
        values = {**recipe.flags, **values}
    if "encode_mode" in given and "encoder" not in values:
        values["encoder"] = given["encode_mode"]
    for name in ("particles", "poses", "zdim"):
        if name not in values:
            raise InputError(f"{flag_name(name)}: required")
    tilted = values.get("encode_mode") == "tilt" or values.get("encoder") == "tilt"
    for dest in _OF_TILTS:
        if dest in given and not tilted:
            raise InputError(f"{flag_name(dest)}: is for tilt series, --encode-mode tilt")
    named = plugins.encoder(values.get("encoder", "resid"))
    if isinstance(named, EncoderSpec):
        if tilted and named.host_mode is not None and "encoder" not in given:
            named = plugins.encoder("tilt")  # of the host's networks, the one that can read them
            assert isinstance(named, EncoderSpec)
            values["encoder"] = named.name
        if tilted and named.sleeps and named.host_mode is None:
            raise InputError(
                f"--encoder {named.name}: learns from single images made up, and cannot read tilt "
                "series"
            )
        if named.second_stage and not values.get("from_run"):
            raise InputError(f"--encoder {named.name}: needs a finished run, --from RUN")
        if values.get("from_run"):
            values = {**named.defaults, **values}
    elif values.get("from_run"):
        raise InputError(f"--from: does not apply to --encoder {named.name}")
    if isinstance(named, EncoderSpec) and named.host_mode is not None:
        mode = values.setdefault("encode_mode", named.host_mode)
        if mode != named.host_mode:
            raise InputError(f"--encode-mode {mode}: contradicts --encoder {named.name}")
    values.setdefault("seed", random.SystemRandom().randrange(100_000))
    for name in _PATHS:
        if values.get(name):
            values[name] = os.path.abspath(values[name])
    if values.get("holdout") and os.path.exists(values["holdout"]):
        values["holdout"] = os.path.abspath(values["holdout"])
    own = {f.name for f in fields(TrainSettings)} - {"extra"}
    extra = {dest: values.pop(dest) for dest in list(values) if dest not in own}
    ignored = [*_without_effect(values, named)]
    settings = TrainSettings(**values, ignored=tuple(ignored), extra=extra)
    encoder, shown = settings.resolve(plugins)
    if settings.augment is not None:
        if settings.from_run:
            raise InputError("--augment: does not apply to --from, whose images are all new")
        if encoder.host_mode is None or shown is None or shown.name != "particle":
            raise InputError(f"--augment: does not apply to --encoder {settings.encoder}, only to "
                             "networks that are shown the particle")  # fmt: skip
        if settings.tilted:
            raise InputError("--augment: does not apply to tilt series")
    _check_poses(given, settings, shown)
    _refuse_foreign(given, settings.encoder, encoder, shown, plugins)
    return settings


def _without_effect(values: dict[str, Any], named: EncoderSpec | InputSpec) -> Iterator[str]:
    """Take out of the flags what has no effect here, and say so of each."""
    if values.get("num_workers") and not values.get("lazy"):
        yield (f"--num-workers {values.pop('num_workers')}: without effect but with --lazy; "
               "particles are preprocessed once")  # fmt: skip
    if values.get("do_pose_sgd") and values.get("emb_type", "s2s2") != "s2s2":
        yield (f"--emb-type {values.pop('emb_type')}: without effect, as in train_vae, which "
               "refines rotations as s2s2")  # fmt: skip
    if not isinstance(named, EncoderSpec) or named.host_mode is not None:
        return
    for dest in sorted(_OF_NETWORK - named.flags & values.keys()):
        if dest == "encode_mode" and values[dest] == "tilt":  # says what the particles are, too
            continue
        yield (f"{flag_name(dest)} {values.pop(dest)}: does not apply to --encoder {named.name}, "
               "ignored")  # fmt: skip


def _check_poses(
    given: Mapping[str, Any], settings: TrainSettings, shown: InputSpec | None
) -> None:
    """Refuse what poses cannot be refined with."""
    if not settings.do_pose_sgd:
        for dest in _OF_POSES:
            if dest in given:
                raise InputError(f"{flag_name(dest)}: needs --do-pose-sgd")
        return
    if settings.from_run:
        raise InputError("--do-pose-sgd: does not apply to --from")
    if settings.augment is not None:
        raise InputError(
            "--do-pose-sgd: does not apply to --augment, whose copies have other poses"
        )
    if shown is not None and shown.name != "particle":
        raise InputError(
            f"--do-pose-sgd: does not apply to --encoder {settings.encoder}, only to tables and to "
            "networks that are shown the particle"
        )


def _refuse_foreign(
    given: Mapping[str, Any],
    name: str,
    encoder: EncoderSpec,
    shown: InputSpec | None,
    plugins: Plugins,
) -> None:
    known = {**plugins.owned("encoders"), **plugins.owned("encoder_inputs")}
    owned = set().union(*(entry.item.flags for entry in known.values()))
    mine = encoder.flags | (shown.flags if shown is not None else frozenset())
    for dest in given:
        if encoder.host_mode is None and dest in _OF_NETWORK:  # said by _without_effect
            continue
        if dest in owned - mine:
            raise InputError(f"{flag_name(dest)}: does not apply to --encoder {name}")
