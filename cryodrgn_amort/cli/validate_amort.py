"""Is it in the particles? A verdict on a run of your own, without any truth.

Trains halves of the particles with RUN's settings, and a half of particles that are like them but
have no heterogeneity; asks what each decoder explains of particles that it has not seen. Ends in
report.html: is there heterogeneity, was it trained for long enough, are the poses right, which
particles are not explained. A call that was killed goes on where it stopped.

Example usage
-------------
$ cryodrgn validate_amort outs/vlt -o outs/vlt-valid

# Train nothing: poses and misfits by RUN's own decoder
$ cryodrgn validate_amort outs/vlt -o outs/vlt-quick --quick

# The commands, for a scheduler; then the first call makes the report
$ cryodrgn validate_amort outs/vlt -o outs/vlt-valid --dry-run

"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cryodrgn_amort.options import ValidateOptions, add_flags

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryodrgn_amort.core import CommandSpec


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``ValidateOptions``."""
    add_flags(parser, ValidateOptions)


def main(args: argparse.Namespace) -> None:
    """Plan, run, report."""
    import os
    import shlex

    from cryodrgn_amort.core import InputError, write_text
    from cryodrgn_amort.plugins import load_plugins
    from cryodrgn_amort.runs import load_run
    from cryodrgn_amort.study import (
        commands_line,
        default_jobs,
        run_steps,
        snakemake_rules,
        work_locked as locked,
    )
    from cryodrgn_amort.study.validation import Validation, do_part, write_validation

    options, plugins = ValidateOptions.of(args), load_plugins()
    parsers = _parsers(plugins.commands())
    run = load_run(options.run, plugins)
    validation = Validation(run, options, plugins, parsers["train_amort"])
    if options.part is not None:
        validation.prepare()
        do_part(validation, options.part)
        return
    validation.check()
    validation.folder.mkdir(parents=True, exist_ok=True)
    with locked(validation.folder, "validate_amort"):
        validation.prepare()
        work = validation.work(parsers)
        if options.dry_run == "shell":
            print("\n".join(commands_line(work)))
            return
        if options.dry_run:
            path = validation.folder / "Snakefile"
            write_text(path, snakemake_rules(work))
            print(shlex.join(["snakemake", "-s", str(path), "--cores", str(os.cpu_count())]))
            return
        print(validation.cost(work))
        failed = run_steps(work, plugins.commands(), options.jobs or default_jobs())
        said, report = write_validation(validation)
    print(said)
    print(f"Report: {report}")
    if failed:
        raise InputError(f"{len(failed)} steps were not done: {'; '.join(failed)}")


def _parsers(commands: Mapping[str, CommandSpec]) -> dict[str, argparse.ArgumentParser]:
    import importlib

    found = {}
    for name in ("train_amort", "simulate_amort", "validate_amort"):
        found[name] = argparse.ArgumentParser(prog=name)
        importlib.import_module(commands[name].module).add_args(found[name])
    return found
