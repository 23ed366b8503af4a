"""A decoder and particles that it has not seen: fits of them, and images made up in their place."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.core import InputError, bar, generator, read_arrays, write_arrays
from cryodrgn_amort.data import BatchLoader, NoiseModel, Shells
from cryodrgn_amort.inference import ElboScale, Fitter, anchored, elbo
from cryodrgn_amort.models import cluster_centres, whole_ctf, with_ctf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from cryodrgn_amort.data import Batch, Particles
    from cryodrgn_amort.models import AmortVAE
    from cryodrgn_amort.runs import Run


__all__ = ["NATS", "Case", "Fits", "Whitened", "other_half"]

NATS = ElboScale.implied(1.0)
"""Errors are in units of the noise: half of them are nats."""
_TOGETHER = 64
_STEPS, _STEP = 4, 0.1  # of a fit; standard deviations of the latents, for differences
_ANCHORS = 16


def other_half(name: str) -> str:
    """Return the half that has the particles which one of that name has not seen."""
    return "half1" if name == "half0" else "half0"


class Whitened:
    """A decoder whose errors are in units of the noise: see ``inference.Decoder``.

    Parameters
    ----------
    spectrum
        Variance of the noise in each shell of masked pixels.
    """

    def __init__(self, model: AmortVAE, shells: Shells, spectrum: Tensor) -> None:
        self.fast = model.fast
        self.gain = spectrum.clamp(min=1e-12)[shells.of_pixel].rsqrt()

    def errors(self, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the total error, differentiable by z, and that of each particle `(B,)`."""
        return self.fast.squared_errors(*self._weighed(batch), z)

    def errors_at(self, batch: Batch, z: Tensor) -> Tensor:
        """Return the error of each particle at several latents `(K, B, zdim)`: `(K, B)`."""
        return self.fast.errors_at(*self._weighed(batch), z)

    def _weighed(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        assert batch.rot is not None
        half = self.gain[: len(self.gain) // 2]
        ctf = half.expand(len(batch.y), -1) if batch.ctf is None else batch.ctf * half
        return batch.rot, batch.y * self.gain, ctf


@dataclass(frozen=True)
class Fits:
    """Posteriors fitted to particles of a case, with the spectrum of their noise.

    Attributes
    ----------
    rows
        Positions among the particles of the case, `(M,)`, sorted.
    mean, logvar
        `(M, zdim)`.
    elbo, constant
        In nats up to one constant, `(M,)`: the ELBO of the fit, and the log likelihood at the one
        latent that explains all of them best.
    centre
        That latent, `(zdim,)`.
    spectrum
        Variance of the noise in each shell: what the fits leave unexplained.
    """

    rows: np.ndarray
    mean: np.ndarray
    logvar: np.ndarray
    elbo: np.ndarray
    constant: np.ndarray
    centre: np.ndarray
    spectrum: np.ndarray

    def write(self, path: Path) -> None:
        """Keep them in an .npz file."""
        write_arrays(path, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def read(cls, path: Path) -> Fits:
        """Read what ``write`` has kept.

        Raises
        ------
        InputError
            If the file is damaged.
        """
        found = read_arrays(path, "-o")
        names = {f.name for f in fields(cls)}
        if found.keys() != names:
            raise InputError(f"-o {path}: damaged (it holds other arrays); remove it")
        return cls(**found)


class Case:
    """A decoder, and particles.

    Parameters
    ----------
    run
        Whose decoder it is.
    particles
        Those that are asked about.
    own
        Whether the decoder has been trained on them.
    """

    def __init__(self, run: Run, particles: Particles, *, own: bool, seed: int = 0) -> None:
        self.run, self.particles, self.own, self.seed = run, particles, own, seed
        self.fitter = Fitter(run, particles, own=False, seed=seed)
        self.model: AmortVAE = self.fitter.model
        self.loader = BatchLoader(particles, None, memory=0)
        self.shells = Shells(particles)
        centres = cluster_centres(run.z()[0], _ANCHORS, seed)
        self.anchors = torch.from_numpy(centres).to(particles.device)

    def sample(self, count: int) -> np.ndarray:
        """Draw positions of at most so many particles, sorted."""
        mixed = np.random.default_rng(self.seed).permutation(self.particles.n)
        return np.sort(mixed[:count])

    def whitened(self, spectrum: np.ndarray) -> Whitened:
        """Return the decoder with errors in units of this noise."""
        values = torch.from_numpy(spectrum).float().to(self.particles.device)
        return Whitened(self.model, self.shells, values / self.particles.windowed)

    def decoded(self, batch: Batch, z: Tensor) -> Tensor:
        """Return what latents `(B, zdim)` explain of a batch, with CTF: `(B, P)`."""
        assert batch.rot is not None
        images = self.model.fast.images(batch.rot, z[:, None])[:, 0]
        return with_ctf(images, batch.ctf)

    def sampled(self, z: np.ndarray, other: Run | None = None) -> np.ndarray:
        """Return values of the volumes of latents `(M, zdim)` up to 16 Fourier pixels.

        By the case's decoder, or by that of another run.
        """
        model = self.model if other is None else other.load_decoder()[0]
        return model.sampled(torch.from_numpy(np.ascontiguousarray(z, np.float32)))

    def fit(self, count: int) -> Fits:
        """Fit so many of the particles, by the noise that they turn out to have."""
        rows = self.sample(count)
        spectrum = self._first_spectrum(rows)
        fits = self._fitted(rows, spectrum)
        return self._measured(replace(fits, spectrum=self.left(rows, fits.mean)))

    def _first_spectrum(self, rows: np.ndarray) -> np.ndarray:
        """Return the spectrum of what the best of some latents leaves of each particle."""
        flat = self.whitened(np.ones(self.shells.count, np.float32))  # of images of variance 1
        parts = [
            anchored(flat, self.loader.read(index), self.anchors, 1.0)[0].cpu()
            for index in torch.from_numpy(rows).split(_TOGETHER)
        ]
        return self.left(rows, torch.cat(parts).numpy())

    def left(self, rows: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Return the mean power in each shell of what latents leave unexplained."""
        total = torch.zeros(self.shells.count, dtype=torch.float64)
        places = torch.arange(len(rows)).split(_TOGETHER)
        for at in places:
            batch = self.loader.read(torch.from_numpy(rows)[at])
            z = torch.from_numpy(mean[at.numpy()]).to(batch.y)
            total += self.shells.power(batch.y - self.decoded(batch, z)).double().sum(0).cpu()
        found: np.ndarray = (total / len(rows)).float().numpy()
        return found

    def _fitted(self, rows: np.ndarray, spectrum: np.ndarray) -> Fits:
        white, means, logvars = self.whitened(spectrum), [], []
        for index in bar(torch.from_numpy(rows).split(_TOGETHER), f"fits, {self.run.name}"):
            found = self.posterior(white, self.loader.read(index))
            means.append(found[0].cpu())
            logvars.append(found[1].cpu())
        none = np.empty(0)
        mean, logvar = torch.cat(means).numpy(), torch.cat(logvars).numpy()
        return Fits(rows, mean, logvar, none, none, none, spectrum)

    @torch.no_grad()
    def posterior(self, white: Whitened, batch: Batch) -> tuple[Tensor, Tensor]:
        """Fit the particles of a batch: mean and log variance of each, `(B, zdim)`.

        Gauss-Newton steps (Levenberg, Marquardt) from latents weighted by how well they explain
        each particle, and Laplace's approximation, without correlations.
        """
        z = anchored(white, batch, self.anchors, 1.0)[0]
        damping = torch.ones(len(z), 1, dtype=torch.float64, device=z.device)
        least = self._cost(white, batch, z)
        for _ in range(_STEPS):
            g, H = self.slopes(white, batch, z)
            diagonal = H.diagonal(dim1=1, dim2=2)
            damped = H + torch.diag_embed(damping * diagonal)
            step = torch.linalg.solve(damped, g[:, :, None])[:, :, 0].to(z)
            cost = self._cost(white, batch, z + step)
            better = cost < least
            z = torch.where(better[:, None], z + step, z)
            least = torch.where(better, cost, least)
            damping = torch.where(better[:, None], damping / 5, damping * 5)
        diagonal = self.slopes(white, batch, z)[1].diagonal(dim1=1, dim2=2)
        return z, -diagonal.log().to(z)

    def _cost(self, white: Whitened, batch: Batch, z: Tensor) -> Tensor:
        error = white.errors_at(batch, z[None])[0]
        return error.double() / 2 + z.double().square().sum(1) / 2

    def slopes(self, white: Whitened, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return slope `(B, zdim)` and curvature of the log posterior by the latent.

        By differences of images, whose second derivatives are left out (Gauss and Newton).
        """
        shown, by_latent = self.images_around(white, batch, z)
        left = (batch.y * white.gain - shown).double()
        g = torch.einsum("bip,bp->bi", by_latent, left) - z.double()
        H = torch.einsum("bip,bjp->bij", by_latent, by_latent)
        return g, H + torch.eye(z.shape[1], dtype=H.dtype, device=H.device)

    def images_around(self, white: Whitened, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return images of latents in units of the noise, and their differences by the latent.

        That is `(B, P)` and `(B, zdim, P)`, the latter in double precision.
        """
        assert batch.rot is not None
        ctf = white.gain if batch.ctf is None else whole_ctf(batch.ctf) * white.gain
        steps = _STEP * self.fitter.spread.clamp(min=1e-3)
        zdim = z.shape[1]
        moves = torch.cat([z.new_zeros(1, zdim), torch.diag(steps)])
        images = self.model.fast.images(batch.rot, z[:, None] + moves)
        slopes = (images[:, 1:] - images[:, :1]) / steps[:, None]
        return images[:, 0] * ctf, (slopes * ctf.unsqueeze(-2)).double()

    def _measured(self, fits: Fits) -> Fits:
        """Measure ELBO and log likelihoods by the spectrum."""
        white, elbos, others = self.whitened(fits.spectrum), [], []
        device = self.particles.device
        single = torch.cat([self.fitter.centre[None], self.anchors])
        draw = self.generator()
        for at in torch.arange(len(fits.rows)).split(_TOGETHER):
            batch = self.loader.read(torch.from_numpy(fits.rows)[at])
            pair = (torch.from_numpy(a[at.numpy()]).to(device) for a in (fits.mean, fits.logvar))
            mean, logvar = pair
            draws = torch.randn(8, *mean.shape, generator=draw, device=device)
            elbos.append(elbo(white, batch, (mean, logvar), NATS, draws).cpu())
            each = single[:, None].expand(-1, len(mean), -1)
            others.append(-white.errors_at(batch, each).cpu() / 2)
        likelihood = torch.cat(others, 1).double()
        best = int(likelihood.sum(1).argmax())
        return replace(
            fits, elbo=torch.cat(elbos).double().numpy(), constant=likelihood[best].numpy(),
            centre=single[best].cpu().numpy(),
        )  # fmt: skip

    def made_up(
        self, fits: Fits, at: Tensor, turns: Tensor | None, draw: torch.Generator
    ) -> tuple[Batch, Tensor]:
        """Make images up in place of fitted particles, and return their latents, too.

        Each has a latent of the particle's posterior, its CTF and shift, and new noise. Its pose is
        the particle's, which ``turns`` `(B, 3, 3)` have turned before; the batch does not say so.

        Parameters
        ----------
        at
            Positions among the fits, `(B,)`.
        draw
            See ``generator``.
        """
        rows = torch.from_numpy(fits.rows)[at]
        batch = self.loader.read(rows)
        assert batch.rot is not None
        known = (torch.from_numpy(a[at.numpy()]) for a in (fits.mean, fits.logvar))
        mean, logvar = (part.to(batch.y) for part in known)
        normal = torch.randn(mean.shape, generator=draw, device=mean.device)
        z = mean + torch.exp(0.5 * logvar) * normal
        rot = batch.rot if turns is None else turns.to(batch.rot) @ batch.rot
        shown = self.decoded(replace(batch, rot=rot), z)
        noise = self.noise(fits.spectrum).draw(rows.to(batch.y.device), draw)
        return replace(batch, y=shown + noise), z

    @torch.no_grad()
    def made_up_by(self, other: Run, fits: Fits) -> Iterator[Batch]:
        """Yield images that another decoder makes up in place of fitted particles, with new noise.

        Each shows what that decoder shows at the latent that it was trained to have.
        """
        there, z = self.latents_of(other, fits.rows)
        shown, noise = other.load_decoder()[0].fast, self.noise(fits.spectrum)
        draw, rows = self.generator(), torch.from_numpy(fits.rows[there])
        for at in torch.arange(len(rows)).split(_TOGETHER):
            batch = self.loader.read(rows[at])
            assert batch.rot is not None
            latents = torch.from_numpy(z[at.numpy()]).to(batch.y)
            images = shown.images(batch.rot, latents[:, None])[:, 0]
            images = with_ctf(images, batch.ctf)
            batch.y = images + noise.draw(rows[at].to(images.device), draw)
            yield batch

    def generator(self) -> torch.Generator:
        """Return random numbers on the device of the particles, from their start."""
        found: torch.Generator = generator(self.particles.device, self.seed)
        return found

    def noise(self, spectrum: np.ndarray) -> NoiseModel:
        """Return noise of a spectrum, in all optics groups alike."""
        if self._noise is None or not np.array_equal(self._noise[0], spectrum):
            values = torch.from_numpy(spectrum)[None].to(self.particles.device)
            groups = torch.zeros(self.particles.n, dtype=torch.long)
            self._noise = (
                spectrum,
                NoiseModel(self.particles, self.shells, values, groups, self.seed),
            )
        return self._noise[1]

    _noise: tuple[np.ndarray, NoiseModel] | None = None

    def latents_of(self, other: Run, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the particles ``rows`` another run has, `(B,)` bool, and its latents."""
        index, wanted = other.index, self.positions[rows]
        assert index is not None
        there = np.isin(wanted, index)  # not those whose latents there are not finite
        order = np.argsort(index)
        at = order[np.searchsorted(index, wanted[there], sorter=order)]
        return there, other.z()[0][at]

    @cached_property
    def positions(self) -> np.ndarray:
        """Positions of the particles in their stack, `(N,)`."""
        ind = self.particles.ind
        return np.arange(self.particles.n) if ind is None else np.asarray(ind)
