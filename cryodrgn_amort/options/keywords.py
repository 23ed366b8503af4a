"""Keywords of the Python API read as the flags of a command, by its own parser."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from cryodrgn_amort.core import InputError, actions_of
from cryodrgn_amort.options.fields import near

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


__all__ = ["parsed_keywords"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parsed_keywords(
    add_args: Callable[[argparse.ArgumentParser], None], given: Mapping[str, Any]
) -> argparse.Namespace:
    """Return what a command would be given, by its own parser.

    Parameters
    ----------
    given
        By the name of the flag or of its argument, with underscores; None: not given.
    """
    parser = _Parser(allow_abbrev=False, add_help=False)
    add_args(parser)
    actions: dict[str, list[argparse.Action]] = {}
    for action in actions_of(parser):
        flags = (flag[2:].replace("-", "_") for flag in action.option_strings if flag[:2] == "--")
        for name in {action.dest, *flags}:
            actions.setdefault(name, []).append(action)
    argv: list[str] = []
    for name, value in given.items():
        if name not in actions:
            raise InputError(f"{name}: there is no such flag{near(name, actions)}")
        if isinstance(value, np.ndarray):
            raise InputError(f"{name}: an array; a file, pickled, is needed")
        if value is not None:
            argv += _words(name, value, actions[name])
    return parser.parse_args(argv)


def _words(name: str, value: Any, actions: Sequence[argparse.Action]) -> list[str]:
    """Return a flag as it is written on a command line; nothing if the value is its default."""
    action = actions[0]
    flag = max(action.option_strings, key=len, default="")
    if action.nargs != 0:
        values = list(map(str, value)) if isinstance(value, list | tuple) else [str(value)]
        if not flag:
            return values
        return [f"{flag}={values[0]}"] if flag[:2] == "--" and len(values) == 1 else [flag, *values]
    if not isinstance(value, bool):
        raise InputError(f"{name} {value}: True or False is needed")
    for switch in actions:  # one flag may set what another one takes back
        if value if name != switch.dest else value == switch.const:
            return [max(switch.option_strings, key=len)]
    return []
