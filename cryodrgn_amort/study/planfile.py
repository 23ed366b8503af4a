"""The file plan.yaml: presets, changes from the command line, reading and checking."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cryodrgn_amort.core import InputError, check_plain, read_text, write_text
from cryodrgn_amort.study.checks import check
from cryodrgn_amort.study.plan import INPUTS, KNOWN, PLAN, Plan

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from cryodrgn_amort.core import Registry


__all__ = ["PRESETS", "changed_plan", "load_plan", "write_plan"]

PRESETS = ("demo", "paper", "real")
_SECTIONS = ("data", "seeds", "more_seeds", "train", "evaluate", "recipes")


def changed_plan(
    folder: Path,
    preset: str | None,
    data: Mapping[str, str],
    seeds: Sequence[int] | None,
    recipes: Sequence[str] = (),
) -> str:
    """Return the text of a study's plan: the one in its folder or a preset's, with what is given.

    Parameters
    ----------
    data
        Inputs of the particles by flag, as given; they replace the plan's.
    recipes
        Further ones, for plans that do not have them.

    Raises
    ------
    InputError
        If what is given does not go together.
    """
    path = folder / PLAN
    if folder.exists() and not folder.is_dir():
        raise InputError(f"-o {folder}: not a folder")
    if path.exists():
        if preset is not None:
            raise InputError(f"--preset {preset}: {path} is there already; edit it, or choose "
                             "another folder")  # fmt: skip
        text = read_text(path, "STUDY")
    else:
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"-o {folder}: is not empty, and no study")
        text = _preset_text(preset or ("paper" if data else "demo"))
    if data:
        for name in ("particles", "poses"):
            if name not in data:
                flag = "PARTICLES" if name == "particles" else f"--{name}"
                raise InputError(f"{flag}: is needed with --{next(iter(data))}")
        text = _with_section(text, "data", dict(data))
    if seeds is not None:
        text = _with_section(text, "seeds", list(seeds))
    return _with_recipes(text, recipes)


def _preset_text(name: str) -> str:
    """Return a preset's plan; ``name`` may also be a plan file of the user's."""
    if name in PRESETS:
        return (resources.files("cryodrgn_amort.study") / "plans" / f"{name}.yaml").read_text(
            "utf-8"
        )
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise InputError(f"--preset {name}: neither {' nor '.join(PRESETS)} nor a plan (.yaml)")
    return read_text(path, "--preset")


def _with_section(text: str, section: str, value: Any) -> str:
    """Replace a top-level section of a plan; comments elsewhere stay."""
    body = yaml.safe_dump({section: value}, sort_keys=False, default_flow_style=None)
    pattern = _section(section)
    if not pattern.search(text):
        return f"{text.rstrip()}\n\n{body}"
    return pattern.sub(lambda _: body, text, count=1)


def _with_recipes(text: str, names: Sequence[str]) -> str:
    """Add recipes to a plan, at their end; comments stay. What is no plan is left as it is."""
    try:
        present = yaml.safe_load(text)["recipes"]
        missing = [name for name in names if name not in present]
    except (yaml.YAMLError, KeyError, TypeError):
        return text
    if not missing:
        return text
    section = _section("recipes").search(text)
    block = section is not None and re.search(r"\n( *)(- )?[^\s#]", section[0])
    if section is None or not block:  # on one line
        whole = [*present] if isinstance(present, list) else dict(present)
        whole = [*whole, *missing] if isinstance(whole, list) else whole | dict.fromkeys(missing)
        return _with_section(text, "recipes", whole)
    lines = [f"{block[1]}- {n}\n" if block[2] else f"{block[1]}{n}:\n" for n in missing]
    before = section[0].rstrip("\n") + "\n"
    return text[: section.start()] + before + "".join(lines) + text[section.end() :]


def _section(name: str) -> re.Pattern[str]:
    return re.compile(rf"^{name}:.*\n(?:[ -].*\n|\n(?=[ -]))*", re.MULTILINE)


def write_plan(folder: Path, text: str) -> None:
    """Write the plan of a study."""
    write_text(folder / PLAN, text)


def load_plan(
    folder: Path, text: str, plugins: Registry, parsers: Mapping[str, argparse.ArgumentParser]
) -> Plan:
    """Read a plan and check all of it.

    Raises
    ------
    InputError
        Names the place, and what is wrong there.
    """
    where = str(folder / PLAN)
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise InputError(f"{where}: not YAML ({' '.join(str(err).split())})") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    check_plain(found, len(text), where)
    try:
        recipes, more = _recipes(found, plugins)
        plan = Plan(
            folder=folder,
            data=_data(found.get("data"), folder),
            seeds=_integers(found.get("seeds", [0]), "seeds"),
            more_seeds={k: _integers(v, f"more_seeds: {k}") for k, v in more.items()},
            train=_flags(found.get("train"), "train"),
            evaluate=_flags(found.get("evaluate"), "evaluate"),
            recipes={k: _flags(v, f"recipes: {k}") for k, v in recipes.items()},
            plugins=plugins,
            parsers=parsers,
        )
    except InputError as err:
        raise InputError(f"{where}: {err}") from None
    check(plan)
    return plan


def _recipes(found: Any, plugins: Registry) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the recipes and their further seeds, of what the file holds."""
    if not isinstance(found, dict):
        raise InputError(f"not a plan: sections {', '.join(_SECTIONS)} are needed")
    for name in found:
        if name not in _SECTIONS:
            raise InputError(f"{name}: no such section; known are {', '.join(_SECTIONS)}")
    recipes, known = found.get("recipes"), plugins.owned("recipes")
    if isinstance(recipes, list) and all(isinstance(name, str) for name in recipes):
        recipes = dict.fromkeys(recipes)
    if not isinstance(recipes, dict) or not recipes:
        raise InputError("recipes: at least one is needed")
    for name in recipes:
        if name not in known:
            raise InputError(f"recipes: {name}: unknown; known are {', '.join(sorted(known))}")
        command = plugins.recipe(name).command
        if command not in ("train_amort", "eval_amort", "time_amort", "mnist_amort"):
            raise InputError(f"recipes: {name}: is of {command}, which no study runs")
    more = _flags(found.get("more_seeds"), "more_seeds")
    for name in more:
        if name not in known:
            raise InputError(f"more_seeds: {name}: not a recipe")
    return recipes, more


