"""Calibration of an encoder's posteriors, and whether particles have what the decoder shows.

Both are asked with images that the run's own decoder makes up, so that their latents
are true by construction: simulation-based calibration (Talts et al., arXiv 1804.06788). Of a
Gaussian posterior the rank of the true latent among infinitely many draws is known without drawing
any; ranks of what it explains of the image, and of its distance to another image's latent, are
those among draws. And where the decoder is right, latents gain as much of particles as of images
made up, and these cannot be told from particles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.core import generator
from cryodrgn_amort.data import BatchLoader
from cryodrgn_amort.measures import Calibration
from cryodrgn_amort.models import SyntheticImages

if TYPE_CHECKING:
    from torch import Tensor

    from cryodrgn_amort.data import Batch, Particles
    from cryodrgn_amort.inference import Fitter
    from cryodrgn_amort.models import AmortVAE, SyntheticBatch


__all__ = ["calibrate"]

IMAGES = 1024
"""That are made up."""
_BATCH = 128
_RANKED, _DRAWS = 256, 63  # images and draws from their posteriors, which are decoded


@torch.no_grad()
def calibrate(
    model: AmortVAE,
    particles: Particles,
    z: np.ndarray,
    logvar: np.ndarray,
    others: Fitter,
    seed: int,
) -> Calibration:
    """Compare an encoder's answers to images made up with the truth, and with those to particles.

    Parameters
    ----------
    particles, z, logvar
        Of the run: posteriors `(N, zdim)`, from which the true latents are drawn.
    others
        Holds the particles to compare with: held-out ones, if there are any.
    seed
        Of the images. With the same one, an encoder that was trained on such has seen them.
    """
    amort, device = model.amort, particles.device
    templates = None if amort is None else amort.template_latents()
    means, logvars = (torch.from_numpy(part).to(device) for part in (z, logvar))
    # what images gain depends on the pose: each has its own, so that they are independent
    images = SyntheticImages(
        model.fast, particles, means, logvars, templates, seed, poses=_BATCH, signals=1
    )
    loader = BatchLoader(particles, None, memory=0)
    index = np.random.default_rng(seed).integers(particles.n, size=IMAGES)
    ranks, gains, powers, centre = [], [], [], means.mean(0)
    shells, draw, drawn = images.noise.shells, generator(device, seed), []
    for number, part in enumerate(torch.from_numpy(index).split(images.poses)):
        made = images.draw_apart(loader.read(part), number)
        mean, log_variance = (part.double() for part in model.posterior(made))
        assert made.z is not None
        ranks.append(torch.special.ndtr((made.z - mean) * torch.exp(-0.5 * log_variance)))
        gains.append(_gain(model, made, mean.to(centre), centre))
        powers.append(shells.power(made.y))
        if number * images.poses < _RANKED:
            drawn.append(_ranks_among_draws(model, made, (mean, log_variance), means, draw))
    sample = np.sort(np.random.default_rng(seed).permutation(others.particles.n)[:IMAGES])
    answers, theirs, their_powers = [], [], []
    for part in torch.from_numpy(sample).split(_BATCH):
        batch = others.loader.read(part)
        answer = others.answer(batch)
        assert answer is not None
        mean = answer[0].to(centre)
        answers.append(mean)
        theirs.append(_gain(others.model, batch, mean, centre))
        their_powers.append(shells.power(batch.y))

    def joined(parts: list[Tensor]) -> np.ndarray:
        values: np.ndarray = torch.cat(parts).cpu().numpy()
        return values

    distances, likelihoods = (joined(list(part)) for part in zip(*drawn, strict=True))
    return Calibration(
        joined(ranks), sample, joined(answers), joined(gains), joined(theirs), distances,
        likelihoods, joined(powers), joined(their_powers),
    )  # fmt: skip


def _ranks_among_draws(
    model: AmortVAE,
    made: SyntheticBatch,
    posterior: tuple[Tensor, Tensor],
    means: Tensor,
    draw: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return the true latents' ranks among draws of their posteriors: see ``Calibration``.

    That is by distance to the mean of a particle drawn at random from ``means``, and by
    likelihood, `(B,)` each; where there are few ranks, a random number spreads each over its
    part of 0 to 1.
    """
    mean, log_variance = (part.to(means) for part in posterior)
    assert made.z is not None
    noise = torch.randn(_DRAWS, *mean.shape, generator=draw, device=mean.device)
    z = torch.cat([made.z.to(mean)[None], mean + noise * torch.exp(0.5 * log_variance)])
    at = torch.randint(len(means), (len(mean),), generator=draw, device=mean.device)
    apart, errors = (z - means[at]).norm(dim=2), model.errors_at(made, z)
    spread = torch.rand(len(mean), generator=draw, device=mean.device)
    nearer, worse = (apart[1:] < apart[0]).sum(0), (errors[1:] > errors[0]).sum(0)
    return (nearer + spread) / (_DRAWS + 1), (worse + spread) / (_DRAWS + 1)


def _gain(model: AmortVAE, batch: Batch, mean: Tensor, centre: Tensor) -> Tensor:
    errors = model.errors_at(batch, torch.stack([centre.expand_as(mean), mean]))
    return -0.5 * errors.diff(dim=0)[0]
