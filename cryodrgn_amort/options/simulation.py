"""What ``simulate_amort`` is asked to make."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from cryodrgn_amort.core import InputError
from cryodrgn_amort.options.fields import Options, flag, flags_of

__all__ = ["MOST_CLASSES", "SimulateOptions"]

MOST_CLASSES = 5
"""Compositions of the made-up object."""
_STEEPEST_DEG = 70.0
_OBJECT, _LIKE, _IMAGING = "Object", "What a run has found, in its place", "Imaging"


@dataclass(frozen=True)
class SimulateOptions(Options):
    """What to simulate. None: see the flag's help."""

    outdir: str = flag("-o", "--outdir", metavar="DIR", help="Output folder")
    n: int | None = flag(
        "-n", default=None, least=1, metavar="N",
        help="Particles for training (default: 2000; with --poses, --ctf or --like: all that\n"
        "are not held out). With them, the first N + HELDOUT are used",
    )  # fmt: skip
    heldout: int = flag(
        "--heldout", default=0, least=0, metavar="N",
        help="Particles held out besides, in the same stack",
    )  # fmt: skip
    seed: int = flag("--seed", default=0, least=0, help="The same seed gives the same bytes")
    overwrite: bool = flag(
        "--overwrite", default=False, help="Replace the simulation in the folder"
    )
    clean: bool = flag(
        "--clean", default=False, help="Also write the images without noise to clean.mrcs"
    )
    D: int | None = flag(
        "-D", default=None, least=16, wanted="an even box of at least 16 pixels is needed",
        group=_OBJECT,
        help="Box size in pixels (default: 32, that of --volumes, or 64 with --atoms)",
    )  # fmt: skip
    classes: int | None = flag(
        "--classes", default=None, least=1, most=MOST_CLASSES, group=_OBJECT,
        help=f"Compositions, 1 to {MOST_CLASSES} (default: {MOST_CLASSES})",
    )  # fmt: skip
    shares: tuple[float, ...] | None = flag(
        "--shares", default=None, group=_OBJECT, nargs="+", metavar="SHARE",
        help="Relative shares of the classes (default: .15 .2 .25 .25 .15 for five;\n"
        "equal for --volumes and --atoms)", least=0, wanted="must not be negative",
    )  # fmt: skip
    hinge_deg: float | None = flag(
        "--hinge-deg", default=None, least=0, most=180, group=_OBJECT, metavar="DEG",
        help="The arm turns from -DEG to DEG degrees; 0: rigid (default: 45)",
    )  # fmt: skip
    volumes: tuple[str, ...] = flag(
        "--volumes", default=(), group=_OBJECT, nargs="+", metavar="MRC",
        help="Use these volumes instead (.mrc, .map, also .gz, .bz2), one class each: positive\n"
        "density within the sphere that the box encloses; cubes of one even size, or -D D pads\n"
        "them to it",
    )  # fmt: skip
    atoms: tuple[str, ...] = flag(
        "--atoms", default=(), group=_OBJECT, nargs="+", metavar="PDB",
        help="Use these atomic models instead (.pdb, .ent, .cif, also .gz): potentials by\n"
        "electron scattering factors, with occupancies and B-factors. Each model of each file is\n"
        "a class",
    )  # fmt: skip
    turn: str | None = flag(
        "--turn", default=None, group=_OBJECT, metavar="SELECTION:DEG",
        help="These atoms of the model turn from -DEG to DEG degrees, about where they touch the\n"
        "rest. SELECTION is in the MMDB syntax: B, A/20-80, A,B/1-90",
    )  # fmt: skip
    without: tuple[str, ...] = flag(
        "--without", default=(), group=_OBJECT, action="append", metavar="SELECTION",
        help="One more class, that lacks these atoms; can be given again. Class 0 is whole",
    )  # fmt: skip
    like: str | None = flag(
        "--like", default=None, group=_LIKE, metavar="RUN",
        help="Particles as those that a run was trained on: their poses, CTFs, shifts and scale,\n"
        "noise as its latents leave it, and for each what the decoder shows at a latent of its\n"
        "posterior. DIR/truth is the truth, as a run. Excludes object and imaging",
    )  # fmt: skip
    homogeneous: bool = flag(
        "--homogeneous", default=False, group=_LIKE,
        help="The mean latent for all: no heterogeneity",
    )  # fmt: skip
    snr: float | None = flag(
        "--snr", default=None, above=0, most=math.inf, wanted="must be positive (inf: no noise)",
        group=_IMAGING,
        help="Signal-to-noise ratio: variance of the noise-free images with CTF over all pixels,\n"
        "divided by the variance of the noise; inf: no noise (default: 0.3)",
    )  # fmt: skip
    tilts: int | None = flag(
        "--tilts", default=None, least=1, group=_IMAGING, metavar="N",
        help="Tilt series: N images of each particle, dose-symmetric, about the y axis; each has\n"
        "an N-th of the dose, N times the variance of the noise (default: single particles)",
    )  # fmt: skip
    tilt_step_deg: float | None = flag(
        "--tilt-step-deg", default=None, least=0, most=60, group=_IMAGING, metavar="DEG",
        help="Angle between neighbouring tilts (default: 3)",
    )  # fmt: skip
    noise: str | None = flag(
        "--noise", default=None, choices=("white", "coloured"), group=_IMAGING,
        metavar="white|coloured",
        help="Noise spectrum; coloured: falls with the frequency, same variance (default: white)",
    )  # fmt: skip
    noise_spectrum: str | None = flag(
        "--noise-spectrum", default=None, group=_IMAGING, metavar="FILE",
        help="Spectrum of the noise, of which the shape counts: variances by shell (text, .csv,\n"
        ".npy, .pkl, .json; S values: the shells of a box of 2 * S pixels, zero first), two\n"
        "columns of cycles per pixel and variance, or noise.json of a run",
    )  # fmt: skip
    shift_px: float | None = flag(
        "--shift-px", default=None, least=0, group=_IMAGING, metavar="PX",
        help="Largest shift along x and y, in pixels of this box (default: 1.5 * D / 32)",
    )  # fmt: skip
    apix: float | None = flag(
        "--apix", default=None, above=0, group=_IMAGING,
        help="Angstroms per pixel (default: 192 / D, that of --volumes, or of --ctf; with\n"
        "--atoms, the box is 1.5 times the molecule's diameter)",
    )  # fmt: skip
    use_ctf: bool = flag("--no-ctf", default=True, group=_IMAGING, help="Images without CTF")
    poses: str | None = flag(
        "--poses", default=None, group=_IMAGING, metavar="PKL",
        help="Use these poses (.pkl) instead of random ones",
    )  # fmt: skip
    ctf: str | None = flag(
        "--ctf", default=None, group=_IMAGING, metavar="PKL",
        help="Use these CTFs (.pkl) instead of random ones",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.D or 0) % 2:
            raise InputError(f"-D {self.D}: an even box of at least 16 pixels is needed")
        for name, given, other, why in (
            ("--classes", self.classes, self.volumes, "with --volumes, each volume is a class"),
            ("--hinge-deg", self.hinge_deg, self.volumes, "there is no hinge with --volumes"),
            ("--classes", self.classes, self.atoms, "with --atoms, models or --without are"),
            ("--hinge-deg", self.hinge_deg, self.atoms, "with --atoms, --turn says what turns"),
            (
                "--volumes",
                self.volumes[0] if self.volumes else None,
                self.atoms,
                "excludes --atoms",
            ),
            ("--turn", self.turn, not self.atoms, "is for --atoms"),
            (
                "--without",
                self.without[0] if self.without else None,
                not self.atoms,
                "is for --atoms",
            ),
            ("--noise-spectrum", self.noise_spectrum, self.noise, "excludes --noise"),
            ("--ctf", self.ctf, not self.use_ctf, "contradicts --no-ctf"),
            ("--tilts", self.tilts, not self.use_ctf, "the scale of a tilt is part of its CTF"),
            ("--tilt-step-deg", self.tilt_step_deg, self.tilts is None, "is for --tilts"),
            ("--apix", self.apix, self.ctf, "with --ctf, its pixel sizes are used"),
            ("--shift-px", self.shift_px, self.poses, "with --poses, its translations are used"),
        ):
            if given is not None and other:
                raise InputError(f"{name} {given}: {why}")
        self._check_like()
        if self.turn is not None:
            _ = self.turn_parts  # checks it
        steepest = max(map(abs, self.tilt_angles_deg))
        if self.tilts is not None and steepest > _STEEPEST_DEG:
            raise InputError(
                f"--tilts {self.tilts}: would tilt by {steepest:g} degrees; at most "
                f"{_STEEPEST_DEG:g} (--tilt-step-deg)"
            )

    def _check_like(self) -> None:
        """Refuse what ``--like`` decides."""
        if self.like is None:
            if self.homogeneous:
                raise InputError("--homogeneous: is for --like")
            return
        for dest, known in flags_of(SimulateOptions).items():
            default = next(f.default for f in fields(self) if f.name == dest)
            if known.group in (_OBJECT, _IMAGING) and getattr(self, dest) != default:
                raise InputError(f"{known.name}: --like {self.like} decides that")

    @property
    def turn_parts(self) -> tuple[str, float]:
        """The selection and the angle of ``--turn``.

        Raises
        ------
        InputError
            If it is none.
        """
        selection, _, angle = (self.turn or "").rpartition(":")
        try:
            degrees = float(angle)
        except ValueError:
            degrees = math.nan
        if not selection or not 0 < degrees <= 180:
            raise InputError(
                f"--turn {self.turn}: SELECTION:DEG is needed, with DEG above 0, 180 at most"
            )
        return selection, degrees

    @property
    def tilt_angles_deg(self) -> list[float]:
        """Angles in the order in which they are taken: 0, then by turns up and down.

        Dose-symmetric: Hagen, Wan & Briggs, J. Struct. Biol. 197, 191 (2017).
        """
        step = 3.0 if self.tilt_step_deg is None else self.tilt_step_deg
        return [step * (1 if k % 2 else -1) * ((k + 1) // 2) for k in range(self.tilts or 1)]
