"""Particles with known heterogeneity, imaged as the host models them.

Images are the negative of CTF times projection, which the host inverts by default; moving an image
by its translation centres it. The CTF acts on the box alone, as in the host's own model of an
image: what it spreads beyond one edge comes back at the opposite one.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from cryodrgn_amort import __version__, host
from cryodrgn_amort.checkpoints import read_pickle, write_pickle
from cryodrgn_amort.errors import InputError
from cryodrgn_amort.files import forget, locked, record, recorded, replacing, write_text
from cryodrgn_amort.machine import available_memory
from cryodrgn_amort.progress import on_terminal
from cryodrgn_amort.sources import load_ctf, load_poses
from cryodrgn_amort.specimens import BlobModel, VolumeModel, clean_images, read_volume

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["SimulateOptions", "Simulation", "simulate"]

logger = logging.getLogger("cryodrgn_amort")

_BLOCK = 64
"""Particles computed together, whatever the chunk: rounding can depend on it."""
_SIGNAL_SAMPLE = 1000
_STEEPEST_DEG = 70.0
_STREAMS = ("rotations", "shifts", "ctf", "labels", "coordinate", "split", "signal", "noise")
_OUTPUTS = (
    "particles.mrcs", "particles.star", "clean.mrcs", "poses.pkl", "ctf.pkl", "labels.pkl",
    "coordinate.pkl", "ind_train.pkl", "ind_heldout.pkl", "simulation.yaml", "volumes",
)  # fmt: skip


@dataclass(frozen=True)
class SimulateOptions:
    """What to simulate. Names are those of the flags of ``simulate_amort``; None: see there.

    Attributes
    ----------
    n, heldout
        Particles for training, and held out; the stack holds both, mixed.
    D
        Box size in pixels.
    snr
        Variance of the noise-free images with CTF over that of the noise; ``inf``: no noise. Of
        tilt series, that of all images of a particle together: each has but a share of the dose.
    tilts
        Images of each particle; None: one, and no tilt series.
    tilt_step_deg
        Angle between neighbouring tilts.
    shift_px
        Largest shift along x and y, in pixels of this box.
    apix
        Angstroms per pixel.
    chunk
        Particles held in memory at a time, rounded up to a multiple of 64; does not change a byte.

    Raises
    ------
    InputError
        If a value makes no sense, or two do not go together.
    """

    outdir: str
    n: int | None = None
    heldout: int = 0
    D: int | None = None
    snr: float = 0.3
    tilts: int | None = None
    tilt_step_deg: float | None = None
    noise: str = "white"
    classes: int | None = None
    shares: tuple[float, ...] | None = None
    hinge_deg: float | None = None
    shift_px: float | None = None
    apix: float | None = None
    use_ctf: bool = True
    seed: int = 0
    volumes: tuple[str, ...] = ()
    poses: str | None = None
    ctf: str | None = None
    clean: bool = False
    overwrite: bool = False
    chunk: int = 512

    def __post_init__(self) -> None:
        def inside(value: float | None, low: float, high: float = math.inf) -> bool:
            return value is None or (low <= value <= high and math.isfinite(value))

        most = len(BlobModel.COMPOSITIONS)
        even = "an even box of at least 16 pixels is needed"
        for right, flag, value, wanted in (
            (inside(self.tilts, 1), "--tilts", self.tilts, "at least 1 is needed"),
            (
                inside(self.tilt_step_deg, 0, 60),
                "--tilt-step-deg",
                self.tilt_step_deg,
                "0 to 60 is needed",
            ),
            (inside(self.n, 1), "-n", self.n, "at least 1 is needed"),
            (inside(self.heldout, 0), "--heldout", self.heldout, "must not be negative"),
            (inside(self.seed, 0), "--seed", self.seed, "must not be negative"),
            (inside(self.chunk, 1), "chunk", self.chunk, "at least 1 is needed"),
            (inside(self.D, 16) and not (self.D or 0) % 2, "-D", self.D, even),
            (self.snr > 0, "--snr", self.snr, "must be positive (inf: no noise)"),
            (self.noise in ("white", "coloured"), "--noise", self.noise, "white or coloured"),
            (inside(self.apix, 1e-6), "--apix", self.apix, "must be positive"),
            (inside(self.shift_px, 0), "--shift-px", self.shift_px, "must not be negative"),
            (inside(self.hinge_deg, 0, 180), "--hinge-deg", self.hinge_deg, "0 to 180 is needed"),
            (inside(self.classes, 1, most), "--classes", self.classes, f"1 to {most} is needed"),
        ):
            if not right:
                raise InputError(f"{flag} {value}: {wanted}")
        for flag, given, other, why in (
            ("--classes", self.classes, self.volumes, "with --volumes, each volume is a class"),
            ("--hinge-deg", self.hinge_deg, self.volumes, "there is no hinge with --volumes"),
            ("--ctf", self.ctf, not self.use_ctf, "contradicts --no-ctf"),
            ("--tilts", self.tilts, not self.use_ctf, "the scale of a tilt is part of its CTF"),
            ("--tilt-step-deg", self.tilt_step_deg, self.tilts is None, "is for --tilts"),
            ("--apix", self.apix, self.ctf, "with --ctf, its pixel sizes are used"),
            ("--shift-px", self.shift_px, self.poses, "with --poses, its translations are used"),
        ):
            if given is not None and other:
                raise InputError(f"{flag} {given}: {why}")
        if self.tilts is not None and np.abs(self.tilt_angles_deg).max() > _STEEPEST_DEG:
            raise InputError(
                f"--tilts {self.tilts}: would tilt by {np.abs(self.tilt_angles_deg).max():g} "
                f"degrees; at most {_STEEPEST_DEG:g} (--tilt-step-deg)"
            )

    @property
    def tilt_angles_deg(self) -> np.ndarray:
        """Angles in the order in which they are taken: 0, then by turns up and down.

        Dose-symmetric: Hagen, Wan & Briggs, J. Struct. Biol. 197, 191 (2017).
        """
        order = np.arange(self.tilts or 1)
        sign = np.where(order % 2, 1, -1)
        step = 3.0 if self.tilt_step_deg is None else self.tilt_step_deg
        angles: np.ndarray = step * sign * ((order + 1) // 2)
        return angles


@dataclass(frozen=True)
class Simulation:
    """What was written.

    Attributes
    ----------
    signal_variance
        Variance of the noise-free images with CTF over all pixels, of up to 1000 particles.
    noise_sigma
        Standard deviation of the noise.
    """

    outdir: Path
    n: int
    heldout: int
    D: int
    signal_variance: float
    noise_sigma: float


@dataclass(frozen=True)
class _Truth:
    """What was drawn for, or given of, each image and particle.

    See ``load_poses``, ``load_ctf``. The images of a tilt series follow each other.
    """

    rots: np.ndarray  # (M, 3, 3)
    trans_px: np.ndarray  # (M, 2)
    ctf: np.ndarray | None  # (M, 8), of tilt series (M, 9): their scale
    labels: np.ndarray  # (N,)
    coordinate: np.ndarray  # (N,)

    @property
    def tilts(self) -> int:
        """Images per particle."""
        return len(self.rots) // len(self.labels)


def _load_model(options: SimulateOptions) -> tuple[BlobModel | VolumeModel, float]:
    """Return the object and its pixel size in angstroms."""
    voxels = (options.D or 0) ** 3 * max(1, len(options.volumes))
    if 32 * voxels > available_memory():
        raise InputError(f"-D {options.D}: volumes of this box do not fit memory")
    if not options.volumes:
        D = options.D or 32
        classes = options.classes or len(BlobModel.COMPOSITIONS)
        hinge = 45.0 if options.hinge_deg is None else options.hinge_deg
        return BlobModel(D, classes, hinge), options.apix or 192 / D
    read = [read_volume(path, box=options.D) for path in options.volumes]
    (first, apix), largest = read[0], max(len(volume) for volume, _ in read)
    for path, (volume, own) in zip(options.volumes, read, strict=True):
        if len(volume) != len(first):
            raise InputError(
                f"--volumes {path}: its box of {len(volume)} px is not that of --volumes "
                f"{options.volumes[0]} ({len(first)}); -D {largest} pads smaller ones"
            )
        if not options.apix and not options.ctf and (not own > 0 or abs(own / apix - 1) > 1e-3):
            raise InputError(
                f"--volumes {path}: its pixel size of {own} does not fit; give --apix for all"
            )
    return VolumeModel([volume for volume, _ in read], options.volumes), options.apix or apix


def _table_rows(options: SimulateOptions) -> int | None:
    """Count the particles of the user's tables; None without any."""
    rows = {}
    for flag, path in (("--poses", options.poses), ("--ctf", options.ctf)):
        if path is None:
            continue
        loaded = read_pickle(path, flag)
        table = loaded[0] if isinstance(loaded, (tuple, list)) and loaded else loaded
        if not getattr(table, "shape", ()):
            raise InputError(f"{flag} {path}: not a table with a row per particle")
        rows[f"{flag} {path}"] = len(table)
    if len(set(rows.values())) > 1:
        counts = " and ".join(f"{name} has {count} rows" for name, count in rows.items())
        raise InputError(f"{counts}: they must be of the same particles")
    return next(iter(rows.values()), None)


