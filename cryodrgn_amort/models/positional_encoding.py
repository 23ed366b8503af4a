"""The positional encoding of the host's decoder, read off it as frequencies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cryodrgn_amort.models.pieces import Buffers


__all__ = ["PositionalEncoding"]


class PositionalEncoding:
    """Sines and cosines of phases, which are coordinates times frequencies.

    Frequencies are the derivative of the host's own encoding at the origin, where sines are 0 and
    rise by their frequency, and cosines are 1. Where the host encodes nothing, features are the
    coordinates.

    Parameters
    ----------
    decoder
        The host's module.
    coords
        Any tensor of the type and on the device that frequencies are to have.

    Attributes
    ----------
    frequencies
        `(3, n)`, in radians per unit of the coordinates.
    columns
        Where the features, sines and then cosines, stand among the host's: `(2 n,)`.
    """

    def __init__(self, decoder: Any, coords: Tensor, buffers: Buffers) -> None:
        self._buffers = buffers
        encode = getattr(decoder, "positional_encoding_geom", None)
        self._encodes = encode is not None
        if encode is None:
            self.frequencies = torch.eye(3, device=coords.device)
            self.columns = torch.arange(3, device=coords.device)
            return
        features = decoder.in_dim - decoder.zdim
        with torch.enable_grad():  # one point per feature, so that one pass yields all derivatives
            origin = coords.new_zeros(features, 3 + decoder.zdim, requires_grad=True)
            own = encode(origin)[:, :features].diagonal()
            (slopes,) = torch.autograd.grad(own.sum(), origin)
        slopes, cosine = slopes[:, :3], own.detach() > 0.5
        sines, cosines = (~cosine).nonzero()[:, 0], cosine.nonzero()[:, 0]
        self.frequencies = slopes[sines].T.contiguous()
        self.columns = torch.cat([sines, cosines])

    def features(self, phases: Tensor, dtype: torch.dtype) -> Tensor:
        """Return sines and cosines `(rows, 2 n)` of phases `(rows, n)`, ready to be multiplied."""
        if not self._encodes:
            return phases.to(dtype)
        rows, n = phases.shape
        features = self._buffers("features", rows, 2 * n, phases.dtype)
        torch.sin(phases, out=features[:, :n])
        torch.cos(phases, out=features[:, n:])
        if dtype == phases.dtype:
            return features
        return self._buffers("narrow", rows, 2 * n, dtype).copy_(features)

    def by_phase(self, features: Tensor, grad: Tensor) -> Tensor:
        """Return gradients by phases `(rows, n)`, of those by the features `(rows, 2 n)`."""
        if not self._encodes:
            return grad
        n = grad.shape[1] // 2
        sines, cosines = features[:, :n], features[:, n:]
        return grad[:, :n] * cosines - grad[:, n:] * sines
