"""Fit posteriors of particles with the decoder of a run."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryodrgn_amort.core import InputError
from cryodrgn_amort.data import BatchLoader
from cryodrgn_amort.inference.bounds import ElboScale, Posterior, anchored
from cryodrgn_amort.inference.optimisation import FitOptions, Fitted, infer
from cryodrgn_amort.models import cluster_centres

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cryodrgn_amort.data import Batch, EncoderInput, Particles
    from cryodrgn_amort.runs import Run


__all__ = ["Fitter"]

_START_ANCHORS = 32  # decoded once, before hundreds of steps: more than ``anchored`` has
_VARIANCE_SAMPLE = 512


class Fitter:
    """Fits posteriors of particles with the decoder of a run.

    Parameters
    ----------
    particles
        Any that the run's decoder can explain.
    own
        Whether they are those that the run was trained on.

    Raises
    ------
    InputError
        If the run does not have as many latents as its own particles are.
    """

    def __init__(self, run: Run, particles: Particles, *, own: bool, seed: int = 0) -> None:
        self.run, self.particles, self.own, self.seed = run, particles, own, seed
        known = run.z()
        # its own particles with those that have no finite latents, or without
        complete = own and particles.n == run.n + len(run.odd)
        self.saved = run.z(complete=True) if complete else known
        if own and len(self.saved[0]) != particles.n:
            raise InputError(
                f"RUN {run.folder}: has latents of {len(self.saved[0])} particles, its inputs hold "
                f"{particles.n}"
            )
        self._rows = own and not run.encoder.shown_images
        shown: EncoderInput | None = None
        if run.encoder.shown_images and (own or run.shows_particles):
            self.model, shown = run.load(particles)
        else:
            self.model = run.load_decoder()[0]
        self.model.requires_grad_(False)
        self.loader = BatchLoader(particles, shown, memory=0)
        device = particles.device
        mean, logvar = (torch.from_numpy(part).to(device) for part in known)
        self._means = known[0]
        self.spread = mean.std(0) if len(mean) > 1 else torch.ones_like(mean[0])
        self.centre = mean.mean(0)
        posteriors = bool(logvar.isfinite().all())
        self.usual_logvar = (
            logvar.mean(0) if posteriors else 2 * self.spread.clamp(min=1e-3).log() - 4
        )

    @property
    def has_answers(self) -> bool:
        """Whether there is an encoder's answer, or a row of a table, for these particles."""
        return self._rows or self.loader.shown is not None

    @torch.no_grad()
    def answer(self, batch: Batch) -> Posterior | None:
        """Return the encoder's posterior, or that in the table.

        What is not finite - a posterior of ``train_dec``, an answer to a damaged image - is the
        mean of all, or their usual variance.
        """
        if self._rows:
            parts = (torch.from_numpy(part[batch.index.numpy()]) for part in self.saved)
            mean, logvar = (part.to(self.particles.device) for part in parts)
        elif self.loader.shown is None:
            return None
        else:
            mean, logvar = (part.float() for part in self.model.posterior(batch))
        return (
            torch.where(mean.isfinite(), mean, self.centre),
            torch.where(logvar.isfinite(), logvar, self.usual_logvar),
        )

    def elbo_scale(self, beta: str) -> ElboScale:
        """Return that of a ``--beta``.

        Raises
        ------
        InputError
            If the run was trained with none that could be used.
        """
        if beta == "implied":
            return ElboScale.implied(self.variance)
        tilts = self.particles.ntilts  # errors add up over them; training takes their mean
        if beta != "train":
            return ElboScale(float(beta) * tilts)
        settings = self.run.settings
        value = settings.beta_value()
        if value == "implied":
            return ElboScale.implied(self.variance)
        if settings.beta_control is not None or isinstance(value, str):
            raise InputError(
                f"--beta train: RUN {self.run.folder} was trained with --beta-control, which "
                "weighs no single particle; give a number, or implied"
            )
        return ElboScale(value * tilts)

    @cached_property
    def anchors(self) -> Tensor:
        """Centres of clusters of the run's latents, `(K, zdim)`."""
        centres = cluster_centres(self._means, _START_ANCHORS, self.seed)
        return torch.from_numpy(centres).to(self.particles.device)

    @cached_property
    def variance(self) -> float:
        """Variance of the noise in a pixel: of what is left of a sample of the particles.

        That of noise within the window (``Particles.windowed``). At the saved latents of the run's
        own particles, else at the best anchors.

        Raises
        ------
        InputError
            If no loss is a number.
        """
        total, pixels = 0.0, 0
        for batch in self.sample():
            answer = self.answer(batch) if self.own else None
            if answer is not None:
                errors = self.model.errors_at(batch, answer[0][None])[0]
            else:
                errors = anchored(self.model, batch, self.anchors, 1.0)[1]
            sound = errors[errors.isfinite()]
            total += float(sound.double().sum())
            pixels += len(sound) * batch.tilts * batch.y.shape[1]
        if not pixels:
            raise InputError(f"PARTICLES {self.particles.images.src.filenames[0]}: no loss of a "
                             "sample of them is a number")  # fmt: skip
        return total / pixels / self.particles.windowed

    def sample(self) -> Iterator[Batch]:
        """Read the particles that tell of the noise."""
        sample = np.random.default_rng(self.seed).permutation(self.particles.n)[:_VARIANCE_SAMPLE]
        return map(self.loader.read, torch.from_numpy(np.sort(sample)).split(128))

    def starts(
        self, batch: Batch, names: Sequence[str], answer: Posterior | None
    ) -> dict[str, Posterior]:
        """Return where fits start, by name."""
        size = len(batch.index)
        logvar = self.usual_logvar.expand(size, -1)
        found: dict[str, Posterior] = {}
        for name in names:
            if name == "encoder":
                assert answer is not None
                found[name] = answer
            elif name == "anchors":
                found[name] = anchored(self.model, batch, self.anchors, self.variance)[0], logvar
            elif name == "mean":
                found[name] = self.centre.expand(size, -1), logvar
            else:
                zero = torch.zeros_like(logvar)
                found[name] = zero, zero
        return found

    def fit(
        self, index: Tensor, names: Sequence[str], elbo_scale: ElboScale, options: FitOptions
    ) -> Fitted:
        """Fit the particles at positions ``index``."""
        return self.fit_batch(self.loader.read(index), names, elbo_scale, options)

    def fit_batch(
        self, batch: Batch, names: Sequence[str], elbo_scale: ElboScale, options: FitOptions
    ) -> Fitted:
        """Fit the particles of a batch."""
        answer = self.answer(batch)
        starts = self.starts(batch, names, answer)
        seed = int(np.random.SeedSequence([self.seed, int(batch.index[0])]).generate_state(1)[0])
        fit, own = infer(self.model, batch, answer, starts, elbo_scale, options, self.spread, seed)
        return batch, fit, own, answer
