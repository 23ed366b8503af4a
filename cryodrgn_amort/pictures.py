"""All figures of an evaluation, drawn, with what is said about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryodrgn_amort import figures, surfaces
from cryodrgn_amort.pages import Picture, Turnable, capital, picture, turnable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryodrgn_amort.results import Embedding, Evaluation, TransformResult
    from cryodrgn_amort.surfaces import Mesh

__all__ = ["pictures_of"]


def pictures_of(evaluation: Evaluation) -> dict[str, list[Picture]]:
    """Draw all figures: by key of a result, "latents", and where known "ranks", "calibration"."""
    shown = sorted(evaluation.embeddings.items(), key=lambda item: item[0] != "UMAP")
    labelled = _labelled(evaluation)
    found = {"latents": [_overview(evaluation), *_maps(shown, labelled)]}
    found |= _moved_maps(shown, labelled, evaluation.mapped)
    if evaluation.results:
        alt = "Distributions of retrieval rank and displacement, with their null values."
        caption = (
            "Retrieval rank and displacement of the particles. The dotted line is what a "
            "transform would give that destroys everything; the ideal rises to 1 at once, at 0."
        )
        found["ranks"] = [picture("ranks", alt, caption, figures.ranks(evaluation.results))]
    if evaluation.calibration is not None:
        alt = "Where true latents lie in their posteriors, against a uniform distribution."
        caption = (
            f"Where the true latents of {len(evaluation.calibration)} images, made up by the "
            "decoder, lie in the encoder's posteriors: a line per latent dimension. Right "
            "posteriors make it flat; a U means that the encoder is too sure, a hill that it is "
            "not sure enough, a slope that it is off to one side. The band holds 95 % of what "
            "chance makes of right ones."
        )
        figure = figures.calibration(evaluation.calibration)
        found["calibration"] = [picture("calibration", alt, caption, figure)]
    return found


@dataclass(frozen=True)
class _Labelled:
    """The labelled particles' volumes and their copies': one threshold, view and scale."""

    names: list[str]
    meshes: list[Mesh]
    copies: dict[str, list[Mesh]]
    reach: float
    caption: str


def _labelled(evaluation: Evaluation) -> _Labelled:
    originals = evaluation.volumes[: figures.MOST_VOLUMES]
    count = len(originals)
    meshes = surfaces.meshes(originals)
    copies = {r.key: surfaces.meshes(r.volumes[:count], originals) for r in evaluation.mapped}
    reach = surfaces.reach([*meshes, *(m for some in copies.values() for m in some)])
    caption = (
        f"Volumes decoded at the first {count}, from one direction, under one threshold "
        f"({surfaces.THRESHOLD_RULE})."
    )
    return _Labelled(figures.numbers(count), meshes, copies, reach, caption)


def _maps(shown: Sequence[tuple[str, Embedding]], of: _Labelled) -> list[Picture]:
    """Draw the labelled particles in each embedding, and what they decode to."""
    colours = figures.colours(len(of.meshes))
    volumes = surfaces.pictures(of.meshes, colours, of.reach)
    turning: Turnable | None = turnable(of.meshes, of.names, colours, of.reach)
    found = []
    for title, embedding in shown:
        alt = f"The numbered particles in latent space ({title}), and their volumes."
        caption = f"Where the numbered particles lie ({title}), each in its volume's colour."
        figure = figures.latent_map(embedding, volumes)
        name = f"map.{title.lower()}"
        found.append(picture(name, alt, f"{caption} {of.caption}", figure, turning))
        turning = None  # the volumes are the same in the next
    return found


def _moved_maps(
    shown: Sequence[tuple[str, Embedding]], of: _Labelled, results: Sequence[TransformResult]
) -> dict[str, list[Picture]]:
    """Draw, by key of the result, where the labelled particles' copies went."""
    red, green = ([c] * len(of.meshes) for c in (figures.ORIGINAL, figures.MOVED))
    volumes = surfaces.pictures(of.meshes, red, of.reach) if results else []
    found: dict[str, list[Picture]] = {}
    for result in results:
        what, copies = f"{result.title}, {result.mode}", of.copies[result.key]
        moved = surfaces.pictures(copies, green, of.reach)
        turning: Turnable | None = turnable(
            [m for pair in zip(of.meshes, copies, strict=True) for m in pair],
            [name for number in of.names for name in (number, f"{number}′")],
            [figures.ORIGINAL, figures.MOVED] * len(copies),
            of.reach,
            stack=2,
        )
        drawn = found[result.key] = []
        for title, embedding in shown:
            alt = f"Particles and their copies in latent space ({title}): {what}."
            caption = (
                f"{capital(what)} ({title}): particles red, their transformed copies green with "
                f"a prime, a purple line from each to its copy. {of.caption}"
            )
            figure = figures.latent_map(embedding, volumes, result, moved)
            name = f"map.{result.key}.{title.lower()}"
            drawn.append(picture(name, alt, caption, figure, turning))
            turning = None
    return found


def _overview(evaluation: Evaluation) -> Picture:
    shown, labels, coordinate = evaluation.embeddings, evaluation.labels, evaluation.coordinate
    known = [k for k, v in (("class", labels), ("coordinate", coordinate)) if v is not None]
    colours = f", coloured by {' and by '.join(known)}" if known else ""
    figure = figures.embeddings(shown, labels, coordinate, evaluation.label_names)
    alt = f"All particles in latent space ({' and '.join(shown) or 'none'}){colours}."
    return picture("latents", alt, f"All particles in latent space{colours}.", figure)
