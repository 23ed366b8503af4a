"""How a claim is judged: by bounds on one number of its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cryodrgn_amort.study.results import Study
    from cryodrgn_amort.study.rows import Row


__all__ = ["AT_MOST", "HOLDS", "NOT", "OPEN", "PART", "Bounds", "Claim", "Found", "pick"]

HOLDS, PART, NOT, OPEN = "holds", "holds in part", "does not hold", "open"
AT_LEAST = "holds if {what} is at least {holds:g}, in part from {part:g}"
AT_MOST = "holds if {what} is at most {holds:g}, in part up to {part:g}"


@dataclass(frozen=True)
class Bounds:
    """From which value of one number on a claim holds, and from which on it does in part.

    Attributes
    ----------
    what
        The number, in words.
    number
        Makes it of a claim's rows; NaN if they do not tell.
    holds, part
        The number is at least so much; at most, if ``holds`` is the smaller one.
    said
        How the rule is put; None: as all are.
    """

    what: str
    number: Callable[[Sequence[Row]], float]
    holds: float
    part: float
    said: str | None = None

    @property
    def rule(self) -> str:
        """How the verdict comes about."""
        said = self.said or (AT_MOST if self.holds < self.part else AT_LEAST)
        return said.format(what=self.what, holds=self.holds, part=self.part)

    def judge(self, rows: Sequence[Row]) -> str:
        """Return the verdict."""
        number, sign = self.number(rows), -1 if self.holds < self.part else 1
        if math.isnan(number):
            return OPEN
        grades = ((self.holds, HOLDS), (self.part, PART))
        return next((grade for bound, grade in grades if sign * number >= sign * bound), NOT)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, or of ours, and how it is tested.

    Attributes
    ----------
    text, source
        In our words, and where it is made.
    rows
        Collects the numbers.
    bounds
        Judges them.
    timed
        Whether its numbers are times, which no second run gives again.
    """

    name: str
    text: str
    source: str
    rows: Callable[[Study], list[Row]]
    bounds: Bounds
    timed: bool = False


@dataclass(frozen=True)
class Found:
    """A claim with what was measured."""

    claim: Claim
    verdict: str
    rows: list[Row] = field(default_factory=list)


def pick(
    best: Callable[[Iterable[float]], float],
    of: str,
    measure: str = "",
    recipes: Sequence[str] = (),
) -> Callable[[Sequence[Row]], float]:
    """Return what picks one of the rows' values, or of their shares.

    Parameters
    ----------
    best
        ``min`` or ``max``.
    of
        "value" or "share".
    measure, recipes
        Only rows of this measure, and of these recipes, are asked; empty: of any.
    """

    def number(rows: Sequence[Row]) -> float:
        asked = [
            r for r in rows
            if measure in ("", r.measure)
            and (not recipes or r.label.partition(",")[0] in recipes)
        ]  # fmt: skip
        known = [v for r in asked if math.isfinite(v := getattr(r, of))]
        return best(known) if known else math.nan

    return number
