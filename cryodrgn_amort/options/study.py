"""What ``study_amort`` and ``scores_amort`` are asked to do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from cryodrgn_amort.options.fields import Options, flag

__all__ = ["NOW", "ScoresOptions", "StudyOptions", "dry_run_flag", "jobs_flag"]

_NEW, NOW = "A new study, or a change of its plan", "This call"


def jobs_flag() -> int | None:
    """Declare ``--jobs`` of a command that runs steps."""
    found: int | None = flag(
        "--jobs", default=None, least=1, group=NOW, metavar="N",
        help="Steps at a time (default: 1 on GPUs, else one per core, at most 4)",
    )  # fmt: skip
    return found


def dry_run_flag(instead: str, folder: str) -> str | None:
    """Declare ``--dry-run`` of a command that runs steps: what it does instead, and where."""
    found: str | None = flag(
        "--dry-run", default=None, choices=("shell", "snakemake"), group=NOW, nargs="?",
        const="shell", metavar="shell|snakemake",
        help=f"{instead}; print the commands for a shell, or write them as\n"
        f"{folder}/Snakefile (default: shell)",
    )  # fmt: skip
    return found


def _data(*names: str, metavar: str, help: str, **more: Any) -> str | None:
    """Declare an input of the particles, a path."""
    found: str | None = flag(*names, default=None, group=_NEW, metavar=metavar, help=help, **more)
    return found


@dataclass(frozen=True)
class StudyOptions(Options):
    """What ``study_amort`` is asked to do."""

    outdir: str = flag("-o", "--outdir", metavar="STUDY", help="Its folder")
    preset: str | None = flag(
        "--preset", default=None, group=_NEW, metavar="NAME",
        help="demo (minutes on two cores), real (at the signal of real particles, an hour), paper\n"
        "(its settings), or a plan of your own (.yaml)\n"
        "(default: paper with particles, demo without)",
    )  # fmt: skip
    seeds: tuple[int, ...] | None = flag(
        "--seeds", default=None, group=_NEW, nargs="+", metavar="N",
        help="Seeds of every recipe (default: 0)",
    )  # fmt: skip
    repair: bool = flag(
        "--repair", default=False, group=_NEW,
        help="Also train encoders that are to generalise, and put them\nbeside the others",
    )  # fmt: skip
    particles: str | None = _data(
        "particles", nargs="?", metavar="PARTICLES",
        help="Particles (.mrcs, .star, .cs, .txt); simulated ones without",
    )  # fmt: skip
    poses: str | None = _data("--poses", metavar="PKL", help="Poses")
    ctf: str | None = _data("--ctf", metavar="PKL", help="CTF parameters")
    ind: str | None = _data("--ind", metavar="PKL", help="Indices of the particles to use")
    datadir: str | None = _data(
        "--datadir", metavar="DIR", help="Path prefix of the files in a .star or .cs file"
    )
    labels: str | None = _data(
        "--labels", metavar="PKL", help="A class for each particle, if known"
    )
    coordinate: str | None = _data(
        "--coordinate", metavar="PKL", help="A number for each particle, if known"
    )
    truth: str | None = _data(
        "--truth", metavar="DIR", help="Folder of simulate_amort that the particles are of"
    )
    only: tuple[str, ...] | None = flag(
        "--only", default=None, group=NOW, nargs="+", metavar="RECIPE",
        help="Run these and what they need; the report shows all that is done",
    )  # fmt: skip
    jobs: int | None = jobs_flag()
    dry_run: str | None = dry_run_flag("Write the plan, run nothing", "STUDY")

    def data(self) -> dict[str, str]:
        """Return absolute paths of the inputs of the particles that were given, by flag."""
        names = ("particles", "poses", "ctf", "ind", "datadir", "labels", "coordinate", "truth")
        given = {name: getattr(self, name) for name in names}
        return {name: os.path.abspath(path) for name, path in given.items() if path}


@dataclass(frozen=True)
class ScoresOptions(Options):
    """What ``scores_amort`` is asked to do."""

    eval: str = flag("eval", metavar="EVAL", help="Folder of eval_amort, or RUN: its latest one")
    particles: str = flag(
        "particles", metavar="PARTICLES",
        help="Particles of the stack that was trained on, in its order (.star, .cs)",
    )  # fmt: skip
    output: str = flag("-o", "--output", metavar="OUT", help="The copy")
    columns: tuple[str, ...] | None = flag(
        "--columns", default=None, nargs="+", metavar="NAME",
        help="Columns of EVAL/trust.csv (default: all that are known of any particle)",
    )  # fmt: skip
    labels: tuple[str, ...] = flag(
        "--as", default=(), nargs="+", metavar="LABEL=NAME",
        help="Also write a column under a label of your own",
    )  # fmt: skip
    ind: str | None = flag(
        "--ind", default=None, metavar="PKL",
        help="Copy these particles only (positions in the stack)",
    )  # fmt: skip
