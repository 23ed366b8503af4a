"""Figures with a row or a place for each recipe: agreement, times, volumes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cryodrgn_amort.core import number
from cryodrgn_amort.report import STYLE, draw_volume
from cryodrgn_amort.study.drawing import (
    AXES,
    COLOURS,
    NULL,
    RULE,
    WIDTH,
    columns_of,
    measure_title,
    note,
    nothing,
    set_rows,
    those_known,
)
from cryodrgn_amort.study.rows import AGREEMENT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cryodrgn_amort.measures import Measure
    from cryodrgn_amort.study.results import Agreement


__all__ = ["agreement", "times", "volumes"]

_SEEDS: dict[str, Any] = {"color": COLOURS[1], "marker": "D", "markersize": 4.5}
_PAIR: dict[str, Any] = {"color": COLOURS[0], "marker": "o", "markersize": 4.5}
_BAND = 0.15  # opacity


def agreement(rows: Sequence[Agreement]) -> Figure:
    """Draw how far pairs of runs agree, next to pairs that differ in nothing but the seed.

    Pairs with the same label share a row. Bars are intervals; a band for each kind of pair that
    differs in the seed alone, from its least to its greatest bound.
    """
    names = those_known(AGREEMENT, (row.measures for row in rows))
    kinds = list(dict.fromkeys((not row.only_seed, row.label) for row in rows))
    kinds.sort(key=lambda kind: kind[0])  # those of seeds first
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.4 + 0.27 * len(kinds)), layout="constrained")
        if not names:
            return nothing(figure)
        panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
        for axes, name in zip(panels, names, strict=True):
            axes.set(title=measure_title(name), xlabel=AXES[name])
            for y, (other, label) in enumerate(kinds):
                same = [r for r in rows if (r.label, r.only_seed) == (label, not other)]
                found = [r.measures[name] for r in same if name in r.measures]
                _draw_row(axes, y, found, _PAIR if other else _SEEDS)
        labels = [label if other else f"{label} (seeds)" for other, label in kinds]
        set_rows(panels[0], labels)
        band = Patch(color=_SEEDS["color"], alpha=_BAND, linewidth=0)
        handles = {
            "differ in the seed alone": Line2D([], [], linestyle="none", **_SEEDS),
            "their range": band,
            "differ in the recipe": Line2D([], [], linestyle="none", **_PAIR),
            "null": Line2D([], [], linestyle=NULL, **RULE),
        }
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    return figure


def _draw_row(axes: Any, y: int, found: Sequence[Measure], look: Mapping[str, Any]) -> None:
    value, low, high, null = columns_of(found, "value", "low", "high", "null")
    bounds = np.concatenate([value, low, high])
    if look is _SEEDS and np.isfinite(bounds).any():
        span = np.nanmin(bounds), np.nanmax(bounds)
        axes.axvspan(*span, color=look["color"], alpha=_BAND, linewidth=0, zorder=0)
    count = len(found)
    places = y + (np.arange(count) - (count - 1) / 2) * 0.6 / max(count, 3)
    axes.plot([low, high], [places] * 2, color=look["color"], linewidth=1.2)
    axes.plot(value, places, linestyle="none", **look, label=look["marker"])
    axes.plot([null] * 2, [np.full(count, y - 0.5), np.full(count, y + 0.5)], linestyle=NULL,
              **RULE)  # fmt: skip


def times(rows: Mapping[str, np.ndarray]) -> Figure:
    """Draw Table 1 of the paper: seconds per epoch, relative to the first recipe's median.

    Parameters
    ----------
    rows
        Recipe -> seconds per epoch in each round, `(rounds,)`.
    """
    middles = {name: _median(seconds) for name, seconds in rows.items()}
    with mpl.rc_context(STYLE):
        size = (0.75 * WIDTH, 1.4 + 0.32 * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        if not rows:
            return nothing(figure)
        axes = figure.subplots()
        first, unit = next(iter(middles.items()))
        axes.axvline(1, linestyle=NULL, **RULE)
        marks: list[dict[str, Any]] = [
            {"color": COLOURS[0], "marker": "|", "markersize": 9, "label": "a round"},
            {"color": COLOURS[1], "marker": "o", "markersize": 6.5, "label": "median"},
        ]
        for y, (name, seconds) in enumerate(rows.items()):
            for look, values in zip(marks, (seconds, [middles[name]]), strict=True):
                ratios = np.asarray(values, float) / unit
                axes.plot(ratios, np.full(len(ratios), y), linestyle="none", **look)
            note(axes, f"{number(middles[name])} s", y)
        set_rows(axes, list(rows))
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
