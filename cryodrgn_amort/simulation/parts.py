"""A molecule of rigid parts: classes that lack some of them, one that turns about a hinge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.fft
from scipy.spatial.transform import Rotation

from cryodrgn_amort.simulation.slices import Slices, sample, transform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor


__all__ = ["Hinge", "Part", "PartModel"]

_TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Hinge:
    """What the turning parts turn about.

    Attributes
    ----------
    point
        In angstroms from the origin, x y z.
    axis
        Of length 1; angles are right-handed about it.
    degrees
        They turn from minus to plus this angle as the coordinate goes from 0 to 1.
    """

    point: np.ndarray
    axis: np.ndarray
    degrees: float

    def rotations(self, coordinate: np.ndarray) -> np.ndarray:
        """Return the rotation `(B, 3, 3)` at each coordinate `(B,)`."""
        angles = np.deg2rad(self.degrees) * (2 * np.asarray(coordinate, float) - 1)
        turned: np.ndarray = Rotation.from_rotvec(angles[:, None] * self.axis).as_matrix()
        return turned

    def turned(self, points: np.ndarray, coordinate: float) -> np.ndarray:
        """Return where points `(N, 3)`, in angstroms from the origin, are at a coordinate."""
        rot = self.rotations(np.array([coordinate]))[0]
        found: np.ndarray = (points - self.point) @ rot.T + self.point
        return found


@dataclass(frozen=True)
class Part:
    """What moves as one.

    Attributes
    ----------
    volume
        `(F, F, F)` float32, of the same box in angstroms as the images, on a finer grid.
    classes
        The classes that have it.
    turns
        Whether it turns about the hinge.
    """

    volume: np.ndarray
    classes: tuple[int, ...]
    turns: bool


class PartModel:
    """Rigid parts whose projections are slices of their Fourier transforms, added up.

    A part that turns by R about a hinge h has at the frequency k the transform that it has at
    ``R.T @ k`` when it rests, times the phase of a shift by ``h - R @ h``: so coordinates are
    continuous, and no image costs more than two slices. Images and volumes hold the frequencies
    below Nyquist.

    Parameters
    ----------
    D, apix
        Box in pixels, and angstroms per pixel.
    names
        What each class holds.
    hinge
        None: nothing turns.
    """

    def __init__(
        self, D: int, apix: float, parts: Sequence[Part], names: Sequence[str],
        hinge: Hinge | None = None,
    ) -> None:  # fmt: skip
        self.D, self.apix, self.hinge = D, apix, hinge
        self.parts, self.names = list(parts), list(names)
        self.shares = np.full(len(self.names), 1 / len(self.names))
        resting: list[np.ndarray | None] = [None] * len(self.names)
        self._resting, self._turning = resting, list(resting)
        for part in self.parts:
            hartley = transform(part.volume, D) * np.float32((D / len(part.volume)) ** 3)
            of = self._turning if part.turns else self._resting
            for label in part.classes:
                held = of[label]
                of[label] = hartley if held is None else held + hartley
        self._slices = Slices(D)
        axis = np.arange(1 - D // 2, D // 2)
        k = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)[:, ::-1]
        self._k = k[(k**2).sum(1) < (D / 2 - 1e-3) ** 2]  # x y z; backwards, it is negated

    @property
    def hinge_deg(self) -> float:
        """The largest angle; 0: nothing turns."""
        return 0.0 if self.hinge is None else self.hinge.degrees

    def project(
        self, rots: np.ndarray, shift_px: np.ndarray, labels: np.ndarray, coordinate: np.ndarray
    ) -> Tensor:
        """Project `(B, D, D)`; `(B, 2)` shifts move the object."""
        slices = self._slices.take([self._resting[label] for label in labels], rots, shift_px)
        if self.hinge is not None:
            turns, rots = self.hinge.rotations(coordinate), rots.astype(float)
            moved = np.einsum("nij,nj->ni", rots[:, :2], self._moves(turns))
            turning = [self._turning[label] for label in labels]
            slices = slices + self._slices.take(turning, rots @ turns, shift_px + moved)
        return self._slices.images(slices)

    def _moves(self, turns: np.ndarray) -> np.ndarray:
        """Return by how many pixels turns `(B, 3, 3)` about the hinge move the origin."""
        point = np.zeros(3) if self.hinge is None else self.hinge.point / self.apix
        found: np.ndarray = point - turns @ point
        return found

    def _sampled(
        self, resting: np.ndarray | None, turning: np.ndarray | None, coordinate: np.ndarray
    ) -> np.ndarray:
        """Average over coordinates `(C,)`: the volume `(D, D, D)` of two transforms."""
        k, zero = self._k.astype(float), np.zeros(len(self._k))
        values = zero if resting is None else sample(resting, k).astype(float)
        if turning is not None and self.hinge is not None:
            turns = self.hinge.rotations(coordinate)
            for turn, move in zip(turns, self._moves(turns), strict=True):
                at, phase = sample(turning, k @ turn), 2 * np.pi / self.D * (k @ move)
                moved = at * np.cos(phase) + at[::-1] * np.sin(phase)
                values = values + moved / len(coordinate)
        D, back = self.D, values[::-1]
        fourier = np.zeros((D, D, D), np.complex64)
        z, y, x = self._k[:, ::-1].T
        fourier[z, y, x] = (values + back) / 2 + 0.5j * (back - values)
        volume: np.ndarray = scipy.fft.fftshift(scipy.fft.ifftn(fourier, overwrite_x=True).real)
        return np.ascontiguousarray(volume, np.float32)

    def volume(self, label: int, coordinate: float) -> np.ndarray:
        """Return the true volume `(D, D, D)` of a particle; its projection is the sum over z."""
        of = self._resting[label], self._turning[label]
        return self._sampled(*of, np.array([coordinate]))

    def volumes(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield named true volumes: of each class, at five coordinates if something turns."""
        for label in range(len(self.names)):
            if self.hinge is None:
                yield f"class{label}", self.volume(label, 0.5)
                continue
            for t in _TIMES:
                yield f"class{label}_t{t:.2f}", self.volume(label, t)

    def mean(self, labels: np.ndarray, coordinate: np.ndarray) -> np.ndarray:
        """Average the volumes of particles, their coordinates binned into 32 equal shares."""
        shares = np.bincount(labels, minlength=len(self.names)) / len(labels)
        of = [_mixed(each, shares) for each in (self._resting, self._turning)]
        return self._sampled(of[0], of[1], np.quantile(coordinate, (np.arange(32) + 0.5) / 32))

    def facts(self) -> dict[str, Any]:
        """Return what simulation.yaml says of parts and hinge; ``read`` makes the model of it."""
        parts = [
            {"file": f"part{i}.mrc", "turns": part.turns, "classes": list(part.classes)}
            for i, part in enumerate(self.parts)
        ]
        if self.hinge is None:
            return {"parts": parts}
        point, axis = (v.astype(float).tolist() for v in (self.hinge.point, self.hinge.axis))
        hinge = {"degrees": float(self.hinge.degrees), "point": point, "axis": axis}
        return {"parts": parts, "hinge": hinge}

    @classmethod
    def read(
        cls, found: Mapping[str, Any], load: Callable[[str], np.ndarray], most: int | None = None
    ) -> PartModel:
        """Make the model that a simulation.yaml describes.

        Parameters
        ----------
        load
            Reads the volume of a part by the name of its file.
        most
            Largest box: what is larger loses its highest frequencies. None: as it was.

        Raises
        ------
        KeyError, TypeError, ValueError
            If it is damaged.
        """
        D, apix = int(found["settings"]["D"]), float(found["settings"]["apix"])
        box = D if most is None else min(D, most)
        names = [str(one["holds"]) for one in found["classes"]]
        known, facts, hinge = set(range(len(names))), found["object"], None
        if "hinge" in facts:
            point, axis = (np.array(facts["hinge"][k], float) for k in ("point", "axis"))
            if point.shape != (3,) or abs(np.linalg.norm(axis) - 1) > 1e-6 or axis.shape != (3,):
                raise ValueError("a point and a direction are needed")
            hinge = Hinge(point, axis, float(facts["hinge"]["degrees"]))
        said = [(Path(p["file"]).name, tuple(map(int, p["classes"])), bool(p["turns"]))
                for p in facts["parts"]]  # fmt: skip
        if not said or not all(set(classes) <= known for _, classes, _ in said):
            raise ValueError("parts of unknown classes")
        parts = [Part(load(name), classes, turns) for name, classes, turns in said]
        return cls(box, apix * D / box, parts, names, hinge)


def _mixed(transforms: Sequence[np.ndarray | None], shares: np.ndarray) -> np.ndarray | None:
    found = None
    for one, share in zip(transforms, shares, strict=True):
        if one is not None and share:
            weighted = one * np.float32(share)
            found = weighted if found is None else found + weighted
    return found
