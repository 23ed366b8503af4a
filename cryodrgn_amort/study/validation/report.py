"""Write a validation: report.html to read, validation.json, and what is known of each particle."""

from __future__ import annotations

import csv
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import false_discovery_control

from cryodrgn_amort import host
from cryodrgn_amort.core import (
    __version__,
    number,
    read_json,
    replacing,
    warn,
    write_json,
    write_pickle,
    write_text,
)
from cryodrgn_amort.measures import DEFINITIONS
from cryodrgn_amort.report import CITATION, STYLE, Picture, environment, picture
from cryodrgn_amort.study.validation.verdict import Answer, answers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from cryodrgn_amort.study.validation.plan import Validation


__all__ = ["write_validation"]

_PARTS = ("gain", "epochs", "poses", "misfits")
_USED = ("heterogeneity_gain", "halves_agreement", "halves_agreement_others")
_FALSE = 0.1  # of ind_misfit.pkl, expected
_REFERENCES = (
    "E. D. Zhong et al.: CryoDRGN. Nature Methods 18, 176-185 (2021)", CITATION,
    f"cryodrgn_amort {__version__}, see its CITATION.cff",
)  # fmt: skip


def write_validation(validation: Validation) -> tuple[list[Answer], Path]:
    """Write what the parts have found; returns the answers, and the path of report.html."""
    found = {
        name: read_json(validation.part(name), "-o")
        for name in _PARTS
        if validation.part(name).is_file()
    }
    said = answers(found)
    folder = validation.folder
    if "misfits" in found:
        _write_particles(validation)
    facts = {
        "format": 1, "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "run": str(validation.run.folder), "epoch": validation.run.epoch,
        "versions": {"cryodrgn_amort": __version__, "cryodrgn": host.VERSION},
        "answers": [vars(a) for a in said], "parts": found,
    }  # fmt: skip
    write_json(folder / "validation.json", facts)
    page = folder / "report.html"
    write_text(page, _page(validation, said, found))
    return said, page


def _write_particles(validation: Validation) -> None:
    """Write trust.csv, a row per particle, and ind_misfit.pkl, if there are any."""
    folder = validation.folder
    with np.load(validation.part("misfits", "npz")) as known:
        position, p, explained = (known[name] for name in ("position", "p", "explained"))
    with (
        replacing(folder / "trust.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as handle,
    ):
        writer = csv.writer(handle)
        writer.writerow(["particle", "misfit_p", "explained"])
        rows = zip(position.tolist(), p.tolist(), explained.tolist(), strict=True)
        writer.writerows((i, f"{a:.4g}", f"{b:.4g}") for i, a, b in rows)
    unlike = position[false_discovery_control(p) <= _FALSE]
    path = folder / "ind_misfit.pkl"
    path.unlink(missing_ok=True)
    if len(unlike):
        write_pickle(path, unlike)


def _page(validation: Validation, said: list[Answer], found: Mapping[str, Any]) -> str:
    templates = environment()
    templates.globals["definitions"] = DEFINITIONS
    pictures = []
    for name, draw in _DRAWN.items():
        if name in found:
            try:
                pictures.append(draw(found[name]))
            except Exception as err:  # a figure never costs the report
                warn(f"report: figure of {name!r} left out ({type(err).__name__}: {err})")
    page: str = templates.get_template("validation.html.j2").render(
        run=validation.run, options=validation.options, answers=said, pictures=pictures,
        used=_USED, paper=_paper(validation, said), references=_REFERENCES, citation=CITATION,
        settings=_facts(validation),
    )  # fmt: skip
    return page


def _facts(validation: Validation) -> list[tuple[str, str]]:
    run, options = validation.run, validation.options
    return [
        ("Run", f"{run.folder}, epoch {run.epoch}, --encoder {run.settings.encoder}"),
        ("Particles", f"{run.n} from {run.settings.particles}"),
        ("Trained", "nothing (--quick)" if options.quick else
         f"two halves of the particles, a half of {options.nulls} set(s) without heterogeneity"),
        ("Fitted", f"{options.sample} particles of each, one by one"),
        ("Intervals", f"95 %, bootstrap over particles, {options.bootstrap} rounds, seed "
                      f"{options.seed}"),
        ("Versions", f"cryodrgn_amort {__version__}, cryodrgn {host.VERSION}"),
    ]  # fmt: skip


def _paper(validation: Validation, said: list[Answer]) -> str:
    run = validation.run
    opening = (
        f"A run of cryoDRGN {host.VERSION} [1] on {run.n:,} particles was validated with "
        f"cryodrgn_amort {__version__} [2, 3]. "
    )
    if not validation.options.quick:
        opening += (
            f"Two disjoint halves were trained with its settings for {run.epoch} epochs, and a "
            f"half of {validation.options.nulls} simulated set(s) of particles with the same "
            "poses, CTFs and noise spectrum but one structure; each decoder was asked of particles "
            "that it had not seen. "
        )
    return opening + " ".join(f"{a.question} {a.said.capitalize()}: {a.because}" for a in said)


def _figure(height: float = 2.8) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.6, height), layout="constrained")
    return figure, figure.subplots()


def _draw_gain(found: Mapping[str, Any]) -> Picture:
    with mpl.rc_context(STYLE):
        figure, axes = _figure(0.5 * len(found["gain"]) + 1.2)
        names = list(found["gain"])
        for row, name in enumerate(names):
            m = found["gain"][name]
            colour = "grey" if name.startswith("null") else "#0072b2"
            axes.plot([m["low"], m["high"]], [row, row], color=colour)
            axes.plot(m["value"], row, "o", color=colour)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel="gain (nats per particle)")
        axes.invert_yaxis()
    text = "What latents gain of particles not seen: of each half, and without heterogeneity."
    return picture("gain", text, text, figure)


def _draw_epochs(found: Mapping[str, Any]) -> Picture:
    with mpl.rc_context(STYLE):
        figure, axes = _figure()
        above = np.array(found["elbo"]) - max(found["elbo"])
        axes.errorbar(found["epochs"], above, found["error"], marker="o", capsize=2)
        axes.axvline(found["best"], linestyle=":", color="grey")
        axes.set(xlabel="epoch", ylabel="ELBO of particles not seen (nats)")
    text = (
        "ELBO of particles that the decoder has not seen, less that of the best checkpoint. "
        "Dotted: the first epoch that is not surely worse."
    )
    return picture("epochs", text, text, figure)


def _draw_poses(found: Mapping[str, Any]) -> Picture:
    with mpl.rc_context(STYLE):
        figure, axes = _figure()
        own = found
        known = {float(k): v for k, v in own["known"].items()}
        axes.plot(list(known), list(known.values()), "o-", color="grey", label="images made up")
        axes.axhline(own["reading"], color="#0072b2", label="particles")
        axes.axvspan(own["low"], own["high"], color="#0072b2", alpha=0.2, linewidth=0)
        axes.set(xlabel="poses are off by (degrees, rms)", ylabel="likely error (degrees)")
        axes.legend()
    text = (
        "The turn that would explain particles best, next to images made up whose poses are off by "
        f"known angles: {number(own['degrees'])} degrees, before what the faults of a decoder look "
        "like is taken off."
    )
    return picture("poses", text, text, figure)


_DRAWN: dict[str, Callable[[Mapping[str, Any]], Picture]] = {
    "gain": _draw_gain, "epochs": _draw_epochs, "poses": _draw_poses,
}  # fmt: skip
