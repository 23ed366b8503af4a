"""Are error bars right: particles' own decoded images with new noise, encoded or fitted again.

Of a posterior with variance s^2, by a prior of variance 1, means scatter by s^2 (1 - s^2) from
noise to noise, about (1 - s^2) times the true latent: both are known in closed form for Gaussians,
and nothing but the variance that is claimed is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.core import InputError, bar
from cryodrgn_amort.inference import FitOptions, fit
from cryodrgn_amort.models import whole_ctf
from cryodrgn_amort.study.validation.case import Case

if TYPE_CHECKING:
    from torch import Tensor

    from cryodrgn_amort.data import Batch
    from cryodrgn_amort.runs import Run


__all__ = ["renoised", "scatter"]

_TOGETHER = 64
_ROUNDS = 5
_FITTED = 4  # of so many particles one, where each has to be fitted
_KNOWN = 0.1  # dimensions that a posterior tells of, at least


class _Again:
    """Latents of images made up: by the run's encoder, or fitted where that is shown none.

    Fits begin at the latent that was decoded, and weigh errors and divergence as the training did.
    """

    def __init__(self, case: Case) -> None:
        self.fitter = fitter = case.fitter
        run, particles = case.run, case.particles
        self.encodes = run.shows_particles and not particles.whole
        self.model = run.load(particles)[0] if self.encodes else fitter.model
        self.generator = torch.Generator().manual_seed(case.seed)
        try:
            self.scale = fitter.elbo_scale("train")
        except InputError:  # --beta-control weighs no single particle
            self.scale = fitter.elbo_scale("implied")

    def __call__(self, batch: Batch, known: tuple[Tensor, Tensor]) -> Tensor:
        """Return means, `(B, zdim)`; ``known``: the posterior whose mean was decoded."""
        if not self.encodes:
            spread = self.fitter.spread
            found, _ = fit(
                self.model, batch, known, self.scale, FitOptions(), spread, self.generator
            )
            return found[0]
        batch.image = batch.y if batch.ctf is None else batch.y * whole_ctf(batch.ctf).sign()
        with torch.no_grad():
            return self.model.posterior(batch)[0]


def renoised(run: Run, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Show particles of a run anew, with new noise each time.

    Returns
    -------
    position
        Of the particles in their stack, `(M,)`.
    bias, spread
        See ``scatter``, `(M,)` each.
    encoded
        Whether they were encoded, and not fitted.
    """
    case = Case(run, run.particles(), own=True, seed=seed)
    mean, logvar = run.z()
    again, draw = _Again(case), case.generator()
    rows = case.sample(count if again.encodes else max(20, count // _FITTED))
    noise = case.noise(case.left(rows, mean[rows]))
    found = []
    for index in bar(torch.from_numpy(rows).split(_TOGETHER), "new noise"):
        batch = case.loader.read(index)
        z, width = (torch.from_numpy(part[index.numpy()]).to(batch.y) for part in (mean, logvar))
        with torch.no_grad():
            shown = case.decoded(batch, z)
        each = []
        for _ in range(_ROUNDS):
            batch.y = shown + noise.draw(index.to(shown.device), draw)
            each.append(again(batch, (z, width)).double().cpu())
        found.append(torch.stack(each))
    bias, spread = scatter(mean[rows], logvar[rows], torch.cat(found, 1).numpy())
    return case.positions[rows], bias, spread, again.encodes


def scatter(
    mean: np.ndarray, logvar: np.ndarray, again: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compare how posterior means scatter with the variances that are claimed.

    Parameters
    ----------
    mean, logvar
        True latents `(M, zdim)`, and the log variances that are claimed.
    again
        Posterior means for new noise, `(R, M, zdim)`.

    Returns
    -------
    bias
        Distance of their mean from where it should be, in standard deviations, root mean square
        over dimensions, `(M,)`; what chance makes of it is taken off.
    spread
        Their variance over what it should be, `(M,)`: NaN where posteriors claim to know nothing.
    """
    variance = np.minimum(np.exp(logvar.astype(np.float64)), 1.0)
    scattered = again.var(0, ddof=1) / variance
    off = (again.mean(0) - (1 - variance) * mean) ** 2 / variance - scattered / len(again)
    known = (1 - variance).sum(1)
    told = known > _KNOWN
    spread = np.divide(scattered.sum(1), known, out=np.full(len(mean), np.nan), where=told)
    return np.sqrt(np.maximum(off.mean(1), 0.0)), spread
