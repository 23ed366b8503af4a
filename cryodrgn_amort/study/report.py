"""Write a study: report.html to read, study.json with every number of it, and figures/."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort import host
from cryodrgn_amort.core import __version__, number, replacing, write_json, write_text
from cryodrgn_amort.report import CITATION, THRESHOLD_RULE, environment
from cryodrgn_amort.study.claims import claims
from cryodrgn_amort.study.facts import BESIDE_MEASURES, measures_shown, study_facts
from cryodrgn_amort.study.judging import HOLDS, NOT, OPEN, PART
from cryodrgn_amort.study.pictures import PAPER, study_pictures
from cryodrgn_amort.study.plan import PLAN
from cryodrgn_amort.study.rows import AGREEMENT, TRUTH, agreement_rows, row, truth_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from cryodrgn_amort.report import Picture
    from cryodrgn_amort.study.judging import Found
    from cryodrgn_amort.study.results import Study
    from cryodrgn_amort.study.rows import Row


__all__ = ["write_study_report"]

_TONES = {HOLDS: "good", PART: "fair", NOT: "poor", OPEN: "none"}
_OVERVIEW = (
    *TRUTH, "memorisation", "volume_spread", "amortization_gap", "held_out_score",
    "class_knn_held_out",
)  # fmt: skip
_BESIDE = (  # column, of what, which part or transform, mode
    ("digits, 1 px", "digits", "shift1", ""),
    ("digits, 5 px", "digits", "shift5", ""),
    ("particles, 1 px", "particles", "roll:1", "held"),
    ("particles, 90°", "particles", "rotate:90", "held"),
    ("digits, held out", "digits", "held_out", ""),
    ("particles, held out", "particles", "", ""),
)


def write_study_report(study: Study) -> Path:
    """Write everything into the study's folder; returns the path of report.html."""
    folder = study.plan.folder
    found = claims(study)
    drawn = study_pictures(study)
    for drawing in drawn.values():
        for kind, content in (("png", drawing.png), ("pdf", drawing.pdf)):
            _write(folder / "figures" / f"{drawing.name}.{kind}", content)
    write_json(folder / "study.json", study_facts(study, found))
    page = folder / "report.html"
    write_text(page, _page(study, found, drawn))
    return page


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _beside_digits(study: Study) -> list[dict[str, Row]]:
    """Return the same measures of digits and of particles, a dictionary for each of _BESIDE."""
    columns = []
    for label, kind, of, mode in _BESIDE:
        rows: dict[str, Row] = {}
        for name in BESIDE_MEASURES:
            if kind == "digits":
                parts = [seed.get(of, {}) for seed in study.digits.get("vae", ())]
                found = [measures[name] for measures in parts if name in measures]
            elif mode:
                found = study.transformed("baseline", of, mode, name)
            else:
                # of held-out particles it goes by another name
                own = {"class_knn": "class_knn_encoder"}.get(name, name)
                found = study.measured("baseline", own)
            rows |= {r.measure: r for r in row(label, name, found)}
        columns.append(rows)
    return columns


def _page(study: Study, found: Sequence[Found], drawn: Mapping[str, Picture]) -> str:
    """Render report.html."""
    member = next(iter(study.members.values()), None)
    particles = f"{member.facts['run']['n']} particles" if member else "nothing measured yet"
    order = sorted(study.plan.recipes, key=_order)
    sections = [_section(study, name, drawn) for name in order if study.of(name)]
    return (
        environment()
        .get_template("study.html.j2")
        .render(
            title=study.plan.folder.absolute().name,
            particles=particles,
            seeds=len(study.plan.seeds),
            claims=found,
            tones=_TONES,
            overview=_overview(study, order),
            overview_columns=[*_OVERVIEW, *AGREEMENT],
            common=[drawn[n] for n in ("recovery", "invariance", "agreement", "losses")
                    if n in drawn],
            beside=_beside_digits(study) if study.digits else [],
            beside_columns=[label for label, *_ in _BESIDE],
            beside_measures=BESIDE_MEASURES,
            table1=_table1(study),
            table1_figure=drawn.get("table1"),
            sections=sections,
            volumes_alone=[f"figure{k}" for k, (_, w) in PAPER.items() if isinstance(w, int)],
            missing=study.missing,
            methods=_methods(study),
            plan=(study.plan.folder / PLAN).read_text(encoding="utf-8"),
            names=measures_shown(study, found),
            citation=CITATION,
        )
    )  # fmt: skip


