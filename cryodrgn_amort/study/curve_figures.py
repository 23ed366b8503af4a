"""Figures of curves: measures against the size of a transform, losses against the epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from sklearn.isotonic import isotonic_regression

from cryodrgn_amort.report import STYLE
from cryodrgn_amort.study.drawing import (
    IDEAL,
    MARKERS,
    NULL,
    RULE,
    SMALL,
    WIDTH,
    columns_of,
    look_of,
    note,
    nothing,
    those_known,
    unit_label,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cryodrgn_amort.measures import Measure


__all__ = ["INVARIANCE", "Curve", "invariance", "losses"]

INVARIANCE = (
    "retrieval_rank", "displacement", "latent_correlation", "amortization_loss_fraction",
)  # fmt: skip
"""Measures of how far latents stay where they are."""

_LOSSES = {
    "gen_loss": ("Reconstruction loss", "mean squared error per pixel"),
    "kld": ("KL divergence", "nats per particle"),
    "loss": ("Total loss", "reconstruction + weighted KL"),
}
_AMOUNTS = {"shift": "shift (px)", "angle": "angle (degrees)"}


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
    names = those_known(INVARIANCE, (curve.values for curve in every))
    looks = _curve_looks([curve.label for curve in every])
    with mpl.rc_context(STYLE):
        size = (1.2 + 4.4 * len(curves), 0.9 + 2.2 * max(len(names), 1))
        figure = Figure(figsize=size, layout="constrained")
        if not names:
            return nothing(figure)
        grid = figure.subplots(len(names), len(curves), squeeze=False, sharex="col", sharey="row")
        for column, (title, found) in zip(grid.T, curves.items(), strict=True):
            for axes, name in zip(column, names, strict=True):
                _draw_measure(axes, name, found, looks)
            steps = [1, 1.5, 3, 4.5, 9, 10] if title == "angle" else [1, 2, 5, 10]
            column[-1].xaxis.set_major_locator(MaxNLocator(9, steps=steps))
            column[-1].set_xlabel(_AMOUNTS.get(title, title))
            column[0].set_title(title.capitalize())
        for axes, name in zip(grid[:, 0], names, strict=True):
            axes.set_ylabel(unit_label(name))
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
                marker = MARKERS[len(looks) % len(MARKERS)]
                looks[label] = {**look_of(i), "marker": marker, "markersize": 4.5, "linewidth": 1.4}
    return looks


def _draw_measure(
    axes: Any, name: str, curves: Sequence[Curve], looks: Mapping[str, dict[str, Any]]
) -> None:
    drawn = [curve for curve in curves if curve.values.get(name)]
    nulls, ideals = (
        [columns_of(c.values[name], part)[0] for c in drawn] for part in ("null", "ideal")
    )
    one_null = len({level for null in nulls for level in null}) == 1
    for curve, null, ideal in zip(drawn, nulls, ideals, strict=True):
        look = looks[curve.label]
        value, low, high = columns_of(curve.values[name], "value", "low", "high")
        axes.plot([curve.x] * 2, [low, high], color=look["color"], linewidth=1.2, alpha=0.6)
        # at size 0 it is the ideal, by definition
        axes.plot([0, *curve.x], [ideal[0], *value], **look, label=curve.label)
        axes.plot([0, *curve.x], [ideal[0], *ideal], linestyle=IDEAL, **RULE)
        own = {} if one_null else {"color": look["color"], "marker": look["marker"]}
        axes.plot(curve.x, null, linestyle=NULL, **{**RULE, **own, "markersize": 2.5})
    for text, levels in (("null", nulls), ("ideal", ideals)):
        ends = [level[-1] for level in levels if np.isfinite(level[-1])]
        if ends:
            note(axes, text, ends[0])


def losses(curves: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> Figure:
    """Draw reconstruction loss, KL divergence and their sum against the epoch, of all runs.

    Parameters
    ----------
    curves
        Recipe -> one table per seed, with the columns ``epoch``, ``gen_loss``, ``kld`` and
        ``loss`` of metrics.csv, `(epochs,)` each.
    """
    names = those_known(list(_LOSSES), (table for tables in curves.values() for table in tables))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 3.0 * max(len(names), 1)), layout="constrained")
        if not names:
            return nothing(figure)
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
            axes.plot(table["epoch"], values, **look_of(i), linewidth=1.3, markersize=4,
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
        look = look_of(i)
        beside.plot([0, 0.16, 0.3], [end, place, place], color=look["color"],
                    linestyle=look["linestyle"], linewidth=1.2, clip_on=False)  # fmt: skip
        beside.plot(0.23, place, color=look["color"], marker=look["marker"], markersize=4,
                    clip_on=False)  # fmt: skip
        beside.text(0.34, place, recipes[i], va="center", fontsize=SMALL).set_in_layout(False)
