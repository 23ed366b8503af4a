"""What a study found as numbers: study.json, and its claims as a table of plain text."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import yaml

from cryodrgn_amort import host
from cryodrgn_amort.core import __version__, plain_number, text_table
from cryodrgn_amort.measures import DEFINITIONS, TIMED, measure_facts
from cryodrgn_amort.report import CITATION
from cryodrgn_amort.study.claims import claims
from cryodrgn_amort.study.plan import PLAN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryodrgn_amort.study.judging import Found
    from cryodrgn_amort.study.results import Member, Study
    from cryodrgn_amort.study.rows import Row


__all__ = ["BESIDE_MEASURES", "claims_table", "measures_shown", "study_facts"]

BESIDE_MEASURES = (
    "retrieval_rank", "top1", "displacement", "displacement_sigma", "latent_correlation",
    "label_agreement", "amortization_loss_fraction", "held_out_score", "generalisation_gap",
    "class_knn",
)  # fmt: skip
"""By which digits are compared with particles."""


def claims_table(study: Study) -> str:
    """Return the claims as a table of plain text."""
    rows: list[tuple[str, ...]] = [("claim", "of", "measure", "value", "spread", "null", "verdict")]
    for found in claims(study):
        rows.append((found.claim.name, "", "", "", "", "", found.verdict))
        rows += [
            ("", r.label, r.measure, plain_number(r.value), _plain_spread(r), plain_number(r.null),
             "") for r in found.rows
        ]  # fmt: skip
    missing = f"\nNot run yet: {', '.join(study.missing)}" if study.missing else ""
    return text_table(rows) + missing


def _plain_spread(r: Row) -> str:
    return "-" if r.low is None else f"{plain_number(r.low)} to {plain_number(r.high)}"


def study_facts(study: Study, found: Sequence[Found]) -> dict[str, Any]:
    """Return what study.json holds. All that a second run would give otherwise is in ``times``."""
    recipes = {}
    for name in study.plan.recipes:
        recipe = study.recipe(name)
        recipes[name] = {
            "summary": recipe.summary,
            "figure": recipe.figure,
            "command": recipe.command,
            "reference": recipe.reference,
            "seeds": {str(m.seed): _member_facts(study, m) for m in study.of(name)},
        }
    timed = {f.claim.name: _claim_facts(f) for f in found if f.claim.timed}
    names = measures_shown(study, found)
    return {
        "format": 1,
        "cryodrgn_amort": __version__,
        "cryodrgn": host.VERSION,
        "citation": CITATION,
        "plan": yaml.safe_load((study.plan.folder / PLAN).read_text(encoding="utf-8")),
        "missing": study.missing,
        "claims": {f.claim.name: _claim_facts(f) for f in found if not f.claim.timed},
        "recipes": recipes,
        "agreement": [
            {
                "first": "{}.seed{}".format(*pair.first),
                "second": "{}.seed{}".format(*pair.second),
                "only_seed": pair.only_seed,
                "measures": measure_facts(pair.measures),
            }
            for pair in study.agreement
        ],
        "digits": {
            method: [{part: measure_facts(m) for part, m in parts.items()} for parts in seeds]
            for method, seeds in study.digits.items()
        },
        "definitions": {name: DEFINITIONS[name].words() for name in names},
        "times": {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "claims": timed,
            **study.timing,
        },
    }


def _member_facts(study: Study, member: Member) -> dict[str, Any]:
    return {
        "folder": str(member.folder.relative_to(study.plan.folder)),
        "n": member.facts["run"]["n"],
        "zdim": member.facts["run"]["zdim"],
        "epoch": member.facts["run"]["epoch"],
        "measures": measure_facts({k: m for k, m in member.measures.items() if k not in TIMED}),
        "transforms": {
            f"{name} {mode}": measure_facts(measures)
            for (name, mode), measures in member.transforms.items()
        },
        "losses": member.losses,
    }


def _claim_facts(found: Found) -> dict[str, Any]:
    return {
        "claim": found.claim.text,
        "source": found.claim.source,
        "rule": found.claim.bounds.rule,
        "verdict": found.verdict,
        "rows": [{**asdict(r), "share": r.share} for r in found.rows],
    }


def measures_shown(study: Study, found: Sequence[Found]) -> list[str]:
    """Return the names of all measures in the report, in the order of their definitions."""
    used = {r.measure for f in found for r in f.rows}
    for member in study.members.values():
        used |= member.measures.keys()
        for measures in member.transforms.values():
            used |= measures.keys()
    for pair in study.agreement:
        used |= pair.measures.keys()
    if study.digits:
        used |= set(BESIDE_MEASURES)
    return [name for name in DEFINITIONS if name in used]
