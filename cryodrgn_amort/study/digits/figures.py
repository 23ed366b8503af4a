"""Figures 12 to 19 of the paper: they draw what was measured and compute nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cryodrgn_amort.report import STYLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cryodrgn_amort.measures import Measure


__all__ = ["latents", "losses", "rank_curves", "reconstructions"]

# told apart with any colour vision (M. A. Petroff, arXiv:2107.02270); the legend gives the digits
_COLOURS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300",
            "#b9ac70", "#717581", "#92dadd")  # fmt: skip
_MARKERS = "osD^vPXp<>"
_LINES = {"vae": ("#0072b2", "-", "o"), "twin": ("#d55e00", "--", "s"),
          "noise": ("#5a5a5a", "-.", "^")}  # fmt: skip
_MOST_POINTS = 6000


def losses(history: Sequence[Mapping[str, float]]) -> Figure:
    """Draw reconstruction loss, divergence and their sum by epoch, in nats per image."""
    epochs = [row["epoch"] for row in history]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(epochs, [row["loss"] for row in history], color="#0072b2", label="total")
        left.plot(epochs, [row["reconstruction"] for row in history], "--", color="#d55e00",
                  label="reconstruction")  # fmt: skip
        right.plot(epochs, [row["kl"] for row in history], color="#009e73", label="KL")
        for axes in (left, right):
            axes.set(xlabel="epoch", ylabel="nats per image")
            axes.legend()
    return figure


def latents(
    z: np.ndarray, labels: np.ndarray, moved: np.ndarray | None = None, title: str = ""
) -> Figure:
    """Draw the first two latent dimensions `(N, 2 or more)`, coloured by digit.

    With ``moved``, these in place of them, and the former in pale grey beneath.
    """
    rows = np.random.default_rng(0).permutation(len(z))[:_MOST_POINTS]
    shown = z if moved is None else moved
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.2), layout="constrained")
        axes = figure.subplots()
        if moved is not None:
            axes.scatter(*_plane(z[rows]), s=3, c="#dddddd", linewidths=0, rasterized=True)
        for digit in range(10):
            of_digit = rows[labels[rows] == digit]
            axes.scatter(*_plane(shown[of_digit]), s=7, c=_COLOURS[digit], marker=_MARKERS[digit],
                         linewidths=0, alpha=0.8, rasterized=True)  # fmt: skip
        handles = [
            Line2D([], [], color=_COLOURS[d], marker=_MARKERS[d], linestyle="none", label=str(d))
            for d in range(10)
        ]
        axes.legend(handles=handles, title="digit", loc="center left", bbox_to_anchor=(1, 0.5))
        second = "z 2" if z.shape[1] > 1 else "(z has one dimension)"
        axes.set(xlabel="z 1", ylabel=second, title=title)
    return figure


def _plane(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return z[:, 0], z[:, 1] if z.shape[1] > 1 else np.zeros(len(z))


def reconstructions(shown: np.ndarray, decoded: np.ndarray) -> Figure:
    """Draw pictures `(M, 28, 28)` above what they decode to."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.05 * len(shown) + 0.9, 2.3), layout="constrained")
        grid: Any = figure.subplots(2, len(shown), squeeze=False)
        for row, pictures, name in zip(grid, (shown, decoded), ("shown", "decoded"), strict=True):
            for number, (axes, picture) in enumerate(zip(row, pictures, strict=True), 1):
                axes.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
                if pictures is shown:
                    axes.set_title(str(number))
            row[0].set_ylabel(name)
    return figure


def rank_curves(curves: Mapping[str, Mapping[int, Sequence[Measure]]]) -> Figure:
    """Draw retrieval rank against shift.

    Parameters
    ----------
    curves
        Method -> pixels -> the measure of each seed.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.0, 3.8), layout="constrained")
        axes = figure.subplots()
        for method, by_shift in curves.items():
            colour, line, marker = _LINES.get(method, ("black", ":", "x"))
            shifts = list(by_shift)
            means = [np.mean([m.value for m in by_shift[s]]) for s in shifts]
            axes.plot(shifts, means, line, marker=marker, color=colour, label=method)
            for shift in shifts:
                found = [(m.low, m.high) for m in by_shift[shift] if m.low is not None]
                if found:
                    lows, highs = zip(*found, strict=True)
                    axes.plot([shift] * 2, [min(lows), max(highs)], color=colour, linewidth=1)
        axes.axhline(0.5, linestyle=":", color="black", label="null: unrelated")
        axes.set(xlabel="shift (px)", ylabel="retrieval rank", ylim=(0, None))
        axes.legend()
    return figure
