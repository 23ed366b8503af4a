"""One command in a process of its own, and what has become of it."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import pickle
import re
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

_MEMORY = 6 << 30  # bytes of address space beyond what the imports take
_DROPPED = {  # of JSON: what no second run gives again, and paths
    "encoding_cost", "seconds", "seconds_per_epoch", "time", "times", "created", "command",
    "fingerprint", "load", "holdout", "overwrite", "version", "timing", "sha256",
}  # fmt: skip
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_UNREAD = re.compile(r"run\.log|\.lock|\.workers|.*\.(?:png|pdf|svg|html|log|sha256)")


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes
    ----------
    code
        Exit code; negative: the signal that ended it.
    said
        Its stderr.
    hung
        Whether it had to be ended after its time limit.
    """

    code: int
    said: str
    hung: bool
    seconds: float

    @property
    def fault(self) -> str | None:
        """What must never be: a traceback, a crash, a hang; None: it ended as it should."""
        if self.hung:
            return "hang"
        if self.code < 0:
            return "crash"
        lines = self.said.splitlines()
        one_line = bool(lines) and re.match(r"cryodrgn \w+: ", lines[-1])
        if "Traceback" in self.said or (self.code and not one_line):
            return "traceback"
        return None

    @property
    def is_refused(self) -> bool:
        """Whether it ended with one line for the user."""
        return self.fault is None and self.code == 2


def run(
    argv: list[str],
    folder: Path,
    *,
    limit: float = 60.0,
    kill_after: float | None = None,
    signum: int = signal.SIGKILL,
    file_bytes: int | None = None,
) -> Outcome:
    """Run ``cryodrgn_amort ARGV`` in a folder, in a child of this process, which has imported all.

    Parameters
    ----------
    limit
        Seconds after which it counts as hanging.
    kill_after, signum
        Seconds after which it gets a signal, with its children.
    file_bytes
        No file may grow beyond so many bytes: as on a full disk, writes fail half-way.
    """
    said = folder / ".said"
    said.touch()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the child is ready
    started = time.monotonic()
    child = os.fork()
    if not child:
        _child(argv, folder, said, file_bytes)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    hung, sent, status = False, kill_after is None, None
    while status is None:
        ended, found = os.waitpid(child, os.WNOHANG)
        if ended:
            status = found
        elif time.monotonic() - started < (limit if sent else kill_after or 0):
            time.sleep(0.002)
        else:
            if sent:
                hung, signum = True, signal.SIGKILL
            sent = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signum)
    with contextlib.suppress(ProcessLookupError):  # what it has started
        os.killpg(child, signal.SIGKILL)
    text = said.read_text(errors="replace")
    said.unlink()
    seconds = time.monotonic() - started
    return Outcome(os.waitstatus_to_exitcode(status), text, hung, seconds)


def _child(argv: list[str], folder: Path, said: Path, file_bytes: int | None) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        for number, path in ((1, os.devnull), (2, said)):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(handle, number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY,) * 2)
        if file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes,) * 2)
        from cryodrgn_amort.cli import main

        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        except KeyboardInterrupt:  # it came before the command had begun
            os._exit(128 + signal.SIGINT)
        main(argv)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def digest(folder: Path, root: Path) -> dict[str, str]:
    """Say what is in the files below a folder, apart from times, figures and where ``root`` is."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if not _UNREAD.fullmatch(path.name) and not path.name.endswith(".tmp"):
            try:
                sums = _digest(path, str(root))
            except Exception:  # a damaged one
                sums = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = sums
    return found


def _digest(path: Path, where: str) -> str:
    sums = hashlib.sha256()
    if path.name == "metrics.csv":
        with open(path, newline="") as handle:
            for row in csv.DictReader(handle):
                timed = ("seconds", "images_per_second")
                sums.update(repr([v for k, v in row.items() if k not in timed]).encode())
    elif path.suffix in (".json", ".yaml", ".planned"):
        read = yaml.safe_load if path.suffix == ".yaml" else json.loads
        sums.update(repr(_lasting(read(path.read_text()), where)).encode())
    elif path.name.startswith("weights") or path.name == ".interrupted.pkl":
        _add(sums, torch.load(path, weights_only=True))
    else:
        sums.update(path.read_bytes())
    return sums.hexdigest()


def _lasting(value: object, where: str) -> object:
    if isinstance(value, dict):
        return {
            k: _lasting(v, where) for k, v in sorted(value.items(), key=str) if k not in _DROPPED
        }
    if isinstance(value, list):
        return [_lasting(part, where) for part in value]
    if not isinstance(value, str):
        return value
    # what is done anew lies in the copy, what was done before in the stage that it is of
    return value.replace(where, "").replace(str(Path(where).with_name("stage")), "")


def _add(sums: hashlib._Hash, value: object) -> None:
    if isinstance(value, dict):
        for key in value:
            if key != "seconds":
                sums.update(repr(key).encode())
                _add(sums, value[key])
    elif isinstance(value, torch.Tensor):
        sums.update(repr((value.dtype, value.shape)).encode() + value.cpu().numpy().tobytes())
    elif isinstance(value, (list, tuple)):
        for part in value:
            _add(sums, part)
    else:
        sums.update(pickle.dumps(value))
