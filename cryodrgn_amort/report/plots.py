"""Figures of an evaluation. They draw what was measured and compute nothing.

Every function returns a ``matplotlib.figure.Figure`` of its own; no global state is touched.
Colours can be told apart with any colour vision (those of Okabe and Ito, and of Petroff), and
nothing is told by colour alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from cryodrgn_amort.measures import ecdf, ecdf_band

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cryodrgn_amort.measures import Embedding
    from cryodrgn_amort.report.results import TransformResult


__all__ = [
    "MOST_VOLUMES",
    "MOVED",
    "ORIGINAL",
    "STYLE",
    "draw_volume",
    "embeddings",
    "latent_map",
    "particle_colours",
    "particle_numbers",
    "ranks",
]

ORIGINAL, MOVED, LINK = "#c8102e", "#00875f", "#7a3fa0"  # red, green, purple, as in the paper
HELD, FOLLOW = "#0072b2", "#d55e00"
_GREY = "#b9bec4"
_CLASSES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#5a5a5a", "#b8a900")
_MARKERS = "osD^vPXp"
# Ten that are told apart with any colour vision: M. A. Petroff, arXiv:2107.02270.
_PARTICLES = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300",
              "#b9ac70", "#717581", "#92dadd")  # fmt: skip
_INK = "#1c2126"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "figure.constrained_layout.hspace": 0.01,
    "figure.constrained_layout.wspace": 0.01,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.framealpha": 0.9,
    "legend.edgecolor": "none",
    "legend.fontsize": 9,
    "text.parse_math": False,  # names may have dollar signs
    "text.usetex": False,
}
MOST_VOLUMES = 10
"""Volumes of more labelled particles than these are not drawn."""
_GAP = 0.05  # between pictures, of their edge


def particle_numbers(count: int) -> list[str]:
    """Return what the labelled particles are called, in figures and file names: from 1."""
    return [str(i + 1) for i in range(count)]


def particle_colours(count: int) -> list[str]:
    """Return a colour for each labelled particle and its volume; they repeat after ten."""
    return [_PARTICLES[i % len(_PARTICLES)] for i in range(count)]


def latent_map(
    embedding: Embedding,
    pictures: Sequence[np.ndarray],
    result: TransformResult | None = None,
    moved_pictures: Sequence[np.ndarray] = (),
) -> Figure:
    """Draw where the labelled particles lie among all, and what they decode to.

    With a result, figures 10 and 11 of the paper: particles red, transformed copies green with a
    prime, purple lines join them, volumes of both beside. Without, figures 3 to 9: particles, each
    in a colour of its own, and their volumes.

    Parameters
    ----------
    embedding
        Must hold ``result.key``.
    pictures, moved_pictures
        RGBA of the volumes that were decoded at particles and copies, ``surfaces.picture``, in the
        colours of their points: ``ORIGINAL`` and ``MOVED``, or else ``colours``.
    """
    columns, edge = (5, 1.22) if result is not None else (4, 1.5)  # edge of a picture, inches
    columns = min(len(pictures), columns)
    groups = -(-len(pictures) // columns)
    pitch = 1 + _GAP if result is None else 2 + 3 * _GAP  # from one group of rows to the next
    with mpl.rc_context(STYLE):
        height = max(edge * groups * pitch + 0.6, 5.2)
        figure = Figure(figsize=(5.8 + edge * columns, height), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[5.8, edge * columns])
        _draw_map(left, embedding, result)
        right.set_axis_off()
        own = particle_colours(len(pictures))
        for i, name in enumerate(particle_numbers(len(pictures))):
            at = (i % columns * (1 + _GAP), i // columns * pitch)
            colour = own[i] if result is None else ORIGINAL
            draw_volume(right, pictures[i], at, name, colour)
            if result is not None:
                below = (at[0], at[1] + 1 + _GAP)
                draw_volume(right, moved_pictures[i], below, f"{name}′", MOVED)
        right.set(xlim=(-0.02, columns * (1 + _GAP)), ylim=(groups * pitch, -0.02))
    return figure


def _draw_map(axes: Any, embedding: Embedding, result: TransformResult | None) -> None:
    axes.set(xlabel=embedding.axes[0], ylabel=embedding.axes[1])
    _cloud(axes, embedding.points)
    count = len(embedding.labelled)
    handles = [_dot(_GREY, "o", "all particles")]
    if result is None:
        handles.append(_dot(_INK, "o", "particles 1, 2, …, each in its volume's colour"))
        _draw_numbered(axes, embedding.labelled, particle_colours(count), "o", "")
    else:
        axes.set_title(f"{result.title}, {result.mode}")
        handles.append(_dot(ORIGINAL, "o", "particles 1, 2, …"))
        handles.append(_dot(MOVED, "^", "transformed copies 1′, 2′, …"))
        moved = embedding.moved[result.key]
        for (x0, y0), (x1, y1) in np.stack([embedding.labelled, moved], 1):
            axes.plot([x0, x1], [y0, y1], color=LINK, linewidth=1.2, alpha=0.85, zorder=3)
        _draw_numbered(axes, moved, [MOVED] * count, "^", "′")
        _draw_numbered(axes, embedding.labelled, [ORIGINAL] * count, "o", "")
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3,
                columnspacing=1.0, handletextpad=0.2)  # fmt: skip


def _draw_numbered(
    axes: Any, points: np.ndarray, own: Sequence[str], marker: str, prime: str
) -> None:
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    axes.scatter(*points.T, s=44, c=own, marker=marker, edgecolors="white", linewidths=0.8,
                 zorder=4)  # fmt: skip
    for name, point, colour in zip(particle_numbers(len(points)), points, own, strict=True):
        axes.annotate(f"{name}{prime}", point, (4, 4), textcoords="offset points",
                      color=_legible(colour), weight="bold", path_effects=halo,
                      zorder=5)  # fmt: skip


def _legible(colour: str) -> str:
    """Return the colour of a number beside such a point: pale ones cannot be read."""
    return colour if colour in (ORIGINAL, MOVED) else _INK


def _cloud(axes: Any, points: np.ndarray, **how: Any) -> Any:
    how = {"c": _GREY, "linewidths": 0, "zorder": 1, "rasterized": True, **how}
    return axes.scatter(*points.T, s=_dot_size(len(points)), **how)


def _dot_size(count: int) -> float:
    return float(np.clip(6000 / max(count, 1), 2, 22))


def _dot(colour: str, marker: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)


def draw_volume(
    axes: Any, picture: np.ndarray, at: tuple[float, float], name: str, colour: str
) -> None:
    """Put a picture of a volume, framed and named, into axes whose unit is the picture's edge."""
    x, y = at
    axes.imshow(picture, interpolation="bilinear", extent=(x, x + 1, y + 1, y))
    axes.add_patch(Rectangle(at, 1, 1, fill=False, edgecolor=colour, linewidth=1.6))
    axes.text(x + 0.04, y + 0.04, name, color=_legible(colour), weight="bold", va="top")
    if not picture[..., 3].any():
        axes.text(x + 0.5, y + 0.5, "nothing above\nthe threshold", ha="center", va="center",
                  fontsize=7, color="#555555")  # fmt: skip


