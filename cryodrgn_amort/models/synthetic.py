"""Training an encoder on images that a decoder makes up, of which the latents are known.

The decoder is that of a finished run. Latents are drawn from the posteriors of its particles,
poses from theirs with a random turn in the plane, CTFs from theirs, and noise anew; minimised is
-log q(z | image). No image is shown twice, so there is nothing to memorise (the sleep phase of
Hinton et al. 1995, doi:10.1126/science.7761831; Zhang, Hayes & Barber, arXiv 2205.11640).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cryodrgn_amort.core import generator
from cryodrgn_amort.data import Agreement, Batch, BatchLoader, NoiseModel, Shells, optics_groups
from cryodrgn_amort.models.objective import Losses, kl_divergence
from cryodrgn_amort.models.step import Objective

if TYPE_CHECKING:
    from cryodrgn_amort.data import Particles
    from cryodrgn_amort.models.base import LatentModel
    from cryodrgn_amort.models.decoder import FastDecoder


__all__ = [
    "SyntheticBatch",
    "SyntheticImages",
    "measure_noise",
    "unexplained",
    "whole_ctf",
    "with_ctf",
]

_LOGVAR_RANGE = (-12.0, 4.0)
_SIGNALS = 16  # latents at one pose
_POSES = 1000
_POOL_BYTES = 1 << 29
_USES = 4  # of a signal, each time with other noise and CTF, before its pose is replaced
_NOISE_SAMPLE = 512  # particles of each optics group
_QUICK_SAMPLE, _LEAST_OF_A_GROUP = 256, 16
_CHUNK = 64
_TOGETHER = 64  # poses, while a pool is made


@dataclass
class SyntheticBatch(Batch):
    """Synthetic images. ``index`` says whose CTF and translation they have.

    Attributes
    ----------
    z
        Their latents, `(B, zdim)`.
    templates
        Images of ``Encoder.template_latents`` at these poses, as ``Encoder.with_templates`` yields
        them, `(B, K, P)`; None: there are none.
    """

    z: Tensor | None = None
    templates: Tensor | None = None


def measure_noise(
    decoder: FastDecoder, particles: Particles, mean: Tensor, seed: int
) -> NoiseModel:
    """Measure the noise in particles: what latents ``mean`` `(N, zdim)` leave unexplained."""
    shells, groups, spectra, _ = unexplained(decoder, particles, mean, seed)
    return NoiseModel(particles, shells, spectra, groups, seed)


@torch.no_grad()
def unexplained(
    decoder: FastDecoder, particles: Particles, mean: Tensor, seed: int, *, quick: bool = False
) -> tuple[Shells, Tensor, Tensor, Tensor]:
    """Measure the spectrum of what latents ``mean`` `(N, zdim)` leave unexplained.

    In each optics group, of a sample of its particles.

    Parameters
    ----------
    quick
        Whether a small sample is enough, of all groups together, for their average.

    Returns
    -------
    shells
    groups
        Optics group of each particle, `(N,)`.
    spectra
        Variance of a pixel in each shell, `(G, shells)`.
    explained
        The same of what they explain, `(G, shells)`.
    """
    shells, groups = Shells(particles), optics_groups(particles.ctf_params, particles.n)
    rng = np.random.default_rng(seed)
    loader = BatchLoader(particles, None, memory=0)
    spectra, count = [], int(groups.max()) + 1
    most = max(_LEAST_OF_A_GROUP, _QUICK_SAMPLE // count) if quick else _NOISE_SAMPLE
    for group in range(count):
        members = (groups == group).nonzero()[:, 0].numpy()
        sample = torch.from_numpy(np.sort(rng.permutation(members)[:most]))
        sums, sound = torch.zeros(2, shells.count, dtype=torch.float64), 0
        for index in sample.split(_CHUNK):
            batch = loader.read(index)
            assert batch.rot is not None
            images = decoder.images(batch.rot, mean[index.to(mean.device), None])[:, 0]
            images = with_ctf(images, batch.ctf)
            both = torch.stack([shells.power(batch.y - images), shells.power(images)])
            both = both.double().cpu()
            good = both[0].isfinite().all(1)
            sums += both[:, good].sum(1)
            sound += int(good.sum())
        spectra.append((sums / max(sound, 1)).float())
    left, explained = torch.stack(spectra, 1).to(mean.device)
    return shells, groups, left, explained


def with_ctf(images: Tensor, ctf: Tensor | None) -> Tensor:
    """Multiply images `(..., P)` with the CTF at half of their pixels, `(..., P / 2)`."""
    return images if ctf is None else images * whole_ctf(ctf)


def whole_ctf(ctf: Tensor) -> Tensor:
    """Return the CTF at all masked pixels: the other half is the mirror image."""
    return torch.cat([ctf, ctf.flip(-1)], -1)


def _bounded(logvar: Tensor) -> Tensor:
    """Return log variances in the range whose variances are finite.

    With the gradients that they would have there: from beyond it, too, there is a way back.
    """
    return logvar + (logvar.clamp(*_LOGVAR_RANGE) - logvar).detach()


class SyntheticImages(Objective):
    """Makes up images for an encoder, and tells how well it reads them.

    Signals - what the decoder makes of some latents at one pose, without CTF and noise - are kept
    in a pool and used a few times. What the pool holds depends on the seed and the epoch only, so
    that a training that goes on sees what it would have seen.

    Parameters
    ----------
    mean, logvar
        Posteriors from which latents are drawn, `(N, zdim)`.
    templates
        What ``Encoder.template_latents`` returns, `(K, zdim)` or None.
    poses, signals
        At most so many poses are in the pool at a time, and so many latents at each.
    copies
        How many images are made up in place of each particle of a batch.
    each_epoch
        How many in an epoch; None: one for each particle.

    Attributes
    ----------
    poses
        How many poses are in the pool.
    """

    def __init__(
        self,
        decoder: FastDecoder,
        particles: Particles,
        mean: Tensor,
        logvar: Tensor,
        templates: Tensor | None,
        seed: int,
        poses: int = _POSES,
        signals: int = _SIGNALS,
        copies: int = 1,
        each_epoch: int | None = None,
    ) -> None:
        self.decoder, self.particles, self.seed = decoder, particles, seed
        self.signals, self.copies = signals, copies
        self._each_epoch = particles.n if each_epoch is None else each_epoch
        self._mean, self._spread = mean, torch.exp(0.5 * logvar)
        self.templates = mean[:0] if templates is None else templates
        self.noise = measure_noise(decoder, particles, mean, seed)
        each = 4 * len(particles.mask) * (len(self.templates) + signals)
        self.poses = size = int(min(poses, max(16, _POOL_BYTES // each)))
        shape = size, len(self.templates) + signals, len(particles.mask)
        self._images = torch.empty(shape, device=mean.device)
        self._rots = torch.empty(size, 3, 3, device=mean.device)
        self._z = torch.empty(size, signals, mean.shape[1], device=mean.device)
        self._made = torch.full((size,), -1)
        self.generator: torch.Generator = generator(mean.device, seed)
        self._sums = torch.zeros(2, dtype=torch.float64, device=mean.device)  # errors, images
        self._last = torch.zeros_like(self._sums)  # of the last batch
        self._variance = float(mean.var(0).sum() + self._spread.square().mean(0).sum())

    def epoch_start(self, epoch: int) -> None:
        """Make the signals of an epoch."""
        self._sums.zero_()
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)
        self.generator.manual_seed(int(state[0] >> np.uint64(1)))
        size = self.poses
        each = min(size, -(-self._each_epoch // (self.signals * _USES)))
        replaced = (epoch - 1) * each - torch.arange(size)
        generation = torch.div(replaced + size - 1, size, rounding_mode="floor").clamp(min=0)
        places = (generation != self._made).nonzero()[:, 0]
        for some in places.split(_TOGETHER) if len(places) else ():
            self._make(some, generation[some].tolist())
        self._made = generation

    def _make(self, places: Tensor, generations: list[int]) -> None:
        """Fill places of the pool, each with random numbers of its own."""
        drawn = [self._drawn(*at) for at in zip(places.tolist(), generations, strict=True)]
        planes, poses, rows, normal = (
            torch.from_numpy(np.stack(parts)).to(self._z.device)
            for parts in zip(*drawn, strict=True)
        )
        rots = self.particles.rots[poses]
        rots = planes.to(rots) @ rots
        z = self._mean[rows] + self._spread[rows] * normal
        latents = torch.cat([z, self.templates.expand(len(z), -1, -1)], 1)
        images = self.decoder.images(rots, latents)
        images[:, self.signals + 1 :] -= images[:, self.signals : self.signals + 1]
        places = places.to(self._z.device)
        for pool, new in ((self._images, images), (self._rots, rots), (self._z, z)):
            pool.index_copy_(0, places, new.to(pool.dtype))

    def _drawn(self, place: int, generation: int) -> tuple[np.ndarray, ...]:
        """Draw a turn in the plane, whose pose it turns, whose posteriors, and noise for these."""
        rng = np.random.default_rng([self.seed, place, generation])
        turn = rng.uniform(0, 2 * math.pi)
        cos, sin = math.cos(turn), math.sin(turn)
        plane = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], np.float32)
        pose = np.asarray(rng.integers(self.particles.n))
        rows = rng.integers(len(self._mean), size=self.signals)
        normal = rng.standard_normal((self.signals, self._mean.shape[1]), dtype=np.float32)
        return plane, pose, rows, normal

    def draw(self, batch: Batch) -> SyntheticBatch:
        """Make up images in place of each particle of a batch, with its CTF and translation."""
        return self._one_each(batch if self.copies == 1 else batch.repeated(self.copies))

    def _one_each(self, batch: Batch) -> SyntheticBatch:
        """Make up an image in place of each particle of a batch."""
        place, signal = (
            torch.randint(n, (batch.size,), generator=self.generator, device=self._z.device)
            for n in (self.poses, self.signals)
        )
        if batch.share is not None:
            own = batch.share.places.to(place.device)
            place, signal = place[own], signal[own]
        return self._images_of(batch, place, signal)

    def draw_apart(self, batch: Batch, number: int) -> SyntheticBatch:
        """Make up images as ``draw`` does, each at a pose and of a latent of its own.

        For at most ``poses`` of them at a time; another ``number`` gives others.
        """
        for some in torch.arange(batch.size).split(_TOGETHER):
            self._make(some, [number] * len(some))
        self._made.fill_(-1)  # an epoch makes its own again
        place = torch.arange(batch.size, device=self._z.device)
        return self._images_of(batch, place, torch.zeros_like(place))

    def _images_of(self, batch: Batch, place: Tensor, signal: Tensor) -> SyntheticBatch:
        """Make images of what is at places of the pool, with new noise."""
        index, ctf = batch.device_index, batch.ctf
        y = with_ctf(self._images[place, signal], ctf)
        y += self.noise.draw(index, self.generator, batch.share)
        image = y if ctf is None else y * whole_ctf(ctf).sign()
        compared = self._images[place, self.signals :] if len(self.templates) else None
        return SyntheticBatch(
            batch.index, y, image, self._rots[place], ctf, sent=index, z=self._z[place, signal],
            templates=compared,
        )  # fmt: skip

    def loss(
        self, model: LatentModel, batch: Batch, beta: float | Tensor, beta_control: float | None
    ) -> tuple[Losses, Tensor]:
        """Return -log q(z | image), in nats, of images made up in place of a batch, and the means.

        As losses of training go: ``total`` and ``gen_loss`` are this, ``kld`` is that of q.
        """
        mine = self.draw(batch)
        mean, logvar = model.posterior(mine)
        assert mine.z is not None
        logvar = _bounded(logvar)
        error = (mine.z.to(mean) - mean).square()
        each = 0.5 * (math.log(2 * math.pi) + logvar + error * torch.exp(-logvar)).sum(1)
        size = batch.size * self.copies
        total = each.sum() / size
        kld = kl_divergence(mean, logvar).sum() / size
        self._last[0] = error.detach().sum()
        self._last[1] = len(error)
        return Losses(total, total, kld, 0.0), mean[:: self.copies].detach()

    def count(self, lost: Tensor | None) -> None:
        """Count the last images, unless they are ``lost``."""
        self._sums += self._last if lost is None else self._last.masked_fill(lost, 0.0)

    def epoch_metrics(self) -> dict[str, float]:
        """Return how much of the latents' variance the means explain, of this epoch's images."""
        error, count = self._sums.tolist()
        return {"latent_r2": 1 - error / max(count, 1) / self._variance}

    def epoch_state(self) -> dict[str, Any]:
        """Return the state of the random numbers, and the sums of the metrics so far."""
        return {
            "generator": self.generator.get_state(),
            "error": self._sums[0].clone(),
            "count": int(self._sums[1]),
        }

    def set_epoch_state(self, state: dict[str, Any]) -> None:
        """Go on in an epoch; on another kind of device, with other random numbers."""
        if len(state["generator"]) == len(self.generator.get_state()):
            self.generator.set_state(state["generator"])
        self._sums[0] = state["error"].to(self._sums)
        self._sums[1] = int(state["count"])

    def agreement(self, within: int | None = None, count: int = 512) -> Agreement:
        """Compare preprocessed particles with images made up in their place.

        In all shells, or in so many.
        """
        rng = np.random.default_rng(self.seed)
        sample = torch.from_numpy(np.sort(rng.permutation(self.particles.n)[:count]))
        loader, shells = BatchLoader(self.particles, None, memory=0), self.noise.shells
        real, synthetic = [], []
        for index in sample.split(_CHUNK):
            batch = loader.read(index)
            real.append(shells.power(batch.y).cpu())
            synthetic.append(shells.power(self._one_each(batch).y).cpu())
        frequency = (np.arange(shells.count) + 1) / self.particles.box
        powers = (torch.cat(part)[:, :within].numpy() for part in (real, synthetic))
        return Agreement(frequency[:within], *powers)
