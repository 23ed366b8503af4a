"""What was fitted: posteriors of particles, and the main numbers of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort.inference.optimisation import FitOptions

if TYPE_CHECKING:
    from cryodrgn_amort.inference.bounds import ElboScale


__all__ = ["GAIN", "MANY", "Inferred", "inferred_facts", "inferred_summary", "lacking"]

MANY = 500  # particles; more are fitted quickly unless told otherwise
GAIN = 0.5  # nats that are worth more steps


@dataclass(frozen=True)
class Inferred:
    """Fitted posteriors of some particles.

    Attributes
    ----------
    mean, logvar
        `(N, zdim)`.
    elbo, encoder_elbo
        In nats by ``elbo_scale``, `(N,)`; the second one NaN where there is no encoder.
    converged
        `(N,)` bool.
    start
        Positions in ``starts``, `(N,)`; -1: the encoder's answer as it was.
    fitted
        Whether any step was taken.
    would_gain
        If all were fitted quickly: share of a few that gain half a nat from a thorough fit.
    """

    mean: np.ndarray
    logvar: np.ndarray
    elbo: np.ndarray
    converged: np.ndarray
    start: np.ndarray
    encoder_elbo: np.ndarray
    starts: tuple[str, ...]
    elbo_scale: ElboScale
    fitted: bool = True
    would_gain: float | None = None

    @property
    def gap(self) -> np.ndarray:
        """What the encoder's answers lack in ELBO, in nats: `(N,)`."""
        gap: np.ndarray = self.elbo - self.encoder_elbo
        return gap

    @property
    def failed(self) -> np.ndarray:
        """Positions of the particles whose loss is not a number."""
        return np.flatnonzero(~np.isfinite(self.elbo))


def inferred_facts(found: Inferred) -> dict[str, Any]:
    """Return the main numbers."""
    sound = np.isfinite(found.elbo)
    gap = found.gap[np.isfinite(found.gap)]
    best = np.bincount(found.start[sound] + 1, minlength=len(found.starts) + 1) / max(
        sound.sum(), 1
    )
    return {
        "particles": len(sound),
        "converged": float(found.converged.mean()),
        "failed": found.failed.tolist(),
        "beta": found.elbo_scale.beta,
        "variance": found.elbo_scale.variance,
        "elbo": float(found.elbo[sound].mean()) if sound.any() else None,
        "amortization_gap": float(gap.mean()) if len(gap) else None,
        "would_gain": found.would_gain,
        "best_start": dict(zip(("kept", *found.starts), best.tolist(), strict=True)),
    }


def inferred_summary(found: Inferred) -> str:
    """Return the main numbers as text."""
    f = inferred_facts(found)
    shares = ", ".join(
        f"{name} {100 * share:.0f} %" for name, share in f["best_start"].items() if share
    )
    lines = [
        f"{f['particles']} particles, beta {f['beta']:.4g}, noise variance {f['variance']:.4g}: "
        + (f"{100 * f['converged']:.1f} % converged" if found.fitted else "not fitted"),
        f"ELBO {_nats(f['elbo'])}; best from: {shares}",
    ]
    if f["amortization_gap"] is not None:
        lines.append(f"Amortization gap: {_nats(f['amortization_gap'])} on average")
    if found.would_gain is not None:
        lines.append(lacking(found.would_gain))
    if len(found.failed):
        named = ", ".join(map(str, found.failed[:10])) + (", ..." if len(found.failed) > 10 else "")
        lines.append(
            f"The loss of {len(found.failed)} particles is not a number; they keep where they "
            f"started: {named}"
        )
    return "\n".join(lines)


def lacking(share: float) -> str:
    """Say what quick fits lack, for this share of the particles."""
    return (
        f"More than {MANY} particles are fitted quickly; of a few that were tried, "
        f"{100 * share:.0f} % would gain {GAIN} nats or more by --steps {FitOptions.steps}"
    )


def _nats(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g} nats"
