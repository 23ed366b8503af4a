"""Volumes in Fourier space as samples on a grid, of which central slices are interpolated."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["VolumeGrid"]

_PADDED = 2  # samples to a Fourier pixel
_SOFT = 0.04  # edge of the mask, of half a box


class VolumeGrid:
    """Samples of a Hartley volume within a radius, of which slices are interpolated linearly.

    Parameters
    ----------
    radius
        In Fourier pixels.
    mask
        Radius of the sphere in which there is density, of half a box.
    """

    def __init__(self, radius: int, mask: float, device: torch.device) -> None:
        self.radius, self.middle = radius, _PADDED * radius + 1
        self.side = 2 * self.middle + 2
        along = torch.arange(self.side, device=device) - self.middle
        far = torch.stack(torch.meshgrid(along, along, along, indexing="ij")).float().norm(dim=0)
        self.shell = far.flatten().round().long().clamp(max=self.middle + 1)
        self.inside = (self.shell < self.middle + 1).nonzero()[:, 0]
        odd = self.side - 1
        away = far[:odd, :odd, :odd] * (2 * _PADDED / odd)  # in real space, of half a box
        self._mask = torch.sigmoid((mask - away) / _SOFT).double()

    def places(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """Return which 8 samples are around places `(..., 3)` in Fourier pixels, and weights."""
        at = coords * _PADDED + self.middle
        low = at.floor()
        above = at - low
        x, y, z = low.long().unbind(-1)
        index, weight = [], []
        for corner in range(8):
            up = [corner & 1, corner >> 1 & 1, corner >> 2]
            index.append(((z + up[2]) * self.side + y + up[1]) * self.side + x + up[0])
            parts = [above[..., i] if up[i] else 1 - above[..., i] for i in range(3)]
            weight.append(parts[0] * parts[1] * parts[2])
        return torch.stack(index, -1), torch.stack(weight, -1)

    def shell_means(self, values: Tensor) -> Tensor:
        """Average samples `(V, ...)` over shells: `(shells, ...)`."""
        sums = values.new_zeros(self.middle + 2, *values.shape[1:])
        counts = torch.bincount(self.shell, minlength=self.middle + 2).clamp(min=1)
        sums.index_add_(0, self.shell, values)
        return sums / counts.view(-1, *[1] * (values.ndim - 1))

    def masked(self, values: Tensor) -> Tensor:
        """Remove what volumes `(V, K)` have outside of the mask in real space."""
        odd = self.side - 1
        cube = values.view(self.side, self.side, self.side, -1)
        real = _hartley(cube[:odd, :odd, :odd].double()) * self._mask[..., None]
        found = torch.zeros_like(cube)
        found[:odd, :odd, :odd] = (_hartley(real) / odd**3).to(values)
        return found.view_as(values)

    def grown(self, values: Tensor, smaller: VolumeGrid) -> Tensor:
        """Return samples `(V, K)` of a smaller grid; what that did not have is 0."""
        found = values.new_zeros(self.side, self.side, self.side, values.shape[1])
        at = slice(self.middle - smaller.middle, self.middle - smaller.middle + smaller.side)
        found[at, at, at] = values.view(smaller.side, smaller.side, smaller.side, -1)
        return found.view(-1, values.shape[1])


def _hartley(cube: Tensor) -> Tensor:
    """Transform cubes `(n, n, n, K)` of odd size, whose origin is in the middle."""
    axes = (0, 1, 2)
    found = torch.fft.fftn(torch.fft.ifftshift(cube, dim=axes), dim=axes)
    moved: Tensor = torch.fft.fftshift(found.real - found.imag, dim=axes)
    return moved
