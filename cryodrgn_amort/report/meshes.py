"""Volumes as shaded surfaces: the triangles by marching cubes, and a picture of them.

All volumes of a figure have one density threshold, one direction of view and one scale. The report
holds the same meshes for ``templates/viewer.js``, which turns them under the mouse: it starts from
the camera, light and shading that are defined here (``LOOK``).

Geometry, stated once. A volume is indexed ``[z, y, x]``. A vertex is ``(x, y, z)`` from the centre
of the box, in units of half its edge: a right-handed frame, so that nothing is mirrored. On the
screen z points up, y mostly to the right and x mostly to the left, both towards the viewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import to_rgb
from scipy.ndimage import zoom
from skimage.measure import marching_cubes

if TYPE_CHECKING:
    from collections.abc import Sequence


__all__ = [
    "LOOK",
    "THRESHOLD_RULE",
    "VIEW",
    "Mesh",
    "common_reach",
    "isosurfaces",
    "render",
    "render_all",
    "simplified",
]

_SIGMAS = 3.0
THRESHOLD_RULE = f"mean + {_SIGMAS:g} standard deviations of the first particle's volume"
"""How the one density threshold of all surfaces in a figure is chosen."""
_BOX = 64  # larger volumes are averaged down to at most this, small ones doubled
_PIXELS = 200
_FINE = 2  # pictures are drawn at so many times the pixels and averaged, for smooth outlines
_ELEVATION_DEG, _AZIMUTH_DEG = 25.0, 35.0


def _view() -> np.ndarray:
    elevation, azimuth = np.deg2rad([_ELEVATION_DEG, _AZIMUTH_DEG])
    forward = np.array([np.cos(azimuth), np.sin(azimuth), 0.0])
    upright = np.array([0.0, 0.0, 1.0])
    to_viewer = np.sin(elevation) * upright + np.cos(elevation) * forward
    up = np.cos(elevation) * upright - np.sin(elevation) * forward
    return np.stack([np.cross(up, to_viewer), up, to_viewer])


VIEW = _view()
"""Rows: the picture's right, up and towards the viewer, as (x, y, z) of the volume."""
LOOK: dict[str, Any] = {
    "light": [-0.45, 0.60, 0.66],  # where it comes from: right, up, towards the viewer
    "ambient": 0.30,
    "diffuse": 0.52,
    "facing": 0.30,  # light from the viewer
    "gloss": 0.22,
    "shine": 24,  # exponent of the gloss
    "edge": 0.55,  # brightness of outlines
    "step": 0.12,  # jump in depth that makes an outline, in half edges of the picture
}
"""Light and shading, for ``picture`` and for viewer.js. Directions are those of the screen."""


@dataclass(frozen=True, eq=False)
class Mesh:
    """A closed surface of triangles.

    Attributes
    ----------
    vertices
        `(V, 3)`: x, y, z from the centre of the box, in half edges of the box.
    faces
        `(F, 3)`: positions in ``vertices``, counterclockwise as seen from outside.
    """

    vertices: np.ndarray
    faces: np.ndarray

    def normals(self) -> np.ndarray:
        """Return a unit normal at each vertex `(V, 3)`: the mean over its faces, by area."""
        a, b, c = (self.vertices[self.faces[:, i]] for i in range(3))
        across = np.cross(b - a, c - a)  # twice the area long
        total = np.zeros(self.vertices.shape)
        for corner in self.faces.T:
            for axis in range(3):
                total[:, axis] += np.bincount(corner, across[:, axis], len(total))
        return _unit(total)


def isosurfaces(volumes: np.ndarray, like: np.ndarray | None = None) -> list[Mesh]:
    """Find the surfaces of volumes `(L, box, box, box)`, all at one threshold.

    Parameters
    ----------
    like
        Volumes whose threshold (``THRESHOLD_RULE``) is used; ``volumes`` unless given.

    Returns
    -------
    list of Mesh
        Empty where nothing is denser than the threshold, as in a constant volume. Where the density
        reaches the edge of the box the surface is closed there. What is not finite counts as 0.
    """
    first = _finite((volumes if like is None else like)[:1])
    level = 0.0
    if first.size:
        level = float(first.mean(dtype=np.float64) + _SIGMAS * first.std(dtype=np.float64))
    return [_mesh(volume, level) for volume in volumes]


def _finite(volume: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(volume), volume, 0.0)


