"""How well does validate_amort answer, where the truth is known?

Simulates particles under conditions that it must tell, trains a table, validates it, and writes
what was answered beside the truth:

    python examples/validate.py -o validate --seeds 0 1 2 [CONDITION ...]

What is done already is not done again. Ends with validate/validate.json and validate.md of all that
is there. Five to ten minutes per condition on one core.
"""

from __future__ import annotations

import argparse
import csv
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from scipy.stats import rankdata

from cryodrgn_amort.core import epochs
from cryodrgn_amort.host import write_mrc
from cryodrgn_amort.measures import Neighbours, class_knn
from cryodrgn_amort.study.validation.verdict import corrected

N, D = 2000, 32
SHARE = 0.15  # of the particles, where some are replaced
ONE = {"classes": 1, "hinge_deg": 0}


@dataclass(frozen=True)
class Condition:
    """What is changed of 2,000 particles of 32 px with white noise, SNR 0.3, right poses."""

    title: str
    simulate: dict[str, object] = field(default_factory=dict)
    epochs: int = 25
    pose_error_deg: float = 0.0  # rms, of angles about random axes
    replaced: str = ""  # "noise", "other", "right", "mirror"


CONDITIONS = {
    "good": Condition("SNR 0.3"),
    "snr0.05": Condition("SNR 0.05", {"snr": 0.05}),
    "one": Condition("one structure, SNR 0.3", ONE),
    "one0.1": Condition("one structure, SNR 0.1", {**ONE, "snr": 0.1}),
    "epochs3": Condition("3 of 25 epochs", epochs=3),
    "epochs8": Condition("8 of 25 epochs", epochs=8),
    "poses2": Condition("poses off by 2 degrees", pose_error_deg=2),
    "poses5": Condition("poses off by 5 degrees", pose_error_deg=5),
    "poses10": Condition("poses off by 10 degrees", pose_error_deg=10),
    "noise": Condition("15 % noise", replaced="noise"),
    "other": Condition("15 % another molecule, poses wrong", replaced="other"),
    "right": Condition("15 % another molecule, poses right", replaced="right"),
    "mirror": Condition("15 % turned to their mirror image", replaced="mirror"),
}


def _run(folder: Path, *argv: object) -> None:
    """Run a command of ours; what it says goes to the log."""
    command = [sys.executable, "-m", "cryodrgn_amort", *map(str, argv)]
    with open(folder / "log", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}, see {folder / 'log'}")


def _simulate(folder: Path, out: Path, seed: int, **flags: object) -> Path:
    given = [
        part
        for name, value in flags.items()
        for part in (f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}", value)
    ]
    _run(folder, "simulate_amort", "-o", out, "--overwrite", "--seed", seed, *given)
    return out


def _read(path: Path) -> np.ndarray:
    with open(path, "rb") as handle:
        return pickle.load(handle)


def _write(path: Path, value: object) -> Path:
    with open(path, "wb") as handle:
        pickle.dump(value, handle)
    return path


def _images(data: Path, count: int) -> np.ndarray:
    """Return the particles, `(count, D, D)`, as they are in the file: what is set is written."""
    path = data / "particles.mrcs"
    start = path.stat().st_size - 4 * count * D**2
    return np.memmap(path, np.float32, "r+", start, (count, D, D))


def _wrong_poses(data: Path, error_deg: float, seed: int) -> Path:
    """Turn every pose about an axis of its own."""
    rots, shifts = _read(data / "poses.pkl")
    turns = np.random.default_rng([seed, 2]).standard_normal((len(rots), 3)) / np.sqrt(3)
    wrong = Rotation.from_rotvec(turns * np.deg2rad(error_deg)).as_matrix() @ rots
    return _write(data / "wrong.pkl", (wrong.astype(np.float32), shifts))


