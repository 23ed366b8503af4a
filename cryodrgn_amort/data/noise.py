"""The noise in particles: how strong it is at each spatial frequency, and more noise like it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cryodrgn_amort.core import generator

if TYPE_CHECKING:
    from cryodrgn_amort.data.particles import Particles, Share


__all__ = ["Agreement", "NoiseModel", "Shells", "optics_groups"]

_GAIN_SAMPLE = 256
_CORRECTIONS = 3
_PART_BY, _SURE = 0.1, 5.0  # relative difference of a shell's power, in its standard errors


class Shells:
    """Rings of masked pixels with the same spatial frequency.

    Attributes
    ----------
    of_pixel
        Shell of each masked pixel, `(P,)`; shell s is at (s + 1) / box cycles per pixel.
    count
        Number of shells.
    """

    def __init__(self, particles: Particles) -> None:
        frequency = particles.lattice.freqs2d[particles.mask].norm(dim=1)
        self.of_pixel = (frequency * particles.box).round().long() - 1
        self.count = int(self.of_pixel.max()) + 1
        members = torch.nn.functional.one_hot(self.of_pixel, self.count).double()
        self._shares = members / members.sum(0)

    def power(self, images: Tensor) -> Tensor:
        """Return the mean square of each image in each shell: `(B, P)` -> `(B, count)`.

        As a product: adding to an index takes the pixels in any order on a GPU, and a training
        that goes on would not see the noise that it saw before.
        """
        return (images.double().square() @ self._shares).to(images.dtype)


def optics_groups(ctf_params: Tensor | None, n: int) -> Tensor:
    """Number the optics groups of particles, `(N,)`.

    Particles are of one group if pixel size, voltage, spherical aberration and amplitude contrast
    are the same.
    """
    if ctf_params is None:
        return torch.zeros(n, dtype=torch.long)
    optics = ctf_params.cpu()[:, [0, 4, 5, 6]]
    groups: Tensor = optics.unique(dim=0, return_inverse=True)[1]
    return groups


class NoiseModel:
    """Gaussian noise with a spectrum of its own in each optics group.

    It is made in real space, and goes through the same preprocessing as the particles: so it has
    the window's correlations between pixels as well.

    Parameters
    ----------
    particles
        Whose noise it is.
    spectra
        Its variance in each shell after preprocessing, for each optics group: `(G, shells)`.
    groups
        Optics group of each particle, `(N,)`.
    """

    def __init__(
        self, particles: Particles, shells: Shells, spectra: Tensor, groups: Tensor, seed: int
    ) -> None:
        self.particles, self.shells = particles, shells
        self.spectra, self.groups = spectra, groups.to(spectra.device)
        box, device = particles.box, particles.device
        along = (f(box, device=device) for f in (torch.fft.fftfreq, torch.fft.rfftfreq))
        rows, columns = along
        radius = torch.hypot(rows[:, None], columns[None]) * box - 1
        # between two shells; what is closer to the origin, or beyond the last one, is as they are
        self._low = radius.floor().long().clamp(0, shells.count - 1)
        self._high = (self._low + 1).clamp(max=shells.count - 1)
        self._share = (radius - self._low).clamp(0, 1)
        self._zero = particles.hartley(torch.zeros(1, box, box, device=device))
        self._gains = spectra.sqrt()
        self._correct(seed)

    def _correct(self, seed: int) -> None:
        """Choose gains in real space by which the spectra come out after preprocessing."""
        size = (_GAIN_SAMPLE, self.particles.box, self.particles.box)
        device = self.particles.device
        white = torch.randn(size, generator=generator(device, seed), device=device)
        for spectrum, gains in zip(self.spectra, self._gains, strict=True):
            gains.fill_(1.0)
            for _ in range(_CORRECTIONS):
                images = self._coloured(gains.expand(_GAIN_SAMPLE, -1), white)
                power = self.shells.power(self._processed(images, None)).mean(0)
                gains *= (spectrum / power.clamp(min=1e-12)).sqrt()

    def _coloured(self, gains: Tensor, white: Tensor) -> Tensor:
        """Give white noise `(B, box, box)` a gain `(B, shells)` at each frequency."""
        gain = torch.lerp(gains[:, self._low], gains[:, self._high], self._share)
        coloured: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) * gain, s=white.shape[1:])
        return coloured

    def _processed(self, raw: Tensor, trans: Tensor | None) -> Tensor:
        p = self.particles
        return p.masked(p.centre(p.hartley(raw) - self._zero, trans))

    def draw(self, index: Tensor, draws: torch.Generator, share: Share | None = None) -> Tensor:
        """Draw new noise as there is in particles ``index`` `(B,)`, centred as they: `(B, P)`.

        All is on the device of the particles, as ``draws`` is, the generator.

        ``share``: which of a batch they are, when several processes share it.
        """
        box, trans = self.particles.box, self.particles.trans
        size = len(index) if share is None else share.size
        white = torch.randn(size, box, box, generator=draws, device=self.spectra.device)
        white = white if share is None else white[share.places.to(white.device)]
        if not len(index):  # all of the batch is other processes'
            return self.spectra.new_zeros(0, len(self.shells.of_pixel))
        raw = self._coloured(self._gains[self.groups[index]], white)
        return self._processed(raw, None if trans is None else trans[index])

    def raw(self, index: Tensor, white: Tensor) -> Tensor:
        """Return the noise of particles ``index`` `(B,)` as in their stack, of white noise.

        That is `(B, box, box)`, of variance 1.
        """
        return self._coloured(self._gains[self.groups[index]], white)

    def facts(self) -> dict[str, Any]:
        """Return the variance in each shell, by optics group, and how many particles these have."""
        return {
            "groups": torch.bincount(self.groups).tolist(),
            "noise_variance": self.spectra.cpu().tolist(),
        }

    def precision(self) -> Tensor:
        """Return 1 / variance at each masked pixel, of all groups together: `(P,)`."""
        share = torch.bincount(self.groups).to(self.spectra)
        mean = (share / share.sum()) @ self.spectra
        return 1 / mean[self.shells.of_pixel].clamp(min=1e-12)


@dataclass
class Agreement:
    """How alike synthetic and real preprocessed images are, shell by shell.

    Attributes
    ----------
    frequency
        Of each shell, in cycles per pixel: `(shells,)`.
    real, synthetic
        Power of each image in each shell, `(M, shells)`.
    """

    frequency: np.ndarray
    real: np.ndarray
    synthetic: np.ndarray

    @property
    def power_ratio(self) -> np.ndarray:
        """Mean power of synthetic images over that of real ones, `(shells,)`."""
        ratio: np.ndarray = self.synthetic.mean(0) / self.real.mean(0)
        return ratio

    @property
    def variance_ratio(self) -> np.ndarray:
        """The same of how much the power varies from image to image."""
        ratio: np.ndarray = self.synthetic.var(0) / self.real.var(0)
        return ratio

    @property
    def parts(self) -> np.ndarray:
        """Shells whose power differs by more than a tenth, and surely does: positions."""
        errors = np.hypot(
            self.real.std(0) / self.real.mean(0) / np.sqrt(len(self.real)),
            self.synthetic.std(0) / self.synthetic.mean(0) / np.sqrt(len(self.synthetic)),
        )
        off = np.abs(np.log(self.power_ratio))
        return np.flatnonzero((off > np.log1p(_PART_BY)) & (off > _SURE * errors))

    def warning(self) -> str | None:
        """Say in which shells they part, if they do."""
        if not len(self.parts):
            return None
        worst = self.parts[np.abs(np.log(self.power_ratio[self.parts])).argmax()]
        return (
            f"Synthetic images differ from the particles in {len(self.parts)} of "
            f"{len(self.frequency)} shells: most in shell {worst + 1} "
            f"({self.frequency[worst]:.3f} cycles per pixel), where they have "
            f"{self.power_ratio[worst]:.2f} times the power: an encoder that learns from them may "
            "fail on particles; a decoder that is trained for longer makes better ones"
        )

    def facts(self) -> dict[str, Any]:
        """Return the numbers of each shell."""
        return {
            "frequency": self.frequency.tolist(),
            "real_power": self.real.mean(0).tolist(),
            "synthetic_power": self.synthetic.mean(0).tolist(),
            "power_ratio": self.power_ratio.tolist(),
            "variance_ratio": self.variance_ratio.tolist(),
            "shells_that_part": (self.parts + 1).tolist(),
        }
