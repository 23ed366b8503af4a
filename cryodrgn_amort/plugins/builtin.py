"""What ships in the box, through the same hooks that any plugin has: the only list of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryodrgn_amort.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    import argparse

    from cryodrgn_amort.core import CommandSpec
    from cryodrgn_amort.data import TransformSpec
    from cryodrgn_amort.models import EncoderSpec, InputSpec
    from cryodrgn_amort.options import Recipe


_COMMANDS = {
    "simulate_amort": "simulate particles with known heterogeneity",
    "train_amort": "train with any encoder: network, lookup table, evil twin, noise, plugins'",
    "eval_amort": "measure how far a run's encoder can be trusted",
    "infer_amort": "fit latents particle by particle, for a run's own particles or new ones",
    "compare_amort": "compare finished runs of the same particles",
    "time_amort": "time the training step of several runs, side by side",
    "validate_amort": "is it in the particles? a verdict on a run, without any truth",
    "scores_amort": "add scores of particles to the .star or .cs file that they are from",
    "study_amort": "run a whole study: every recipe, every figure, one report",
    "mnist_amort": "ask the same questions of handwritten digits, the paper's Appendix B",
    "amort_plugins": "list the loaded plugins and what they bring",
}


@hookimpl
def commands() -> list[CommandSpec]:
    """Return our own subcommands."""
    from cryodrgn_amort.core import CommandSpec

    return [
        CommandSpec(name, f"cryodrgn_amort.cli.{name}", summary)
        for name, summary in _COMMANDS.items()
    ]


@hookimpl
def encoders() -> list[EncoderSpec]:
    """Return the host's networks, the lookup table, and encoders of a second stage."""
    from cryodrgn_amort.models import ENCODERS

    return list(ENCODERS)


@hookimpl
def encoder_inputs() -> list[InputSpec]:
    """Return the particle, its twin, and noise."""
    from cryodrgn_amort.models import INPUTS

    return list(INPUTS)


@hookimpl
def recipes() -> list[Recipe]:
    """Return the paper's experiments, and those of encoders that are to generalise."""
    from cryodrgn_amort.options import RECIPES, REPAIR

    return [*RECIPES, *REPAIR]


@hookimpl
def transforms() -> list[TransformSpec]:
    """Return roll and rotation."""
    from cryodrgn_amort.data import TRANSFORMS

    return list(TRANSFORMS)


@hookimpl
def train_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the lookup table, of the second stage, and of turns."""
    from cryodrgn_amort.options import AnchorFlags, TableFlags, TurnFlags, add_flags

    add_flags(parser, TableFlags)
    add_flags(parser, AnchorFlags)
    add_flags(parser, TurnFlags)
