"""Validate a run: plan, run what is not done yet, write what was found."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryodrgn_amort.core import InputError, cores, write_text
from cryodrgn_amort.runs import add_train_flags
from cryodrgn_amort.study.progress import commands_line
from cryodrgn_amort.study.runner import default_jobs, run_steps, work_locked
from cryodrgn_amort.study.snakefile import snakemake_rules
from cryodrgn_amort.study.validation.parts import do_part
from cryodrgn_amort.study.validation.plan import Validation
from cryodrgn_amort.study.validation.report import write_validation

if TYPE_CHECKING:
    from pathlib import Path

    from cryodrgn_amort.core import Registry
    from cryodrgn_amort.options import ValidateOptions
    from cryodrgn_amort.runs import Run
    from cryodrgn_amort.study.validation.verdict import Answer


__all__ = ["Validated", "validate_run"]


@dataclass(frozen=True)
class Validated:
    """What a validation says.

    Attributes
    ----------
    answers
        To each question that was asked.
    report
        The path of report.html; validation.json is beside it.
    """

    answers: list[Answer]
    report: Path

    def __str__(self) -> str:
        said = [f"{a.question} {a.said}\n    {a.because} {a.do}".rstrip() for a in self.answers]
        return "\n".join([*said, f"Report: {self.report}"])


def validate_run(run: Run, options: ValidateOptions, plugins: Registry) -> Validated | str:
    """Validate a run, from where an earlier call has stopped.

    Returns
    -------
    Validated or str
        With ``dry_run`` or ``part``, what is to be printed.

    Raises
    ------
    InputError
        If the run cannot be validated, the folder is another's, or a step failed.
    """
    parser = argparse.ArgumentParser(prog="train_amort")
    add_train_flags(parser, plugins)
    validation = Validation(run, options, plugins, parser)
    if options.part is not None:
        validation.prepare()
        do_part(validation, options.part)
        return f"{validation.part(options.part)}"
    validation.check()
    validation.folder.mkdir(parents=True, exist_ok=True)
    with work_locked(validation.folder, "validate_amort"):
        validation.prepare()
        work = validation.work()
        if options.dry_run == "shell":
            return "\n".join(commands_line(work))
        if options.dry_run:
            path = validation.folder / "Snakefile"
            write_text(path, snakemake_rules(work))
            return shlex.join(["snakemake", "-s", str(path), "--cores", str(cores())])
        print(validation.cost(work), flush=True)
        failed = run_steps(work, plugins.commands(), options.jobs or default_jobs())
        found = Validated(*write_validation(validation))
    if failed:
        raise InputError(f"{len(failed)} steps were not done: {'; '.join(failed)}")
    return found
