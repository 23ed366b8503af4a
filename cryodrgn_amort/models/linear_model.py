"""A linear model of particles: a mean structure and principal components, without a network.

The Fourier transform of a particle's structure is a mean and a few components, weighted by latents
whose prior is standard normal; its image is a central slice of that, times the CTF, in Gaussian
noise with a spectrum. Posteriors are then Gaussian, in closed form, and mean, components and noise
are found by expectation maximisation (Tipping & Bishop 1999, doi:10.1111/1467-9868.00196; of
particles: Tagare et al. 2015, doi:10.1016/j.jsb.2015.05.007; Punjani & Fleet 2021,
doi:10.1016/j.jsb.2021.107702). Hartley transforms are used as the host does: they are real, and
their slices are independent numbers.

The resolution rises step by step, for as long as particles that nothing is learnt from are
explained better: components of too high a resolution follow the noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryodrgn_amort.data import Shells
from cryodrgn_amort.models.synthetic import whole_ctf
from cryodrgn_amort.models.volume_grid import VolumeGrid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cryodrgn_amort.core import ProcessGroup
    from cryodrgn_amort.data import Batch, BatchLoader


__all__ = ["LinearModel"]

_FIRST, _GROWS = (5, 8), 1.5  # radius in Fourier pixels: at least, and at most a sixth of the box
_MOST_RADIUS = 32
_ROUNDS = 16  # at one radius
_BETTER, _WAITS = 1.005, 3  # times the gain of before; for so many rounds not, and it rests
_HELD = 8  # of so many particles one
_FEW = 500  # that tell of the noise, before anything is known
_MORE = 2  # components than were found, at the next radius
_SAMPLE = 20_000  # particles that components are found by
_MOST = 8  # components
_VALUES = 1 << 23  # at a time
_START = 0.3  # of the mean, in random components
_SURE = 2.0  # standard errors
_LEAST = 1e-3  # of a shell's mean precision


@dataclass
class _Sums:
    """What an expectation over particles adds up; `K` components, `V` samples of the volume.

    Attributes
    ----------
    right, left
        Of the normal equations of mean and components at each sample: `(V, K + 1)`, and their
        upper triangles `(V, (K + 1) (K + 2) / 2)`.
    error, seen
        Squared error expected in each shell of pixels, and numbers of pixels, `(S,)` each.
    moments
        Of 1 and the latents, `(K + 1, K + 1)`: what is expected of their products.
    gain
        What each component adds to the log likelihood, in nats, of particles that nothing is
        learnt from, its square, and their number: `(3, K)`.
    """

    right: Tensor
    left: Tensor
    error: Tensor
    seen: Tensor
    moments: Tensor
    gain: Tensor


def _best_of(sums: Tensor) -> tuple[float, int]:
    """Return the largest gain of the first components, and how many of these surely gain.

    See ``_Sums``.
    """
    each, squared = (sums[:2] / sums[2].clamp(min=1)).double()
    total = each.cumsum(0)
    best = int(total.argmax())
    error = float(((squared - each.square()).clamp(min=0)[: best + 1].sum() / sums[2, 0]).sqrt())
    return float(total[best]), best + 1 if total[best] > _SURE * error else 0


class LinearModel:
    """Finds mean, components and noise, and tells the posteriors of particles.

    Parameters
    ----------
    components
        At most so many, and at most 8.
    mask
        Radius of the sphere in which there is density, of half a box.

    Attributes
    ----------
    radius
        Up to which Fourier pixel there are components.
    found
        How many components there are.
    gain
        What they gain over the mean alone, of particles that nothing was learnt from, in nats each.
    """

    def __init__(
        self,
        loader: BatchLoader,
        components: int,
        seed: int,
        mask: float = 1.0,
        processes: ProcessGroup | None = None,
    ) -> None:
        self._loader, self._mask = loader, mask
        self.processes = processes or loader.processes
        self.particles = particles = loader.particles
        self._most = min(components, _MOST)
        self._seed, self._pixels = seed, particles.lattice.freqs2d[particles.mask] * particles.box
        self._shells = Shells(particles)
        self._windowed = particles.windowed
        self.radius, self.found, self.gain = 0, 0, 0.0
        self._grid: VolumeGrid
        self._keep: Tensor
        self._volumes: Tensor | None = None

    def fit(self, tell: Callable[[int, float, int], None] = lambda *_: None) -> None:
        """Find mean, components and noise.

        ``tell`` is told each radius, the gain there, and of how many components it is.
        """
        box = self.particles.box
        radius, most = min(_FIRST[1], max(_FIRST[0], box // 6)), min(box // 2 - 1, _MOST_RADIUS)
        radius = min(radius, most)
        self._use(radius)
        self._noise = self._power()
        self._maximise(self._expect())
        self._begin()
        while True:
            found, count = self._rest()
            tell(radius, found, count)
            assert self._volumes is not None
            better = found > self.gain * _BETTER
            if better or not self.radius:
                self.gain, self.radius, self.found = found, radius, count
                few = self._volumes.clone()
                few[:, 1 + count :] = 0  # the others follow the noise
                best = self._grid, few, self._noise, self._keep
            if radius == most or (self.found and not better):
                self._grid, self._volumes, self._noise, self._keep = best
                return
            smaller, radius = self._grid, min(most, math.ceil(_GROWS * radius))
            self._use(radius)
            some = self._volumes[:, : 1 + min(self._most, max(count, _MORE) + _MORE)]
            self._volumes = self._grid.grown(some, smaller)

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean `(B, K)` and covariance `(B, K, K)` of the latents of particles."""
        return self._posterior(batch)[:2]

    def _use(self, radius: int) -> None:
        """Compare images up to a radius from now on."""
        self._grid = VolumeGrid(radius, self._mask, self.particles.device)
        self._keep = (self._pixels.norm(dim=1) <= radius).nonzero()[:, 0]

    def _rest(self) -> tuple[float, int]:
        """Take turns of expectation and maximisation until the gain rests.

        Returns the gain, and of how many components it is.
        """
        best, kept, count, waits = -math.inf, (self._volumes, self._noise), 0, 0
        for _ in range(_ROUNDS):
            sums = self._expect()
            gain, first = _best_of(sums.gain)
            waits = 0 if gain > best + (_BETTER - 1) * abs(best) else waits + 1
            if gain > best:
                best, kept, count = gain, (self._volumes, self._noise), first
            if waits == _WAITS:
                break
            self._maximise(sums)
        self._volumes, self._noise = kept
        return best if count else 0.0, count

    def _power(self) -> Tensor:
        """Return the mean power of some particles in each shell."""
        some = self._sample()[0][:_FEW]
        total = sum(self._shells.power(b.y).double().sum(0) for b in self._read(some))
        count = torch.tensor([float(len(some)) * self.particles.ntilts], dtype=torch.float64)
        both = torch.cat([torch.as_tensor(total).cpu().reshape(-1), count])
        self.processes.sum_([both])
        found: Tensor = (both[:-1] / both[-1]).float().to(self.particles.device)
        return found

    def _sample(self) -> tuple[Tensor, Tensor]:
        """Return the own particles that something is learnt from, and others that judge it."""
        mixed = np.random.default_rng(self._seed).permutation(self.particles.n)[:_SAMPLE]
        held = np.arange(len(mixed)) % _HELD == 0
        own = mixed % self.processes.size == self.processes.rank
        return torch.from_numpy(np.sort(mixed[own & ~held])), torch.from_numpy(
            np.sort(mixed[own & held])
        )

    def _read(self, index: Tensor) -> Iterator[Batch]:
        wide = self._wide
        values = 8 * len(self._keep) * self.particles.ntilts * wide * (wide + 1) // 2
        for some in index.split(max(1, _VALUES // values)):
            yield self._loader.read(some)

    @property
    def _wide(self) -> int:
        """Mean and components."""
        return 1 if self._volumes is None else self._volumes.shape[1]

    def _posterior(self, batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return mean and covariance of latents, and what else an expectation needs."""
        assert batch.rot is not None
        count, keep = len(batch.index), self._keep
        y = batch.y[:, keep].nan_to_num(0.0, 0.0, 0.0)  # one that is damaged shows nothing
        ctf = torch.ones_like(y) if batch.ctf is None else whole_ctf(batch.ctf)[:, keep]
        plane = torch.nn.functional.pad(self._pixels[keep], (0, 1))
        index, weight = self._grid.places(plane @ batch.rot)
        precision = self._windowed / self._noise.clamp(min=1e-12)[self._shells.of_pixel[keep]]
        if self._volumes is None:
            none, images = y.new_zeros(count, 0), y.new_zeros(*y.shape, 1)
            return none, none[..., None], (index, weight, y, ctf, precision, images, none)
        around = self._volumes[index.flatten()].view(*index.shape, -1)
        images = torch.einsum("mpcw,mpc->mpw", around, weight) * ctf[..., None]
        shown = images[..., 1:]
        weighed = (shown * precision[:, None]).reshape(count, -1, self._wide - 1)
        left = (y - images[..., 0]).reshape(count, -1, 1)
        eye = torch.eye(self._wide - 1, device=y.device)
        root = torch.linalg.cholesky(weighed.mT @ shown.reshape_as(weighed) + eye)
        slope = torch.linalg.solve_triangular(root, weighed.mT @ left, upper=False)
        covariance = torch.cholesky_inverse(root)
        mean = torch.linalg.solve_triangular(root.mT, slope, upper=True)[..., 0]
        gain = 0.5 * slope[..., 0].square() - root.diagonal(dim1=1, dim2=2).log()
        return mean, covariance, (index, weight, y, ctf, precision, images, gain)

    def _expect(self) -> _Sums:
        """Add up what is expected of the particles."""
        wide, volume = self._wide, self._grid.side**3
        shells, device = self._shells.count, self.particles.device
        sizes = (volume, wide), (volume, wide * (wide + 1) // 2), (shells,), (shells,)
        sums = _Sums(
            *(torch.zeros(*s, device=device) for s in (*sizes, (wide, wide), (3, wide - 1)))
        )
        for rows, learnt in zip(self._sample(), (True, False), strict=True):
            for batch in self._read(rows):
                self._add(sums, batch, learnt=learnt)
        self.processes.sum_(list(vars(sums).values()))
        return sums

    def _add(self, sums: _Sums, batch: Batch, *, learnt: bool) -> None:
        """Add particles: to what is learnt, or to what tells how good that is."""
        mean, covariance, more = self._posterior(batch)
        index, weight, y, ctf, precision, images, gain = more
        if not learnt:
            sums.gain += torch.stack([gain, gain.square(), torch.ones_like(gain)], 1).sum(0)
            return
        tilts = batch.tilts
        latents = torch.nn.functional.pad(mean, (1, 0), value=1.0)
        products = latents[:, :, None] * latents[:, None]
        products[:, 1:, 1:] += covariance
        sums.moments += products.sum(0)
        each = products.repeat_interleave(tilts, 0)
        error = y.square() - 2 * y * torch.einsum(
            "mpw,mw->mp", images, latents.repeat_interleave(tilts, 0)
        )
        error += torch.einsum("mpw,mwv,mpv->mp", images, each, images)
        shell = self._shells.of_pixel[self._keep]
        sums.error.index_add_(0, shell, error.sum(0))
        sums.seen.index_add_(0, shell, torch.full_like(precision, float(len(y))))
        weight = weight * (ctf * precision)[..., None]
        flat = index.flatten()
        first, second = torch.triu_indices(self._wide, self._wide, device=y.device)
        for into, value, parts in (
            (sums.right, y, latents.repeat_interleave(tilts, 0)),
            (sums.left, ctf, each[:, first, second]),
        ):
            rows = (weight * value[..., None]).flatten(1)[..., None] * parts[:, None]
            into.index_add_(0, flat, rows.flatten(0, 1))

    def _maximise(self, sums: _Sums) -> None:
        """Take mean, components and noise that explain best what is expected."""
        grid, wide = self._grid, self._wide
        precision = sums.left[:, 0]  # of the mean
        least = _LEAST * grid.shell_means(precision).clamp(min=1e-9)
        volumes = torch.zeros_like(sums.right)
        first, second = torch.triu_indices(wide, wide, device=volumes.device)
        for some in grid.inside.split(_VALUES // wide**2):
            equations = sums.right.new_zeros(len(some), wide, wide)
            equations[:, first, second] = sums.left[some]
            equations[:, second, first] = sums.left[some]
            equations.diagonal(dim1=1, dim2=2).add_(least[grid.shell[some], None])
            volumes[some] = torch.linalg.solve(equations, sums.right[some])
        known = sums.seen > 0
        self._noise = torch.where(known, sums.error / sums.seen.clamp(min=1), self._noise)
        if wide > 1:
            volumes = volumes @ self._standardised(sums.moments, volumes)
        self._volumes = grid.masked(volumes)

    def _standardised(self, moments: Tensor, volumes: Tensor) -> Tensor:
        """Return what makes the latents' mean 0 and covariance 1, and components principal.

        It multiplies mean and components `(V, K + 1)` from the right: `(K + 1, K + 1)`.
        """
        wide = len(moments)
        moments = (moments / moments[0, 0]).double()
        mean = moments[0, 1:]
        values, axes = torch.linalg.eigh(moments[1:, 1:] - mean[:, None] * mean)
        root = axes * values.clamp(min=1e-12).sqrt()
        scaled = volumes[:, 1:].double() @ root
        turn = torch.linalg.eigh(scaled.mT @ scaled)[1].flip(1)
        turn = turn * torch.where(turn.diagonal() < 0, -1.0, 1.0)
        found = torch.eye(wide, dtype=torch.float64, device=volumes.device)
        found[1:, 0], found[1:, 1:] = mean, root @ turn
        return found.to(volumes)

    def _begin(self) -> None:
        """Begin with components at random, as strong as a part of the mean."""
        assert self._volumes is not None
        draw = torch.Generator().manual_seed(self._seed)
        normal = torch.randn(len(self._volumes), self._most, generator=draw)
        mean = self._volumes[:, :1]
        self._volumes = torch.cat([mean, _START * mean.abs() * normal.to(mean)], 1)
        self._volumes = self._grid.masked(self._volumes)