def _flags(value: Any, section: str) -> dict[str, Any]:
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise InputError(f"{section}: flags are needed, as `name: value`, not {value!r}")
    for key, item in value.items():
        items = item if isinstance(item, list) else [item]
        if not isinstance(key, str) or any(isinstance(i, dict | list) for i in items):
            raise InputError(f"{section}: {key}: a value, or a list of values, is needed")
    return dict(value)


def _integers(value: Any, section: str) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
    if not whole or not value or len(set(value)) < len(value):
        raise InputError(f"{section}: {value}: a list of different whole numbers is needed")
    return tuple(value)


def _data(found: Any, folder: Path) -> dict[str, Any]:
    if not isinstance(found, dict) or not found:
        raise InputError("data: either simulate or particles is needed")
    if "simulate" in found:
        if len(found) > 1:
            raise InputError("data: simulate stands alone")
        return {"simulate": _flags(found["simulate"], "data: simulate")}
    for name, value in found.items():
        if name not in (*INPUTS, *KNOWN):
            known = ", ".join((*INPUTS, *KNOWN, "simulate"))
            raise InputError(f"data: {name}: unknown; known are {known}")
        if value is not None and not isinstance(value, str):
            raise InputError(f"data: {name}: a path is needed, not {value!r}")
    for name in ("particles", "poses"):
        if not found.get(name):
            raise InputError(f"data: {name}: is needed")
    return {k: os.path.join(folder.absolute(), v) for k, v in found.items() if v}
