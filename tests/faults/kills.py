"""Commands that are killed, stopped or run out of space: do they end as they would have?"""

from __future__ import annotations

import csv
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryodrgn_amort.core import INTERRUPTED, epochs
from faults.damage import Finding
from faults.stage import EVALUATE, NET, PARTICLES, SMALL, STUDY, TURNS, VALIDATE
from faults.trials import digest, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from faults.trials import Outcome

_MOST_TRIES = 12


@dataclass(frozen=True)
class Work:
    """A command that writes, in the stage's folder.

    Attributes
    ----------
    gives
        Folder of its results; it is not there before, or holds what the command needs.
    goes_on
        Flags with which it goes on, if there is a checkpoint.
    """

    name: str
    argv: list[str]
    gives: str = "out"
    goes_on: tuple[str, ...] = ()

    @property
    def slow(self) -> bool:
        """Whether it is left out of a quick trial."""
        return self.argv[0] in ("eval_amort", "study_amort", "validate_amort")


_LATEST = ("--load", "latest")
_TRAIN = ["train_amort", *PARTICLES, "-n", "6", "-o", "out"]

WORKS = (
    Work("training, table", [*_TRAIN, "--encoder", "vlt", *SMALL], goes_on=_LATEST),
    Work("training, network", [*_TRAIN, *NET, "--holdout", "0.2", "--lr-end", "1e-5"],
         goes_on=_LATEST),
    Work("training, lazy, shuffled", [*_TRAIN, *NET, "--lazy", "--shuffle-seed", "3",
                                      "--checkpoint", "2"], goes_on=_LATEST),
    Work("second stage", ["train_amort", "--from", "vlt", "--encoder", "anchored", "--anchors",
                          "3", "--enc-dim", "8", "--enc-layers", "1", "-n", "6", "--checkpoint",
                          "1", "--seed", "1", "--no-analysis", "-o", "out"], goes_on=_LATEST),
    Work("turns", ["train_amort", *PARTICLES, "-n", "8", "-o", "out", "--holdout", "0.2", *TURNS],
         goes_on=_LATEST),
    Work("evaluation", ["eval_amort", "net", "--transform", "roll:1", *EVALUATE, "-o", "out"]),
    Work("fits", ["infer_amort", "vlt", "--start", "mean", "--steps", "3", "--batch-size", "4",
                  "-o", "out"]),
    Work("simulation", ["simulate_amort", "-n", "200", "-D", "16", "--seed", "0", "-o", "out",
                        "--overwrite"]),
    Work("validation", [*VALIDATE, "asking"], gives="asking"),
    Work("study", ["study_amort", "-o", "new", "--jobs", "1"], gives="new"),
)  # fmt: skip


def prepare(stage: Path) -> None:
    """Add to the stage what these works need."""
    (stage / "new").mkdir()
    shutil.copyfile(stage / "study/plan.yaml", stage / "new/plan.yaml")
    assert STUDY["seeds"] == [0]


def expected(work: Work, folder: Path) -> tuple[dict[str, str], float, int]:
    """Run a work undisturbed: its results, seconds, and the size of its largest file."""
    found = run(work.argv, folder, limit=600)
    if found.code:
        raise RuntimeError(f"{work.name}: {found.said}")
    results = folder / work.gives
    sizes = [p.stat().st_size for p in results.rglob("*") if p.is_file()]
    return digest(results, folder), found.seconds, max(sizes)


def _can_mount() -> bool:
    if not (shutil.which("mount") and shutil.which("umount")):
        return False
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
        return True


CAN_MOUNT = _can_mount()
"""Whether small disks can be made here."""


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[None]:
    """Put a folder on a disk of its own, which has room for ``size`` bytes more than it holds."""
    folder.mkdir(exist_ok=True)
    held = folder.with_name(f"{folder.name}.held")
    shutil.copytree(folder, held)
    size += sum(p.stat().st_size for p in held.rglob("*") if p.is_file()) + (1 << 16)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    subprocess.run(mount, check=True)
    try:
        shutil.copytree(held, folder, dirs_exist_ok=True)
        yield
        shutil.rmtree(held)
        shutil.copytree(folder, held)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        shutil.rmtree(folder)
        held.rename(folder)


