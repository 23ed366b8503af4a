"""Figures of a study of many runs. They draw what was measured and compute nothing.

Every function returns a ``matplotlib.figure.Figure`` of its own; no global state is touched.
Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color), and nothing is told by colour
alone: line styles and markers differ as well, and lines and points are named where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from sklearn.isotonic import isotonic_regression

from cryodrgn_amort.definitions import DEFINITIONS, number
from cryodrgn_amort.figures import STYLE, draw_volume

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cryodrgn_amort.metrics import Measure
    from cryodrgn_amort.study_results import Agreement

__all__ = [
    "Curve",
    "Point",
    "agreement",
    "invariance",
    "losses",
    "recovery",
    "times",
    "volumes",
]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_LINES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (2, 1.5)))
_MARKERS = "osD^vP<X>pd"
_INK, _PALE, _FAINT = "#1c2126", "#8a9099", "#e8ebee"
_RULE: dict[str, Any] = {"color": _INK, "linewidth": 0.9, "zorder": 1}
_NULL, _IDEAL = ":", (0, (4, 4))
_SEEDS: dict[str, Any] = {"color": _COLOURS[1], "marker": "D", "markersize": 4.5}
_PAIR: dict[str, Any] = {"color": _COLOURS[0], "marker": "o", "markersize": 4.5}
_BAND = 0.15  # opacity
_WIDTH = 10.0  # inches: that of a report, so that 10 points are as large as its text
_SMALL = 8.5  # points
_BLANK = "\u2007"  # as wide as a figure
_HALO = (patheffects.withStroke(linewidth=2.5, foreground="white"),)
_AROUND = [
    (radius * np.cos(angle), radius * np.sin(angle))
    for radius in (9, 13, 18, 24, 31, 39, 48)
    for angle in np.radians(np.arange(45, 405, 22.5))
]
"""Where a point's number may stand, in points from it; the first that is free is taken."""

_INVARIANCE = (
    "retrieval_rank",
    "displacement",
    "latent_correlation",
    "amortization_loss_fraction",
)
_AGREEMENT = ("knn_overlap", "volume_fsc")
_LOSSES = {
    "gen_loss": ("Reconstruction loss", "mean squared error per pixel"),
    "kld": ("KL divergence", "nats per particle"),
    "loss": ("Total loss", "reconstruction + weighted KL"),
}
_AMOUNTS = {"shift": "shift (px)", "angle": "angle (degrees)"}
_AXES = {
    "class_knn": "share of particles",
    "coordinate_r2": "share of variance",
    "volume_fve": "share of variance",
    "knn_overlap": "share of 15 neighbours",
    "volume_fsc": "mean correlation",
}
"""What the axis of a measure counts, where its title stands above it."""


@dataclass(frozen=True)
class Curve:
    """Measures against the size of a transform, of one seed or one mode.

    Attributes
    ----------
    label
        Curves whose labels are the same up to a comma get one colour: "held, seed 0".
    x
        Sizes, rising, without 0: `(M,)`.
    values
        Measure name -> one of each size.
    """

    label: str
    x: np.ndarray
    values: Mapping[str, Sequence[Measure]]


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


def _look(i: int) -> dict[str, Any]:
    """Colour, line and marker of the i-th recipe; any two of the first 28 share one at most."""
    return {
        "color": _COLOURS[i % len(_COLOURS)],
        "linestyle": _LINES[i % len(_LINES)],
        "marker": _MARKERS[i % len(_MARKERS)],
    }


def _title(name: str) -> str:
    found = DEFINITIONS.get(name)
    return found.title if found else name.replace("_", " ")


def _label(name: str) -> str:
    found = DEFINITIONS.get(name)
    return f"{_title(name)}\n({found.unit})" if found and found.unit else _title(name)


