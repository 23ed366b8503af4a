"""Write what the digits showed: numbers as JSON, figures, and one HTML file to read."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort import host
from cryodrgn_amort.core import __version__, replacing, text_table, write_json, write_text
from cryodrgn_amort.measures import DEFINITIONS, Definition, measure_facts, text_row
from cryodrgn_amort.options import METHODS
from cryodrgn_amort.report import CITATION, NOT_APPLICABLE, Picture, environment, picture
from cryodrgn_amort.study.digits import figures as figures
from cryodrgn_amort.study.digits.evaluation import SHIFTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cryodrgn_amort.measures import Measure
    from cryodrgn_amort.options import MnistSettings
    from cryodrgn_amort.study.digits.data import DigitSets
    from cryodrgn_amort.study.digits.evaluation import Shown


__all__ = ["digits_summary", "write_digits_report"]

_PAPER_BATCH = 100
NO_HELD_OUT = "not applicable: what is shown for an image is defined for training images only"
_NUMBERS = {"vae": ("12", {0: "13", 1: "15", 5: "17"}, {1: "14", 5: "16"}),
            "vlt": ("18", {0: "19"}, {})}  # fmt: skip
_SHOWN_SHIFTS = (1, 5)
_FIGURE = re.compile(rf"(ranks|({'|'.join(METHODS)})\..+)\.(png|pdf)")

_OWN_DEFINITIONS = {
    "reconstruction": Definition(
        "Reconstruction loss",
        "Cross entropy between an image's pixels and those decoded for its posterior mean, added "
        "up over the pixels; mean over images. Above 0 even for equal images, as ink is grey. "
        "Null: the mean latent for all.",
        "nats per image",
    ),
    "control": Definition(
        "Control",
        "Change of the reconstruction loss when an image and what its latent decodes to are rolled "
        "alike; mean over images.",
        "nats per image",
    ),
}
"""Where digits differ from particles."""


def write_digits_report(
    found: Sequence[Shown], data: DigitSets, settings: MnistSettings, folder: Path
) -> Path:
    """Write figures/, mnist.json and report.html; returns the latter's path."""
    pictures = _pictures(found, data)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for old in (folder / "figures").iterdir():  # of methods that are not asked for any more
        if _FIGURE.fullmatch(old.name):
            old.unlink()
    for drawn in (p for some in pictures.values() for p in some):
        for ending, content in (("png", drawn.png), ("pdf", drawn.pdf)):
            with replacing(folder / f"figures/{drawn.name}.{ending}") as temporary:
                temporary.write_bytes(content)
    facts = _facts(found, data, settings)
    write_json(folder / "mnist.json", facts)
    templates = environment()
    templates.globals["definitions"] = DEFINITIONS | _OWN_DEFINITIONS
    page = templates.get_template("mnist.html.j2").render(
        found=found,
        data=data,
        settings=settings,
        pictures=pictures,
        facts=facts,
        methods=METHODS,
        shifts=SHIFTS,
        overview=_overview(found),
        not_applicable=NOT_APPLICABLE,
        no_held_out=NO_HELD_OUT,
        measured=list(facts["definitions"]),
        citation=CITATION,
        batch=_PAPER_BATCH,
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def digits_summary(found: Sequence[Shown]) -> str:
    """Return the main numbers as a short table of plain text."""
    head = ("run", "images", "measure", "value", "95 % interval", "null", "ideal")
    main = {
        "train": ("reconstruction", "kl", "class_knn", "amortization_gap"),
        "held_out": ("class_knn", "held_out_score", "generalisation_gap"),
    }
    rows = [
        (shown.trained.name, part, *text_row(measures[name]))
        for shown in found
        for part, measures in shown.measures.items()
        for name in main.get(part, ("retrieval_rank",))
        if name in measures
    ]
    return text_table([head, *rows])


def _facts(found: Sequence[Shown], data: DigitSets, settings: MnistSettings) -> dict[str, Any]:
    """Return what mnist.json holds."""
    methods: dict[str, dict[str, Any]] = {}
    for shown in found:
        trained = shown.trained
        parts: dict[str, Any] = {
            part: measure_facts(measures) for part, measures in shown.measures.items()
        }
        if "held_out" not in parts:
            reason = NOT_APPLICABLE if trained.shown is None else NO_HELD_OUT
            parts["held_out"] = {"not_applicable": reason}
        if trained.shown is None:
            parts |= {f"shift{s}": {"not_applicable": NOT_APPLICABLE} for s in SHIFTS}
        parts["last_epoch"] = trained.history[-1]
        methods.setdefault(trained.method, {})[f"seed{trained.seed}"] = parts
    known = DEFINITIONS | _OWN_DEFINITIONS
    names = dict.fromkeys(n for s in found for part in s.measures.values() for n in part)
    return {
        "format": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "citation": CITATION,
        "versions": {
            "cryodrgn_amort": __version__,
            "cryodrgn": host.VERSION,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "settings": settings.to_dict(),
        "data": {
            "name": data.name,
            "training": {"n": data.training.n, "digest": data.training.digest()},
            "held_out": {"n": data.held_out.n, "digest": data.held_out.digest()},
            "box_px": data.training.box,
        },
        "methods": methods,
        "definitions": {name: known[name].words() for name in names if name in known},
    }


def _overview(found: Sequence[Shown]) -> list[tuple[str, int, dict[str, list[Measure]]]]:
    """Return method, number of seeds, and measures of the training images of each seed."""
    names = ("reconstruction", "kl", "class_knn", "amortization_gap")
    rows = []
    for method in dict.fromkeys(s.trained.method for s in found):
        seeds = [s for s in found if s.trained.method == method]
        measures = {n: [s.measures["train"][n] for s in seeds] for n in names}
        rows.append((method, len(seeds), measures))
    return rows


def _pictures(found: Sequence[Shown], data: DigitSets) -> dict[str, list[Picture]]:
    """Draw all figures: by method (of its first seed), and "ranks"."""
    drawn: dict[str, list[Picture]] = {}
    labels = data.training.labels
    for shown in found:
        trained, method = shown.trained, shown.trained.method
        if method in drawn:
            continue
        loss, of_pictures, of_latents = _NUMBERS.get(method, ("", {}, {}))
        parts = [
            _figure(f"{method}.losses", loss, "Losses by epoch.", figures.losses(trained.history)),
            _figure(f"{method}.latents", loss, "Latents of the training images, by digit.",
                    figures.latents(trained.z, labels)),
            _figure(f"{method}.pictures", of_pictures.get(0, ""),
                    "Eight training images above what their latents decode to.",
                    figures.reconstructions(*shown.pictures[0])),
        ]  # fmt: skip
        for shift in _SHOWN_SHIFTS:
            if shift in shown.moved:
                text = f"the network's input rolled {shift} px to the right"
                moved = figures.latents(trained.z, labels, shown.moved[shift])
                parts += [
                    _figure(f"{method}.latents.shift{shift}", of_latents.get(shift, ""),
                            f"Latents with {text}; grey: as they were.", moved),
                    _figure(f"{method}.pictures.shift{shift}", of_pictures.get(shift, ""),
                            f"Eight images rolled {shift} px to the right above what they decode "
                            "to.", figures.reconstructions(*shown.pictures[shift])),
                ]  # fmt: skip
        drawn[method] = parts
    curves: dict[str, dict[int, list[Measure]]] = {}
    for shown in found:
        for shift in shown.moved:
            by_shift = curves.setdefault(shown.trained.method, {})
            by_shift.setdefault(shift, []).append(shown.measures[f"shift{shift}"]["retrieval_rank"])
    if curves:
        caption = "Retrieval rank against shift: means over seeds, with their 95 % intervals."
        drawn["ranks"] = [_figure("ranks", "", caption, figures.rank_curves(curves))]
    return drawn


def _figure(name: str, number: str, caption: str, figure: Any) -> Picture:
    paper = f" Figure {number} of the paper." if number else ""
    return picture(name, caption, caption + paper, figure)
