"""Where does an encoder that was trained on images made up (``--from``) stop working?

Simulates particles under worse and worse conditions, trains a table and the encoder ``anchored``
for its decoder, and writes what both find, and what the evaluation says without knowing the truth:

    python examples/limits.py -o limits [CONDITION ...]

What is done already is not done again. Ends with limits/limits.json, limits.md and limits.svg of
all that is there. Two to twelve minutes per condition on one core.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation
from scipy.stats import vonmises_fisher

from cryodrgn_amort.measures import Neighbours, knn_labels
from cryodrgn_amort.report.verdict import GAIN_BOUNDS

HELD_OUT = 400
IMAGES = 200_000  # made up, for each encoder


@dataclass(frozen=True)
class Condition:
    """What is changed of 2,000 particles of 32 px with white noise, SNR 0.3, right poses."""

    group: str
    title: str
    n: int = 2000
    simulate: dict[str, object] = field(default_factory=dict)
    epochs: int = 25
    pose_error_deg: float = 0.0
    concentration: float = 0.0  # of the views about one of them (von Mises-Fisher); 0: uniform


def _conditions() -> dict[str, Condition]:
    found = {"base": Condition("SNR and particles", "SNR 0.3, 2,000 particles")}
    for snr in (0.1, 0.05):
        found[f"snr{snr}"] = Condition(
            "SNR and particles", f"SNR {snr}, 2,000 particles", simulate={"snr": snr}
        )
    for n in (1000, 5000, 20000):
        for snr in (0.3, 0.1, 0.05):
            found[f"n{n}snr{snr}"] = Condition(
                "SNR and particles", f"SNR {snr}, {n:,} particles", n=n,
                simulate={"snr": snr}, epochs=10 if n > 10_000 else 25,
            )  # fmt: skip
    for snr in (0.3, 0.1):
        found[f"box64snr{snr}"] = Condition(
            "box", f"64 px, SNR {snr}", simulate={"snr": snr, "D": 64}
        )
    for snr in (0.3, 0.1):
        found[f"coloured{snr}"] = Condition(
            "coloured noise", f"coloured noise, SNR {snr}",
            simulate={"snr": snr, "noise": "coloured"},
        )  # fmt: skip
    for epochs in (1, 3, 8):
        found[f"epochs{epochs}"] = Condition(
            "epochs of the decoder", f"{epochs} of 25 epochs", epochs=epochs
        )
    for angle in (1, 2, 5, 10):
        found[f"poses{angle}"] = Condition(
            "wrong poses", f"poses off by {angle}°", pose_error_deg=angle
        )
    for kappa in (2, 10):
        found[f"views{kappa}"] = Condition(
            "views", f"views about one axis, kappa {kappa}", concentration=kappa
        )
    return found


CONDITIONS = _conditions()


def _run(folder: Path, *argv: object) -> None:
    """Run a command of ours; what it says goes to the log."""
    command = [sys.executable, "-m", "cryodrgn_amort", *map(str, argv)]
    with open(folder / "log", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}, see {folder / 'log'}")


def _read(path: Path) -> np.ndarray:
    with open(path, "rb") as handle:
        return pickle.load(handle)


def _write(path: Path, value: object) -> Path:
    with open(path, "wb") as handle:
        pickle.dump(value, handle)
    return path


def _views(path: Path, condition: Condition, seed: int) -> Path:
    """Write poses whose views gather about one direction; shifts as simulate_amort's."""
    rng = np.random.default_rng([seed, 1])
    total = condition.n + HELD_OUT
    axis = np.array([0.6, 0.0, 0.8])
    third = vonmises_fisher(axis, condition.concentration).rvs(total, random_state=rng)
    first = np.cross(np.array([0.0, 1.0, 0.0]), third)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    view = np.stack([first, np.cross(third, first), third], 1)
    turn = Rotation.from_euler("z", rng.uniform(0, 360, (total, 1)), degrees=True).as_matrix()
    shifts = rng.uniform(-1.5, 1.5, (total, 2)) / 32
    return _write(path, ((turn @ view).astype(np.float32), shifts.astype(np.float32)))


def _wrong_poses(folder: Path, error_deg: float, seed: int) -> Path:
    """Turn every pose by an angle about an axis of its own."""
    rots, shifts = _read(folder / "data/poses.pkl")
    rng = np.random.default_rng([seed, 2])
    axes = rng.standard_normal((len(rots), 3))
    axes *= np.deg2rad(error_deg) / np.linalg.norm(axes, axis=1, keepdims=True)
    wrong = (Rotation.from_rotvec(axes).as_matrix() @ rots).astype(np.float32)
    return _write(folder / "wrong.pkl", (wrong, shifts))


