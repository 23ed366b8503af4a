"""How far volumes are from each other, and decoded ones from true ones."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from scipy.fft import rfftn
from scipy.integrate import trapezoid

from cryodrgn_amort.measures.bootstrap import ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


__all__ = [
    "VolumeErrors",
    "fourier_radius",
    "fsc",
    "fsc_area",
    "fve_radius",
    "fve_voxels",
    "volume_change",
    "volume_errors",
    "volume_fve",
    "with_before",
]
_T = TypeVar("_T")


def volume_change(moved: np.ndarray, pairs: np.ndarray) -> float:
    """Median distance |v(z_i) - v(z'_i)| over median |v(z_i) - v(z_j)|. Null 1, ideal 0.

    NaN if all volumes are the same.
    """
    return ratio(np.median(moved), np.median(pairs))


def with_before(items: Iterable[_T]) -> Iterator[tuple[_T, _T]]:
    """Pair each of some volumes with the one before it; holds three at a time.

    The pairs are those of ``zip(items, np.roll(items, 1, axis=0))``, but the first one comes last.
    """
    items = iter(items)
    first = before = next(items)
    for item in items:
        yield item, before
        before = item
    yield first, before


def fsc(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Fourier shell correlation of two volumes `(D, D, D)`, shells 0 to D / 2: `(D / 2 + 1,)`."""
    size = a.shape[0]
    fa, fb = (np.fft.fftshift(np.fft.fftn(v)) for v in (a, b))
    axis = np.arange(size) - size // 2
    radius = np.sqrt(sum(np.meshgrid(axis**2, axis**2, axis**2, indexing="ij")))
    shell = np.round(radius).astype(int).ravel()
    keep = shell <= size // 2

    def per_shell(values: np.ndarray) -> np.ndarray:
        return np.bincount(shell[keep], values.ravel()[keep], size // 2 + 1)

    cross = per_shell((fa * fb.conj()).real)
    power = per_shell(np.abs(fa) ** 2) * per_shell(np.abs(fb) ** 2)
    curve: np.ndarray = np.divide(cross, np.sqrt(power), out=np.zeros_like(cross), where=power > 0)
    return curve


_FVE_RADIUS = 9 / 32  # cycles per pixel


def fourier_radius(box: int) -> np.ndarray:
    """Return each voxel's distance from the origin, `(box, box, box)` in the order of ``fftn``."""
    squares = np.rint(np.fft.fftfreq(box, 1 / box)) ** 2
    radius: np.ndarray = np.sqrt(squares[:, None, None] + squares[:, None] + squares)
    return radius


def fve_radius(box: int) -> int:
    """Return up to which radius ``volume_fve`` compares: 9 voxels for a box of 32."""
    return round(_FVE_RADIUS * box)


def fve_voxels(volume: np.ndarray) -> np.ndarray:
    """Return those of a volume's Fourier voxels that ``volume_fve`` compares, `(V,)` complex64.

    One of each two opposite voxels is left out, and the other is larger by the square root of 2:
    squared distances are those of all of them.
    """
    inside, counted = _fve_half(len(volume))
    voxels: np.ndarray = rfftn(volume.astype(np.float32))[inside] * counted
    return voxels


@functools.lru_cache(maxsize=1)
def _fve_half(box: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which voxels of ``rfftn`` are compared, and by what each of these is multiplied."""
    inside = (fourier_radius(box) <= fve_radius(box))[:, :, : box // 2 + 1]
    counted = np.full(inside.shape, np.sqrt(2), np.float32)
    counted[:, :, [0, -1]] = 1  # the last axis has no opposites here
    return inside, counted[inside]


def volume_fve(errors: np.ndarray, spreads: np.ndarray) -> float:
    """Fraction of the variance of the true volumes that is explained. Null 0 or less, ideal 1.

    Parameters
    ----------
    errors, spreads
        Of ``VolumeErrors``, `(M,)`.
    """
    return 1 - ratio(errors.sum(), spreads.sum())


def fsc_area(a: np.ndarray, b: np.ndarray) -> float:
    """Area under the FSC of two volumes, in cycles per pixel. Ideal `(D / 2 - 1) / D`.

    As CryoBench computes it: shell i holds the radii from i - 1 up to i and stands at i / D; the
    curve starts with 1 at 0, ends one shell below Nyquist, and is integrated by trapezoids.

    Parameters
    ----------
    a, b
        Fourier transforms `(D, D, D)` in the order of ``numpy.fft.fftn``.

    References
    ----------
    Jeon et al., CryoBench, arXiv 2408.05526; its metrics/fsc/utils/volumes.py, get_fsc_curve.
    """
    box = len(a)
    shell = np.floor(fourier_radius(box)).astype(int).ravel() + 1

    def per_shell(values: np.ndarray) -> np.ndarray:
        return np.bincount(shell, values.ravel())[1 : box // 2]

    powers = per_shell(np.abs(a) ** 2), per_shell(np.abs(b) ** 2)
    size = np.sqrt(powers[0] * powers[1])
    curve = np.where(powers[0] == powers[1], 1.0, 0.0)  # where there is nothing in either, 1
    np.divide(per_shell((a * b.conj()).real), size, out=curve, where=size > 0)
    return float(trapezoid(np.concatenate([[1.0], curve]), dx=1 / box))


@dataclass(frozen=True)
class VolumeErrors:
    """How far decoded volumes are from the particles' true ones, each `(M,)`.

    Attributes
    ----------
    errors, spreads
        Squared distance of the true volume from the decoded one, and from the mean of all true
        ones, on the Fourier voxels up to ``fve_radius``.
    areas, null_areas
        ``fsc_area`` of the true volume with the decoded one, and with the mean of all decoded ones.
    """

    errors: np.ndarray
    spreads: np.ndarray
    areas: np.ndarray
    null_areas: np.ndarray


def volume_errors(
    true: Callable[[], Iterable[np.ndarray]], decoded: Iterable[np.ndarray]
) -> VolumeErrors:
    """Compare decoded volumes `(box, box, box)` with the true ones, density positive in both.

    Holds a few volumes at a time: ``true`` is called for them three times, rather than all kept.
    """
    total: Any = 0
    count = 0
    for volume in true():
        total, count = total + volume, count + 1
    mean = np.fft.fftn(total / count)
    inside = fourier_radius(len(mean)) <= fve_radius(len(mean))
    errors, spreads, areas = [], [], []
    mean_decoded: Any = 0
    for own, volume in zip(decoded, true(), strict=True):
        f_own, f_true = np.fft.fftn(own), np.fft.fftn(volume)
        errors.append(np.linalg.norm((f_true - f_own)[inside]) ** 2)
        spreads.append(np.linalg.norm((f_true - mean)[inside]) ** 2)
        areas.append(fsc_area(f_own, f_true))
        mean_decoded = mean_decoded + f_own / count
    null_areas = [fsc_area(mean_decoded, np.fft.fftn(volume)) for volume in true()]
    return VolumeErrors(*map(np.array, (errors, spreads, areas, null_areas)))
