"""What ``infer_amort`` is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cryodrgn_amort.core import InputError
from cryodrgn_amort.options.fields import Options, flag, of_run_precision

__all__ = ["InferOptions"]

_WHICH = "Which particles"
_HOW = "How they are fitted"
STARTS = {
    "encoder": "its answer, or\nthe row of the table",
    "anchors": "latents of others, weighted by how well they explain\nthe particle",
    "mean": "of all latents",
    "prior": "zero",
}


@dataclass(frozen=True)
class InferOptions(Options):
    """What ``infer_amort`` is asked to do.

    Without ``particles``, the other inputs are new places of the run's own. ``starts`` None: the
    encoder's answer, where it has one, and "anchors". ``steps`` None: 400; but of more than 500
    particles, with ``starts`` None as well, 30 from "anchors" alone.
    """

    particles: str | None = flag(
        "particles", default=None, nargs="?", metavar="PARTICLES",
        help="New particles (.mrcs, .star, .cs, .txt); without them, the run's own",
    )  # fmt: skip
    overwrite: bool = flag("--overwrite", default=False, help="Replace the latents that are in OUT")
    held_out: bool = flag(
        "--held-out", default=False, group=_WHICH, help="Those that train_amort --holdout kept out"
    )
    poses: str | None = flag(
        "--poses", default=None, group=_WHICH, metavar="PKL", help="Poses of PARTICLES"
    )
    ctf: str | None = flag(
        "--ctf", default=None, group=_WHICH, metavar="PKL", help="CTF parameters of PARTICLES"
    )
    ind: str | None = flag(
        "--ind", default=None, group=_WHICH, metavar="PKL",
        help="Those of PARTICLES that are wanted; without PARTICLES, the file that RUN was\n"
        "trained with, if it has moved",
    )  # fmt: skip
    datadir: str | None = flag(
        "--datadir", default=None, group=_WHICH, metavar="DIR",
        help="Path prefix of the files in a .star or .cs file",
    )  # fmt: skip
    dose_per_tilt: float | None = flag(
        "-d", "--dose-per-tilt", default=None, group=_WHICH, metavar="DOSE",
        help="Of tilt series: as in training. Runs of train_vae do not tell",
    )  # fmt: skip
    angle_per_tilt: float | None = flag(
        "-a", "--angle-per-tilt", default=None, group=_WHICH, metavar="DEG", help="The same"
    )
    starts: tuple[str, ...] | None = flag(
        "--start", default=None, group=_HOW, nargs="+", metavar="NAME", choices=tuple(STARTS),
        help="Where fits start; the best result of each particle is kept. "
        + "; ".join(f"{name}: {text}" for name, text in STARTS.items())
        + " (default: encoder anchors, or anchors\nalone where there is no answer)",
    )  # fmt: skip
    beta: str = flag(
        "--beta", default="train", group=_HOW, metavar="train|implied|BETA",
        help="Weight of the KL divergence: that of the training, the one that the noise in the\n"
        "images implies, or a number",
    )  # fmt: skip
    steps: int | None = flag(
        "--steps", default=None, least=0, group=_HOW, metavar="N",
        help="At most so many steps per particle and start; 0: the starts as they are (default:\n"
        "400; but of more than 500 particles, unless --start is given, 30 from the anchors\n"
        "alone: what these lack, and how long either takes, is said at the start)",
    )  # fmt: skip
    batch_size: int = flag(
        "--batch-size", default=256, least=1, group=_HOW, metavar="N",
        help="Particles that are fitted at once",
    )  # fmt: skip
    precision: str | None = of_run_precision(_HOW)
    seed: int = flag(
        "--seed", default=0, least=0, most=2**31 - 1, wanted="must not be negative, nor huge",
        group=_HOW, metavar="N", help="Seed of the noise",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta not in ("train", "implied"):
            try:
                usable = 0 <= float(self.beta) < math.inf
            except ValueError:
                usable = False
            if not usable:
                raise InputError(f'--beta {self.beta}: "train", "implied" or a number is needed')
        if self.particles and not self.poses:
            raise InputError(f"PARTICLES {self.particles}: need their --poses")
        if self.particles and self.held_out:
            raise InputError("--held-out: is about the run's own particles, PARTICLES are new")
