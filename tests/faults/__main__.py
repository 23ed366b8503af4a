"""Try faults, and write down what became of them: ``bash tests/faults.sh``."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("MPLBACKEND", "Agg")

import torch

import cryodrgn_amort
from faults import hostile, kills
from faults.damage import Finding, damage
from faults.stage import SCENES, build, reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

Result = tuple[Counter[str], list[Finding]]
COLUMNS = {
    "kills": ("kills", "ends", "corrupted", "lost"),
    "full disks": ("full", "ends", "corrupted", "lost"),
    "damaged files": ("refused", "same", "taken", "silent"),
    "hostile files": ("refused", "harmless", "executed"),
}
"""What is counted of each kind of fault; tracebacks, crashes and hangs of all."""
_ROOM = 1 << 30
_FAULTS = ("traceback", "crash", "hang", "exit")


def _import_all() -> None:
    """Import what commands need: children have it then."""
    names = [m.name for m in pkgutil.walk_packages(cryodrgn_amort.__path__, "cryodrgn_amort.")]
    lazy = ("cryodrgn.commands.train_vae", "matplotlib.pyplot", "sklearn.neighbors", "starfile",
            "sklearn.cluster", "sklearn.decomposition", "scipy.ndimage", "torch._dynamo",
            "matplotlib.backends.backend_agg", "matplotlib.backends.backend_pdf")  # fmt: skip
    for name in [*(n for n in names if not n.endswith("__main__")), *lazy]:
        importlib.import_module(name)


class _Trials:
    """Hands trials out to processes, each with a copy of the stage for every trial."""

    def __init__(self, work: Path, jobs: int) -> None:
        self.work, self.stage, self.jobs = work, work / "stage", jobs
        self.pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork"))
        self.waiting: list[tuple[str, str, Future[Result]]] = []

    def in_a_copy(self, what: Callable[[Path], Any]) -> Any:
        copy = self.work / "reference"
        shutil.copytree(self.stage, copy)
        try:
            return what(copy)
        finally:
            shutil.rmtree(copy)

    def add(
        self, kind: str, name: str, total: int, what: Callable[..., Result], *args: Any, **more: Any
    ) -> None:
        """Have ``what`` done for as many seeds, some at a time."""
        step = max(1, min(25, total // self.jobs))
        for first in range(0, total, step):
            seeds = range(first, min(first + step, total))
            given = (*args, seeds, self.work)
            self.waiting.append((kind, name, self.pool.submit(what, *given, **more)))

    def results(self) -> dict[tuple[str, str], Counter[str]]:
        """Wait for all; prints what went wrong."""
        totals: dict[tuple[str, str], Counter[str]] = {}
        for done, (kind, name, future) in enumerate(self.waiting):
            counts, findings = future.result()
            totals.setdefault((kind, name), Counter()).update(counts)
            for finding in findings:
                print(f"{finding.fault}: {kind}, {finding.what}\n{finding.said}\n", flush=True)
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{done + 1} of {len(self.waiting)} parts ")
        self.pool.shutdown()
        return totals


def _shares(seconds: Sequence[float], total: int) -> list[int]:
    """Share trials out, at least one each and in all as many: fewer of what takes long."""
    if not total:
        return [0] * len(seconds)
    weights = [max(s, 0.1) ** -0.5 for s in seconds]
    shares = [max(1, int(total * w / sum(weights))) for w in weights]
    shares[shares.index(max(shares))] += max(0, total - sum(shares))
    return shares


def _table(kind: str, totals: dict[tuple[str, str], Counter[str]]) -> list[str]:
    columns = COLUMNS[kind]
    rows = {name: counts for (of, name), counts in totals.items() if of == kind}
    if not rows:
        return []
    rows["all"] = sum(rows.values(), Counter())
    lines = [f"| {kind} | {' | '.join(columns)} | tracebacks, crashes, hangs |",
             "|---" * (len(columns) + 2) + "|"]  # fmt: skip
    for name, counts in rows.items():
        cells = [counts[c] for c in columns] + [sum(counts[f] for f in _FAULTS)]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def main() -> None:
    """Run what was asked for; exit code 1 if anything went wrong."""
    parser = argparse.ArgumentParser(prog="bash tests/faults.sh", description=__doc__)
    for name, count, what in (
        ("kills", 200, "works that are killed or stopped, up to three times each"),
        ("full", 100, "works whose disk is full"),
        ("damaged", 10_000, "damaged files"),
    ):
        parser.add_argument(f"--{name}", type=int, default=count, help=f"{what} (%(default)s)")
    parser.add_argument("--no-hostile", action="store_true", help="no hostile files")
    parser.add_argument("--quick", action="store_true", help="no evaluations, studies, digits")
    parser.add_argument("--only", nargs="+", default=[], help="of these names alone")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    _import_all()
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _ROOM
    started = time.monotonic()

    def wanted(things: Sequence[Any]) -> list[Any]:
        chosen = [t for t in things if not args.only or t.name.startswith(tuple(args.only))]
        return [t for t in chosen if not (args.quick and t.slow)]

    with tempfile.TemporaryDirectory(dir=memory if roomy else None, prefix="faults") as work:
        trials = _Trials(Path(work), args.jobs)
        build(trials.stage, quick=args.quick)
        kills.prepare(trials.stage)
        for kind, total in (("kills", args.kills), ("full disks", args.full)):
            works = wanted(kills.WORKS) if total else []
            known = [trials.in_a_copy(lambda copy, w=w: kills.expected(w, copy)) for w in works]
            for w, facts, count in zip(
                works, known, _shares([k[1] for k in known], total), strict=True
            ):
                trials.add(kind, w.name, count, kills.disturb, w, trials.stage, facts,
                           disk=kind != "kills")  # fmt: skip
        scenes = wanted(SCENES) if args.damaged else []
        given = [trials.in_a_copy(lambda copy, s=s: reference(s, copy)) for s in scenes]
        for s, facts, count in zip(
            scenes, given, _shares([g[1] for g in given], args.damaged), strict=True
        ):
            trials.add("damaged files", s.name, count, damage, s, trials.stage, facts)
        if not args.no_hostile:
            for h in hostile.HOSTILE:
                trials.add("hostile files", h.name, 1, hostile.attack, h.name, trials.stage)
        totals = trials.results()
    for kind in COLUMNS:
        print("\n".join(_table(kind, totals)))
    bad = {"corrupted", "lost", "silent", "executed", *_FAULTS}
    faults = sum(counts[name] for counts in totals.values() for name in bad)
    print(f"{faults} faults, {time.monotonic() - started:.0f} seconds")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
