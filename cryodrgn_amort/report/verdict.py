"""The headline of a report, in plain words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryodrgn_amort.core import number

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
    "by the largest mean retrieval rank that is not a control. "
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
    tests = [r for r in evaluation.results if not r.is_control] or evaluation.results
    known = [r for r in tests if math.isfinite(r.measures["retrieval_rank"].value)]
    lines = tuple(_sentence(r) for r in evaluation.results)
    if not known:
        return Verdict("Amortization: could not be measured", "none", lines, _cautions(evaluation))
    worst = max(known, key=lambda r: r.measures["retrieval_rank"].value)
    words, tone = _words(worst.measures["retrieval_rank"].value)
    rank = number(worst.measures["retrieval_rank"].value)
    headline = f"An image that is {worst.title} {words} (retrieval rank {rank})"
    return Verdict(headline, tone, lines, _cautions(evaluation))


def _words(rank: float) -> tuple[str, str]:
    return next((words, tone) for most, words, tone in _WORDS if rank <= most)


def _sentence(result: TransformResult) -> str:
    m = result.measures["retrieval_rank"]
    interval = f", 95 % interval {number(m.low)} to {number(m.high)}" if _finite(m.low) else ""
    tail = ". A control: centring undoes it" if result.is_control else ""
    return f"{result.title}, {result.mode}: {number(m.value)}{interval}{tail}"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _cautions(evaluation: Evaluation) -> tuple[str, ...]:
    found = []
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
    if len(evaluation.z) < 100:
        found.append(f"Only {len(evaluation.z)} particles: small ranks are coarse.")
    return tuple(found)


def _value(measures: dict[str, Measure], name: str) -> float | None:
    return measures[name].value if name in measures else None