def _known(names: Sequence[str], tables: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return those of the names that some table has."""
    tables = list(tables)
    return [name for name in names if any(name in table for table in tables)]


def _nothing(figure: Figure) -> Figure:
    figure.text(0.5, 0.5, "nothing of this was measured", ha="center", va="center", color=_PALE)
    return figure


def _note(axes: Any, text: str, y: float) -> None:
    """Write to the right of the panel, at y in data units."""
    axes.annotate(text, (1, y), (4, 0), xycoords=("axes fraction", "data"),
                  textcoords="offset points", va="center", fontsize=_SMALL)  # fmt: skip


def _parts(found: Sequence[Measure], *names: str) -> list[np.ndarray]:
    """Return value, low, ... of each measure, `(M,)`; NaN where there is none."""
    return [np.array([getattr(m, name) for m in found], float) for name in names]


def _spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Move positions in [0, 1] as little as possible until they are ``gap`` apart: `(M,)`."""
    count = len(wanted)
    gap = min(gap, 1 / max(count - 1, 1))
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(count)
    moved = np.empty(count)
    # positions less their least offsets only have to be in order
    moved[order] = steps + isotonic_regression(
        wanted[order] - steps, y_min=0, y_max=max(1 - gap * (count - 1), 0)
    )
    return moved


def invariance(curves: Mapping[str, Sequence[Curve]]) -> Figure:
    """Draw measures of invariance against the size of a transform.

    A column per kind of transform, a row per measure. All begin at size 0 with the ideal, by
    definition; bars are intervals.

    Parameters
    ----------
    curves
        Kind of transform ("shift" in pixels, "angle" in degrees) -> curves.
    """
    every = [curve for found in curves.values() for curve in found]
    names = _known(_INVARIANCE, (curve.values for curve in every))
    looks = _curve_looks([curve.label for curve in every])
    with mpl.rc_context(STYLE):
        size = (1.2 + 4.4 * len(curves), 0.9 + 2.2 * max(len(names), 1))
        figure = Figure(figsize=size, layout="constrained")
        if not names:
            return _nothing(figure)
        grid = figure.subplots(len(names), len(curves), squeeze=False, sharex="col", sharey="row")
        for column, (title, found) in zip(grid.T, curves.items(), strict=True):
            for axes, name in zip(column, names, strict=True):
                _draw_measure(axes, name, found, looks)
            steps = [1, 1.5, 3, 4.5, 9, 10] if title == "angle" else [1, 2, 5, 10]
            column[-1].xaxis.set_major_locator(MaxNLocator(9, steps=steps))
            column[-1].set_xlabel(_AMOUNTS.get(title, title))
            column[0].set_title(title.capitalize())
        for axes, name in zip(grid[:, 0], names, strict=True):
            axes.set_ylabel(_label(name))
        handles = [Line2D([], [], label=label, **look) for label, look in looks.items()]
        kinds = len({label.partition(",")[0] for label in looks})
        figure.legend(handles=handles, loc="outside lower center", ncols=min(kinds, 4),
                      handlelength=3.2)  # fmt: skip
    return figure


def _curve_looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the look of each label: colour and line of its kind, a marker of its own."""
    kinds = list(dict.fromkeys(label.partition(",")[0] for label in labels))
    looks: dict[str, dict[str, Any]] = {}
    for i, kind in enumerate(kinds):
        for label in dict.fromkeys(labels):
            if label.partition(",")[0] == kind:
                marker = _MARKERS[len(looks) % len(_MARKERS)]
                looks[label] = {**_look(i), "marker": marker, "markersize": 4.5, "linewidth": 1.4}
    return looks


def _draw_measure(
    axes: Any, name: str, curves: Sequence[Curve], looks: Mapping[str, dict[str, Any]]
) -> None:
    drawn = [curve for curve in curves if curve.values.get(name)]
    nulls, ideals = ([_parts(c.values[name], part)[0] for c in drawn] for part in ("null", "ideal"))
    one_null = len({level for null in nulls for level in null}) == 1
    for curve, null, ideal in zip(drawn, nulls, ideals, strict=True):
        look = looks[curve.label]
        value, low, high = _parts(curve.values[name], "value", "low", "high")
        axes.plot([curve.x] * 2, [low, high], color=look["color"], linewidth=1.2, alpha=0.6)
        # at size 0 it is the ideal, by definition
        axes.plot([0, *curve.x], [ideal[0], *value], **look, label=curve.label)
        axes.plot([0, *curve.x], [ideal[0], *ideal], linestyle=_IDEAL, **_RULE)
        own = {} if one_null else {"color": look["color"], "marker": look["marker"]}
        axes.plot(curve.x, null, linestyle=_NULL, **{**_RULE, **own, "markersize": 2.5})
    for text, levels in (("null", nulls), ("ideal", ideals)):
        ends = [level[-1] for level in levels if np.isfinite(level[-1])]
        if ends:
            _note(axes, text, ends[0])


def recovery(points: Sequence[Point]) -> Figure:
    """Draw how much of the truth each recipe recovers, against how much it has memorised.

    A panel per measure. Large numbered marks are means over seeds, small ones single seeds, bars
    their intervals. Runs without a memorisation value stand in a strip at the side.
    """
    names = list(dict.fromkeys(name for point in points for name in point.recovery))
    recipes = list(dict.fromkeys(point.recipe for point in points))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 0.6 + 2.6 * max(len(names), 1)), layout="constrained")
        if not names:
            return _nothing(figure)
        panels = figure.subplots(len(names), squeeze=False, sharex=True)[:, 0]
        drawn = [
            (axes, _draw_points(axes, name, points, recipes))
            for axes, name in zip(panels, names, strict=True)
        ]
        panels[-1].set_xlabel("memorisation (1: the input does not matter)")
        handles = [
            Line2D([], [], label=f"{str(i + 1).rjust(2, _BLANK)}   {recipe}",
                   **{**_look(i), "linestyle": "none"}) for i, recipe in enumerate(recipes)
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
        look, along = _look(recipes.index(p.recipe)), _memorisation(p)
        look["linestyle"] = "none"
        bar = {"color": look["color"], "linewidth": 1.1, "alpha": 0.55}
        x = beside[p.recipe] if along is None else along.value
        axes.plot([x] * 2, _parts([m], "low", "high"), **bar)
        if along is not None:
            axes.plot(_parts([along], "low", "high"), [m.value] * 2, **bar)
        axes.plot(x, m.value, **look, markersize=3)
        places.setdefault((p.recipe, along is None), []).append((x, m.value))
    means = [(recipe, np.mean(at, 0)) for (recipe, _), at in places.items()]
    for recipe, at in means:
        look = {**_look(recipes.index(recipe)), "linestyle": "none"}
        axes.plot(*at, **look, markersize=7, markeredgecolor="white", markeredgewidth=0.8,
                  label=recipe)  # fmt: skip
    for null in {p.recovery[name].null for p in points if name in p.recovery}:
        if null is not None and np.isfinite(null):
            axes.axhline(null, linestyle=_NULL, **_RULE)
            _note(axes, "null", null)
    axes.set(title=_title(name), ylabel=_AXES.get(name, _label(name)))
    axes.margins(y=0.12)
    return means


def _draw_strip(axes: Any, points: Sequence[Point]) -> dict[str, float]:
    """Divide the panel; return the place along x of each recipe in the strip at the side."""
    known = [m for m in map(_memorisation, points) if m is not None]
    spans = np.concatenate([[0, 1], *_parts(known, "value", "low", "high")])
    low, high = np.nanmin(spans), np.nanmax(spans)
    recipes = list(dict.fromkeys(p.recipe for p in points if _memorisation(p) is None))
    step = 0.06 * (high - low)
    edge = low - step
    left = edge - step * (len(recipes) + 0.4 if recipes else 0)
    axes.set_xlim(left, high + step)
    ticks = [t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    labels = [number(t) for t in ticks]
    if recipes:
        axes.axvspan(left, edge, color=_FAINT, linewidth=0, zorder=0)
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
        line = {"arrowstyle": "-", "color": _PALE, "linewidth": 0.7, "shrinkA": 3, "shrinkB": 3}
        axes.annotate(
            name, at, offset, textcoords="offset points", ha="center", va="center",
            fontsize=_SMALL, weight="bold", color=_INK, path_effects=_HALO, zorder=5,
            arrowprops=line if np.hypot(*offset) > 14 else None,
        ).set_in_layout(False)  # fmt: skip


def _box(centre: np.ndarray, width: float, height: float) -> Bbox:
    half = np.array([width, height]) / 2
    return Bbox([centre - half, centre + half])


def _is_free(box: Bbox, inside: Bbox, taken: Sequence[Bbox]) -> bool:
    corners = [inside.contains(*corner) for corner in box.corners()]
    return all(corners) and not box.count_overlaps(taken)


def losses(curves: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> Figure:
    """Draw reconstruction loss, KL divergence and their sum against the epoch, of all runs.

    Parameters
    ----------
    curves
        Recipe -> one table per seed, with the columns ``epoch``, ``gen_loss``, ``kld`` and
        ``loss`` of metrics.csv, `(epochs,)` each.
    """
    names = _known(list(_LOSSES), (table for tables in curves.values() for table in tables))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 0.6 + 3.0 * max(len(names), 1)), layout="constrained")
        if not names:
            return _nothing(figure)
        grid = figure.subplots(len(names), 2, squeeze=False, sharex="col", width_ratios=[8, 2])
        ends: list[dict[int, float]] = []
        for (axes, _), name in zip(grid, names, strict=True):
            axes.set(title=_LOSSES[name][0], ylabel=_LOSSES[name][1])
            ends.append(_draw_losses(axes, name, list(curves.values())))
        grid[-1, 0].set_xlabel("epoch")
        grid[-1, 0].xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
        for axes in grid[:, 1]:
            axes.set_axis_off()
            axes.set(xlim=(0, 1), ylim=(0, 1))
        figure.draw_without_rendering()  # says how high the panels are
        for (axes, beside), end in zip(grid, ends, strict=True):
            _name_ends(axes, beside, end, list(curves))
    return figure


def _draw_losses(
    axes: Any, name: str, runs: Sequence[Sequence[Mapping[str, np.ndarray]]]
) -> dict[int, float]:
    """Draw the curves of all recipes; return where those of each end, on average."""
    ends, shown, highest = {}, [], -np.inf
    for i, tables in enumerate(runs):
        last = []
        for table in tables:
            values = np.asarray(table.get(name, ()), float)
            known = values[np.isfinite(values)]
            if not len(known):
                continue
            every = max(len(values) // 6, 1)
            axes.plot(table["epoch"], values, **_look(i), linewidth=1.3, markersize=4,
                      markevery=(i % every, every))  # fmt: skip
            last.append(known[-1])
            highest = max(highest, known.max())
            # runs differ by little in the end: leave out the steep start, unless it is low
            shown += [known.min(), known[len(values) // 6 :].max(initial=-np.inf), known[-1]]
        if last:
            ends[i] = float(np.mean(last))
    axes.margins(x=0.01)
    if shown:
        pad = 0.05 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - pad, max(shown) + pad)
        if highest > max(shown) + pad:
            axes.set_title(f"{axes.get_title('left')}, without its steep start")
    return ends


def _name_ends(axes: Any, beside: Any, ends: Mapping[int, float], recipes: Sequence[str]) -> None:
    """Name curves beside the panel, each as near to its end as the others allow."""
    low, high = axes.get_ylim()
    wanted = (np.array(list(ends.values())) - low) / (high - low)
    gap = 12 * beside.figure.dpi / 72 / beside.get_window_extent().height
    for i, end, place in zip(ends, wanted, _spread(wanted, gap), strict=True):
        look = _look(i)
        beside.plot([0, 0.16, 0.3], [end, place, place], color=look["color"],
                    linestyle=look["linestyle"], linewidth=1.2, clip_on=False)  # fmt: skip
        beside.plot(0.23, place, color=look["color"], marker=look["marker"], markersize=4,
                    clip_on=False)  # fmt: skip
        beside.text(0.34, place, recipes[i], va="center", fontsize=_SMALL).set_in_layout(False)


def agreement(rows: Sequence[Agreement]) -> Figure:
    """Draw how far pairs of runs agree, next to pairs that differ in nothing but the seed.

    Pairs with the same label share a row. Bars are intervals; a band for each kind of pair that
    differs in the seed alone, from its least to its greatest bound.
    """
    names = _known(_AGREEMENT, (row.measures for row in rows))
    kinds = list(dict.fromkeys((not row.only_seed, row.label) for row in rows))
    kinds.sort(key=lambda kind: kind[0])  # those of seeds first
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 1.4 + 0.27 * len(kinds)), layout="constrained")
        if not names:
            return _nothing(figure)
        panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
        for axes, name in zip(panels, names, strict=True):
            axes.set(title=_title(name), xlabel=_AXES[name])
            for y, (other, label) in enumerate(kinds):
                same = [r for r in rows if (r.label, r.only_seed) == (label, not other)]
                found = [r.measures[name] for r in same if name in r.measures]
                _draw_row(axes, y, found, _PAIR if other else _SEEDS)
        labels = [label if other else f"{label} (seeds)" for other, label in kinds]
        _set_rows(panels[0], labels)
        band = Patch(color=_SEEDS["color"], alpha=_BAND, linewidth=0)
        handles = {
            "differ in the seed alone": Line2D([], [], linestyle="none", **_SEEDS),
            "their range": band,
            "differ in the recipe": Line2D([], [], linestyle="none", **_PAIR),
            "null": Line2D([], [], linestyle=_NULL, **_RULE),
        }
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    return figure


def _draw_row(axes: Any, y: int, found: Sequence[Measure], look: Mapping[str, Any]) -> None:
    value, low, high, null = _parts(found, "value", "low", "high", "null")
    bounds = np.concatenate([value, low, high])
    if look is _SEEDS and np.isfinite(bounds).any():
        span = np.nanmin(bounds), np.nanmax(bounds)
        axes.axvspan(*span, color=look["color"], alpha=_BAND, linewidth=0, zorder=0)
    count = len(found)
    places = y + (np.arange(count) - (count - 1) / 2) * 0.6 / max(count, 3)
    axes.plot([low, high], [places] * 2, color=look["color"], linewidth=1.2)
    axes.plot(value, places, linestyle="none", **look, label=look["marker"])
    axes.plot([null] * 2, [np.full(count, y - 0.5), np.full(count, y + 0.5)], linestyle=_NULL,
              **_RULE)  # fmt: skip


def _set_rows(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    for panel in axes.figure.axes:
        panel.grid(axis="y", color=_FAINT, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(left=False)


def times(rows: Mapping[str, np.ndarray]) -> Figure:
    """Draw Table 1 of the paper: seconds per epoch, relative to the first recipe's median.

    Parameters
    ----------
    rows
        Recipe -> seconds per epoch in each round, `(rounds,)`.
    """
    middles = {name: _median(seconds) for name, seconds in rows.items()}
    with mpl.rc_context(STYLE):
        size = (0.75 * _WIDTH, 1.4 + 0.32 * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        if not rows:
            return _nothing(figure)
        axes = figure.subplots()
        first, unit = next(iter(middles.items()))
        axes.axvline(1, linestyle=_NULL, **_RULE)
        marks: list[dict[str, Any]] = [
            {"color": _COLOURS[0], "marker": "|", "markersize": 9, "label": "a round"},
            {"color": _COLOURS[1], "marker": "o", "markersize": 6.5, "label": "median"},
        ]
        for y, (name, seconds) in enumerate(rows.items()):
            for look, values in zip(marks, (seconds, [middles[name]]), strict=True):
                ratios = np.asarray(values, float) / unit
                axes.plot(ratios, np.full(len(ratios), y), linestyle="none", **look)
            _note(axes, f"{number(middles[name])} s", y)
        _set_rows(axes, list(rows))
        axes.set(title="Time per epoch", xlabel=f"seconds per epoch, relative to {first}")
        handles = [Line2D([], [], linestyle="none", **look) for look in marks]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _median(seconds: np.ndarray) -> float:
    known = np.asarray(seconds)[np.isfinite(seconds)]
    return float(np.median(known)) if len(known) else float("nan")


def volumes(pictures: Sequence[np.ndarray], names: Sequence[str], colours: Sequence[str]) -> Figure:
    """Draw pictures of volumes `(pixels, pixels, 4)` in a row, framed and named."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.4 * len(pictures), 2.4), layout="constrained")
        axes = figure.subplots()
        axes.set_axis_off()
        for i, (picture, name, colour) in enumerate(zip(pictures, names, colours, strict=True)):
            draw_volume(axes, picture, (1.05 * i, 0), name, colour)
        axes.set(xlim=(-0.02, 1.05 * len(pictures)), ylim=(1.02, -0.02))
    return figure
