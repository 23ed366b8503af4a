"""Simulate particles with known heterogeneity: of a made-up object, of atoms, of your own volumes.

The object is made of Gaussians: a core, three blocks that can be missing (classes), and an arm on
a hinge (continuous motion). Images have CTF, shifts and noise.

Written to the output folder:
- particles.mrcs, poses.pkl, ctf.pkl: as every cryodrgn command reads them
- particles.star: which images are of one particle, for --encode-mode tilt (only with --tilts)
- ind_train.pkl, ind_heldout.pkl: a random split, for --ind
- labels.pkl: the class of each image, from 0
- coordinate.pkl: where the arm is, or what --turn says, 0 to 1 (only if it moves)
- volumes/class0_t0.50.mrc ...: clean volumes, here of class 0 with the arm at 0.5; without motion
one per class, volumes/class0.mrc ...; volumes/mean.mrc: their average over all particles
- volumes/part0.mrc ...: what moves as one, on a finer grid (only with --atoms)
- truth/: a run folder whose decoder and z.pkl are the truth (only with --like)
- clean.mrcs: the images without noise (only with --clean)
- simulation.yaml: settings, versions, signal variance, noise sigma; hinge, parts, noise spectrum

Example usage
-------------
# Five classes and a hinge, 2000 particles to train on and 400 held out
$ cryodrgn simulate_amort -o sim -n 2000 --heldout 400

# One rigid object with little noise, to test a reconstruction
$ cryodrgn simulate_amort -o rigid -n 2000 --classes 1 --hinge-deg 0 --snr 100

# Tilt series of ten images, at the dose of one: cryodrgn train_amort tomo/particles.star \
#                                                         --encode-mode tilt --ntilts 10 ...
$ cryodrgn simulate_amort -o tomo -n 2000 --tilts 10

# Your own volumes, poses and CTFs: three of the particles in four are of the first volume
$ cryodrgn simulate_amort -o mine --volumes a.mrc b.mrc --shares 3 1 \
                          --poses poses.pkl --ctf ctf.pkl --snr 0.1 --noise coloured

# As the particles of a run of yours, but with known truth: what would you find if it were this?
$ cryodrgn simulate_amort -o twin --like outs/vlt
$ cryodrgn simulate_amort -o null --like outs/vlt --homogeneous

# An atomic model: chain B turns by up to 16 degrees, one particle in three lacks chains C and D
$ cryodrgn simulate_amort -o twin --atoms model.cif --turn B:16 --without C,D --shares 2 1 -D 64

"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryodrgn_amort.options import SimulateOptions, add_flags

if TYPE_CHECKING:
    import argparse


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``SimulateOptions``."""
    add_flags(parser, SimulateOptions)


def main(args: argparse.Namespace) -> None:
    """Simulate."""
    from cryodrgn_amort.plugins import load_plugins
    from cryodrgn_amort.simulation import simulate

    simulate(SimulateOptions.of(args), load_plugins())
