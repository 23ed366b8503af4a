"""Open the particles that the user names: stack, poses, CTFs, selection, tilts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryodrgn_amort import host
from cryodrgn_amort.core import InputError, read_ind
from cryodrgn_amort.data.particles import Particles, odd_images, spans
from cryodrgn_amort.data.poses_and_ctf import load_ctf, load_poses
from cryodrgn_amort.data.tilts import TiltSeries

if TYPE_CHECKING:
    import torch


__all__ = ["ParticleSource", "load_particles"]

_HOLDOUT_STREAM = 0x401D
_SCANNED = 1000  # images at a time
_HEADER_BYTES = 1024
_STACKS = (".mrcs", ".mrc", ".map", ".st")
_EXTENSIONS = (*_STACKS, ".star", ".cs", ".txt")


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
    ntilts
        Images of a tilt series that are used of each particle; None: every image is a particle.
        ``ind``, ``holdout`` are then about particles, poses and CTFs still about images.
    refined
        Poses that a run has refined, of exactly these particles; None: those of ``poses`` hold.
    refined_px
        Whether translations there are in pixels.
    without
        Which of the particles that all this names are left out, by their positions among them.
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
    ntilts: int | None = None
    random_tilts: bool = False
    dose_per_tilt: float | None = None
    angle_per_tilt: float = 3.0
    refined: str | None = None
    refined_px: bool = False
    without: tuple[int, ...] = ()


def _held_out(source: ParticleSource, ind: np.ndarray, n: int) -> np.ndarray:
    """Tell which of the particles ``ind`` are held out, `(M,)` bool."""
    assert source.holdout is not None
    what = f"--holdout {source.holdout}"
    try:
        fraction = float(source.holdout)
    except ValueError:
        held = read_ind(source.holdout, "--holdout", n)
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
    n, box = _read_stack(source)
    members = None if source.ntilts is None else _members(source)
    total = n if members is None else len(members)
    ind = read_ind(source.ind, "--ind", total) if source.ind else None
    rows = _images_of(members, ind)
    rots: np.ndarray | None = None
    trans: np.ndarray | None = None
    if source.refined is None:
        rots, trans = load_poses(source.poses, n, rows, box)
    ctf = load_ctf(source.ctf, n, rows, box) if source.ctf else None
    held, had = None, np.arange(n) if rows is None else rows
    if source.holdout is not None:
        ind = np.arange(total) if ind is None else ind
        chosen = _held_out(source, ind, total)
        held, ind = ind[chosen], ind[chosen if source.held_out else ~chosen]
        rows = _images_of(members, ind)
    own = rows  # of the run that has refined their poses
    if source.without:
        ind = np.delete(np.arange(total) if ind is None else ind, source.without)
        rows = _images_of(members, ind)
    if rows is not None:
        kept = _places(had, rows)
        rots, trans, ctf = (None if t is None else t[kept] for t in (rots, trans, ctf))
    images = _read_images(source, rows)
    tilts = None
    if source.ntilts is not None:
        tilts, ctf = _tilt_series(source, images, ctf)
    if rots is None:
        own = np.arange(n) if own is None else own
        rots, trans = _refined_poses(source, own, rows, box)
    found = Particles(
        images, rots, trans, ctf, ind=ind, total=total, tilts=tilts, whole=whole, device=device
    )
    found.held_out, found.left_out = held, source.without
    return found


def _read_stack(source: ParticleSource) -> tuple[int, int]:
    """Return how many images a stack has and their size in pixels, once it is known to be sound."""
    what = f"PARTICLES {source.particles}"
    if not source.particles.lower().endswith(_EXTENSIONS):
        raise InputError(f"{what}: not one of {', '.join(_EXTENSIONS)}")
    if source.particles.lower().endswith(".star") and not source.particles.endswith(".star"):
        raise InputError(f"{what}: the host wants .star in small letters; rename the file")
    if not os.path.isfile(source.particles):
        raise InputError(f"{what}: no such file (a folder does not count)")
    try:
        if source.particles.lower().endswith(_STACKS):
            _check_header(source.particles)
        with host.quiet(), host.any_suffix():
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
    return n, box


def _read_images(source: ParticleSource, rows: np.ndarray | None) -> host.ImageDataset:
    """Open the images ``rows`` of a stack; None: all. Refuses what cannot be normalised."""
    what = f"PARTICLES {source.particles}"
    try:
        with host.quiet(), host.any_suffix():
            images = _open(source, rows)
    except Exception as err:
        raise InputError(f"{what}: images cannot be read ({type(err).__name__}: {err})") from err
    if not np.isfinite(images.norm).all() or not images.norm[1] > 0:
        rows = np.arange(images.N) if rows is None else rows
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
    return images


def _refined_poses(
    source: ParticleSource, own: np.ndarray, rows: np.ndarray | None, box: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the poses that a run has refined of its images ``own``, and pick those of ``rows``."""
    assert source.refined is not None
    rots, trans = load_poses(source.refined, len(own), None, box, "RUN", in_px=source.refined_px)
    if rows is not None:
        kept = _places(own, rows)
        rots, trans = rots[kept], None if trans is None else trans[kept]
    return rots, trans


