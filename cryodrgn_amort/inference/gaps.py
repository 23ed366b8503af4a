"""Compare fitted posteriors with an encoder's answers, and with one latent for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cryodrgn_amort.inference.bounds import (
    ElboScale,
    importance_bound,
    importance_ratios,
)
from cryodrgn_amort.measures import SAMPLES, FitValues, tail_shapes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from cryodrgn_amort.inference.bounds import Decoder
    from cryodrgn_amort.inference.optimisation import Fitted


__all__ = ["fit_values"]


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
        losses = model.errors_at(batch, z) / 2
        bound, shapes = unknown, (unknown, unknown)
        if tighten:
            noise = torch.randn(SAMPLES, *best.mean.shape, generator=generator).to(best.mean)
            posterior = best.mean, best.logvar
            ratios = importance_ratios(model, batch, posterior, elbo_scale, noise)
            bound = importance_bound(ratios)
            khat, worth = tail_shapes(ratios.cpu().numpy())
            shapes = torch.from_numpy(khat), torch.from_numpy(worth)
        found = {
            "gap": unknown if own is None else best.elbo - own,
            "tighter": bound - best.elbo, "converged": best.converged, "constant": losses[0],
            "encoder": losses[1], "fitted": losses[2], "own": mean, "z": best.mean,
            "khat": shapes[0], "worth": shapes[1],
        }  # fmt: skip
        for name, values in found.items():
            parts.setdefault(name, []).append(values.cpu())
    return FitValues(**{name: torch.cat(part).double().numpy() for name, part in parts.items()})
