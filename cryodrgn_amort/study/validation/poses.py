"""How wrong the poses are: what turns and shifts would explain of particles, next to known ones.

The log likelihood of a particle is taken to second order in a small turn and shift of its pose:
with slope g and curvature H, of which what another latent would explain as well is taken out (a
Schur complement). If poses are off by errors of variance D, the slopes have the covariance
H + H D H, and D follows by maximum likelihood over many particles. What that gives is too small
where errors are large, since images are not linear in the pose, and too large where the decoder is
wrong: it is read against images made up, at the same poses, with errors that are known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from cryodrgn_amort.core import bar
from cryodrgn_amort.models import whole_ctf

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from cryodrgn_amort.data import Batch
    from cryodrgn_amort.runs import Run
    from cryodrgn_amort.study.validation.case import Case, Fits, Whitened


__all__ = [
    "KNOWN_DEG",
    "PoseSlopes",
    "crossed_slopes",
    "likely_errors",
    "likely_poses",
    "measured_slopes",
    "pose_slopes",
    "read_off",
    "turned",
]

KNOWN_DEG = (0.0, 3.0, 6.0, 10.0, 16.0)
"""Errors of the images made up, rms angles about random axes."""
_TURN = math.radians(2.0)  # differences of images, to each side
_SHIFT = 0.25  # pixels
_TOGETHER = 64
_STARTS = ((1.0, 0.1), (5.0, 0.3))  # degrees, pixels
_LEAST = 1e-6
_AXES = np.array([[1.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0]])  # turns, shifts


@dataclass(frozen=True)
class PoseSlopes:
    """Slope and curvature of log likelihoods by poses: turns in radians, shifts in pixels.

    Attributes
    ----------
    slope, curvature
        `(M, 5)` and `(M, 5, 5)`: turns about x, y and z of the image, shifts along x and y.
    """

    slope: np.ndarray
    curvature: np.ndarray

    def of(self, rows: np.ndarray) -> PoseSlopes:
        """Return those of some particles."""
        return PoseSlopes(self.slope[rows], self.curvature[rows])

    @classmethod
    def joined(cls, parts: list[PoseSlopes]) -> PoseSlopes:
        """Put parts together."""
        return cls(
            np.concatenate([p.slope for p in parts]), np.concatenate([p.curvature for p in parts])
        )


def turned(vectors: Tensor) -> Tensor:
    """Return rotation matrices `(B, 3, 3)` of rotation vectors `(B, 3)`, in radians."""
    found: Tensor = torch.from_numpy(Rotation.from_rotvec(vectors.double().cpu()).as_matrix())
    return found.to(vectors)


@torch.no_grad()
def pose_slopes(case: Case, white: Whitened, batch: Batch, z: Tensor) -> PoseSlopes:
    """Differentiate the log likelihoods of a batch by the poses, latents `(B, zdim)` aside."""
    assert batch.rot is not None
    rot, count, zdim = batch.rot, *z.shape
    ctf = white.gain if batch.ctf is None else whole_ctf(batch.ctf) * white.gain
    shown, by_latent = case.images_around(white, batch, z)
    columns = []
    for axis in range(3):
        vector = torch.zeros(1, 3, device=z.device)
        vector[0, axis] = _TURN
        ahead, back = (
            case.model.fast.images(turned(sign * vector) @ rot, z[:, None])[:, 0] * ctf
            for sign in (1, -1)
        )
        columns.append((ahead - back) / (2 * _TURN))
    for axis in range(2):
        move = torch.zeros(count, 2, device=z.device)
        move[:, axis] = _SHIFT
        ahead, back = (case.particles.shift(shown, sign * move) for sign in (-1, 1))
        columns.append((ahead - back) / (2 * _SHIFT))
    slopes = torch.cat([torch.stack(columns, 1).double(), by_latent], 1)
    left = (batch.y * white.gain - shown).double()
    g = torch.einsum("bip,bp->bi", slopes, left)
    H = torch.einsum("bip,bjp->bij", slopes, slopes)
    of_latent = H[:, 5:, 5:] + torch.eye(zdim, dtype=H.dtype, device=H.device)
    taken = torch.linalg.solve(of_latent, H[:, 5:, :5])  # (B, zdim, 5)
    g_pose = g[:, :5] - torch.einsum("bzi,bz->bi", taken, g[:, 5:] - z.double())
    H_pose = H[:, :5, :5] - H[:, :5, 5:] @ taken
    return PoseSlopes(g_pose.cpu().numpy(), H_pose.cpu().numpy())


def likely_poses(slopes: PoseSlopes, errors: tuple[float, float]) -> np.ndarray:
    """Return how far each particle's best pose is from its own: degrees and pixels, `(M, 2)`.

    Errors of poses are taken to be, beforehand, as large as ``errors``, rms in these units.
    """
    turn, shift = math.radians(errors[0]) / math.sqrt(3), errors[1] / math.sqrt(2)
    before = 1 / np.maximum(_AXES.T @ np.array([turn, shift]) ** 2, _LEAST**2)
    moved = np.linalg.solve(slopes.curvature + np.diag(before), slopes.slope[..., None])[..., 0]
    angle = np.degrees(np.linalg.norm(moved[:, :3], axis=1))
    return np.stack([angle, np.linalg.norm(moved[:, 3:], axis=1)], 1)


def likely_errors(
    slopes: PoseSlopes, near: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Return the rms errors that explain slopes best: of the angle in degrees, and in pixels.

    Parameters
    ----------
    near
        Where the search begins; None: at small and at large ones.
    """
    options = {"xatol": 2e-2, "fatol": 1e-6, "maxiter": 200}
    g, H = slopes.slope, slopes.curvature
    known = g, H, (H[:, None] * _AXES[:, None]) @ H[:, None]
    found = []
    for degrees, pixels in _STARTS if near is None else (near,):
        start = np.log([math.radians(degrees) / math.sqrt(3), pixels / math.sqrt(2)])
        found.append(minimize(_unlikely, start, known, method="Nelder-Mead", options=options))
    turn, shift = np.exp(min(found, key=lambda f: f.fun).x)
    return math.degrees(turn) * math.sqrt(3), float(shift) * math.sqrt(2)


