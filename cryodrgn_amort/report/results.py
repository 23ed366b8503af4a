"""What an evaluation found: plain data that figures and reports show and files keep."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from cryodrgn_amort.measures import with_attainable
from cryodrgn_amort.report.trust import trust_table

if TYPE_CHECKING:
    from cryodrgn_amort.measures import Embedding, Measure
    from cryodrgn_amort.options import EvalOptions
    from cryodrgn_amort.runs import Run


__all__ = ["MODES", "Evaluation", "FitResult", "TransformResult"]

MODES = ("held", "follow")
"""held: pose and CTF tables stay, as in the paper. follow: they are transformed with the image."""
NOT_APPLICABLE = (
    "not applicable: this run's encoder is a table. It is never shown an image, so its latents "
    "cannot move when an image does; that is no merit, and no score is given."
)


@dataclass(frozen=True)
class TransformResult:
    """What one transform in one mode did.

    Attributes
    ----------
    name, title
        As given on the command line, and for humans.
    z, logvar
        Posterior of the transformed copies, `(N, zdim)`.
    measures
        By name, in the order in which they are to be read.
    arrays
        Per-particle values `(N,)` by name; NaN where a particle was not looked up.
    volumes
        Decoded at the labelled particles' transformed latents, `(L, box, box, box)`; none, `L` = 0,
        of transforms that are not shown particle by particle (``Evaluation.mapped``).
    is_control
        Whether centring undoes the transform, so that this is a control and not a test.
    """

    name: str
    title: str
    mode: str
    z: np.ndarray
    logvar: np.ndarray
    measures: dict[str, Measure]
    arrays: dict[str, np.ndarray]
    volumes: np.ndarray
    is_control: bool = False

    @property
    def key(self) -> str:
        """Name for files: ``roll-1.held``."""
        return f"{re.sub('[^A-Za-z0-9.+-]', '-', self.name)}.{self.mode}"


@dataclass(frozen=True)
class FitResult:
    """What fitting posteriors to some particles, one by one, showed.

    Attributes
    ----------
    which
        "training" or "held-out" particles.
    weight
        Of the KL divergence: "train", as in training, or "implied" by the noise.
    beta, variance
        See ``inference.ElboScale``.
    index
        Which particles of that set: positions `(M,)`.
    measures
        By name.
    gap
        In nats per particle, `(M,)`; NaN where it cannot be told.
    khat
        Whether that can be trusted, `(M,)`; NaN where it is not known. See ``tail_shapes``.
    left_out
        Number of particles whose loss is not a number; the measures leave them out.
    """

    which: str
    weight: str
    beta: float
    variance: float
    index: np.ndarray
    measures: dict[str, Measure]
    gap: np.ndarray
    khat: np.ndarray
    left_out: int = 0

    @property
    def key(self) -> str:
        """Name in files: ``held-out.implied``."""
        return f"{self.which}.{self.weight}"


@dataclass
class Evaluation:
    """All that was measured of one run at one epoch.

    Attributes
    ----------
    applicable
        Whether the encoder is shown images, so that amortization can be measured.
    index, total
        Positions of the particles in their stack, `(N,)`, and how many that has.
    left_out
        Which of the run's particles are none of these, since their latents are not finite: their
        rows among the latents that were saved, `(M,)`.
    z, logvar
        Posterior of the particles, `(N, zdim)`.
    measures
        Of the run itself: latent use, the fit to the images, and heterogeneity where it is known.
    arrays
        Per-particle values of the run itself `(N,)` by name; NaN where not in the sample.
    kl_per_dimension
        Mean divergence of the posteriors from the prior, in nats, `(zdim,)`; None for runs of
        ``train_dec``, which have no posteriors.
    calibration
        Where true latents lie in the encoder's posteriors: see ``Calibration.places``.
    results
        One per transform and mode; empty where not applicable.
    fits
        One per set of particles and weight of the KL divergence.
    labelled
        Positions of the labelled particles.
    volumes
        Decoded at the labelled particles, `(L, box, box, box)`.
    embeddings
        "PCA" and "UMAP".
    labels, coordinate
        As the user gave them, `(N,)`, labels as positions in ``label_names``; None if not given.
    """

    run: Run
    options: EvalOptions
    applicable: bool
    z: np.ndarray
    logvar: np.ndarray
    apix: float
    index: np.ndarray
    total: int
    measures: dict[str, Measure]
    labelled: np.ndarray
    volumes: np.ndarray
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    kl_per_dimension: np.ndarray | None = None
    calibration: dict[str, np.ndarray] | None = None
    results: list[TransformResult] = field(default_factory=list)
    fits: list[FitResult] = field(default_factory=list)
    embeddings: dict[str, Embedding] = field(default_factory=dict)
    labels: np.ndarray | None = None
    coordinate: np.ndarray | None = None
    label_names: tuple[str, ...] = ()
    left_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def of_all(self, values: np.ndarray) -> np.ndarray:
        """Return values of the particles `(N, ...)` with NaN in the places of those left out."""
        if not len(self.left_out):
            return values
        whole = np.full((len(values) + len(self.left_out), *values.shape[1:]), np.nan, np.float32)
        whole[np.setdiff1d(np.arange(len(whole)), self.left_out)] = values
        return whole

    def allow(self) -> None:
        """Put beside measures what the data allow of them, where that was measured."""
        of_all = self.measures
        self.measures = with_attainable(of_all, of_all)
        for fit in self.fits:
            fit.measures.update(with_attainable(fit.measures, of_all))

    def rows(self) -> list[tuple[str, str, Measure]]:
        """Return all measures in the order of reading, and what each is of.

        That is a transform and its mode, or a fit and its particles; or nothing: the run itself.
        """
        found = [("", "", m) for m in self.measures.values()]
        found += [(r.name, r.mode, m) for r in self.results for m in r.measures.values()]
        fits = ((f"fit, {f.weight} beta", f.which, f.measures) for f in self.fits)
        return found + [(fit, which, m) for fit, which, some in fits for m in some.values()]

    @property
    def mapped(self) -> list[TransformResult]:
        """The results that are shown particle by particle."""
        names = list(dict.fromkeys(r.name for r in self.results))[: self.options.maps]
        return [r for r in self.results if r.name in names]

    @cached_property
    def trust(self) -> dict[str, np.ndarray]:
        """What is known of each particle: ``trust_table``, made once it is asked for."""
        return trust_table(self)

    @property
    def tests(self) -> list[TransformResult]:
        """The results that judge the encoder: no controls, and no poses that are made wrong.

        That is what the pose table is of a copy that is turned and "held", to an encoder that is
        told the pose. If there are no others, all.
        """
        told = self.run.encoder.told_pose
        found = [r for r in self.results if not r.is_control]
        right = [r for r in found if not (told and r.mode == "held")]
        return right or found or self.results

    @property
    def reason(self) -> str:
        """Why amortization was not measured; empty if it was."""
        return "" if self.applicable else NOT_APPLICABLE
