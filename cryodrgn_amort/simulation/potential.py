"""The electrostatic potential of atoms, on a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from scipy.interpolate import BSpline, CubicSpline

__all__ = ["VOLTS", "Atoms", "potential"]

VOLTS = 47.87801
"""h^2 / (2 pi m e), in volts times square angstroms: a scattering amplitude in angstroms times
this is the integral of the potential, in volts times cubic angstroms.
"""
_WIDTH = 8  # grid points that an atom is spread to along an axis
_NODES = 48  # frequencies between which scattering factors are splines
_RANK = 1e-12  # smallest eigenvalue kept, over the largest: amplitudes to 1e-6
_TOGETHER = 8192  # atoms spread at once


@dataclass(frozen=True)
class Atoms:
    """Atoms of a model.

    Attributes
    ----------
    where
        `(N, 3)`, x y z in angstroms.
    occupancy, b_factor
        `(N,)`; B in square angstroms.
    element
        `(N,)`: positions in ``coefficients``.
    coefficients
        Of each element, five a in angstroms and five b in square angstroms, `(E, 10)`: the
        scattering factor for electrons is the sum of a * exp(-b s^2 / 4) at s cycles per angstrom.
        International Tables for Crystallography C (2011), table 4.3.2.2, as gemmi has them.
    """

    where: np.ndarray
    occupancy: np.ndarray
    b_factor: np.ndarray
    element: np.ndarray
    coefficients: np.ndarray

    def chosen(self, which: np.ndarray) -> Atoms:
        """Return some of the atoms."""
        return Atoms(
            self.where[which], self.occupancy[which], self.b_factor[which], self.element[which],
            self.coefficients,
        )  # fmt: skip

    def centre(self) -> tuple[np.ndarray, float]:
        """Return the centre `(3,)` of the potential, and its integral over ``VOLTS``."""
        weights = self.occupancy * self.coefficients[self.element, :5].sum(1)
        return weights @ self.where / weights.sum(), float(weights.sum())


def potential(atoms: Atoms, F: int, D: int, apix: float, origin: np.ndarray) -> np.ndarray:
    """Return the potential in volts, `(F, F, F)` float32, of a box of D pixels of ``apix``.

    It has all frequencies of images of D pixels; beyond, up to those of F, it falls off as half a
    cosine, so that it ends in real space, too. The scattering factors of all elements and
    B-factors are sums of few functions of the frequency, to a millionth; atoms are spread once for
    each of them by a B-spline, to a grid of half a pixel, and its fall-off in Fourier space is
    undone.

    Parameters
    ----------
    origin
        What is at voxel ``F // 2``, in angstroms.
    """
    M, extent = 2 * D, D * apix
    axis, half = np.arange(-(F // 2), F - F // 2), np.arange(F // 2 + 1)
    shells = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + half**2)  # cycles per box
    beyond = np.clip((shells - D / 2) / (F / 2 - D / 2), 0, 1)
    weights, functions = _separated(atoms, F / 2 / extent)
    places = (atoms.where - origin) / (extent / M) + M // 2
    total = np.zeros(shells.shape, np.complex64)
    for r in range(weights.shape[1]):
        grid = scipy.fft.rfftn(_spread(places, weights[:, r], M), overwrite_x=True)
        cut = grid[np.ix_(axis % M, axis % M, half)]
        total += cut * functions[r](np.minimum(shells, F / 2) / extent).astype(np.float32)
    fall = [np.sinc(k / M) ** _WIDTH for k in (axis, axis, half)]
    kept = VOLTS * (F / extent) ** 3 * (np.cos(np.pi * beyond) + 1) / 2
    total *= (kept / np.einsum("z,y,x->zyx", *fall)).astype(np.float32)
    # the origin is at half of either grid: these phases cancel
    total = scipy.fft.ifftshift(total, axes=(0, 1))
    volume: np.ndarray = scipy.fft.irfftn(total, s=(F, F, F), overwrite_x=True)
    return np.ascontiguousarray(volume, np.float32)


def _separated(atoms: Atoms, most: float) -> tuple[np.ndarray, list[Any]]:
    """Return weights of atoms `(N, R)` and R functions of s, in cycles per angstrom up to ``most``.

    Weights times functions are the atoms' scattering factors, with occupancies and B-factors.
    """
    s = np.linspace(0, most, _NODES)
    pairs = np.stack([atoms.element, np.round(atoms.b_factor, 2)], 1)
    kinds, kind = np.unique(pairs, axis=0, return_inverse=True)
    of = atoms.coefficients[kinds[:, 0].astype(int)]
    quarter = s**2 / 4
    factors = np.einsum("ka,kas->ks", of[:, :5], np.exp(-of[:, 5:, None] * quarter))
    factors *= np.exp(-kinds[:, 1:] * quarter)
    values, vectors = np.linalg.eigh(factors.T @ factors)
    kept = vectors[:, values > _RANK * values[-1]]
    functions = [CubicSpline(s, column) for column in kept.T]
    return (factors @ kept)[kind.ravel()] * atoms.occupancy[:, None], functions


def _spread(places: np.ndarray, weights: np.ndarray, M: int) -> np.ndarray:
    """Spread weights `(N,)` at places `(N, 3)`, x y z, to a periodic grid `(z, y, x)`."""
    spline = BSpline.basis_element(np.arange(_WIDTH + 1), extrapolate=False)
    steps, grid = np.arange(_WIDTH), np.zeros(M**3, np.float32)
    for start in range(0, len(places), _TOGETHER):
        chunk = slice(start, start + _TOGETHER)
        first = np.floor(places[chunk])
        share = np.nan_to_num(spline((places[chunk] - first)[..., None] + _WIDTH - 1 - steps))
        x, y, z = ((first.astype(int)[..., None] - _WIDTH // 2 + 1 + steps) % M).swapaxes(0, 1)
        index = (z[:, :, None, None] * M + y[:, None, :, None]) * M + x[:, None, None]
        by_x, by_y, by_z = share.swapaxes(0, 1)
        values = np.einsum("n,nz,ny,nx->nzyx", weights[chunk], by_z, by_y, by_x, optimize=True)
        np.add.at(grid, index.ravel(), values.ravel().astype(np.float32))
    return grid.reshape(M, M, M)
