"""The spectrum of simulated noise: how its variance is shared out among frequencies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort.core import InputError, check_intact, read_json, read_pickle, read_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


__all__ = ["Spectrum", "noise_power", "read_spectrum", "spectrum_power", "stored_noise"]

Spectrum = dict[str, list[float]]
"""``variance`` of the noise at each ``frequency``, in cycles per pixel, rising."""
_HIGHEST = 0.75  # beyond any corner


def noise_power(colour: str, box: int) -> Tensor | None:
    """Return the noise's power at the frequencies of ``rfft2``, `(box, box / 2 + 1)`, of mean 1.

    The mean is that over all frequencies of ``fft2``. None: white noise, the same everywhere.

    Parameters
    ----------
    colour
        What ``--noise`` says. Coloured noise falls with the frequency k, in cycles per pixel, as
        1 / (1 + 36 k^2): half at a sixth of the sampling frequency.
    """
    if colour == "white":
        return None
    k = torch.fft.fftfreq(box)
    power = 1 / (1 + (k[:, None] ** 2 + k**2) * 36)
    half: Tensor = (power / power.mean())[:, : box // 2 + 1]
    return half


def spectrum_power(spectrum: Spectrum, box: int) -> Tensor:
    """Return ``noise_power`` of a measured spectrum.

    Between its frequencies it is linear; below the first and beyond the last it is as there.

    Raises
    ------
    ValueError
        If its numbers are none of a spectrum.
    """
    frequency, variance = (np.array(spectrum[k], float) for k in ("frequency", "variance"))
    if frequency.ndim != 1 or frequency.shape != variance.shape or not len(frequency):
        raise ValueError("as many variances as frequencies are needed")
    if not (np.isfinite(variance).all() and (variance >= 0).all() and variance.any()):
        raise ValueError("variances must be finite and not negative, and some above 0")
    if not ((np.diff(frequency) > 0).all() and frequency[0] >= 0 and frequency[-1] <= _HIGHEST):
        raise ValueError("frequencies must rise, in cycles per pixel: from 0 to 0.5")
    k = np.fft.fftfreq(box)
    power = np.interp(np.hypot(k[:, None], k), frequency, variance)
    if not power.any():
        raise ValueError(f"no variance is left at the frequencies of {box} pixels")
    return torch.from_numpy((power / power.mean())[:, : box // 2 + 1].astype(np.float32))


def read_spectrum(path: str, box: int) -> Spectrum:
    """Read what ``--noise-spectrum`` names; its scale has no meaning.

    - A column of variances by shell, as text, .csv, .npy, .pkl or a list in .json: S values are
      the shells 0 to S - 1 of a box of 2 * S pixels, shell s at s / (2 * S) cycles per pixel.
    - Two columns: frequencies in cycles per pixel, and variances.
    - noise.json of a run: the mean of its optics groups, weighted by their particles.

    Raises
    ------
    InputError
        If it is none of these, or makes no power in images of ``box`` pixels.
    """
    what = f"--noise-spectrum {path}"
    try:
        columns = _columns(path)
        if columns.ndim == 2 and columns.shape[1] == 1:
            columns = columns[:, 0]
        if columns.ndim == 1:
            columns = np.stack([np.arange(len(columns)) / (2 * len(columns) or 1), columns], 1)
        if columns.ndim != 2 or columns.shape[1] != 2 or not len(columns):
            raise ValueError("one or two columns of numbers are needed")
        found = {"frequency": columns[:, 0].tolist(), "variance": columns[:, 1].tolist()}
        spectrum_power(found, box)
    except (KeyError, TypeError, ValueError) as err:
        reason = " ".join(str(err).split())[:200]
        raise InputError(f"{what}: not a spectrum ({reason})") from None
    return found


def _columns(path: str) -> np.ndarray:
    """Return the numbers of a file: `(S,)` or `(S, 2)`, float."""
    kind, flag = Path(path).suffix.lower(), "--noise-spectrum"
    if kind == ".json":
        return _of_json(read_json(path, flag))
    if kind == ".pkl":
        return np.array(read_pickle(path, flag), float)
    if kind == ".npy":
        check_intact(path, flag)
        try:
            return np.load(path, allow_pickle=False).astype(float)  # type: ignore[no-any-return]
        except Exception as err:  # whatever is raised for damaged files
            raise ValueError(str(err)) from None
    lines = [line.split("#")[0].strip() for line in read_text(path, flag).splitlines()]
    cells = [[c for c in re.split(r"[\s,;]+", line) if c] for line in lines if line]
    if cells and not _is_number(cells[0][0]):
        cells = cells[1:]  # the names of the columns
    return np.array(cells, float)


def _of_json(found: Any) -> np.ndarray:
    if not isinstance(found, dict):
        return np.array(found, float)
    variance = np.atleast_2d(np.array(found["noise_variance"], float))
    counts = np.array(found.get("groups", np.ones(len(variance))), float)
    mean = counts @ variance / counts.sum()
    return np.stack([np.array(found["frequency"], float), mean], 1)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def stored_noise(found: Mapping[str, Any]) -> tuple[float, Tensor | None]:
    """Return the noise's standard deviation and ``noise_power`` of a simulation.yaml.

    Raises
    ------
    KeyError, TypeError, ValueError
        If it is damaged.
    """
    settings, sigma = found["settings"], float(found["noise_sigma"])
    box = int(settings["D"])
    if "noise_spectrum" in found:
        return sigma, spectrum_power(found["noise_spectrum"], box)
    return sigma, noise_power(str(settings["noise"]), box)
