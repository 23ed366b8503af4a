"""Fitted posteriors as a table run: everything opens it that opens a run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort.core import (
    CHECKSUMS,
    device_name,
    recorded,
    write_json,
    write_pickle,
    write_poses,
    write_text,
)
from cryodrgn_amort.inference.inferred import inferred_facts, inferred_summary
from cryodrgn_amort.measures import kl_by_dimension
from cryodrgn_amort.runs import CHOSEN, INPUT_FILES, INPUTS, write_table

if TYPE_CHECKING:
    from cryodrgn_amort.inference.fitter import Fitter
    from cryodrgn_amort.inference.inferred import Inferred
    from cryodrgn_amort.options import InferOptions


__all__ = ["earlier_files", "write_table_run"]


def _names(epoch: int) -> list[str]:
    """Name what is written beside config.yaml and inference.json."""
    kinds = [f"{kind}{of}.pkl" for kind in ("z", "pose", "weights") for of in ("", f".{epoch}")]
    return [*kinds, *(f"{name}.pkl" for name in ("ind", "elbo", "converged", "gap"))]


def earlier_files(out: Path) -> list[Path]:
    """Return what an earlier call left that another one must replace, or remove."""
    names = {*_names(0), CHECKSUMS}
    of_epoch = re.compile(r"(?:z|pose|weights)\.\d+\.pkl")
    there = out.iterdir() if out.is_dir() else ()
    return [path for path in there if path.name in names or of_epoch.fullmatch(path.name)]


def write_table_run(
    fitter: Fitter, options: InferOptions, out: Path, plan: str, found: Inferred
) -> None:
    """Write a table run, and what is known of each particle.

    Parameters
    ----------
    plan
        All that the posteriors depend on, as JSON, to be kept with them.
    """
    (out / "inference.json").unlink(missing_ok=True)  # nothing is done until all is written
    for path in earlier_files(out):
        path.unlink()
    with recorded(out, "config.yaml", *_names(fitter.run.epoch)):
        _write_files(fitter, options, out, found)
    write_json(out / "inference.json", {"plan": json.loads(plan), **inferred_facts(found)})


def _write_files(fitter: Fitter, options: InferOptions, out: Path, found: Inferred) -> None:
    run, particles, epoch = fitter.run, fitter.particles, fitter.run.epoch
    given: dict[str, Any] = {
        name: None if path is None else str(Path(path).absolute())
        for name in INPUT_FILES
        if (path := getattr(options, name)) is not None or options.particles is not None
    }
    doses = {name: getattr(options, name) for name in INPUTS if name not in INPUT_FILES}
    given |= {name: value for name, value in doses.items() if value is not None}
    if options.particles is None and run.settings.holdout is not None:
        write_pickle(out / CHOSEN, particles.ind)
        given["ind"] = str((out / CHOSEN).absolute())
    own = options.particles is None and not options.held_out and options.poses is None
    if own and run.refined_poses is not None:
        for name in (f"pose.{epoch}.pkl", "pose.pkl"):
            write_poses(out / name, particles.rots, particles.trans, particles.D)
    else:
        given["do_pose_sgd"] = False
    write_table(out, run, particles, fitter.model, (found.mean, found.logvar), given)
    _write_log(fitter, out, found)
    write_pickle(out / "elbo.pkl", found.elbo)
    write_pickle(out / "converged.pkl", found.converged)
    if fitter.has_answers:
        write_pickle(out / "gap.pkl", found.gap)


def _write_log(fitter: Fitter, out: Path, found: Inferred) -> None:
    """Write run.log, from which ``cryodrgn analyze`` reads the losses of epochs."""
    sound = np.isfinite(found.elbo)
    if not sound.any():
        sound[:] = True  # the line says "nan"
    pixels = len(fitter.particles.mask) * fitter.particles.ntilts
    total = float(-2 * found.elbo_scale.variance * found.elbo[sound].mean() / pixels)
    kld = float(kl_by_dimension(found.mean[sound], found.logvar[sound]).sum(1).mean())
    gen_loss = total - found.elbo_scale.beta * kld / pixels
    run = fitter.run
    lines = [
        " ".join(sys.argv),
        f"Latents fitted with the decoder of {run.folder}, epoch {run.epoch}, on "
        f"{device_name(run.device)}, matrix products in {run.precision}",
        *inferred_summary(found).splitlines(),
        f"# =====> Epoch: {run.epoch} Average gen loss = {gen_loss:.6}, KLD = {kld:.6f}, "
        f"total loss = {total:.6f}; Finished",
    ]
    write_text(out / "run.log", "".join(f"{line}\n" for line in lines))
