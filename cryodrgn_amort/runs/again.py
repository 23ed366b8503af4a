"""The flags by which a finished run is trained again."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from cryodrgn_amort import host
from cryodrgn_amort.core import OWN_KEY, InputError, actions_of
from cryodrgn_amort.options import TrainSettings
from cryodrgn_amort.runs.flags import settings_from_flags

if TYPE_CHECKING:
    import argparse

    from cryodrgn_amort.runs.reader import Run


__all__ = ["settings_argv", "trained_settings"]

_OF_RUN = ("load", "overwrite", "recipe")


def trained_settings(run: Run, parser: argparse.ArgumentParser) -> TrainSettings:
    """Return what a run was trained with; of ``train_vae``'s, by the command that its config keeps.

    Parameters
    ----------
    parser
        Of ``train_amort``.

    Raises
    ------
    InputError
        If it is a run of another command, or its own is not known.
    """
    if OWN_KEY in run.config:
        return run.settings
    what = f"RUN {run.folder}"
    if run.origin.command != "train_vae":
        raise InputError(
            f"{what}: a run of cryodrgn {run.origin.command}, which is not trained here"
        )
    argv = list(map(str, run.config.get("cmd") or ()))
    if "train_vae" not in argv:
        raise InputError(f"{what}: its config.yaml does not say by which command it was trained")
    argv = argv[argv.index("train_vae") + 1 :]
    try:
        given = vars(parser.parse_args(argv))
    except SystemExit:
        raise InputError(f"{what}: its command cannot be read: {' '.join(argv)}") from None
    stored = {
        name: getattr(run.settings, name)
        for name in ("particles", "poses", "ctf", "ind", "datadir")
    }
    values = {**given, **{k: v for k, v in stored.items() if v}, "seed": run.settings.seed}
    return settings_from_flags(values, run.plugins)


def settings_argv(settings: TrainSettings, parser: argparse.ArgumentParser) -> list[str]:
    """Return flags of ``train_amort`` that stand for settings, those left out that say nothing."""
    values: dict[str, Any] = {**settings.to_dict(), **settings.extra}
    usual = {f.name: f.default for f in fields(TrainSettings)} | host.train_vae_defaults()
    argv, said = [str(settings.particles)], {"particles", *_OF_RUN}
    for action in actions_of(parser):
        name = action.dest
        if name in said or name not in values or not action.option_strings:
            continue
        value = values[name]
        always = name in settings.extra or name not in usual
        if value is None or (value == usual.get(name) and not always):
            continue
        if action.nargs == 0:
            if action.const != value:  # another flag says so, or none
                continue
            argv.append(action.option_strings[-1])
        else:
            several = isinstance(value, list | tuple)
            argv += [action.option_strings[-1], *map(str, value if several else [value])]
        said.add(name)
    return argv
