"""Add what eval_amort found of each particle to the .star or .cs file that the particles are from.

The copy has the file's own rows and columns as they are, at the original resolution, and a further
column per score: in .star files amortTrust, amortGap, ... (RELION keeps labels that it does not
know), in .cs files amort/trust, ... Particles that the run did not have get nan.

Example usage
-------------
# All scores that are known; the run's latest evaluation
$ cryodrgn scores_amort outs/baseline J42/run_data.star -o scored.star

# Only particles that can be trusted, and trust where RELION can select by it
$ cryodrgn scores_amort outs/baseline/amort.50 run_data.star -o stable.star \
                        --ind outs/baseline/amort.50/ind_stable.pkl \
                        --as rlnParticleFigureOfMerit=trust

# For cryoSPARC
$ cryodrgn scores_amort outs/baseline J42_particles.cs -o scored.cs --columns trust gap

"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("eval", metavar="EVAL", help="Folder of eval_amort, or RUN: its latest one")
    parser.add_argument(
        "particles",
        metavar="PARTICLES",
        help="Particles of the stack that was trained on, in its order (.star, .cs)",
    )
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="The copy")
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME",
        help="Columns of EVAL/trust.csv (default: all that are known of any particle)",
    )
    parser.add_argument(
        "--as",
        dest="labels",
        nargs="+",
        default=[],
        metavar="LABEL=NAME",
        help="Also write a column under a label of your own",
    )
    parser.add_argument(
        "--ind", metavar="PKL", help="Copy these particles only (positions in the stack)"
    )


def main(args: argparse.Namespace) -> None:
    """Write the copy."""
    from cryodrgn_amort.errors import InputError
    from cryodrgn_amort.scores import add_scores, load_scores

    labels: dict[str, str] = {}
    for item in args.labels:
        label, equals, name = item.partition("=")
        if not (label and equals and name):
            raise InputError(f"--as {item}: LABEL=NAME is needed")
        labels[label.removeprefix("_")] = name
    rows, names = add_scores(
        load_scores(args.eval),
        args.particles,
        args.output,
        columns=args.columns,
        labels=labels,
        ind=args.ind,
    )
    print(f"{args.output}: {rows} rows, with {', '.join(names)}")