def _count(options: SimulateOptions) -> tuple[int, int | None]:
    """Return how many particles to make and how many rows the user's tables have."""
    rows = _table_rows(options)
    if options.n is not None:
        total = options.n + options.heldout
    else:
        total = 2000 + options.heldout if rows is None else rows
    if rows is not None and (total > rows or total <= options.heldout):
        table = f"--poses {options.poses}" if options.poses else f"--ctf {options.ctf}"
        asked = f"-n {options.n} and " if options.n else ""
        raise InputError(f"{asked}--heldout {options.heldout}: {table} has only {rows} rows")
    return total, rows


def _shift_px(options: SimulateOptions, D: int) -> float:
    return 1.5 * D / 32 if options.shift_px is None else options.shift_px


def _draw(
    options: SimulateOptions, model: BlobModel | VolumeModel, apix: float,
    streams: dict[str, np.random.Generator],
) -> _Truth:  # fmt: skip
    """Draw what the user does not give, each kind from its own stream."""
    (N, rows), D = _count(options), model.D
    shares = model.shares if options.shares is None else np.array(options.shares, float)
    if len(shares) != len(model.shares):
        given = " ".join(map(str, options.shares or ()))
        raise InputError(f"--shares {given}: {len(model.shares)} classes need as many shares")
    if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0):
        raise InputError(f"--shares {' '.join(map(str, shares))}: must not be negative")
    shift_px = _shift_px(options, D)
    if shift_px >= D / 2:
        raise InputError(f"--shift-px {shift_px}: must be less than half the box of {D} pixels")
    if options.poses is None:
        quaternions = streams["rotations"].standard_normal((N, 4))
        rots = Rotation.from_quat(quaternions).as_matrix().astype(np.float32)
        trans = streams["shifts"].uniform(-shift_px, shift_px, (N, 2)).astype(np.float32)
    else:
        rots, given_px = load_poses(options.poses, rows or 0, None, D)
        rots, trans = rots[:N], np.zeros((N, 2), np.float32) if given_px is None else given_px[:N]
    ctf = None
    if options.ctf is not None:
        ctf = load_ctf(options.ctf, rows or 0, None, D)[:N]
    elif options.use_ctf:
        draw = streams["ctf"].uniform
        defocus = draw(10000, 25000, N)
        ctf = np.tile(np.array([apix, 0, 0, 0, 300, 2.7, 0.1, 0], np.float32), (N, 1))
        ctf[:, 1], ctf[:, 2], ctf[:, 3] = defocus + draw(0, 300, N), defocus, draw(0, 180, N)
    if options.tilts is not None:
        rots, trans, ctf = _tilted(options, rots, trans, ctf, streams["shifts"])
    labels = streams["labels"].choice(len(shares), N, p=shares / shares.sum())
    moves = isinstance(model, BlobModel) and model.hinge_deg
    coordinate = streams["coordinate"].random(N) if moves else np.full(N, 0.5)
    return _Truth(rots, trans, ctf, labels, coordinate)


