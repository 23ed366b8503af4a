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

from cryodrgn_amort.options import CompareOptions, add_flags
from cryodrgn_amort.plugins import load_plugins


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add RUN, --epoch and -o, and the flags of ``CompareOptions``."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="Run folders")
    parser.add_argument(
        "--epoch", type=int, help="Epoch of all runs (default: each run's latest complete one)"
    )
    parser.add_argument(
        "-o", "--output", type=os.path.abspath, help="Also write the numbers to this .json file"
    )
    add_flags(parser, CompareOptions)


def main(args: argparse.Namespace) -> None:
    """Compare."""
    from cryodrgn_amort.core import check_place
    from cryodrgn_amort.evaluation import compare, comparison_table, write_comparison
    from cryodrgn_amort.runs import load_run

    if args.output:
        check_place(args.output, folder=False)
    options = CompareOptions.of(args)
    found = compare([load_run(run, load_plugins(), args.epoch) for run in args.runs], options)
    print(comparison_table(found))
    if args.output:
        write_comparison(found, args.output)
