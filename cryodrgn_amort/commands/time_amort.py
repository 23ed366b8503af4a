"""Time an epoch of several runs' configurations, side by side.

Every configuration trains anew for a few batches at a time, in turn, so that whatever else the
machine does meets them alike. Nothing of that training is kept.

Example usage
-------------
$ cryodrgn time_amort outs/baseline outs/vlt outs/twin

# Longer, and the numbers as a file
$ cryodrgn time_amort outs/baseline outs/vlt --rounds 20 --batches 100 -o times.json

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
        "-o", "--output", type=os.path.abspath, help="Also write the numbers to this .json file"
    )
    parser.add_argument(
        "--rounds", type=int, default=6, help="Turns of each run (default: %(default)s)"
    )
    parser.add_argument(
        "--batches", type=int, default=25, help="Batches in a turn (default: %(default)s)"
    )


def main(args: argparse.Namespace) -> None:
    """Time."""
    from cryodrgn_amort.files import check_place
    from cryodrgn_amort.plugins import load_plugins
    from cryodrgn_amort.runs import load_run
    from cryodrgn_amort.timing import TimingOptions, summary, time_epochs, write

    options = TimingOptions(args.rounds, args.batches)
    if args.output:
        check_place(args.output, folder=False)
    seconds = time_epochs([load_run(run, load_plugins()) for run in args.runs], options)
    print(summary(seconds))
    if args.output:
        write(seconds, args.output)
