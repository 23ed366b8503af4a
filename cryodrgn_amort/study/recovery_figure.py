"""The figure of what each recipe recovers of the truth, against how much it has memorised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from cryodrgn_amort.core import number
from cryodrgn_amort.report import STYLE
from cryodrgn_amort.study.drawing import (
    AXES,
    FAINT,
    INK,
    NULL,
    PALE,
    RULE,
    SMALL,
    WIDTH,
    columns_of,
    look_of,
    measure_title,
    note,
    nothing,
    unit_label,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cryodrgn_amort.measures import Measure


__all__ = ["Point", "recovery"]

_BLANK = "\u2007"  # as wide as a figure
_HALO = (patheffects.withStroke(linewidth=2.5, foreground="white"),)

_AROUND = [
    (radius * np.cos(angle), radius * np.sin(angle))
    for radius in (9, 13, 18, 24, 31, 39, 48)
    for angle in np.radians(np.arange(45, 405, 22.5))
]
"""Where a point's number may stand, in points from it; the first that is free is taken."""


@dataclass(frozen=True)
class Point:
    """One recipe with one seed: what it recovers, and how much of that it has memorised.

    Attributes
    ----------
    memorisation
        None where it has no meaning: for the runs that it is relative to.
    """

    recipe: str
    seed: int
    memorisation: Measure | None
    recovery: Mapping[str, Measure]


def recovery(points: Sequence[Point]) -> Figure:
    """Draw how much of the truth each recipe recovers, against how much it has memorised.

    A panel per measure. Large numbered marks are means over seeds, small ones single seeds, bars
    their intervals. Runs without a memorisation value stand in a strip at the side.
    """
    names = list(dict.fromkeys(name for point in points for name in point.recovery))
    recipes = list(dict.fromkeys(point.recipe for point in points))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 2.6 * max(len(names), 1)), layout="constrained")
        if not names:
            return nothing(figure)
        panels = figure.subplots(len(names), squeeze=False, sharex=True)[:, 0]
        drawn = [
            (axes, _draw_points(axes, name, points, recipes))
            for axes, name in zip(panels, names, strict=True)
        ]
        panels[-1].set_xlabel("memorisation (1: the input does not matter)")
        handles = [
            Line2D([], [], label=f"{str(i + 1).rjust(2, _BLANK)}   {recipe}",
                   **{**look_of(i), "linestyle": "none"}) for i, recipe in enumerate(recipes)
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside right upper")
        figure.draw_without_rendering()  # says where the points are
        for axes, means in drawn:
            _number_points(axes, [(str(recipes.index(r) + 1), at) for r, at in means])
    return figure


def _memorisation(point: Point) -> Measure | None:
    found = point.memorisation
    return found if found is not None and np.isfinite(found.value) else None


def _draw_points(
    axes: Any, name: str, points: Sequence[Point], recipes: Sequence[str]
) -> list[tuple[str, np.ndarray]]:
    """Draw one measure; return recipe and place, `(2,)`, of the means over seeds."""
    beside = _draw_strip(axes, points)
    places: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for p in points:
        m = p.recovery.get(name)
        if m is None or not np.isfinite(m.value):
            continue
        look, along = look_of(recipes.index(p.recipe)), _memorisation(p)
        look["linestyle"] = "none"
        bar = {"color": look["color"], "linewidth": 1.1, "alpha": 0.55}
        x = beside[p.recipe] if along is None else along.value
        axes.plot([x] * 2, columns_of([m], "low", "high"), **bar)
        if along is not None:
            axes.plot(columns_of([along], "low", "high"), [m.value] * 2, **bar)
        axes.plot(x, m.value, **look, markersize=3)
        places.setdefault((p.recipe, along is None), []).append((x, m.value))
    means = [(recipe, np.mean(at, 0)) for (recipe, _), at in places.items()]
    for recipe, at in means:
        look = {**look_of(recipes.index(recipe)), "linestyle": "none"}
        axes.plot(*at, **look, markersize=7, markeredgecolor="white", markeredgewidth=0.8,
                  label=recipe)  # fmt: skip
    for null in {p.recovery[name].null for p in points if name in p.recovery}:
        if null is not None and np.isfinite(null):
            axes.axhline(null, linestyle=NULL, **RULE)
            note(axes, "null", null)
    axes.set(title=measure_title(name), ylabel=AXES.get(name, unit_label(name)))
    axes.margins(y=0.12)
    return means


def _draw_strip(axes: Any, points: Sequence[Point]) -> dict[str, float]:
    """Divide the panel; return the place along x of each recipe in the strip at the side."""
    known = [m for m in map(_memorisation, points) if m is not None]
    spans = np.concatenate([[0, 1], *columns_of(known, "value", "low", "high")])
    low, high = np.nanmin(spans), np.nanmax(spans)
    recipes = list(dict.fromkeys(p.recipe for p in points if _memorisation(p) is None))
    step = 0.06 * (high - low)
    edge = low - step
    left = edge - step * (len(recipes) + 0.4 if recipes else 0)
    axes.set_xlim(left, high + step)
    ticks = [t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    labels = [number(t) for t in ticks]
    if recipes:
        axes.axvspan(left, edge, color=FAINT, linewidth=0, zorder=0)
        ticks, labels = [(left + edge) / 2, *ticks], ["none", *labels]
    axes.set_xticks(ticks, labels)
    return {recipe: left + step * (i + 0.7) for i, recipe in enumerate(recipes)}


def _number_points(axes: Any, means: Sequence[tuple[str, np.ndarray]]) -> None:
    """Write names at points, in data units `(2,)`, where they cover no other name or point."""
    scale = 72 / axes.figure.dpi  # pixels to points
    inside = Bbox(axes.get_window_extent().get_points() * scale)
    centres = [axes.transData.transform(at) * scale for _, at in means]
    taken = [_box(centre, 8, 8) for centre in centres]
    for (name, at), centre in zip(means, centres, strict=True):
        boxes = [_box(centre + offset, 5.5 * len(name) + 1, 9) for offset in _AROUND]
        free = [i for i, box in enumerate(boxes) if _is_free(box, inside, taken)]
        best = free[0] if free else 0
        taken.append(boxes[best])
        offset = _AROUND[best]
        line = {"arrowstyle": "-", "color": PALE, "linewidth": 0.7, "shrinkA": 3, "shrinkB": 3}
        axes.annotate(
            name, at, offset, textcoords="offset points", ha="center", va="center",
            fontsize=SMALL, weight="bold", color=INK, path_effects=_HALO, zorder=5,
            arrowprops=line if np.hypot(*offset) > 14 else None,
        ).set_in_layout(False)  # fmt: skip


def _box(centre: np.ndarray, width: float, height: float) -> Bbox:
    half = np.array([width, height]) / 2
    return Bbox([centre - half, centre + half])


def _is_free(box: Bbox, inside: Bbox, taken: Sequence[Bbox]) -> bool:
    corners = [inside.contains(*corner) for corner in box.corners()]
    return all(corners) and not box.count_overlaps(taken)
