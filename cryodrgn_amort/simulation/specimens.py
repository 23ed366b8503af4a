"""What is simulated: a made-up object with classes and motion, or the user's volumes.

Geometry, as in the host: volumes are `(z, y, x)` with the origin at pixel `D // 2`, and a point `p`
of the object is seen at the first two coordinates of `rot @ p`.
"""

from __future__ import annotations

import logging
import math
import warnings
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from cryodrgn_amort import host
from cryodrgn_amort.core import InputError, available_memory, check_intact
from cryodrgn_amort.simulation.slices import Slices, transform

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from cryodrgn_amort.simulation.parts import PartModel


__all__ = ["BlobModel", "Model", "VolumeModel", "clean_images", "ctf_values", "read_volume"]
logger = logging.getLogger("cryodrgn_amort")


class BlobModel:
    """Gaussians: a core, three removable blocks, and an arm on a hinge about the x axis.

    Parameters
    ----------
    D
        Box size in pixels; the object scales with it.
    classes
        Number of compositions: for 1, all blocks are there; further ones lose blocks one by one,
        and the fifth holds the last block alone. Labels count in the order of COMPOSITIONS.
    hinge_deg
        The arm turns from minus to plus this angle as the coordinate goes from 0 to 1.
    """

    COMPOSITIONS = ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (0, 0, 1))
    """Which blocks are there."""
    SHARES = (0.15, 0.2, 0.25, 0.25, 0.15)
    _HINGE = np.array([0.0, 3.2, -1.0])  # lengths are in pixels of a box of 32
    _SIGMA = 1.15
    _ARM_WEIGHT = 1.3

    def __init__(self, D: int, classes: int = 5, hinge_deg: float = 45.0) -> None:
        self.D, self.hinge_deg, self._scale = D, hinge_deg, D / 32
        first = max(0, 4 - classes)
        blocks = np.array(self.COMPOSITIONS[first : first + classes], float)
        self.shares = np.array(self.SHARES[first : first + classes])
        self.names = ["core" + "".join(f"+block{k}" for k in np.flatnonzero(b)) for b in blocks]
        random = np.random.RandomState(7)  # its numbers are frozen: the same object everywhere

        def ball(n: int, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
            v = random.randn(n, 3)
            v *= random.rand(n, 1) ** (1 / 3) / np.linalg.norm(v, axis=1, keepdims=True)
            inside: np.ndarray = np.array(centre) + v * np.array(radii)
            return inside

        self._rigid = np.concatenate(
            [
                ball(45, (0, 0, -1), (5.0, 4.0, 3.6)),
                ball(11, (5.5, 1.5, 3.0), (2.2, 2.2, 2.2)),
                ball(11, (-5.0, 3.2, 2.6), (2.4, 2.0, 2.2)),
                ball(11, (-1.0, -5.6, 2.2), (2.2, 2.4, 2.2)),
            ]
        )
        across = np.linspace(-0.6, 0.6, 12) * random.randn(12)
        self._arm = np.stack(
            [across, 3.2 + np.linspace(0, 6.5, 12), -1 + 0.5 * random.randn(12)], 1
        )
        core, arm = np.ones((classes, 45)), np.full((classes, 12), self._ARM_WEIGHT)
        self._weights = np.concatenate([core, blocks.repeat(11, 1), arm], 1)

    def _points(self, coordinate: np.ndarray) -> np.ndarray:
        """Centres in pixels for each `(B,)` coordinate: `(B, J, 3)`, x y z."""
        turn = Rotation.from_euler(
            "x", self.hinge_deg * (2 * coordinate[:, None] - 1), degrees=True
        )
        arm = (self._arm - self._HINGE) @ turn.as_matrix().transpose(0, 2, 1) + self._HINGE
        rigid = np.broadcast_to(self._rigid, (len(coordinate), *self._rigid.shape))
        return np.concatenate([rigid, arm], 1) * self._scale

    def _profile(self, centres: np.ndarray) -> Tensor:
        """Gaussians of height 1 along one axis, `(..., J)` centres to `(..., J, D)`."""
        pixels = torch.arange(self.D, dtype=torch.float32) - self.D // 2
        away = pixels - torch.from_numpy(centres.astype(np.float32)).unsqueeze(-1)
        return torch.exp(away.square() * (-0.5 / (self._SIGMA * self._scale) ** 2))

    def project(
        self, rots: np.ndarray, shift_px: np.ndarray, labels: np.ndarray, coordinate: np.ndarray
    ) -> Tensor:
        """Project `(B, D, D)`; `(B, 2)` shifts move the object. Gaussians have height 1."""
        points = self._points(coordinate) @ rots.astype(float).transpose(0, 2, 1)
        x, y = (self._profile(points[..., k] + shift_px[:, k, None]) for k in (0, 1))
        weights = torch.from_numpy(self._weights[labels].astype(np.float32))
        return torch.bmm((weights.unsqueeze(-1) * y).transpose(1, 2).contiguous(), x)

    def _render(self, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
        x, y, z = (self._profile(points[:, k]) for k in range(3))
        # so that the sum over z is the projection
        height = weights / (math.sqrt(2 * math.pi) * self._SIGMA * self._scale)
        zy = torch.einsum("jz,jy->zyj", torch.from_numpy(height.astype(np.float32))[:, None] * z, y)
        return (zy @ x).numpy()

    def volume(self, label: int, coordinate: float) -> np.ndarray:
        """Return the true volume `(D, D, D)` of a particle; its projection is the sum over z."""
        return self._render(self._points(np.array([coordinate]))[0], self._weights[label])

    def volumes(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield named true volumes: of each class, the arm at five coordinates if it moves."""
        for label in range(len(self.shares)):
            if not self.hinge_deg:
                yield f"class{label}", self.volume(label, 0.5)
                continue
            for t in (0.0, 0.25, 0.5, 0.75, 1.0):
                yield f"class{label}_t{t:.2f}", self.volume(label, t)

    def mean(self, labels: np.ndarray, coordinate: np.ndarray) -> np.ndarray:
        """Average the volumes of particles, their coordinates binned into 32 equal shares."""
        arms = self._points(np.quantile(coordinate, (np.arange(32) + 0.5) / 32))
        weights, rigid = self._weights[labels].mean(0), len(self._rigid)
        points = np.concatenate([arms[0, :rigid], arms[:, rigid:].reshape(-1, 3)])
        arm_weights = np.tile(weights[rigid:], 32) / 32
        return self._render(points, np.concatenate([weights[:rigid], arm_weights]))


class VolumeModel:
    """The user's volumes, one class each: projections are slices of their Fourier transforms.

    Images hold the frequencies below Nyquist. Density should lie in the sphere that the box
    encloses. Takes 32 bytes per voxel.

    Parameters
    ----------
    volumes
        `(D, D, D)` each, float32.
    """

    hinge_deg = 0.0

    def __init__(self, volumes: Sequence[np.ndarray], names: Sequence[str]) -> None:
        self.D, self.names = len(volumes[0]), list(names)
        self.shares = np.full(len(volumes), 1 / len(volumes))
        self._volumes = volumes
        self._hartley = [transform(volume) for volume in volumes]
        self._slices = Slices(self.D)

    def project(
        self, rots: np.ndarray, shift_px: np.ndarray, labels: np.ndarray, coordinate: object = None
    ) -> Tensor:
        """Project `(B, D, D)`; `(B, 2)` shifts move the object."""
        hartley = [self._hartley[label] for label in labels]
        return self._slices.images(self._slices.take(hartley, rots, shift_px))

    def volumes(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the volumes, named."""
        return ((f"class{label}", volume) for label, volume in enumerate(self._volumes))

    def mean(self, labels: np.ndarray, coordinate: object = None) -> np.ndarray:
        """Average the volumes of particles."""
        shares = np.bincount(labels, minlength=len(self._volumes)) / len(labels)
        total = np.zeros_like(self._volumes[0])
        for share, volume in zip(shares, self._volumes, strict=True):
            total += np.float32(share) * volume
        return total


Model: TypeAlias = "BlobModel | VolumeModel | PartModel"


def clean_images(
    model: Model,
    rots: np.ndarray,
    trans_px: np.ndarray,
    labels: np.ndarray,
    coordinate: np.ndarray,
    ctf: np.ndarray | None,
) -> Tensor:
    """Return noise-free raw images `(B, D, D)` of particles, density negative.

    Parameters
    ----------
    rots, trans_px
        `(B, 3, 3)`, and the translations that centre the images, `(B, 2)`.
    ctf
        CTF parameters `(B, 8)`, see ``sources.load_ctf``; None: without.
    """
    D = model.D
    projected = model.project(rots, -trans_px, labels, coordinate)
    if ctf is None:
        return -projected
    fourier = torch.fft.rfft2(projected) * ctf_values(ctf, D)
    images: Tensor = -torch.fft.irfft2(fourier, s=(D, D))
    return images


def ctf_values(ctf: np.ndarray, box: int) -> Tensor:
    """Evaluate CTF parameters `(B, 8)` at the frequencies of ``rfft2``: `(B, box, box / 2 + 1)`.

    A ninth number is the scale.
    """
    kx, ky = torch.fft.rfftfreq(box), torch.fft.fftfreq(box)
    grid = torch.stack(torch.meshgrid(kx, ky, indexing="xy"), -1)  # (box, box/2 + 1, 2)
    params = torch.from_numpy(ctf)
    freqs = grid.view(1, -1, 2) / params[:, :1, None]
    values: Tensor = host.compute_ctf(freqs, *torch.split(params[:, 1:], 1, 1))
    return values.view(len(ctf), *grid.shape[:2])


def read_volume(
    path: str, flag: str = "--volumes", box: int | None = None
) -> tuple[np.ndarray, float]:
    """Read and check a volume of the user's; ``flag`` names its role in errors.

    Any byte order and kind of real numbers that the format knows, also in .gz and .bz2. A volume
    whose density seems to be negative is warned of.

    Parameters
    ----------
    box
        Smaller volumes, of whatever shape, are padded to such a cube; None: none is.

    Returns
    -------
    volume
        `(D, D, D)` float32.
    apix
        Its pixel size in angstroms, as the header has it.

    Raises
    ------
    InputError
        If it is not finite, no even-sized cube, or stored in an unusual way.
    """
    what = f"{flag} {path}"
    check_intact(path, flag)
    volume, apix = _read_map(path, what)
    shape = "x".join(map(str, volume.shape[::-1]))
    if box is not None and volume.shape != (box,) * 3:
        if max(volume.shape) > box:
            raise InputError(f"{what}: {shape} does not fit into -D {box}; `cryodrgn downsample` "
                             "makes volumes smaller")  # fmt: skip
        volume = _padded(volume, box)
    even = max(16, *(size + size % 2 for size in volume.shape))
    if len(set(volume.shape)) != 1:
        raise InputError(f"{what}: {shape} is not a cube; -D {even} or more pads it")
    if even != len(volume):
        raise InputError(f"{what}: an even box is needed, at least 16 pixels, not {len(volume)}; "
                         f"-D {even} or more pads it")  # fmt: skip
    if not np.isfinite(volume).all() or volume.min() == volume.max():
        raise InputError(f"{what}: the volume is constant or not finite")
    if -volume.min() > volume.max():
        logger.warning(f"{what}: its strongest density is negative; is it inverted? It is used as "
                       "it is")  # fmt: skip
    return volume, apix


def _read_map(path: str, what: str) -> tuple[np.ndarray, float]:
    """Return what an .mrc file holds, `(z, y, x)` float32, and its pixel size in angstroms."""
    import mrcfile  # when it is needed

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is odd in headers, but can be read
            with mrcfile.open(path, permissive=True, header_only=True) as file:
                header = file.header.copy()
                sizes = [int(header[name]) for name in ("nx", "ny", "nz")]
            voxels = sizes[0] * sizes[1] * sizes[2]
            if min(sizes) < 1 or 8 * voxels > available_memory():
                raise ValueError(
                    f"a volume of {sizes[0]}x{sizes[1]}x{sizes[2]} does not fit memory"
                )
            with mrcfile.open(path, permissive=True) as file:
                data = file.data
                if data is None or data.size != voxels:
                    raise ValueError("it ends before its data do")
                volume = np.array(data, np.float32) if data.dtype.kind in "fiu" else None
    except OSError as err:
        raise InputError(f"{what}: {err.strerror or err}") from None
    except Exception as err:  # whatever is raised for damaged or foreign files
        reason = " ".join(str(err).split()) or type(err).__name__
        raise InputError(f"{what}: not a readable .mrc file ({reason})") from None
    if volume is None or volume.ndim != 3:
        raise InputError(f"{what}: not a volume of real numbers")
    axes = tuple(int(header[name]) for name in ("mapc", "mapr", "maps"))
    if axes not in ((1, 2, 3), (0, 0, 0)):
        raise InputError(f"{what}: its axes are stored in the order {axes}; 1, 2, 3 is needed")
    return volume, float(header["cella"]["x"]) / sizes[0]


def _padded(volume: np.ndarray, box: int) -> np.ndarray:
    """Put a volume into the middle of a cube, amid what its own faces have.

    The middle of an axis of n voxels is at n // 2.
    """
    faces = [face for axis in range(3) for face in np.moveaxis(volume, axis, 0)[[0, -1]]]
    amid = np.median(np.concatenate([face.ravel() for face in faces]))
    found = np.full((box,) * 3, amid, np.float32)
    starts = [box // 2 - size // 2 for size in volume.shape]
    at = tuple(slice(s, s + size) for s, size in zip(starts, volume.shape, strict=True))
    found[at] = volume
    return found
