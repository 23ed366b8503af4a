"""Compare fitted posteriors with an encoder's answers, and with one latent for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cryodrgn_amort.inference.bounds import ElboScale, errors_at, importance_bound
from cryodrgn_amort.measures import FitValues

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from cryodrgn_amort.inference.bounds import Decoder
    from cryodrgn_amort.inference.optimisation import Fitted


__all__ = ["fit_values"]

_SAMPLES = 64  # of the importance-weighted bound


def fit_values(
    model: Decoder,
    centre: Tensor,
    fits: Iterable[Fitted],
    elbo_scale: ElboScale,
    seed: int,
    *,
    tighten: bool,
) -> FitValues:
    """Compare fits with one latent for all, ``centre`` `(zdim,)`, and with the encoder.

    Parameters
    ----------
    fits
        Of some particles each.
    tighten
        Whether the importance-weighted bound is wanted.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    for batch, best, own, answer in fits:
        unknown = torch.full_like(best.elbo, torch.nan)
        mean = torch.full_like(best.mean, torch.nan) if answer is None else answer[0]
        z = torch.stack([centre.expand_as(best.mean), mean, best.mean])
        losses = errors_at(model, batch, z) / 2
        bound = unknown
        if tighten:
            noise = torch.randn(_SAMPLES, *best.mean.shape, generator=generator).to(best.mean)
            bound = importance_bound(model, batch, (best.mean, best.logvar), elbo_scale, noise)
        found = {
            "gap": unknown if own is None else best.elbo - own,
            "tighter": bound - best.elbo, "converged": best.converged, "constant": losses[0],
            "encoder": losses[1], "fitted": losses[2], "own": mean, "z": best.mean,
        }  # fmt: skip
        for name, values in found.items():
            parts.setdefault(name, []).append(values.cpu())
    return FitValues(**{name: torch.cat(part).double().numpy() for name, part in parts.items()})
