"""Parts of the HTML reports: figures, volumes that can be turned, the templates' environment.

A page is one file that loads nothing. Its only script, ``templates/viewer.js``, is allowed by its
hash, and turns the volumes; without it, and on paper, the figures say the same.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from cryodrgn_amort.core import number
from cryodrgn_amort.measures import DEFINITIONS
from cryodrgn_amort.report.meshes import LOOK, VIEW, Mesh, common_reach, simplified

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.figure import Figure


__all__ = ["Picture", "Turnable", "Volume", "capital", "environment", "picture", "turnable"]

_PNG_DPI = 150
_STEPS = 1024  # of vertices, in half an edge of the box
_MOST = 40_000  # characters per volume in the file
_COARSER = (48, 40, 32, 24, 16, 8)


@dataclass(frozen=True)
class Volume:
    """One volume of a page: its name, colour, and mesh (empty: there is no surface)."""

    name: str
    colour: str
    mesh: str


@dataclass(frozen=True)
class Turnable:
    """Volumes that turn together.

    Attributes
    ----------
    stacks
        Volumes that stand on top of each other, as a particle's and its copy's.
    look
        Camera, light and scale, as viewer.js reads them.
    """

    stacks: list[list[Volume]]
    look: str


@dataclass(frozen=True)
class Picture:
    """A drawn figure, and the volumes in it, if they can be turned.

    Attributes
    ----------
    failed
        Why there is no figure; empty: there is one.
    """

    name: str
    alt: str
    caption: str
    png: bytes
    pdf: bytes
    volumes: Turnable | None = None
    failed: str = ""

    @property
    def src(self) -> str:
        """The image itself, for an ``img`` element."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def picture(
    name: str, alt: str, caption: str, figure: Figure, volumes: Turnable | None = None
) -> Picture:
    """Draw a figure as PNG and PDF."""
    png, pdf = io.BytesIO(), io.BytesIO()
    figure.set_dpi(_PNG_DPI)
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # it stays as laid out; with an engine, each file is drawn twice
    figure.savefig(png, format="png", dpi=_PNG_DPI)
    # no date: the same evaluation gives the same file
    figure.savefig(pdf, format="pdf", dpi=2 * _PNG_DPI, metadata={"CreationDate": None})
    return Picture(name, alt, caption, png.getvalue(), pdf.getvalue(), volumes)


def turnable(
    meshes: Sequence[Mesh],
    names: Sequence[str],
    colours: Sequence[str],
    reach: float | None = None,
    stack: int = 1,
) -> Turnable:
    """Prepare meshes for the page; the template's macro ``figure`` or ``volumes`` shows them.

    Parameters
    ----------
    colours
        As "#rrggbb".
    reach
        Scale of the pictures, as of ``meshes.render``; fits the meshes unless given.
    stack
        So many that follow each other in the sequence stand on top of each other.
    """
    shown = [
        Volume(name, colour, _written(mesh))
        for mesh, name, colour in zip(meshes, names, colours, strict=True)
    ]
    reach = common_reach(meshes) if reach is None else reach
    look = {**LOOK, "view": VIEW.tolist(), "reach": reach, "steps": _STEPS}
    stacks = [shown[i : i + stack] for i in range(0, len(shown), stack)]
    return Turnable(stacks, json.dumps(look))


def _written(mesh: Mesh) -> str:
    """Write a mesh as viewer.js reads it; with fewer triangles if it is too large for a page."""
    text = _encoded(mesh)
    for cells in _COARSER:
        if len(text) <= _MOST:
            break
        text = _encoded(simplified(mesh, cells))
    return text


def _encoded(mesh: Mesh) -> str:
    """Write a mesh as base64 of numbers of variable length (LEB128), small ones in one byte.

    These are: the count of vertices and of faces; of each vertex x, y, z in steps of 1/1024, as the
    difference from the one before, 0, -1, 1, -2, ... written as 0, 1, 2, 3, ...; of each corner of
    each face how far it is behind the first vertex that no face has had yet (0: it is this one).
    """
    if not len(mesh.faces):
        return ""
    used, first, corners = np.unique(mesh.faces, return_index=True, return_inverse=True)
    order = np.argsort(first)  # of their first use, which makes all numbers small
    corners = np.argsort(order)[corners.ravel()]
    steps = np.rint(mesh.vertices[used[order]] * _STEPS).astype(np.int64)
    moves = np.diff(steps, axis=0, prepend=0).ravel()
    unseen = np.maximum.accumulate(np.concatenate([[0], corners[:-1] + 1]))
    codes = [[len(used), len(mesh.faces)], (moves << 1) ^ (moves >> 63), unseen - corners]
    return base64.b64encode(_leb128(np.concatenate(codes))).decode()


def _leb128(numbers: np.ndarray) -> bytes:
    """Write numbers from 0 with seven bits in each byte, and the eighth if more follow."""
    shifts = np.arange(0, 35, 7)
    more = (numbers[:, None] >> shifts) > 0
    more[:, 0] = True
    parts = (numbers[:, None] >> shifts) & 127
    parts[:, :-1] |= more[:, 1:] << 7
    return parts[more].astype(np.uint8).tobytes()


def environment() -> jinja2.Environment:
    """Return what renders the templates; one for each page, as it numbers the page's meshes."""
    loader = jinja2.PackageLoader("cryodrgn_amort.report")
    made = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["capitalize_first"] = capital
    made.filters["number"] = lambda v: number(v) if isinstance(v, float | int) else v
    script = loader.get_source(made, "viewer.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals.update(
        definitions=DEFINITIONS,
        script=script,
        script_hash=f"sha256-{digest}",
        mesh_number=_numbering(),
    )
    return made


def _numbering() -> Callable[[str], tuple[int, bool]]:
    """Return a function that numbers texts, and tells whether one is new: it is written once."""
    known: dict[str, int] = {}

    def numbered(text: str) -> tuple[int, bool]:
        new = text not in known
        return known.setdefault(text, len(known) + 1), new

    return numbered


def capital(text: str) -> str:
    """Return the text with a capital first letter and the rest as it was."""
    return text[:1].upper() + text[1:]