def embeddings(
    shown: Mapping[str, Embedding],
    labels: np.ndarray | None = None,
    coordinate: np.ndarray | None = None,
    names: Sequence[str] = (),
) -> Figure:
    """Draw all particles in the plane, coloured by what is known of them.

    Parameters
    ----------
    labels, coordinate
        A class (integers from 0) and a number per particle `(N,)`. A row of panels for each;
        one row without colours if there is neither.
    names
        Of the classes; numbered if empty.
    """
    kinds = [k for k, v in (("labels", labels), ("coordinate", coordinate)) if v is not None]
    kinds = kinds or [""]
    with mpl.rc_context(STYLE):
        width = 4.4 * max(len(shown), 1) + 1.2
        figure = Figure(figsize=(width, 4.0 * len(kinds)), layout="constrained")
        grid = figure.subplots(len(kinds), max(len(shown), 1), squeeze=False)
        for row, kind in zip(grid, kinds, strict=True):
            for axes, (title, embedding) in zip(row, shown.items(), strict=False):
                axes.set(title=title, xlabel=embedding.axes[0], ylabel=embedding.axes[1])
                if kind == "labels" and labels is not None:
                    _draw_classes(axes, embedding.points, labels[embedding.index])
                elif kind == "coordinate" and coordinate is not None:
                    dots = _cloud(axes, embedding.points, c=coordinate[embedding.index],
                                  cmap="cividis", vmin=coordinate.min(),
                                  vmax=coordinate.max())  # fmt: skip
                else:
                    _cloud(axes, embedding.points, c="#4c6a86", alpha=0.7)
            if not shown:
                row[0].set_axis_off()
                row[0].text(0.5, 0.5, "the latents have one dimension only", ha="center")
            elif kind == "coordinate":
                figure.colorbar(dots, ax=row[-1], label="coordinate (as given)")
            elif kind == "labels" and labels is not None:
                row[-1].legend(handles=_class_handles(labels, names), title="class",
                               loc="center left", bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    return figure


def _class_look(label: int) -> tuple[str, str]:
    # eight colours; the marker changes as well, and goes on changing where colours repeat
    count = len(_CLASSES)
    return _CLASSES[label % count], _MARKERS[(label + label // count) % len(_MARKERS)]


def _draw_classes(axes: Any, points: np.ndarray, labels: np.ndarray) -> None:
    for label in np.unique(labels):
        colour, marker = _class_look(int(label))
        _cloud(axes, points[labels == label], c=colour, marker=marker, alpha=0.85)
    for dots in axes.collections:
        dots.set_sizes([_dot_size(len(points)) * 1.3])


def _class_handles(labels: np.ndarray, names: Sequence[str]) -> list[Line2D]:
    most = 16
    found = [int(label) for label in np.unique(labels)]
    handles = []
    for label in found[:most]:
        name = str(names[label]) if label < len(names) else str(label)
        # what no font has, half of a letter above all, would end all drawing
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in name[:24])
        handles.append(_dot(*_class_look(label), shown))
    if len(found) > most:
        handles.append(Line2D([], [], linestyle="none", label=f"and {len(found) - most} more"))
    return handles


def ranks(results: Sequence[TransformResult]) -> Figure:
    """Draw how retrieval ranks and displacements are distributed, against their null values.

    One column per transform, both modes in it. If a transform destroyed everything, ranks would
    follow the dotted diagonal; if it changed nothing, the curve would rise to 1 at rank 0.
    """
    names = list(dict.fromkeys(r.name for r in results))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(names) + 0.4, 6.6), layout="constrained")
        grid = figure.subplots(2, len(names), squeeze=False, sharey=True)
        for column, name in zip(grid.T, names, strict=True):
            of_name = [r for r in results if r.name == name]
            _draw_curves(column[0], of_name, "retrieval_rank")
            column[0].plot([0, 1], [0, 1], ":", color="black", label="null: unrelated", zorder=1)
            column[0].set(title=of_name[0].title, xlim=(-0.02, 1.02), ylim=(0, 1.02),
                          xlabel="retrieval rank (fraction of other particles)")  # fmt: skip
            _draw_curves(column[1], of_name, "displacement")
            null = of_name[0].measures["displacement"].null
            if null is not None and np.isfinite(null):
                column[1].axvline(null, linestyle=":", color="black", zorder=1,
                                  label="null: to another particle's copy")  # fmt: skip
            column[1].set(xlabel="displacement (median distance of two particles = 1)")
            column[1].set_xlim(left=-0.02)
            for axes in column:
                if axes.get_legend_handles_labels()[0]:  # of a collapsed run, there is no curve
                    axes.legend(loc="lower right")
        for axes in grid[:, 0]:
            axes.set_ylabel("fraction of particles at or below")
    return figure


