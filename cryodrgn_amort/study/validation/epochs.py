"""Which epoch: how well the decoder of each checkpoint explains particles that it has not seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodrgn_amort.core import epochs as epochs_of
from cryodrgn_amort.inference import elbo
from cryodrgn_amort.runs import load_run
from cryodrgn_amort.study.validation.case import NATS, Case

if TYPE_CHECKING:
    from cryodrgn_amort.study.validation.case import Fits


__all__ = ["EpochCurve", "epoch_curve"]

_TOGETHER = 64
_MOST = 8  # checkpoints
_SURE = 2.0  # standard errors
_GROWS = 0.12  # of what all epochs gained, since the last quarter of them: it still improves


@dataclass(frozen=True)
class EpochCurve:
    """Held-out ELBO at checkpoints.

    Attributes
    ----------
    epochs
        Of the checkpoints, rising, `(E,)`.
    elbo
        Of each particle at each, in nats up to one constant, `(E, M)`.
    """

    epochs: np.ndarray
    elbo: np.ndarray

    @property
    def best(self) -> int:
        """The first epoch that is not surely worse than the best one."""
        mean = self.elbo.mean(1)
        top = self.elbo[int(mean.argmax())]
        below = top - self.elbo
        error = below.std(1) / np.sqrt(below.shape[1])
        return int(self.epochs[np.flatnonzero(below.mean(1) <= _SURE * error)[0]])

    @property
    def growth(self) -> tuple[float, float, float]:
        """What the last quarter of the epochs gained, its standard error, and what all gained."""
        last = self.epochs[-1]
        before = int(np.argmin(np.abs(self.epochs - 0.75 * last)))
        each = self.elbo[-1] - self.elbo[before]
        whole = float(self.elbo.mean(1).max() - self.elbo[0].mean())
        return float(each.mean()), float(each.std() / np.sqrt(len(each))), whole

    @property
    def improves(self) -> bool:
        """Whether the last quarter of the epochs surely helped, and by an amount that counts."""
        gained, error, whole = self.growth
        return gained > _SURE * error and gained > _GROWS * whole

    @property
    def declines(self) -> bool:
        """Whether the last quarter of the epochs surely did harm."""
        gained, error, _ = self.growth
        return gained < -_SURE * error


def epoch_curve(case: Case, fits: Fits, count: int) -> EpochCurve:
    """Measure each checkpoint of a case's run by particles that it has not seen."""
    known = epochs_of(case.run.folder)
    if len(known) > _MOST:
        known = [known[i] for i in np.linspace(0, len(known) - 1, _MOST).round().astype(int)]
    rows = fits.rows[np.random.default_rng(case.seed).permutation(len(fits.rows))[:count]]
    found = []
    for epoch in known:
        run = load_run(case.run.folder, case.run.plugins, epoch)
        at = Case(run, case.particles, own=case.own, seed=case.seed)
        white, each = at.whitened(fits.spectrum), []
        draw = case.generator()
        for index in torch.from_numpy(np.sort(rows)).split(_TOGETHER):
            batch = at.loader.read(index)
            mean, logvar = at.posterior(white, batch)
            draws = torch.randn(4, *mean.shape, generator=draw, device=mean.device)
            each.append(elbo(white, batch, (mean, logvar), NATS, draws).double().cpu())
        found.append(torch.cat(each).numpy())
    return EpochCurve(np.array(known), np.stack(found))