def _another(path: Path, seed: int) -> Path:
    """Write a volume of blobs at random places."""
    rng, volume = np.random.default_rng([seed, 3]), np.zeros((D, D, D))
    places = rng.standard_normal((40, 3))
    places *= rng.uniform(0, 0.3 * D, (40, 1)) / np.linalg.norm(places, axis=1, keepdims=True)
    np.add.at(volume, tuple((places + D / 2).round().astype(int).T), 1.0)
    write_mrc(str(path), gaussian_filter(volume, 1.2).astype(np.float32), Apix=192 / D)
    return path


def _replace(folder: Path, condition: Condition, seed: int) -> np.ndarray:
    """Replace a share of the particles; returns which, `(N,)` bool."""
    data, rng = folder / "data", np.random.default_rng([seed, 4])
    rows = np.sort(rng.permutation(N)[: round(SHARE * N)])
    images = _images(data, N)
    if condition.replaced == "noise":
        for row in rows:
            images[row] = rng.permutation(images[row].ravel()).reshape(D, D)
    elif condition.replaced == "mirror":  # turned over in x, about the pixel in the middle
        images[rows] = np.roll(images[rows, :, ::-1], 1, 2)
    else:
        (rots, shifts), ctf = _read(data / "poses.pkl"), _read(data / "ctf.pkl")
        flags: dict[str, object] = {
            "n": len(rows), "snr": 0.3, "volumes": _another(folder / "another.mrc", seed),
            "ctf": _write(folder / "ctf.pkl", ctf[rows]),
        }  # fmt: skip
        if condition.replaced == "right":
            flags["poses"] = _write(folder / "poses.pkl", (rots[rows], shifts[rows]))
        others = _images(_simulate(folder, folder / "others", seed + 100, **flags), len(rows))
        images[rows] = others * (images.std() / others.std())
    chosen = np.zeros(N, bool)
    chosen[rows] = True
    return chosen


def _area(worse: np.ndarray, chosen: np.ndarray) -> float:
    """Return the area under the curve: how often a chosen one is worse than another."""
    ranks, count = rankdata(worse), chosen.sum()
    return float((ranks[chosen].sum() - count * (count + 1) / 2) / (count * (len(chosen) - count)))


def _by_epoch(out: Path, labels: np.ndarray) -> dict[int, float]:
    """Return class_knn of each checkpoint of a half."""
    run, found = out / "runs/half0", {}
    kept = labels[_read(out / "halves/half0.pkl")]
    for epoch in epochs(run):
        z = _read(run / f"z.{epoch}.pkl")
        near = Neighbours(z, np.arange(len(z)))
        found[epoch] = float(class_knn(near.own, kept, near.rows).mean())
    return found


def measure(name: str, seed: int, folder: Path) -> dict[str, object]:
    """Simulate, train and validate one condition; returns what was answered."""
    condition = CONDITIONS[name]
    folder.mkdir(parents=True, exist_ok=True)
    data, table, out = folder / "data", folder / "vlt", folder / "valid"
    if not (table / "z.pkl").exists():
        _simulate(folder, data, seed, **{"n": N, "D": D, "snr": 0.3, **condition.simulate})
        poses, chosen = data / "poses.pkl", np.zeros(N, bool)
        if condition.pose_error_deg:
            poses = _wrong_poses(data, condition.pose_error_deg, seed)
        if condition.replaced:
            chosen = _replace(folder, condition, seed)
        _write(folder / "replaced.pkl", chosen)
        _run(folder, "train_amort", data / "particles.mrcs", "--poses", poses, "--ctf",
             data / "ctf.pkl", "--zdim", 8, "--lr", 1e-3, "--encoder", "vlt", "--dec-dim", 64,
             "-n", condition.epochs, "--seed", seed, "--no-analysis", "-o", table,
             "--overwrite")  # fmt: skip
    _run(folder, "validate_amort", table, "-o", out, "--seed", seed)
    facts = json.loads((out / "validation.json").read_text())
    found: dict[str, object] = {
        "said": {a["question"]: [a["said"], a["do"]] for a in facts["answers"]},
        "by_epoch": _by_epoch(out, np.asarray(_read(data / "labels.pkl"))),
        **facts["parts"],
    }
    chosen = _read(folder / "replaced.pkl")
    if chosen.any():
        with open(out / "trust.csv", newline="") as handle:
            rows = [row for row in csv.DictReader(handle) if row["misfit_p"]]
        of = np.array([int(row["particle"]) for row in rows])
        p = np.array([float(row["misfit_p"]) for row in rows])
        path = out / "ind_misfit.pkl"
        told = np.asarray(_read(path)) if path.exists() else np.empty(0, int)
        found["area"] = _area(-p, chosen[of])
        found["told"] = [len(told), int(chosen[told].sum())]
    return found


