"""Write a validation: report.html to read, validation.json, and what is known of each particle."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
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
    read_arrays,
    read_json,
    replacing,
    warn,
    write_json,
    write_pickle,
    write_text,
)
from cryodrgn_amort.measures import DEFINITIONS
from cryodrgn_amort.report import (
    CITATION,
    MOVED,
    ORIGINAL,
    STYLE,
    Picture,
    environment,
    isosurfaces,
    picture,
    turnable,
)
from cryodrgn_amort.study.validation.maps import smooth
from cryodrgn_amort.study.validation.plan import OF_PARTICLES
from cryodrgn_amort.study.validation.verdict import Answer, answers, any_misfits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from cryodrgn_amort.report import Turnable
    from cryodrgn_amort.study.validation.plan import Validation


__all__ = ["write_validation"]

_PARTS = ("gain", "maps", "epochs", "poses", "misfits", "noise")
_USED = (
    "heterogeneity_gain", "halves_agreement", "halves_agreement_others", "map_agreement",
    "map_agreement_random", "map_halves_agreement", "map_halves_agreement_random",
    "renoised_spread", "renoised_bias",
)  # fmt: skip
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
    _write_particles(validation, found)
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


def _write_particles(validation: Validation, found: Mapping[str, Any]) -> None:
    """Write trust.csv, a row per particle that was asked, and ind_misfit.pkl, if there are any."""
    folder, columns = validation.folder, []
    for name in OF_PARTICLES:
        if name in found:
            known = read_arrays(validation.part(name, "npz"), "-o")
            position = known.pop("position")
            columns += [(position, column, values) for column, values in known.items()]
    if not columns:
        return
    every = np.unique(np.concatenate([position for position, _, _ in columns]))
    table = {}
    for position, name, values in columns:
        table[name] = np.full(len(every), np.nan)
        table[name][np.searchsorted(every, position)] = values
    with (
        replacing(folder / "trust.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as handle,
    ):
        writer = csv.writer(handle)
        writer.writerow(["particle", *table])
        for particle, *row in zip(
            every.tolist(), *(c.tolist() for c in table.values()), strict=True
        ):
            writer.writerow([particle, *("" if math.isnan(v) else f"{v:.4g}" for v in row)])
    path = folder / "ind_misfit.pkl"
    path.unlink(missing_ok=True)
    if "misfit_p" in table and any_misfits(found["misfits"]):
        p = table["misfit_p"]
        told = np.isfinite(p)
        unlike = every[told][false_discovery_control(p[told]) <= _FALSE]
        if len(unlike):
            write_pickle(path, unlike)


def _page(validation: Validation, said: list[Answer], found: Mapping[str, Any]) -> str:
    templates, folder = environment(), validation.folder
    templates.globals["definitions"] = DEFINITIONS
    pictures = []
    for name, draw in _DRAWN.items():
        if name in found:
            try:
                drawn = draw(found[name])
                if name == "maps":
                    drawn = replace(drawn, volumes=_turned(folder / "maps", found[name]["latents"]))
                pictures.append(drawn)
            except Exception as err:  # a figure never costs the report
                warn(f"report: figure of {name!r} left out ({type(err).__name__}: {err})")
    page: str = templates.get_template("validation.html.j2").render(
        run=validation.run, options=validation.options, answers=said, pictures=pictures,
        used=_USED, paper=_paper(validation, said), references=_REFERENCES, citation=CITATION,
        settings=_facts(validation), nulls=_nulls(found.get("gain")),
    )  # fmt: skip
    return page


def _nulls(gain: Mapping[str, Any] | None) -> list[tuple[str, str, str, int]]:
    """Return what halves, and particles with one structure, have: gain, spread and clusters."""
    if gain is None:
        return []
    return [
        (name, number(m["value"]), number(gain["spread"][name]), gain["clusters"][name])
        for name, m in gain["gain"].items()
    ]


def _turned(folder: Path, count: int) -> Turnable:
    """Show a half's volumes, and the maps below them."""
    read = [
        smooth(np.array(host.parse_mrc(str(folder / f"half0.{k + 1}.{kind}.mrc"))[0]))
        for k in range(count) for kind in ("decoded", "chosen")
    ]  # fmt: skip
    names = [f"{k + 1} {kind}" for k in range(count) for kind in ("decoded", "map")]
    return turnable(isosurfaces(np.stack(read)), names, [ORIGINAL, MOVED] * count, stack=2)


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


def _draw_maps(found: Mapping[str, Any]) -> Picture:
    with mpl.rc_context(STYLE):
        figure, axes = _figure()
        for name, title, line in (
            ("decoded", "decoded and map", "-"), ("decoded_random", "decoded and random map", "--"),
            ("halves", "maps of both halves", "-"), ("halves_random", "random maps", "--"),
        ):  # fmt: skip
            curve = found["fsc"][name]
            colour = "#0072b2" if name.startswith("decoded") else "#d55e00"
            at = np.arange(1, len(curve)) / (2 * (len(curve) - 1))
            axes.plot(at, curve[1:], line, color=colour, label=title)
        axes.set(xlabel="frequency (cycles per pixel)", ylabel="FSC", ylim=(min(0, *curve), 1))
        axes.legend()
    text = (
        "Fourier shell correlation of whole volumes with maps of the particles that they explain "
        "best, and of as many random ones: means over latents. What volumes have in common "
        "dominates it; the correlation above is of what they differ by. Below, to be turned: "
        "volumes of half0, and under each its map, both up to the frequency that is compared."
    )
    return picture("maps", text, text, figure)


_DRAWN: dict[str, Callable[[Mapping[str, Any]], Picture]] = {
    "gain": _draw_gain, "maps": _draw_maps, "epochs": _draw_epochs, "poses": _draw_poses,
}  # fmt: skip
