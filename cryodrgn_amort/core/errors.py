"""The exceptions that a user is meant to see."""

from __future__ import annotations

__all__ = ["InputError", "Stopped"]


class InputError(ValueError):
    """A mistake in what the user gave: names the flag or file, the value, and what would be right.

    Command lines print it as one line and exit with code 2; nothing has been written when it is
    raised.
    """


class Stopped(Exception):
    """Work was asked to stop by a signal, and has kept what was done.

    Command lines print it as one line and exit with 128 + the signal's number, as shells do.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