def read_off(degrees: float, known: Mapping[float, tuple[float, float]]) -> float:
    """Return the error of images made up whose likely error is so large; between them linear.

    Beyond the largest one it is that.
    """
    at = [found for found, _ in known.values()]
    return float(np.interp(degrees, np.maximum.accumulate(at), list(known)))


def _unlikely(logs: np.ndarray, g: np.ndarray, H: np.ndarray, HDH: np.ndarray) -> float:
    """Return minus the mean log likelihood of slopes; ``HDH``: of unit turns, unit shifts."""
    turn, shift = np.exp(2 * np.clip(logs, -12, 6))
    covariance = H + turn * HDH[:, 0] + shift * HDH[:, 1]
    least = 1e-9 + _LEAST * np.trace(H, axis1=1, axis2=2)
    covariance += least[:, None, None] * np.eye(5)
    root = np.linalg.cholesky(covariance)
    scaled = np.linalg.solve(root, g[..., None])[..., 0]
    logs_det = np.log(np.diagonal(root, axis1=1, axis2=2)).sum(1)
    return float((logs_det + 0.5 * (scaled**2).sum(1)).mean())


def measured_slopes(case: Case, fits: Fits) -> tuple[PoseSlopes, dict[float, PoseSlopes]]:
    """Return the slopes of fitted particles, and of images made up with each of ``KNOWN_DEG``."""
    white = case.whitened(fits.spectrum)
    places, own = torch.arange(len(fits.rows)), []
    for at in places.split(_TOGETHER):
        batch = case.loader.read(torch.from_numpy(fits.rows)[at])
        z = torch.from_numpy(fits.mean[at.numpy()]).to(batch.y)
        own.append(pose_slopes(case, white, batch, z))
    known = {}
    for degrees in bar(KNOWN_DEG, "images made up at poses that are off"):
        draw = case.generator()  # the same but for the errors
        parts = []
        for at in places[::2].split(_TOGETHER):  # that is enough for a curve
            axes = torch.randn(len(at), 3, generator=draw, device=case.particles.device)
            axes /= math.sqrt(3)
            batch, _ = case.made_up(fits, at, turned(axes * math.radians(degrees)), draw)
            parts.append(pose_slopes(case, white, batch, case.posterior(white, batch)[0]))
        known[degrees] = PoseSlopes.joined(parts)
    return PoseSlopes.joined(own), known


def crossed_slopes(case: Case, fits: Fits, other: Run) -> PoseSlopes:
    """Return the slopes of images that the other half's decoder makes up at exactly known poses.

    What they show is what two decoders differ by, which looks like errors of poses: twice what one
    of them differs from the truth by, as far as the errors of both have nothing to do with each
    other.
    """
    white = case.whitened(fits.spectrum)
    return PoseSlopes.joined(
        [
            pose_slopes(case, white, batch, case.posterior(white, batch)[0])
            for batch in case.made_up_by(other, fits)
        ]
    )
