"""Figures of an evaluation. They draw what was measured and compute nothing.

Every function returns a ``matplotlib.figure.Figure`` of its own; no global state is touched.
Colours are those of Okabe and Ito, and nothing is told by colour alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from scipy.ndimage import map_coordinates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cryodrgn_amort.results import Embedding, TransformResult

__all__ = [
    "MOST_VOLUMES",
    "THRESHOLD_RULE",
    "embeddings",
    "latent_map",
    "numbers",
    "ranks",
    "surface",
    "surfaces",
]

ORIGINAL, MOVED, LINK = "#c8102e", "#00875f", "#7a3fa0"  # red, green, purple, as in the paper
HELD, FOLLOW = "#0072b2", "#d55e00"
_GREY = "#b9bec4"
_CLASSES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#5a5a5a", "#b8a900")
_MARKERS = "osD^vPXp"
_STYLE = {
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
}

MOST_VOLUMES = 10
"""Volumes of more labelled particles than these are not drawn."""
_GAP = 0.05  # between pictures, of their edge
_SIGMAS = 3.0
THRESHOLD_RULE = f"mean + {_SIGMAS:g} standard deviations of the first particle's volume"
"""How the one density threshold of all surfaces in a figure is chosen."""
_SURFACE_BOX = 64  # larger volumes are averaged down to at most this
_SURFACE_PIXELS = 128
_ELEVATION_DEG, _AZIMUTH_DEG = 25.0, 35.0
_LIGHT = (-0.45, 0.6, 0.66)  # right, up, towards the viewer
_BODY = (0.60, 0.71, 0.84)


def numbers(count: int) -> list[str]:
    """Return what the labelled particles are called, in figures and file names: from 1."""
    return [str(i + 1) for i in range(count)]


def latent_map(
    embedding: Embedding,
    pictures: Sequence[np.ndarray],
    result: TransformResult | None = None,
    moved_pictures: Sequence[np.ndarray] = (),
) -> Figure:
    """Draw where the labelled particles lie among all, and what they decode to.

    With a result, figures 10 and 11 of the paper: particles red, transformed copies green with a
    prime, purple lines join them, volumes of both beside. Without, figures 3 to 9: particles and
    their volumes.

    Parameters
    ----------
    embedding
        Must hold ``result.key``.
    pictures, moved_pictures
        What ``surfaces`` made of the volumes that were decoded at particles and copies.
    """
    columns, edge = (5, 1.22) if result is not None else (4, 1.5)  # edge of a picture, inches
    columns = min(len(pictures), columns)
    groups = -(-len(pictures) // columns)
    pitch = 1 + _GAP if result is None else 2 + 3 * _GAP  # from one group of rows to the next
    with mpl.rc_context(_STYLE):
        height = max(edge * groups * pitch + 0.6, 5.2)
        figure = Figure(figsize=(5.8 + edge * columns, height), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[5.8, edge * columns])
        _draw_map(left, embedding, result)
        right.set_axis_off()
        for i, name in enumerate(numbers(len(pictures))):
            at = (i % columns * (1 + _GAP), i // columns * pitch)
            _draw_volume(right, pictures[i], at, name, ORIGINAL)
            if result is not None:
                below = (at[0], at[1] + 1 + _GAP)
                _draw_volume(right, moved_pictures[i], below, f"{name}′", MOVED)
        right.set(xlim=(-0.02, columns * (1 + _GAP)), ylim=(groups * pitch, -0.02))
    return figure


def _draw_map(axes: Any, embedding: Embedding, result: TransformResult | None) -> None:
    axes.set(xlabel=embedding.axes[0], ylabel=embedding.axes[1])
    _cloud(axes, embedding.points)
    handles = [_dot(_GREY, "o", "all particles"), _dot(ORIGINAL, "o", "particles 1, 2, …")]
    if result is not None:
        axes.set_title(f"{result.title}, {result.mode}")
        handles.append(_dot(MOVED, "^", "transformed copies 1′, 2′, …"))
        moved = embedding.moved[result.key]
        for (x0, y0), (x1, y1) in np.stack([embedding.labelled, moved], 1):
            axes.plot([x0, x1], [y0, y1], color=LINK, linewidth=1.2, alpha=0.85, zorder=3)
        _draw_numbered(axes, moved, MOVED, "^", "′")
    _draw_numbered(axes, embedding.labelled, ORIGINAL, "o", "")
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3,
                columnspacing=1.0, handletextpad=0.2)  # fmt: skip


def _draw_numbered(axes: Any, points: np.ndarray, colour: str, marker: str, prime: str) -> None:
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    axes.scatter(*points.T, s=34, c=colour, marker=marker, edgecolors="white", linewidths=0.8,
                 zorder=4)  # fmt: skip
    for name, point in zip(numbers(len(points)), points, strict=True):
        axes.annotate(f"{name}{prime}", point, (4, 4), textcoords="offset points", color=colour,
                      weight="bold", path_effects=halo, zorder=5)  # fmt: skip


def _cloud(axes: Any, points: np.ndarray, **how: Any) -> Any:
    how = {"c": _GREY, "linewidths": 0, "zorder": 1, "rasterized": True, **how}
    return axes.scatter(*points.T, s=_dot_size(len(points)), **how)


def _dot_size(count: int) -> float:
    return float(np.clip(6000 / max(count, 1), 2, 22))


def _dot(colour: str, marker: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)


def _draw_volume(
    axes: Any, picture: np.ndarray, at: tuple[float, float], name: str, colour: str
) -> None:
    x, y = at
    axes.imshow(picture, interpolation="bilinear", extent=(x, x + 1, y + 1, y))
    axes.add_patch(Rectangle(at, 1, 1, fill=False, edgecolor=colour, linewidth=1.6))
    axes.text(x + 0.04, y + 0.04, name, color=colour, weight="bold", va="top")
    if not picture[..., 3].any():
        axes.text(x + 0.5, y + 0.5, "nothing above\nthe threshold", ha="center", va="center",
                  fontsize=7, color="#555555")  # fmt: skip


def surfaces(volumes: np.ndarray, like: np.ndarray | None = None) -> list[np.ndarray]:
    """Render volumes `(L, box, box, box)` under one threshold, from one direction.

    Parameters
    ----------
    like
        Volumes whose threshold (``THRESHOLD_RULE``) and scale are used; ``volumes`` unless given.

    Returns
    -------
    list of np.ndarray
        RGBA of the first ten, see ``surface``.
    """
    like = volumes if like is None else like
    level = float(like[0].mean() + _SIGMAS * like[0].std())
    reach = _reach(like[:MOST_VOLUMES], level)
    return [surface(volume, level, reach) for volume in volumes[:MOST_VOLUMES]]


def _smaller(volume: np.ndarray) -> np.ndarray:
    """Average down to at most ``_SURFACE_BOX``."""
    by = -(-volume.shape[0] // _SURFACE_BOX)
    box = volume.shape[0] // by
    cut = volume[: box * by, : box * by, : box * by]
    return np.asarray(cut.reshape(box, by, box, by, box, by).mean((1, 3, 5)), np.float32)


def _reach(volumes: np.ndarray, level: float) -> float:
    """Half the edge of the part that is shown, as a fraction of half the box; for all the same."""
    reach = 0.0
    for volume in volumes:
        axis = np.linspace(-1, 1, volume.shape[0]) ** 2
        radius = np.sqrt(axis[:, None, None] + axis[:, None] + axis)[volume > level]
        if len(radius):
            reach = max(reach, float(np.percentile(radius, 99)))
    return float(np.clip(reach, 0.3, 1.0)) if reach else 1.0


def surface(volume: np.ndarray, level: float, reach: float = 1.0) -> np.ndarray:
    """Render the surface of `(box, box, box)` where the density reaches ``level``.

    Parallel rays from a fixed direction; the surface is lit along the density's gradient. Nothing
    is drawn where no ray meets it, so an empty or a constant volume gives an empty picture.

    Parameters
    ----------
    reach
        Half the edge of the picture as a fraction of half the box.

    Returns
    -------
    np.ndarray
        RGBA `(128, 128, 4)`, each from 0 to 1.
    """
    volume = np.nan_to_num(_smaller(volume))
    half = volume.shape[0] / 2
    right, up, to_viewer = _camera()
    across = np.linspace(-reach, reach, _SURFACE_PIXELS) * half
    depth = np.linspace(1, -1, 2 * volume.shape[0]) * half * min(1.75 * reach, 1.75)
    plane = across[None, :, None] * right - across[:, None, None] * up  # (pixels, pixels, 3)
    ray = plane[:, :, None] + depth[:, None] * to_viewer
    density = _sample(volume, ray)
    above = density > level
    first = above.argmax(2)
    hit = np.asarray(above.any(2))
    before = np.maximum(first - 1, 0)
    inside = np.take_along_axis(density, first[..., None], 2)[..., 0]
    outside = np.take_along_axis(density, before[..., None], 2)[..., 0]
    rise = np.where(inside > outside, inside - outside, 1.0)
    part = np.where(first > 0, np.clip((level - outside) / rise, 0, 1), 0.0)
    where = plane + (depth[before] + part * (depth[first] - depth[before]))[..., None] * to_viewer

    gradient = np.stack([_sample(g, where) for g in np.gradient(volume)], -1)
    normal = -gradient / np.maximum(np.linalg.norm(gradient, axis=-1, keepdims=True), 1e-12)
    light = np.array(_LIGHT) @ np.stack([right, up, to_viewer])
    light /= np.linalg.norm(light)
    lit = np.clip(normal @ light, 0, 1)
    facing = np.clip(normal @ to_viewer, 0, 1)
    gloss = np.clip(normal @ ((light + to_viewer) / np.linalg.norm(light + to_viewer)), 0, 1) ** 25
    shade = 0.22 + 0.58 * lit + 0.30 * facing
    colour = np.clip(shade[..., None] * np.array(_BODY) + 0.22 * gloss[..., None], 0, 1)
    return np.concatenate([colour, hit[..., None].astype(float)], -1)


def _camera() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the picture's right, up and towards-the-viewer in the volume's axes (z, y, x)."""
    elevation, azimuth = np.deg2rad([_ELEVATION_DEG, _AZIMUTH_DEG])
    forward = np.array([0.0, np.sin(azimuth), np.cos(azimuth)])
    upright = np.array([1.0, 0.0, 0.0])
    to_viewer = np.sin(elevation) * upright + np.cos(elevation) * forward
    up = np.cos(elevation) * upright - np.sin(elevation) * forward
    right = np.array([0.0, np.cos(azimuth), -np.sin(azimuth)])
    return right, up, to_viewer


