"""What an evaluation says in plain words: of these particles, of new ones, what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryodrgn_amort.core import number
from cryodrgn_amort.report.verdict import GAIN_BOUNDS

if TYPE_CHECKING:
    from cryodrgn_amort.measures import Measure
    from cryodrgn_amort.report.results import Evaluation, FitResult


__all__ = ["SCORE_BOUNDS", "answers"]

SCORE_BOUNDS = (0.5, 0.8)
"""Scores below the first are bad, above the second good; see ``held_out_score``."""


def answers(evaluation: Evaluation) -> dict[str, str]:
    """Return answers by question; those that cannot be told say what is missing."""
    found = {"The latents of these particles": _of_own(evaluation)}
    if evaluation.applicable:
        found["New particles"] = _of_new(evaluation)
    found["What next"] = _next(evaluation)
    return found


def _net(evaluation: Evaluation) -> tuple[float, float, float] | None:
    """Return what latents explain beyond one for all, by the noise's variance, and their KL.

    That is in nats per particle: the mean and the least that is likely, and the divergence; None
    where the noise's variance, or a posterior, is not known.
    """
    m, kl = evaluation.measures.get("reconstruction"), evaluation.measures.get("kl")
    fit = _fit(evaluation, "training.implied")
    if m is None or m.null is None or kl is None or fit is None:
        return None
    least = m.value if m.high is None else m.high
    return (m.null - m.value) / fit.variance, (m.null - least) / fit.variance, kl.value


def _fit(evaluation: Evaluation, key: str) -> FitResult | None:
    return next((f for f in evaluation.fits if f.key == key), None)


def _score(evaluation: Evaluation, which: str, name: str) -> Measure | None:
    fit = _fit(evaluation, f"{which}.train") or _fit(evaluation, f"{which}.implied")
    return None if fit is None else fit.measures.get(name)


def _of_own(evaluation: Evaluation) -> str:
    net = _net(evaluation)
    if net is None:
        return (
            "What they explain next to the noise is not known: no posteriors were fitted (--fit)."
        )
    gain, least, kl = net
    said = (
        f"They explain {number(gain)} nats of each image beyond one volume for all, and cost "
        f"{number(kl)} nats (KL)"
    )
    if least < kl:
        return f"{said}: no more than noise would let them. Do not believe them yet."
    score = _score(evaluation, "training", "training_score")
    if score is None:
        return f"{said}."
    share = f"that is {number(score.value)} of what latents fitted one by one explain"
    return f"{said}; {share}{': take fitted ones' if score.value < SCORE_BOUNDS[1] else ''}."


def _of_new(evaluation: Evaluation) -> str:
    score = _score(evaluation, "held-out", "held_out_score")
    if score is None:
        return "Not known: no particles were held out from this run (train_amort --holdout 0.1)."
    said = (
        f"Of what latents can explain of particles that it has never seen, the encoder finds "
        f"{number(score.value)}"
    )
    bad, good = SCORE_BOUNDS
    if score.value >= good:
        return f"{said}: it can encode new particles."
    return f"{said}: {'do not encode new particles with it' if score.value < bad else 'in part'}."


def _next(evaluation: Evaluation) -> str:
    net = _net(evaluation)
    if net is not None and net[1] < net[2]:
        return (
            "Train longer, if the loss was still falling; else there is too little signal for this "
            "way of training: --encoder alternate finds more."
        )
    gain = evaluation.measures.get("gain_ratio")
    if gain is not None and gain.high is not None and gain.high < GAIN_BOUNDS[0]:
        return "Fewer latent dimensions, more particles, or --encoder alternate."
    score = _score(evaluation, "held-out", "held_out_score")
    if evaluation.applicable and score is not None and score.value >= SCORE_BOUNDS[1]:
        return "Look whether a run with another --seed finds the same (compare_amort)."
    new = (
        " New particles: infer_amort, or an encoder that generalises (--from, --encoder anchored)."
    )
    return (
        "Look whether a table (--encoder vlt) and another --seed find the same (compare_amort)."
        + (new if evaluation.applicable else "")
    )
