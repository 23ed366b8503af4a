"""Write a study: report.html to read, study.json with every number of it, and figures/.

Figures 3 to 26 have the numbers of the paper, Edelberg & Lederman, arXiv 2303.07487.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from cryodrgn_amort import __version__, figures, host, study_figures, surfaces
from cryodrgn_amort.claims import Found, agreement_rows, claims, row, truth_rows
from cryodrgn_amort.definitions import DEFINITIONS, TIMED, number, plain_number, text_table
from cryodrgn_amort.files import replacing, write_json, write_text
from cryodrgn_amort.pages import Picture, capital, environment, picture, turnable
from cryodrgn_amort.plan import PLAN
from cryodrgn_amort.report import CITATION, measure_facts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from cryodrgn_amort.claims import Row
    from cryodrgn_amort.study_results import Member, Study

__all__ = ["summary", "write_report"]

_TONES = {"holds": "good", "holds in part": "fair", "does not hold": "poor", "open": "none"}
_MAPS = ("umap", "z", "pca")  # the first that an evaluation has
_PRIME = "′"
# Paper's figure -> recipe, and what of it: its map, the map of a transform, or so many volumes.
_FIGURES: dict[str, tuple[str, str | int]] = {
    "3": ("baseline", ""),
    "5": ("vlt", ""),
    "7": ("twin", ""),
    "8": ("twin-large", ""),
    "9": ("noise-large", ""),
    "10": ("shift", "roll-1.held"),
    "11": ("rotate", "rotate-90.held"),
    "20": ("baseline", 2),
    "21": ("vlt-zero", ""),
    "22": ("vlt-frozen-zero", 1),
    "23": ("vlt-frozen-random", ""),
    "24": ("vlt-frozen-encoder", ""),
    "25": ("small", ""),
    "26": ("twin-small", ""),
}
_OVERVIEW = (
    "class_knn", "coordinate_r2", "volume_fve", "memorisation", "volume_spread",
    "amortization_gap", "held_out_score", "class_knn_held_out",
)  # fmt: skip
_BESIDE = (  # column, of what, which part or transform, mode
    ("digits, 1 px", "digits", "shift1", ""),
    ("digits, 5 px", "digits", "shift5", ""),
    ("particles, 1 px", "particles", "roll:1", "held"),
    ("particles, 90°", "particles", "rotate:90", "held"),
    ("digits, held out", "digits", "held_out", ""),
    ("particles, held out", "particles", "", ""),
)
_BESIDE_MEASURES = (
    "retrieval_rank", "top1", "displacement", "displacement_sigma", "latent_correlation",
    "label_agreement", "amortization_loss_fraction", "held_out_score", "generalisation_gap",
    "class_knn",
)  # fmt: skip
_CURVES = ("retrieval_rank", "displacement", "latent_correlation", "amortization_loss_fraction")


def write_report(study: Study) -> Path:
    """Write everything into the study's folder; returns the path of report.html."""
    folder = study.plan.folder
    found = claims(study)
    drawn = _figures(study)
    for drawing in drawn.values():
        for kind, content in (("png", drawing.png), ("pdf", drawing.pdf)):
            _write(folder / "figures" / f"{drawing.name}.{kind}", content)
    write_json(folder / "study.json", _facts(study, found))
    page = folder / "report.html"
    write_text(page, _page(study, found, drawn))
    return page


def summary(study: Study) -> str:
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


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _facts(study: Study, found: Sequence[Found]) -> dict[str, Any]:
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
    names = _measures_shown(study, found)
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
        "definitions": {name: asdict(DEFINITIONS[name]) for name in names},
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
        "rule": found.claim.rule,
        "verdict": found.verdict,
        "rows": [{**asdict(r), "share": r.share} for r in found.rows],
    }


def _measures_shown(study: Study, found: Sequence[Found]) -> list[str]:
    """Return the names of all measures in the report, in the order of their definitions."""
    used = {r.measure for f in found for r in f.rows}
    for member in study.members.values():
        used |= member.measures.keys()
        for measures in member.transforms.values():
            used |= measures.keys()
    for pair in study.agreement:
        used |= pair.measures.keys()
    if study.digits:
        used |= set(_BESIDE_MEASURES)
    return [name for name in DEFINITIONS if name in used]


