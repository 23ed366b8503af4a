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
from tqdm import tqdm

from cryodrgn_amort import host
from cryodrgn_amort.core import (
    InputError,
    __version__,
    available_memory,
    forget,
    locked,
    on_terminal,
    record,
    recorded,
    replacing,
    write_pickle,
    write_text,
)
from cryodrgn_amort.options import MOST_CLASSES, SimulateOptions
from cryodrgn_amort.simulation.atoms import load_atoms
from cryodrgn_amort.simulation.draw import Drawn, draw, most_shift_px, table_apix
from cryodrgn_amort.simulation.noise_spectrum import noise_power, read_spectrum, spectrum_power
from cryodrgn_amort.simulation.parts import PartModel
from cryodrgn_amort.simulation.specimens import BlobModel, VolumeModel, clean_images, read_volume

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from cryodrgn_amort.simulation.noise_spectrum import Spectrum
    from cryodrgn_amort.simulation.specimens import Model


__all__ = ["Simulation", "simulate"]
logger = logging.getLogger("cryodrgn_amort")

_BLOCK = 64
"""Particles computed together, whatever the chunk: rounding can depend on it."""
_CHUNK = 512  # particles in memory

_SIGNAL_SAMPLE = 1000
_STREAMS = ("rotations", "shifts", "ctf", "labels", "coordinate", "split", "signal", "noise")
_OUTPUTS = (
    "particles.mrcs", "particles.star", "clean.mrcs", "poses.pkl", "ctf.pkl", "labels.pkl",
    "coordinate.pkl", "ind_train.pkl", "ind_heldout.pkl", "simulation.yaml", "volumes",
)  # fmt: skip


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


def _load_model(options: SimulateOptions) -> tuple[Model, float]:
    """Return the object and its pixel size in angstroms."""
    voxels = (options.D or 0) ** 3 * max(1, len(options.volumes))
    if 32 * voxels > available_memory():
        raise InputError(f"-D {options.D}: volumes of this box do not fit memory")
    if options.atoms:
        D = options.D or 64
        model = load_atoms(options, D, options.apix or table_apix(options, D))
        return model, model.apix
    if not options.volumes:
        D = options.D or 32
        classes = options.classes or MOST_CLASSES
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


class _Imager:
    """Makes images, noise-free or not, in blocks."""

    def __init__(self, model: Model, truth: Drawn) -> None:
        self.model, self.truth, self.D = model, truth, model.D

    def clean(self, rows: np.ndarray) -> Tensor:
        """Return noise-free raw images `(B, D, D)`."""
        t = self.truth
        ctf = None if t.ctf is None else t.ctf[rows]
        of = rows // t.tilts
        return clean_images(
            self.model, t.rots[rows], t.trans_px[rows], t.labels[of], t.coordinate[of], ctf
        )

    def noise(self, count: int, power: Tensor | None, stream: np.random.Generator) -> Tensor:
        """Return noise `(B, D, D)` of variance 1; ``power``: see ``noise_power``."""
        white = torch.from_numpy(stream.standard_normal((count, self.D, self.D), np.float32))
        if power is None:
            return white
        fourier = torch.fft.rfft2(white) * power.sqrt()
        coloured: Tensor = torch.fft.irfft2(fourier, s=(self.D, self.D))
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


def _noise(options: SimulateOptions, D: int) -> tuple[Spectrum | None, Tensor | None]:
    """Return the spectrum that ``--noise-spectrum`` names, and the noise's power."""
    if options.noise_spectrum is None:
        return None, noise_power(options.noise or "white", D)
    spectrum = read_spectrum(options.noise_spectrum, D)
    return spectrum, spectrum_power(spectrum, D)


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
        ("--noise-spectrum", options.noise_spectrum),
        *(("--volumes", path) for path in options.volumes),
        *(("--atoms", path) for path in options.atoms),
    ):
        if path and {Path(path).resolve(), Path(path).resolve().parent} & taken:
            raise InputError(f"{flag} {path}: would be replaced; choose another folder for -o")


def _write_stacks(
    paths: dict[str, Path], imager: _Imager, apix: float, sigma: float, power: Tensor | None,
    stream: np.random.Generator,
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
        for rows in _chunks(N, _CHUNK):
            blocks: dict[str, list[Tensor]] = {"clean": [], "particles": []}
            for part in _split(rows):
                clean = imager.clean(part)
                noise = sigma * imager.noise(len(part), power, stream) if sigma else 0
                blocks["clean"].append(clean)
                blocks["particles"].append(clean + noise)
            for name, file in files.items():
                file.write(torch.cat(blocks[name]).numpy().tobytes())


def _write_tables(
    folder: Path, truth: Drawn, imager: _Imager, apix: float, train: np.ndarray, held: np.ndarray
) -> None:
    for name in _OUTPUTS:  # of an earlier simulation
        if name != "volumes":
            (folder / name).unlink(missing_ok=True)
    (folder / "volumes").mkdir(exist_ok=True)
    for old in (p for k in ("class*", "part*", "mean") for p in folder.glob(f"volumes/{k}.mrc")):
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
    if model.hinge_deg:
        write_pickle(folder / "coordinate.pkl", truth.coordinate)
    write_pickle(folder / "ind_train.pkl", train)
    if len(held):
        write_pickle(folder / "ind_heldout.pkl", held)
    mean = ("mean", model.mean(truth.labels, truth.coordinate))
    parts = model.parts if isinstance(model, PartModel) else []
    named = ((f"part{i}", part.volume) for i, part in enumerate(parts))
    written = []
    for name, volume in itertools.chain(model.volumes(), [mean], named):  # one at a time in memory
        written.append(f"{name}.mrc")
        path = str(folder / "volumes" / written[-1])
        host.write_mrc(path, volume, is_vol=True, Apix=apix * D / len(volume))
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

    Files are named in ``cryodrgn simulate_amort --help``. The stack is streamed to a
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
    spectrum, power = _noise(options, model.D)
    truth = draw(options, model, apix, streams)
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
        _write_stacks(paths, imager, apix, sigma, power, streams["noise"])
        with recorded(folder, *(n for n in _OUTPUTS if n.endswith((".pkl", ".star")))):
            _write_tables(folder, truth, imager, apix, train, held)
    summary = _summary(options, imager, apix, variance, sigma, len(train))
    if spectrum is not None:
        summary["noise_spectrum"] = spectrum
    with recorded(folder, "simulation.yaml"):
        write_text(folder / "simulation.yaml", yaml.safe_dump(summary, sort_keys=False))
    logger.info(f"Wrote {len(train)} particles for training, {len(held)} held out, to {folder}")
    return Simulation(folder, len(train), len(held), D, variance, sigma)


def _summary(
    options: SimulateOptions, imager: _Imager, apix: float, variance: float, sigma: float, n: int
) -> dict[str, Any]:
    """Return what simulation.yaml holds; ``n`` particles are for training."""
    model, truth, D = imager.model, imager.truth, imager.D
    settings: dict[str, Any] = {**asdict(options), "n": n, "D": D, "apix": apix}
    if options.poses is None:
        settings["shift_px"] = most_shift_px(options, D)
    if options.noise_spectrum is None:
        settings["noise"] = options.noise or "white"
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
    more = {"object": model.facts()} if isinstance(model, PartModel) else {}
    return {
        "settings": settings, "classes": classes, **more, "signal_variance": variance,
        "noise_sigma": sigma, "versions": versions,
    }  # fmt: skip
