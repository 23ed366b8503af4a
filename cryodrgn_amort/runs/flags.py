"""Settings from the flags that were given: recipes, a run's own, what does not go together."""

from __future__ import annotations

import os
import random
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryodrgn_amort import host
from cryodrgn_amort.core import InputError
from cryodrgn_amort.models import EncoderSpec, resolve
from cryodrgn_amort.options import LINEAR, REPLACED, TrainSettings, check_mode, flag_name
from cryodrgn_amort.runs.config import with_defaults
from cryodrgn_amort.runs.reader import load_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from cryodrgn_amort.core import Registry
    from cryodrgn_amort.models import InputSpec


__all__ = ["inherited", "settings_from_flags", "with_run"]

_PATHS = ("particles", "outdir", "poses", "ctf", "ind", "datadir", "from_run")
_OF_TILTS = (
    "ntilts", "random_tilts", "t_emb_dim", "tlayers", "tdim", "dose_per_tilt", "angle_per_tilt",
)  # fmt: skip
_OF_NETWORK = frozenset(
    {"qlayers", "qdim", "enc_mask", "encode_mode", "t_emb_dim", "tlayers", "tdim", "use_real"}
)
"""Flags of the host that concern its network alone."""
_OF_READING = ("num_workers", "shuffler_size")
_OF_POSES = ("pretrain", "emb_type", "pose_lr")


def settings_from_flags(given: Mapping[str, Any], plugins: Registry) -> TrainSettings:
    """Make settings from the flags that the user gave, and no others.

    Order: the flags given, over the recipe's, over the host's defaults.

    Raises
    ------
    InputError
        If a flag does not apply, by name.
    """
    values = _with_recipe(given, plugins)
    if "encode_mode" in given and "encoder" not in values:
        check_mode(given["encode_mode"])
        values["encoder"] = given["encode_mode"]
    for name in ("particles", "poses", "zdim"):
        if name not in values:
            raise InputError(f"{flag_name(name)}: required")
    named, values = _with_encoder(values, given, plugins)
    values.setdefault("seed", random.SystemRandom().randrange(100_000))
    for name in _PATHS:
        if values.get(name):
            values[name] = os.path.abspath(values[name])
    if values.get("holdout") and os.path.exists(values["holdout"]):
        values["holdout"] = os.path.abspath(values["holdout"])
    ignored = tuple(_without_effect(values, named))
    given = {dest: value for dest, value in given.items() if dest in values}
    own = {f.name for f in fields(TrainSettings)} - {"extra"}
    extra = {dest: values.pop(dest) for dest in list(values) if dest not in own}
    for dest in sorted(host.train_vae_defaults().keys() & extra.keys()):
        raise InputError(f"{flag_name(dest)}: a flag of cryodrgn {host.VERSION} that is not known "
                         "here: cryodrgn_amort is older")  # fmt: skip
    settings = TrainSettings(**with_defaults(values), ignored=ignored, extra=extra)
    encoder, shown = resolve(settings, plugins)
    _check_copies(settings, encoder, shown)
    _check_start(settings)
    _check_poses(settings, encoder, shown)
    _refuse_foreign(given, settings.encoder, encoder, shown, plugins)
    return settings


def _with_recipe(given: Mapping[str, Any], plugins: Registry) -> dict[str, Any]:
    """Return the flags that were given over those of the recipe that they name."""
    if not given.get("recipe"):
        return dict(given)
    recipe = plugins.recipe(given["recipe"])
    if recipe.command != "train_amort":
        raise InputError(f"--recipe {recipe.name}: is nothing to train; study_amort runs it")
    for dest in recipe.parents:
        if dest not in given:
            raise InputError(f"--recipe {recipe.name}: needs {flag_name(dest)}")
    return {**recipe.flags, **given}


