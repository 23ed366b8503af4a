"""What we use of Python's and others' parts that are not public: each in one place, with a test.

What is the host's is in ``host`` and, for its command line, in ``cli``. Imports nothing that takes
time.
"""

from __future__ import annotations

import contextlib
import pickle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from types import ModuleType

    from torch import Tensor


__all__ = ["PythonUnpickler", "abbreviate", "actions_of", "all_finite", "multiply", "replaced"]


class PythonUnpickler(pickle._Unpickler):
    """The one written in Python: that in C makes room for as many objects as a file claims."""


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return all that a parser understands, in the order in which it was added."""
    return parser._actions


def abbreviate(parser: argparse.ArgumentParser, actions: list[argparse.Action]) -> None:
    """Let beginnings of long flags mean what they meant when only ``actions`` were there.

    argparse takes any beginning that is unique among all flags; further ones take some away.
    """
    known, every = {id(action) for action in actions}, parser._get_option_tuples

    def meant(option_string: str) -> list[Any]:
        found: list[Any] = every(option_string)  # the action first, whatever else
        before = [each for each in found if id(each[0]) in known]
        return before if len(before) == 1 else found

    parser._get_option_tuples = meant  # type: ignore[method-assign]


def multiply(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors by a scalar, in place, all at once."""
    import torch

    torch._foreach_mul_(tensors, factor)


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Tell whether all numbers are finite, as a scalar on their device."""
    import torch

    return torch.stack(torch._foreach_norm(tensors)).sum().isfinite()


@contextlib.contextmanager
def replaced(module: ModuleType | type, name: str, value: Any) -> Iterator[None]:
    """Let a name of somebody else's module or class stand for something else for a while."""
    before = vars(module)[name]
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
