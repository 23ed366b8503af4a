"""Transforms: changes of the image under which the true latent does not change.

Each changes image, pose and CTF together, so that the same volume still explains the image.
Image axes: x is the last axis and points right, y the one before and points down; the origin of
both image and Fourier space is pixel (box / 2, box / 2).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

__all__ = ["ASTIGMATISM_ANGLE", "Roll", "Rotation", "Transform", "sheared_turn"]

ASTIGMATISM_ANGLE = 3  # column of the CTF parameters, degrees


class Transform(ABC):
    """A change of images, and of pose and CTF with them.

    Attributes
    ----------
    title
        What it does, for humans: "rolled 1 px right".
    undone_by_centring
        Whether an image that is changed, and centred by a translation that is changed with it, is
        the image as it was: a roll. Then mode *follow* is a control, and no test of the encoder.
    """

    title: str
    undone_by_centring: bool = False

    def __init_subclass__(cls) -> None:
        # whoever changes images in a way of their own must not inherit another's short cut
        if "image" in vars(cls) and "hartley" not in vars(cls):
            cls.hartley = Transform.hartley  # type: ignore[method-assign]

    @abstractmethod
    def image(self, raw: Tensor) -> Tensor:
        """Change real-space images `(B, box, box)`, before the window."""

    def hartley(self, y: Tensor) -> Tensor | None:
        """Return what ``image`` makes of preprocessed images `(B, D, D)`, D = box + 1.

        These are windowed, Hartley-transformed, symmetrised and normalised, not centred. None, as
        here, where nothing but windowing and transforming ``image(raw)`` gives exactly that.
        """
        return None

    def pose(self, rot: Tensor, trans_px: Tensor) -> tuple[Tensor, Tensor]:
        """Change rotations `(B, 3, 3)` and centring translations `(B, 2)` in pixels with them."""
        return rot, trans_px

    def ctf(self, params: Tensor) -> Tensor:
        """Change CTF parameters `(B, 8)`, columns as in ``sources.load_ctf``, with them."""
        return params


class Roll(Transform):
    """Roll ``shift_px`` pixels to the right, wrapping around (paper, figure 10)."""

    undone_by_centring = True

    def __init__(self, shift_px: int) -> None:
        self.shift_px = shift_px
        side = "right" if shift_px > 0 else "left"
        self.title = f"rolled {abs(shift_px)} px {side}"

    def image(self, raw: Tensor) -> Tensor:
        """Roll along x."""
        return torch.roll(raw, self.shift_px, -1)

    def pose(self, rot: Tensor, trans_px: Tensor) -> tuple[Tensor, Tensor]:
        """Centring has to shift that much less."""
        moved = trans_px.clone()
        moved[:, 0] -= self.shift_px
        return rot, moved


class Rotation(Transform):
    """Turn clockwise about pixel (box / 2, box / 2) (paper, figure 11).

    That pixel is the origin of Fourier space. ``rot90`` of an array turns an even box about
    (box - 1) / 2, half a pixel off in both directions; rolling the result by one pixel mends it
    exactly, and four quarter turns are the identity.

    Other angles are the nearest quarter turn, and three shears for the rest (``_turned``).
    """

    def __init__(self, angle_deg: float) -> None:
        self.angle_deg = angle_deg
        self.quarters = round(angle_deg / 90)
        self.rest_deg = angle_deg - 90 * self.quarters
        self._matrix: Tensor | None = None
        side = "clockwise" if angle_deg > 0 else "anticlockwise"
        self.title = f"turned {abs(angle_deg):g} degrees {side}"

    def image(self, raw: Tensor) -> Tensor:
        """Turn by index permutation, and by shears unless the angle is a multiple of 90."""
        for _ in range(self.quarters % 4):
            raw = torch.roll(torch.rot90(raw, -1, (-2, -1)), 1, -1)
        rest = math.radians(self.rest_deg)
        return sheared_turn(raw, -math.tan(rest / 2), math.sin(rest)) if rest else raw

    def hartley(self, y: Tensor) -> Tensor | None:
        """Permute pixels if the angle is a multiple of 90: the window is round, its centre ours."""
        return None if self.rest_deg else torch.rot90(y, -self.quarters, (-2, -1)).contiguous()

    def pose(self, rot: Tensor, trans_px: Tensor) -> tuple[Tensor, Tensor]:
        """Turn with the image; (x, y) -> (-y, x) for each quarter."""
        turn = self._matrix
        if turn is None or turn.device != rot.device or turn.dtype != rot.dtype:
            turn = self._matrix = rot.new_tensor(self._turn())
        return turn @ rot, trans_px @ turn[:2, :2].T

    def _turn(self) -> list[list[float]]:
        cos, sin = math.cos(math.radians(self.rest_deg)), math.sin(math.radians(self.rest_deg))
        for _ in range(self.quarters % 4):  # exact, unlike the cosine of a right angle
            cos, sin = -sin, cos
        return [[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]

    def ctf(self, params: Tensor) -> Tensor:
        """The astigmatism turns as well."""
        params = params.clone()
        params[:, ASTIGMATISM_ANGLE] += self.angle_deg
        return params


def sheared_turn(raw: Tensor, along_x: float | Tensor, along_y: float | Tensor) -> Tensor:
    """Turn `(B, box, box)` clockwise by at most 45 degrees, by three shears.

    Their slopes are minus the tangent of half the angle along x, and its sine along y; they may be
    numbers that are on the device.

    Unser, Thevenaz & Yaroslavsky, IEEE Trans. Image Process. 4, 1371 (1995). All shears wrap
    around, so this only mixes pixels by an orthogonal matrix: white noise stays white, where
    splines would damp it, and the opposite angle undoes it. A shear moves points to at most 1.082
    of their radius; hence all within 0.92 of the half box turns as it must, and so do frequencies
    below 0.92 of the highest. Beyond, towards the corners, pieces (of noise) change places.
    """
    images = raw.to(torch.promote_types(raw.dtype, torch.float32))  # no FFT in half precision
    images = _sheared(images, along_x, -1)
    images = _sheared(images, along_y, -2)
    return _sheared(images, along_x, -1)


def _sheared(images: Tensor, slope: float | Tensor, axis: int) -> Tensor:
    """Shift the lines along ``axis`` by ``slope`` times their distance from the centre, wrapping.

    Phases in Fourier space do it: all of size 1, so that no frequency is damped.
    """
    box = images.shape[-1]
    exact: dict[str, Any] = {"dtype": torch.float64, "device": images.device}
    shift_px = slope * (torch.arange(box, **exact) - box // 2)
    cycles = shift_px[:, None] * torch.fft.rfftfreq(box, **exact)
    # the highest frequency of a real line can only change its sign: take the nearest whole shift
    cycles[:, -1] = shift_px.round() / 2
    phases = torch.polar(torch.ones_like(cycles), -2 * math.pi * cycles)
    phases = phases.to(torch.promote_types(images.dtype, torch.complex64))
    spectrum = torch.fft.rfft(images, dim=axis) * (phases if axis == -1 else phases.T)
    sheared: Tensor = torch.fft.irfft(spectrum, n=box, dim=axis)
    return sheared
