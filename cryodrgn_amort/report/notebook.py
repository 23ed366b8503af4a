"""An evaluation as scripts and notebooks show it: tables and figures."""

from __future__ import annotations

import base64
import html
import io
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from cryodrgn_amort.core import InputError
from cryodrgn_amort.report.evaluation_figures import drawings_of
from cryodrgn_amort.report.evaluation_report import (
    evaluation_rows,
    evaluation_summary,
    write_evaluation,
)
from cryodrgn_amort.report.results import Evaluation
from cryodrgn_amort.report.trust import trust_table
from cryodrgn_amort.report.verdict import verdict

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy as np


__all__ = ["Figures", "Result", "frame"]

_DPI = 100  # of figures in a notebook
_COLUMNS = ("value", "low", "high", "null", "ideal", "n")


class Result(Evaluation):
    """What was measured of a run at one epoch. A notebook shows the headline and main numbers.

    Beside the tables and figures it has the raw arrays, as attributes: posteriors of the particles
    ``z`` and ``logvar`` `(N, zdim)`, their positions in the stack ``index`` `(N,)`, and, for each
    transform and mode, ``results[i].z``, ``.logvar`` (of the transformed copies) and ``.arrays``
    (values per particle); see ``cryodrgn_amort.results``.
    """

    @property
    def table(self) -> pd.DataFrame:
        """All measures, one row each.

        Columns are ``transform`` and ``mode`` (or the fit and its particles; empty: the run
        itself), ``measure``, ``value``, ``low`` and ``high`` (95 % interval), ``null`` (the value
        if latents had nothing to do with images), ``ideal``, and ``n`` particles. NaN: there is
        none. Units are in ``cryodrgn_amort.definitions.DEFINITIONS``.
        """
        return frame(("transform", "mode"), self.rows())

    @property
    def per_particle(self) -> pd.DataFrame:
        """What is known of each particle, `N` rows; the columns of ``trust.csv``.

        ``particle`` is the position in the stack, from 0. ``rank.KEY`` (share of the other
        particles that are nearer to its copy) and ``displacement.KEY`` (in median distances between
        particles) for each transform and mode; ``reconstruction`` loss and ``gap``, in nats;
        ``trust``, 1 minus the largest rank. NaN: not measured.
        """
        return pd.DataFrame({"particle": self.index, **self._trust})

    @cached_property
    def _trust(self) -> dict[str, np.ndarray]:
        return trust_table(self)  # of large sets it takes a while

    def plot(self, *names: str) -> Figures:
        """Draw figures, without showing them: a notebook shows what a cell ends with.

        Parameters
        ----------
        *names
            What the figures' names start with; "latents" and "ranks" unless given. There are
            "latents" (all particles), "map" (numbered particles and their volumes),
            "map.roll-1.held" (and where their copies went), "ranks", and "calibration" where it was
            measured. "": all.

        Returns
        -------
        Figures
            By name, in the order of the report.

        Raises
        ------
        InputError
            If there is no figure of that name.
        """
        drawings = {drawing.name: drawing for drawing in drawings_of(self)}
        for wanted in names:
            if not any(name.startswith(wanted) for name in drawings):
                raise InputError(f"plot {wanted!r}: there are {', '.join(drawings)}")
        chosen = [n for n in drawings if n.startswith(names or ("latents", "ranks"))]
        captions = {name: drawings[name].caption for name in chosen}
        return Figures({name: drawings[name].draw() for name in chosen}, captions)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write all that ``cryodrgn eval_amort`` writes into a folder.

        Returns
        -------
        pathlib.Path
            Of report.html.

        Raises
        ------
        InputError
            If it cannot be written there; what was there stays as it was.
        """
        return write_evaluation(self, folder)

    def __repr__(self) -> str:
        return f"{verdict(self).headline}\n{evaluation_summary(self)}"

    def _repr_html_(self) -> str:
        head, *rows = evaluation_rows(self)
        table = pd.DataFrame(rows, columns=list(head)).to_html(index=False, border=0)
        return f"<p><strong>{html.escape(verdict(self).headline)}</strong></p>{table}"


class Figures(dict[str, Figure]):
    """Figures by name, ``matplotlib.figure.Figure``; a notebook shows them with their captions.

    They are the caller's: to be changed, and saved by ``figures["ranks"].savefig("ranks.pdf")``.

    Attributes
    ----------
    captions
        By name.
    """

    def __init__(self, figures: Mapping[str, Figure], captions: Mapping[str, str]) -> None:
        super().__init__(figures)
        self.captions = dict(captions)

    def __repr__(self) -> str:
        return f"<Figures {', '.join(self)}>"

    def _repr_html_(self) -> str:
        return "".join(
            f'<figure><img style="max-width:100%" alt="{name}" src="{_source(figure)}">'
            f"<figcaption>{html.escape(self.captions.get(name, name))}</figcaption></figure>"
            for name, figure in self.items()
        )


def _source(figure: Figure) -> str:
    """Return a figure as the source of an HTML image."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_DPI)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def frame(names: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> pd.DataFrame:
    """Return rows that end in a measure as a table."""
    found = [(*of, m.name, *(getattr(m, c) for c in _COLUMNS)) for *of, m in rows]
    table = pd.DataFrame(found, columns=[*names, "measure", *_COLUMNS])
    numbers = dict.fromkeys(("value", "low", "high", "null", "ideal"), float)
    return table.astype(numbers)  # None, there is none, becomes NaN
