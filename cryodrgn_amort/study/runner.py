"""Run every step of a study once; killed, it goes on where it stopped."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib
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
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cryodrgn_amort.core import InputError, alone, cores, default_device, forgive, locked, on_gpu
from cryodrgn_amort.data import load_particles
from cryodrgn_amort.options import EvalOptions
from cryodrgn_amort.runs import settings_from_flags, source_of
from cryodrgn_amort.simulation import load_imaging, load_known
from cryodrgn_amort.study.progress import Progress
from cryodrgn_amort.study.steps import parse

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cryodrgn_amort.core import CommandSpec
    from cryodrgn_amort.study.plan import Plan
    from cryodrgn_amort.study.steps import Step, Work


__all__ = ["check_inputs", "default_jobs", "run_steps", "work_locked"]

_STATUS_SECONDS = 30.0
_MOST_JOBS = 4
# Imported once, for all workers: the last two by the host's flags, and by a first optimizer.
_PRELOADED = [
    "cryodrgn_amort.evaluation.comparison", "cryodrgn_amort.evaluation.evaluator",
    "cryodrgn_amort.report.evaluation_report", "cryodrgn_amort.training.trainer",
    "cryodrgn_amort.cli.command_line", "cryodrgn.commands.train_vae", "torch._dynamo",
]  # fmt: skip


def default_jobs() -> int:
    """Return how many steps to run at a time: one on a GPU, else as many as there are cores."""
    return 1 if on_gpu(default_device()) else min(cores(), _MOST_JOBS)


@contextlib.contextmanager
def work_locked(folder: Path, command: str) -> Iterator[None]:
    """Keep others from running the same ``command`` in a folder at the same time.

    Raises
    ------
    InputError
        If another process runs it.
    """
    other = f"another {command} is running it"
    with locked(folder, other), open(folder / ".workers", "wb") as workers:
        fcntl.flock(workers, fcntl.LOCK_EX)  # what is left of a killed one ends within a moment
        fcntl.flock(workers, fcntl.LOCK_UN)
        yield


def check_inputs(plan: Plan, work: Work) -> None:
    """Open the user's particles and what is known of them, before anything is trained.

    Nothing is opened if all is done.

    Raises
    ------
    InputError
        If something is wrong with them.
    """
    progress = Progress(work)
    trained = [s for s in work.steps.values() if s.argv[0] == "train_amort"]
    done = all(map(progress.is_done, work.steps.values()))
    if "simulate" in plan.data or not trained or done:
        return
    args = parse(plan.parsers["train_amort"], trained[0].argv[1:])
    settings = settings_from_flags(args, plan.plugins)
    particles = load_particles(source_of(settings), default_device())
    labels, coordinate, truth = (plan.data.get(n) for n in ("labels", "coordinate", "truth"))
    known = EvalOptions(labels=labels, coordinate=coordinate, truth=truth)
    load_known(known, particles, plan.plugins)
    if truth is not None:
        load_imaging(truth, particles)


def run_steps(work: Work, commands: Mapping[str, CommandSpec], jobs: int) -> list[str]:
    """Run every step that is not done; returns what failed, a line each.

    Steps that depend on a failed one are left out, all others are run.

    Raises
    ------
    InputError
        If the process of a step was killed.
    """
    progress = Progress(work)
    progress.finish_killed()
    steps = progress.steps
    waiting = {s.name: s for s in steps.values() if not progress.is_done(s)}
    kept = len(steps) - len(waiting)
    if kept:
        _say(f"{kept} of {len(steps)} steps are done already")
    if not waiting:
        return []
    others = {n: v for n, s in waiting.items() if (v := progress.stamp(s).other_versions())}
    if others:
        named = ", ".join(sorted({version for found in others.values() for version in found}))
        _say(f"{len(others)} steps were done with {named}, and are done again")
    threads = max(cores() // jobs, 1)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(threads)  # the workers inherit them
    (work.folder / "logs").mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    _start_server()
    of_caller = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (str(work.folder), threads))
    try:
        return _Runner(progress, commands, pool, jobs, kept).run(waiting)
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
        progress: Progress,
        commands: Mapping[str, CommandSpec],
        pool: ProcessPoolExecutor,
        jobs: int,
        count: int,
    ) -> None:
        self.progress, self.layout = progress, progress.layout
        self.commands, self.pool, self.jobs, self.count = commands, pool, jobs, count
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
        argv = self.progress.argv(step)  # before it is marked as begun
        stamp = self.progress.stamp(step)
        if not stamp.is_begun():
            stamp.begin()
        log = str(self.layout.log(step.name))
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
            self.progress.stamp(step).finish()
            self.count += 1
            _say(f"[{self.count}/{len(self.progress.steps)}] {step.name} ({took})")
        else:
            log = self.layout.log(step.name)
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
