"""Measure what was trained on digits, with the measures of particles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort.core import matrix_products
from cryodrgn_amort.data import Roll
from cryodrgn_amort.inference import ElboScale, FitOptions, fit_values, infer
from cryodrgn_amort.measures import (
    MovedLosses,
    Neighbours,
    class_knn,
    class_measures,
    fit_measures,
    kl_by_dimension,
    knn_labels,
    looked_up,
    measure,
    moved_arrays,
    moved_measures,
)
from cryodrgn_amort.study.digits.model import BETA, cross_entropies
from cryodrgn_amort.study.digits.training import encode, one_thread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from cryodrgn_amort.data import Transform
    from cryodrgn_amort.inference import Fitted
    from cryodrgn_amort.measures import FitValues, Measure
    from cryodrgn_amort.options import MnistSettings
    from cryodrgn_amort.study.digits.data import Digits, DigitSets
    from cryodrgn_amort.study.digits.training import Trained


__all__ = ["SHIFTS", "Shown", "evaluate_digits"]

SHIFTS = (1, 2, 3, 4, 5)
"""Pixels to the right."""

SAMPLES = 8
"""Pictures in the figures of reconstructions."""

_SEED = 0  # of samples and intervals
_BATCH = 1000


@dataclass
class Shown:
    """What was measured of one method and seed, and what the figures show of it.

    Attributes
    ----------
    measures
        "train", "held_out", "shift1" to "shift5" -> measures by name.
    moved
        Pixels -> means of the shifted training images `(N, zdim)`.
    pictures
        Pixels (0: as they are) -> pictures and what they decode to, `(8, 28, 28)` each.
    """

    trained: Trained
    measures: dict[str, dict[str, Measure]] = field(default_factory=dict)
    moved: dict[int, np.ndarray] = field(default_factory=dict)
    pictures: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


@one_thread()
@matrix_products()
def evaluate_digits(trained: Trained, data: DigitSets, settings: MnistSettings) -> Shown:
    """Measure one method and seed, on images it was trained on, held out, and shifted."""
    return _Evaluator(trained, data, settings).run()


class _Evaluator:
    """The steps of an evaluation; holds what they share."""

    def __init__(self, trained: Trained, data: DigitSets, settings: MnistSettings) -> None:
        self.trained, self.data, self.settings = trained, data, settings
        self.model, self.digits = trained.model, data.training
        self.model.eval()
        self.opts: dict[str, Any] = {"rounds": settings.bootstrap, "seed": _SEED}
        self.z, self.logvar = trained.z, trained.logvar
        self.mean = self.z.mean(0, dtype=np.float64).astype(np.float32)
        self.queries = looked_up(self.digits.n, _SEED)
        self.near = Neighbours(self.z, self.queries)

    def run(self) -> Shown:
        trained = self.trained
        found = Shown(trained)
        own = self.reconstruction(self.digits, self.queries, self.z)
        mean = self.reconstruction(self.digits, self.queries, np.tile(self.mean, (len(self.z), 1)))
        found.measures["train"] = self.training(own, mean)
        found.pictures[0] = self.pictures(self.z, None)
        count = min(self.settings.fit, self.digits.n, self.data.held_out.n)
        seen = self.fits(self.digits, (self.z, self.logvar), count)
        gaps = fit_measures(seen, None, self.opts)
        found.measures["train"] |= {m.name: m for m in gaps}
        if trained.shown is None:
            return found
        if trained.method == "vae":  # of pictures never seen, nothing else is known to show
            found.measures["held_out"] = self.held_out(seen, count)
        for shift in SHIFTS:
            roll = Roll(shift)
            moved = encode(self.model, self.digits, trained.shown, roll)[0]
            found.moved[shift] = moved
            found.pictures[shift] = self.pictures(moved, roll)
            losses = MovedLosses(
                own,
                mean,
                self.reconstruction(self.digits, self.queries, moved, roll),
                self.reconstruction(self.digits, self.queries, self.z, roll),
            )
            arrays = moved_arrays(self.z, self.logvar, moved, self.queries, _SEED)
            found.measures[f"shift{shift}"] = moved_measures(
                self.z, self.logvar, moved, arrays, self.near, self.digits.labels, losses,
                **self.opts,
            )  # fmt: skip
        return found

    def training(self, own: np.ndarray, mean: np.ndarray) -> dict[str, Measure]:
        """Measure reconstruction, divergence and classes of the training images."""
        labels = self.digits.labels
        shares = np.bincount(labels) / len(labels)
        right = class_knn(self.near.own, labels, self.near.rows)
        found = self._common(own, mean, (self.z, self.logvar), right, float((shares**2).sum()))
        return {m.name: m for m in found}

    def _common(
        self, own: np.ndarray, mean: np.ndarray, posterior: tuple[np.ndarray, np.ndarray],
        right: np.ndarray, chance: float,
    ) -> list[Measure]:  # fmt: skip
        """Measure what is known of any images; ``right`` `(M,)`: whether the class is."""
        kl = kl_by_dimension(*posterior).sum(1)
        return [
            measure("reconstruction", np.mean, own, null=float(mean.mean()),
                    **self.opts),
            measure("kl", np.mean, kl, **self.opts),
            measure("class_knn", np.mean, right, null=chance, **self.opts),
        ]  # fmt: skip

    def held_out(self, seen: FitValues, count: int) -> dict[str, Measure]:
        """Measure the same of images that were held out, and what the encoder loses there."""
        digits, labels = self.data.held_out, self.digits.labels
        z, logvar = encode(self.model, digits, self.trained.shown)
        rows = looked_up(digits.n, _SEED)
        own = self.reconstruction(digits, rows, z)
        null = self.reconstruction(digits, rows, np.tile(self.mean, (len(z), 1)))
        told = knn_labels(self.near.of(z[rows]), labels)
        right = (told == digits.labels[rows]).astype(float)
        shares = np.bincount(labels, minlength=10) / len(labels)
        chance = float(shares[digits.labels[rows]].mean())
        found = self._common(own, null, (z, logvar), right, chance)
        values = self.fits(digits, (z, logvar), count)
        found += fit_measures(values, seen, self.opts)
        truth = digits.labels[_sample(digits.n, count).numpy()]
        found += class_measures(self.z, labels, values, truth, self.opts)
        return {m.name: m for m in found}

    def fits(self, digits: Digits, answers: tuple[np.ndarray, np.ndarray], count: int) -> FitValues:
        """Fit posteriors to some images, from the encoder's answers and from the prior."""
        elbo_scale = ElboScale(BETA)
        spread = torch.from_numpy(self.z.std(0))
        index = _sample(digits.n, count)

        def each() -> Iterator[Fitted]:
            for rows in index.split(_BATCH):
                batch = digits.batch(rows, None)
                mean, logvar = (torch.from_numpy(a[rows.numpy()]) for a in answers)
                prior = torch.zeros_like(mean), torch.zeros_like(mean)
                starts = {"encoder": (mean, logvar), "prior": prior}
                fit, own = infer(
                    self.model, batch, (mean, logvar), starts, elbo_scale, FitOptions(), spread,
                    _SEED,
                )  # fmt: skip
                yield batch, fit, own, (mean, logvar)

        centre = torch.from_numpy(self.mean)
        return fit_values(self.model, centre, each(), elbo_scale, _SEED, tighten=True)

    @torch.no_grad()
    def reconstruction(
        self, digits: Digits, rows: np.ndarray, z: np.ndarray, transform: Transform | None = None
    ) -> np.ndarray:
        """Cross entropy of some images in nats, `(M,)`, at their latents in ``z`` `(N, zdim)`.

        With a transform, of the transformed images, explained by equally transformed ones.
        """
        found = []
        for index in torch.from_numpy(rows).split(_BATCH):
            y = digits.raw(index)
            logits = self.model.decoder(torch.from_numpy(z[index.numpy()])).view_as(y)
            if transform is not None:
                y, logits = transform.image(y), transform.image(logits)
            found.append(cross_entropies(logits.flatten(1), y.flatten(1))[1] / 2)
        return torch.cat(found).double().numpy()

    def pictures(self, z: np.ndarray, transform: Transform | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the first pictures, as they are shown, and what their latents decode to."""
        raw = self.digits.raw(torch.arange(SAMPLES))
        raw = raw if transform is None else transform.image(raw)
        return raw.numpy(), self.model.decode(torch.from_numpy(z[:SAMPLES])).numpy()


def _sample(n: int, count: int) -> Tensor:
    return torch.from_numpy(np.sort(np.random.default_rng(_SEED).permutation(n)[:count]))