def _tilted(
    options: SimulateOptions, rots: np.ndarray, trans: np.ndarray, ctf: np.ndarray | None,
    shifts: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:  # fmt: skip
    """Make of each particle's table rows those of its tilts, `(N * tilts, ...)`.

    The stage turns about the image's y axis. Each tilt has its own shift, unless they are given;
    its path through the ice is longer: the signal falls with the cosine of the angle.
    """
    angles = np.deg2rad(options.tilt_angles_deg)
    stage = Rotation.from_rotvec(angles[:, None] * [0, 1, 0]).as_matrix()
    rots = np.einsum("tij,njk->ntik", stage, rots).reshape(-1, 3, 3).astype(np.float32)
    repeated = np.repeat(trans, len(angles), axis=0)
    if options.poses is None and len(angles) > 1:
        most = np.abs(trans).max(initial=0.0)
        drawn = shifts.uniform(-most, most, repeated.shape).astype(np.float32)
        first = np.arange(len(repeated)) % len(angles) == 0
        repeated = np.where(first[:, None], repeated, drawn)
    if ctf is not None:
        scale = np.tile(np.cos(angles), len(ctf))
        ctf = np.column_stack([np.repeat(ctf, len(angles), axis=0), scale]).astype(np.float32)
    return rots, repeated, ctf


class _Imager:
    """Makes images, noise-free or not, in blocks."""

    def __init__(self, model: BlobModel | VolumeModel, truth: _Truth) -> None:
        self.model, self.truth, self.D = model, truth, model.D

    def clean(self, rows: np.ndarray) -> Tensor:
        """Return noise-free raw images `(B, D, D)`."""
        t = self.truth
        ctf = None if t.ctf is None else t.ctf[rows]
        of = rows // t.tilts
        return clean_images(
            self.model, t.rots[rows], t.trans_px[rows], t.labels[of], t.coordinate[of], ctf
        )

    def noise(self, count: int, colour: str, stream: np.random.Generator) -> Tensor:
        """Return noise `(B, D, D)` of variance 1; coloured: it falls with the frequency."""
        white = torch.from_numpy(stream.standard_normal((count, self.D, self.D), np.float32))
        if colour == "white":
            return white
        k = torch.fft.fftfreq(self.D)
        power = 1 / (1 + (k[:, None] ** 2 + k**2) * 36)  # half at a sixth of the sampling frequency
        gain = (power / power.mean()).sqrt()[:, : self.D // 2 + 1]
        coloured: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) * gain, s=(self.D, self.D))
        return coloured

    def signal_variance(self, stream: np.random.Generator) -> float:
        """Measure the variance of noise-free images, not tilted, over all pixels, on a sample."""
        N = len(self.truth.labels)
        rows = np.sort(stream.permutation(N)[:_SIGNAL_SAMPLE]) * self.truth.tilts
        blocks = (self.clean(part).double() for part in _split(rows))
        sums = np.array([(block.sum().item(), block.square().sum().item()) for block in blocks])
        mean, square = sums.sum(0) / (len(rows) * self.D**2)
        return float(square - mean**2)


