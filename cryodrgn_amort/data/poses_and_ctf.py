"""Poses and CTF parameters of a stack, read and checked."""

from __future__ import annotations

import logging

import numpy as np

from cryodrgn_amort.core import InputError, read_pickle, to_array

__all__ = ["load_ctf", "load_poses"]
logger = logging.getLogger("cryodrgn_amort")

_LEAST_DEFOCUS = 20  # median in angstroms; less would be micrometres
_EXACT = 1e-3  # off 1 in R R'
_DECIMALS = (2, 3)  # that an export may have rounded rotations to


def _select(table: np.ndarray, n: int, ind: np.ndarray | None, what: str) -> np.ndarray:
    """Pick the rows of the particles from a table for the whole stack, or for ``ind`` alone."""
    if len(table) == n:
        return table if ind is None else table[ind]
    if ind is not None and len(table) == len(ind):
        return table
    also = "" if ind is None else f", {len(ind)} of them chosen by --ind"
    raise InputError(f"{what}: {len(table)} rows for {n} particles{also}")


def load_poses(
    path: str,
    n: int,
    ind: np.ndarray | None,
    box: int,
    flag: str = "--poses",
    *,
    in_px: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read and check poses, which ``flag`` names; translations ``in_px``, or fractions of the box.

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
    what = f"{flag} {path}"
    loaded = read_pickle(path, flag)
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
    rots = _unrounded(rots, what)
    if len(arrays) == 1:
        return rots.astype(np.float32), None
    if arrays[1].ndim != 2 or arrays[1].shape[1] != 2:
        raise InputError(f"{what}: translations have shape {arrays[1].shape}, not (N, 2)")
    trans = _select(arrays[1], n, ind, what).astype(np.float32)
    if in_px:
        trans /= np.float32(box + 1)
    outside = ~(np.abs(trans) <= 1).all(1)  # also catches NaN
    if outside.any():
        i = int(np.argmax(outside))
        raise InputError(
            f"{what}: translation {trans[i].tolist()} of particle {i} leaves the box; "
            "fractions of the box are needed, not pixels"
        )
    return rots.astype(np.float32), trans * (box + 1)


def _unrounded(matrices: np.ndarray, what: str) -> np.ndarray:
    """Check that matrices `(N, 3, 3)` are rotations; undo an export's rounding to a few decimals.

    Raises
    ------
    InputError
        If one is no rotation, however it was rounded.
    """
    off = np.abs(matrices @ matrices.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    bad = (off > _EXACT) | (np.linalg.det(matrices) < 0)
    if not bad.any():
        return matrices
    for decimals in _DECIMALS:
        if np.abs(matrices - matrices.round(decimals)).max() > 1e-6:
            continue
        left, _, right = np.linalg.svd(matrices)
        nearest: np.ndarray = left @ right
        far = np.abs(matrices - nearest).max((1, 2)) > 0.85 * 10.0**-decimals
        bad = far | (np.linalg.det(nearest) < 0)
        if not bad.any():
            turned = np.linalg.norm(matrices - nearest, axis=(1, 2)).max() / np.sqrt(2)
            logger.warning(
                f"{what}: rotations are rounded to {decimals} decimals; the nearest rotations are "
                f"used, up to {np.degrees(turned):.2g} degrees away"
            )
            return nearest
        break
    raise InputError(f"{what}: the matrix of particle {int(np.argmax(bad))} is not a rotation")


def load_ctf(
    path: str, n: int, ind: np.ndarray | None, box: int, flag: str = "--ctf"
) -> np.ndarray:
    """Read and check CTF parameters, which ``flag`` names.

    Returns
    -------
    numpy.ndarray
        `(N, 8)` float32: pixel size at this box (angstroms), defocus U and V (angstroms),
        astigmatism angle (degrees), voltage (kV), spherical aberration (mm), amplitude contrast,
        phase shift (degrees). Every row has its own pixel size.

    Raises
    ------
    InputError
        If the counts do not fit, or a number is not finite or none that it can be in its unit.
    """
    what = f"{flag} {path}"
    table = to_array(read_pickle(path, flag), what)
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
