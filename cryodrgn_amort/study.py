"""A study: every step of its plan, once; killed, it goes on where it stopped.

``steps/NAME.json`` says that a step is done, and holds its fingerprint: if the plan changes, what a
recipe says, a file, or a version, so does the fingerprint of what depends on the change, and of
nothing else. While a step is under way the same text lies in ``steps/NAME.planned``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cryodrgn_amort import checkpoints, files
from cryodrgn_amort.checkpoints import epochs
from cryodrgn_amort.errors import InputError
from cryodrgn_amort.files import write_text
from cryodrgn_amort.parallel import alone
from cryodrgn_amort.plan import parse
from cryodrgn_amort.results import EvalOptions
from cryodrgn_amort.runs import default_device, source_of
from cryodrgn_amort.settings import settings_from_flags
from cryodrgn_amort.sources import load_particles
from cryodrgn_amort.streams import forgive
from cryodrgn_amort.truth import load_known

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cryodrgn_amort.plan import Plan, Step
    from cryodrgn_amort.plugins import CommandSpec

__all__ = ["adopt", "commands_line", "default_jobs", "locked", "run_steps"]

_STATUS_SECONDS = 30.0
_MOST_JOBS = 4
# Imported once, for all workers.
_PRELOADED = [f"cryodrgn_amort.{m}" for m in ("compare", "report", "evaluation", "training", "cli")]


def default_jobs() -> int:
    """Return how many steps to run at a time: one on a GPU, else as many as there are cores."""
    return 1 if default_device().type == "cuda" else min(os.cpu_count() or 1, _MOST_JOBS)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep others from running the same study at the same time.

    Raises
    ------
    InputError
        If another process runs it.
    """
    other = "another study_amort is running it"
    with files.locked(folder, other), open(folder / ".workers", "wb") as workers:
        fcntl.flock(workers, fcntl.LOCK_EX)  # what is left of a killed one ends within a moment
        fcntl.flock(workers, fcntl.LOCK_UN)
        yield


@dataclass
class _Stamp:
    """What is known of a step on disk."""

    folder: Path
    name: str
    fingerprint: str
    command: str
    versions: Sequence[str]

    @property
    def _done(self) -> Path:
        return self.folder / "steps" / f"{self.name}.json"

    @property
    def _planned(self) -> Path:
        return self.folder / "steps" / f"{self.name}.planned"

    def is_done(self) -> bool:
        return _read(self._done).get("fingerprint") == self.fingerprint

    def is_begun(self) -> bool:
        return _read(self._planned).get("fingerprint") == self.fingerprint

    def other_versions(self) -> list[str]:
        """Return those that it was done with, which are not there any more."""
        return [v for v in _read(self._done).get("versions", ()) if v not in self.versions]

    def adopt(self, former: str) -> None:
        """Know by its fingerprint what was known by its former one."""
        for path in (self._done, self._planned):
            if _read(path).get("fingerprint") == former:
                began = path.stat().st_mtime_ns
                self._write(path)
                os.utime(path, ns=(began, began))

    def is_older_than(self, path: Path) -> bool:
        """Tell whether a file has been written since the step was begun."""
        return path.exists() and path.stat().st_mtime_ns >= self._planned.stat().st_mtime_ns

    def begin(self) -> None:
        """Say that it is under way; what it gave before counts no longer."""
        self._done.unlink(missing_ok=True)
        self._planned.parent.mkdir(exist_ok=True)
        self._write(self._planned)

    def _write(self, path: Path) -> None:
        text = {
            "step": self.name, "fingerprint": self.fingerprint, "command": self.command,
            "versions": self.versions,
        }  # fmt: skip
        write_text(path, json.dumps(text, indent=2) + "\n")

    def finish(self) -> None:
        os.replace(self._planned, self._done)

    @property
    def shell(self) -> str:
        """What a shell does instead of ``finish``."""
        return shlex.join(["mv", str(self._planned), str(self._done)])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _stamp(plan: Plan, step: Step) -> _Stamp:
    return _Stamp(plan.folder, step.name, plan.fingerprint(step), step.shell, step.versions)


def adopt(plan: Plan) -> None:
    """Keep what was done before fingerprints knew recipes, versions, and which files a step reads.

    Nobody knows what these were then: they are taken to be what they are now.
    """
    for step in plan.steps.values():
        _stamp(plan, step).adopt(plan.former_fingerprint(step))