def _split(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[i : i + _BLOCK] for i in range(0, len(rows), _BLOCK))


def _chunks(total: int, size: int) -> Iterator[np.ndarray]:
    """Yield the images of each chunk; shows a bar on a terminal, a line every 10 % elsewhere."""
    size, tenths = -(-size // _BLOCK) * _BLOCK, 0
    with tqdm(total=total, desc="Simulating", unit="image", disable=not on_terminal()) as bar:
        for start in range(0, total, size):
            stop = min(start + size, total)
            yield np.arange(start, stop)
            bar.update(stop - start)
            if bar.disable and 10 * stop // total > tenths:
                tenths = 10 * stop // total
                logger.info(f"{stop}/{total} images simulated")


def _check_outdir(options: SimulateOptions) -> None:
    folder = Path(options.outdir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"-o {folder}: not a folder")
    there = [name for name in _OUTPUTS if (folder / name).exists()]
    if there and not options.overwrite:
        raise InputError(f"-o {folder}: already holds {there[0]}; give --overwrite to replace it")
    taken = {(folder / name).resolve() for name in _OUTPUTS}
    for flag, path in (
        ("--poses", options.poses),
        ("--ctf", options.ctf),
        *(("--volumes", path) for path in options.volumes),
    ):
        if path and {Path(path).resolve(), Path(path).resolve().parent} & taken:
            raise InputError(f"{flag} {path}: would be replaced; choose another folder for -o")


def _write_stacks(
    paths: dict[str, Path], imager: _Imager, apix: float, sigma: float, colour: str,
    stream: np.random.Generator, chunk: int,
) -> None:  # fmt: skip
    """Stream the noisy images, and the clean ones if ``paths`` names a file for them."""
    N, D = len(imager.truth.rots), imager.D
    header = host.MRCHeader.make_default_header(
        nz=N, ny=D, nx=D, dtype="float32", is_vol=False, Apix=apix
    )
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(path, "wb")) for name, path in paths.items()}
        for file in files.values():
            header.write(file)
        for rows in _chunks(N, chunk):
            blocks: dict[str, list[Tensor]] = {"clean": [], "particles": []}
            for part in _split(rows):
                clean = imager.clean(part)
                noise = sigma * imager.noise(len(part), colour, stream) if sigma else 0
                blocks["clean"].append(clean)
                blocks["particles"].append(clean + noise)
            for name, file in files.items():
                file.write(torch.cat(blocks[name]).numpy().tobytes())


