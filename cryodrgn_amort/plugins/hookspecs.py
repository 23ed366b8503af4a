"""The plugin contract: what a plugin may bring, and when it is called.

A plugin is a module or object that an installed package names under the entry-point group
``cryodrgn_amort``; each hook it implements is decorated with ``cryodrgn_amort.hookimpl`` and may
take any subset of the arguments below. Hooks that *bring* something return a list and are called
once, when plugins are loaded; hooks that *observe* are called by the trainer as it goes along, of
several processes by the leading one. One that fails is reported in one line and left out; only
InputError stops a training. A plugin with hook wrappers is left out: each hook is called by itself.
What ships in the box comes through the same hooks (``cryodrgn_amort.builtin``).

A hook or an argument that is to go is marked with ``warn_on_impl`` or ``warn_on_impl_args``, and a
FutureWarning in the words of the policy in ``examples/plugins/README.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from cryodrgn_amort.core import CommandSpec
    from cryodrgn_amort.data import TransformSpec
    from cryodrgn_amort.models import EncoderSpec, InputSpec, Losses
    from cryodrgn_amort.options import Recipe
    from cryodrgn_amort.report import Evaluation, Section
    from cryodrgn_amort.training import Trainer


__all__ = [
    "batch_end",
    "checkpoint_written",
    "commands",
    "encoder_inputs",
    "encoders",
    "epoch_end",
    "hookimpl",
    "recipes",
    "report_sections",
    "train_args",
    "training_end",
    "training_start",
    "transforms",
]

hookspec = pluggy.HookspecMarker("cryodrgn_amort")
hookimpl = pluggy.HookimplMarker("cryodrgn_amort")
"""Marks a function of a plugin as one of these hooks."""


@hookspec
def commands() -> Iterable[CommandSpec]:  # type: ignore[empty-body]
    """Bring subcommands of ``cryodrgn``. Called when the command line starts: stay light."""


@hookspec
def encoders() -> Iterable[EncoderSpec]:  # type: ignore[empty-body]
    """Bring encoders: names for ``train_amort --encoder``."""


@hookspec
def encoder_inputs() -> Iterable[InputSpec]:  # type: ignore[empty-body]
    """Bring encoder inputs: what a network is shown; also names for ``train_amort --encoder``."""


@hookspec
def recipes() -> Iterable[Recipe]:  # type: ignore[empty-body]
    """Bring recipes: names for ``train_amort --recipe`` and for the plans of ``study_amort``."""


@hookspec
def transforms() -> Iterable[TransformSpec]:  # type: ignore[empty-body]
    """Bring transforms: names for ``eval_amort --transform``.

    One that centring undoes, as a roll, says so: ``Transform.undone_by_centring``.
    """


@hookspec
def train_args(parser: argparse.ArgumentParser) -> None:
    """Add flags to ``train_amort``. Their values arrive as ``settings.extra[dest]``, if given."""


@hookspec
def training_start(trainer: Trainer) -> None:
    """Training is about to begin: everything is built and loaded, the run folder exists."""


@hookspec
def batch_end(trainer: Trainer, losses: Losses) -> None:
    """One optimizer step was taken. Losses are tensors on the device: reading them costs a sync."""


@hookspec
def epoch_end(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """One epoch has ended; ``metrics`` is its row of metrics.csv."""


@hookspec
def checkpoint_written(trainer: Trainer, path: Path) -> None:
    """``weights.EPOCH.pkl`` is complete at ``path``, and its z file beside it."""


@hookspec
def training_end(trainer: Trainer) -> None:
    """Training has ended normally and the final ``weights.pkl`` and ``z.pkl`` are written."""


@hookspec
def report_sections(evaluation: Evaluation) -> Iterable[Section]:  # type: ignore[empty-body]
    """Bring sections of the report of ``eval_amort``, shown in the order of the plugins."""