def _open(source: ParticleSource, rows: np.ndarray | None) -> host.ImageDataset:
    given = {
        "lazy": True,
        "norm": source.norm,
        "invert_data": source.invert_data,
        "ind": rows,
        "window": source.window,
        "datadir": source.datadir,
        "window_r": source.window_r,
        "max_threads": source.max_threads,
    }
    if source.ntilts is None:
        return host.ImageDataset(source.particles, **given)
    return host.TiltSeriesData(
        source.particles,
        source.ntilts,
        dose_per_tilt=source.dose_per_tilt,
        angle_per_tilt=source.angle_per_tilt,
        **given,
    )


def _members(source: ParticleSource) -> list[np.ndarray]:
    """Return the images of each particle of a tilt series, as positions in the stack."""
    what = f"PARTICLES {source.particles}"
    if not source.particles.endswith(".star"):
        raise InputError(f"{what}: a tilt series needs a .star file, which groups its images")
    try:
        with host.quiet():
            members, _ = host.TiltSeriesData.parse_particle_tilt(source.particles)
            table = host.parse_star(source.particles)[0]
            scale = np.asarray(table.get("_rlnCtfScalefactor", np.nan), float)
    except Exception as err:  # whatever the host's reader raises
        raise InputError(f"{what}: not a tilt series ({err})") from None
    if not scale.ndim:
        raise InputError(f"{what}: not a tilt series (it has no column _rlnCtfScalefactor)")
    if not np.isfinite(scale).all():
        bad = int(np.flatnonzero(~np.isfinite(scale))[0])
        raise InputError(f"{what}: _rlnCtfScalefactor of image {bad} is no finite number")
    assert source.ntilts is not None
    counts = np.array([len(own) for own in members])
    if counts.min() < source.ntilts:
        few = int(counts.argmin())
        raise InputError(
            f"--ntilts {source.ntilts}: particle {few} of {source.particles} has {counts[few]} "
            f"images only ({(counts < source.ntilts).sum()} particles have too few)"
        )
    return list(members)


def _images_of(members: list[np.ndarray] | None, ind: np.ndarray | None) -> np.ndarray | None:
    """Return the positions in the stack of the images of particles ``ind``; None: all."""
    if ind is None or members is None:
        return ind
    return np.concatenate([members[i] for i in ind])


def _places(had: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return where the numbers ``wanted`` are among those ``had``."""
    order = np.argsort(had)
    return order[np.searchsorted(had, wanted, sorter=order)]


def _tilt_series(
    source: ParticleSource, images: host.TiltSeriesData, ctf: np.ndarray | None
) -> tuple[TiltSeries, np.ndarray | None]:
    """Return what makes a tilt series of images, and their CTFs with their scale, `(N, 9)`."""
    assert source.ntilts is not None
    if source.dose_per_tilt is not None:
        if ctf is None:
            raise InputError(f"--dose-per-tilt {source.dose_per_tilt}: needs --ctf")
        if len(set(ctf[:, 4])) > 1 or ctf[0, 4] not in (200, 300):
            raise InputError(
                f"--dose-per-tilt {source.dose_per_tilt}: known for 200 and 300 kV alone, "
                f"--ctf {source.ctf} has {ctf[0, 4]:g}"
            )
        images.voltage = float(ctf[0, 4])
    if ctf is not None:
        ctf = np.column_stack([ctf, images.ctfscalefactor]).astype(np.float32)
    return TiltSeries(images, source.ntilts, random=source.random_tilts), ctf
