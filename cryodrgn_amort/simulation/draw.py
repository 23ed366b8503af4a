"""What is drawn for each particle of a simulation, or given by the user: pose, CTF, truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.transform import Rotation

from cryodrgn_amort.core import InputError, read_pickle
from cryodrgn_amort.data import load_ctf, load_poses

if TYPE_CHECKING:
    from cryodrgn_amort.options import SimulateOptions
    from cryodrgn_amort.simulation.specimens import Model


__all__ = ["Drawn", "draw", "most_shift_px", "table_apix"]


@dataclass(frozen=True)
class Drawn:
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


def table_apix(options: SimulateOptions, D: int) -> float | None:
    """Return the pixel size of ``--ctf`` in a box of D pixels, in angstroms; None without."""
    rows = _table_rows(options)
    if options.ctf is None or not rows:
        return None
    return round(float(load_ctf(options.ctf, rows, None, D)[0, 0]), 6)


def most_shift_px(options: SimulateOptions, D: int) -> float:
    """Return how far particles are off centre at most, in pixels."""
    return 1.5 * D / 32 if options.shift_px is None else options.shift_px


def draw(
    options: SimulateOptions, model: Model, apix: float,
    streams: dict[str, np.random.Generator],
) -> Drawn:  # fmt: skip
    """Draw what the user does not give, each kind from its own stream.

    Raises
    ------
    InputError
        Names the flag that does not fit.
    """
    (N, rows), D = _count(options), model.D
    shares = model.shares if options.shares is None else np.array(options.shares, float)
    if len(shares) != len(model.shares):
        given = " ".join(map(str, options.shares or ()))
        raise InputError(f"--shares {given}: {len(model.shares)} classes need as many shares")
    if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0):
        raise InputError(f"--shares {' '.join(map(str, shares))}: must not be negative")
    shift_px = most_shift_px(options, D)
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
    coordinate = streams["coordinate"].random(N) if model.hinge_deg else np.full(N, 0.5)
    return Drawn(rots, trans, ctf, labels, coordinate)


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