def _write_tables(
    folder: Path, truth: _Truth, imager: _Imager, apix: float, train: np.ndarray, held: np.ndarray
) -> None:
    for name in _OUTPUTS:  # of an earlier simulation
        if name != "volumes":
            (folder / name).unlink(missing_ok=True)
    (folder / "volumes").mkdir(exist_ok=True)
    for old in [*folder.glob("volumes/class*.mrc"), *folder.glob("volumes/mean.mrc")]:
        forget(folder / "volumes", old.name)
        old.unlink()
    D, model = imager.D, imager.model
    # the host multiplies translations by D + 1
    write_pickle(folder / "poses.pkl", (truth.rots, truth.trans_px / np.float32(D + 1)))
    if truth.ctf is not None:
        box = np.full((len(truth.ctf), 1), D, np.float32)
        write_pickle(folder / "ctf.pkl", np.hstack([box, truth.ctf[:, :8]]))
    if truth.ctf is not None and truth.ctf.shape[1] > 8:
        _write_star(folder / "particles.star", truth.ctf[:, 8], truth.tilts)
    write_pickle(folder / "labels.pkl", truth.labels)
    if isinstance(model, BlobModel) and model.hinge_deg:
        write_pickle(folder / "coordinate.pkl", truth.coordinate)
    write_pickle(folder / "ind_train.pkl", train)
    if len(held):
        write_pickle(folder / "ind_heldout.pkl", held)
    mean = ("mean", model.mean(truth.labels, truth.coordinate))
    written = []
    for name, volume in itertools.chain(model.volumes(), [mean]):  # one at a time in memory
        written.append(f"{name}.mrc")
        path = str(folder / "volumes" / written[-1])
        host.write_mrc(path, volume, is_vol=True, Apix=apix)
    record(folder / "volumes", *written)


