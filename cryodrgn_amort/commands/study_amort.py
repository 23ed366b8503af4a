"""Run a whole study: every experiment of Edelberg & Lederman, every figure, one report.

A study is a folder with a plan (plan.yaml): the particles, yours or simulated, the recipes, the
seeds and all flags. Every recipe is trained and evaluated, runs are compared, and all of it ends in
report.html, figures/ and study.json. A study that was killed goes on where it stopped; if you edit
the plan, only what depends on the change is run anew.

Example usage
-------------
# On simulated particles of 32 pixels: minutes on two cores
$ cryodrgn study_amort --preset demo -o demo

# On your particles with the paper's settings, and three seeds for the spread
$ cryodrgn study_amort particles.128.mrcs --poses pose.pkl --ctf ctf.pkl --seeds 0 1 2 -o study

# And encoders that are to generalise to particles never seen
$ cryodrgn study_amort --preset demo --repair -o demo

# Some of the recipes only, and those that they need
$ cryodrgn study_amort -o study --only vlt twin-large

# The plan and the commands, one line each, for a scheduler; then this to make the report
$ cryodrgn study_amort particles.128.mrcs --poses pose.pkl --ctf ctf.pkl -o study --dry-run
$ cryodrgn study_amort -o study

"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

_DATA = ("particles", "poses", "ctf", "ind", "datadir", "labels", "coordinate", "truth")


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add our flags."""

    def path(text: str) -> str:
        return os.path.abspath(text)

    parser.add_argument("-o", "--outdir", required=True, metavar="STUDY", help="Its folder")
    group = parser.add_argument_group("A new study, or a change of its plan")
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="demo (minutes on two cores), paper (its settings), or a plan of your own (.yaml)\n"
        "(default: paper with particles, demo without)",
    )
    group.add_argument("--seeds", type=int, nargs="+", metavar="N", help="Seeds of every recipe "
                       "(default: 0)")  # fmt: skip
    group.add_argument("--repair", action="store_true", help="Also train encoders that are to "
                       "generalise, and put them\nbeside the others")  # fmt: skip
    group.add_argument("particles", type=path, nargs="?", metavar="PARTICLES", help="Particles "
                       "(.mrcs, .star, .cs, .txt); simulated ones without")  # fmt: skip
    for flag, metavar, text in (
        ("--poses", "PKL", "Poses"),
        ("--ctf", "PKL", "CTF parameters"),
        ("--ind", "PKL", "Indices of the particles to use"),
        ("--datadir", "DIR", "Path prefix of the files in a .star or .cs file"),
        ("--labels", "PKL", "A class for each particle, if known"),
        ("--coordinate", "PKL", "A number for each particle, if known"),
        ("--truth", "DIR", "Folder of simulate_amort that the particles are of"),
    ):
        group.add_argument(flag, type=path, metavar=metavar, help=text)
    group = parser.add_argument_group("This call")
    group.add_argument("--only", nargs="+", metavar="RECIPE", help="Run these and what they need; "
                       "the report shows all that is done")  # fmt: skip
    group.add_argument("--jobs", type=int, metavar="N", help="Steps at a time (default: 1 on GPUs, "
                       "else one per core, at most 4)")  # fmt: skip
    group.add_argument("--dry-run", action="store_true", help="Write the plan, print the commands, "
                       "run nothing")  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Plan, run, report."""
    import importlib

    from cryodrgn_amort.errors import InputError
    from cryodrgn_amort.plan import COMMANDS
    from cryodrgn_amort.planfile import changed_plan, load_plan, write_plan
    from cryodrgn_amort.plugins import load_plugins
    from cryodrgn_amort.recipes import REPAIR
    from cryodrgn_amort.study import adopt, commands_line, default_jobs, locked, run_steps
    from cryodrgn_amort.study_report import summary, write_report
    from cryodrgn_amort.study_results import read_study

    if args.jobs is not None and args.jobs < 1:
        raise InputError(f"--jobs {args.jobs}: must be at least 1")
    folder = Path(args.outdir)
    plugins = load_plugins()
    commands = plugins.commands()
    parsers = {}
    for name in COMMANDS:
        parsers[name] = argparse.ArgumentParser(prog=name)
        importlib.import_module(commands[name].module).add_args(parsers[name])
    data = {name: getattr(args, name) for name in _DATA if getattr(args, name)}
    more = [recipe.name for recipe in REPAIR] if args.repair else []
    text = changed_plan(folder, args.preset, data, args.seeds, more)
    plan = load_plan(folder, text, plugins, parsers)
    part = plan.only(args.only) if args.only else plan
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        write_plan(folder, text)
        adopt(plan)
        if args.dry_run:
            print("\n".join(commands_line(part)))
            return
        failed = run_steps(part, commands, args.jobs or default_jobs())
        study = read_study(plan)
        report = write_report(study)
    print(summary(study))
    print(f"Report: {report}")
    if failed:
        raise InputError(f"{len(failed)} steps were not done: {'; '.join(failed)}")
