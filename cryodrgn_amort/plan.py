"""The plan of a study: one YAML file, and the steps that it stands for.

A step is a command of ours with its flags. What it depends on, and whether it has been done
already, is decided by its fingerprint: of its command, the files that this names, what its recipe
says, the versions of what does it, and of the steps before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryodrgn_amort import __version__
from cryodrgn_amort.encoders import EncoderSpec
from cryodrgn_amort.errors import InputError
from cryodrgn_amort.private import actions_of
from cryodrgn_amort.results import EvalOptions
from cryodrgn_amort.runs import inherited
from cryodrgn_amort.settings import TrainSettings, flag_name, settings_from_flags

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence

    from cryodrgn_amort.plugins import Plugins
    from cryodrgn_amort.recipes import Recipe

__all__ = ["COMMANDS", "INPUTS", "KNOWN", "PLAN", "Plan", "Step", "parse"]

PLAN = "plan.yaml"
"""Its name in a study's folder."""
INPUTS = ("particles", "poses", "ctf", "ind", "datadir")
KNOWN = ("labels", "coordinate", "truth")
# Flags that the study gives itself.
_SOME = 1000  # particles of a run that is yet to be made
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


@dataclass(frozen=True)
class Step:
    """One command of a study.

    Attributes
    ----------
    name
        "train.vlt.seed0": what is done, with which recipe, with which seed.
    argv
        The command and its flags.
    after
        Names of the steps that must be done before.
    outputs
        What is there once it is done.
    reads
        What else decides what it gives: what its recipe says, where the command only names it.
    brought_by
        The packages, with their versions, that bring what it uses beside what is built in.
    """

    name: str
    argv: tuple[str, ...]
    after: tuple[str, ...]
    outputs: tuple[Path, ...]
    reads: str = ""
    brought_by: tuple[str, ...] = ()

    @property
    def versions(self) -> list[str]:
        """Of all packages that do it."""
        return [f"cryodrgn-amort {__version__}", *self.brought_by]

    @property
    def shell(self) -> str:
        """The line for a shell."""
        return shlex.join(("cryodrgn", *self.argv))


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
    plugins: Plugins = field(repr=False)
    parsers: Mapping[str, argparse.ArgumentParser] = field(repr=False)

    def recipe(self, name: str) -> Recipe:
        """Return the recipe of that name; a plugin's as well."""
        return self.plugins.recipe(name)

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """Return the seeds that a recipe is run with."""
        recipe = self.recipe(name)
        if recipe.command != "train_amort":
            return self.seeds
        return tuple(dict.fromkeys((*self.seeds, *self.more_seeds.get(name, ()))))

    def run_folder(self, name: str, seed: int) -> Path:
        """Return where the run of a recipe is."""
        return self.folder / "runs" / f"{name}.seed{seed}"

    def eval_folder(self, name: str, seed: int) -> Path:
        """Return where the evaluation of a recipe's run is."""
        return self.folder / "evals" / f"{name}.seed{seed}"

    def agreement_file(self, name: str) -> Path:
        """Return where the agreement of a recipe's runs with its reference's is."""
        return self.folder / "agreement" / f"{name}.json"

    @property
    def digits_file(self) -> Path:
        """Where the numbers of handwritten digits are."""
        return self.folder / "mnist" / "mnist.json"

    @property
    def timing_file(self) -> Path:
        """Where the times are."""
        return self.folder / "timing.json"

    @property
    def simulated(self) -> Path:
        """Where simulated particles are."""
        return self.folder / "data"

    @property
    def truth(self) -> Path | None:
        """The folder of ``simulate_amort`` that holds the truth, if there is one."""
        if "simulate" in self.data:
            return self.simulated
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
        return {k: str(self.simulated / v) for k, v in files.items()}

    @cached_property
    def steps(self) -> dict[str, Step]:
        """All steps by name, each after those that it needs."""
        found = {step.name: step for step in self._steps()}
        ordered: dict[str, Step] = {}

        def add(name: str, path: tuple[str, ...]) -> None:
            for parent in found[name].after:
                if parent not in found or parent in path:
                    why = "needs itself" if parent in path else "is not in the plan"
                    raise self._mistake("recipes", f"{name} needs {parent}, which {why}")
                add(parent, (*path, name))
            ordered.setdefault(name, found[name])

        for name in found:
            add(name, (name,))
        return ordered

    def with_parents(self, names: Iterable[str]) -> list[str]:
        """Return recipes and those that they need."""
        found: list[str] = []
        seen: set[str] = set()  # references may go round in a circle

        def add(name: str) -> None:
            if name not in seen:
                seen.add(name)
                for parent in self._needed(name):
                    add(parent)
                found.append(name)

        for name in names:
            add(name)
        return found

    def _needed(self, name: str) -> list[str]:
        recipe = self.recipe(name)
        if recipe.command == "time_amort":
            names = self.recipes.get(name, {}).get("recipes", recipe.flags["recipes"])
            return names if isinstance(names, list) else [names]
        return [n for n in dict.fromkeys((*recipe.parents.values(), recipe.reference)) if n != name]

    def only(self, names: Sequence[str]) -> Plan:
        """Return the part of the plan that is about some recipes, and those that they need."""
        for name in names:
            if name not in self.recipes:
                raise InputError(f"--only {name}: not in the plan; it has "
                                 f"{', '.join(self.recipes)}")  # fmt: skip
        kept = self.with_parents(names)
        recipes = {name: flags for name, flags in self.recipes.items() if name in kept}
        return replace(self, recipes=recipes)

    def fingerprint(self, step: Step) -> str:
        """Return a hash of all that decides what a step gives."""
        argv = [_within(argument, self.folder) for argument in step.argv]
        before = [self.fingerprint(self.steps[name]) for name in step.after]
        return _hash([argv, before, self._files(step), step.reads, step.versions])

    def former_fingerprint(self, step: Step) -> str:
        """Return what it was before it knew recipes, versions, and which files a step reads."""
        argv = [_within(argument, self.folder) for argument in step.argv]
        before = [self.former_fingerprint(self.steps[name]) for name in step.after]
        given = [] if "simulate" in self.data else sorted(self.data.items())
        files = [[p, *_identity(p)] if os.path.isfile(p) else [p] for _, p in given]
        return _hash([argv, before, files])

    def _files(self, step: Step) -> list[Any]:
        """Tell the user's files and folders that a step's command names, and their versions."""
        found: list[Any] = []
        for flag, argument in pairwise(step.argv):
            is_path = os.sep in argument or os.path.splitext(argument)[1]
            if not is_path or flag == "--datadir":  # whatever else is there
                continue
            path = Path(os.path.abspath(argument))
            if self._made.isdisjoint((path, *path.parents)):
                found += _identity(path) if path.is_file() else _listing(path)
        return found

    @cached_property
    def _made(self) -> set[Path]:
        """What the steps make: files, and folders that are theirs alone."""
        outputs = {Path(os.path.abspath(p)) for s in self.steps.values() for p in s.outputs}
        return (outputs | {path.parent for path in outputs}) - {Path(os.path.abspath(self.folder))}

    def _steps(self) -> Iterable[Step]:
        start: tuple[str, ...] = ()
        if "simulate" in self.data:
            argv = ("simulate_amort", "-o", str(self.simulated), "--overwrite")
            flags = _to_argv(self.data["simulate"])
            yield Step("simulate", (*argv, *flags), (), (self.simulated / "simulation.yaml",))
            start = ("simulate",)
        for name in self.recipes:
            recipe = self.recipe(name)
            if recipe.command == "time_amort":
                yield self._time(recipe)
                continue
            if recipe.command == "mnist_amort":
                yield self._digits(recipe)
                continue
            for seed in self.seeds_of(name):
                if recipe.command == "train_amort":
                    yield self._train(recipe, seed, start)
                yield self._evaluate(recipe, seed)
            if recipe.command == "train_amort":
                yield from self._agreement(recipe)

    def _flags(self, recipe: Recipe, common: Mapping[str, Any]) -> dict[str, Any]:
        """Return the flags that are given: the recipe's own win over the common ones.

        An encoder of a second stage that learns from images made up has its run's flags instead.
        """
        parser = self.parsers[recipe.command]
        if "from_run" in recipe.parents and self._sleeps(recipe):
            return dict(self.recipes[recipe.name])
        if recipe.command == "train_amort":  # --recipe gives these
            own = set(recipe.flags)
            kept = {k: v for k, v in common.items() if _dest(parser, k) not in own}
            return {**kept, **self.recipes[recipe.name]}
        return {**common, **recipe.flags, **self.recipes[recipe.name]}

    def _sleeps(self, recipe: Recipe) -> bool:
        spec = self.plugins.encoder(recipe.flags.get("encoder", "resid"))
        return isinstance(spec, EncoderSpec) and spec.sleeps

    def _train(self, recipe: Recipe, seed: int, start: tuple[str, ...]) -> Step:
        inputs, out = self.inputs(), self.run_folder(recipe.name, seed)
        argv = ["train_amort", inputs.pop("particles"), *_to_argv(inputs)]
        argv += ["--recipe", recipe.name, *_to_argv(self._flags(recipe, self.train))]
        after = list(start)
        for flag, parent in recipe.parents.items():
            argv += [flag_name(flag), str(self.run_folder(parent, seed))]
            after.append(f"train.{parent}.seed{seed}")
        argv += ["--seed", str(seed), "--no-analysis", "-o", str(out)]
        outputs = (out / "z.pkl", out / "weights.pkl")
        given = {**recipe.flags, **self._flags(recipe, self.train)}
        encoder = str(given.get("encoder", "resid"))
        kinds = (("recipes", recipe.name), ("encoders", encoder), ("encoder_inputs", encoder))
        says = json.dumps(dict(recipe.flags), sort_keys=True, default=str)
        return Step(
            f"train.{recipe.name}.seed{seed}", tuple(argv), tuple(after), outputs, says,
            self.plugins.bringing(*kinds),
        )  # fmt: skip

    def _evaluate(self, recipe: Recipe, seed: int) -> Step:
        of = recipe.parents.get("run", recipe.name)
        out = self.eval_folder(recipe.name, seed)
        argv = ["eval_amort", str(self.run_folder(of, seed)), "-o", str(out)]
        known = {name: self.data[name] for name in KNOWN if self.data.get(name)}
        if self.truth is not None:
            known["truth"] = str(self.truth)
        argv += _to_argv(known)
        own = recipe.command == "eval_amort"
        flags = self._flags(recipe, self.evaluate) if own else self.evaluate
        argv += _to_argv(flags)
        after = (f"train.{of}.seed{seed}",)
        outputs = (out / "amortization.json", out / "report.html")
        asked = flags.get("transform") or ()
        used = asked if isinstance(asked, list | tuple) else [asked]
        kinds = [("transforms", str(name).partition(":")[0]) for name in used]
        owners = self.plugins.bringing(*kinds, hook="report_sections")
        name = f"eval.{recipe.name}.seed{seed}"
        return Step(name, tuple(argv), after, outputs, brought_by=owners)

    def _agreement(self, recipe: Recipe) -> Iterable[Step]:
        names = dict.fromkeys((recipe.reference, recipe.name))
        runs = [(name, seed) for name in names for seed in self.seeds_of(name)]
        if len(runs) < 2:
            return
        out = self.agreement_file(recipe.name)
        folders = [str(self.run_folder(name, seed)) for name, seed in runs]
        after = tuple(f"train.{name}.seed{seed}" for name, seed in runs)
        argv = ("compare_amort", *folders, "-o", str(out))
        yield Step(f"compare.{recipe.name}", argv, after, (out,))

    def _time(self, recipe: Recipe) -> Step:
        seed = self.seeds[0]
        flags, names = self._flags(recipe, {}), self._needed(recipe.name)
        flags.pop("recipes")
        folders = [str(self.run_folder(name, seed)) for name in names]
        argv = ("time_amort", *folders, *_to_argv(flags), "-o", str(self.timing_file))
        after = tuple(f"train.{name}.seed{seed}" for name in names)
        return Step(recipe.name, argv, after, (self.timing_file,))

    def _digits(self, recipe: Recipe) -> Step:
        out = self.digits_file.parent
        argv = ["mnist_amort", "-o", str(out), "--overwrite", *_to_argv(self._flags(recipe, {}))]
        argv += ["--seeds", *map(str, self.seeds)]
        return Step(recipe.name, tuple(argv), (), (self.digits_file, out / "report.html"))

    def check(self) -> None:
        """Check every command before the first one is run.

        Raises
        ------
        InputError
            Names the place in the plan, and what is wrong there.
        """
        for section, command, flags in self._given():
            taken = [k for k in flags if k in _TAKEN[command]]
            if taken:
                raise self._mistake(section, f"{taken[0]}: is given by the study itself")
            for key in flags:
                if _action(self.parsers[command], key) is None:
                    raise self._mistake(section, f"{key}: {command} has no such flag")
        for name in self.recipes:
            self._check_parents(name)
        known: dict[str, TrainSettings] = {}
        for step in self.steps.values():
            try:
                args = parse(self.parsers[step.argv[0]], step.argv[1:])
                if step.argv[0] == "train_amort":
                    parent = next((known[name] for name in step.after if name in known), None)
                    if args.get("from_run") and parent is not None:
                        args = inherited(args, parent, _SOME, self.plugins)
                    known[step.name] = settings_from_flags(args, self.plugins)
                if step.argv[0] == "eval_amort":
                    names = {f.name for f in fields(EvalOptions)}
                    options = EvalOptions(**{k: v for k, v in args.items() if k in names})
                    for transform in options.transforms:
                        self.plugins.transform(transform.partition(":")[0])
            except InputError as err:
                place = re.sub(r"^[a-z]+\.(.+)\.seed\d+$", r"recipes.\1", step.name)
                raise self._mistake(place, str(err)) from None
        for name, value in self.data.items():
            if name != "simulate" and not os.path.exists(value):
                raise self._mistake(f"data.{name}", f"{value}: does not exist")

    def _given(self) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
        """Yield every section of flags: its name, the command, the flags."""
        yield "data.simulate", "simulate_amort", self.data.get("simulate", {})
        yield "train", "train_amort", self.train
        yield "evaluate", "eval_amort", self.evaluate
        for name, flags in self.recipes.items():
            command = self.recipe(name).command
            own = {k: v for k, v in flags.items() if (command, k) != ("time_amort", "recipes")}
            yield f"recipes.{name}", command, own

    def _check_parents(self, name: str) -> None:
        for parent in self._needed(name):
            if parent not in self.recipes:
                raise self._mistake(
                    f"recipes.{name}", f"needs the recipe {parent}, which is not in the plan"
                )
            missing = set(self.seeds_of(name)) - set(self.seeds_of(parent))
            if missing and parent in self.recipe(name).parents.values():
                raise self._mistake(
                    "more_seeds", f"{name} with seed {min(missing)} needs {parent} with that seed"
                )

    def _mistake(self, section: str, message: str) -> InputError:
        return InputError(f"{self.folder / PLAN}: {section}: {message}")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Parse flags; a mistake is an InputError, in the parser's words."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return vars(parser.parse_args(list(argv)))
    except SystemExit:
        message = said.getvalue().strip().rpartition("error: ")[2]
        raise InputError(message or "not understood") from None


