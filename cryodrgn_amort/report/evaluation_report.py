"""Write an evaluation: numbers as JSON, arrays, volumes, figures, and one HTML file to read."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort import host
from cryodrgn_amort.core import (
    InputError,
    __version__,
    check_place,
    device_name,
    locked,
    naming,
    odd_text,
    read_json,
    recorded,
    text_table,
    write_json,
    write_pickle,
    write_text,
    write_z,
)
from cryodrgn_amort.measures import (
    DEFINITIONS,
    MOST_QUERIES,
    fve_radius,
    measure_facts,
    text_row,
    text_share,
)
from cryodrgn_amort.report.evaluation_figures import pictures_of
from cryodrgn_amort.report.evaluation_page import page_of
from cryodrgn_amort.report.methods import CITATION
from cryodrgn_amort.report.plots import particle_numbers
from cryodrgn_amort.report.results import MODES
from cryodrgn_amort.report.trust import write_trust
from cryodrgn_amort.report.verdict import VERDICT_RULE, verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cryodrgn_amort.report.results import Evaluation


__all__ = ["check_outdir", "evaluation_rows", "evaluation_summary", "write_evaluation"]

_BINS = 20  # of a histogram
_MAIN = ("retrieval_rank", "latent_correlation", "amortization_loss_fraction", "volume_change")
# What an earlier evaluation may have left, and a later one without that transform must remove.
_OURS = re.compile(
    r"vol\.\d+(\..+)?\.mrc|.+\.(held|follow)\.pkl|(latents|ranks|calibration|map\..+)\.(png|pdf)"
    rf"|({'|'.join(k for k, d in DEFINITIONS.items() if d.per_image)})\.pkl"
    r"|(gap|trust|ind_(un)?stable)\.pkl|trust\.csv"
)


def check_outdir(outdir: str | os.PathLike[str]) -> Path:
    """Return the output folder, before anything is computed.

    Raises
    ------
    InputError
        If it is a file, lies below one, or cannot be written to.
    """
    out = check_place(outdir, folder=True)
    if (out / "report.html").is_file() and "report.html" not in _earlier_files(out):
        raise InputError(f"-o {outdir}: holds a report.html that is not of eval_amort")
    return out


def write_evaluation(evaluation: Evaluation, outdir: str | os.PathLike[str]) -> Path:
    """Write everything into a folder; if anything fails, what was there stays as it was.

    Written are ``report.html``, ``amortization.json``, figures (PNG and PDF), volumes of the
    labelled particles (``vol.NUMBER.mrc``) and, for each transform and mode ``KEY``, the
    transformed particles' latents (``z.KEY.pkl``), values per particle (``MEASURE.KEY.pkl``) and
    volumes (``vol.NUMBER.KEY.mrc``). Files of an earlier evaluation that this one does not write
    again are removed; files of others stay.

    Returns
    -------
    Path
        Of ``report.html``.
    """
    out = check_outdir(outdir)
    with _staging(out) as staging:
        pictures = pictures_of(evaluation)
        for drawn in (p for some in pictures.values() for p in some):
            if not drawn.failed:
                (staging / f"{drawn.name}.png").write_bytes(drawn.png)
                (staging / f"{drawn.name}.pdf").write_bytes(drawn.pdf)
        _write_arrays(evaluation, staging)
        facts = _facts(evaluation)
        page = page_of(evaluation, pictures, _table_of_facts(evaluation), facts["definitions"])
        write_text(staging / "report.html", page)
        files = sorted([*os.listdir(staging), "amortization.json"])
        write_json(staging / "amortization.json", {**facts, "files": files})
        _move(staging, out, files)
    return out / "report.html"


def evaluation_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Return the main numbers as text, the header first: of transforms only some measures."""
    head = ("transform", "mode", "measure", "value", "95 % interval", "null", "ideal")
    main = [row for row in evaluation.rows() if row[1] not in MODES or row[2].name in _MAIN]
    if not any(m.attainable for _, _, m in main):
        return [head, *((of, mode, *text_row(m)) for of, mode, m in main)]
    rows = [(of, mode, *text_row(m), text_share(m)) for of, mode, m in main]
    return [(*head, "of attainable"), *rows]


