"""What the user says of the particles - files, poses, CTFs, selection - read and checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryodrgn_amort import host
from cryodrgn_amort.checkpoints import read_pickle, to_array
from cryodrgn_amort.errors import InputError
from cryodrgn_amort.particles import Particles, odd_images, spans

if TYPE_CHECKING:
    import torch

__all__ = ["ParticleSource", "load_ctf", "load_particles", "load_poses"]

_HOLDOUT_STREAM = 0x401D
_LEAST_DEFOCUS = 20  # median in angstroms; less would be micrometres
_SCANNED = 1000  # images at a time
_HEADER_BYTES = 1024
_STACKS = (".mrcs", ".mrc")
_EXTENSIONS = (".mrcs", ".mrc", ".star", ".cs", ".txt")


@dataclass(frozen=True)
class ParticleSource:
    """Which particles, and how they are preprocessed. Names are those of ``train_vae``'s flags.

    Attributes
    ----------
    norm
        Offset and scale of the normalisation; None: estimated as the host does.
    holdout
        Particles that are left out: a fraction of them, drawn by ``seed``, or a file of their
        indices in the stack.
    held_out
        Whether those are wanted, and not the others.
    """

    particles: str
    poses: str
    ctf: str | None = None
    ind: str | None = None
    datadir: str | None = None
    invert_data: bool = True
    window: bool = True
    window_r: float = 0.85
    norm: tuple[float, float] | None = None
    max_threads: int = 16
    holdout: str | None = None
    seed: int = 0
    held_out: bool = False


def _load_ind(path: str, n: int, flag: str = "--ind") -> np.ndarray:
    what = f"{flag} {path}"
    ind = to_array(read_pickle(path, flag), what)
    if ind.dtype == bool:
        raise InputError(f"{what}: holds booleans; indices are needed (numpy.flatnonzero)")
    if ind.ndim != 1 or not np.issubdtype(ind.dtype, np.integer):
        raise InputError(f"{what}: not a list of integer indices")
    if len(ind) == 0:
        raise InputError(f"{what}: selects no particle")
    if ind.min() < 0 or ind.max() >= n:
        bad = ind.min() if ind.min() < 0 else ind.max()
        raise InputError(f"{what}: index {bad} is out of range, there are {n} particles")
    if len(np.unique(ind)) != len(ind):
        raise InputError(f"{what}: holds an index more than once")
    return ind.astype(np.int64)


def _held_out(source: ParticleSource, ind: np.ndarray, n: int) -> np.ndarray:
    """Tell which of the particles ``ind`` are held out, `(M,)` bool."""
    assert source.holdout is not None
    what = f"--holdout {source.holdout}"
    try:
        fraction = float(source.holdout)
    except ValueError:
        held = _load_ind(source.holdout, n, "--holdout")
        foreign = np.setdiff1d(held, ind)
        if len(foreign):
            raise InputError(
                f"{what}: holds particle {foreign[0]}, which --ind leaves out"
            ) from None
        chosen = np.isin(ind, held)
    else:
        if not 0 < fraction < 1:
            raise InputError(f"{what}: a fraction between 0 and 1 is needed, or a file of indices")
        mixed = np.random.default_rng([source.seed, _HOLDOUT_STREAM]).permutation(len(ind))
        chosen = np.isin(np.arange(len(ind)), mixed[: round(fraction * len(ind))])
    for which, count in (("no particle is", chosen.sum()), ("all particles are", (~chosen).sum())):
        if not count:
            raise InputError(f"{what}: {which} held out")
    return chosen


def _select(table: np.ndarray, n: int, ind: np.ndarray | None, what: str) -> np.ndarray:
    """Pick the rows of the particles from a table for the whole stack, or for ``ind`` alone."""
    if len(table) == n:
        return table if ind is None else table[ind]
    if ind is not None and len(table) == len(ind):
        return table
    also = "" if ind is None else f", {len(ind)} of them chosen by --ind"
    raise InputError(f"{what}: {len(table)} rows for {n} particles{also}")


def load_poses(
    path: str, n: int, ind: np.ndarray | None, box: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read and check poses.

    Returns
    -------
    rots
        `(N, 3, 3)` float32.
    trans_px
        Translations that centre the images, `(N, 2)` float32 in pixels; None if the file has
        none. As the host does, fractions are multiplied by box + 1.

    Raises
    ------
    InputError
        If the counts do not fit, a rotation is none, or a translation leaves the box.
    """
    what = f"--poses {path}"
    loaded = read_pickle(path, "--poses")
    parts = loaded if isinstance(loaded, (tuple, list)) else (loaded,)
    arrays = [to_array(p, what) for p in parts]
    if not 1 <= len(arrays) <= 2 or any(a.dtype.kind not in "fiu" for a in arrays):
        raise InputError(f"{what}: not poses (rotations, or rotations and translations)")
    if arrays[0].ndim != 3 or arrays[0].shape[1:] != (3, 3):
        raise InputError(f"{what}: rotations have shape {arrays[0].shape}, not (N, 3, 3)")
    rots = _select(arrays[0], n, ind, what).astype(np.float64)
    if not np.isfinite(rots).all():
        i = int(np.flatnonzero(~np.isfinite(rots).all((1, 2)))[0])
        raise InputError(f"{what}: the rotation of particle {i} is not finite")
    off = np.abs(rots @ rots.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    bad = (off > 1e-3) | (np.linalg.det(rots) < 0)
    if bad.any():
        raise InputError(f"{what}: the matrix of particle {int(np.argmax(bad))} is not a rotation")
    if len(arrays) == 1:
        return rots.astype(np.float32), None
    if arrays[1].ndim != 2 or arrays[1].shape[1] != 2:
        raise InputError(f"{what}: translations have shape {arrays[1].shape}, not (N, 2)")
    trans = _select(arrays[1], n, ind, what).astype(np.float32)
    outside = ~(np.abs(trans) <= 1).all(1)  # also catches NaN
    if outside.any():
        i = int(np.argmax(outside))
        raise InputError(
            f"{what}: translation {trans[i].tolist()} of particle {i} leaves the box; "
            "fractions of the box are needed, not pixels"
        )
    return rots.astype(np.float32), trans * (box + 1)


def load_ctf(path: str, n: int, ind: np.ndarray | None, box: int) -> np.ndarray:
    """Read and check CTF parameters.

    Returns
    -------
    numpy.ndarray
        `(N, 8)` float32: pixel size at this box (angstroms), defocus U and V (angstroms),
        astigmatism angle (degrees), voltage (kV), spherical aberration (mm), amplitude contrast,
        phase shift (degrees). Every row has its own pixel size.
    """
    what = f"--ctf {path}"
    table = to_array(read_pickle(path, "--ctf"), what)
    if table.ndim != 2 or table.shape[1] != 9 or table.dtype.kind not in "fiu":
        raise InputError(f"{what}: not CTF parameters (an array of N x 9)")
    table = _select(table, n, ind, what).astype(np.float64)
    if not np.isfinite(table).all():
        i = int(np.flatnonzero(~np.isfinite(table).all(1))[0])
        raise InputError(f"{what}: the row of particle {i} is not finite")
    if not (table[:, :2] > 0).all() or not (table[:, 5] > 0).all():
        raise InputError(f"{what}: image size, pixel size and voltage must be positive")
    defocus = np.median(np.abs(table[:, 2:4]), 0)
    for name, values, least, most, unit in (
        ("a voltage", table[:, 5], 10, 2000, "kV"),
        ("a defocus", defocus[defocus != 0], _LEAST_DEFOCUS, np.inf, "angstroms"),
        ("a spherical aberration", table[:, 6], -100, 100, "mm"),
        ("an amplitude contrast", table[:, 7], 0, 1, "(a fraction)"),
    ):
        odd = values[(values < least) | (values > most)]
        if len(odd):
            raise InputError(f"{what}: {name} of {odd[0]:g} {unit}: is it in another unit?")
    apix = table[:, 0] * table[:, 1] / box
    return np.column_stack([apix, table[:, 2:]]).astype(np.float32)


def _check_header(path: str) -> None:
    """Check that a stack is as long as its header says: the host makes room for all that it says.

    Raises
    ------
    ValueError
        If it is not.
    """
    header = host.MRCHeader.parse(path)
    nx, ny, nz, more = (int(header.fields[name]) for name in ("nx", "ny", "nz", "next"))
    needed = _HEADER_BYTES + more + nx * ny * nz * np.dtype(header.dtype).itemsize
    if min(nx, ny, nz) < 1 or more < 0 or os.path.getsize(path) < needed:
        raise ValueError(f"its header tells of {nz} images of {nx} x {ny} px, which are not there")


def load_particles(
    source: ParticleSource, device: torch.device | str = "cpu", *, whole: bool = False
) -> Particles:
    """Open and check particles, poses, CTF and selection. Reads no images but a sample.

    Parameters
    ----------
    whole
        See ``Particles``.

    Raises
    ------
    InputError
        Names the flag and file that do not fit.
    """
    what = f"PARTICLES {source.particles}"
    if not source.particles.endswith(_EXTENSIONS):
        raise InputError(f"{what}: not one of {', '.join(_EXTENSIONS)}")
    if not os.path.isfile(source.particles):
        raise InputError(f"{what}: no such file (a folder does not count)")
    try:
        if source.particles.endswith(_STACKS):
            _check_header(source.particles)
        with host.quiet():
            stack = host.ImageSource.from_file(
                source.particles, lazy=True, datadir=source.datadir or ""
            )
            n, box = stack.n, stack.D
            stack.images([n - 1])  # a truncated stack ends before its last image
    except Exception as err:  # whatever the host's readers raise
        raise InputError(f"{what}: cannot be read ({type(err).__name__}: {err})") from err
    if np.issubdtype(np.dtype(stack.dtype), np.integer):
        raise InputError(
            f"{what}: stored as {np.dtype(stack.dtype).name}, which the host cannot train on; "
            "convert it to float32"
        )
    if box % 2:
        raise InputError(f"{what}: the box of {box} pixels is odd; the host needs an even one")
    ind = _load_ind(source.ind, n) if source.ind else None
    rots, trans = load_poses(source.poses, n, ind, box)
    ctf = load_ctf(source.ctf, n, ind, box) if source.ctf else None
    held = None
    if source.holdout is not None:
        ind = np.arange(n) if ind is None else ind
        chosen = _held_out(source, ind, n)
        held, wanted = ind[chosen], chosen if source.held_out else ~chosen
        ind, rots = ind[wanted], rots[wanted]
        trans = None if trans is None else trans[wanted]
        ctf = None if ctf is None else ctf[wanted]
    try:
        with host.quiet():
            images = host.ImageDataset(
                source.particles,
                lazy=True,
                norm=source.norm,
                invert_data=source.invert_data,
                ind=ind,
                window=source.window,
                datadir=source.datadir,
                window_r=source.window_r,
                max_threads=source.max_threads,
            )
    except Exception as err:
        raise InputError(f"{what}: images cannot be read ({type(err).__name__}: {err})") from err
    if not np.isfinite(images.norm).all() or not images.norm[1] > 0:
        rows = np.arange(images.N) if ind is None else ind
        chunks = (np.arange(images.N)[first : first + _SCANNED]
                  for first in range(0, images.N, _SCANNED))  # fmt: skip
        odd = [
            row
            for chunk in chunks
            for row in rows[chunk[~spans(images.src.images(chunk)).isfinite().numpy()]].tolist()
        ]
        if not odd:
            raise InputError(f"{what}: the images are constant")
        raise InputError(f"{what}: {odd_images(odd, 'not finite')}; leave them out by --ind")
    found = Particles(images, rots, trans, ctf, ind=ind, whole=whole, device=device)
    found.held_out = held
    return found
