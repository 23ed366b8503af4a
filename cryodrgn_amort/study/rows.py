"""Numbers of a study in rows: means over seeds or pairs of runs, and what they are held against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryodrgn_amort.measures import Measure
    from cryodrgn_amort.study.results import Agreement, Study


__all__ = ["AGREEMENT", "TRUTH", "Row", "agreement_rows", "of_pairs", "row", "truth_rows"]

AGREEMENT = ("knn_overlap", "volume_fsc")
"""Measures of how far two runs agree."""

TRUTH = ("class_knn", "coordinate_r2", "volume_fve")
"""Measures of what is found of the truth."""


@dataclass(frozen=True)
class Row:
    """One number of a claim.

    Attributes
    ----------
    label
        What it is of: "twin-large", "vlt and baseline".
    measure
        Its name in ``DEFINITIONS``.
    value
        Mean over seeds, or over pairs of runs.
    low, high
        Its spread: least and greatest over seeds, or the 95 % interval of the only one.
    count
        How many seeds or pairs.
    against, against_null, against_label
        What it is to be held against besides the null, with a null of its own, and what that is;
        None: nothing.
    """

    label: str
    measure: str
    value: float
    low: float | None
    high: float | None
    count: int
    null: float | None
    against: float | None = None
    against_null: float | None = None
    against_label: str = ""

    @property
    def share(self) -> float:
        """Return the share of ``against`` that is reached, each counted from its null.

        NaN if there is nothing above the null to have a share of.
        """
        if self.against is None or self.against_null is None or self.null is None:
            return math.nan
        whole = self.against - self.against_null
        return (self.value - self.null) / whole if whole > 0 else math.nan


def row(
    label: str,
    name: str,
    measures: Sequence[Measure],
    against: Sequence[Measure] = (),
    against_label: str = "",
) -> list[Row]:
    """Put one measure of several seeds into a row; no row if there is none."""
    known = [m for m in measures if math.isfinite(m.value)]
    if not known:
        return []
    values = [m.value for m in known]
    low, high = known[0].low, known[0].high
    if len(values) > 1:
        low, high = min(values), max(values)
    others = [m for m in against if math.isfinite(m.value)]
    found = Row(
        label=label,
        measure=name,
        value=float(np.mean(values)),
        low=low,
        high=high,
        count=len(values),
        null=_mean_null(known),
        against=float(np.mean([m.value for m in others])) if others else None,
        against_null=_mean_null(others),
        against_label=against_label if others else "",
    )
    return [found]


def _mean_null(measures: Sequence[Measure]) -> float | None:
    nulls = [m.null for m in measures if m.null is not None]
    return float(np.mean(nulls)) if nulls else None


def of_pairs(pairs: Sequence[Agreement], name: str) -> list[Measure]:
    """Return one measure of pairs of runs."""
    return [pair.measures[name] for pair in pairs if name in pair.measures]


def agreement_rows(study: Study, recipe: str, names: Sequence[str] = AGREEMENT) -> list[Row]:
    """Agreement with the reference, next to that of the reference's seeds."""
    reference = study.recipe(recipe).reference
    label, seeds = f"{recipe} and {reference}", study.seed_pairs(reference)
    found: list[Row] = []
    for name in names:
        own, others = of_pairs(study.pairs(recipe), name), of_pairs(seeds, name)
        found += row(label, name, own, others, f"two seeds of {reference}")
    return found


def truth_rows(study: Study, recipe: str) -> list[Row]:
    """Heterogeneity against the truth, next to the reference's; none where there is no truth."""
    reference = study.recipe(recipe).reference
    against = reference if reference != recipe else "baseline"
    found: list[Row] = []
    for name in TRUTH:
        others = study.measured(against, name) if against != recipe else []
        found += row(recipe, name, study.measured(recipe, name), others, against)
    return found
