"""Whether a training can go on from what ``--load`` names, and what that holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort.core import OWN_KEY, InputError, read_weights, read_yaml
from cryodrgn_amort.options import AnchorFlags, flag_name
from cryodrgn_amort.runs import HOLDOUT, INPUT_FILES, load_run, source_of

if TYPE_CHECKING:
    from cryodrgn_amort.core import Registry
    from cryodrgn_amort.data import Particles, ParticleSource
    from cryodrgn_amort.models import EncoderSpec
    from cryodrgn_amort.options import TrainSettings
    from cryodrgn_amort.runs import RunFolder


__all__ = ["check_start", "checkpoint_of", "holdout_of", "source_for"]


def checkpoint_of(
    settings: TrainSettings, files: RunFolder, encoder: EncoderSpec
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what ``--load`` names: the checkpoint, and our part of it; both empty without.

    Raises
    ------
    InputError
        If the run folder is in use, or training cannot go on from there with these settings.
    """
    load, folder = settings.load, Path(settings.outdir)
    here = load == "latest" or (load and Path(load).parent.resolve() == folder.resolve())
    _check_room(settings, files, going_on=bool(here))
    if not load:
        return {}, {}
    if here:
        files.read_metrics()
    if load == "latest":
        load, checkpoint = files.latest()
    else:
        checkpoint = read_weights(load, "--load")
    if checkpoint["epoch"] >= settings.num_epochs and not files.lacks_the_end_alone(
        load, settings.num_epochs
    ):
        raise InputError(
            f"--load {load}: has {checkpoint['epoch']} epochs already; "
            f"-n {settings.num_epochs} leaves nothing to train"
        )
    own = checkpoint.get(OWN_KEY, {})
    if not own:  # of the host: its normalisation is in the config beside it
        own = {"norm": _norm_beside(Path(load))}
    elif own["encoder"] != settings.encoder:
        raise InputError(
            f"--load {load}: was trained with --encoder {own['encoder']}, not {settings.encoder}"
        )
    if "encoder" not in own and encoder.host_mode is None:
        raise InputError(f"--load {load}: has no {settings.encoder} encoder")
    if "encoder" not in own:  # of the host, too: it refines poses in a file of their own
        poses = Path(load).parent / f"pose.{checkpoint['epoch']}.pkl"
        own |= {"pose_file": str(poses)} if poses.exists() else {}
    if own.keys() & {"poses", "pose_file"} and not settings.do_pose_sgd:
        raise InputError(f"--load {load}: its poses were refined; go on with --do-pose-sgd")
    return checkpoint, own


def _check_room(settings: TrainSettings, files: RunFolder, *, going_on: bool) -> None:
    if files.is_orphaned and not settings.overwrite:
        raise InputError(
            f"-o {settings.outdir}: its run was about to be replaced when training was killed; "
            f"it is whole in {files.replaced}: move it back, or go on with --overwrite"
        )
    if found := files.foreign():
        names = ", ".join(sorted(path.name for path in found)[:3])
        raise InputError(
            f"-o {settings.outdir}: holds no run, but {names}, which training would replace; "
            "choose another folder"
        )
    replaces = settings.overwrite or files.is_bare
    if files.present() and not going_on and not replaces:
        raise InputError(
            f"-o {settings.outdir}: holds a run already; continue it with --load latest, "
            "or replace it with --overwrite"
        )
    replaced = set() if going_on else {path.resolve() for path in files.present()}
    given = {flag_name(name): getattr(settings, name) for name in INPUT_FILES}
    given["--table-init"] = settings.extra.get("table_init")
    for flag, path in given.items():
        if path is not None and Path(path).resolve() in replaced:
            raise InputError(f"{flag} {path}: is of the run that -o {settings.outdir} replaces")


def check_start(
    settings: TrainSettings, encoder: EncoderSpec, particles: Particles, plugins: Registry
) -> None:
    """Check that a table that starts from a run has the particles of that run, row by row.

    And that there are enough of them for the encoder's turns.

    Raises
    ------
    InputError
        If they are others, or too few.
    """
    anchors = AnchorFlags.of(settings.extra).anchors
    if encoder.in_turns and particles.n < anchors:
        raise InputError(f"--anchors {anchors}: there are {particles.n} particles to choose from")
    flag, start = "--table-init", settings.extra.get("table_init")
    table = encoder.second_stage and not encoder.shown_images
    if start is None and (table or encoder.in_turns):
        flag, start = "--from", settings.from_run
    if start is None or not (Path(start) / "config.yaml").is_file():
        return
    had = load_run(start, plugins, flag=flag).whole_index
    have = np.arange(particles.n) if particles.ind is None else particles.ind
    if had is not None and not np.array_equal(had, have):
        raise InputError(
            f"{flag} {start}: was trained on {len(had)} particles, these are {len(have)}, of which "
            f"it had {len(np.intersect1d(had, have))}; give it the same --ind and --holdout "
            f"(as a file: {HOLDOUT} of that run)"
        )


def source_for(settings: TrainSettings, own: dict[str, Any]) -> ParticleSource:
    """Return where particles come from.

    A run that goes on keeps its normalisation, and the poses that it refined: ``own`` is our part
    of its checkpoint, empty without.
    """
    source = source_of(settings)
    if source.norm is None and own.get("norm"):
        source = replace(source, norm=tuple(own["norm"]))
    return replace(source, refined=own.get("pose_file"))


def holdout_of(settings: TrainSettings) -> str | None:
    """Return which particles to hold out; a run that goes on keeps those it has.

    Raises
    ------
    InputError
        If it had none, or which ones cannot be found out.
    """
    given, load = settings.holdout, settings.load
    if not load:
        return given
    kept = (Path(settings.outdir) if load == "latest" else Path(load).parent) / HOLDOUT
    if kept.is_file():
        return str(kept)
    had = _beside(kept, OWN_KEY, "settings", "holdout")
    if given and had is None:
        raise InputError(f"--holdout {given}: the run of --load {load} had none held out")
    if had is not None and not given:
        raise InputError(
            f"--load {load}: its run was trained with --holdout {had}, and {HOLDOUT}, which says "
            "which particles these are, is not beside it; give --holdout"
        )
    return given


def _norm_beside(checkpoint: Path) -> list[float] | None:
    """Return the normalisation in the config.yaml beside a checkpoint of the host, if there."""
    try:
        offset, scale = _beside(checkpoint, "dataset_args", "norm")
        return [float(offset), float(scale)]
    except (TypeError, ValueError):
        return None


def _beside(file: Path, *keys: str) -> Any:
    """Return what the config.yaml beside a file says; None: nothing of that."""
    try:
        found = read_yaml(file.parent / "config.yaml", "--load")
        for key in keys:
            found = found[key]
    except (KeyError, TypeError, ValueError):  # InputError among them
        return None
    return found