def _again(work: Work, folder: Path) -> list[str]:
    """Return the command with which a user goes on."""
    out = folder / work.gives
    begun = epochs(out) or (out / INTERRUPTED).is_file()
    return [*work.argv, *work.goes_on] if work.goes_on and begun else work.argv


def _lost(work: Work, folder: Path) -> int:
    """Count the checkpoint intervals between the last epoch done and the last one kept."""
    out = folder / work.gives
    if not work.goes_on or not (out / "metrics.csv").is_file() or (out / INTERRUPTED).is_file():
        return 0
    with open(out / "metrics.csv", newline="") as handle:
        done = max((int(row["epoch"]) for row in csv.DictReader(handle)), default=0)
    every = int(work.argv[work.argv.index("--checkpoint") + 1]) if (
        "--checkpoint" in work.argv) else 1  # fmt: skip
    return (done - max(epochs(out), default=0)) // every


def disturb(
    work: Work,
    stage: Path,
    known: tuple[dict[str, str], float, int],
    seeds: range,
    place: Path,
    *,
    disk: bool,
) -> tuple[Counter[str], list[Finding]]:
    """Disturb a work once or a few times, then let it go on, once per seed.

    Returns
    -------
    counts
        Of "kills" (or "full": writes that failed), "ends": works that ended as undisturbed, to
        the last bit; and faults, among them "lost": more than a checkpoint interval.
    findings
        The faults.
    """
    counts: Counter[str] = Counter()
    findings: list[Finding] = []
    results, seconds, largest = known
    for seed in seeds:
        rng = np.random.default_rng([seed, disk])
        folder = place / f"{work.name.replace(' ', '_').replace(',', '')}.{disk}.{seed}"
        shutil.copytree(stage, folder)

        def fail(fault: str, found: Outcome, seed: int = seed) -> None:
            counts[fault.partition(" ")[0]] += 1
            findings.append(Finding(f"{work.name}, seed {seed}", fault, found.said[-1500:]))

        for _ in range(int(rng.integers(1, 4))):
            argv, limit = _again(work, folder), 60 + 20 * seconds
            if disk:
                room = int(np.exp(rng.uniform(np.log(64), np.log(1.2 * largest))))
                whole = rng.random() < 0.5 and CAN_MOUNT
                with _small_disk(folder / work.gives, 4 * room) if whole else nullcontext():
                    found = run(argv, folder, limit=limit, file_bytes=None if whole else room)
                if found.fault or found.code not in (0, 2):
                    fail(found.fault or f"exit {found.code}", found)
                counts["full"] += found.code == 2
            else:
                signum = rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT])
                after = float(rng.uniform(0, 1.05 * seconds))
                found = run(argv, folder, limit=limit, kill_after=after, signum=signum)
                ended = found.code in (0, -signum, 128 + signum)
                if "Traceback" in found.said or not ended:
                    fail(f"exit {found.code}", found)
                counts["kills"] += found.code != 0
            if _lost(work, folder) > 1:
                fail("lost", found)
            if found.code == 0:
                break
        else:
            for _ in range(_MOST_TRIES):
                found = run(_again(work, folder), folder, limit=60 + 20 * seconds)
                if found.fault or found.code == 0:
                    break
        if found.code or found.fault:
            fail(found.fault or f"exit {found.code}", found)
        else:
            now = digest(folder / work.gives, folder)
            changed = {n for n in results.keys() | now.keys() if results.get(n) != now.get(n)}
            counts["ends"] += not changed
            if changed:
                fail(f"corrupted ({', '.join(sorted(changed))[:120]})", found)
        shutil.rmtree(folder)
    return counts, findings
