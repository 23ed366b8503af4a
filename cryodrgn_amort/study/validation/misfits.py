"""Particles that the decoder cannot explain at any latent: noise, other molecules, wrong poses.

A decoder explains a part of them, too, with a latent of their own: noise with an empty volume,
which it makes up as well. So each particle is asked three things, next to images whose answers are
known.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.core import bar
from cryodrgn_amort.models import whole_ctf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from cryodrgn_amort.data import Batch
    from cryodrgn_amort.runs import Run
    from cryodrgn_amort.study.validation.case import Case, Fits


__all__ = ["LOW", "Examined", "Misfits"]

LOW = 0.05
"""A p below this is small."""
_TOGETHER = 64
_MADE = 2000
_DARK = 0.2  # shells where the molecule is so much weaker than at its best tell of the noise
_FEWEST = 50  # pixels that do


class Examined:
    """Asks how images are explained by the best of some latents, each weighted by how well it does.

    Attributes
    ----------
    NAMES
        ``explained``: (f y - f f) / |f| for an image y and what is expected of it, f, in units of
        the noise. Of one that is as f says it has mean 0 and variance 1, whatever CTF and view.
        ``left``: minus the power that is left, in shells weighted by how much of the molecule they
        show, in standard deviations of noise as strong as the image's own where none shows.
        ``seen``: the largest correlation with any of the latents' images, f y / |f|: of noise that
        of chance. Of all of them, less is worse.
    """

    NAMES = ("explained", "left", "seen")

    def __init__(self, case: Case, fits: Fits) -> None:
        self.case, self.fits = case, fits
        self.white = case.whitened(fits.spectrum)
        self.centre = torch.from_numpy(fits.centre).to(case.particles.device)
        self.pixels = torch.bincount(case.shells.of_pixel).to(self.centre)
        signal = case.shells.power(
            self._typical(case.loader.read(torch.from_numpy(fits.rows[:64])))
        )
        signal = signal.mean(0)
        self.weights = signal / (1 + signal)
        self.dark = self.weights < _DARK * self.weights.max()
        self.dark &= self.pixels[self.dark].sum() >= _FEWEST

    def _typical(self, batch: Batch) -> Tensor:
        """Return images of the one latent that explains all best, in units of the noise."""
        z = self.centre.expand(len(batch.index), -1)
        return self.case.decoded(batch, z) * self.white.gain

    def __call__(self, batch: Batch) -> Tensor:
        """Return what ``NAMES`` are, `(3, B)`."""
        case, gain = self.case, self.white.gain
        assert batch.rot is not None
        ctf = gain if batch.ctf is None else whole_ctf(batch.ctf) * gain
        latents = case.anchors.expand(len(batch.index), -1, -1)
        shown = case.model.fast.images(batch.rot, latents) * ctf.unsqueeze(-2)
        y = batch.y * gain
        both, own = torch.einsum("bkp,bp->bk", shown, y), shown.square().sum(2)
        weights = torch.softmax(both - own / 2, 1).nan_to_num(1 / len(case.anchors))
        f = case.decoded(batch, weights @ case.anchors) * gain
        explained = ((y - f) * f).sum(1) / f.norm(dim=1).clamp(min=1e-6)
        power = case.shells.power(y - f)
        if self.dark.any():
            dark = self.pixels * self.dark
            power = power / ((power * dark).sum(1, keepdim=True) / dark.sum())
        many = self.pixels * self.weights
        left = (many * (power - 1)).sum(1) / (2 * many * self.weights).sum().sqrt()
        seen = (both / own.sqrt().clamp(min=1e-6)).amax(1)
        return torch.stack([explained, -left, seen])

    def known(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield what images made up give: in place of particles, of noise, and of a typical one."""
        case, fits, draw = self.case, self.fits, self.case.generator()
        noise = case.noise(fits.spectrum)

        def made_up(at: Tensor) -> Batch:
            return case.made_up(fits, at, None, draw)[0]

        def of_noise(at: Tensor) -> Batch:
            batch = case.loader.read(torch.from_numpy(fits.rows)[at])
            batch.y = noise.draw(batch.index.to(batch.y.device), draw)
            return batch

        def typical(at: Tensor) -> Batch:
            batch = of_noise(at)
            batch.y += self._typical(batch) / self.white.gain
            return batch

        yield "made up", self._of(made_up, _MADE)
        yield "noise", self._of(of_noise, _MADE // 2)
        yield "typical", self._of(typical, _MADE // 2)

    def _of(self, make: Callable[[Tensor], Batch], count: int) -> np.ndarray:
        many = torch.arange(count) % len(self.fits.rows)
        found: np.ndarray = (
            torch.cat([self(make(at)) for at in many.split(_TOGETHER)], 1).cpu().numpy()
        )
        return found


class Misfits:
    """Tells how likely images made up are explained as badly as others, by a case's decoder.

    By the power that is left, or by what is expected; or how likely a typical one is seen as
    little, if noise would be seen as much: three times the least of these, and at most 1.
    """

    @torch.no_grad()
    def __init__(self, case: Case, fits: Fits) -> None:
        self.case, self.fits, self._ask = case, fits, Examined(case, fits)
        self._known = {name: np.sort(of, 1) for name, of in self._ask.known()}

    @torch.no_grad()
    def _asked(self, batches: Iterable[Batch]) -> np.ndarray:
        values = torch.cat([self._ask(batch) for batch in batches], 1).double().cpu().numpy()
        return np.where(np.isfinite(values), values, -np.inf)

    def _likely(self, values: np.ndarray) -> np.ndarray:
        def likely(name: str, row: int) -> np.ndarray:
            known = self._known[name][row]
            less = np.searchsorted(known, values[row], "right")
            found: np.ndarray = (1 + less) / (1 + len(known))
            return found

        as_noise = values[2] <= self._known["noise"][2, -1]
        empty = np.where(as_noise, likely("typical", 2), 1.0)
        least = np.stack([likely("made up", 0), likely("made up", 1), empty]).min(0)
        found: np.ndarray = np.minimum(1, 3 * least)
        return found

    def of_particles(self) -> dict[str, np.ndarray]:
        """Return ``Examined.NAMES`` of all particles of the case, and ``misfit_p``: `(N,)` each."""
        parts = bar(torch.arange(self.case.particles.n).split(_TOGETHER), "misfits")
        values = self._asked(self.case.loader.read(index) for index in parts)
        named = dict(zip(Examined.NAMES, values, strict=True))
        return {**named, "misfit_p": self._likely(values)}

    def of_decoders(self, other: Run, p: np.ndarray) -> np.ndarray:
        """Return p of images that another decoder makes up, `(M,)`: what faults of both make.

        In place of fitted particles that are no misfits by their ``misfit_p``, `(N,)`: a decoder
        may have learnt these, and only these.
        """
        usual = replace(self.fits, rows=self.fits.rows[p[self.fits.rows] >= LOW])
        if not len(usual.rows):
            return np.empty(0)
        return self._likely(self._asked(self.case.made_up_by(other, usual)))
