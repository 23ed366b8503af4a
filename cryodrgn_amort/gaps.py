"""What an encoder loses next to posteriors fitted particle by particle, seen and unseen.

Cremer, Li & Duvenaud, arXiv 1801.03558; Zhang, Hayes & Barber, arXiv 2205.11640.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort import metrics
from cryodrgn_amort.errors import InputError
from cryodrgn_amort.inference import FitOptions, Yardstick, errors_at, fit, importance_bound
from cryodrgn_amort.metrics import Measure, Neighbours, measure
from cryodrgn_amort.progress import bar
from cryodrgn_amort.results import FitResult

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from cryodrgn_amort.inference import Decoder, Fitted
    from cryodrgn_amort.posteriors import Fitter
    from cryodrgn_amort.results import EvalOptions
    from cryodrgn_amort.runs import Run

__all__ = [
    "FitValues",
    "class_measures",
    "encoding_cost",
    "fit_measures",
    "fit_results",
    "fit_values",
    "told_classes",
]

logger = logging.getLogger("cryodrgn_amort")

_CHUNK = 128
_SAMPLES = 64  # of the importance-weighted bound
_TIMED_STEPS, _TIMED_ROUNDS = 10, 5


@dataclass
class FitValues:
    """Values of the particles that were fitted, each `(M,)` but for ``z`` and ``own``.

    Attributes
    ----------
    gap
        ELBO of the fit minus that of the encoder; NaN where there is no encoder's answer.
    tighter
        Importance-weighted bound minus ELBO of the fit; NaN if it was not wanted.
    constant, encoder, fitted
        Reconstruction losses in nats: at the mean of all latents, the encoder's, the fitted ones.
    own, z
        The encoder's and the fitted means, `(M, zdim)`.
    """

    gap: np.ndarray
    tighter: np.ndarray
    converged: np.ndarray
    constant: np.ndarray
    encoder: np.ndarray
    fitted: np.ndarray
    own: np.ndarray
    z: np.ndarray


def fit_values(
    model: Decoder,
    centre: Tensor,
    fits: Iterable[Fitted],
    yardstick: Yardstick,
    seed: int,
    *,
    tighten: bool,
) -> FitValues:
    """Compare fits with one latent for all, ``centre`` `(zdim,)`, and with the encoder.

    Parameters
    ----------
    fits
        Of some particles each.
    tighten
        Whether the importance-weighted bound is wanted.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    for batch, best, own, answer in fits:
        unknown = torch.full_like(best.elbo, torch.nan)
        mean = torch.full_like(best.mean, torch.nan) if answer is None else answer[0]
        z = torch.stack([centre.expand_as(best.mean), mean, best.mean])
        losses = errors_at(model, batch, z) / 2
        bound = unknown
        if tighten:
            noise = torch.randn(_SAMPLES, *best.mean.shape, generator=generator).to(best.mean)
            bound = importance_bound(model, batch, (best.mean, best.logvar), yardstick, noise)
        found = {
            "gap": unknown if own is None else best.elbo - own,
            "tighter": bound - best.elbo, "converged": best.converged, "constant": losses[0],
            "encoder": losses[1], "fitted": losses[2], "own": mean, "z": best.mean,
        }  # fmt: skip
        for name, values in found.items():
            parts.setdefault(name, []).append(values.cpu())
    return FitValues(**{name: torch.cat(part).double().numpy() for name, part in parts.items()})


def _fit(
    fitter: Fitter, chunks: Iterable[Tensor], yardstick: Yardstick, *, tighten: bool
) -> FitValues:
    """Fit some particles: from the encoder's answers if it knows them, else from the anchors."""
    starts = ("encoder",) if fitter.own and fitter.has_answers else ("anchors",)
    centre = torch.from_numpy(fitter.saved[0].mean(0)).to(fitter.particles.device)
    fits = (fitter.fit(rows, starts, yardstick, FitOptions()) for rows in chunks)
    return fit_values(fitter.model, centre, fits, yardstick, fitter.seed, tighten=tighten)


