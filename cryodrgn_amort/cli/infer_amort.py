"""Fit latents particle by particle with the decoder of a run: for its own particles, or new ones.

An encoder answers in one go, and a table has no answer for a particle that it does not hold. Here
mean and log variance of each particle are optimised until its own ELBO stops improving; of more
than 500 particles, for a few steps unless --steps says more. The result is a run like any other (a
table, with the decoder of RUN): analyze, eval_vol, the dashboard and our own commands open it. By
how much the ELBO is better than the encoder's is the amortization gap.

Example usage
-------------
# New particles
$ cryodrgn infer_amort outs/vlt new.mrcs --poses new_pose.pkl --ctf new_ctf.pkl -o outs/new
$ cryodrgn analyze outs/new 50

# What the encoder lacks on its own particles, and on those that were held out
$ cryodrgn infer_amort outs/baseline -o outs/baseline.fitted
$ cryodrgn infer_amort outs/baseline --held-out -o outs/baseline.held-out

# Nothing fitted: the encoder alone, or `--start anchors`, others' latents weighted by likelihood
$ cryodrgn infer_amort outs/anchored new.mrcs --poses new_pose.pkl --ctf new_ctf.pkl -o new \
                       --start encoder --steps 0

# From a start of your choice, by the KL weight that the noise in the images implies
$ cryodrgn infer_amort outs/baseline --start prior mean --beta implied -o outs/fitted

# In several processes that share the particles: one per GPU, or per CPU socket
$ torchrun --nproc-per-node 4 -m cryodrgn_amort infer_amort outs/vlt -o outs/fitted

"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryodrgn_amort.options import InferOptions, add_flags
from cryodrgn_amort.plugins import load_plugins

if TYPE_CHECKING:
    import argparse


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add RUN, --epoch and -o, and the flags of ``InferOptions``."""
    parser.add_argument(
        "run", metavar="RUN", help="Run folder of train_amort, train_vae, train_dec"
    )
    parser.add_argument("-o", "--outdir", metavar="OUT", required=True, help="Output folder")
    parser.add_argument("--epoch", type=int, metavar="N", help="Epoch (default: the latest one)")
    add_flags(parser, InferOptions)


def main(args: argparse.Namespace) -> None:
    """Fit, write, and print the main numbers."""
    from cryodrgn_amort.core import join
    from cryodrgn_amort.inference import infer_run, inferred_summary
    from cryodrgn_amort.runs import load_run

    options = InferOptions.of(args)
    run = load_run(args.run, load_plugins(), args.epoch)
    processes = join()
    found = infer_run(run, options, args.outdir, processes)
    if found is not None:
        print(inferred_summary(found))
        print(f"Latents: {args.outdir}")
    processes.end_process()