def _mesh(volume: np.ndarray, level: float) -> Mesh:
    box = volume.shape[0]
    density, start, step = _resampled(volume)
    most = float(density.max()) - level
    if most <= 0 or density.min() == density.max():
        return Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32))
    above = np.maximum((density - level) / most, -1e6)  # in single precision, whatever the unit
    # a shell of empty voxels closes the surface at the edge of the box
    padded = np.pad(above, 1, constant_values=min(float(above.min()), -1.0)).astype(np.float32)
    corners, faces, _, _ = marching_cubes(padded, 0.0)
    # One vertex per cube of eight voxels instead of up to twelve on its edges: a third of the
    # triangles, all of one size, and no slivers, which would show in the shading.
    cubes = np.floor(corners).astype(np.int64)
    corners, faces = _merged(corners, faces, cubes)
    voxels = (corners - 1) * step + start  # of the volume as given
    vertices = (voxels[:, ::-1] - (box - 1) / 2) / (box / 2)
    # the library's faces turn clockwise in (z, y, x), so counterclockwise in (x, y, z)
    return Mesh(vertices.astype(np.float32), faces.astype(np.int32))


def _resampled(volume: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Average a large volume down, and put voxels half way between those of a small one.

    Returns
    -------
    tuple
        The new volume; where its first voxel is, and the distance of two, in voxels of the old.
    """
    box = volume.shape[0]
    if 1 < box <= _BOX // 2:
        return np.asarray(zoom(_finite(volume), (2 * box - 1) / box, order=1)), 0.0, 0.5
    by = -(-box // _BOX)
    small = box // by
    volume = volume[: small * by, : small * by, : small * by]
    with np.errstate(invalid="ignore"):
        for axis in range(3):  # one after the other is many times faster
            shape = (*volume.shape[:axis], small, by, *volume.shape[axis + 1 :])
            volume = volume.reshape(shape).mean(axis + 1)
    return _finite(volume), (by - 1) / 2, float(by)


def _merged(
    vertices: np.ndarray, faces: np.ndarray, cell: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Replace vertices that are in the same cell, `(V, 3)` from 0, by their mean."""
    key = np.ravel_multi_index(tuple(cell.T), tuple(cell.max(0) + 1))
    _, place = np.unique(key, return_inverse=True)
    means = [np.bincount(place, along) / np.bincount(place) for along in vertices.T]
    a, b, c = place[faces.T]
    return np.stack(means, 1), place[faces][(a != b) & (b != c) & (c != a)]


def common_reach(shown: Sequence[Mesh]) -> float:
    """Return half the edge of the pictures, in half edges of the box: one scale for all."""
    radii = [np.percentile(np.linalg.norm(m.vertices, axis=1), 99) for m in shown if len(m.faces)]
    return float(np.clip(1.05 * max(radii, default=1.0), 0.3, 1.0))


def simplified(mesh: Mesh, cells: int) -> Mesh:
    """Merge the vertices in each of ``cells``³ cells of the box into their mean."""
    if not len(mesh.faces):
        return mesh
    # where it is closed, a surface may lie half a voxel outside of the box
    cell = np.floor((mesh.vertices + 1.0) * (cells / 2)).astype(np.int64)
    vertices, faces = _merged(mesh.vertices, mesh.faces, cell - cell.min(0))
    return Mesh(vertices.astype(np.float32), faces.astype(np.int32))


def render(mesh: Mesh, colour: str, reach: float = 1.0) -> np.ndarray:
    """Draw a mesh as seen from ``VIEW``, in parallel projection, lit as ``LOOK`` says.

    Parameters
    ----------
    colour
        Any that matplotlib knows.
    reach
        Half the edge of the picture, in half edges of the box.

    Returns
    -------
    np.ndarray
        RGBA `(200, 200, 4)`, each from 0 to 1; transparent where there is nothing.
    """
    edge = _FINE * _PIXELS
    body = np.array(to_rgb(colour))
    seen = mesh.vertices @ VIEW.T / reach
    x, y = (1 + seen[:, 0]) * edge / 2 - 0.5, (1 - seen[:, 1]) * edge / 2 - 0.5  # pixel centres
    pixel, face, weight = _nearest(x, y, seen[:, 2], mesh.faces, edge)
    corners = mesh.faces[face]
    normal = np.einsum("pi,pij->pj", weight, (mesh.normals() @ VIEW.T)[corners])
    depth = np.full(edge * edge, -np.inf)
    depth[pixel] = (weight * seen[:, 2][corners]).sum(1)
    light = np.zeros((edge * edge, 4))
    light[pixel, :3] = _lit(_unit(normal), body)
    light[pixel, 3] = 1
    light[_outline(depth.reshape(edge, edge)).ravel(), :3] *= LOOK["edge"]
    # averaged with what is transparent counting as nothing, not as black
    small = light.reshape(_PIXELS, _FINE, _PIXELS, _FINE, 4).mean((1, 3))
    small[..., :3] /= np.maximum(small[..., 3:], 1e-9)
    return np.asarray(small)


def render_all(shown: Sequence[Mesh], colours: Sequence[str], reach: float) -> list[np.ndarray]:
    """Draw several, each in its colour, all at one scale: see ``render``."""
    return [render(mesh, colour, reach) for mesh, colour in zip(shown, colours, strict=True)]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))