def _order(name: str) -> tuple[int, str]:
    known = list(dict.fromkeys(recipe for recipe, _ in PAPER.values()))
    return (known.index(name), "") if name in known else (len(known), name)


def _overview(study: Study, order: Sequence[str]) -> list[tuple[str, str, dict[str, Row]]]:
    """Return of every trained recipe: name, summary, and one row per measure."""
    found = []
    for name in order:
        if study.recipe(name).command != "train_amort" or not study.of(name):
            continue
        rows = {r.measure: r for n in _OVERVIEW for r in row(name, n, study.measured(name, n))}
        rows |= {r.measure: r for r in agreement_rows(study, name)}
        found.append((name, study.recipe(name).summary, rows))
    return found


def _section(study: Study, name: str, drawn: Mapping[str, Picture]) -> dict[str, Any]:
    """Return what the template shows of a recipe."""
    recipe = study.recipe(name)
    labels = [f"figure{k}" for k, (of, _) in PAPER.items() if of == name] or [name]
    members = study.of(name)
    transforms = dict.fromkeys(key for m in members for key in m.transforms)
    return {
        "name": name,
        "summary": recipe.summary,
        "figure": recipe.figure,
        "pictures": [drawn[n] for n in labels if n in drawn],
        "members": members,
        "measures": list(dict.fromkeys(n for m in members for n in m.measures)),
        "transforms": list(transforms),
        "transform_measures": list(
            dict.fromkeys(n for m in members for found in m.transforms.values() for n in found)
        ),
        "own": recipe.command == "train_amort",
        "rows": agreement_rows(study, name) + truth_rows(study, name),
        "flags": study.plan.recipes[name],
    }


def _table1(study: Study) -> list[tuple[str, str, str, str]]:
    """Return name, seconds per epoch, spread over rounds, and ratio to the first."""
    if not study.seconds:
        return []
    first = float(np.median(next(iter(study.seconds.values()))))
    rows = []
    for name, values in study.seconds.items():
        middle = float(np.median(values))
        spread = f"{number(values.min())} to {number(values.max())}"
        rows.append((name, number(middle), spread, number(middle / first)))
    return rows


def _methods(study: Study) -> list[tuple[str, str]]:
    """Return how the numbers came about."""
    plan = study.plan
    data = plan.data.get("simulate")
    inputs = "simulated: " + ", ".join(f"{k} {v}" for k, v in data.items()) if data else ", ".join(
        f"{k} {v}" for k, v in plan.data.items()
    )  # fmt: skip
    rows = [
        ("Particles", inputs),
        ("Training, all recipes", ", ".join(f"{k} {v}" for k, v in plan.train.items())),
        ("Seeds", ", ".join(map(str, plan.seeds))
         + "".join(f"; {k}: also {', '.join(map(str, v))}" for k, v in plan.more_seeds.items())),
        ("Spread", "least to greatest over seeds, or over pairs of runs; of one seed alone the "
                   "95 % interval by bootstrap over particles"),
        ("Held against", "the reference recipe, or the agreement of its seeds; the share is "
                         "counted from the null"),
        ("Volumes", f"surfaces by marching cubes at one threshold: {THRESHOLD_RULE}"),
    ]  # fmt: skip
    if study.timing:
        rows.append(("Times", f"{study.timing['device']}, {study.timing['threads']} threads; "
                              "configurations take turns, a few batches each"))  # fmt: skip
    rows.append(("Versions", f"cryodrgn_amort {__version__}, cryodrgn {host.VERSION}"))
    rows.append(("Written", datetime.now(timezone.utc).isoformat(timespec="seconds")))
    return rows
