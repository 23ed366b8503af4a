"""The processes that ``bench`` measures, and how they take turns.

Nothing here imports numpy or torch: the peak memory of a process counts that of the process that
started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    T = TypeVar("T")

__all__ = [
    "Failed", "Finished", "Worker", "environment",
    "run_command", "say", "stack", "take_turns", "working",
]  # fmt: skip


class Failed(RuntimeError):
    """A process that is measured ended with an error; the message is its last line."""


def say(message: str) -> None:
    """Tell the user how far it is."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def take_turns(
    turns: Mapping[str, Callable[[], T]], rounds: int, warm_up: int = 1
) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Take a turn of each in every round, every second round in reverse order.

    Parameters
    ----------
    warm_up
        Rounds before those, whose values are dropped.

    Returns
    -------
    values
        Of each round; empty for what failed.
    failures
        What failed -> why; it takes no further turns.
    """
    values: dict[str, list[T]] = {name: [] for name in turns}
    failures: dict[str, str] = {}
    for turn in range(-warm_up, rounds):
        for name in list(turns) if turn % 2 == 0 else list(turns)[::-1]:
            if name in failures:
                continue
            try:
                value = turns[name]()
            except Failed as err:
                failures[name], values[name] = str(err), []
                say(f"  {name}: failed: {err}")
                continue
            if turn >= 0:
                values[name].append(value)
        say(f"  round {turn + 1} of {rounds}" if turn >= 0 else "  warm-up round")
    return values, failures


def environment(threads: int, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of what is measured: no GPU, and nobody's settings."""
    given = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "OMP_", "GOMP_", "KMP_")) and name != "GLIBC_TUNABLES"
    }
    threads_of = {f"{who}_NUM_THREADS": str(threads) for who in ("OMP", "MKL", "OPENBLAS")}
    fixed = {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    return {**given, **threads_of, **fixed, **(more or {})}


class Worker:
    """A process that works when it is asked to, on a task of ``workers``."""

    def __init__(self, env: Mapping[str, str], task: str, **arguments: Any) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.workers", task, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=dict(env),
        )

    def rate(self, seconds: float) -> float:
        """Let it work for about so many seconds; returns the units done per second."""
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # answer() says why it has ended
            pipe.write(f"{seconds}\n")
            pipe.flush()
        found = self.answer()
        return float(found["done"] / found["seconds"])

    def answer(self) -> dict[str, Any]:
        """Wait for an answer.

        Raises
        ------
        Failed
            If the process ends without one.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Failed(_last_line(self._errors, self._process.wait()))
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.kill()  # it holds nothing that is worth an orderly end
        self._process.wait()
        self._errors.close()


def _last_line(file: IO[str], code: int) -> str:
    file.seek(0)
    lines = [line.strip() for line in file if line.strip()]
    ending = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{lines[-1]} ({ending})" if lines else ending


@contextlib.contextmanager
def working(env: Mapping[str, str], task: str, **arguments: Any) -> Iterator[Worker]:
    """Start a worker, and end it."""
    worker = Worker(env, task, **arguments)
    try:
        yield worker
    finally:
        worker.close()


@contextlib.contextmanager
def stack(env: Mapping[str, str], n: int, box: int) -> Iterator[dict[str, str]]:
    """Make particles of noise in a temporary folder; yields their files."""
    with tempfile.TemporaryDirectory(prefix="cryodrgn-amort-bench-") as folder:
        with working(env, "stack", folder=folder, n=n, box=box) as maker:
            files = maker.answer()
        yield files


@dataclass(frozen=True)
class Finished:
    """How a command went: wall time in seconds, peak memory in bytes."""

    seconds: float
    peak_bytes: int


def run_command(argv: Sequence[str], env: Mapping[str, str], until: str | None = None) -> Finished:
    """Run a command to its end, or until it says something.

    Parameters
    ----------
    until
        Text in what it prints at which it is killed.

    Raises
    ------
    Failed
        If it ends with an error.
    """
    with tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen(argv, stdout=log, stderr=log, text=True, env=dict(env))
        reached = False
        try:
            while True:
                ended, status, usage = os.wait4(process.pid, 0 if until is None else os.WNOHANG)
                if ended:
                    break
                time.sleep(0.1)
                reached = until is not None and until in _text(log)
                if reached:
                    process.kill()
                    until = None
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode and not reached:
            raise Failed(_last_line(log, process.returncode))
    return Finished(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def _text(log: IO[str]) -> str:
    """Read what was printed; the place where the process writes is shared with it."""
    return os.pread(log.fileno(), 2**20, 0).decode(errors="replace")