def _lit(normal: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Colour a surface with unit normals `(P, 3)` of the screen: `(P, 3)`."""
    to_light = _unit(np.array(LOOK["light"]))
    between = _unit(to_light + np.array([0, 0, 1]))
    lit = np.clip(normal @ to_light, 0, 1)
    facing = np.clip(normal[:, 2], 0, 1)
    shade = LOOK["ambient"] + LOOK["diffuse"] * lit + LOOK["facing"] * facing
    gloss = LOOK["gloss"] * np.clip(normal @ between, 0, 1) ** LOOK["shine"]
    return np.asarray(np.clip(shade[:, None] * body + gloss[:, None], 0, 1))


def _outline(depth: np.ndarray) -> np.ndarray:
    """Tell which pixels have a neighbour that lies far behind or shows nothing."""
    behind = np.pad(depth, 1, mode="edge")
    around = [behind[:-2, 1:-1], behind[2:, 1:-1], behind[1:-1, :-2], behind[1:-1, 2:]]
    return np.asarray(depth > np.minimum.reduce(around) + LOOK["step"])


def _nearest(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, faces: np.ndarray, edge: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the face that is nearest to the viewer at each pixel of a picture `(edge, edge)`.

    Parameters
    ----------
    x, y, z
        Of the vertices: to the right and down in pixels, and towards the viewer.

    Returns
    -------
    tuple
        For the `P` pixels where there is one: pixel, face, and the weights of its corners `(P, 3)`.
    """
    ax, bx, cx = x[faces.T]
    ay, by, cy = y[faces.T]
    area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    x_low, x_high = np.ceil(np.min([ax, bx, cx], 0)), np.floor(np.max([ax, bx, cx], 0))
    y_low, y_high = np.ceil(np.min([ay, by, cy], 0)), np.floor(np.max([ay, by, cy], 0))
    x_low, y_low = np.maximum(x_low, 0), np.maximum(y_low, 0)
    wide = np.clip(np.minimum(x_high, edge - 1) - x_low + 1, 0, None).astype(np.int64)
    high = np.clip(np.minimum(y_high, edge - 1) - y_low + 1, 0, None).astype(np.int64)
    count = np.where(
        area < 0, wide * high, 0
    )  # only faces that are turned to the viewer: y is down

    # one entry for each pixel in the rectangle around each face
    face = np.repeat(np.arange(len(faces)), count)
    step = np.arange(len(face)) - np.repeat(np.cumsum(count) - count, count)
    px, py = x_low[face] + step % wide[face], y_low[face] + step // wide[face]
    b = ((px - ax[face]) * (cy - ay)[face] - (cx - ax)[face] * (py - ay[face])) / area[face]
    c = ((bx - ax)[face] * (py - ay[face]) - (px - ax[face]) * (by - ay)[face]) / area[face]
    inside = (b >= -1e-6) & (c >= -1e-6) & (b + c <= 1 + 1e-6)
    face, b, c = face[inside], b[inside], c[inside]
    pixel = (py[inside] * edge + px[inside]).astype(np.int64)
    weight = np.stack([1 - b - c, b, c], 1)
    order = np.argsort((weight * z[faces[face]]).sum(1))
    owner = np.full(edge * edge, -1)
    owner[pixel[order]] = order  # of several, the last one stays: the nearest
    pixel = np.flatnonzero(owner >= 0)
    chosen = owner[pixel]
    return pixel, face[chosen], weight[chosen]
