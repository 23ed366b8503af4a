"""How far a study is: what its folder says of each step.

``steps/NAME.json`` says that a step is done, and holds its fingerprint: if the plan changes, what a
recipe says, a file, or a version, so does the fingerprint of what depends on the change, and of
nothing else. While a step is under way the same text lies in ``steps/NAME.planned``.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.core import INTERRUPTED, epochs, write_text
from cryodrgn_amort.study.steps import Fingerprints

if TYPE_CHECKING:
    from pathlib import Path

    from cryodrgn_amort.study.steps import Step, Work


__all__ = ["Progress", "Stamp", "commands_line"]


@dataclass
class Stamp:
    """What is known of a step on disk.

    Attributes
    ----------
    done, planned
        The files that say that it is done, or under way.
    """

    step: Step
    fingerprint: str
    done: Path
    planned: Path

    def is_done(self) -> bool:
        """Tell whether it has been done as the plan is now."""
        return _read(self.done).get("fingerprint") == self.fingerprint

    def is_begun(self) -> bool:
        """Tell whether it has been begun as the plan is now."""
        return _read(self.planned).get("fingerprint") == self.fingerprint

    def other_versions(self) -> list[str]:
        """Return those that it was done with, which are not there any more."""
        return [v for v in _read(self.done).get("versions", ()) if v not in self.step.versions]

    def is_older_than(self, path: Path) -> bool:
        """Tell whether a file has been written since the step was begun."""
        return path.exists() and path.stat().st_mtime_ns >= self.planned.stat().st_mtime_ns

    def begin(self) -> None:
        """Say that it is under way; what it gave before counts no longer."""
        self.done.unlink(missing_ok=True)
        self.planned.parent.mkdir(exist_ok=True)
        self._write(self.planned)

    def _write(self, path: Path) -> None:
        text = {
            "step": self.step.name, "fingerprint": self.fingerprint, "command": self.step.shell,
            "versions": self.step.versions,
        }  # fmt: skip
        write_text(path, json.dumps(text, indent=2) + "\n")

    def finish(self) -> None:
        """Say that it is done."""
        os.replace(self.planned, self.done)

    @property
    def shell(self) -> str:
        """What a shell does instead of ``finish``."""
        return shlex.join(["mv", str(self.planned), str(self.done)])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Progress:
    """Steps, and what of them is done."""

    def __init__(self, work: Work) -> None:
        self.layout, self.steps = work.layout, work.steps
        self.fingerprints = Fingerprints(work)

    def stamp(self, step: Step) -> Stamp:
        """Return what is known of a step on disk."""
        done, planned = (self.layout.stamp(step.name, kind) for kind in ("json", "planned"))
        return Stamp(step, self.fingerprints.of(step), done, planned)

    def is_done(self, step: Step) -> bool:
        """Tell whether a step, and all before it, need not be run."""
        there = all(path.exists() for path in step.outputs)
        before = all(self.is_done(self.steps[name]) for name in step.after)
        return there and before and self.stamp(step).is_done()

    def finish_killed(self) -> None:
        """Mark trainings as done that ended just when the study was killed."""
        for step in self.steps.values():
            stamp = self.stamp(step)
            trained = step.argv[0] == "train_amort" and stamp.is_begun()
            if trained and all(map(stamp.is_older_than, step.outputs)):
                stamp.finish()

    def plan_rest(self) -> list[tuple[Step, Stamp]]:
        """Return what is still to be done, with the commands that do it, and mark it as planned."""
        self.finish_killed()
        rest = []
        for step in self.steps.values():
            if not self.is_done(step):
                argv, stamp = self.argv(step), self.stamp(step)  # before it is marked as begun
                if not stamp.is_begun():
                    stamp.begin()
                rest.append((replace(step, argv=argv), stamp))
        return rest

    def argv(self, step: Step) -> tuple[str, ...]:
        """Return the command that finishes a step: a training that was killed goes on.

        It does so if its config has been written since: before, the folder may hold another run.
        """
        if step.argv[0] != "train_amort":
            return step.argv
        folder, stamp = step.outputs[0].parent, self.stamp(step)
        begun = stamp.is_begun() and stamp.is_older_than(folder / "config.yaml")
        if begun and (epochs(folder) or (folder / INTERRUPTED).exists()):
            return (*step.argv, "--load", "latest")
        return (*step.argv, "--overwrite")


def commands_line(work: Work) -> list[str]:
    """Return what is still to be done as lines for a shell, and mark it as planned.

    Each line that succeeds leaves its mark in ``steps/``, so that the study knows of it.
    """
    progress = Progress(work)
    lines = []
    for step, stamp in progress.plan_rest():
        after = [name for name in step.after if not progress.is_done(progress.steps[name])]
        line = f"{step.shell} && {stamp.shell}"
        lines.append(f"{line}  # {step.name}" + (f", after {' '.join(after)}" if after else ""))
    return lines
