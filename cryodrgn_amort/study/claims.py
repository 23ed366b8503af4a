"""Claims as numbers: each with its null, its spread over seeds and a verdict.

The paper's - Edelberg & Lederman, arXiv 2303.07487, judge by eye; the bounds below are ours, and
every report prints them - and our own about encoders that are to generalise.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cryodrgn_amort.options import REPAIR
from cryodrgn_amort.study.judging import AT_MOST, OPEN, Bounds, Claim, Found, pick
from cryodrgn_amort.study.rows import AGREEMENT, Row, agreement_rows, of_pairs, row, truth_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cryodrgn_amort.study.results import Study

    Rows = Callable[[Study], list[Row]]


__all__ = ["CLAIMS", "REPAIR_CLAIMS", "claims"]

_SECOND = ("sleep", "anchored", "alternate")
_COPIES = ("augment", "consistent")


def claims(study: Study) -> list[Found]:
    """Hold every claim against a study; a claim of whose recipes none was run is open.

    Ours are held only against studies with such recipes in their plan.
    """
    found = []
    repairs = {recipe.name for recipe in REPAIR} & set(study.plan.recipes)
    for claim in (*CLAIMS, *(REPAIR_CLAIMS if repairs else ())):
        rows = [row for row in claim.rows(study) if math.isfinite(row.value)]
        found.append(Found(claim, claim.bounds.judge(rows) if rows else OPEN, rows))
    return found


def _of(recipes: Sequence[str], *names: str, truth: bool = True) -> Rows:
    """Collect measures of recipes, each followed by what it tells of the truth if wanted."""

    def rows(study: Study) -> list[Row]:
        found: list[Row] = []
        for recipe in recipes:
            for name in names:
                found += row(recipe, name, study.measured(recipe, name))
            found += truth_rows(study, recipe) if truth else []
        return found

    return rows


def _alike(recipe: str, names: Sequence[str] = AGREEMENT) -> Rows:
    """Collect how far a recipe agrees with its reference, and what both tell of the truth."""

    def rows(study: Study) -> list[Row]:
        if not study.of(recipe):
            return []
        return agreement_rows(study, recipe, names) + truth_rows(study, recipe)

    return rows


def _spread_of(recipe: str) -> Rows:
    def rows(study: Study) -> list[Row]:
        found = row(recipe, "volume_spread", study.measured(recipe, "volume_spread"))
        return found + (truth_rows(study, recipe) if found else [])

    return rows


def _moved(study: Study) -> list[Row]:
    found: list[Row] = []
    for recipe, transform in (("shift", "roll:1"), ("rotate", "rotate:90")):
        for name in ("retrieval_rank", "latent_correlation", "amortization_loss_fraction"):
            measures = study.transformed(recipe, transform, "held", name)
            measures = measures or study.transformed("baseline", transform, "held", name)
            found += row(f"baseline, {transform}", name, measures)
    for name in ("held_out_score", "generalisation_gap"):
        found += row("baseline, particles held out", name, study.measured("baseline", name))
    return found


def _digits(study: Study) -> list[Row]:
    """Return what the network does with digits, held against the baseline and particles."""
    found: list[Row] = []
    seeds = study.digits.get("vae", ())
    for part, name, label in (
        ("shift1", "retrieval_rank", "digits, roll:1"),
        ("held_out", "held_out_score", "digits held out"),
    ):
        measures = [seed[part][name] for seed in seeds if name in seed.get(part, {})]
        if part == "held_out":
            against = study.measured("baseline", name)
        else:
            against = study.transformed("baseline", "roll:1", "held", name)
        found += row(label, name, measures, against, "baseline, particles")
    return found


def _times(study: Study) -> list[Row]:
    if len(study.seconds) < 2:
        return []
    middle = {name: float(np.median(values)) for name, values in study.seconds.items()}
    first = next(iter(middle))
    found = []
    for name, values in study.seconds.items():
        spread = values / middle[first]
        found.append(Row(name, "relative_time", middle[name] / middle[first],
                         float(spread.min()), float(spread.max()), 1, None))  # fmt: skip
    return found


def _seeds(study: Study) -> list[Row]:
    pairs = study.seed_pairs("baseline")
    return [
        r for name in AGREEMENT for r in row("two seeds of baseline", name, of_pairs(pairs, name))
    ]


def _held_out(study: Study) -> list[Row]:
    """Return what is told of held-out particles, held against those of the training."""
    found: list[Row] = []
    for recipe in ("baseline", *_COPIES, *_SECOND):
        label = f"{recipe}, held out"
        for name in ("class_knn", "coordinate_r2"):
            held, own = f"{name}_held_out", study.measured(recipe, name)
            found += row(label, held, study.measured(recipe, held), own, f"{recipe}, training")
        for name in ("held_out_score", "generalisation_gap"):
            found += row(label, name, study.measured(recipe, name))
    fitted = next((r for r in reversed(_SECOND) if study.of(r)), "baseline")
    label = f"fitted one by one, decoder of {study.recipe(fitted).reference}"
    return [*found, *row(label, "class_knn_fitted", study.measured(fitted, "class_knn_fitted"))]


def _invariant(study: Study) -> list[Row]:
    found: list[Row] = []
    for recipe in ("baseline", *_COPIES, *_SECOND):
        for transform in ("roll:1", "rotate:90"):
            ranks = study.transformed(recipe, transform, "follow", "retrieval_rank")
            found += row(f"{recipe}, {transform}, follow", "retrieval_rank", ranks)
        for name in ("noise_swap_signal", "noise_swap_noise"):
            found += row(recipe, name, study.measured(recipe, name))
    return found


def _copies(study: Study) -> list[Row]:
    found: list[Row] = []
    for recipe in _COPIES:
        ranks = study.transformed(recipe, "rotate:90", "follow", "retrieval_rank")
        other = study.transformed("baseline", "rotate:90", "follow", "retrieval_rank")
        label = f"{recipe}, rotate:90, follow"
        found += row(label, "retrieval_rank", ranks, other, "baseline")
        found += truth_rows(study, recipe)
        own = study.measured("baseline", "class_knn")
        held = study.measured(recipe, "class_knn_held_out")
        found += row(f"{recipe}, held out", "class_knn_held_out", held, own, "baseline, training")
    return found


def _slowest(rows: Sequence[Row]) -> float:
    values = [r.value for r in rows]
    return max(values) / min(values)


def _times_null(rows: Sequence[Row]) -> float:
    overlap = [r for r in rows if r.measure == "knn_overlap" and r.null]
    return overlap[0].value / (overlap[0].null or math.nan) if overlap else math.nan


def _beside_particles(rows: Sequence[Row]) -> float:
    """Return the digits' rank over that of particles.

    Infinite, if digits that were held out fare no better than particles that were.
    """
    ranks = [r for r in rows if r.measure == "retrieval_rank" and r.against]
    if not ranks:
        return math.nan
    scores = [r for r in rows if r.measure == "held_out_score" and r.against is not None]
    if any(r.value <= (r.against or 0.0) for r in scores):
        return math.inf
    return ranks[0].value / (ranks[0].against or math.nan)


_ALIKE = Bounds(
    "every number's share of what it is held against, both counted from their nulls,",
    pick(min, "share"), 0.8, 0.5,
)  # fmt: skip
CLAIMS = (
    Claim(
        "vlt",
        "A lookup table without any encoder finds the latents and volumes that the encoder finds",
        "Section 3.2, Figure 5",
        _alike("vlt"),
        _ALIKE,
    ),
    Claim(
        "memorisation",
        "A large encoder that is shown another particle, or noise, still finds the heterogeneity: "
        "it memorises",
        "Section 3.3, Figures 7 to 9",
        _of(("twin", "twin-large", "noise-large"), "memorisation"),
        Bounds("the memorisation of twin-large and of noise-large",
               pick(min, "value", "memorisation", ("twin-large", "noise-large")), 0.8, 0.5),
    ),
    Claim(
        "invariance",
        "Rolling by one pixel, or turning by 90 degrees, sends a particle far from its own latent: "
        "the encoder does not generalise",
        "Section 3.4, Figures 10 and 11",
        _moved,
        Bounds("the retrieval rank of both (held)", pick(min, "value", "retrieval_rank"),
               0.25, 0.1),
    ),
    Claim(
        "times",
        "An epoch takes virtually the same time for all of them",
        "Appendix D, Table 1",
        _times,
        Bounds("the slowest over the fastest", _slowest, 1.15, 1.5),
        timed=True,
    ),
    Claim(
        "seeds",
        "Another seed gives results that differ, but are comparable",
        "Section 3.1, Figure 3",
        _seeds,
        Bounds("the neighbour overlap", _times_null, 5, 2,
               "holds if {what} is at least {holds:g} times its null, in part from {part:g} times"),
    ),
    Claim(
        "vlt-zero",
        "A table that starts at zero ends like one that starts at random",
        "Appendix C.1, Figure 21",
        _alike("vlt-zero"),
        _ALIKE,
    ),
    Claim(
        "frozen-zero",
        "With all latents fixed at zero, the decoder gives one averaged volume",
        "Appendix C.1, Figure 22",
        _spread_of("vlt-frozen-zero"),
        Bounds("the volume spread", pick(max, "value", "volume_spread"), 0.05, 0.2),
    ),
    Claim(
        "frozen-random",
        "With all latents fixed at random, the volumes vary little",
        "Appendix C.1, Figure 23",
        _spread_of("vlt-frozen-random"),
        Bounds("the volume spread", pick(max, "value", "volume_spread"), 0.5, 0.8),
    ),
    Claim(
        "frozen-encoder",
        "A new decoder makes similar volumes of the finished encoder's latents",
        "Appendix C.1, Figure 24",
        _alike("vlt-frozen-encoder", ("volume_fsc",)),  # the latents are the encoder's own
        _ALIKE,
    ),
    Claim(
        "small",
        "With a small encoder and two latent dimensions the heterogeneity is harder to see, but "
        "still there",
        "Appendix C.2, Figures 25 and 26",
        _of(("small", "twin-small"), "memorisation"),
        Bounds("the best share of small, of what baseline has above the null,",
               pick(max, "share", recipes=("small",)), 0.8, 0.5),
    ),
    Claim(
        "digits",
        "On clean, centred digits the effects are weaker",
        "Section 4, Appendix B, Figures 12 to 19",
        _digits,
        Bounds("the retrieval rank after one pixel, next to that of particles,", _beside_particles,
               0.5, 0.8,
               AT_MOST + "; not if held-out digits fare no better than held-out particles"),
    ),
)  # fmt: skip
_OURS = "cryodrgn_amort, examples/repair.md"
REPAIR_CLAIMS = (
    Claim(
        "repair-heterogeneity",
        "Encoders that learn from images made up by a decoder find the heterogeneity that the "
        "table finds, without having seen a particle",
        _OURS,
        _of(_SECOND),
        _ALIKE,
    ),
    Claim(
        "repair-held-out",
        "They find it as well in particles that were never seen",
        _OURS,
        _held_out,
        Bounds("class_knn of held-out particles, as a share of that in training, both counted "
               "from their nulls,", pick(min, "share", "class_knn_held_out", _SECOND), 0.95, 0.8),
    ),
    Claim(
        "repair-invariance",
        "Rolling or turning a particle together with its pose leaves their latents where they are",
        _OURS,
        _invariant,
        Bounds("the retrieval rank of sleep, anchored and alternate (follow)",
               pick(max, "value", "retrieval_rank", _SECOND), 0.02, 0.1),
    ),
    Claim(
        "repair-cost",
        "A new particle costs them a fraction of a fit",
        _OURS,
        _of(("baseline", *_SECOND), "encoding_cost", truth=False),
        Bounds("the encoding cost", pick(max, "value", recipes=_SECOND), 0.2, 0.5),
        timed=True,
    ),
    Claim(
        "copies",
        "Training on copies that are turned and rolled does not do it: the heterogeneity of "
        "particles never seen stays hidden",
        _OURS,
        _copies,
        # what is left of the heterogeneity: turned copies alone are no repair
        Bounds("class_knn of held-out particles, as a share of the baseline's in training",
               pick(max, "share", "class_knn_held_out"), 0.5, 0.8),
    ),
)  # fmt: skip
