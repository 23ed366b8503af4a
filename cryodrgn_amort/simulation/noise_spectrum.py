"""The spectrum of simulated noise: how its variance is shared out among frequencies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


__all__ = ["noise_power", "stored_noise"]


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


def stored_noise(found: Mapping[str, Any]) -> tuple[float, Tensor | None]:
    """Return the noise's standard deviation and ``noise_power`` of a simulation.yaml.

    Raises
    ------
    KeyError, TypeError, ValueError
        If it is damaged.
    """
    settings = found["settings"]
    return float(found["noise_sigma"]), noise_power(str(settings["noise"]), int(settings["D"]))
