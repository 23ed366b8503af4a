"""Simulate particles with known heterogeneity, of a made-up object or of your own volumes.

The object is made of Gaussians: a core, three blocks that can be missing (classes), and an arm on
a hinge (continuous motion). Images have CTF, shifts and noise.

Written to the output folder:
- particles.mrcs, poses.pkl, ctf.pkl: as every cryodrgn command reads them
- particles.star: which images are of one particle, for --encode-mode tilt (only with --tilts)
- ind_train.pkl, ind_heldout.pkl: a random split, for --ind
- labels.pkl: the class of each image, from 0
- coordinate.pkl: where the arm is, 0 to 1 (only if it moves)
- volumes/class0_t0.50.mrc ...: clean volumes, here of class 0 with the arm at 0.5; without motion
one per class, volumes/class0.mrc ...; volumes/mean.mrc: their average over all particles
- clean.mrcs: the images without noise (only with --clean)
- simulation.yaml: settings, versions, signal variance, noise sigma

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

"""

from __future__ import annotations

import argparse


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags; ``SimulateOptions`` has the defaults of those that are not given."""

    def add(to: argparse._ActionsContainer, *flags: str, **kwargs: object) -> None:
        to.add_argument(*flags, default=argparse.SUPPRESS, **kwargs)  # type: ignore[arg-type]

    add(parser, "-o", "--outdir", required=True, metavar="DIR", help="Output folder")
    add(
        parser,
        "-n",
        type=int,
        metavar="N",
        help="Particles for training (default: 2000; with --poses or --ctf: all rows that are\n"
        "not held out). With tables, the first N + HELDOUT rows are used",
    )
    add(
        parser,
        "--heldout",
        type=int,
        metavar="N",
        help="Particles held out besides, in the same stack (default: 0)",
    )
    add(parser, "--seed", type=int, help="The same seed gives the same bytes (default: 0)")
    add(parser, "--overwrite", action="store_true", help="Replace the simulation in the folder")
    add(parser, "--clean", action="store_true", help="Also write the images without noise to "
        "clean.mrcs")  # fmt: skip

    group = parser.add_argument_group("Object")
    add(group, "-D", type=int, help="Box size in pixels (default: 32, or that of --volumes)")
    add(group, "--classes", type=int, help="Compositions, 1 to 5 (default: 5)")
    add(group, "--shares", type=float, nargs="+", metavar="SHARE", help="Relative shares of the "
        "classes (default: .15 .2 .25 .25 .15 for five;\nequal for --volumes)")  # fmt: skip
    add(
        group,
        "--hinge-deg",
        type=float,
        metavar="DEG",
        help="The arm turns from -DEG to DEG degrees; 0: rigid (default: 45)",
    )
    add(
        group,
        "--volumes",
        nargs="+",
        metavar="MRC",
        help="Use these volumes instead (.mrc, .map, also .gz, .bz2), one class each: positive\n"
        "density within the sphere that the box encloses; cubes of one even size, or -D D pads\n"
        "them to it",
    )

    group = parser.add_argument_group("Imaging")
    add(
        group,
        "--snr",
        type=float,
        help="Signal-to-noise ratio: variance of the noise-free images with CTF over all pixels,\n"
        "divided by the variance of the noise; inf: no noise (default: 0.3)",
    )
    add(
        group,
        "--tilts",
        type=int,
        metavar="N",
        help="Tilt series: N images of each particle, dose-symmetric, about the y axis; each has\n"
        "an N-th of the dose, N times the variance of the noise (default: single particles)",
    )
    add(
        group,
        "--tilt-step-deg",
        type=float,
        metavar="DEG",
        help="Angle between neighbouring tilts (default: 3)",
    )
    add(
        group,
        "--noise",
        choices=("white", "coloured"),
        help="Noise spectrum; coloured: falls with the frequency, same variance (default: white)",
    )
    add(
        group,
        "--shift-px",
        type=float,
        metavar="PX",
        help="Largest shift along x and y, in pixels of this box (default: 1.5 * D / 32)",
    )
    add(
        group,
        "--apix",
        type=float,
        help="Angstroms per pixel (default: 192 / D, or that of --volumes, or of --ctf)",
    )
    add(group, "--no-ctf", dest="use_ctf", action="store_false", help="Images without CTF")
    add(group, "--poses", metavar="PKL", help="Use these poses (.pkl) instead of random ones")
    add(group, "--ctf", metavar="PKL", help="Use these CTFs (.pkl) instead of random ones")


def main(args: argparse.Namespace) -> None:
    """Simulate."""
    from cryodrgn_amort.simulate import SimulateOptions, simulate

    given = {dest: value for dest, value in vars(args).items() if dest != "func"}
    for name in ("volumes", "shares"):
        if name in given:
            given[name] = tuple(given[name])
    simulate(SimulateOptions(**given))
