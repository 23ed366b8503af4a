"""The host's analysis of a run that has just been trained."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cryodrgn_amort import host

if TYPE_CHECKING:
    from pathlib import Path


__all__ = ["analyze_run"]
logger = logging.getLogger("cryodrgn_amort")


def analyze_run(folder: Path, epoch: int, n: int, zdim: int) -> None:
    """Let the host analyze a run, which is complete whatever comes of it."""
    try:
        left_out = host.analyze(str(folder), epoch, n, zdim)
    except Exception as err:  # whatever its own libraries raise
        left_out = f"{type(err).__name__}: {err}".splitlines()[0]
    if left_out is not None:
        logger.warning(f"cryodrgn analyze, not all of it: {left_out}")
