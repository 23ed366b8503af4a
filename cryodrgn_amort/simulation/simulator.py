"""Particles with known heterogeneity, imaged as the host models them.

Images are the negative of CTF times projection, which the host inverts by default; moving an image
by its translation centres it. The CTF acts on the box alone, as in the host's own model of an
image: what it spreads beyond one edge comes back at the opposite one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
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
    forget,
    locked,
    on_terminal,
    record,
    recorded,
    replacing,
    write_pickle,
    write_text,
)
from cryodrgn_amort.simulation.imager import ModelImager, split
from cryodrgn_amort.simulation.like import TRUTH, RunImager

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from cryodrgn_amort.core import Registry
    from cryodrgn_amort.options import SimulateOptions
    from cryodrgn_amort.simulation.imager import Imager


__all__ = ["Simulation", "simulate"]
logger = logging.getLogger("cryodrgn_amort")

_CHUNK = 512  # particles in memory, a multiple of those computed together
_STREAMS = (
    "rotations", "shifts", "ctf", "labels", "coordinate", "split", "signal", "noise",
    "latents",
)  # fmt: skip
_OUTPUTS = (
    "particles.mrcs", "particles.star", "clean.mrcs", "poses.pkl", "ctf.pkl", "labels.pkl",
    "coordinate.pkl", "ind_train.pkl", "ind_heldout.pkl", "simulation.yaml", "volumes",
    TRUTH,
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


def _chunks(total: int, size: int) -> Iterator[np.ndarray]:
    """Yield the images of each chunk; shows a bar on a terminal, a line every 10 % elsewhere."""
    tenths = 0
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
        ("--noise-spectrum", options.noise_spectrum),
        *(("--volumes", path) for path in options.volumes),
        *(("--atoms", path) for path in options.atoms),
        ("--like", options.like),
    ):
        if path and {Path(path).resolve(), Path(path).resolve().parent} & taken:
            raise InputError(f"{flag} {path}: would be replaced; choose another folder for -o")


def _write_stacks(paths: dict[str, Path], imager: Imager, stream: np.random.Generator) -> None:
    """Stream the noisy images, and the clean ones if ``paths`` names a file for them."""
    N, D = len(imager.truth.rots), imager.D
    header = host.MRCHeader.make_default_header(
        nz=N, ny=D, nx=D, dtype="float32", is_vol=False, Apix=imager.apix
    )
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(path, "wb")) for name, path in paths.items()}
        for file in files.values():
            header.write(file)
        for rows in _chunks(N, _CHUNK):
            blocks: dict[str, list[Tensor]] = {"clean": [], "particles": []}
            for part in split(rows):
                clean = imager.clean(part)
                blocks["clean"].append(clean)
                blocks["particles"].append(clean + imager.noise(part, stream))
            for name, file in files.items():
                file.write(torch.cat(blocks[name]).numpy().tobytes())


def _write_tables(folder: Path, imager: Imager, train: np.ndarray, held: np.ndarray) -> None:
    for name in _OUTPUTS:  # of an earlier simulation
        if (folder / name).is_file():
            (folder / name).unlink()
    shutil.rmtree(folder / TRUTH, ignore_errors=True)
    (folder / "volumes").mkdir(exist_ok=True)
    for old in (p for k in ("class*", "part*", "mean") for p in folder.glob(f"volumes/{k}.mrc")):
        forget(folder / "volumes", old.name)
        old.unlink()
    D, truth = imager.D, imager.truth
    # the host multiplies translations by D + 1
    write_pickle(folder / "poses.pkl", (truth.rots, truth.trans_px / np.float32(D + 1)))
    if truth.ctf is not None:
        box = np.full((len(truth.ctf), 1), D, np.float32)
        write_pickle(folder / "ctf.pkl", np.hstack([box, truth.ctf[:, :8]]))
    if truth.ctf is not None and truth.ctf.shape[1] > 8:
        _write_star(folder / "particles.star", truth.ctf[:, 8], truth.tilts)
    write_pickle(folder / "labels.pkl", truth.labels)
    if imager.moves:
        write_pickle(folder / "coordinate.pkl", truth.coordinate)
    write_pickle(folder / "ind_train.pkl", train)
    if len(held):
        write_pickle(folder / "ind_heldout.pkl", held)
    written = []
    for name, volume in imager.volumes():  # one at a time in memory
        written.append(f"{name}.mrc")
        path, apix = str(folder / "volumes" / written[-1]), imager.apix * D / len(volume)
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


def simulate(options: SimulateOptions, plugins: Registry | None = None) -> Simulation:
    """Simulate particles and write them with their truth, as ``cryodrgn simulate_amort`` does.

    Files are named in ``cryodrgn simulate_amort --help``. The stack is streamed to a
    temporary file; an earlier simulation is replaced when the new one is complete.

    Parameters
    ----------
    plugins
        With which the run of ``--like`` is opened.

    Raises
    ------
    InputError
        Names the flag that does not fit; nothing has been written then.
    """
    _check_outdir(options)
    seeds = np.random.SeedSequence(options.seed).spawn(len(_STREAMS))
    streams = {k: np.random.default_rng(s) for k, s in zip(_STREAMS, seeds, strict=True)}
    imager: Imager
    if options.like is None:
        imager = ModelImager(options, streams)
    else:
        assert plugins is not None
        imager = RunImager(options, streams, plugins)
    N, D = len(imager.truth.labels), imager.D
    mixed = streams["split"].permutation(N)
    train, held = np.sort(mixed[: N - options.heldout]), np.sort(mixed[N - options.heldout :])
    each = "" if options.tilts is None else f" in {options.tilts} tilts each"
    logger.info(
        f"{N} particles of {D} px{each}; signal variance {imager.variance:.6g}, noise sigma "
        f"{imager.sigma:.6g}"
    )

    folder = Path(options.outdir)
    os.makedirs(folder, exist_ok=True)
    names = ["particles", "clean"] if options.clean else ["particles"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(folder, "another simulate_amort writes to it"))
        _check_outdir(options)  # another may just have ended
        paths = {k: stack.enter_context(replacing(folder / f"{k}.mrcs")) for k in names}
        _write_stacks(paths, imager, streams["noise"])
        with recorded(folder, *(n for n in _OUTPUTS if n.endswith((".pkl", ".star")))):
            _write_tables(folder, imager, train, held)
            imager.write(folder)
    with recorded(folder, "simulation.yaml"):
        text = yaml.safe_dump(_summary(options, imager, len(train)), sort_keys=False)
        write_text(folder / "simulation.yaml", text)
    logger.info(f"Wrote {len(train)} particles for training, {len(held)} held out, to {folder}")
    return Simulation(folder, len(train), len(held), D, imager.variance, imager.sigma)


def _summary(options: SimulateOptions, imager: Imager, n: int) -> dict[str, Any]:
    """Return what simulation.yaml holds; ``n`` particles are for training."""
    own = {"n": n, "D": imager.D, "apix": imager.apix, **imager.settled(options)}
    versions = {
        "cryodrgn_amort": __version__, "cryodrgn": host.VERSION,
        "numpy": np.__version__, "torch": str(torch.__version__),
    }  # fmt: skip
    return {
        "settings": {**asdict(options), **own}, **imager.facts(),
        "signal_variance": imager.variance, "noise_sigma": imager.sigma, "versions": versions,
    }  # fmt: skip