def _write_star(path: Path, scale: np.ndarray, tilts: int) -> None:
    """Write which images are of one particle, and their scale."""
    lines = [
        f"{row + 1:07d}@particles.mrcs p{row // tilts:06d} {value:.6f}"
        for row, value in enumerate(scale)
    ]
    columns = ("_rlnImageName #1", "_rlnGroupName #2", "_rlnCtfScalefactor #3")
    write_text(path, "\n".join(["data_", "", "loop_", *columns, *lines, "", ""]))


def simulate(options: SimulateOptions) -> Simulation:
    """Simulate particles and write them with their truth, as ``cryodrgn simulate_amort`` does.

    Files are named in ``cryodrgn_amort.commands.simulate_amort``. The stack is streamed to a
    temporary file; an earlier simulation is replaced when the new one is complete.

    Raises
    ------
    InputError
        Names the flag that does not fit; nothing has been written then.
    """
    _check_outdir(options)
    seeds = np.random.SeedSequence(options.seed).spawn(len(_STREAMS))
    streams = {k: np.random.default_rng(s) for k, s in zip(_STREAMS, seeds, strict=True)}
    model, apix = _load_model(options)
    truth = _draw(options, model, apix, streams)
    if options.ctf and truth.ctf is not None:
        if options.volumes and abs(truth.ctf[0, 0] / apix - 1) > 0.01:
            logger.warning(f"--ctf has {truth.ctf[0, 0]:.4g} angstroms per pixel, not {apix:.4g}")
        apix = round(float(truth.ctf[0, 0]), 6)
    N, D = len(truth.labels), model.D
    mixed = streams["split"].permutation(N)
    train, held = np.sort(mixed[: N - options.heldout]), np.sort(mixed[N - options.heldout :])
    imager = _Imager(model, truth)
    variance = imager.signal_variance(streams["signal"])
    sigma = math.sqrt(variance * truth.tilts / options.snr)
    each = "" if options.tilts is None else f" in {options.tilts} tilts each"
    logger.info(
        f"{N} particles of {D} px{each}; signal variance {variance:.6g}, noise sigma {sigma:.6g}"
    )

    folder = Path(options.outdir)
    os.makedirs(folder, exist_ok=True)
    names = ["particles", "clean"] if options.clean else ["particles"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(folder, "another simulate_amort writes to it"))
        _check_outdir(options)  # another may just have ended
        paths = {k: stack.enter_context(replacing(folder / f"{k}.mrcs")) for k in names}
        _write_stacks(paths, imager, apix, sigma, options.noise, streams["noise"], options.chunk)
        with recorded(folder, *(n for n in _OUTPUTS if n.endswith((".pkl", ".star")))):
            _write_tables(folder, truth, imager, apix, train, held)
    settings: dict[str, Any] = {**asdict(options), "n": len(train), "D": D, "apix": apix}
    if options.poses is None:
        settings["shift_px"] = _shift_px(options, D)
    if isinstance(model, BlobModel):
        settings.update(classes=len(model.shares), hinge_deg=model.hinge_deg)
    classes = [
        {"holds": name, "share": float(np.mean(truth.labels == k))}
        for k, name in enumerate(model.names)
    ]
    versions = {
        "cryodrgn_amort": __version__, "cryodrgn": host.VERSION,
        "numpy": np.__version__, "torch": str(torch.__version__),
    }  # fmt: skip
    summary = {
        "settings": settings, "classes": classes, "signal_variance": variance,
        "noise_sigma": sigma, "versions": versions,
    }  # fmt: skip
    with recorded(folder, "simulation.yaml"):
        write_text(folder / "simulation.yaml", yaml.safe_dump(summary, sort_keys=False))
    logger.info(f"Wrote {len(train)} particles for training, {len(held)} held out, to {folder}")
    return Simulation(folder, len(train), len(held), D, variance, sigma)
