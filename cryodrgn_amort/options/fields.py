"""One declaration per flag: a dataclass field that is the flag, its check, and the API's keyword.

@dataclass(frozen=True)
class EvalOptions(Options):
sample: int = flag("--sample", default=1000, least=2, metavar="N", help="Particles for ...")
"""

from __future__ import annotations

import argparse
import difflib
import math
import numbers
import os
import re
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from cryodrgn_amort.core import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    T = TypeVar("T", bound="Options")

__all__ = [
    "PRECISIONS",
    "Flag",
    "Options",
    "add_flags",
    "flag",
    "flags_of",
    "near",
    "of_host",
    "of_kind",
    "of_run_precision",
]

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp64")
"""Of matrix products. TF32 is float32 that a GPU rounds as it multiplies."""
HUGE = 2**63 - 1
"""Numbers of this size fit what keeps them."""
_KEY = "flag"


@dataclass(frozen=True)
class Flag:
    """How a field is given on the command line, and which values it takes.

    Attributes
    ----------
    names
        "-n", "--num-epochs"; the name of a positional argument without dashes.
    help
        For humans; the default is added.
    group
        Title of the flags around it, in the help; empty: none.
    least, above, most, below
        Bounds of a number, themselves allowed or not.
    wanted
        What is said of a value out of bounds; empty: what follows from them.
    choices
        The only values; None: any.
    of_host
        Whether the host's own parser has it.
    more
        What else ``argparse`` is told.
    """

    names: tuple[str, ...]
    help: str
    group: str = ""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    wanted: str = ""
    choices: tuple[str, ...] | None = None
    of_host: bool = False
    more: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The one by which messages call it: the long one, or the positional's in capitals."""
        longest = max(self.names, key=len)
        return longest if longest.startswith("-") else longest.upper()

    def refuse(self, value: Any) -> str | None:
        """Say what is wrong with a value; None: nothing."""
        values = value if isinstance(value, tuple) else (value,)
        if self.choices is not None:
            wrong = [v for v in values if v not in self.choices]
            return (
                f"{self.name} {wrong[0]}: not one of {', '.join(self.choices)}" if wrong else None
            )
        for one in values:
            if isinstance(one, numbers.Real) and not self._holds(one):
                return f"{self.name} {one}: {self.wanted or self._bounds()}"
        return None

    def _holds(self, value: Any) -> bool:
        """Tell whether a number is within all bounds that there are."""
        if self.least is None and self.above is None and self.most is None:
            return True
        most = HUGE if self.most is None and self.least == 0 else self.most
        return bool(
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (value < math.inf if most is None else value <= most)
        )

    def _bounds(self) -> str:
        if self.least == 0 and self.most in (None, HUGE):
            return "must not be negative, nor huge"
        if self.above == 0:
            return "must be positive"
        if self.least is not None and self.most is not None:
            return f"{self.least:g} to {self.most:g} is needed"
        return "must be finite" if self.least is None else f"must be at least {self.least:g}"


def flag(
    *names: str,
    help: str,
    default: Any = MISSING,
    group: str = "",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    wanted: str = "",
    choices: tuple[str, ...] | None = None,
    **more: Any,
) -> Any:
    """Declare a field of options that is a flag; see ``Flag``. Without a default it is required.

    ``more`` are arguments of ``argparse``: ``metavar``, ``nargs``, ``const``, ``type``.
    """
    found = Flag(names, help, group, least, above, most, wanted, choices, more=more)
    return field(default=default, metadata={_KEY: found})


def of_host(name: str, default: Any = MISSING, **bounds: Any) -> Any:
    """Declare a field that is a flag of ``train_vae``, whose parser has its help and default."""
    return field(default=default, metadata={_KEY: Flag((name,), "", of_host=True, **bounds)})


def of_run_precision(group: str) -> Any:
    """Declare the field by which a command on a run says how its decoder multiplies."""
    known = PRECISIONS[:-1]
    return flag(
        "--precision", default=None, choices=known, group=group, metavar="|".join(known),
        help="Of the decoder's matrix products (default: fp32 on CPUs; on GPUs as in a training\n"
        "with RUN's flags)",
    )  # fmt: skip


