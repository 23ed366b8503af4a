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

__all__ = ["PythonUnpickler", "actions_of", "replaced"]


class PythonUnpickler(pickle._Unpickler):
    """The one written in Python: that in C makes room for as many objects as a file claims."""


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return all that a parser understands, in the order in which it was added."""
    return parser._actions


@contextlib.contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Let a name of somebody else's module stand for something else for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