def _sample(volume: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Interpolate at positions from the centre, in voxels: `(..., 3)` -> `(...)`."""
    centre = (volume.shape[0] - 1) / 2
    found = map_coordinates(volume, np.moveaxis(where, -1, 0) + centre, order=1)
    return np.asarray(found)


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
    with mpl.rc_context(_STYLE):
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
        # a dollar sign would start mathematics
        handles.append(_dot(*_class_look(label), name[:24].replace("$", r"\$")))
    if len(found) > most:
        handles.append(Line2D([], [], linestyle="none", label=f"and {len(found) - most} more"))
    return handles


def ranks(results: Sequence[TransformResult]) -> Figure:
    """Draw how retrieval ranks and displacements are distributed, against their null values.

    One column per transform, both modes in it. If a transform destroyed everything, ranks would
    follow the dotted diagonal; if it changed nothing, the curve would rise to 1 at rank 0.
    """
    names = list(dict.fromkeys(r.name for r in results))
    with mpl.rc_context(_STYLE):
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
                axes.legend(loc="lower right")
        for axes in grid[:, 0]:
            axes.set_ylabel("fraction of particles at or below")
    return figure


def _draw_curves(axes: Any, results: Sequence[TransformResult], name: str) -> None:
    styles = {"held": (HELD, "-", 3.0), "follow": (FOLLOW, "--", 1.8)}
    for result in results:
        values = np.sort(result.arrays[name][np.isfinite(result.arrays[name])])
        if not len(values):
            continue
        colour, line, width = styles.get(result.mode, ("black", "-.", 1.8))
        share = np.arange(1, len(values) + 1) / len(values)
        # from 0, so that a curve that rises at once is seen
        axes.step([0, *values], [0, *share], where="post", color=colour, linestyle=line,
                  linewidth=width, label=f"{result.mode}, {_middle(result, name)}")  # fmt: skip


def _middle(result: TransformResult, name: str) -> str:
    kind = "mean" if name == "retrieval_rank" else "median"
    return f"{kind} {result.measures[name].value:.3g}"
