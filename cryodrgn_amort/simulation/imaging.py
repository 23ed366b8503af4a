"""How the images of a simulation were made, and how well each structure explains them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from cryodrgn_amort.core import InputError, read_yaml
from cryodrgn_amort.data import load_ctf, load_poses
from cryodrgn_amort.options import SimulateOptions
from cryodrgn_amort.simulation.noise_spectrum import stored_noise
from cryodrgn_amort.simulation.specimens import ctf_values

if TYPE_CHECKING:
    from torch import Tensor

    from cryodrgn_amort.data import Particles


__all__ = ["Imaging", "load_imaging"]

_LEAST_NOISE = 1e-3  # standard deviations of the signal; images without noise have rounding
_PROJECTED = 1 << 18  # pixels of projections at a time: they stay in a CPU's cache


class Projector(Protocol):
    """What projects a structure that a class and a coordinate name."""

    def project(
        self, rots: np.ndarray, shift_px: np.ndarray, labels: np.ndarray, coordinate: np.ndarray
    ) -> Tensor:
        """Project `(B, D, D)`; `(B, 2)` shifts move the object."""


@dataclass(frozen=True)
class Imaging:
    """How the images of a run's particles were made. Rows are those of the run's `M` images.

    Attributes
    ----------
    rots, trans_px, ctf
        True poses `(M, 3, 3)` and `(M, 2)`, CTF parameters `(M, 8)` or, with their scale,
        `(M, 9)`; None: without CTF.
    sigma
        Standard deviation of the noise.
    power
        See ``noise_power``.
    shares
        Relative shares that the classes were drawn with, `(K,)`; None: those of the model.
    """

    rots: np.ndarray
    trans_px: np.ndarray
    ctf: np.ndarray | None
    sigma: float
    power: Tensor | None
    shares: np.ndarray | None

    def log_likelihood(
        self,
        model: Projector,
        raw: Tensor,
        rows: np.ndarray,
        labels: np.ndarray,
        coordinate: np.ndarray,
    ) -> np.ndarray:
        """Return the log likelihood of each image under each structure, `(B, C)`, in nats.

        It is that of Gaussian noise of the simulation's spectrum around the noise-free image at the
        true pose and CTF, but for a constant of each image.

        Parameters
        ----------
        raw
            Images `(B, D, D)` as they are in the stack.
        rows
            Which images these are, `(B,)`.
        labels, coordinate
            The structures, `(C,)` each.
        """
        found, box = [], raw.shape[-1]
        at_once = max(1, _PROJECTED // (len(labels) * box * box))
        for start in range(0, len(rows), at_once):
            part = slice(start, start + at_once)
            found.append(self._some(model, raw[part], rows[part], labels, coordinate))
        return np.concatenate(found)

    def _some(
        self, model: Projector, raw: Tensor, rows: np.ndarray, *structures: np.ndarray
    ) -> np.ndarray:
        count, box = len(structures[0]), raw.shape[-1]
        rots, trans = (np.repeat(table[rows], count, 0) for table in (self.rots, self.trans_px))
        images = len(rows)
        every = (np.tile(values, images) for values in structures)
        projected = torch.fft.rfft2(model.project(rots, -trans, *every))
        clean = -projected.view(images, count, box, -1)
        if self.ctf is not None:
            clean = clean * ctf_values(self.ctf[rows], box).unsqueeze(1)
        weights = self._weights(box)
        seen = (torch.fft.rfft2(raw) * weights).unsqueeze(1)
        # -|y - x|^2 / 2, but for the part of y alone
        nats = clean.real * seen.real + clean.imag * seen.imag
        nats -= (clean.real.square() + clean.imag.square()) * (weights / 2)
        summed: np.ndarray = nats.sum((2, 3), dtype=torch.float64).numpy()
        return summed

    def _weights(self, box: int) -> Tensor:
        """Return 1 / variance of the noise at the frequencies of ``rfft2``, `(box, box / 2 + 1)`.

        Frequencies whose opposites ``rfft2`` leaves out count twice.
        """
        weights = torch.full((box, box // 2 + 1), 2 / (box * self.sigma) ** 2)
        weights[:, [0, box // 2]] /= 2
        return weights if self.power is None else weights / self.power


def load_imaging(folder: str, particles: Particles) -> Imaging:
    """Read how the images of a run's particles were made, from the folder of ``simulate_amort``.

    Raises
    ------
    InputError
        If a file is missing, is damaged, or is of other particles.
    """
    what, path = f"--truth {folder}", Path(folder)
    found = read_yaml(path / "simulation.yaml", "--truth")
    try:
        settings = found["settings"]
        sigma, power = stored_noise(found)
        sigma = max(sigma, _LEAST_NOISE * math.sqrt(found["signal_variance"]))
        shares = settings.get("shares")
        shares = None if shares is None else np.array(shares, float)
        with_ctf, scale = bool(settings["use_ctf"]), _scale(settings)
        if not 0 < sigma < math.inf or (
            shares is not None and len(shares) != len(found["classes"])
        ):
            raise ValueError("noise_sigma or shares")
    except Exception as err:  # whatever a damaged file leads to
        raise InputError(f"{what}: simulation.yaml is damaged ({type(err).__name__})") from None
    total, rows = int(particles.images.src.orig_n), particles.images.ind
    rots, trans = load_poses(str(path / "poses.pkl"), total, None, particles.box, "--truth")
    ctf = None
    if with_ctf:
        ctf = load_ctf(str(path / "ctf.pkl"), total, None, particles.box, "--truth")
        if scale is not None:
            ctf = np.column_stack([ctf, np.resize(scale, total)]).astype(np.float32)
    trans = np.zeros((total, 2), np.float32) if trans is None else trans
    if rows is not None:
        rots, trans, ctf = rots[rows], trans[rows], None if ctf is None else ctf[rows]
    return Imaging(rots, trans, ctf, sigma, power, shares)


def _scale(settings: dict[str, Any]) -> np.ndarray | None:
    """Return how strong the signal of each tilt is, `(tilts,)`; None if nothing is tilted."""
    tilts = settings.get("tilts")
    if tilts is None:
        return None
    options = SimulateOptions(outdir="", tilts=tilts, tilt_step_deg=settings.get("tilt_step_deg"))
    return np.cos(np.deg2rad(options.tilt_angles_deg))