def _figures(study: Study) -> dict[str, Picture]:
    """Draw all figures whose recipes are there: by name, as in figures/."""
    drawn = {}
    for label, (recipe, what) in _FIGURES.items():
        members = study.of(recipe)
        if not members:
            continue
        name = f"figure{label}"
        if isinstance(what, int):
            drawn[name] = _volumes(name, label, members[0], what)
        else:
            found = _map(name, f"Figure {label} of the paper. ", study, members[0], what)
            drawn.update({name: found} if found else {})
    shown = {recipe for recipe, _ in _FIGURES.values()}
    for name in study.plan.recipes:  # of plugins
        if name not in shown and study.of(name):
            found = _map(name, "", study, study.of(name)[0], "")
            drawn.update({name: found} if found else {})
    return {**drawn, **_of_all(study)}


def _map(name: str, lead: str, study: Study, member: Member, what: str) -> Picture | None:
    """Take over an evaluation's map of latents; its volumes can be turned."""
    stem = f"map.{what}." if what else "map."
    kinds = [k for k in _MAPS if f"{stem}{k}.png" in member.facts["files"]]
    if not kinds:
        return None
    files = [(member.folder / f"{stem}{kinds[0]}.{kind}").read_bytes() for kind in ("png", "pdf")]
    volumes = member.volumes()[: figures.MOST_VOLUMES]
    names, count = figures.numbers(len(volumes)), len(volumes)
    meshes = surfaces.meshes(volumes)
    reach = surfaces.reach(meshes)
    text = "each particle and its volume in one colour"
    if what:
        copies = surfaces.meshes(member.volumes(what)[:count], volumes)
        meshes = [mesh for pair in zip(meshes, copies, strict=True) for mesh in pair]
        names = [n for name in names for n in (name, name + _PRIME)]
        shown = turnable(meshes, names, [figures.ORIGINAL, figures.MOVED] * count, reach, 2)
        text = "particles red, transformed copies green with a prime, purple lines join them"
    else:
        shown = turnable(meshes, names, figures.colours(count), reach)
    recipe = study.recipe(member.recipe)
    axes = {"umap": "UMAP", "z": "the latents themselves", "pca": "principal components"}[kinds[0]]
    caption = (
        f"{lead}{capital(recipe.summary)} ({recipe.name}, seed {member.seed}). Latents of all "
        f"particles ({axes}), the first {count} numbered, and the volumes decoded there; {text}. "
        f"One direction, one threshold ({surfaces.THRESHOLD_RULE})."
    )
    alt = f"Latent space and volumes of {recipe.name}"
    return Picture(name, alt, caption, files[0], files[1], shown)


def _volumes(name: str, label: str, member: Member, count: int) -> Picture:
    """Draw the volumes of the first particles alone."""
    volumes = member.volumes()[:count]
    meshes, own = surfaces.meshes(volumes), figures.colours(count)
    reach = surfaces.reach(meshes)
    pictures = [surfaces.picture(m, c, reach) for m, c in zip(meshes, own, strict=True)]
    names = figures.numbers(len(volumes))
    which = "the only volume" if count == 1 else f"the volumes of the first {count} particles"
    caption = f"Figure {label} of the paper. {capital(which)} of {member.recipe}."
    drawn = study_figures.volumes(pictures, names, own)
    shown = turnable(meshes, names, own, reach)
    return picture(name, f"{capital(which)} of {member.recipe}", caption, drawn, shown)