def flags_of(options: Any) -> dict[str, Flag]:
    """Return the flags of a dataclass, or of one of it, by the name of the field."""
    return {f.name: f.metadata[_KEY] for f in fields(options) if _KEY in f.metadata}


class Options:
    """Base of what a command is asked to do; each value is checked when it is made.

    Raises
    ------
    InputError
        Names the flag and the value that is out of bounds.
    """

    def __post_init__(self) -> None:
        for name, one in flags_of(self).items():
            value = getattr(self, name)
            wrong = None if value is None else one.refuse(value)
            if wrong is not None:
                raise InputError(wrong)

    @classmethod
    def of(cls: type[T], args: argparse.Namespace | Mapping[str, Any]) -> T:
        """Make options from what a parser found, or from keywords: those that are fields."""
        found = vars(args) if isinstance(args, argparse.Namespace) else args
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        return cls(**{k: _plain(v) for k, v in found.items() if k in known})

    @classmethod
    def of_keywords(cls: type[T], given: Mapping[str, Any]) -> T:
        """Make options from the keywords of a Python function.

        Raises
        ------
        InputError
            If there is no such option, or a value is of another type.
        """
        known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
        plain = {name: _plain(value) for name, value in given.items()}
        for name, value in plain.items():
            if name not in known:
                raise InputError(f"{name}: there is no such option{near(name, known)}")
            kind = _kind(known[name])
            values = value if isinstance(value, tuple) else (value,)
            if kind is not None and not all(v is None or _is(kind, v) for v in values):
                raise InputError(f"{name} {value!r}: {kind.__name__} is needed")
        try:
            return cls(**plain)
        except (TypeError, AttributeError) as err:
            raise InputError(f"{cls.__name__}: {err}") from None


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """Add the flags of options to a parser; one that is not given leaves no trace."""
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for f in fields(options):
        one: Flag | None = f.metadata.get(_KEY)
        if one is None or one.of_host:
            continue
        if one.group not in groups:
            groups[one.group] = parser.add_argument_group(one.group)
        more: dict[str, Any] = {"default": argparse.SUPPRESS, **(one.more or {})}
        kind = _kind(f)
        if kind is bool:
            more["action"] = "store_false" if f.default else "store_true"
        elif kind in (int, float):
            more.setdefault("type", kind)
        if one.names[0].startswith("-"):
            more["dest"] = f.name
            more["required"] = f.default is MISSING
        groups[one.group].add_argument(*one.names, help=_help(one, f), **more)


def of_kind(f: Field[Any], value: Any) -> Any:
    """Return a number as the annotation of a field has it: 0 as 0.0."""
    return float(value) if _kind(f) is float and type(value) is int else value


def near(name: str, known: Collection[str]) -> str:
    """Suggest the known name that is meant, if one is like it."""
    found = difflib.get_close_matches(name, known, 1)
    return f"; is {found[0]} meant?" if found else ""


def _kind(f: Field[Any]) -> Any:
    """Return bool, int or float as its annotation says, alone or in a tuple; None: another."""
    words = re.findall(r"\w+", str(f.type))
    kinds = {"bool": bool, "int": int, "float": float}
    return None if "str" in words else next((kinds[w] for w in words if w in kinds), None)


def _is(kind: type, value: Any) -> bool:
    """Tell whether a value, Python's or NumPy's, is of a kind; no truth value is a number."""
    truth = type(value).__name__ in ("bool", "bool_")
    number = numbers.Integral if kind is int else numbers.Real
    return truth if kind is bool else isinstance(value, number) and not truth


def _help(one: Flag, f: Field[Any]) -> str:
    default = f.default
    if default in (None, MISSING, (), "") or _kind(f) is bool or "(default" in one.help:
        return one.help
    words = map(str, default) if isinstance(default, tuple) else (f"{default}",)
    return f"{one.help} (default: {' '.join(words)})"


def _plain(value: Any) -> Any:
    """Return paths as text, and lists as tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value
