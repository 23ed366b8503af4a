"""The steps of a study as rules of Snakemake, for clusters.

Köster & Rahmann, Snakemake - a scalable bioinformatics workflow engine, Bioinformatics 28, 2520
(2012). The marks in ``steps/`` are what rules make and need, so that the study knows of what
Snakemake did, and Snakemake of what the study did.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import shlex
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cryodrgn_amort.core import InputError, default_device, device_name, on_gpu
from cryodrgn_amort.data import load_particles
from cryodrgn_amort.runs import settings_from_flags, source_of
from cryodrgn_amort.study.progress import Progress
from cryodrgn_amort.study.steps import parse
from cryodrgn_amort.training import Trainer, endless_steps

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cryodrgn_amort.core import Registry
    from cryodrgn_amort.options import TrainSettings
    from cryodrgn_amort.study.steps import Step, Work


__all__ = ["measured_seconds", "snakemake_rules"]

_TIMED = 4  # batches, after as many that are not
_SPARE = 2.0  # times what was measured
_BASE_MB, _BYTES = 4000, 12  # of a process; of a pixel: preprocessed, its CTF, while it is read
_LIGHT = ("simulate_amort", "compare_amort")

_HEAD = """\
# {count} steps in {folder}, by `cryodrgn {command} --dry-run snakemake`:
#
#     snakemake -s {path} --cores 2                        # here
#     snakemake -s {path} --executor slurm --jobs 20       # with snakemake-executor-plugin-slurm
#
# A training that was killed goes on from its last checkpoint if this file is made anew before.
# {measured}

GPU = int(config.get("gpu", {gpu}))  # --config gpu=0: none


rule all:
    default_target: True
    input: {report}


rule report:
    input: {marks}
    output: {report}
    resources: mem_mb={base}, runtime=60
    shell: {study}
"""
_RULE = """

rule {name}:
    input: {before}
    output: {mark}
    log: {log}
    threads: 2
    resources: mem_mb={memory}, runtime={minutes}, gpu={gpu}
    shell: {line}
"""


def snakemake_rules(work: Work) -> str:
    """Return a Snakefile of what is still to be done, and mark that as planned.

    Each training is timed on a few batches of the particles, here, if these are there.

    Raises
    ------
    InputError
        If the folder has braces in its name, which are wildcards to Snakemake.
    """
    if set("{}") & set(str(work.folder)):
        raise InputError(f"-o {work.folder}: braces are wildcards to Snakemake; it needs a folder "
                         "without them")  # fmt: skip
    progress = Progress(work)
    needs = _Needs(work)
    rules = []
    for step, stamp in progress.plan_rest():
        memory, minutes = needs.of(step)
        rules.append(
            _RULE.format(
                name=re.sub(r"\W", "_", step.name),
                before=_marks(work, step.after),
                mark=repr(str(stamp.done)),
                log=repr(str(work.layout.log(step.name))),
                memory=memory,
                minutes=minutes,
                gpu=0 if step.argv[0] in _LIGHT else "GPU",
                line=_literal(step.shell, " > {log:q} 2>&1 && ", stamp.shell),
            )
        )
    path, report = work.folder / "Snakefile", work.folder / "report.html"
    head = _HEAD.format(
        count=len(rules),
        folder=work.folder,
        command=work.report[0],
        path=path,
        measured=needs.said,
        gpu=int(on_gpu(default_device())),
        report=repr(str(report)),
        marks=_marks(work, progress.steps),
        base=_BASE_MB,
        study=_literal(shlex.join(["cryodrgn", *work.report])),
    )
    return head + "".join(rules)


def _literal(text: str, between: str = "", more: str = "") -> str:
    """Write a line for a shell for Snakemake: braces are doubled, but for those ``between``."""
    before, after = (t.replace("{", "{{").replace("}", "}}") for t in (text, more))
    return repr(before + between + after)


def _marks(work: Work, steps: Iterable[str]) -> str:
    """Return the files that say that steps are done, as a rule needs them."""
    return ", ".join(repr(str(work.layout.stamp(name, "json"))) for name in steps)


class _Needs:
    """Memory and time of steps: of trainings measured, of others in proportion to theirs.

    Attributes
    ----------
    said
        Where the times are from.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._known: dict[str, tuple[int, int]] = {}
        self._measured: dict[str, tuple[int, int]] = {}
        here = device_name(default_device())
        measured = f"Times are {_SPARE:g} times what was measured by a few batches on {here}."
        unknown = "Times are guesses: the particles are not there yet."
        self.said = unknown if "simulate" in work.steps else measured

    def of(self, step: Step) -> tuple[int, int]:
        """Return MB and minutes of a step."""
        if step.name not in self._known:
            self._known[step.name] = self._find(step)
        return self._known[step.name]

    def _find(self, step: Step) -> tuple[int, int]:
        before = [self.of(self._work.steps[name]) for name in step.after]
        memory = max((m for m, _ in before), default=_BASE_MB)
        usual = memory, max((minutes for _, minutes in before), default=60)
        if step.argv[0] in _LIGHT:
            return usual[0], min(60, usual[1])
        if step.argv[0] != "train_amort":
            return usual
        flags = parse(self._work.parsers["train_amort"], step.argv[1:])
        if not os.path.exists(flags["particles"]):  # they are yet to be made
            return usual
        if "from_run" in flags or "table_init" in flags:  # of a run that is not there yet
            return usual
        settings = settings_from_flags({**flags, "seed": 0}, self._work.plugins)
        same = str(replace(settings, outdir=""))  # but for the seed
        if same not in self._measured:
            self._measured[same] = _needed(settings, self._work.plugins)
        return self._measured[same]


def _needed(settings: TrainSettings, plugins: Registry) -> tuple[int, int]:
    """Return MB and minutes of a training, with some to spare."""
    whole = load_particles(source_of(settings), default_device())
    memory = _BASE_MB + whole.n * whole.ntilts * whole.D**2 * _BYTES / 1e6
    seconds = measured_seconds(settings, plugins)
    return round(memory), max(10, math.ceil(_SPARE * seconds / 60))


def measured_seconds(settings: TrainSettings, plugins: Registry) -> float:
    """Return how long a training takes, by a few batches of particles from the stack's start."""
    whole = load_particles(source_of(settings), default_device())
    rows = np.arange(whole.n) if whole.ind is None else np.asarray(whole.ind)
    some = rows[: 2 * _TIMED * settings.batch_size]
    with tempfile.TemporaryDirectory() as name:
        ind = Path(name) / "ind.pkl"
        with open(ind, "wb") as handle:
            pickle.dump(some, handle)
        short = replace(
            settings, ind=str(ind), holdout=None, outdir=os.path.join(name, "run"), memory=None
        )
        steps = endless_steps(Trainer(short, plugins))
        for _ in range(_TIMED):
            next(steps)
        began = time.perf_counter()
        for _ in range(_TIMED):
            next(steps)
        seconds = (time.perf_counter() - began) / _TIMED
    return seconds * math.ceil(whole.n / settings.batch_size) * settings.num_epochs
