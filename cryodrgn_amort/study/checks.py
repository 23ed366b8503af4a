"""Checks of a whole plan before anything of it is run."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.core import InputError
from cryodrgn_amort.options import EvalOptions, TrainSettings
from cryodrgn_amort.runs import inherited, settings_from_flags
from cryodrgn_amort.study.plan import INPUTS, KNOWN
from cryodrgn_amort.study.steps import action_of, parse, steps_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cryodrgn_amort.study.plan import Plan


__all__ = ["COMMANDS", "check"]

_SOME = 1000  # particles of a run that is yet to be made
# Flags that the study gives itself.
_TAKEN = {
    "simulate_amort": ("o", "outdir", "overwrite"),
    "train_amort": (
        "o", "outdir", "overwrite", "load", "seed", "recipe", *INPUTS, "no-analysis",
    ),
    "eval_amort": ("o", "outdir", *INPUTS, *KNOWN),
    "time_amort": ("o", "output"),
    "mnist_amort": ("o", "outdir", "overwrite", "seeds"),
}  # fmt: skip

COMMANDS = (*_TAKEN, "compare_amort")
"""What the steps of a study are made of."""


def check(plan: Plan) -> None:
    """Check flags, recipes, commands and inputs.

    Raises
    ------
    InputError
        Names the place in the plan, and what is wrong there.
    """
    for section, command, flags in _given(plan):
        taken = [k for k in flags if k in _TAKEN[command]]
        if taken:
            raise plan.mistake(section, f"{taken[0]}: is given by the study itself")
        for key in flags:
            if action_of(plan.parsers[command], key) is None:
                raise plan.mistake(section, f"{key}: {command} has no such flag")
    for name in plan.recipes:
        _check_parents(plan, name)
    _check_commands(plan)
    for name, value in plan.data.items():
        if name != "simulate" and not os.path.exists(value):
            raise plan.mistake(f"data.{name}", f"{value}: does not exist")


def _check_commands(plan: Plan) -> None:
    """Read the flags of every step as its command will."""
    known: dict[str, TrainSettings] = {}
    for step in steps_of(plan).values():
        try:
            args = parse(plan.parsers[step.argv[0]], step.argv[1:])
            if step.argv[0] == "train_amort":
                parent = next((known[name] for name in step.after if name in known), None)
                if args.get("from_run") and parent is not None:
                    args = inherited(args, parent, _SOME, plan.plugins)
                known[step.name] = settings_from_flags(args, plan.plugins)
            if step.argv[0] == "eval_amort":
                names = {f.name for f in fields(EvalOptions)}
                options = EvalOptions(**{k: v for k, v in args.items() if k in names})
                for transform in options.transforms:
                    plan.plugins.transform(transform.partition(":")[0])
        except InputError as err:
            place = re.sub(r"^[a-z]+\.(.+)\.seed\d+$", r"recipes.\1", step.name)
            raise plan.mistake(place, str(err)) from None


def _given(plan: Plan) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    """Yield every section of flags: its name, the command, the flags."""
    yield "data.simulate", "simulate_amort", plan.data.get("simulate", {})
    yield "train", "train_amort", plan.train
    yield "evaluate", "eval_amort", plan.evaluate
    for name, flags in plan.recipes.items():
        command = plan.recipe(name).command
        own = {k: v for k, v in flags.items() if (command, k) != ("time_amort", "recipes")}
        yield f"recipes.{name}", command, own


def _check_parents(plan: Plan, name: str) -> None:
    for parent in plan.needed(name):
        if parent not in plan.recipes:
            raise plan.mistake(
                f"recipes.{name}", f"needs the recipe {parent}, which is not in the plan"
            )
        missing = set(plan.seeds_of(name)) - set(plan.seeds_of(parent))
        if missing and parent in plan.recipe(name).parents.values():
            raise plan.mistake(
                "more_seeds", f"{name} with seed {min(missing)} needs {parent} with that seed"
            )
