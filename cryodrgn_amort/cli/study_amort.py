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

# The same as rules of Snakemake, for a cluster
$ cryodrgn study_amort -o study --dry-run snakemake
$ snakemake -s study/Snakefile --executor slurm --jobs 20

"""

from __future__ import annotations

import argparse
from pathlib import Path

from cryodrgn_amort.options import StudyOptions, add_flags


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``StudyOptions``."""
    add_flags(parser, StudyOptions)


def main(args: argparse.Namespace) -> None:
    """Plan, run, report."""
    import importlib
    import shlex

    from cryodrgn_amort.core import InputError, cores, write_text
    from cryodrgn_amort.options import REPAIR
    from cryodrgn_amort.plugins import load_plugins
    from cryodrgn_amort.study import (
        COMMANDS,
        changed_plan,
        check_inputs,
        claims_table,
        commands_line,
        default_jobs,
        load_plan,
        read_study,
        run_steps,
        snakemake_rules,
        work_locked,
        work_of,
        write_plan,
        write_study_report,
    )

    options = StudyOptions.of(args)
    folder = Path(options.outdir)
    plugins = load_plugins()
    commands = plugins.commands()
    parsers = {}
    for name in COMMANDS:
        parsers[name] = argparse.ArgumentParser(prog=name)
        importlib.import_module(commands[name].module).add_args(parsers[name])
    more = [recipe.name for recipe in REPAIR] if options.repair else []
    text = changed_plan(folder, options.preset, options.data(), options.seeds, more)
    plan = load_plan(folder, text, plugins, parsers)
    part = work_of(plan.only(options.only) if options.only else plan)
    folder.mkdir(parents=True, exist_ok=True)
    with work_locked(folder, "study_amort"):
        write_plan(folder, text)
        if options.dry_run == "shell":
            print("\n".join(commands_line(part)))
            return
        if options.dry_run:
            path = folder / "Snakefile"
            write_text(path, snakemake_rules(part))
            print(shlex.join(["snakemake", "-s", str(path), "--cores", str(cores())]))
            return
        check_inputs(plan, part)
        failed = run_steps(part, commands, options.jobs or default_jobs())
        study = read_study(plan)
        report = write_study_report(study)
    print(claims_table(study))
    print(f"Report: {report}")
    if failed:
        raise InputError(f"{len(failed)} steps were not done: {'; '.join(failed)}")
