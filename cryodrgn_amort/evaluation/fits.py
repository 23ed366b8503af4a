"""What an encoder loses next to posteriors fitted particle by particle, seen and unseen.

Cremer, Li & Duvenaud, arXiv 1801.03558; Zhang, Hayes & Barber, arXiv 2205.11640.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.core import InputError, bar
from cryodrgn_amort.inference import ElboScale, FitOptions, fit, fit_values
from cryodrgn_amort.measures import FitValues, Measure, class_measures, fit_measures, single
from cryodrgn_amort.report import FitResult

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from cryodrgn_amort.evaluation.subject import Subject
    from cryodrgn_amort.inference import Fitter


__all__ = ["encoding_cost", "fit_results"]
logger = logging.getLogger("cryodrgn_amort")

_CHUNK = 128
_TIMED_STEPS, _TIMED_ROUNDS = 10, 5


def _fit(
    fitter: Fitter, chunks: Iterable[Tensor], elbo_scale: ElboScale, *, tighten: bool
) -> FitValues:
    """Fit some particles: from the encoder's answers if it knows them, else from the anchors."""
    starts = ("encoder",) if fitter.own and fitter.has_answers else ("anchors",)
    centre = torch.from_numpy(fitter.saved[0].mean(0)).to(fitter.particles.device)
    fits = (fitter.fit(rows, starts, elbo_scale, FitOptions()) for rows in chunks)
    return fit_values(fitter.model, centre, fits, elbo_scale, fitter.seed, tighten=tighten)


def fit_results(subject: Subject) -> list[FitResult]:
    """Fit a sample of the particles, and of held-out ones, by both weights of the KL divergence."""
    options, opts, fitters = subject.options, subject.opts, subject.fitters
    labels, held_labels = subject.known.labels, subject.held_known.labels
    trained = fitters["training"]
    # held-out particles are compared with as many others
    count = min(options.fit, *(fitter.particles.n for fitter in fitters.values()))
    found = []
    for weight in ("train", "implied"):
        try:
            elbo_scale = trained.elbo_scale(weight)
        except InputError as err:
            logger.warning(f"{err}: posteriors are not fitted by it")
            continue
        seen: FitValues | None = None
        for which, fitter in fitters.items():
            mixed = np.random.default_rng(options.seed).permutation(fitter.particles.n)
            index = np.sort(mixed[:count])
            chunks = bar(torch.from_numpy(index).split(_CHUNK), f"fits, {which}")
            values = _fit(fitter, chunks, elbo_scale, tighten=weight == "implied")
            measures = fit_measures(values, seen, opts)
            left_out = int((~np.isfinite(values.fitted)).sum())
            if left_out:
                logger.warning(f"The loss of {left_out} of {count} {which} particles is not a "
                               "number: they are left out of what is said of fits")  # fmt: skip
            if which == "held-out" and labels is not None and held_labels is not None:
                z, truth = subject.run.z()[0], held_labels[index]
                measures += class_measures(z, labels, values, truth, opts)
            seen = seen or values
            found.append(
                FitResult(
                    which,
                    weight,
                    elbo_scale.beta,
                    elbo_scale.variance,
                    index,
                    {m.name: m for m in measures},
                    values.gap,
                    values.khat,
                    left_out,
                )
            )
    return found


def encoding_cost(fitter: Fitter, count: int) -> Measure:
    """Time the encoder next to 50 steps of a fit, on the same particles, in turns.

    The value is the median over the rounds, its interval goes from the least to the greatest.
    """
    batch = fitter.loader.read(torch.arange(min(count, fitter.particles.n)))
    size = len(batch.index)
    start = fitter.centre.expand(size, -1), fitter.usual_logvar.expand(size, -1)
    options = FitOptions(steps=_TIMED_STEPS, tolerance=-math.inf)
    ratios = []
    for _ in range(_TIMED_ROUNDS + 1):
        begun = time.perf_counter()
        with torch.no_grad():
            fitter.model.posterior(batch)[0].cpu()
        encoded = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        fit(fitter.model, batch, start, ElboScale(1.0), options, fitter.spread, generator)
        fitted = (time.perf_counter() - encoded) * 50 / _TIMED_STEPS
        ratios.append((encoded - begun) / fitted)
    known = np.array(ratios[1:])  # the first round warms up
    low, high = float(known.min()), float(known.max())
    return single("encoding_cost", float(np.median(known)), size, low, high)
