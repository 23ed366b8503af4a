"""Train like train_vae, with any encoder: network, lookup table, evil twin, noise, a plugin's.

Example usage
-------------
# The same as `cryodrgn train_vae` with the same flags
$ cryodrgn train_amort particles.128.mrcs --poses pose.pkl --ctf ctf.pkl --zdim 8 \
                       -n 50 -o outs/baseline

# A mean and a log variance per particle instead of an encoder network
$ cryodrgn train_amort particles.128.mrcs --poses pose.pkl --ctf ctf.pkl --zdim 8 \
                       -n 50 -o outs/vlt --encoder vlt

# The network is shown another particle, or noise, and still has to explain this one
$ cryodrgn train_amort particles.128.mrcs --poses pose.pkl --ctf ctf.pkl --zdim 8 \
                       -n 50 -o outs/twin --encoder twin --enc-layers 5

# For the decoder of a finished run, an encoder that works on new particles
$ cryodrgn train_amort --from outs/vlt --encoder anchored -n 50 -o outs/anchored

# Go on after an interruption
$ cryodrgn train_amort particles.128.mrcs --poses pose.pkl --ctf ctf.pkl --zdim 8 \
                       -n 50 -o outs/vlt --encoder vlt --load latest

# In several processes that share the particles of each batch: one per GPU, or per CPU socket
$ torchrun --nproc-per-node 4 -m cryodrgn_amort train_amort particles.128.mrcs \
                       --poses pose.pkl --ctf ctf.pkl --zdim 8 -b 256 -n 50 -o outs/vlt

"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from cryodrgn_amort.errors import InputError
from cryodrgn_amort.plugins import load_plugins
from cryodrgn_amort.private import abbreviate, actions_of

if TYPE_CHECKING:
    from cryodrgn_amort.training import Trainer

_HELP = {  # where the host's is not what it does, or not all that we do
    "do_pose_sgd": "Refine poses with gradient descent, in either --domain; RUN/pose.pkl has them",
    "pretrain": "First epoch in which poses are moved (default: 1)",
    "emb_type": "Without effect, as in train_vae, which refines s2s2",
}


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add every flag of ``train_vae``, then ours; a flag that is not given leaves no trace."""
    from cryodrgn_amort import host
    from cryodrgn_amort.settings import REFUSED

    host.add_train_vae_args(parser)
    of_host = list(actions_of(parser))
    for action in of_host:
        if action.dest == "help":
            continue
        if action.help:  # the defaults are about to go
            action.help = action.help.replace("%(default)s", str(action.default))
        action.help = _HELP.get(action.dest, action.help)
        if action.dest in REFUSED:
            action.help = f"Refused: {REFUSED[action.dest]}"
        action.default = argparse.SUPPRESS
        if action.dest in ("particles", "poses", "zdim"):
            action.required = False  # a recipe or --from may set it
        if action.dest == "particles":
            action.nargs, action.type = "?", None  # the type would change the default
    group = parser.add_argument_group("Encoder (cryodrgn_amort)")
    group.add_argument(
        "--encoder",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="resid or mlp (networks of the host), vlt (lookup table), twin or noise (the network\n"
        "of --encode-mode, shown another particle or noise), or what a plugin brings;\n"
        "`cryodrgn amort_plugins` lists them (default: resid)",
    )
    group.add_argument(
        "--recipe",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="Start from a named set of flags; flags that are given override it",
    )
    group.add_argument(
        "--from",
        dest="from_run",
        metavar="RUN",
        default=argparse.SUPPRESS,
        help="Second stage: keep the decoder of a finished run, and train an encoder (resid, mlp,\n"
        "sleep, anchored) on images made up by it; semi trains on with a table. Particles and\n"
        "all else are that run's unless given",
    )
    group.add_argument(
        "--lr-end",
        type=float,
        default=argparse.SUPPRESS,
        help="What --lr falls to by the last epoch, along half a cosine (default: it stays the\n"
        "same; with --from 2e-5)",
    )
    group.add_argument(
        "--augment",
        type=int,
        nargs="?",
        const=1,
        metavar="PX",
        default=argparse.SUPPRESS,
        help="Train a network on copies of the particles, turned by random angles and rolled by\n"
        "up to PX pixels; poses follow (PX: 1 unless given)",
    )
    group.add_argument(
        "--consistency",
        type=float,
        metavar="WEIGHT",
        default=argparse.SUPPRESS,
        help="With --augment: pull the posteriors of copy and particle together, with so many\n"
        "times the weight of the KL divergence",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Replace the run that is in the output folder",
    )
    group.add_argument(
        "--holdout",
        metavar="FRACTION|PKL",
        default=argparse.SUPPRESS,
        help="Particles to keep out of the training, to judge the encoder by: a fraction of them,\n"
        "drawn by --seed, or a pickle of their indices in the stack. RUN/ind_heldout.pkl says\n"
        "which; eval_amort uses them",
    )
    group.add_argument(
        "--on-nan",
        metavar="stop|skip|rollback",
        default=argparse.SUPPRESS,
        help="When the loss of a batch is not a number: stop before it; leave the batch out; or\n"
        "go back to the last checkpoint with half the --lr, five times at most (default: stop)",
    )
    group = parser.add_argument_group("Speed and memory (cryodrgn_amort)")
    group.add_argument(
        "--precision",
        metavar="fp32|bf16|fp16|fp64",
        default=argparse.SUPPRESS,
        help="Of the decoder's matrix products; coordinates, losses, sums, tables and optimizers\n"
        "keep at least fp32 (default: fp32 on CPUs; on GPUs bf16, or fp32 with --no-amp)",
    )
    group.add_argument(
        "--memory",
        metavar="GB",
        type=float,
        default=argparse.SUPPRESS,
        help="How much preprocessed particles may take in each process: in fp32 if they fit, else\n"
        "in fp16, else from a temporary file beside the run (default: half of the free\n"
        "memory)",
    )
    load_plugins().add_train_args(parser)
    for action in actions_of(parser):
        action.default = argparse.SUPPRESS  # also what plugins added
    abbreviate(parser, of_host)


def _torchrun() -> str:
    """Return the command line that does what ``--multigpu`` was to do."""
    import torch

    words = sys.argv[1:] if "train_amort" in sys.argv else ["train_amort", "..."]
    words = [word for word in words if word not in ("--multigpu", "--multi")]
    start = ["torchrun", "--nproc-per-node", str(torch.cuda.device_count() or "N")]
    return shlex.join([*start, "-m", "cryodrgn_amort", *words])


def main(args: argparse.Namespace) -> None:
    """Train, and end the process if it is one of several."""
    train(args).team.end_process()


def train(args: argparse.Namespace) -> Trainer:
    """Train."""
    from cryodrgn_amort.runs import with_run
    from cryodrgn_amort.settings import settings_from_flags
    from cryodrgn_amort.training import Trainer

    if "multigpu" in args:
        raise InputError(f"--multigpu: start one process per GPU instead: {_torchrun()}")
    plugins = load_plugins()
    given = {dest: value for dest, value in vars(args).items() if dest != "func"}
    trainer = Trainer(settings_from_flags(with_run(given, plugins), plugins), plugins)
    trainer.fit()
    return trainer