def evaluation_summary(evaluation: Evaluation) -> str:
    """Return the main numbers as a short table of plain text."""
    run = evaluation.run
    lines = [f"{run.name}, epoch {run.epoch}, --encoder {run.settings.encoder}, "
             f"{len(evaluation.z)} particles"]  # fmt: skip
    lines.append(text_table(evaluation_rows(evaluation)))
    if not evaluation.applicable:
        lines.append(evaluation.reason)
    return "\n".join(lines)


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """Make a folder within ``out``, named with a dot, that is gone afterwards."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    staging = out / ".amort.tmp"
    try:
        with locked(out, "another eval_amort writes to it"):
            shutil.rmtree(staging, ignore_errors=True)  # of one that was killed
            staging.mkdir()
            try:
                with naming(f"{out}/"):
                    yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        if made and not any(out.iterdir()):
            out.rmdir()


def _move(staging: Path, out: Path, files: Sequence[str]) -> None:
    blocked = [name for name in files if (out / name).is_dir()]
    if blocked:
        raise InputError(f"-o {out}: a folder {blocked[0]} is in the way")
    stale = {name for name in _earlier_files(out) if _OURS.fullmatch(name)} - set(files)
    with recorded(out, *files):
        for name in files:
            os.replace(staging / name, out / name)
    for name in stale:
        (out / name).unlink(missing_ok=True)


def _earlier_files(out: Path) -> list[str]:
    try:
        listed = read_json(out / "amortization.json", "-o")["files"]
        return [name for name in listed if os.path.basename(name) == name]
    except (ValueError, KeyError, TypeError):  # InputError among them
        return []


def _write_arrays(evaluation: Evaluation, folder: Path) -> None:
    apix = {"Apix": evaluation.apix}
    every = evaluation.of_all  # the host's dashboard shows values of all particles
    names = particle_numbers(len(evaluation.labelled))
    for name, volume in zip(names, evaluation.volumes, strict=True):
        host.write_mrc(str(folder / f"vol.{name}.mrc"), volume, **apix)
    for array, values in evaluation.arrays.items():
        write_pickle(folder / f"{array}.pkl", every(values))
    write_trust(evaluation, folder)
    for result in evaluation.results:
        write_z(folder / f"z.{result.key}.pkl", every(result.z), every(result.logvar))
        for array, values in result.arrays.items():
            values = np.ascontiguousarray(every(values))
            write_pickle(folder / f"{array}.{result.key}.pkl", values)
    for result in evaluation.mapped:
        for name, volume in zip(names, result.volumes, strict=True):
            host.write_mrc(str(folder / f"vol.{name}.{result.key}.mrc"), volume, **apix)


def _histograms(places: dict[str, np.ndarray] | None) -> dict[str, list[int]] | None:
    """Count what is uniform from 0 to 1 in equal bins, by name."""
    if places is None:
        return None
    edges = np.linspace(0, 1, _BINS + 1)
    return {name: np.histogram(values, edges)[0].tolist() for name, values in places.items()}


def _facts(evaluation: Evaluation) -> dict[str, Any]:
    """Return what amortization.json holds, but for the list of files."""
    run = evaluation.run
    used = [evaluation.measures, *(r.measures for r in evaluation.results)]
    used += [f.measures for f in evaluation.fits]
    names = dict.fromkeys(name for measures in used for name in measures)
    return {
        "format": 1,
        "cryodrgn_amort": __version__,
        "cryodrgn": host.VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "citation": CITATION,
        "run": {
            "name": run.name,
            "folder": str(run.folder),
            "epoch": run.epoch,
            "encoder": run.settings.encoder,
            "encoder_kind": run.encoder.name,
            "encoder_input": None if run.shown is None else run.shown.name,
            "n": len(evaluation.z),
            "left_out": evaluation.left_out.tolist(),
            "stack": evaluation.total,
            "zdim": evaluation.z.shape[1],
            "box_px": evaluation.volumes.shape[-1],
            "apix": evaluation.apix,
            "settings": run.settings.to_dict(),
        },
        "options": evaluation.options.facts(),
        "applicable": evaluation.applicable,
        "reason": evaluation.reason,
        "verdict": verdict(evaluation).headline,
        "labelled": {
            name: int(position)
            for name, position in zip(
                particle_numbers(len(evaluation.labelled)), evaluation.labelled, strict=True
            )
        },
        "measures": measure_facts(evaluation.measures),
        "kl_per_dimension": evaluation.kl_per_dimension,
        "calibration_ranks": _histograms(evaluation.calibration),
        "volume_fve_radius_voxels": fve_radius(evaluation.volumes.shape[-1]),
        "transforms": {
            r.key: {
                "name": r.name, "title": r.title, "mode": r.mode, "is_control": r.is_control,
                "measures": measure_facts(r.measures),
            }
            for r in evaluation.results
        },
        "fits": {
            f.key: {
                "which": f.which, "weight": f.weight, "beta": f.beta, "variance": f.variance,
                "n": len(f.index), "left_out": f.left_out, "measures": measure_facts(f.measures),
            }
            for f in evaluation.fits
        },
        "definitions": {name: DEFINITIONS[name].words() for name in names if name in DEFINITIONS},
    }  # fmt: skip


def _table_of_facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return what the numbers were measured on, and how, for humans."""
    facts = _facts(evaluation)
    run, options = facts["run"], evaluation.options
    shown = run["encoder_input"] or "nothing (its latents are a table)"
    settings = evaluation.run.settings
    particles = options.particles or settings.particles
    known = options.ctf or settings.ctf
    apix = f"{evaluation.apix:g} Å/px" if known else "pixel size unknown (no CTF)"
    rows = [
        ("Run", f"{run['name']}, epoch {run['epoch']}"),
        ("Encoder", f"{run['encoder']} ({evaluation.run.encoder.summary}); it is shown: {shown}"),
        ("Particles", f"{run['n']} from {particles}, box {run['box_px']} px, {apix}"),
        *([("Left out", odd_text(evaluation.left_out))] if run["left_out"] else []),
        ("Latent dimensions", str(run["zdim"])),
        ("Sample sizes", f"reconstruction losses {options.sample}, volumes {options.volumes}, at "
                         f"most; the neighbours of {min(run['n'], MOST_QUERIES)} particles are "
                         "looked up among all; N beneath each value says of how many it is"),
        ("Intervals", f"95 %, bootstrap over particles, {options.bootstrap} rounds, seed "
                      f"{options.seed}"),
        ("Headline", VERDICT_RULE),
        ("Numbered particles", f"the first {len(evaluation.labelled)}, counted from 1"),
    ]  # fmt: skip
    given = [(flag, options.facts()[flag]) for flag in ("labels", "coordinate")]
    rows += [(flag.capitalize(), path) for flag, path in given if path]
    device, precision = device_name(evaluation.run.device), evaluation.run.precision
    versions = f"cryodrgn_amort {__version__}, cryodrgn {host.VERSION}"
    rows.append(("Versions", versions))
    rows.append(("Computed", f"on {device}, the decoder's matrix products in {precision}"))
    rows.append(("Written", facts["created"]))
    return rows
