"""What a long command shows: a bar on a terminal, and lines in a log file."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm  # tqdm.auto would start an iterator of its own: one more random draw
from tqdm.contrib.logging import logging_redirect_tqdm

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    T = TypeVar("T")

__all__ = ["bar", "logging_to", "on_terminal"]

_logger = logging.getLogger("cryodrgn_amort")


def on_terminal() -> bool:
    """Tell whether stderr is a terminal."""
    return sys.stderr.isatty()


def bar(
    items: Iterable[T], what: str, total: int | None = None, silent: bool = False
) -> Iterator[T]:
    """Go through ``items``; a terminal shows how far, unless ``silent``."""
    return iter(tqdm(items, what, total, leave=False, disable=silent or not on_terminal()))


class _LogFile(logging.FileHandler):
    """Lines that cannot be written, as on a full disk, are lost; a checkpoint then says why."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Go on."""


class logging_to:
    """Copy our log lines into a file for a while, and keep them clear of the progress bar.

    Without a ``path`` only errors are shown.
    """

    def __init__(self, path: Path | None, verbose: bool) -> None:
        self._handler = (
            logging.NullHandler()
            if path is None
            else _LogFile(path, encoding="utf-8", errors="backslashreplace")
        )
        self._handler.setFormatter(
            logging.Formatter("(%(levelname)s) (%(asctime)s) %(message)s", "%d-%b-%Y %H:%M:%S")
        )
        self._level = logging.DEBUG if verbose else logging.INFO
        self._level = logging.ERROR if path is None else self._level
        self._redirect = logging_redirect_tqdm()

    def __enter__(self) -> None:
        self._before = _logger.level
        _logger.setLevel(self._level)
        _logger.addHandler(self._handler)
        if on_terminal():
            self._redirect.__enter__()

    def __exit__(self, *exc: Any) -> None:
        if on_terminal():
            self._redirect.__exit__(*exc)
        _logger.removeHandler(self._handler)
        self._handler.close()
        _logger.setLevel(self._before)