def _with_encoder(
    values: dict[str, Any], given: Mapping[str, Any], plugins: Registry
) -> tuple[EncoderSpec | InputSpec, dict[str, Any]]:
    """Look up the encoder; return it, and the flags with what it says of them."""
    tilted = _tilted(values)
    named: EncoderSpec | InputSpec = plugins.encoder(values.get("encoder", "resid"))
    network = not isinstance(named, EncoderSpec) or named.host_mode is not None
    if network and values.get("use_real"):
        raise InputError(f"--use-real: {REPLACED['use_real']}")
    if not isinstance(named, EncoderSpec):
        if values.get("from_run"):
            raise InputError(f"--from: does not apply to --encoder {named.name}")
        return named, values
    if tilted and named.host_mode is not None and "encoder" not in given:
        named = plugins.encoder("tilt")  # of the host's networks, the one that can read them
        assert isinstance(named, EncoderSpec)
        values["encoder"] = named.name
    if tilted and (named.sleeps or named.in_turns) and named.host_mode is None:
        raise InputError(
            f"--encoder {named.name}: learns from single images made up, and cannot read tilt "
            "series"
        )
    if named.second_stage and not values.get("from_run"):
        raise InputError(f"--encoder {named.name}: needs a finished run, --from RUN")
    if values.get("from_run") or named.in_turns:
        values = {**named.defaults, **values}
    if named.host_mode is not None:
        mode = values.setdefault("encode_mode", named.host_mode)
        if mode != named.host_mode:
            raise InputError(f"--encode-mode {mode}: contradicts --encoder {named.name}")
    return named, values


def _check_copies(settings: TrainSettings, encoder: EncoderSpec, shown: InputSpec | None) -> None:
    """Refuse what cannot be trained on copies."""
    if settings.augment is None:
        return
    if settings.from_run:
        raise InputError("--augment: does not apply to --from, whose images are all new")
    if encoder.host_mode is None or shown is None or shown.name != "particle":
        raise InputError(f"--augment: does not apply to --encoder {settings.encoder}, only to "
                         "networks that are shown the particle")  # fmt: skip
    if settings.tilted:
        raise InputError("--augment: does not apply to tilt series")


def _tilted(values: Mapping[str, Any]) -> bool:
    return values.get("encode_mode") == "tilt" or values.get("encoder") == "tilt"


def _without_effect(values: dict[str, Any], named: EncoderSpec | InputSpec) -> Iterator[str]:
    """Take out of the flags what has no effect here, and say so of each."""

    def without(dests: Iterable[str], why: str) -> Iterator[str]:
        for dest in dests:
            if dest in values:
                value = values.pop(dest)
                said = flag_name(dest) if value is True else f"{flag_name(dest)} {value}"
                yield f"{said}: {why}"

    lazily = "without effect but with --lazy; particles are preprocessed once"
    if not values.get("lazy"):
        yield from without([d for d in _OF_READING if values.get(d)], lazily)
    if not _tilted(values):
        yield from without(_OF_TILTS, "is for tilt series, --encode-mode tilt; ignored")
    if not values.get("do_pose_sgd"):
        yield from without(_OF_POSES, "needs --do-pose-sgd; ignored")
    elif values.get("emb_type", "s2s2") != "s2s2":
        why = "without effect, as in train_vae, which refines rotations as s2s2"
        yield from without(["emb_type"], why)
    yield from without(["multigpu"], REPLACED["multigpu"])
    yield from without(["relion31"], "not needed; what a .star file is, it says itself")
    if not isinstance(named, EncoderSpec) or named.host_mode is not None:
        return
    own = _OF_NETWORK - named.flags & values.keys()
    if values.get("encode_mode") == "tilt":  # says what the particles are, too
        own -= {"encode_mode"}
    yield from without(sorted(own), f"does not apply to --encoder {named.name}, ignored")


def _check_start(settings: TrainSettings) -> None:
    """Refuse latents that the decoder of ``--from`` does not know."""
    if settings.from_run and settings.extra.get("table_init") == LINEAR:
        raise InputError(f"--table-init {LINEAR}: does not apply to --from, which has latents")


