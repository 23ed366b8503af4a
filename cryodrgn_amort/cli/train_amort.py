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

from typing import TYPE_CHECKING

from cryodrgn_amort.plugins import load_plugins

if TYPE_CHECKING:
    import argparse


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add every flag of ``train_vae``, then ours and those of plugins."""
    from cryodrgn_amort.runs import add_train_flags

    add_train_flags(parser, load_plugins())


def main(args: argparse.Namespace) -> None:
    """Train, and end the process if it is one of several."""
    from cryodrgn_amort.training import train_run

    given = {dest: value for dest, value in vars(args).items() if dest != "func"}
    train_run(given, load_plugins()).processes.end_process()
