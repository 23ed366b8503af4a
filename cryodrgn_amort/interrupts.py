"""Signals that ask a training to stop: heeded after the batch at hand."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["Requests"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Requests:
    """Notes SIGTERM and Ctrl-C while it is open, once; a second one acts as usual.

    Of several processes, to which ``torchrun`` passes on what they may have got themselves, all
    signals are noted.

    Outside the main thread, where Python has no signals, it notes nothing.

    Attributes
    ----------
    number
        The signal that came; None: there was none.
    """

    def __init__(self, *, several: bool = False) -> None:
        self.number: int | None = None
        self._several = several
        self._heed = threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str:
        """For humans: "SIGTERM"."""
        return "" if self.number is None else signal.Signals(self.number).name

    def __enter__(self) -> Requests:
        if self._heed:
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if not self._several:
            self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
