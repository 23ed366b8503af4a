"""Compare finished runs of the same particles: neighbours, alignment, clusters, volumes.

Runs of train_amort, train_vae and train_dec can be compared with each other. Give two runs that
differ in nothing but --seed as well: only agreement below theirs is a difference.

Example usage
-------------
$ cryodrgn compare_amort outs/baseline outs/baseline-seed1 outs/vlt

# Latents alone, and the numbers as a file
$ cryodrgn compare_amort outs/baseline outs/vlt --volumes 0 -o agreement.json

"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add our flags."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="Run folders")
    parser.add_argument(
        "--epoch", type=int, help="Epoch of all runs (default: each run's latest complete one)"
    )
    parser.add_argument(
        "-o", "--output", type=os.path.abspath, help="Also write the numbers to this .json file"
    )
    parser.add_argument(
        "--volumes",
        type=int,
        default=20,
        help="Number of particles whose decoded volumes are compared (default: %(default)s)",
    )
    parser.add_argument(
        "--clusters", type=int, default=10, help="k of the k-means (default: %(default)s)"
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=200,
        help="Rounds of the bootstrap behind the intervals (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="Random seed (default: %(default)s)")


def main(args: argparse.Namespace) -> None:
    """Compare."""
    from cryodrgn_amort.compare import CompareOptions, compare, summary, write
    from cryodrgn_amort.files import check_place
    from cryodrgn_amort.plugins import load_plugins
    from cryodrgn_amort.runs import load_run

    if args.output:
        check_place(args.output, folder=False)
    options = CompareOptions(args.volumes, args.clusters, args.bootstrap, args.seed)
    runs = [load_run(folder, load_plugins(), args.epoch) for folder in args.runs]
    found = compare(runs, options)
    print(summary(found))
    if args.output:
        write(found, args.output)