def _interval(m: dict[str, float]) -> str:
    return f"{m['value']:.2f} ({m['low']:.2f} to {m['high']:.2f})"


def _row(name: str, seed: str, r: dict) -> str:
    said = {question: answer for question, (answer, _) in r["said"].items()}
    is_het, in_particles, long, right, misfits, _ = said.values()
    gains = r["gain"]["gain"]
    halves = ", ".join(f"{m['value']:.1f}" for k, m in gains.items() if "null" not in k)
    agree = ", ".join(f"{m['halves_agreement']['value']:.2f}"
                      for m in r["gain"]["agreement"].values())  # fmt: skip
    value, low, high = corrected(r["poses"])
    best, m = r["epochs"]["best"], r["misfits"]
    lost = max(r["by_epoch"].values()) - r["by_epoch"][str(best)]
    cells = [
        f"{CONDITIONS[name].title} ({seed})",
        f"{is_het}: {halves}; null {gains['null0']['value']:.1f}; {agree}",
        f"{in_particles}: {_interval(r['maps']['map_agreement'])}; "
        f"random {r['maps']['map_agreement_random']['value']:.2f}",
        f"{long}; {best} ({lost:.3f} lost)",
        f"{right}: {value:.1f} ({low:.1f} to {high:.1f})",
        f"{misfits}: {100 * m['below']:.0f} %"
        + (f"; area {r['area']:.3f}, {r['told'][1]} of {r['told'][0]}" if "area" in r else ""),
    ]
    return f"| {' | '.join(cells)} |"


def write(out: Path) -> None:
    """Write all that is there, and a table of it."""
    lines = ["| particles (seed) | heterogeneity? gain; halves | volumes? maps | long enough? epoch"
             " | poses right? degrees | misfits? |", "|---|---|---|---|---|---|"]  # fmt: skip
    found = {}
    for name in CONDITIONS:
        for path in sorted(out.glob(f"{name}.seed*/result.json")):
            found[path.parent.name] = json.loads(path.read_text())
            seed = path.parent.name.rpartition("seed")[2]
            lines.append(_row(name, seed, found[path.parent.name]))
    (out / "validate.json").write_text(json.dumps(found, indent=1))
    (out / "validate.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Measure what was asked for, and write what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--outdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("conditions", nargs="*", metavar="CONDITION",
                        help=f"Of {', '.join(CONDITIONS)} (default: all)")  # fmt: skip
    args = parser.parse_args()
    if unknown := set(args.conditions) - set(CONDITIONS):
        parser.error(f"{min(unknown)}: not one of {', '.join(CONDITIONS)}")
    for seed in args.seeds:
        for name in args.conditions or CONDITIONS:
            folder = args.outdir / f"{name}.seed{seed}"
            if not (folder / "result.json").exists():
                found = measure(name, seed, folder)
                (folder / "result.json").write_text(json.dumps(found, indent=1))
                shutil.rmtree(folder / "valid/maps", ignore_errors=True)
    write(args.outdir)


if __name__ == "__main__":
    main()