def measure(name: str, seed: int, folder: Path) -> dict[str, float]:
    """Simulate, train and evaluate one condition; returns its numbers."""
    condition = CONDITIONS[name]
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    flags = {"n": condition.n, "heldout": HELD_OUT, "D": 32, "snr": 0.3, "seed": seed}
    flags |= condition.simulate
    if condition.concentration:
        flags["poses"] = _views(folder / "views.pkl", condition, seed)
    given = [part for k, v in flags.items() for part in (f"-{k}" if len(k) == 1 else f"--{k}", v)]
    _run(folder, "simulate_amort", "-o", data, "--overwrite", *given)
    poses = data / "poses.pkl"
    if condition.pose_error_deg:
        poses = _wrong_poses(folder, condition.pose_error_deg, seed)
    table, network = folder / "vlt", folder / "anchored"
    common = ("--seed", seed, "--no-analysis", "--overwrite", "--checkpoint", 10_000)
    _run(folder, "train_amort", data / "particles.mrcs", "--poses", poses, "--ctf",
         data / "ctf.pkl", "--holdout", data / "ind_heldout.pkl", "--zdim", 8, "--lr", 1e-3,
         "--encoder", "vlt", "--dec-dim", 64, "-n", condition.epochs, "-o", table,
         *common)  # fmt: skip
    _run(folder, "train_amort", "--from", table, "--encoder", "anchored",
         "-n", -(-IMAGES // condition.n), "-o", network, *common)  # fmt: skip
    found: dict[str, float] = {}
    for run in (table, network):
        out = folder / f"eval.{run.name}"
        _run(folder, "eval_amort", run, "--truth", data, "--transform", "--no-umap", "--maps", 0,
             "--bootstrap", 200, "--fit", 0 if run is table else 8, "-o", out)  # fmt: skip
        facts = json.loads((out / "amortization.json").read_text())
        wanted = ("class_knn", "coordinate_r2", "volume_fve", "noise_swap_signal",
                  "noise_swap_noise", "coverage_80", "gain_ratio", "class_knn_held_out",
                  "coordinate_r2_held_out")  # fmt: skip
        measures = facts["measures"]
        found |= {f"{run.name}.{m}": measures[m]["value"] for m in wanted if m in measures}
        if "gain_ratio" in measures:
            found |= {f"gain_ratio_{end}": measures["gain_ratio"][end] for end in ("low", "high")}
    found["shells_that_part"] = len(json.loads((network / "noise.json").read_text())[
        "shells_that_part"])  # fmt: skip
    trained, held = _read(table / "ind_train.pkl"), _read(table / "ind_heldout.pkl")
    out = folder / "held"
    _run(folder, "infer_amort", table, "--held-out", "--start", "anchors", "--steps", 0, "-o", out,
         "--overwrite")  # fmt: skip
    near = Neighbours(_read(table / "z.pkl"), np.arange(0)).of(_read(out / "z.pkl"))
    told = knn_labels(near, _read(data / "labels.pkl")[trained])
    found["anchors.class_knn_held_out"] = float((told == _read(data / "labels.pkl")[held]).mean())
    return found


COLUMNS = {
    "vlt.class_knn": "table: class_knn",
    "anchored.class_knn": "`anchored`: class_knn",
    "anchored.class_knn_held_out": "held out",
    "anchored.coordinate_r2_held_out": "held out: coordinate_r2",
    "anchors.class_knn_held_out": "no training: held out",
    "anchored.volume_fve": "volume_fve",
    "anchored.noise_swap_signal": "noise_swap_signal",
    "anchored.coverage_80": "coverage_80",
    "gain_ratio": "gain_ratio",
    "warned": "warned",
}


def write(found: dict[str, list[dict[str, float]]], out: Path) -> None:
    """Write all numbers, a table and a figure."""
    (out / "limits.json").write_text(json.dumps(found, indent=1))
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, rows in found.items():
        cells = []
        for column in COLUMNS:
            cells.append(", ".join(_cell(row, column) for row in rows))
        lines.append(f"| {CONDITIONS[name].title} | " + " | ".join(cells) + " |")
    (out / "limits.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    _draw(found, out / "limits.svg")


def _cell(row: dict[str, float], column: str) -> str:
    low, high = row.get("gain_ratio_low", np.nan), row.get("gain_ratio_high", np.nan)
    if column == "gain_ratio":  # none: the encoder does not read even images made up
        ratio = row.get("anchored.gain_ratio")
        return "–" if ratio is None else f"{ratio:.2f} ({low:.2f} to {high:.2f})"
    if column == "warned":  # by the report, by the training
        by = ["gain"] * (high < GAIN_BOUNDS[0] or low > GAIN_BOUNDS[1])
        by += ["shells"] * (row["shells_that_part"] > 0)
        return " and ".join(by) or "no"
    return f"{row[column]:.2f}" if column in row else "–"


def _draw(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "limits", "svg.fonttype": "none"}
    import matplotlib.pyplot as plt

    names = list(found)[::-1]
    y = np.arange(len(names))
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(9, 1 + 0.27 * len(names)), width_ratios=(3, 1.4)
    )
    for column, label, marker in (
        ("vlt.class_knn", "table, training", "|"),
        ("anchored.class_knn", "anchored, training", "o"),
        ("anchored.class_knn_held_out", "anchored, held out", "x"),
    ):
        means = [np.mean([row[column] for row in found[name]]) for name in names]
        left.plot(means, y, marker, label=label, fillstyle="none", markersize=7)
    right.axvspan(*GAIN_BOUNDS, color="0.9")
    for height, name in zip(y, names, strict=True):
        for row in (row for row in found[name] if "anchored.gain_ratio" in row):
            right.plot([row["gain_ratio_low"], row["gain_ratio_high"]], [height, height], "0.5")
            right.plot(row["anchored.gain_ratio"], height, "k.")
    left.set_yticks(y, [CONDITIONS[name].title for name in names])
    left.set_xlabel("class_knn (null 0.2)")
    right.set_xlabel("gain_ratio")
    left.set_xlim(0.15, 1.02)
    left.grid(axis="y", color="0.9")
    right.grid(axis="y", color="0.9")
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


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
    for name in args.conditions or CONDITIONS:
        for seed in args.seeds:
            folder = args.outdir / f"{name}.seed{seed}"
            if not (folder / "result.json").exists():
                found = measure(name, seed, folder)
                (folder / "result.json").write_text(json.dumps(found, indent=1))
    done: dict[str, list[dict[str, float]]] = {}
    for name in CONDITIONS:
        for path in sorted(args.outdir.glob(f"{name}.seed*/result.json")):
            done.setdefault(name, []).append(json.loads(path.read_text()))
    write(done, args.outdir)


if __name__ == "__main__":
    main()