def is_done(plan: Plan, step: Step) -> bool:
    """Tell whether a step, and all before it, need not be run."""
    there = all(path.exists() for path in step.outputs)
    before = all(is_done(plan, plan.steps[name]) for name in step.after)
    return there and before and _stamp(plan, step).is_done()


def _finish_killed(plan: Plan) -> None:
    """Mark trainings as done that ended just when the study was killed."""
    for step in plan.steps.values():
        stamp = _stamp(plan, step)
        trained = step.argv[0] == "train_amort" and stamp.is_begun()
        if trained and all(map(stamp.is_older_than, step.outputs)):
            stamp.finish()


def _to_run(plan: Plan, step: Step) -> tuple[str, ...]:
    """Return the command that finishes a step: a training that was killed goes on.

    It does so if its config has been written since: before, the folder may hold another run.
    """
    if step.argv[0] != "train_amort":
        return step.argv
    folder, stamp = step.outputs[0].parent, _stamp(plan, step)
    begun = stamp.is_begun() and stamp.is_older_than(folder / "config.yaml")
    if begun and (epochs(folder) or (folder / checkpoints.INTERRUPTED).exists()):
        return (*step.argv, "--load", "latest")
    return (*step.argv, "--overwrite")


def commands_line(plan: Plan) -> list[str]:
    """Return what is still to be done as lines for a shell, and mark it as planned.

    Each line that succeeds leaves its mark in ``steps/``, so that the study knows of it.
    """
    _finish_killed(plan)
    lines = []
    for step in plan.steps.values():
        if is_done(plan, step):
            continue
        argv, stamp = _to_run(plan, step), _stamp(plan, step)
        if not stamp.is_begun():
            stamp.begin()
        after = [name for name in step.after if not is_done(plan, plan.steps[name])]
        line = f"{replace(step, argv=argv).shell} && {stamp.shell}"
        lines.append(f"{line}  # {step.name}" + (f", after {' '.join(after)}" if after else ""))
    return lines


def check_inputs(plan: Plan) -> None:
    """Open the user's particles and what is known of them, before anything is trained.

    Raises
    ------
    InputError
        If something is wrong with them.
    """
    trained = [s for s in plan.steps.values() if s.argv[0] == "train_amort"]
    if "simulate" in plan.data or not trained:
        return
    args = parse(plan.parsers["train_amort"], trained[0].argv[1:])
    settings = settings_from_flags(args, plan.plugins)
    particles = load_particles(source_of(settings), default_device())
    labels, coordinate, truth = (plan.data.get(n) for n in ("labels", "coordinate", "truth"))
    load_known(EvalOptions(labels=labels, coordinate=coordinate, truth=truth), particles)


def run_steps(plan: Plan, commands: Mapping[str, CommandSpec], jobs: int) -> list[str]:
    """Run every step that is not done; returns what failed, a line each.

    Steps that depend on a failed one are left out, all others are run.
    """
    _finish_killed(plan)
    waiting = {s.name: s for s in plan.steps.values() if not is_done(plan, s)}
    kept = len(plan.steps) - len(waiting)
    if kept:
        _say(f"{kept} of {len(plan.steps)} steps are done already")
    if not waiting:
        return []
    others = {n: v for n, s in waiting.items() if (v := _stamp(plan, s).other_versions())}
    if others:
        named = ", ".join(sorted({version for found in others.values() for version in found}))
        _say(f"{len(others)} steps were done with {named}, and are done again")
    check_inputs(plan)
    threads = max((os.cpu_count() or 1) // jobs, 1)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(threads)  # the workers inherit them
    (plan.folder / "logs").mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    _start_server()
    of_caller = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (str(plan.folder), threads))
    try:
        return _Runner(plan, commands, pool, jobs, kept).run(waiting)
    except BaseException:  # Ctrl-C too: nothing may go on behind the user's back
        for process in set(multiprocessing.active_children()) - of_caller:
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_server() -> None:
    """Start what forks the workers, deaf to Ctrl-C: this process hears it, and kills them.

    While the server imports what is preloaded it would say so in a traceback.
    """
    if threading.current_thread() is not threading.main_thread():  # where there are no signals
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # is inherited
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


