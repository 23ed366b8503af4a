"""Measure how far a run's encoder can be trusted: whether a changed image finds its place again.

Particles are rolled or turned, which leaves the molecule as it is, and encoded again. A report with
figures is written, with the numbers beside it (amortization.json, and .pkl files of values per
particle, which the dashboard can load).

Example usage
-------------
# The latest epoch of a run; the report is outs/baseline/amort.50/report.html
$ cryodrgn eval_amort outs/baseline

# Other transforms, into a folder of your own
$ cryodrgn eval_amort outs/baseline --transform roll:1 roll:5 rotate:90 rotate:180 \
                      -o outs/invariance

# With what is known of the particles
$ cryodrgn eval_amort outs/baseline --epoch 25 --labels labels.pkl --coordinate angle.pkl

# Of simulated particles, everything is known
$ cryodrgn eval_amort outs/baseline --truth data

# The run's inputs have moved since
$ cryodrgn eval_amort outs/baseline --particles particles.128.mrcs --poses pose.pkl --ctf ctf.pkl

# In several processes that share the encoding: one per GPU, or per CPU socket
$ torchrun --nproc-per-node 4 -m cryodrgn_amort eval_amort outs/baseline

"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryodrgn_amort.options import EvalOptions, add_flags
from cryodrgn_amort.plugins import load_plugins

if TYPE_CHECKING:
    import argparse


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add RUN, --epoch and -o, and the flags of ``EvalOptions``."""
    parser.add_argument("run", metavar="RUN", help="Run folder of train_amort or train_vae")
    parser.add_argument("--epoch", type=int, metavar="N", help="Epoch (default: the latest one)")
    parser.add_argument(
        "-o", "--outdir", metavar="OUT", help="Output folder (default: RUN/amort.EPOCH)"
    )
    add_flags(parser, EvalOptions)


def main(args: argparse.Namespace) -> None:
    """Evaluate, write, and print the main numbers."""
    from cryodrgn_amort.core import join
    from cryodrgn_amort.evaluation import assist, evaluate
    from cryodrgn_amort.report import check_outdir, evaluation_summary, write_evaluation
    from cryodrgn_amort.runs import load_run

    options = EvalOptions.of(args)
    run = load_run(args.run, load_plugins(), args.epoch)
    out = check_outdir(args.outdir or run.folder / f"amort.{run.epoch}")
    processes = join()
    if not processes.leads:
        assist(run, options, processes)
        processes.end_process()
        return
    evaluation = evaluate(run, options, processes)
    report = write_evaluation(evaluation, out)
    print(evaluation_summary(evaluation))
    print(f"Report: {report}")
    processes.end_process()
