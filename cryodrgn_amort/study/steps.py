"""What a plan stands for: steps, each a command of ours with its flags.

What a step depends on, and whether it has been done already, is decided by its fingerprint: of its
command, the files that this names, what its recipe says, the versions of what does it, and of the
steps before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shlex
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.core import InputError, __version__, actions_of
from cryodrgn_amort.models import EncoderSpec
from cryodrgn_amort.options import flag_name
from cryodrgn_amort.study.plan import KNOWN, Layout

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence

    from cryodrgn_amort.core import Registry
    from cryodrgn_amort.options import Recipe
    from cryodrgn_amort.study.plan import Plan


__all__ = ["Fingerprints", "Step", "Work", "action_of", "parse", "steps_of", "work_of"]


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
class Work:
    """Steps in a folder, and what they are done with.

    Attributes
    ----------
    steps
        By name, each after those that it needs.
    report
        The command, with its flags, that does what is left and makes the report.
    parsers
        Of commands, by name.
    """

    folder: Path
    steps: Mapping[str, Step]
    report: tuple[str, ...]
    parsers: Mapping[str, argparse.ArgumentParser]
    plugins: Registry

    @property
    def layout(self) -> Layout:
        """Where its parts are."""
        return Layout(self.folder)


def work_of(plan: Plan) -> Work:
    """Return the work that a plan stands for; raises what ``steps_of`` does."""
    report = ("study_amort", "-o", str(plan.folder))
    return Work(plan.folder, steps_of(plan), report, plan.parsers, plan.plugins)


def steps_of(plan: Plan) -> dict[str, Step]:
    """Return all steps of a plan by name, each after those that it needs.

    Raises
    ------
    InputError
        If one needs itself, or a step that is not in the plan.
    """
    found = {step.name: step for step in _steps(plan)}
    ordered: dict[str, Step] = {}

    def add(name: str, path: tuple[str, ...]) -> None:
        for parent in found[name].after:
            if parent not in found or parent in path:
                why = "needs itself" if parent in path else "is not in the plan"
                raise plan.mistake("recipes", f"{name} needs {parent}, which {why}")
            add(parent, (*path, name))
        ordered.setdefault(name, found[name])

    for name in found:
        add(name, (name,))
    return ordered


def _steps(plan: Plan) -> Iterable[Step]:
    start: tuple[str, ...] = ()
    if "simulate" in plan.data:
        argv = ("simulate_amort", "-o", str(plan.layout.simulated), "--overwrite")
        flags = _to_argv(plan.data["simulate"])
        yield Step("simulate", (*argv, *flags), (), (plan.layout.simulated / "simulation.yaml",))
        start = ("simulate",)
    for name in plan.recipes:
        recipe = plan.recipe(name)
        if recipe.command == "time_amort":
            yield _time(plan, recipe)
            continue
        if recipe.command == "mnist_amort":
            yield _digits(plan, recipe)
            continue
        for seed in plan.seeds_of(name):
            if recipe.command == "train_amort":
                yield _train(plan, recipe, seed, start)
            yield _evaluate(plan, recipe, seed)
        if recipe.command == "train_amort":
            yield from _agreement(plan, recipe)


def _flags(plan: Plan, recipe: Recipe, common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that are given: the recipe's own win over the common ones.

    An encoder of a second stage that learns from images made up has its run's flags instead.
    """
    parser = plan.parsers[recipe.command]
    if "from_run" in recipe.parents and _sleeps(plan, recipe):
        return dict(plan.recipes[recipe.name])
    if recipe.command == "train_amort":  # --recipe gives these
        own = set(recipe.flags)
        kept = {k: v for k, v in common.items() if _dest(parser, k) not in own}
        return {**kept, **plan.recipes[recipe.name]}
    return {**common, **recipe.flags, **plan.recipes[recipe.name]}


def _sleeps(plan: Plan, recipe: Recipe) -> bool:
    spec = plan.plugins.encoder(recipe.flags.get("encoder", "resid"))
    return isinstance(spec, EncoderSpec) and spec.sleeps


def _train(plan: Plan, recipe: Recipe, seed: int, start: tuple[str, ...]) -> Step:
    inputs, out = plan.inputs(), plan.layout.run(recipe.name, seed)
    flags = _flags(plan, recipe, plan.train)
    argv = ["train_amort", inputs.pop("particles"), *_to_argv(inputs)]
    argv += ["--recipe", recipe.name, *_to_argv(flags)]
    after = list(start)
    for flag, parent in recipe.parents.items():
        argv += [flag_name(flag), str(plan.layout.run(parent, seed))]
        after.append(f"train.{parent}.seed{seed}")
    argv += ["--seed", str(seed), "--no-analysis", "-o", str(out)]
    outputs = (out / "z.pkl", out / "weights.pkl")
    encoder = str({**recipe.flags, **flags}.get("encoder", "resid"))
    kinds = (("recipes", recipe.name), ("encoders", encoder), ("encoder_inputs", encoder))
    says = json.dumps(dict(recipe.flags), sort_keys=True, default=str)
    return Step(
        f"train.{recipe.name}.seed{seed}", tuple(argv), tuple(after), outputs, says,
        plan.plugins.bringing(*kinds),
    )  # fmt: skip