def fit_results(
    run: Run,
    options: EvalOptions,
    fitters: dict[str, Fitter],
    labels: dict[str, np.ndarray],
) -> list[FitResult]:
    """Fit a sample of the particles, and of those held out, by both weights of the KL divergence.

    Parameters
    ----------
    fitters
        Of the "training" particles, and of the "held-out" ones, if there are any.
    labels
        Classes of the particles of both sets, where they are known, as integers from 0.
    """
    trained = fitters["training"]
    # held-out particles are compared with as many others
    count = min(options.fit, *(fitter.particles.n for fitter in fitters.values()))
    found, opts = [], {"rounds": options.bootstrap, "seed": options.seed}
    for weight in ("train", "implied"):
        try:
            yardstick = trained.yardstick(weight)
        except InputError as err:
            logger.warning(f"{err}: posteriors are not fitted by it")
            continue
        seen: FitValues | None = None
        for which, fitter in fitters.items():
            mixed = np.random.default_rng(options.seed).permutation(fitter.particles.n)
            index = np.sort(mixed[:count])
            chunks = bar(torch.from_numpy(index).split(_CHUNK), f"fits, {which}")
            values = _fit(fitter, chunks, yardstick, tighten=weight == "implied")
            measures = fit_measures(values, seen, opts)
            left_out = int((~np.isfinite(values.fitted)).sum())
            if left_out:
                logger.warning(f"The loss of {left_out} of {count} {which} particles is not a "
                               "number: they are left out of what is said of fits")  # fmt: skip
            if which == "held-out" and "training" in labels and which in labels:
                truth = labels["held-out"][index]
                measures += class_measures(run.z()[0], labels["training"], values, truth, opts)
            seen = seen or values
            found.append(
                FitResult(
                    which,
                    weight,
                    yardstick.beta,
                    yardstick.variance,
                    index,
                    {m.name: m for m in measures},
                    values.gap,
                    left_out,
                )
            )
    return found


def fit_measures(found: FitValues, seen: FitValues | None, opts: dict[str, Any]) -> list[Measure]:
    """Measure one set of particles; ``seen`` are those of the training if these are not.

    Each measure leaves out particles without a loss; those not trained on are compared with as
    many others.
    """
    measures = []
    known = np.isfinite(found.gap)
    if known.any():
        measures.append(
            measure("amortization_gap", np.mean, found.gap[known], null=None, ideal=0.0, **opts)
        )
    if seen is not None and (both := known & np.isfinite(seen.gap)).any():
        measures.append(
            measure("generalisation_gap", metrics.difference_of_means, found.gap[both],
                    seen.gap[both], null=None, ideal=0.0, **opts)
        )  # fmt: skip
    if seen is not None and known.any():
        gained, possible = found.constant - found.encoder, found.constant - found.fitted
        measures.append(
            measure("held_out_score", metrics.gained_share, gained[known], possible[known],
                    null=0.0, ideal=1.0, **opts)
        )  # fmt: skip
    known = np.isfinite(found.tighter)
    if known.any():
        measures.append(
            measure("approximation_gap", np.mean, found.tighter[known], null=None, ideal=0.0,
                    **opts)
        )  # fmt: skip
    converged = measure("converged", np.mean, found.converged, null=None, ideal=1.0, **opts)
    return [*measures, converged]


def class_measures(
    z: np.ndarray, labels: np.ndarray, found: FitValues, truth: np.ndarray, opts: dict[str, Any]
) -> list[Measure]:
    """Measure how well neighbours among the training particles tell the class of others.

    Parameters
    ----------
    z, labels
        Latents and classes of the training particles, `(N, zdim)` and `(N,)`.
    truth
        Classes of the others, `(M,)`.
    """
    near = Neighbours(z, np.arange(0))
    measures = []
    for name, latents in (("class_knn_encoder", found.own), ("class_knn_fitted", found.z)):
        known = np.isfinite(latents).all(1)
        if known.any():
            rows = near.of(latents[known].astype(np.float32))
            measures.append(told_classes(name, rows, labels, truth[known], opts))
    return measures


def told_classes(
    name: str, near: np.ndarray, labels: np.ndarray, truth: np.ndarray, opts: dict[str, Any]
) -> Measure:
    """Measure how often the neighbours of others tell their class.

    Parameters
    ----------
    near
        Positions of neighbours among the training particles, `(M, K)`.
    labels, truth
        Classes of the training particles `(N,)`, and of the others `(M,)`.
    """
    shares = np.bincount(labels) / len(labels)
    null = float((np.append(shares, np.zeros(truth.max() + 1))[truth]).mean())
    right = (metrics.knn_labels(near, labels) == truth).astype(float)
    return measure(name, np.mean, right, null=null, ideal=1.0, **opts)


def encoding_cost(fitter: Fitter, count: int) -> Measure:
    """Time the encoder next to 50 steps of a fit, on the same particles, in turns.

    The value is the median over the rounds, its interval goes from the least to the greatest.
    """
    batch = fitter.feed.read(torch.arange(min(count, fitter.particles.n)))
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
        fit(fitter.model, batch, start, Yardstick(1.0), options, fitter.spread, generator)
        fitted = (time.perf_counter() - encoded) * 50 / _TIMED_STEPS
        ratios.append((encoded - begun) / fitted)
    known = np.array(ratios[1:])  # the first round warms up
    low, high = float(known.min()), float(known.max())
    return Measure("encoding_cost", float(np.median(known)), low, high, None, None, size)