def calibration(places: Mapping[str, np.ndarray]) -> Figure:
    """Draw how the places of true latents in their posteriors differ from uniform ones."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.2), layout="constrained")
        grid = figure.subplots(2, sharex=True)
        latents = {name: values for name, values in places.items() if name.startswith("latent")}
        others = {name: values for name, values in places.items() if name not in latents}
        for axes, shown in zip(grid, (latents, others), strict=True):
            # all lines of the panel are within the band with this probability
            at, _ = ecdf(np.zeros(1))
            low, high = ecdf_band(len(next(iter(shown.values()))), 1 - 0.05 / len(places))
            axes.fill_between(at, low - at, high - at, color="0.88", label="right posteriors, 95 %")
            axes.axhline(0, linestyle=":", color="black")
            axes.set(xlim=(0, 1), ylabel="share below, less uniform")
        for number, values in enumerate(latents.values()):
            at, share = ecdf(values)
            grid[0].plot(at, share - at, color=HELD, alpha=0.6, linewidth=1.2,
                         label=None if number else "latent dimensions")  # fmt: skip
        for (name, values), (colour, line) in zip(others.items(), _OTHERS, strict=True):
            at, share = ecdf(values)
            grid[1].plot(at, share - at, color=colour, linestyle=line, label=name)
        grid[1].set(xlabel="place of the true latent in its posterior, or rank among draws of it")
        for axes in grid:
            axes.legend(loc="upper right")
    return figure


_OTHERS = ((HELD, "-"), (FOLLOW, "--"))


def _draw_curves(axes: Any, results: Sequence[TransformResult], name: str) -> None:
    styles = {"held": (HELD, "-", 3.0), "follow": (FOLLOW, "--", 1.8)}
    for result in results:
        values = np.sort(result.arrays[name][np.isfinite(result.arrays[name])])
        if not len(values):
            continue
        colour, line, width = styles.get(result.mode, ("black", "-.", 1.8))
        at = np.unique(np.linspace(1, len(values), min(len(values), 2000)).astype(int))
        values, share = values[at - 1], at / len(values)
        # from 0, so that a curve that rises at once is seen
        axes.step([0, *values], [0, *share], where="post", color=colour, linestyle=line,
                  linewidth=width, label=f"{result.mode}, {_middle(result, name)}")  # fmt: skip


def _middle(result: TransformResult, name: str) -> str:
    kind = "mean" if name == "retrieval_rank" else "median"
    return f"{kind} {result.measures[name].value:.3g}"
