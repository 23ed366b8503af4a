"""What ``eval_amort --transform`` can name: a list, not code. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryodrgn_amort.core import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryodrgn_amort.data.particles import Particles
    from cryodrgn_amort.data.transforms import Transform

__all__ = ["TRANSFORMS", "TransformSpec"]


@dataclass(frozen=True)
class TransformSpec:
    """A transform that ``eval_amort --transform NAME[:ARGUMENT]`` can use.

    Attributes
    ----------
    build
        Makes it from what stands behind the colon (None: nothing does) and the run's particles.
        Raises InputError if the argument, or this run, does not fit.
    """

    name: str
    summary: str
    build: Callable[[str | None, Particles], Transform]


def _roll(argument: str | None, particles: Particles) -> Transform:
    from cryodrgn_amort.data.transforms import Roll

    try:
        shift_px = int(argument or "1")
    except ValueError:
        raise InputError(f"--transform roll:{argument}: whole pixels are needed") from None
    if shift_px == 0 or abs(shift_px) >= particles.box:
        raise InputError(
            f"--transform roll:{argument}: must be between 1 and {particles.box - 1} pixels "
            f"(negative: left) for a box of {particles.box}"
        )
    return Roll(shift_px)


def _rotate(argument: str | None, particles: Particles) -> Transform:
    from cryodrgn_amort.data.transforms import Rotation

    try:
        angle_deg = float(argument or "90")
    except ValueError:
        angle_deg = math.nan
    if not 0 < abs(angle_deg) < 360:  # nor is nan
        raise InputError(
            f"--transform rotate:{argument}: must be an angle in degrees, above 0 and below 360 "
            "(negative: anticlockwise)"
        )
    return Rotation(angle_deg)


TRANSFORMS = (
    TransformSpec("roll", "roll by N pixels to the right, wrapping (roll:N, default 1)", _roll),
    TransformSpec(
        "rotate", "turn clockwise by A degrees (rotate:A, any angle, default 90)", _rotate
    ),
)