def _of_all(study: Study) -> dict[str, Picture]:
    """Draw what compares the recipes with each other."""
    trained = [n for n in study.plan.recipes if study.recipe(n).command == "train_amort"]
    drawn = {}

    def add(name: str, caption: str, figure: Any) -> None:
        drawn[name] = picture(name, caption.partition(".")[0], caption, figure)

    points = [
        study_figures.Point(
            m.recipe, m.seed, m.measures.get("memorisation"),
            {n: m.measures[n] for n in _OVERVIEW[:3] if n in m.measures},
        )
        for name in trained for m in study.of(name)
    ]  # fmt: skip
    if any(point.recovery for point in points):
        add("recovery", "Recovery of the truth against memorisation, all recipes. What is found "
            "without the particle's own image at the input lies to the right.",
            study_figures.recovery(points))  # fmt: skip
    curves = {
        title: found
        for title, recipe in (("shift", "shift"), ("angle", "rotate"))
        if (found := _curves(study, recipe))
    }
    if digits := _digit_curves(study):
        curves["shift"] = [*curves.get("shift", ()), *digits]
    if curves:
        add("invariance", "What shifting and turning do to the latents of the baseline, against "
            "the size of the shift and the angle, and what shifting does to those of handwritten "
            "digits (28 px), if they are in the study. Dotted: null, dashed: ideal.",
            study_figures.invariance(curves))  # fmt: skip
    if study.agreement:
        add("agreement", "Agreement of every recipe with its reference, next to that of two seeds "
            "of one recipe (band).", study_figures.agreement(study.agreement))  # fmt: skip
    tables = {name: [m.losses for m in study.of(name) if m.losses] for name in trained}
    tables = {name: found for name, found in tables.items() if found}
    if tables:
        add("losses", "Loss curves of all runs.", study_figures.losses(tables))
    if study.seconds:
        add("table1", "Table 1 of the paper: seconds per epoch, relative to the first.",
            study_figures.times(study.seconds))  # fmt: skip
    return drawn


def _curves(study: Study, recipe: str) -> list[study_figures.Curve]:
    """Return measures against the size of a transform, for each seed and mode."""
    found = []
    for member in study.of(recipe):
        for mode in ("held", "follow"):
            sizes = []
            for (name, of_mode), measures in member.transforms.items():
                kind, _, size = name.partition(":")
                if of_mode == mode and kind in ("roll", "rotate"):
                    sizes.append((float(size), measures))
            sizes.sort(key=lambda item: item[0])
            values = {n: [m[n] for _, m in sizes] for n in _CURVES if all(n in m for _, m in sizes)}
            if sizes:
                x = np.array([size for size, _ in sizes])
                found.append(study_figures.Curve(f"{mode}, seed {member.seed}", x, values))
    return found


def _digit_curves(study: Study) -> list[study_figures.Curve]:
    """Return measures of digits against the size of the shift, for each seed of the network."""
    found = []
    for seed, parts in enumerate(study.digits.get("vae", ())):
        shifts = sorted(int(part[5:]) for part in parts if part.startswith("shift"))
        each = [parts[f"shift{shift}"] for shift in shifts]
        values = {n: [m[n] for m in each] for n in _CURVES if each and all(n in m for m in each)}
        if values:
            x = np.array(shifts, float)
            found.append(study_figures.Curve(f"digits, seed {seed}", x, values))
    return found


def _beside_digits(study: Study) -> list[dict[str, Row]]:
    """Return the same measures of digits and of particles, a dictionary for each of _BESIDE."""
    columns = []
    for label, kind, of, mode in _BESIDE:
        rows: dict[str, Row] = {}
        for name in _BESIDE_MEASURES:
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
            overview_columns=[*_OVERVIEW, "knn_overlap", "volume_fsc"],
            common=[drawn[n] for n in ("recovery", "invariance", "agreement", "losses")
                    if n in drawn],
            beside=_beside_digits(study) if study.digits else [],
            beside_columns=[label for label, *_ in _BESIDE],
            beside_measures=_BESIDE_MEASURES,
            table1=_table1(study),
            table1_figure=drawn.get("table1"),
            sections=sections,
            volumes_alone=[f"figure{k}" for k, (_, w) in _FIGURES.items() if isinstance(w, int)],
            missing=study.missing,
            methods=_methods(study),
            plan=(study.plan.folder / PLAN).read_text(encoding="utf-8"),
            names=_measures_shown(study, found),
            citation=CITATION,
        )
    )  # fmt: skip


def _order(name: str) -> tuple[int, str]:
    known = list(dict.fromkeys(recipe for recipe, _ in _FIGURES.values()))
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
    labels = [f"figure{k}" for k, (of, _) in _FIGURES.items() if of == name] or [name]
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
        ("Volumes", f"surfaces by marching cubes at one threshold: {surfaces.THRESHOLD_RULE}"),
    ]  # fmt: skip
    if study.timing:
        rows.append(("Times", f"{study.timing['device']}, {study.timing['threads']} threads; "
                              "configurations take turns, a few batches each"))  # fmt: skip
    rows.append(("Versions", f"cryodrgn_amort {__version__}, cryodrgn {host.VERSION}"))
    rows.append(("Written", datetime.now(timezone.utc).isoformat(timespec="seconds")))
    return rows
