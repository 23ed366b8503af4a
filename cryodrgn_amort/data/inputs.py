"""Encoder inputs: what a network is shown for particle i.

Edelberg & Lederman, arXiv 2303.07487, Section 3.3 (evil twins, noise).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryodrgn_amort.core import InputError

__all__ = ["EncoderInput", "Noise", "Twin"]


class EncoderInput:
    """What a network is shown for particle i; this base class shows the particle itself.

    Whatever it is, it goes through the same preprocessing as the particles: window, Hartley
    transform, normalisation, centring by the translation of ``rows(i)``, phase flip by its CTF.
    """

    def rows(self, index: Tensor) -> Tensor:
        """Return whose image (unless ``raw`` gives one), translation and CTF are used, `(B,)`."""
        return index

    def raw(self, index: Tensor) -> Tensor | None:
        """Return real-space images `(B, box, box)` to show instead of those of ``rows(index)``."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep: tensors and plain Python types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what was kept."""


class Twin(EncoderInput):
    """Another particle, by one fixed permutation without fixed points.

    The permutation is one cycle through all particles in random order: no two particles share a
    twin, and (for more than two particles) nobody is the twin of its twin.

    Raises
    ------
    InputError
        If there is one particle only.
    """

    def __init__(self, n: int, seed: int) -> None:
        if n < 2:
            raise InputError(f"--encoder twin: {n} particle has no twin")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        self.permutation = torch.empty_like(order)
        self.permutation[order] = order.roll(1)

    def rows(self, index: Tensor) -> Tensor:
        """Return the twins of ``index``."""
        return self.permutation[index]

    def state_dict(self) -> dict[str, Any]:
        """Return the permutation."""
        return {"permutation": self.permutation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a permutation.

        Raises
        ------
        InputError
            If it is one of another number of particles.
        """
        if len(state["permutation"]) != len(self.permutation):
            raise InputError(
                f"the checkpoint's twins are for {len(state['permutation'])} particles, "
                f"these are {len(self.permutation)}"
            )
        self.permutation = state["permutation"]


class Noise(EncoderInput):
    """One fixed image of white Gaussian noise per particle, with the data set's mean and variance.

    Image i is made anew from (seed, i) whenever it is shown. Only the counter-based generator
    Philox and the Box-Muller transform are used, so that it stays the same image across versions
    of the libraries.
    """

    def __init__(self, box: int, mean: float, std: float, seed: int) -> None:
        self.box, self.mean, self.std, self.seed = box, mean, std, seed

    def raw(self, index: Tensor) -> Tensor:
        """Return the noise images `(B, box, box)` of ``index``."""
        images = np.stack([self._image(i) for i in index.tolist()])
        return torch.from_numpy(images)

    def _image(self, i: int) -> np.ndarray:
        bits = np.random.Philox(key=self.seed, counter=[0, 0, 0, i]).random_raw(self.box**2)
        uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53  # in (0, 1)
        u, v = uniform.reshape(2, -1)  # box is even
        radius, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
        normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        image: np.ndarray = self.mean + self.std * normal.reshape(self.box, self.box)
        return image.astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        """Return seed, mean and standard deviation."""
        return {"seed": self.seed, "mean": self.mean, "std": self.std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over seed, mean and standard deviation."""
        self.seed, self.mean, self.std = int(state["seed"]), state["mean"], state["std"]
