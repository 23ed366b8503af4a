"""What a run's config.yaml holds, and the files in a run folder by name."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cryodrgn_amort import host
from cryodrgn_amort.core import OWN_KEY, replacing, write_pickle
from cryodrgn_amort.data import ParticleSource
from cryodrgn_amort.models import TOKEN_ENCODER, TOKEN_TILT_PARAMS, EncoderSpec
from cryodrgn_amort.options import TrainSettings, of_kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryodrgn_amort.data import Particles
    from cryodrgn_amort.runs.origins import Origin


__all__ = [
    "CHOSEN",
    "HOLDOUT",
    "INPUTS",
    "INPUT_FILES",
    "MODEL_ARGS",
    "TRAINED",
    "model_args",
    "settings_of",
    "source_of",
    "with_defaults",
    "write_config",
]


def source_of(settings: TrainSettings) -> ParticleSource:
    """Return which particles the settings ask for."""
    names = {f.name for f in fields(ParticleSource)} & {f.name for f in fields(TrainSettings)}
    source = ParticleSource(**{name: getattr(settings, name) for name in names})
    return source if settings.tilted else replace(source, ntilts=None)


MODEL_ARGS = frozenset({
    "qlayers", "qdim", "players", "pdim", "zdim", "encode_mode", "enc_mask", "pe_type",
    "feat_sigma", "pe_dim", "domain", "activation",
})  # fmt: skip
_TILT_PARAMS = ("tdim", "tlayers", "t_emb_dim", "ntilts")
INPUT_FILES = ("particles", "poses", "ctf", "ind", "datadir")
INPUTS = (*INPUT_FILES, "dose_per_tilt", "angle_per_tilt")
"""What may be given anew for a run: files that have moved, and what host's configs do not say."""
HOLDOUT, TRAINED = "ind_heldout.pkl", "ind_train.pkl"
"""Files in a run folder: positions in the stack of the particles held out, and of the others."""
CHOSEN = "ind.pkl"
"""File in a folder of ``infer_amort``: positions of its particles, where they are not all."""


def model_args(settings: TrainSettings, encoder: EncoderSpec, D: int) -> dict[str, Any]:
    """Return the ``model_args`` of config.yaml."""
    args = {name: getattr(settings, name) for name in sorted(MODEL_ARGS)}
    if args["enc_mask"] is None:
        args["enc_mask"] = D // 2
    if encoder.host_mode is None:
        args.update(TOKEN_ENCODER)
    if settings.tilted:  # by encode_mode the host's filter and dashboard count particles, not tilts
        sizes = {name: getattr(settings, name) for name in _TILT_PARAMS}
        token = {} if encoder.host_mode else TOKEN_TILT_PARAMS
        args.update(encode_mode="tilt", tilt_params={**sizes, **token})
    return args


def write_config(
    folder: Path, settings: TrainSettings, encoder: EncoderSpec, particles: Particles
) -> None:
    """Write config.yaml as the host does, with what is ours under ``OWN_KEY``."""
    args = model_args(settings, encoder, particles.D)
    values = {**settings.to_dict(), **args, **args.get("tilt_params", {})}
    if particles.held_out is not None:  # the host knows of no particles held out
        values["ind"] = str(folder / TRAINED)
    with replacing(folder / "config.yaml") as temporary:
        # the host chooses the format by the extension, which a temporary name keeps in front
        staged = temporary.with_suffix(".yaml")
        try:
            with host.quiet():
                host.save_config(values, particles.images, particles.lattice, str(staged))
            config = yaml.safe_load(staged.read_text(encoding="utf-8"))
        finally:
            staged.unlink(missing_ok=True)
        config[OWN_KEY] = {"encoder": settings.encoder, "settings": settings.to_dict()}
        temporary.write_text(yaml.safe_dump(config), encoding="utf-8")
    if particles.held_out is not None:  # after the config: without one they are someone else's
        write_pickle(folder / HOLDOUT, particles.held_out)
        write_pickle(folder / TRAINED, particles.ind)


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Complete values of ``TrainSettings`` by the defaults of the host's parser."""
    needed = [f for f in fields(TrainSettings)
              if f.default is MISSING and f.default_factory is MISSING]  # fmt: skip
    missing = [f for f in needed if f.name not in values]
    defaults = host.train_vae_defaults() if missing else {}
    return {**values, **{f.name: of_kind(f, defaults[f.name]) for f in missing}}


def settings_of(config: dict[str, Any], origin: Origin, folder: Path, poses: Path) -> TrainSettings:
    """Return what a run was trained with. A damaged config raises whatever it raises.

    Parameters
    ----------
    poses
        File of the poses that it has found, if its origin is to find them.
    """
    args, data = origin.model_args(config), origin.dataset_args(config)
    missing = MODEL_ARGS - args.keys()
    if missing:
        raise ValueError(f"model_args lacks {', '.join(sorted(missing))}")
    known = {f.name for f in fields(TrainSettings)}
    if OWN_KEY in config:
        values = {k: v for k, v in config[OWN_KEY]["settings"].items() if k in known}
    else:  # a run of the host's
        together = {**args.get("tilt_params", {}), **data, **args}
        values = {k: v for k, v in together.items() if k in known}
        values.update(seed=config.get("seed", 0))
        if not origin.encoder:
            values.update(encoder="vlt", encode_mode="resid")
        else:
            values.update(encoder=args["encode_mode"])
        if origin.finds_poses:
            values.update(poses=str(poses), do_pose_sgd=True)
    values.update(outdir=str(folder), load=None, overwrite=False)
    if values.get("holdout") and (folder / HOLDOUT).is_file():  # else as it was given
        values["holdout"] = str(folder / HOLDOUT)
    moved = folder / CHOSEN
    if Path(values.get("ind") or "").name == CHOSEN and moved.is_file():
        values["ind"] = str(moved)
    values["norm"] = tuple(map(float, data["norm"]))
    settings = TrainSettings(**with_defaults(values))
    if args["activation"] not in ("relu", "leaky_relu") or args["zdim"] != settings.zdim:
        raise ValueError(f"activation {args['activation']}, zdim {args['zdim']}")
    return settings
