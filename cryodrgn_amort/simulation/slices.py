"""Projections as central slices of Fourier transforms.

Geometry, as in the host: volumes are `(z, y, x)` with the origin at pixel `D // 2`, and a point `p`
of the object is seen at the first two coordinates of `rot @ p`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import scipy.fft
import torch
from scipy.ndimage import map_coordinates

from cryodrgn_amort import host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


__all__ = ["Slices", "sample", "transform"]

_SUPPORT = 4  # a cubic B-spline reaches two entries to each side


def transform(volume: np.ndarray, D: int | None = None) -> np.ndarray:
    """Return the Hartley transform from which ``sample`` interpolates, at every half frequency.

    The volume is padded to twice its box; the fall-off in real space that interpolation by cubic
    B-splines brings is undone beforehand.

    Parameters
    ----------
    volume
        `(F, F, F)`, float32, F even.
    D
        Box of the images: what is well beyond their Nyquist frequency is left out. None: F.

    Returns
    -------
    np.ndarray
        `(2 * F,) * 3` or `(2 * D + 8,) * 3`, whichever is smaller, float32, frequency 0 in its
        middle.
    """
    F, half = len(volume), len(volume) // 2
    falloff = np.sinc((np.arange(F) - half) / (2 * F)) ** 4  # of a cubic B-spline
    flat = volume / np.einsum("z,y,x->zyx", falloff, falloff, falloff)
    if D is not None and D + _SUPPORT < F:
        return _low(flat.astype(np.float32), D + _SUPPORT)
    padded = np.pad(flat.astype(np.float32), (half, half))
    fourier = host.fftn_center(torch.from_numpy(padded))
    hartley: np.ndarray = (fourier.real - fourier.imag).numpy()
    return hartley


def _low(flat: np.ndarray, kept: int) -> np.ndarray:
    """Return the middle `(2 * kept,) * 3` of ``transform``, axis by axis, to need less memory."""
    F, j = len(flat), np.arange(-kept, kept)
    phase = (1j ** (j % 4)).astype(np.complex64)  # the origin is a quarter of the padded box away
    fourier = flat
    for axis in range(3):
        along = scipy.fft.fft(fourier, 2 * F, axis=axis)
        fourier = np.take(along, j, axis=axis, mode="wrap")
        fourier *= phase.reshape([-1 if axis == k else 1 for k in range(3)])
    hartley: np.ndarray = fourier.real - fourier.imag
    return hartley


def sample(hartley: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Interpolate a ``transform`` at `(P, 3)` frequencies x y z, in cycles per box: `(P,)`."""
    where = (2 * k + len(hartley) // 2)[:, ::-1].T  # z y x
    values: np.ndarray = map_coordinates(
        hartley, where, np.float32, order=3, mode="grid-wrap", prefilter=False
    )
    return values


class Slices:
    """Takes slices at the frequencies of an image of D pixels below Nyquist.

    Attributes
    ----------
    k
        `(P, 2)`: the frequencies x y, in cycles per box.
    """

    def __init__(self, D: int) -> None:
        self.D = D
        self._lattice = host.Lattice(D + 1, extent=0.5)
        k = self._lattice.freqs2d.numpy() * D
        # without the Nyquist frequency, every pixel has its opposite
        self._inside = torch.from_numpy((k**2).sum(1) < (D / 2 - 1e-3) ** 2)
        self.k = np.round(k[self._inside.numpy()])
        self._pixel = torch.from_numpy((self.k + D // 2) @ [1, D]).long()

    def _slice(self, hartley: np.ndarray | None, rot: np.ndarray) -> np.ndarray:
        if hartley is None:
            return np.zeros(len(self.k), np.float32)
        return sample(hartley, self.k @ rot[:2].astype(float))

    def take(
        self, hartley: Sequence[np.ndarray | None], rots: np.ndarray, shift_px: np.ndarray
    ) -> Tensor:
        """Return slices `(B, P)` of ``transform``s, each at a rotation, moved by `(B, 2)` pixels.

        None stands for an empty volume.
        """
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            slices = torch.from_numpy(np.stack(list(pool.map(self._slice, hartley, rots))))
        shifts = torch.from_numpy(np.float32(shift_px)).unsqueeze(1)
        moved: Tensor = self._lattice.translate_ht(slices, shifts, self._inside).squeeze(1)
        return moved

    def images(self, slices: Tensor) -> Tensor:
        """Transform slices `(B, P)` to images `(B, D, D)`."""
        images = torch.zeros(len(slices), self.D * self.D)
        images[:, self._pixel] = slices
        projected: Tensor = host.iht2_center(images.view(-1, self.D, self.D))
        return projected
