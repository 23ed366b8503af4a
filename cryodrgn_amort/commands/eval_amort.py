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

import argparse


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags; ``EvalOptions`` has the defaults of those that are not given."""

    def add(to: argparse._ActionsContainer, *flags: str, **kwargs: object) -> None:
        to.add_argument(*flags, default=argparse.SUPPRESS, **kwargs)  # type: ignore[arg-type]

    parser.add_argument("run", metavar="RUN", help="Run folder of train_amort or train_vae")
    parser.add_argument("--epoch", type=int, metavar="N", help="Epoch (default: the latest one)")
    parser.add_argument(
        "-o", "--outdir", metavar="OUT", help="Output folder (default: RUN/amort.EPOCH)"
    )
    add(
        parser,
        "--transform",
        dest="transforms",
        nargs="*",
        metavar="NAME",
        help="Changes of the image, NAME or NAME:ARGUMENT; `cryodrgn amort_plugins` lists them;\n"
        "none if nothing follows (default: roll:1 rotate:90)",
    )

    group = parser.add_argument_group("What is known of the particles")
    add(group, "--labels", metavar="PKL", help="A class for each particle")
    add(group, "--coordinate", metavar="PKL", help="A number for each particle")
    add(group, "--truth", metavar="DIR",
        help="The output folder of simulate_amort that the particles are from; has labels and\n"
        "coordinate, too")  # fmt: skip

    group = parser.add_argument_group("How much is measured")
    for flag, default, text in (
        ("--sample", 1000, "Particles for reconstruction losses and true neighbours"),
        ("--volumes", 30, "Particles whose volumes are compared"),
        ("--truth-volumes", 200, "Particles whose volumes are compared with the true ones"),
        (
            "--fit",
            64,
            "Particles whose posteriors are fitted one by one, to see what the encoder\n"
            "loses; as many of those that train_amort --holdout kept out",
        ),
        ("--maps", 2, "Copies of the first so many transforms are shown, with their volumes"),
        ("--labelled", 10, "The first so many particles are shown by number, with their volumes"),
        ("--bootstrap", 500, "Rounds for the 95 %% intervals"),
        ("--batch-size", 256, "Images that are encoded at once"),
        ("--seed", 0, "Seed of samples, intervals and UMAP"),
    ):
        add(group, flag, type=int, metavar="N", help=f"{text} (default: {default})")
    add(group, "--no-umap", dest="umap", action="store_false",
        help="Show principal components only")  # fmt: skip

    group = parser.add_argument_group("Inputs of the run, if they have moved")
    add(group, "--particles", metavar="FILE", help="Particle stack (.mrcs, .star, .cs, .txt)")
    add(group, "--poses", metavar="PKL", help="Poses")
    add(group, "--ctf", metavar="PKL", help="CTF parameters")
    add(group, "--ind", metavar="PKL", help="Indices of the particles that were used")
    add(group, "--datadir", metavar="DIR", help="Path prefix of the files in a .star or .cs file")
    add(group, "-d", "--dose-per-tilt", type=float, metavar="DOSE",
        help="Of tilt series: as in training. Runs of train_vae do not tell")  # fmt: skip
    add(group, "-a", "--angle-per-tilt", type=float, metavar="DEG", help="The same")


def main(args: argparse.Namespace) -> None:
    """Evaluate, write, and print the main numbers."""
    from cryodrgn_amort.evaluation import EvalOptions, assist, evaluate
    from cryodrgn_amort.parallel import join
    from cryodrgn_amort.plugins import load_plugins
    from cryodrgn_amort.report import check_outdir, summary, write_evaluation
    from cryodrgn_amort.runs import load_run

    given = {dest: value for dest, value in vars(args).items() if dest not in ("func", "cmd")}
    folder, epoch, outdir = (given.pop(name) for name in ("run", "epoch", "outdir"))
    if "transforms" in given:
        given["transforms"] = tuple(given["transforms"])
    options = EvalOptions(**given)
    run = load_run(folder, load_plugins(), epoch)
    out = check_outdir(outdir or run.folder / f"amort.{run.epoch}")
    team = join()
    if not team.leads:
        assist(run, options, team)
        team.end_process()
        return
    evaluation = evaluate(run, options, team)
    report = write_evaluation(evaluation, out)
    print(summary(evaluation))
    print(f"Report: {report}")
    team.end_process()
