"""What is measured against the truth of a simulation: neighbours, volumes, and signal in noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.evaluation.attainable import attainable
from cryodrgn_amort.measures import (
    latent_correlation,
    neighbourhood,
    spread,
    volume_errors,
    volume_fve,
)

if TYPE_CHECKING:
    from cryodrgn_amort.evaluation.subject import Subject
    from cryodrgn_amort.measures import Measure
    from cryodrgn_amort.simulation import Truth


__all__ = ["noise_swap", "truth_measures"]


def truth_measures(
    subject: Subject, truth: Truth, z: np.ndarray
) -> tuple[list[Measure], dict[str, np.ndarray]]:
    """Compare neighbours among latents ``z`` `(N, zdim)`, and decoded volumes, with the true ones.

    Returns measures, and values per particle `(N,)` by name.
    """
    rows, n, box = subject.truth_sample, subject.particles.n, subject.particles.box
    overlap, null = neighbourhood(z, truth.positions, subject.sample)
    # without the host's inversion, density is negative
    sign = 1 if subject.run.settings.invert_data else -1
    decoded = (sign * volume for volume in subject.codec.decode(z[rows]))
    volumes = volume_errors(lambda: truth.volumes(rows), decoded)
    one, ideal = float(volumes.null_areas.mean()), 0.5 - 1 / box
    found = [
        subject.measure("neighbourhood", np.mean, overlap, null=null),
        subject.measure("per_image_fsc", np.mean, volumes.areas, null=one, ideal=ideal),
    ]
    positions = truth.positions[rows]
    spreads = None
    if (positions != positions[0]).any():  # there is something to explain
        spreads = volumes.spreads
        found.append(subject.measure("volume_fve", volume_fve, volumes.errors, spreads))
    with subject.clock.stage("attainable"):
        found += attainable(subject, truth, spreads)
    arrays = {
        "neighbourhood": spread(overlap, subject.sample, n),
        "per_image_fsc": spread(volumes.areas, rows, n),
    }
    return found, arrays


@torch.no_grad()
def noise_swap(subject: Subject, truth: Truth, z: np.ndarray) -> list[Measure]:
    """Encode the signal of each sampled particle in the noise of another.

    The noise is that which the encoder was shown: centred and phase-flipped with its own image.
    """
    p, codec, rows = subject.particles, subject.codec, subject.sample
    if codec.shown is None or not subject.run.shows_particles:
        return []
    noisy, parts = np.roll(rows, 1), []
    both = torch.from_numpy(np.stack([rows, noisy], 1))
    for index, other in (pair.unbind(1) for pair in both.split(codec.at_once)):
        own, theirs = p.rows_of(index), p.rows_of(other)
        clean = codec.sent(index, own, truth.clean(p, own))
        signal = codec.batch(clean, p.hartley(clean.raw))
        noisy_images = codec.sent(other, theirs, p.raw(theirs))
        noise = p.hartley(noisy_images.raw) - p.hartley(truth.clean(p, theirs))
        shown = codec.batch(noisy_images, noise).image
        assert signal.image is not None
        assert shown is not None
        signal.image = signal.image + shown
        parts.append(codec.posterior(signal))
    swapped = torch.cat(parts)[:, : z.shape[1]].cpu().numpy()
    return [
        subject.measure(f"noise_swap_{name}", latent_correlation, z[at], swapped)
        for name, at in (("signal", rows), ("noise", noisy))
    ]  # fmt: skip
