"""An example plugin: show the encoder low-passed particles, and log each epoch as JSON.

How much of the encoder's input can be taken away before the latents suffer? Install it beside
cryodrgn_amort (``pip install ./examples/plugin``) and train with

    cryodrgn train_amort particles.mrcs ... --encoder lowpass --lowpass-px 8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from cryodrgn_amort import hookimpl
from cryodrgn_amort.errors import InputError
from cryodrgn_amort.inputs import EncoderInput, InputSpec

DEFAULT_PX = 8.0


class LowPass(EncoderInput):
    """The particle with all wavelengths shorter than ``wavelength_px`` removed."""

    def __init__(self, particles, wavelength_px: float) -> None:
        if not wavelength_px > 2:
            raise InputError(f"--lowpass-px {wavelength_px}: must be above 2 pixels (Nyquist)")
        self.particles = particles
        freq = torch.fft.fftfreq(particles.box)
        radius = torch.hypot(freq[:, None], freq[None, :])
        self.keep = radius <= 1 / wavelength_px

    def raw(self, index: torch.Tensor) -> torch.Tensor:
        """Return real-space images; preprocessing, centring and phase flip follow by themselves."""
        images = self.particles.raw(index)
        return torch.fft.ifft2(torch.fft.fft2(images) * self.keep).real


def _build(settings, particles) -> LowPass:
    return LowPass(particles, float(settings.extra.get("lowpass_px", DEFAULT_PX)))


@hookimpl
def encoder_inputs():
    """Bring ``--encoder lowpass``; ``--lowpass-px`` with any other encoder is refused."""
    return [
        InputSpec("lowpass", "the low-passed particle", _build, flags=frozenset({"lowpass_px"}))
    ]


@hookimpl
def train_args(parser):
    """Add a flag of our own to ``train_amort``."""
    parser.add_argument(
        "--lowpass-px",
        type=float,
        default=argparse.SUPPRESS,
        help=f"Shortest wavelength that --encoder lowpass sees, in pixels (default: {DEFAULT_PX})",
    )


@hookimpl
def epoch_end(trainer, metrics):
    """Append the epoch's metrics to progress.jsonl in the run folder."""
    with open(Path(trainer.folder) / "progress.jsonl", "a") as handle:
        handle.write(json.dumps(dict(metrics)) + "\n")