def _check_poses(settings: TrainSettings, encoder: EncoderSpec, shown: InputSpec | None) -> None:
    """Refuse what poses cannot be refined with."""
    if not settings.do_pose_sgd:
        return
    if settings.from_run:
        raise InputError("--do-pose-sgd: does not apply to --from")
    if encoder.in_turns:
        raise InputError(f"--do-pose-sgd: does not apply to --encoder {settings.encoder}, whose "
                         "made-up images have the poses that are given")  # fmt: skip
    if settings.augment is not None:
        raise InputError(
            "--do-pose-sgd: does not apply to --augment, whose copies have other poses"
        )
    if shown is not None and shown.name != "particle":
        raise InputError(
            f"--do-pose-sgd: does not apply to --encoder {settings.encoder}, only to tables and to "
            "networks that are shown the particle"
        )


def _refuse_foreign(
    given: Mapping[str, Any],
    name: str,
    encoder: EncoderSpec,
    shown: InputSpec | None,
    plugins: Registry,
) -> None:
    known = {**plugins.owned("encoders"), **plugins.owned("encoder_inputs")}
    owned = set().union(*(entry.item.flags for entry in known.values()))
    mine = encoder.flags | (shown.flags if shown is not None else frozenset())
    for dest in given:
        if dest == "encode_mode" and encoder.host_mode is None:  # says that these are tilt series
            continue
        if dest in owned - mine:
            raise InputError(f"{flag_name(dest)}: does not apply to --encoder {name}")


_OF_DECODER = (
    "zdim", "players", "pdim", "pe_type", "pe_dim", "feat_sigma", "domain", "activation",
    "invert_data", "window", "window_r",
)  # fmt: skip
_DREAMS = 500_000  # synthetic images that an encoder learns from unless told otherwise
_OF_PARTICLES = ("particles", "poses", "ctf", "ind", "datadir", "holdout", "norm", "beta")
_TILTS_OF_RUN = ("encode_mode", "ntilts", "random_tilts", "dose_per_tilt", "angle_per_tilt")


def with_run(given: Mapping[str, Any], plugins: Registry) -> dict[str, Any]:
    """Complete the flags of ``train_amort --from RUN`` by what it was trained with.

    Raises
    ------
    InputError
        If a flag contradicts the run's decoder.
    """
    values = dict(given)
    if not values.get("from_run"):
        return values
    folder = values["from_run"]
    run = load_run(folder, plugins, flag="--from")
    if Path(values["outdir"]).resolve() == run.folder.resolve():
        raise InputError(f"--from {folder}: is the output folder as well")
    return inherited(values, run.settings, len(run.z()[0]), plugins)


def inherited(
    given: Mapping[str, Any], had: TrainSettings, n: int, plugins: Registry
) -> dict[str, Any]:
    """Complete the flags of a second stage by the settings of the run that it is for.

    Parameters
    ----------
    n
        Number of its particles.

    Raises
    ------
    InputError
        If a flag contradicts the run's decoder, or it is not said which poses are meant.
    """
    values = dict(given)
    if had.do_pose_sgd and not values.get("poses"):
        which = "has those of its particles" if had.holdout is None else "lacks those held out"
        raise InputError(
            f"--from {values['from_run']}: its poses were refined: say by --poses which ones are "
            f"meant (pose.EPOCH.pkl there {which})"
        )
    recipe = plugins.recipe(values["recipe"]).flags if values.get("recipe") else {}
    spec = plugins.encoder(values.get("encoder", recipe.get("encoder", "resid")))
    if isinstance(spec, EncoderSpec) and spec.in_turns:
        values.setdefault("beta", spec.defaults["beta"])
    for name in _OF_DECODER:
        own = getattr(had, name)
        if values.setdefault(name, own) != own:
            raise InputError(
                f"{flag_name(name)} {values[name]}: --from {values['from_run']} has {own}"
            )
    for name in (*_OF_PARTICLES, *(_TILTS_OF_RUN if had.tilted else ())):
        if (known := getattr(had, name)) is not None:
            values.setdefault(name, known)
    if isinstance(spec, EncoderSpec) and spec.sleeps:
        if n < 2:
            raise InputError(f"--from {values['from_run']}: has one latent, which is too few to "
                             f"train --encoder {spec.name}")  # fmt: skip
        values.setdefault("num_epochs", -(-_DREAMS // n))
        values.setdefault("checkpoint", -(-values["num_epochs"] // 10))
    return values
