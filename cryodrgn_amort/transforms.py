"""Transforms: changes of the image under which the true latent does not change.

Each changes image, pose and CTF together, so that the same volume still explains the image.
Image axes: x is the last axis and points right, y the one before and points down; the origin of
both image and Fourier space is pixel (box / 2, box / 2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cryodrgn_amort.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryodrgn_amort.particles import Particles

__all__ = ["TRANSFORMS", "Roll", "Rotation", "Transform", "TransformSpec"]

_ASTIGMATISM_ANGLE = 3  # column of the CTF parameters, degrees


class Transform(ABC):
    """A change of images, and of pose and CTF with them.

    Attributes
    ----------
    title
        What it does, for humans: "rolled 1 px right".
    """

    title: str

    @abstractmethod
    def image(self, raw: Tensor) -> Tensor:
        """Change real-space images `(B, box, box)`, before the window."""

    def pose(self, rot: Tensor, trans_px: Tensor) -> tuple[Tensor, Tensor]:
        """Change rotations `(B, 3, 3)` and centring translations `(B, 2)` in pixels with them."""
        return rot, trans_px

    def ctf(self, params: Tensor) -> Tensor:
        """Change CTF parameters `(B, 8)` (see ``particles.load_ctf``) with them."""
        return params


class Roll(Transform):
    """Roll ``shift_px`` pixels to the right, wrapping around (paper, figure 10)."""

    def __init__(self, shift_px: int) -> None:
        self.shift_px = shift_px
        side = "right" if shift_px > 0 else "left"
        self.title = f"rolled {abs(shift_px)} px {side}"

    def image(self, raw: Tensor) -> Tensor:
        """Roll along x."""
        return torch.roll(raw, self.shift_px, -1)

    def pose(self, rot: Tensor, trans_px: Tensor) -> tuple[Tensor, Tensor]:
        """Centring has to shift that much less."""
        return rot, trans_px - trans_px.new_tensor([self.shift_px, 0])


class Rotation(Transform):
    """Turn clockwise by quarter turns about pixel (box / 2, box / 2) (paper, figure 11).

    That pixel is the origin of Fourier space. ``rot90`` of an array turns an even box about
    (box - 1) / 2, half a pixel off in both directions; rolling the result by one pixel mends it
    exactly, and four quarter turns are the identity.
    """

    def __init__(self, quarters: int) -> None:
        self.quarters = quarters
        self.title = f"turned {90 * quarters} degrees clockwise"

    def image(self, raw: Tensor) -> Tensor:
        """Turn by index permutation."""
        for _ in range(self.quarters):
            raw = torch.roll(torch.rot90(raw, -1, (-2, -1)), 1, -1)
        return raw

    def pose(self, rot: Tensor, trans_px: Tensor) -> tuple[Tensor, Tensor]:
        """Turn with the image: (x, y) -> (-y, x) for each quarter."""
        turn = rot.new_tensor([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
        turn = torch.linalg.matrix_power(turn, self.quarters)
        return turn @ rot, trans_px @ turn[:2, :2].T

    def ctf(self, params: Tensor) -> Tensor:
        """The astigmatism turns as well."""
        params = params.clone()
        params[:, _ASTIGMATISM_ANGLE] += 90 * self.quarters
        return params


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


def _roll(argument: str | None, particles: Particles) -> Roll:
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


def _rotate(argument: str | None, particles: Particles) -> Rotation:
    angles = {"90": 1, "180": 2, "270": 3}
    if (argument or "90") not in angles:
        raise InputError(f"--transform rotate:{argument}: one of 90, 180, 270 degrees is needed")
    return Rotation(angles[argument or "90"])


TRANSFORMS = (
    TransformSpec("roll", "roll by N pixels to the right, wrapping (roll:N, default 1)", _roll),
    TransformSpec("rotate", "turn clockwise by 90, 180 or 270 degrees (rotate:A)", _rotate),
)