def _action(parser: argparse.ArgumentParser, key: str) -> argparse.Action | None:
    flag = f"-{key}" if len(key) == 1 else f"--{key}"
    return next((a for a in actions_of(parser) if flag in a.option_strings), None)


def _dest(parser: argparse.ArgumentParser, key: str) -> str:
    action = _action(parser, key)
    return key if action is None else action.dest


def _to_argv(flags: Mapping[str, Any]) -> list[str]:
    """Write flags as on a command line, in one order; a flag that is off leaves no trace."""
    argv: list[str] = []
    for key, value in sorted(flags.items()):
        if value is None or value is False:
            continue
        argv.append(f"-{key}" if len(key) == 1 else f"--{key}")
        if value is not True:
            argv += [str(v) for v in (value if isinstance(value, list | tuple) else [value])]
    return argv


def _within(argument: str, folder: Path) -> str:
    """Return a path below the study's folder as relative to it, so that a study can be moved."""
    for root in (str(folder), str(folder.absolute())):
        if argument == root or argument.startswith(root + os.sep):
            return "STUDY" + argument[len(root) :]
    return argument


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _identity(path: str | Path) -> list[Any]:
    """Return what tells one version of a user's file from another."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def _listing(folder: Path) -> list[Any]:
    """Return the files of a folder and their versions; nothing if there is no such folder."""
    if not folder.is_dir():
        return []
    files = (p for p in sorted(folder.iterdir()) if p.is_file() and p.name[0] != ".")
    return [[path.name, *_identity(path)] for path in files]
