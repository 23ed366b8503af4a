"""Claims as numbers: each with its null, its spread over seeds and a verdict.

The paper's - Edelberg & Lederman, arXiv 2303.07487, judge by eye; the bounds below are ours, and
every report prints them - and our own about encoders that are to generalise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from cryodrgn_amort.recipes import REPAIR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cryodrgn_amort.metrics import Measure
    from cryodrgn_amort.study_results import Agreement, Study

__all__ = ["CLAIMS", "REPAIR_CLAIMS", "Claim", "Found", "Row", "claims"]

HOLDS, PART, NOT, OPEN = "holds", "holds in part", "does not hold", "open"
_TRUTH = ("class_knn", "coordinate_r2", "volume_fve")
_AGREEMENT = ("knn_overlap", "volume_fsc")

# Bounds: at least the first, it holds; at least the second, in part.
ALIKE = (0.8, 0.5)  # share of what the reference has above the null
MEMORISED = (0.8, 0.5)  # memorisation
MOVED = (0.25, 0.10)  # retrieval rank
SAME_TIME = (1.15, 1.5)  # slowest over fastest, at most
ONE_VOLUME = (0.05, 0.2)  # volume spread, at most
SMALL_SPREAD = (0.5, 0.8)
INVARIANT = (0.02, 0.1)  # retrieval rank, at most
CHEAP = (0.2, 0.5)  # encoding cost, at most
COPIES = (0.5, 0.8)  # share of what the baseline finds in training, at most
ALIKE_HELD_OUT = (0.95, 0.8)  # share of what the particles of the training have above the null
WEAKER = (0.5, 0.8)  # retrieval rank of digits next to that of particles, at most


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


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, or of ours, and how it is tested.

    Attributes
    ----------
    text, source
        In our words, and where it is made.
    rule
        How the verdict comes about.
    rows
        Collects the numbers.
    judge
        Numbers -> verdict; is not asked if there are none.
    timed
        Whether its numbers are times, which no second run gives again.
    """

    name: str
    text: str
    source: str
    rule: str
    rows: Callable[[Study], list[Row]]
    judge: Callable[[Sequence[Row]], str]
    timed: bool = False


@dataclass(frozen=True)
class Found:
    """A claim with what was measured."""

    claim: Claim
    verdict: str
    rows: list[Row] = field(default_factory=list)


def claims(study: Study) -> list[Found]:
    """Hold every claim against a study; a claim of whose recipes none was run is open.

    Ours are held only against studies with such recipes in their plan.
    """
    found = []
    repairs = {recipe.name for recipe in REPAIR} & set(study.plan.recipes)
    for claim in (*CLAIMS, *(REPAIR_CLAIMS if repairs else ())):
        rows = [row for row in claim.rows(study) if math.isfinite(row.value)]
        found.append(Found(claim, claim.judge(rows) if rows else OPEN, rows))
    return found