class _Runner:
    """Hands steps to the workers as soon as what they need is there."""

    def __init__(
        self,
        plan: Plan,
        commands: Mapping[str, CommandSpec],
        pool: ProcessPoolExecutor,
        jobs: int,
        count: int,
    ) -> None:
        self.plan, self.commands, self.pool, self.jobs = plan, commands, pool, jobs
        self.count = count
        self.running: dict[Future[str | None], tuple[Step, float]] = {}
        self.failed: dict[str, str] = {}
        self.started = time.monotonic()

    def run(self, waiting: dict[str, Step]) -> list[str]:
        while waiting or self.running:
            self._hand_out(waiting)
            if not self.running:
                break
            done, _ = wait(self.running, _STATUS_SECONDS, FIRST_COMPLETED)
            for future in done:
                self._finish(future)
            if not done:
                self._show_status()
        return list(self.failed.values())

    def _hand_out(self, waiting: dict[str, Step]) -> None:
        for name, step in list(waiting.items()):
            if len(self.running) >= self.jobs:
                return
            if any(parent in self.failed for parent in step.after):
                del waiting[name]
                self.failed[name] = f"{name}: left out, a step before it failed"
            elif not any(p in waiting or self._is_running(p) for p in step.after):
                del waiting[name]
                self._start(step)

    def _is_running(self, name: str) -> bool:
        return any(step.name == name for step, _ in self.running.values())

    def _start(self, step: Step) -> None:
        argv = _to_run(self.plan, step)  # before it is marked as begun
        stamp = _stamp(self.plan, step)
        if not stamp.is_begun():
            stamp.begin()
        log = str(self.plan.folder / "logs" / f"{step.name}.log")
        future = self.pool.submit(_run, self.commands[argv[0]].module, list(argv), log)
        self.running[future] = (step, time.monotonic())

    def _finish(self, future: Future[str | None]) -> None:
        step, began = self.running.pop(future)
        try:
            message = future.result()
        except BrokenProcessPool:
            raise InputError(f"{step.name}: its process was killed (out of memory?); the same "
                             "command goes on") from None  # fmt: skip
        took = timedelta(seconds=round(time.monotonic() - began))
        if message is None and not all(path.exists() for path in step.outputs):
            message = "it ended without its output"
        if message is None:
            _stamp(self.plan, step).finish()
            self.count += 1
            _say(f"[{self.count}/{len(self.plan.steps)}] {step.name} ({took})")
        else:
            log = self.plan.folder / "logs" / f"{step.name}.log"
            self.failed[step.name] = f"{step.name}: {message} ({log})"
            _say(f"FAILED {self.failed[step.name]}")

    def _show_status(self) -> None:
        running = []
        for step, _ in self.running.values():
            text = step.name
            if step.argv[0] == "train_amort":
                rows = _count_lines(step.outputs[0].parent / "metrics.csv") - 1
                text += f" (epoch {rows})" if rows > 0 else ""
            running.append(text)
        took = timedelta(seconds=round(time.monotonic() - self.started))
        _say(f"... {took}: {', '.join(running)}")


def _count_lines(path: Path) -> int:
    try:
        return len(path.read_text(encoding="utf-8").splitlines())
    except OSError:
        return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _start_worker(folder: str, threads: int) -> None:
    """Prepare a worker: it ends with its parent, and is known to be there until it has ended."""
    forgive()
    alone()
    lock = os.open(Path(folder) / ".workers", os.O_WRONLY)  # held until the process ends
    fcntl.flock(lock, fcntl.LOCK_SH)
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextlib.contextmanager
def _output_to(path: str) -> Iterator[None]:
    """Send all that this process prints into a file, also from libraries."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with open(path, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, saved in zip((1, 2), before, strict=True):
                os.dup2(saved, fd)
                os.close(saved)


def _run(module: str, argv: Sequence[str], log: str) -> str | None:
    """Run a command in this process; returns what went wrong."""
    with _output_to(log):
        try:
            print("cryodrgn", shlex.join(argv))
            command = importlib.import_module(module)
            parser = argparse.ArgumentParser()
            command.add_args(parser)
            command.main(parser.parse_args(argv[1:]))
        except InputError as err:
            print(err)
            return str(err)
        except OSError as err:
            traceback.print_exc()
            return f"{err.filename or ''} {err.strerror or err}".strip()
        except (Exception, SystemExit) as err:
            traceback.print_exc()
            return f"{type(err).__name__}: {err}"
    return None
