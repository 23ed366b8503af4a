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

from cryodrgn_amort.options import TimingOptions, add_flags
from cryodrgn_amort.plugins import load_plugins


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add RUN and -o, and the flags of ``TimingOptions``."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="Run folders")
    parser.add_argument(
        "-o", "--output", type=os.path.abspath, help="Also write the numbers to this .json file"
    )
    add_flags(parser, TimingOptions)


def main(args: argparse.Namespace) -> None:
    """Time."""
    from cryodrgn_amort.core import check_place
    from cryodrgn_amort.runs import load_run
    from cryodrgn_amort.training import time_epochs, times_table, write_times

    options = TimingOptions.of(args)
    if args.output:
        check_place(args.output, folder=False)
    seconds = time_epochs([load_run(run, load_plugins()) for run in args.runs], options)
    print(times_table(seconds))
    if args.output:
        write_times(seconds, args.output)
