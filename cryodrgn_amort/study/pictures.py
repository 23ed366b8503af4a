"""The figures of a study: which there are, from what, and what stands below them.

Figures 3 to 26 have the numbers of the paper, Edelberg & Lederman, arXiv 2303.07487.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort.report import (
    MOST_VOLUMES,
    MOVED,
    ORIGINAL,
    THRESHOLD_RULE,
    Picture,
    capital,
    common_reach,
    isosurfaces,
    particle_colours,
    particle_numbers,
    picture,
    render,
    turnable,
)
from cryodrgn_amort.study.curve_figures import INVARIANCE, Curve, invariance, losses
from cryodrgn_amort.study.recovery_figure import Point, recovery
from cryodrgn_amort.study.row_figures import agreement, times, volumes as draw_volumes
from cryodrgn_amort.study.rows import TRUTH

if TYPE_CHECKING:
    from cryodrgn_amort.study.results import Member, Study


__all__ = ["PAPER", "study_pictures"]

_MAPS = ("umap", "z", "pca")  # the first that an evaluation has
_PRIME = "′"

PAPER: dict[str, tuple[str, str | int]] = {
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
"""Paper's figure -> recipe, and what of it: its map, the map of a transform, or so many volumes."""


def study_pictures(study: Study) -> dict[str, Picture]:
    """Draw all figures whose recipes are there: by name, as in figures/."""
    drawn = {}
    for label, (recipe, what) in PAPER.items():
        members = study.of(recipe)
        if not members:
            continue
        name = f"figure{label}"
        if isinstance(what, int):
            drawn[name] = _volumes(name, label, members[0], what)
        else:
            found = _map(name, f"Figure {label} of the paper. ", study, members[0], what)
            drawn.update({name: found} if found else {})
    shown = {recipe for recipe, _ in PAPER.values()}
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
    volumes = member.volumes()[:MOST_VOLUMES]
    names, count = particle_numbers(len(volumes)), len(volumes)
    meshes = isosurfaces(volumes)
    reach = common_reach(meshes)
    text = "each particle and its volume in one colour"
    if what:
        copies = isosurfaces(member.volumes(what)[:count], volumes)
        meshes = [mesh for pair in zip(meshes, copies, strict=True) for mesh in pair]
        names = [n for name in names for n in (name, name + _PRIME)]
        shown = turnable(meshes, names, [ORIGINAL, MOVED] * count, reach, 2)
        text = "particles red, transformed copies green with a prime, purple lines join them"
    else:
        shown = turnable(meshes, names, particle_colours(count), reach)
    recipe = study.recipe(member.recipe)
    axes = {"umap": "UMAP", "z": "the latents themselves", "pca": "principal components"}[kinds[0]]
    caption = (
        f"{lead}{capital(recipe.summary)} ({recipe.name}, seed {member.seed}). Latents of all "
        f"particles ({axes}), the first {count} numbered, and the volumes decoded there; {text}. "
        f"One direction, one threshold ({THRESHOLD_RULE})."
    )
    alt = f"Latent space and volumes of {recipe.name}"
    return Picture(name, alt, caption, files[0], files[1], shown)


def _volumes(name: str, label: str, member: Member, count: int) -> Picture:
    """Draw the volumes of the first particles alone."""
    volumes = member.volumes()[:count]
    meshes, own = isosurfaces(volumes), particle_colours(count)
    reach = common_reach(meshes)
    pictures = [render(m, c, reach) for m, c in zip(meshes, own, strict=True)]
    names = particle_numbers(len(volumes))
    which = "the only volume" if count == 1 else f"the volumes of the first {count} particles"
    caption = f"Figure {label} of the paper. {capital(which)} of {member.recipe}."
    drawn = draw_volumes(pictures, names, own)
    shown = turnable(meshes, names, own, reach)
    return picture(name, f"{capital(which)} of {member.recipe}", caption, drawn, shown)


def _of_all(study: Study) -> dict[str, Picture]:
    """Draw what compares the recipes with each other."""
    trained = [n for n in study.plan.recipes if study.recipe(n).command == "train_amort"]
    drawn = {}

    def add(name: str, caption: str, figure: Any) -> None:
        drawn[name] = picture(name, caption.partition(".")[0], caption, figure)

    points = [
        Point(
            m.recipe, m.seed, m.measures.get("memorisation"),
            {n: m.measures[n] for n in TRUTH if n in m.measures},
        )
        for name in trained for m in study.of(name)
    ]  # fmt: skip
    if any(point.recovery for point in points):
        add("recovery", "Recovery of the truth against memorisation, all recipes. What is found "
            "without the particle's own image at the input lies to the right.",
            recovery(points))  # fmt: skip
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
            invariance(curves))  # fmt: skip
    if study.agreement:
        add("agreement", "Agreement of every recipe with its reference, next to that of two seeds "
            "of one recipe (band).", agreement(study.agreement))  # fmt: skip
    tables = {name: [m.losses for m in study.of(name) if m.losses] for name in trained}
    tables = {name: found for name, found in tables.items() if found}
    if tables:
        add("losses", "Loss curves of all runs.", losses(tables))
    if study.seconds:
        add("table1", "Table 1 of the paper: seconds per epoch, relative to the first.",
            times(study.seconds))  # fmt: skip
    return drawn


def _curves(study: Study, recipe: str) -> list[Curve]:
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
            values = {
                n: [m[n] for _, m in sizes] for n in INVARIANCE if all(n in m for _, m in sizes)
            }
            if sizes:
                x = np.array([size for size, _ in sizes])
                found.append(Curve(f"{mode}, seed {member.seed}", x, values))
    return found


def _digit_curves(study: Study) -> list[Curve]:
    """Return measures of digits against the size of the shift, for each seed of the network."""
    found = []
    for seed, parts in enumerate(study.digits.get("vae", ())):
        shifts = sorted(int(part[5:]) for part in parts if part.startswith("shift"))
        each = [parts[f"shift{shift}"] for shift in shifts]
        values = {n: [m[n] for m in each] for n in INVARIANCE if each and all(n in m for m in each)}
        if values:
            x = np.array(shifts, float)
            found.append(Curve(f"digits, seed {seed}", x, values))
    return found
