"""How the figures of a study look. Colours are those of Okabe and Ito (jfly.uni-koeln.de/color).

Nothing is told by colour alone: line styles and markers differ as well, and lines and points are
named where they are. Every figure is a ``matplotlib.figure.Figure`` of its own; no global state is
touched. Figures draw what was measured and compute nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort.measures import DEFINITIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from matplotlib.figure import Figure

    from cryodrgn_amort.measures import Measure


__all__ = [
    "AXES", "COLOURS", "FAINT", "IDEAL", "INK", "MARKERS", "NULL", "PALE", "RULE", "SMALL", "WIDTH",
    "columns_of", "look_of", "measure_title", "note", "nothing", "set_rows", "those_known",
    "unit_label",
]  # fmt: skip

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (2, 1.5)))
MARKERS = "osD^vP<X>pd"
INK, PALE, FAINT = "#1c2126", "#8a9099", "#e8ebee"
RULE: dict[str, Any] = {"color": INK, "linewidth": 0.9, "zorder": 1}
NULL, IDEAL = ":", (0, (4, 4))
WIDTH = 10.0  # inches: that of a report, so that 10 points are as large as its text
SMALL = 8.5  # points

AXES = {
    "class_knn": "share of particles",
    "coordinate_r2": "share of variance",
    "volume_fve": "share of variance",
    "knn_overlap": "share of 15 neighbours",
    "volume_fsc": "mean correlation",
}
"""What the axis of a measure counts, where its title stands above it."""


def look_of(i: int) -> dict[str, Any]:
    """Return the look of the i-th recipe; any two of the first 28 share one part of it at most."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": LINES[i % len(LINES)],
        "marker": MARKERS[i % len(MARKERS)],
    }


def measure_title(name: str) -> str:
    """Return what a measure is called."""
    found = DEFINITIONS.get(name)
    return found.title if found else name.replace("_", " ")


def unit_label(name: str) -> str:
    """Return what a measure is called, with its unit in a second line."""
    found = DEFINITIONS.get(name)
    return measure_title(name) + (f"\n({found.unit})" if found and found.unit else "")


def those_known(names: Sequence[str], tables: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return those of the names that some table has."""
    tables = list(tables)
    return [name for name in names if any(name in table for table in tables)]


def nothing(figure: Figure) -> Figure:
    """Say in an empty figure why it is empty."""
    figure.text(0.5, 0.5, "nothing of this was measured", ha="center", va="center", color=PALE)
    return figure


def note(axes: Any, text: str, y: float) -> None:
    """Write to the right of the panel, at y in data units."""
    axes.annotate(text, (1, y), (4, 0), xycoords=("axes fraction", "data"),
                  textcoords="offset points", va="center", fontsize=SMALL)  # fmt: skip


def columns_of(found: Sequence[Measure], *names: str) -> list[np.ndarray]:
    """Return value, low, ... of each measure, `(M,)`; NaN where there is none."""
    return [np.array([getattr(m, name) for m in found], float) for name in names]


def set_rows(axes: Any, labels: Sequence[str]) -> None:
    """Give all panels of a figure the rows of ``axes``, from the top, with these labels."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    for panel in axes.figure.axes:
        panel.grid(axis="y", color=FAINT, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(left=False)
