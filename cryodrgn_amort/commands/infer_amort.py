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

import argparse


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags; ``InferOptions`` has the defaults of those that are not given."""

    def add(to: argparse._ActionsContainer, *flags: str, **kwargs: object) -> None:
        to.add_argument(*flags, default=argparse.SUPPRESS, **kwargs)  # type: ignore[arg-type]

    parser.add_argument(
        "run", metavar="RUN", help="Run folder of train_amort, train_vae, train_dec"
    )
    add(parser, "particles", metavar="PARTICLES", nargs="?",
        help="New particles (.mrcs, .star, .cs, .txt); without them, the run's own")  # fmt: skip
    parser.add_argument("-o", "--outdir", metavar="OUT", required=True, help="Output folder")
    parser.add_argument("--epoch", type=int, metavar="N", help="Epoch (default: the latest one)")
    add(parser, "--overwrite", action="store_true", help="Replace the latents that are in OUT")

    group = parser.add_argument_group("Which particles")
    add(group, "--held-out", action="store_true",
        help="Those that train_amort --holdout kept out")  # fmt: skip
    add(group, "--poses", metavar="PKL", help="Poses of PARTICLES")
    add(group, "--ctf", metavar="PKL", help="CTF parameters of PARTICLES")
    add(
        group,
        "--ind",
        metavar="PKL",
        help="Those of PARTICLES that are wanted; without PARTICLES, the file that RUN was\n"
        "trained with, if it has moved",
    )
    add(group, "--datadir", metavar="DIR", help="Path prefix of the files in a .star or .cs file")
    add(group, "-d", "--dose-per-tilt", type=float, metavar="DOSE",
        help="Of tilt series: as in training. Runs of train_vae do not tell")  # fmt: skip
    add(group, "-a", "--angle-per-tilt", type=float, metavar="DEG", help="The same")

    group = parser.add_argument_group("How they are fitted")
    add(group, "--start", dest="starts", nargs="+", metavar="NAME",
        help="Where fits start; the best result of each particle is kept. encoder: its answer, or\n"
        "the row of the table; anchors: latents of others, weighted by how well they explain\n"
        "the particle; mean: of all latents; prior: zero (default: encoder anchors, or anchors\n"
        "alone where there is no answer)")  # fmt: skip
    add(group, "--beta", metavar="train|implied|BETA",
        help="Weight of the KL divergence: that of the training, the one that the noise in the\n"
        "images implies, or a number (default: train)")  # fmt: skip
    add(group, "--steps", type=int, metavar="N",
        help="At most so many steps per particle and start; 0: the starts as they are (default:\n"
        "400; but of more than 500 particles, unless --start is given, 30 from the anchors\n"
        "alone: what these lack, and how long either takes, is said at the start)")  # fmt: skip
    for flag, default, text in (
        ("--batch-size", 256, "Particles that are fitted at once"),
        ("--seed", 0, "Seed of the noise"),
    ):
        add(group, flag, type=int, metavar="N", help=f"{text} (default: {default})")


def main(args: argparse.Namespace) -> None:
    """Fit, write, and print the main numbers."""
    from cryodrgn_amort.parallel import join
    from cryodrgn_amort.plugins import load_plugins
    from cryodrgn_amort.posteriors import InferOptions, infer_run, summary
    from cryodrgn_amort.runs import load_run

    given = {dest: value for dest, value in vars(args).items() if dest not in ("func", "cmd")}
    folder, epoch, outdir = (given.pop(name) for name in ("run", "epoch", "outdir"))
    if "starts" in given:
        given["starts"] = tuple(given["starts"])
    options = InferOptions(**given)
    run = load_run(folder, load_plugins(), epoch)
    team = join()
    found = infer_run(run, options, outdir, team)
    if found is not None:
        print(summary(found))
        print(f"Latents: {outdir}")
    team.end_process()
