"""Signals that ask a training to stop: heeded after the batch at hand."""

from __future__ import annotations

import logging
import signal
import threading
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.core import Stopped

if TYPE_CHECKING:
    from types import FrameType

    from cryodrgn_amort.core import ProcessGroup


__all__ = ["StopSignals"]
logger = logging.getLogger("cryodrgn_amort")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
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

    def came(self, processes: ProcessGroup) -> bool:
        """Tell whether any of the processes was asked to stop; all have to ask."""
        self.number = processes.max(self.number or 0) or None
        return self.number is not None

    def stopped(self, epoch: int, done: int, batches: int) -> Stopped:
        """Log that training stops in an epoch, after some of its batches; returns what to raise."""
        assert self.number is not None
        name = signal.Signals(self.number).name
        by = f"by {name} in epoch {epoch} after {done} of {batches} batches"
        logger.info(f"Stopped {by}")
        return Stopped(f"stopped {by}; --load latest goes on from there", self.number)

    def __enter__(self) -> StopSignals:
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
