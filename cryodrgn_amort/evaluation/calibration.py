"""Calibration of an encoder's posteriors, and whether particles have what the decoder shows.

Both are asked with images that the run's own decoder makes up, so that their latents
are true by construction: simulation-based calibration (Talts et al., arXiv 1804.06788). Of a
Gaussian posterior the rank of the true latent among infinitely many draws is known without drawing
any. And where the decoder is right, latents gain as much of particles as of images made up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.data import BatchLoader
from cryodrgn_amort.inference import errors_at
from cryodrgn_amort.measures import Calibration
from cryodrgn_amort.models import SyntheticImages

if TYPE_CHECKING:
    from torch import Tensor

    from cryodrgn_amort.data import Batch, Particles
    from cryodrgn_amort.inference import Fitter
    from cryodrgn_amort.models import AmortVAE


__all__ = ["calibrate"]

IMAGES = 1024
"""That are made up."""
_BATCH = 128


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
    ranks, gains, centre = [], [], means.mean(0)
    for number, part in enumerate(torch.from_numpy(index).split(images.poses)):
        made = images.draw_apart(loader.read(part), number)
        mean, log_variance = (part.double() for part in model.posterior(made))
        assert made.z is not None
        ranks.append(torch.special.ndtr((made.z - mean) * torch.exp(-0.5 * log_variance)))
        gains.append(_gain(model, made, mean.to(centre), centre))
    sample = np.sort(np.random.default_rng(seed).permutation(others.particles.n)[:IMAGES])
    answers, theirs = [], []
    for part in torch.from_numpy(sample).split(_BATCH):
        batch = others.loader.read(part)
        answer = others.answer(batch)
        assert answer is not None
        mean = answer[0].to(centre)
        answers.append(mean)
        theirs.append(_gain(others.model, batch, mean, centre))

    def joined(parts: list[Tensor]) -> np.ndarray:
        values: np.ndarray = torch.cat(parts).cpu().numpy()
        return values

    return Calibration(joined(ranks), sample, joined(answers), joined(gains), joined(theirs))


def _gain(model: AmortVAE, batch: Batch, mean: Tensor, centre: Tensor) -> Tensor:
    errors = errors_at(model, batch, torch.stack([centre.expand_as(mean), mean]))
    return -0.5 * errors.diff(dim=0)[0]
