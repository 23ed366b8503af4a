"""An environment's ``cryodrgn`` as a process that takes commands: see ``server``."""

from __future__ import annotations

import itertools
import json
import os
import queue
import subprocess
import threading
from pathlib import Path

LIMIT = 300.0  # seconds that a command may take


class Host:
    """The ``cryodrgn`` of one environment.

    Attributes
    ----------
    version
        Of ``cryodrgn``.
    has_plugin
        Whether ``cryodrgn_amort`` can be imported there.
    """

    def __init__(self, environment: Path) -> None:
        server = Path(__file__).with_name("server.py")
        # -I: nothing of the folder it is started in, nor of PYTHONPATH
        self._process = subprocess.Popen(
            [environment / "bin/python", "-I", server],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        hello = json.loads(self._process.stdout.readline())
        self.version: str = hello["version"]
        self.has_plugin: bool = hello["plugin"]
        self._answers: dict[int, queue.Queue[int]] = {}
        self._ids = itertools.count()
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            answer = json.loads(line)
            self._answers[answer["id"]].put(answer["code"])

    def _order(self, **order: object) -> None:
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def start(self, argv: list[object], folder: Path, log: Path, **environ: str) -> int:
        """Start a command in a folder; returns what ``wait`` and ``end`` take."""
        log.parent.mkdir(parents=True, exist_ok=True)
        number = next(self._ids)
        self._answers[number] = queue.Queue()
        self._order(id=number, argv=[str(a) for a in argv], folder=str(folder), log=str(log),
                    environ=environ)  # fmt: skip
        return number

    def wait(self, number: int, limit: float = LIMIT) -> int:
        """Return its exit code; after the limit it is ended: -15."""
        try:
            return self._answers[number].get(timeout=limit)
        except queue.Empty:
            self.end(number)
            return self._answers[number].get(timeout=10)

    def has_ended(self, number: int) -> bool:
        """Whether it runs no more."""
        return not self._answers[number].empty()

    def end(self, number: int) -> None:
        """End what runs on, as the dashboard does."""
        self._order(end=number)

    def run(self, argv: list[object], folder: Path, log: Path, **environ: str) -> int:
        """Run a command; returns its exit code."""
        return self.wait(self.start(argv, folder, log, **environ))

    def close(self) -> None:
        """End the process and all that it runs."""
        self._process.stdin.close()
        self._process.wait(timeout=30)