def row(
    label: str,
    name: str,
    measures: Sequence[Measure],
    against: Sequence[Measure] = (),
    against_label: str = "",
) -> Iterable[Row]:
    """Put one measure of several seeds into a row; no row if there is none."""
    known = [m for m in measures if math.isfinite(m.value)]
    if not known:
        return
    values = [m.value for m in known]
    low, high = known[0].low, known[0].high
    if len(values) > 1:
        low, high = min(values), max(values)
    others = [m for m in against if math.isfinite(m.value)]
    yield Row(
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


def _mean_null(measures: Sequence[Measure]) -> float | None:
    nulls = [m.null for m in measures if m.null is not None]
    return float(np.mean(nulls)) if nulls else None


def _of_pairs(pairs: Sequence[Agreement], name: str) -> list[Measure]:
    return [pair.measures[name] for pair in pairs if name in pair.measures]


def agreement_rows(study: Study, recipe: str, names: Sequence[str] = _AGREEMENT) -> list[Row]:
    """Agreement with the reference, next to that of the reference's seeds."""
    reference = study.recipe(recipe).reference
    seeds = study.seed_pairs(reference)
    return list(chain.from_iterable(
        row(f"{recipe} and {reference}", name, _of_pairs(study.pairs(recipe), name),
            _of_pairs(seeds, name), f"two seeds of {reference}")
        for name in names
    ))  # fmt: skip


def truth_rows(study: Study, recipe: str) -> list[Row]:
    """Heterogeneity against the truth, next to the reference's; none where there is no truth."""
    reference = study.recipe(recipe).reference
    against = reference if reference != recipe else "baseline"
    others = {name: study.measured(against, name) for name in _TRUTH if against != recipe}
    return list(chain.from_iterable(
        row(recipe, name, study.measured(recipe, name), others.get(name, ()), against)
        for name in _TRUTH
    ))  # fmt: skip


def _alike(recipe: str, names: Sequence[str] = _AGREEMENT) -> Callable[[Study], list[Row]]:
    def rows(study: Study) -> list[Row]:
        if not study.of(recipe):
            return []
        return agreement_rows(study, recipe, names) + truth_rows(study, recipe)

    return rows


def _memorised(study: Study) -> list[Row]:
    found: list[Row] = []
    for recipe in ("twin", "twin-large", "noise-large"):
        if study.of(recipe):
            found += row(recipe, "memorisation", study.measured(recipe, "memorisation"))
            found += truth_rows(study, recipe)
    return found


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


def _judge_digits(rows: Sequence[Row]) -> str:
    """Compare ranks; a held-out score that is not higher spoils it."""
    ranks = [r for r in rows if r.measure == "retrieval_rank" and r.against]
    if not ranks:
        return OPEN
    scores = [r for r in rows if r.measure == "held_out_score" and r.against is not None]
    if any(r.value <= (r.against or 0.0) for r in scores):
        return NOT
    return _grade_most(ranks[0].value / (ranks[0].against or math.nan), WEAKER)


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


def _spread_of(recipe: str) -> Callable[[Study], list[Row]]:
    def rows(study: Study) -> list[Row]:
        found = list(row(recipe, "volume_spread", study.measured(recipe, "volume_spread")))
        return found + (truth_rows(study, recipe) if found else [])

    return rows


def _small(study: Study) -> list[Row]:
    found = truth_rows(study, "small") if study.of("small") else []
    if study.of("twin-small"):
        found += row("twin-small", "memorisation", study.measured("twin-small", "memorisation"))
        found += truth_rows(study, "twin-small")
    return found


def _seeds(study: Study) -> list[Row]:
    pairs = study.seed_pairs("baseline")
    return list(chain.from_iterable(
        row("two seeds of baseline", name, _of_pairs(pairs, name)) for name in _AGREEMENT
    ))  # fmt: skip


def _repaired(study: Study) -> list[Row]:
    return [r for name in _SECOND for r in truth_rows(study, name)]


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


def _costs(study: Study) -> list[Row]:
    recipes = ("baseline", *_SECOND)
    return list(chain.from_iterable(
        row(recipe, "encoding_cost", study.measured(recipe, "encoding_cost")) for recipe in recipes
    ))  # fmt: skip


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


def _grade(value: float, bounds: tuple[float, float]) -> str:
    if not math.isfinite(value):
        return OPEN
    return HOLDS if value >= bounds[0] else PART if value >= bounds[1] else NOT


def _grade_most(value: float, bounds: tuple[float, float]) -> str:
    return _grade(-value, (-bounds[0], -bounds[1]))


def _worst_share(rows: Sequence[Row]) -> str:
    shares = [r.share for r in rows if math.isfinite(r.share)]
    return _grade(min(shares), ALIKE) if shares else OPEN


def _judge_memorised(rows: Sequence[Row]) -> str:
    wanted = [
        r.value for r in rows
        if r.measure == "memorisation" and r.label in ("twin-large", "noise-large")
    ]  # fmt: skip
    return _grade(min(wanted), MEMORISED) if wanted else OPEN


def _judge_moved(rows: Sequence[Row]) -> str:
    ranks = [r.value for r in rows if r.measure == "retrieval_rank"]
    return _grade(min(ranks), MOVED) if ranks else OPEN


def _judge_times(rows: Sequence[Row]) -> str:
    values = [r.value for r in rows]
    return _grade_most(max(values) / min(values), SAME_TIME)


def _judge_spread(bounds: tuple[float, float]) -> Callable[[Sequence[Row]], str]:
    return lambda rows: _grade_most(
        max(r.value for r in rows if r.measure == "volume_spread"), bounds
    )


def _judge_small(rows: Sequence[Row]) -> str:
    shares = [r.share for r in rows if r.label == "small" and math.isfinite(r.share)]
    return _grade(max(shares), ALIKE) if shares else OPEN


def _judge_seeds(rows: Sequence[Row]) -> str:
    overlap = [r for r in rows if r.measure == "knn_overlap" and r.null]
    if not overlap:
        return OPEN
    times = overlap[0].value / (overlap[0].null or math.nan)
    return HOLDS if times >= 5 else PART if times >= 2 else NOT


def _of_second(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r.label.partition(",")[0] in _SECOND]


def _judge_repaired(rows: Sequence[Row]) -> str:
    return _worst_share(_of_second(rows))


def _judge_held_out(rows: Sequence[Row]) -> str:
    shares = [r.share for r in _of_second(rows) if r.measure == "class_knn_held_out"]
    shares = [share for share in shares if math.isfinite(share)]
    return _grade(min(shares), ALIKE_HELD_OUT) if shares else OPEN


def _judge_invariant(rows: Sequence[Row]) -> str:
    ranks = [r.value for r in _of_second(rows) if r.measure == "retrieval_rank"]
    return _grade_most(max(ranks), INVARIANT) if ranks else OPEN


def _judge_costs(rows: Sequence[Row]) -> str:
    costs = [r.value for r in _of_second(rows)]
    return _grade_most(max(costs), CHEAP) if costs else OPEN


def _judge_copies(rows: Sequence[Row]) -> str:
    """Judge what is left of the heterogeneity: turned copies alone are no repair."""
    shares = [r.share for r in rows if r.measure == "class_knn_held_out"]
    shares = [share for share in shares if math.isfinite(share)]
    return _grade_most(max(shares), COPIES) if shares else OPEN


def _at_least(what: str, bounds: tuple[float, float]) -> str:
    return f"holds if {what} is at least {bounds[0]:g}, in part from {bounds[1]:g}"


def _at_most(what: str, bounds: tuple[float, float]) -> str:
    return f"holds if {what} is at most {bounds[0]:g}, in part up to {bounds[1]:g}"


_SECOND = ("sleep", "anchored")
_COPIES = ("augment", "consistent")
_SHARE = "every number's share of what it is held against, both counted from their nulls,"

CLAIMS = (
    Claim(
        "vlt",
        "A lookup table without any encoder finds the latents and volumes that the encoder finds",
        "Section 3.2, Figure 5",
        _at_least(_SHARE, ALIKE),
        _alike("vlt"),
        _worst_share,
    ),
    Claim(
        "memorisation",
        "A large encoder that is shown another particle, or noise, still finds the heterogeneity: "
        "it memorises",
        "Section 3.3, Figures 7 to 9",
        _at_least("the memorisation of twin-large and of noise-large", MEMORISED),
        _memorised,
        _judge_memorised,
    ),
    Claim(
        "invariance",
        "Rolling by one pixel, or turning by 90 degrees, sends a particle far from its own latent: "
        "the encoder does not generalise",
        "Section 3.4, Figures 10 and 11",
        _at_least("the retrieval rank of both (held)", MOVED),
        _moved,
        _judge_moved,
    ),
    Claim(
        "times",
        "An epoch takes virtually the same time for all of them",
        "Appendix D, Table 1",
        _at_most("the slowest over the fastest", SAME_TIME),
        _times,
        _judge_times,
        timed=True,
    ),
    Claim(
        "seeds",
        "Another seed gives results that differ, but are comparable",
        "Section 3.1, Figure 3",
        "holds if the neighbour overlap is at least 5 times its null, in part from 2 times",
        _seeds,
        _judge_seeds,
    ),
    Claim(
        "vlt-zero",
        "A table that starts at zero ends like one that starts at random",
        "Appendix C.1, Figure 21",
        _at_least(_SHARE, ALIKE),
        _alike("vlt-zero"),
        _worst_share,
    ),
    Claim(
        "frozen-zero",
        "With all latents fixed at zero, the decoder gives one averaged volume",
        "Appendix C.1, Figure 22",
        _at_most("the volume spread", ONE_VOLUME),
        _spread_of("vlt-frozen-zero"),
        _judge_spread(ONE_VOLUME),
    ),
    Claim(
        "frozen-random",
        "With all latents fixed at random, the volumes vary little",
        "Appendix C.1, Figure 23",
        _at_most("the volume spread", SMALL_SPREAD),
        _spread_of("vlt-frozen-random"),
        _judge_spread(SMALL_SPREAD),
    ),
    Claim(
        "frozen-encoder",
        "A new decoder makes similar volumes of the finished encoder's latents",
        "Appendix C.1, Figure 24",
        _at_least(_SHARE, ALIKE),
        _alike("vlt-frozen-encoder", ("volume_fsc",)),  # the latents are the encoder's own
        _worst_share,
    ),
    Claim(
        "small",
        "With a small encoder and two latent dimensions the heterogeneity is harder to see, but "
        "still there",
        "Appendix C.2, Figures 25 and 26",
        _at_least("the best share of small, of what baseline has above the null,", ALIKE),
        _small,
        _judge_small,
    ),
    Claim(
        "digits",
        "On clean, centred digits the effects are weaker",
        "Section 4, Appendix B, Figures 12 to 19",
        _at_most("the retrieval rank after one pixel, next to that of particles,", WEAKER)
        + "; not if held-out digits fare no better than held-out particles",
        _digits,
        _judge_digits,
    ),
)

_OURS = "cryodrgn_amort, examples/repair.md"
REPAIR_CLAIMS = (
    Claim(
        "repair-heterogeneity",
        "Encoders that learn from images made up by a decoder find the heterogeneity that the "
        "table finds, without having seen a particle",
        _OURS,
        _at_least(_SHARE, ALIKE),
        _repaired,
        _judge_repaired,
    ),
    Claim(
        "repair-held-out",
        "They find it as well in particles that were never seen",
        _OURS,
        _at_least("class_knn of held-out particles, as a share of that in training, both counted "
                  "from their nulls,", ALIKE_HELD_OUT),
        _held_out,
        _judge_held_out,
    ),
    Claim(
        "repair-invariance",
        "Rolling or turning a particle together with its pose leaves their latents where they are",
        _OURS,
        _at_most("the retrieval rank of sleep and anchored (follow)", INVARIANT),
        _invariant,
        _judge_invariant,
    ),
    Claim(
        "repair-cost",
        "A new particle costs them a fraction of a fit",
        _OURS,
        _at_most("the encoding cost", CHEAP),
        _costs,
        _judge_costs,
        timed=True,
    ),
    Claim(
        "copies",
        "Training on copies that are turned and rolled does not do it: the heterogeneity of "
        "particles never seen stays hidden",
        _OURS,
        _at_most("class_knn of held-out particles, as a share of the baseline's in training",
                 COPIES),
        _copies,
        _judge_copies,
    ),
)  # fmt: skip
