"""What ``eval_amort`` is asked to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.options.fields import Options, flag, of_run_precision

if TYPE_CHECKING:
    import numpy as np

__all__ = ["EvalOptions"]

_KNOWN = "What is known of the particles"
_MUCH = "How much is measured"
_MOVED = "Inputs of the run, if they have moved"


@dataclass(frozen=True)
class EvalOptions(Options):
    """What ``eval_amort`` is asked to do. Labels and coordinate may be arrays, `(N,)`."""

    transforms: tuple[str, ...] = flag(
        "--transform", default=("roll:1", "rotate:90"), nargs="*", metavar="NAME",
        help="Changes of the image, NAME or NAME:ARGUMENT; `cryodrgn amort_plugins` lists them;\n"
        "none if nothing follows",
    )  # fmt: skip
    labels: str | np.ndarray | None = flag(
        "--labels", default=None, group=_KNOWN, metavar="PKL", help="A class for each particle"
    )
    coordinate: str | np.ndarray | None = flag(
        "--coordinate", default=None, group=_KNOWN, metavar="PKL", help="A number for each particle"
    )
    truth: str | None = flag(
        "--truth", default=None, group=_KNOWN, metavar="DIR",
        help="The output folder of simulate_amort that the particles are from; has labels and\n"
        "coordinate, too",
    )  # fmt: skip
    sample: int = flag(
        "--sample", default=1000, least=2, group=_MUCH, metavar="N",
        help="Particles for reconstruction losses and true neighbours",
    )  # fmt: skip
    volumes: int = flag(
        "--volumes", default=30, least=2, group=_MUCH, metavar="N",
        help="Particles whose volumes are compared",
    )  # fmt: skip
    truth_volumes: int = flag(
        "--truth-volumes", default=200, least=2, group=_MUCH, metavar="N",
        help="Particles whose volumes are compared with the true ones",
    )  # fmt: skip
    fit: int = flag(
        "--fit", default=64, least=0, group=_MUCH, metavar="N",
        help="Particles whose posteriors are fitted one by one, to see what the encoder\n"
        "loses; as many of those that train_amort --holdout kept out",
    )  # fmt: skip
    maps: int = flag(
        "--maps", default=2, least=0, group=_MUCH, metavar="N",
        help="Copies of the first so many transforms are shown, with their volumes",
    )  # fmt: skip
    labelled: int = flag(
        "--labelled", default=10, least=1, group=_MUCH, metavar="N",
        help="The first so many particles are shown by number, with their volumes",
    )  # fmt: skip
    bootstrap: int = flag(
        "--bootstrap", default=500, least=0, group=_MUCH, metavar="N",
        help="Rounds for the 95 %% intervals",
    )  # fmt: skip
    batch_size: int = flag(
        "--batch-size", default=256, least=1, group=_MUCH, metavar="N",
        help="Images that are encoded at once",
    )  # fmt: skip
    precision: str | None = of_run_precision(_MUCH)
    seed: int = flag(
        "--seed", default=0, least=0, group=_MUCH, metavar="N",
        help="Seed of samples, intervals and UMAP",
    )  # fmt: skip
    umap: bool = flag("--no-umap", default=True, group=_MUCH, help="Show principal components only")
    particles: str | None = flag(
        "--particles", default=None, group=_MOVED, metavar="FILE",
        help="Particle stack (.mrcs, .star, .cs, .txt)",
    )  # fmt: skip
    poses: str | None = flag("--poses", default=None, group=_MOVED, metavar="PKL", help="Poses")
    ctf: str | None = flag(
        "--ctf", default=None, group=_MOVED, metavar="PKL", help="CTF parameters"
    )
    ind: str | None = flag(
        "--ind", default=None, group=_MOVED, metavar="PKL",
        help="Indices of the particles that were used",
    )  # fmt: skip
    datadir: str | None = flag(
        "--datadir", default=None, group=_MOVED, metavar="DIR",
        help="Path prefix of the files in a .star or .cs file",
    )  # fmt: skip
    dose_per_tilt: float | None = flag(
        "-d", "--dose-per-tilt", default=None, group=_MOVED, metavar="DOSE",
        help="Of tilt series: as in training. Runs of train_vae do not tell",
    )  # fmt: skip
    angle_per_tilt: float | None = flag(
        "-a", "--angle-per-tilt", default=None, group=_MOVED, metavar="DEG", help="The same"
    )

    def facts(self) -> dict[str, Any]:
        """Return the options for files to keep: of arrays that were given, only how many values."""
        return {
            name: value if (size := getattr(value, "size", None)) is None else f"{size} values"
            for name, value in asdict(self).items()
        }
