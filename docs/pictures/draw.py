"""Draw the pictures of the tutorial from what the quickstart has made.

bash examples/quickstart.sh && python docs/pictures/draw.py quickstart
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from sklearn.decomposition import PCA

from cryodrgn_amort.core import read_pickle, read_z

mpl.use("svg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.family": "sans-serif"})
from matplotlib import pyplot as plt  # noqa: E402

SHOWN = 500


def main(folder: Path) -> None:
    """Draw latents before and after particles are moved by a pixel."""
    run = folder / "baseline"
    (report,) = run.glob("amort.*")
    before, after = (
        read_z(path, "RUN")[0] for path in (run / "z.pkl", report / "z.roll-1.held.pkl")
    )
    labels = np.asarray(read_pickle(folder / "data/labels.pkl", "labels"))
    labels = labels[np.asarray(read_pickle(run / "ind_train.pkl", "RUN"))]
    some = np.random.default_rng(0).permutation(len(before))[:SHOWN]
    components = PCA(2).fit(before)
    figure, both = plt.subplots(1, 2, figsize=(7, 3.4), sharex=True, sharey=True)
    titles = "particles", "the same, moved by 1 pixel"
    for axes, z, title in zip(both, (before, after), titles, strict=True):
        points = components.transform(z)[some].round(2)
        for label in np.unique(labels):
            axes.plot(*points[labels[some] == label].T, ".", markersize=5, color=f"C{label}")
        axes.set(title=title, xticks=[], yticks=[], xlabel="PC 1")
    both[0].set_ylabel("PC 2")
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "moved.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
