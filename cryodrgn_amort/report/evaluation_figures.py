"""All figures of an evaluation, and what is said about them; drawn when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from cryodrgn_amort.core import warn
from cryodrgn_amort.report import plots
from cryodrgn_amort.report.html import Picture, Turnable, capital, picture, turnable
from cryodrgn_amort.report.meshes import THRESHOLD_RULE, Mesh, common_reach, isosurfaces, render_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from matplotlib.figure import Figure

    from cryodrgn_amort.measures import Embedding
    from cryodrgn_amort.report.results import Evaluation, TransformResult


__all__ = ["Drawing", "drawings_of", "pictures_of"]


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn.

    Attributes
    ----------
    part
        Of the report: the key of a result, "latents", "ranks" or "calibration".
    name
        For files.
    draw
        Makes the figure.
    turning
        Prepares the volumes in it, to be turned in a page; None: there are none, or they are the
        same as in the one before.
    """

    part: str
    name: str
    alt: str
    caption: str
    draw: Callable[[], Figure]
    turning: Callable[[], Turnable] | None = None


def pictures_of(evaluation: Evaluation) -> dict[str, list[Picture]]:
    """Draw all figures, by part of the report."""
    found: dict[str, list[Picture]] = {}
    for d in drawings_of(evaluation):
        try:
            turning = None if d.turning is None else d.turning()
            drawn = picture(d.name, d.alt, d.caption, d.draw(), turning)
        except Exception as err:  # the report is worth more than any of its figures
            failed = f"{type(err).__name__}: {err}"
            warn(f"figure {d.name} left out ({failed})")
            drawn = Picture(d.name, d.alt, d.caption, b"", b"", failed=failed)
        found.setdefault(d.part, []).append(drawn)
    return found


def drawings_of(evaluation: Evaluation) -> Iterator[Drawing]:
    """Yield all figures that there are, in the order of the report."""
    shown = sorted(evaluation.embeddings.items(), key=lambda item: item[0] != "UMAP")
    labelled = _Labelled(evaluation)
    yield _overview(evaluation)
    for title, embedding in shown:
        yield _map(title, embedding, labelled, first=title == shown[0][0])
    for result in evaluation.mapped:
        for title, embedding in shown:
            yield _moved_map(title, embedding, labelled, result, first=title == shown[0][0])
    if evaluation.results:
        alt = "Distributions of retrieval rank and displacement, with their null values."
        caption = (
            "Retrieval rank and displacement of the particles. The dotted line is what a "
            "transform would give that destroys everything; the ideal rises to 1 at once, at 0."
        )
        yield Drawing("ranks", "ranks", alt, caption, partial(plots.ranks, evaluation.results))
    if evaluation.calibration is not None:
        alt = "Where true latents lie in their posteriors, against a uniform distribution."
        caption = (
            f"Where the true latents of {len(next(iter(evaluation.calibration.values())))} images, "
            "made up by the decoder, lie in the encoder's posteriors: above, a line per latent "
            "dimension; below, ranks among draws of the posterior, by what they explain of the "
            "image and by distance to another image's latent. Right posteriors stay within the "
            "bands, all lines together, in 95 % of cases. First up, then down: the encoder is too "
            "sure; first down, then up: not sure enough; all up or down: off to one side. "
            "Likelihood far below: the posterior is no better than chance."
        )
        draw = partial(plots.calibration, evaluation.calibration)
        yield Drawing("calibration", "calibration", alt, caption, draw)


class _Labelled:
    """The labelled particles' volumes and their copies': one threshold, view and scale."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._originals = evaluation.volumes[: plots.MOST_VOLUMES]
        self._mapped = evaluation.mapped
        self.count = len(self._originals)
        self.names = plots.particle_numbers(self.count)
        self.colours = plots.particle_colours(self.count)
        self.caption = (
            f"Volumes decoded at the first {self.count}, from one direction, under one threshold "
            f"({THRESHOLD_RULE})."
        )

    @cached_property
    def meshes(self) -> list[Mesh]:
        return isosurfaces(self._originals)

    @cached_property
    def copies(self) -> dict[str, list[Mesh]]:
        """By key of the result."""
        return {r.key: isosurfaces(r.volumes[: self.count], self._originals) for r in self._mapped}

    @cached_property
    def reach(self) -> float:
        return common_reach([*self.meshes, *(m for some in self.copies.values() for m in some)])

    @cached_property
    def own(self) -> list[np.ndarray]:
        """Pictures, each in a colour of its own."""
        return render_all(self.meshes, self.colours, self.reach)

    @cached_property
    def red(self) -> list[np.ndarray]:
        """Pictures as next to those of copies."""
        return render_all(self.meshes, [plots.ORIGINAL] * self.count, self.reach)

    def green(self, key: str) -> list[np.ndarray]:
        """Pictures of copies."""
        return render_all(self.copies[key], [plots.MOVED] * self.count, self.reach)

    def turning(self) -> Turnable:
        return turnable(self.meshes, self.names, self.colours, self.reach)

    def turning_pairs(self, key: str) -> Turnable:
        return turnable(
            [m for pair in zip(self.meshes, self.copies[key], strict=True) for m in pair],
            [name for number in self.names for name in (number, f"{number}′")],
            [plots.ORIGINAL, plots.MOVED] * self.count,
            self.reach,
            stack=2,
        )


def _map(title: str, embedding: Embedding, of: _Labelled, *, first: bool) -> Drawing:
    """Show the labelled particles in an embedding, and what they decode to."""
    alt = f"The numbered particles in latent space ({title}), and their volumes."
    caption = f"Where the numbered particles lie ({title}), each in its volume's colour."
    return Drawing(
        "latents",
        f"map.{title.lower()}",
        alt,
        f"{caption} {of.caption}",
        lambda: plots.latent_map(embedding, of.own),
        of.turning if first else None,
    )


def _moved_map(
    title: str, embedding: Embedding, of: _Labelled, result: TransformResult, *, first: bool
) -> Drawing:
    """Show where the labelled particles' copies went."""
    what = f"{result.title}, {result.mode}"
    caption = (
        f"{capital(what)} ({title}): particles red, their transformed copies green with "
        f"a prime, a purple line from each to its copy. {of.caption}"
    )
    return Drawing(
        result.key,
        f"map.{result.key}.{title.lower()}",
        f"Particles and their copies in latent space ({title}): {what}.",
        caption,
        lambda: plots.latent_map(embedding, of.red, result, of.green(result.key)),
        partial(of.turning_pairs, result.key) if first else None,
    )


def _overview(evaluation: Evaluation) -> Drawing:
    shown, labels, coordinate = evaluation.embeddings, evaluation.labels, evaluation.coordinate
    known = [k for k, v in (("class", labels), ("coordinate", coordinate)) if v is not None]
    colours = f", coloured by {' and by '.join(known)}" if known else ""
    alt = f"All particles in latent space ({' and '.join(shown) or 'none'}){colours}."
    caption = f"All particles in latent space{colours}."
    draw = partial(plots.embeddings, shown, labels, coordinate, evaluation.label_names)
    return Drawing("latents", "latents", alt, caption, draw)
