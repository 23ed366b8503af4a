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


from cryodrgn_amort.options import ScoresOptions, add_flags


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``ScoresOptions``."""
    add_flags(parser, ScoresOptions)


def main(args: argparse.Namespace) -> None:
    """Write the copy."""
    from cryodrgn_amort.core import InputError
    from cryodrgn_amort.evaluation import add_scores, load_scores

    options = ScoresOptions.of(args)
    labels: dict[str, str] = {}
    for item in options.labels:
        label, equals, name = item.partition("=")
        if not (label and equals and name):
            raise InputError(f"--as {item}: LABEL=NAME is needed")
        labels[label.removeprefix("_")] = name
    rows, names = add_scores(
        load_scores(options.eval),
        options.particles,
        options.output,
        columns=options.columns,
        labels=labels,
        ind=options.ind,
    )
    print(f"{options.output}: {rows} rows, with {', '.join(names)}")
