"""What a training run is made from: the flags of ``train_amort``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.core import InputError
from cryodrgn_amort.options.fields import HUGE, PRECISIONS, Options, flag, flags_of, of_host

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = ["REPLACED", "TrainSettings", "check_mode", "flag_name"]

_REAL_SPACE = "real-space encoders are not supported: networks are shown Hartley images"
# Flags of train_vae for which there is another way, and what to say.
REPLACED = {
    "multigpu": "one GPU is used here; for all, one process each: torchrun --nproc-per-node N "
    "-m cryodrgn_amort train_amort ...",
    "use_real": _REAL_SPACE,
}
_ENCODER = "Encoder (cryodrgn_amort)"
_SPEED = "Speed and memory (cryodrgn_amort)"
_WINDOW_EDGE = 0.99  # outer radius of the host's window


def check_mode(mode: str) -> None:
    """Refuse an ``--encode-mode`` that is not supported."""
    if mode == "conv":
        raise InputError(f"--encode-mode {mode}: {_REAL_SPACE}")


def flag_name(dest: str) -> str:
    """Return the command-line flag of an argument name: ``qdim`` -> ``--enc-dim``."""
    known = flags_of(TrainSettings).get(dest)
    return "--" + dest.replace("_", "-") if known is None else known.name


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Options):
    """Everything that decides a training run.

    What is a flag of ``train_vae`` has its name there, and no default here: ``host`` has it.

    Attributes
    ----------
    emb_type
        What rotations are while they are refined. The host takes "s2s2" whatever its flag says.
    ignored
        What to say of flags that were given and have no effect here.
    extra
        Flags that plugins added (hook ``train_args``; the lookup table's flags are such), by
        argument name; only those that were given.
    """

    particles: str = of_host("PARTICLES")
    outdir: str = of_host("-o")
    poses: str = of_host("--poses")
    zdim: int = of_host("--zdim", least=1)
    ctf: str | None = of_host("--ctf")
    load: str | None = of_host("--load")
    overwrite: bool = flag(
        "--overwrite", default=False, group=_ENCODER,
        help="Replace the run that is in the output folder",
    )  # fmt: skip
    encoder: str = flag(
        "--encoder", default="resid", group=_ENCODER, metavar="NAME",
        help="resid or mlp (networks of the host), vlt (lookup table), twin or noise (the network\n"
        "of --encode-mode, shown another particle or noise), or what a plugin brings;\n"
        "`cryodrgn amort_plugins` lists them",
    )  # fmt: skip
    recipe: str | None = flag(
        "--recipe", default=None, group=_ENCODER, metavar="NAME",
        help="Start from a named set of flags; flags that are given override it",
    )  # fmt: skip
    do_analysis: bool = of_host("--no-analysis")
    checkpoint: int = of_host("--checkpoint", least=0)
    log_interval: int = of_host("--log-interval", least=1)
    verbose: bool = of_host("--verbose")
    seed: int = of_host("--seed", least=0, most=HUGE)
    shuffle_seed: int | None = of_host("--shuffle-seed", least=0, most=HUGE)
    ind: str | None = of_host("--ind")
    invert_data: bool = of_host("--uninvert-data")
    window: bool = of_host("--no-window")
    window_r: float = of_host("--window-r", least=0)
    datadir: str | None = of_host("--datadir")
    lazy: bool = of_host("--lazy")
    shuffler_size: int = of_host("--shuffler-size", least=0)
    num_workers: int | None = of_host("--num-workers", least=0)
    max_threads: int = of_host("--max-threads")
    num_epochs: int = of_host("--num-epochs", least=1)
    batch_size: int = of_host("--batch-size", least=1)
    wd: float = of_host("--wd", least=0)
    lr: float = of_host("--lr", above=0)
    lr_end: float | None = flag(
        "--lr-end", default=None, above=0, group=_ENCODER,
        help="What --lr falls to by the last epoch, along half a cosine (default: it stays the\n"
        "same; with --from 2e-5)",
    )  # fmt: skip
    beta: float | str | None = of_host("--beta")
    beta_control: float | None = of_host("--beta-control")
    norm: tuple[float, float] | None = of_host("--norm")
    do_pose_sgd: bool = of_host("--do-pose-sgd")
    pretrain: int = of_host("--pretrain", least=0)
    emb_type: str = of_host("--emb-type", default="s2s2")
    pose_lr: float = of_host("--pose-lr", above=0)
    augment: int | None = flag(
        "--augment", default=None, least=0, group=_ENCODER, nargs="?", const=1, metavar="PX",
        help="Train a network on copies of the particles, turned by random angles and rolled by\n"
        "up to PX pixels; poses follow (PX: 1 unless given)",
    )  # fmt: skip
    consistency: float = flag(
        "--consistency", default=0.0, least=0, group=_ENCODER, metavar="WEIGHT",
        help="With --augment: pull the posteriors of copy and particle together, with so many\n"
        "times the weight of the KL divergence",
    )  # fmt: skip
    holdout: str | None = flag(
        "--holdout", default=None, group=_ENCODER, metavar="FRACTION|PKL",
        help="Particles to keep out of the training, to judge the encoder by: a fraction of them,\n"
        "drawn by --seed, or a pickle of their indices in the stack. RUN/ind_heldout.pkl says\n"
        "which; eval_amort uses them",
    )  # fmt: skip
    from_run: str | None = flag(
        "--from", default=None, group=_ENCODER, metavar="RUN",
        help="Second stage: keep the decoder of a finished run, and train an encoder (resid, mlp,\n"
        "sleep, anchored) on images made up by it; semi trains on with a table, alternate with\n"
        "decoder and encoder in turns. Particles and all else are that run's unless given",
    )  # fmt: skip
    amp: bool = of_host("--no-amp")
    precision: str | None = flag(
        "--precision", default=None, choices=PRECISIONS, group=_SPEED,
        metavar="|".join(PRECISIONS),
        help="Of the decoder's matrix products; coordinates, losses, sums, tables and optimizers\n"
        "keep at least fp32. tf32 is for GPUs, elsewhere it is fp32 (default: fp32 on CPUs, and\n"
        "with --no-amp; on GPUs bf16, or fp16 where a card has no fast bf16)",
    )  # fmt: skip
    on_nan: str = flag(
        "--on-nan", default="stop", choices=("stop", "skip", "rollback"), group=_ENCODER,
        metavar="stop|skip|rollback",
        help="When the loss of a batch is not a number: stop before it; leave the batch out; or\n"
        "go back to the last checkpoint with half the --lr, five times at most",
    )  # fmt: skip
    memory: float | None = flag(
        "--memory", default=None, above=0, wanted="gigabytes are needed, above 0", group=_SPEED,
        metavar="GB",
        help="How much preprocessed particles may take in each process, of a GPU's memory and of\n"
        "the machine's: on the GPU if they fit, else in memory, in fp32 or else in fp16, else\n"
        "from a temporary file beside the run (default: half of what is free of either)",
    )  # fmt: skip
    graph: bool = flag(
        "--no-graph", default=True, group=_SPEED,
        help="On a GPU: do not record a step to replay it (CUDA graph), but launch each anew",
    )  # fmt: skip
    ntilts: int = of_host("--ntilts", least=1)
    random_tilts: bool = of_host("--random-tilts")
    dose_per_tilt: float | None = of_host("--dose-per-tilt", least=0)
    angle_per_tilt: float = of_host("--angle-per-tilt", least=0)
    t_emb_dim: int = of_host("--t-emb-dim", least=1)
    tlayers: int = of_host("--tlayers", least=0)
    tdim: int = of_host("--tdim", least=1)
    qlayers: int = of_host("--enc-layers", least=0)
    qdim: int = of_host("--enc-dim", least=1)
    encode_mode: str = of_host("--encode-mode")
    enc_mask: int | None = of_host("--enc-mask")
    players: int = of_host("--dec-layers", least=1)
    pdim: int = of_host("--dec-dim", least=1)
    pe_type: str = of_host("--pe-type")
    feat_sigma: float = of_host("--feat-sigma", above=0)
    pe_dim: int | None = of_host("--pe-dim", least=1)
    domain: str = of_host("--domain")
    activation: str = of_host("--activation")
    ignored: tuple[str, ...] = field(default=(), compare=False)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
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
        check_mode(self.encode_mode)
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

    def matmul_precision(self, half: str | None) -> str:
        """Return the precision to use: single, but where --amp is on the half that a GPU has.

        Parameters
        ----------
        half
            As ``half_precision`` says: "bf16" or "fp16"; None: on a CPU.
        """
        if self.precision is not None:
            return self.precision
        return half if half is not None and self.amp else "fp32"

    def beta_value(self) -> float | str:
        """Return the KL weight: 1/zdim unless given; "implied", or a schedule of the host, a-d."""
        if self.beta is None:
            return 1.0 / self.zdim
        try:
            beta = float(self.beta)
        except ValueError:
            if self.beta == "implied":
                if self.beta_control is not None:
                    raise InputError(
                        "--beta implied and --beta-control exclude each other"
                    ) from None
                return self.beta
            if self.beta not in ("a", "b", "c", "d"):
                raise InputError(
                    f"--beta {self.beta}: neither a number, nor implied, nor a schedule of "
                    "the host (a, b, c, d)"
                ) from None
            if self.beta_control is None:
                raise InputError(f"--beta {self.beta}: a schedule needs --beta-control") from None
            return self.beta
        if not 0 <= beta < math.inf:
            raise InputError(f"--beta {self.beta}: must not be negative, nor infinite")
        return beta

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python types, for config.yaml."""
        values = asdict(self)
        del values["ignored"]
        values["extra"] = dict(self.extra)
        if self.norm is not None:
            values["norm"] = [float(v) for v in self.norm]
        return values
