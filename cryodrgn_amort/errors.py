"""The one exception that a user is meant to see."""

from __future__ import annotations

__all__ = ["InputError"]


class InputError(ValueError):
    """A mistake in what the user gave: names the flag or file, the value, and what would be right.

    Command lines print it as one line and exit with code 2; nothing has been written when it is
    raised.
    """
