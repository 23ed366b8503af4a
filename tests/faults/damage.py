"""Files with bits flipped, ends cut off and pieces moved; and what a command makes of them."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryodrgn_amort.core import CHECKSUMS
from faults.trials import digest, run

if TYPE_CHECKING:
    from pathlib import Path

    from faults.stage import Scene


def mutated(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Damage the content of a file in one of the ways in which files are; says in which."""
    ways = (_flip, _overwrite, _cut, _insert, _repeat, _blank, _empty)
    way = ways[rng.choice(len(ways), p=(0.35, 0.2, 0.15, 0.1, 0.1, 0.08, 0.02))]
    return way.__name__[1:], way(bytearray(data), rng)


def _place(data: bytearray, rng: np.random.Generator) -> int:
    """Choose a byte, near the beginning more often: headers are there."""
    most = len(data) if rng.random() < 0.5 else min(len(data), 1100)
    return int(rng.integers(max(most, 1)))


def _flip(data: bytearray, rng: np.random.Generator) -> bytes:
    for _ in range(int(rng.choice((1, 1, 1, 8)))):
        if data:
            data[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(data)


def _overwrite(data: bytearray, rng: np.random.Generator) -> bytes:
    at, length = _place(data, rng), int(rng.choice((1, 2, 4, 8)))
    values = rng.choice((0, 0x7F, 0x80, 0xFF, int(rng.integers(256))), length)
    data[at : at + length] = values.astype(np.uint8).tobytes()
    return bytes(data)


def _cut(data: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(data[: _place(data, rng)])


def _insert(data: bytearray, rng: np.random.Generator) -> bytes:
    at = _place(data, rng)
    data[at:at] = rng.bytes(int(rng.integers(1, 64)))
    return bytes(data)


def _repeat(data: bytearray, rng: np.random.Generator) -> bytes:
    start, at = _place(data, rng), _place(data, rng)
    data[at:at] = data[start : start + int(rng.integers(1, 256))]
    return bytes(data)


def _blank(data: bytearray, rng: np.random.Generator) -> bytes:
    """Fill a piece with zeros: a block that never reached the disk."""
    at, length = _place(data, rng), int(rng.choice((16, 512, 4096)))
    data[at : at + length] = bytes(len(data[at : at + length]))
    return bytes(data)


def _empty(data: bytearray, rng: np.random.Generator) -> bytes:
    return b""


_LONGEST = 400.0  # seconds; a study whose first step is damaged does everything again


@dataclass(frozen=True)
class Finding:
    """A fault that was not caught: what was done, and what was said."""

    what: str
    fault: str
    said: str


def damage(
    scene: Scene,
    stage: Path,
    expected: tuple[dict[str, str], float],
    seeds: range,
    work: Path,
) -> tuple[Counter[str], list[Finding]]:
    """Run a scene once per seed, each time with another file damaged.

    Returns
    -------
    counts
        Of "refused": one line, exit code 2; "same": the results are as without damage, or were
        made anew; "taken": other numbers, which only what nobody vouches for may give; and faults.
    findings
        The faults.
    """
    counts: Counter[str] = Counter()
    findings = []
    results, _ = expected
    for seed in seeds:
        rng = np.random.default_rng(seed)
        folder = work / f"{scene.name.replace(' ', '_').replace(',', '')}.{seed}"
        shutil.copytree(stage, folder)
        files = sorted({p for pattern in scene.reads for p in folder.glob(pattern) if p.is_file()})
        path = files[rng.integers(len(files))]
        before = path.read_bytes()
        how, after = mutated(before, rng)
        path.write_bytes(after)
        vouched = scene.vouched
        if vouched and rng.random() < 0.3:  # as a run of the host's, or of an older version
            sums = path.with_name(CHECKSUMS)
            vouched = not sums.exists()
            sums.unlink(missing_ok=True)
        found = run(scene.argv, folder, limit=_LONGEST)
        fault = found.fault
        if fault is None and found.is_refused:
            verdict = "refused"
        elif fault is None:
            now = digest(folder / scene.gives, folder)
            own = str(path.relative_to(folder / scene.gives)) if (
                path.is_relative_to(folder / scene.gives)) else None  # fmt: skip
            changed = {n for n in results.keys() | now.keys() if results.get(n) != now.get(n)}
            verdict = "same" if not changed - {own} else "taken"
            if verdict == "taken" and vouched:
                fault = f"silent ({', '.join(sorted(changed))[:80]})"
        counts[verdict if fault is None else fault.partition(" ")[0]] += 1
        if fault is not None:
            what = f"{scene.name}: {path.relative_to(folder)}: {how}, seed {seed}"
            findings.append(Finding(what, fault, found.said[-1500:]))
        shutil.rmtree(folder)
    return counts, findings
