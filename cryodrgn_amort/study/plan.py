"""The plan of a study: what its plan.yaml says, and where its parts are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.core import InputError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence

    from cryodrgn_amort.core import Registry
    from cryodrgn_amort.options import Recipe


__all__ = ["INPUTS", "KNOWN", "PLAN", "Layout", "Plan"]

PLAN = "plan.yaml"
"""Its name in a study's folder."""

INPUTS = ("particles", "poses", "ctf", "ind", "datadir")
KNOWN = ("labels", "coordinate", "truth")


@dataclass(frozen=True)
class Layout:
    """Where the parts of a study are in its folder."""

    folder: Path

    def run(self, recipe: str, seed: int) -> Path:
        """Return the folder of a recipe's run."""
        return self.folder / "runs" / f"{recipe}.seed{seed}"

    def evaluation(self, recipe: str, seed: int) -> Path:
        """Return the folder of the evaluation of a recipe's run."""
        return self.folder / "evals" / f"{recipe}.seed{seed}"

    def agreement(self, recipe: str) -> Path:
        """Return the file that says how a recipe's runs agree with those of its reference."""
        return self.folder / "agreement" / f"{recipe}.json"

    def stamp(self, step: str, kind: str) -> Path:
        """Return the file that says that a step is done ("json"), or under way ("planned")."""
        return self.folder / "steps" / f"{step}.{kind}"

    def log(self, step: str) -> Path:
        """Return the file of what a step prints."""
        return self.folder / "logs" / f"{step}.log"

    @property
    def digits(self) -> Path:
        """The file of the numbers of handwritten digits."""
        return self.folder / "mnist" / "mnist.json"

    @property
    def timing(self) -> Path:
        """The file of the times."""
        return self.folder / "timing.json"

    @property
    def simulated(self) -> Path:
        """The folder of simulated particles."""
        return self.folder / "data"


@dataclass(frozen=True)
class Plan:
    """What a study does, as its plan.yaml says.

    Attributes
    ----------
    folder
        Of the study.
    data
        Inputs of the particles by flag, absolute paths; or ``simulate``, flags of
        ``simulate_amort``.
    seeds, more_seeds
        Of every recipe; and recipe -> further ones.
    train, evaluate
        Flags of ``train_amort`` and ``eval_amort`` for all recipes.
    recipes
        Recipe -> flags of its own, in the order in which they are started.
    parsers
        Of the commands, by name: they check the flags.
    """

    folder: Path
    data: Mapping[str, Any]
    seeds: tuple[int, ...]
    more_seeds: Mapping[str, tuple[int, ...]]
    train: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    recipes: Mapping[str, Mapping[str, Any]]
    plugins: Registry = field(repr=False)
    parsers: Mapping[str, argparse.ArgumentParser] = field(repr=False)

    def recipe(self, name: str) -> Recipe:
        """Return the recipe of that name; a plugin's as well."""
        recipe: Recipe = self.plugins.recipe(name)
        return recipe

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """Return the seeds that a recipe is run with."""
        recipe = self.recipe(name)
        if recipe.command != "train_amort":
            return self.seeds
        return tuple(dict.fromkeys((*self.seeds, *self.more_seeds.get(name, ()))))

    @cached_property
    def layout(self) -> Layout:
        """Where the study's parts are."""
        return Layout(self.folder)

    @property
    def truth(self) -> Path | None:
        """The folder of ``simulate_amort`` that holds the truth, if there is one."""
        if "simulate" in self.data:
            return self.layout.simulated
        return Path(self.data["truth"]) if self.data.get("truth") else None

    def inputs(self) -> dict[str, str]:
        """Return the particles' inputs by flag."""
        if "simulate" not in self.data:
            return {name: self.data[name] for name in INPUTS if self.data.get(name)}
        stack = "particles.star" if self.data["simulate"].get("tilts") else "particles.mrcs"
        files = {"particles": stack, "poses": "poses.pkl"}
        if not self.data["simulate"].get("no-ctf"):
            files["ctf"] = "ctf.pkl"
        if self.data["simulate"].get("heldout"):
            files["holdout"] = "ind_heldout.pkl"
        return {k: str(self.layout.simulated / v) for k, v in files.items()}

    def with_parents(self, names: Iterable[str]) -> list[str]:
        """Return recipes and those that they need."""
        found: list[str] = []
        seen: set[str] = set()  # references may go round in a circle

        def add(name: str) -> None:
            if name not in seen:
                seen.add(name)
                for parent in self.needed(name):
                    add(parent)
                found.append(name)

        for name in names:
            add(name)
        return found

    def needed(self, name: str) -> list[str]:
        """Return the recipes that a recipe needs: parents and reference, or those that it times."""
        recipe = self.recipe(name)
        if recipe.command == "time_amort":
            names = self.recipes.get(name, {}).get("recipes", recipe.flags["recipes"])
            return names if isinstance(names, list) else [names]
        return [n for n in dict.fromkeys((*recipe.parents.values(), recipe.reference)) if n != name]

    def only(self, names: Sequence[str]) -> Plan:
        """Return the part of the plan that is about some recipes, and those that they need.

        Raises
        ------
        InputError
            If a recipe is not in the plan.
        """
        for name in names:
            if name not in self.recipes:
                raise InputError(f"--only {name}: not in the plan; it has "
                                 f"{', '.join(self.recipes)}")  # fmt: skip
        kept = self.with_parents(names)
        recipes = {name: flags for name, flags in self.recipes.items() if name in kept}
        return replace(self, recipes=recipes)

    def mistake(self, section: str, message: str) -> InputError:
        """Return an error that names a place in the plan, and what is wrong there."""
        return InputError(f"{self.folder / PLAN}: {section}: {message}")
