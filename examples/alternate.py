"""How much do trainings find after how long? Of runs on simulated particles, side by side.

    python examples/alternate.py data turns=alternate vae=train_vae table=vlt -o alternate.svg

RUN=NAME are run folders with all their checkpoints, trained one after the other, and what to call
them; ``data`` is the folder that simulate_amort wrote. Prints class_knn of every checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np

from cryodrgn_amort.core import epochs, read_pickle, read_z
from cryodrgn_amort.measures import Neighbours, class_knn

mpl.use("svg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.family": "sans-serif"})
from matplotlib import pyplot as plt  # noqa: E402


def minutes(run: Path, epoch: int) -> float:
    """Return after how many minutes of training a checkpoint was written."""
    begun, written = run / "config.yaml", run / f"z.{epoch}.pkl"
    return (written.stat().st_mtime - begun.stat().st_mtime) / 60


def main() -> None:
    """Draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", nargs="+", metavar="RUN=NAME")
    parser.add_argument(
        "--attainable", type=float, help="what the data allow, by eval_amort --truth"
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    labels = np.asarray(read_pickle(args.data / "labels.pkl", "data"))
    kept = np.asarray(read_pickle(args.data / "ind_train.pkl", "data"))
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for given in args.runs:
        folder, _, name = given.partition("=")
        run, found = Path(folder), []
        for epoch in epochs(run):
            z, _ = read_z(run / f"z.{epoch}.pkl", "RUN")
            near = Neighbours(z, np.arange(len(z)))
            share = float(class_knn(near.own, labels[kept], near.rows).mean())
            found.append((minutes(run, epoch), share))
            print(f"{name}, epoch {epoch}: {minutes(run, epoch):.1f} min, class_knn {share:.3f}")
        axes.plot(*zip(*found, strict=True), ".-", label=name)
    if args.attainable:
        axes.axhline(args.attainable, color="gray", linestyle="--", label="what the data allow")
    guess = np.bincount(labels[kept]).max() / len(kept)
    axes.axhline(guess, color="gray", linestyle=":", label="guessing")
    axes.set(xlabel="minutes of training on two cores", ylabel="class_knn", ylim=(0, 1))
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(args.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
