"""The headline of a report, in plain words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryodrgn_amort.core import number
from cryodrgn_amort.report.trust import stable_rows

if TYPE_CHECKING:
    from cryodrgn_amort.measures import Measure
    from cryodrgn_amort.report.results import Evaluation, TransformResult


__all__ = ["GAIN_BOUNDS", "MODE_NOTES", "VERDICT_RULE", "Verdict", "verdict"]

MODE_NOTES = {
    "held": "only the image is transformed; the pose and CTF tables stay as they are (as in the "
    "paper)",
    "follow": "pose and CTF are transformed with the image, so that nothing about the particle "
    "has changed. The network never sees the rotation: the modes differ only in how its image is "
    "centred and phase-flipped",
}
_LEAK, _LEAKS = "nuisance_leak_", 0.02  # of the variance, surely, beyond what chance tells
_INVERTED = 2.0  # times the greatest density, the least one
GAIN_BOUNDS = (0.95, 1.05)
"""A gain ratio that is surely outside is said in the headline of a report."""
# Upper end of the retrieval rank, and what is said of it.
_WORDS = (
    (0.01, "stays where its particle is", "good"),
    (0.10, "stays near its particle", "good"),
    (0.25, "moves away from its particle", "fair"),
    (0.45, "loses most of the relation to its particle", "poor"),
    (math.inf, "lands at a place that has next to nothing to do with its particle", "poor"),
)
VERDICT_RULE = (
    "by the largest mean retrieval rank that is not a control, nor, where the encoder is told the "
    "pose, of a pose that is made wrong. "
    + "; ".join(f"{words}: up to {most:g}" for most, words, _ in _WORDS[:-1])
    + f"; {_WORDS[-1][1]}: above"
)
"""How the headline of a report is chosen."""


@dataclass(frozen=True)
class Verdict:
    """The headline of a report.

    Attributes
    ----------
    tone
        "good", "fair", "poor", or "none" where there is no verdict.
    lines
        One sentence per transform and mode.
    cautions
        Why the numbers may say less than they seem to.
    """

    headline: str
    tone: str
    lines: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()


def verdict(evaluation: Evaluation) -> Verdict:
    """Say in plain words whether a transformed copy finds its way back to its particle."""
    if not evaluation.applicable:
        headline = "Amortization: not applicable"
        return Verdict(headline, "none", (evaluation.reason,), _cautions(evaluation))
    if not evaluation.results:
        headline = "Amortization: not measured (no transforms were asked for)"
        return Verdict(headline, "none", (), _cautions(evaluation))
    known = [r for r in evaluation.tests if math.isfinite(r.measures["retrieval_rank"].value)]
    told = evaluation.run.encoder.told_pose
    lines = tuple(_sentence(r, told=told) for r in evaluation.results)
    if not known:
        return Verdict("Amortization: could not be measured", "none", lines, _cautions(evaluation))
    worst = max(known, key=lambda r: r.measures["retrieval_rank"].value)
    words, tone = _words(worst.measures["retrieval_rank"].value)
    rank = number(worst.measures["retrieval_rank"].value)
    headline = f"An image that is {worst.title} {words} (retrieval rank {rank})"
    return Verdict(headline, tone, lines, _cautions(evaluation))


def _words(rank: float) -> tuple[str, str]:
    return next((words, tone) for most, words, tone in _WORDS if rank <= most)


def _sentence(result: TransformResult, *, told: bool) -> str:
    m = result.measures["retrieval_rank"]
    interval = f", 95 % interval {number(m.low)} to {number(m.high)}" if _finite(m.low) else ""
    tail = ". A control: centring undoes it" if result.is_control else ""
    if told and result.mode == "held" and not result.is_control:
        tail = ". Not judged: this encoder is told the pose, which is wrong for this copy"
    return f"{result.title}, {result.mode}: {number(m.value)}{interval}{tail}"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _cautions(evaluation: Evaluation) -> tuple[str, ...]:
    found = []
    if _inverted(evaluation.volumes):
        inverts = evaluation.run.settings.invert_data
        now, other = ("without", "with") if inverts else ("with", "without")
        found.append(
            "The density that is decoded is mostly negative: the contrast looks inverted. This run "
            f"was trained {now} --uninvert-data; train {other} it."
        )
    if _value(evaluation.measures, "active_units") == 0:
        found.append(
            "No latent dimension is active: all particles lie nearly at one place, and ranks and "
            "distances say little."
        )
    gain = evaluation.measures.get("gain_ratio")
    if gain is not None:
        low, high = (gain.value if end is None else end for end in (gain.low, gain.high))
        least, most = GAIN_BOUNDS
        if high < least or low > most:
            what, why = (
                ("less", "it shows differences that they do not have, or the encoder fails on them")
                if high < least
                else ("more", "it does not show all that they differ by")
            )
            found.append(
                f"Latents of their own gain {what} for particles than for images that the decoder "
                f"makes up (gain ratio {number(gain.value)}): {why}."
            )
    elif evaluation.calibration is not None:
        found.append(
            "There is no gain ratio: the encoder's latents gain nothing of images that the decoder "
            "makes up."
        )
    leaks = [m for name, m in evaluation.measures.items() if name.startswith(_LEAK)]
    for m in leaks:
        low = m.value if m.low is None else m.low
        if low > max(m.null or 0.0, 0.0) + _LEAKS:
            found.append(
                f"The latents tell of the {m.name.removeprefix(_LEAK).replace('_', ' ')} (R2 "
                f"{number(m.value)}): look at clusters by it before you believe them."
            )
    if evaluation.results:
        stable = stable_rows(evaluation.trust)
        if 2 * stable.sum() < len(stable):
            found.append(
                f"Only {stable.sum()} of {len(stable)} particles are stable when they are moved: "
                "ind_stable.pkl is no selection of good ones, and trust says more of the encoder "
                "than of the particles."
            )
    if len(evaluation.z) < 100:
        found.append(f"Only {len(evaluation.z)} particles: small ranks are coarse.")
    return tuple(found)


def _inverted(volumes: np.ndarray) -> bool:
    """Tell whether the strongest densities of most volumes `(L, ...)` are negative, by far."""
    flat = volumes.reshape(len(volumes), -1)
    return bool(len(flat) and np.median(-flat.min(1) / np.maximum(flat.max(1), 1e-12)) > _INVERTED)


def _value(measures: dict[str, Measure], name: str) -> float | None:
    return measures[name].value if name in measures else None