def _evaluate(plan: Plan, recipe: Recipe, seed: int) -> Step:
    of = recipe.parents.get("run", recipe.name)
    out = plan.layout.evaluation(recipe.name, seed)
    argv = ["eval_amort", str(plan.layout.run(of, seed)), "-o", str(out)]
    known = {name: plan.data[name] for name in KNOWN if plan.data.get(name)}
    if plan.truth is not None:
        known["truth"] = str(plan.truth)
    argv += _to_argv(known)
    own = recipe.command == "eval_amort"
    flags = _flags(plan, recipe, plan.evaluate) if own else plan.evaluate
    argv += _to_argv(flags)
    after = (f"train.{of}.seed{seed}",)
    outputs = (out / "amortization.json", out / "report.html")
    asked = flags.get("transform") or ()
    used = asked if isinstance(asked, list | tuple) else [asked]
    kinds = [("transforms", str(name).partition(":")[0]) for name in used]
    owners = plan.plugins.bringing(*kinds, hook="report_sections")
    name = f"eval.{recipe.name}.seed{seed}"
    return Step(name, tuple(argv), after, outputs, brought_by=owners)


def _agreement(plan: Plan, recipe: Recipe) -> Iterable[Step]:
    names = dict.fromkeys((recipe.reference, recipe.name))
    runs = [(name, seed) for name in names for seed in plan.seeds_of(name)]
    if len(runs) < 2:
        return
    out = plan.layout.agreement(recipe.name)
    folders = [str(plan.layout.run(name, seed)) for name, seed in runs]
    after = tuple(f"train.{name}.seed{seed}" for name, seed in runs)
    argv = ("compare_amort", *folders, "-o", str(out))
    yield Step(f"compare.{recipe.name}", argv, after, (out,))


def _time(plan: Plan, recipe: Recipe) -> Step:
    seed = plan.seeds[0]
    flags, names = _flags(plan, recipe, {}), plan.needed(recipe.name)
    flags.pop("recipes")
    folders = [str(plan.layout.run(name, seed)) for name in names]
    argv = ("time_amort", *folders, *_to_argv(flags), "-o", str(plan.layout.timing))
    after = tuple(f"train.{name}.seed{seed}" for name in names)
    return Step(recipe.name, argv, after, (plan.layout.timing,))


def _digits(plan: Plan, recipe: Recipe) -> Step:
    out = plan.layout.digits.parent
    argv = ["mnist_amort", "-o", str(out), "--overwrite", *_to_argv(_flags(plan, recipe, {}))]
    argv += ["--seeds", *map(str, plan.seeds)]
    return Step(recipe.name, tuple(argv), (), (plan.layout.digits, out / "report.html"))


class Fingerprints:
    """Hashes of all that decides what steps give."""

    def __init__(self, work: Work) -> None:
        self.folder, self.steps = work.folder, work.steps

    def of(self, step: Step) -> str:
        """Return a hash of all that decides what a step gives."""
        argv = [_within(argument, self.folder) for argument in step.argv]
        before = [self.of(self.steps[name]) for name in step.after]
        return _hash([argv, before, self._files(step), step.reads, step.versions])

    def _files(self, step: Step) -> list[Any]:
        """Tell the user's files and folders that a step's command names, and their versions."""
        found: list[Any] = []
        for flag, argument in pairwise(step.argv):
            is_path = os.sep in argument or os.path.splitext(argument)[1]
            if not is_path or flag == "--datadir":  # whatever else is there
                continue
            path = Path(os.path.abspath(argument))
            if path == Path(os.path.abspath(self.folder)):
                continue
            if self._made.isdisjoint((path, *path.parents)):
                found += _identity(path) if path.is_file() else _listing(path)
        return found

    @cached_property
    def _made(self) -> set[Path]:
        """What the steps make: files, and folders that are theirs alone."""
        folder = Path(os.path.abspath(self.folder))
        outputs = {Path(os.path.abspath(p)) for s in self.steps.values() for p in s.outputs}
        return (outputs | {path.parent for path in outputs}) - {folder}


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Parse flags.

    Raises
    ------
    InputError
        In the parser's words, if it does not understand them.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return vars(parser.parse_args(list(argv)))
    except SystemExit:
        message = said.getvalue().strip().rpartition("error: ")[2]
        raise InputError(message or "not understood") from None


def action_of(parser: argparse.ArgumentParser, key: str) -> argparse.Action | None:
    """Return what a parser does with a flag, named without dashes; None: it has no such flag."""
    flag = f"-{key}" if len(key) == 1 else f"--{key}"
    return next((a for a in actions_of(parser) if flag in a.option_strings), None)


def _dest(parser: argparse.ArgumentParser, key: str) -> str:
    action = action_of(parser, key)
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
