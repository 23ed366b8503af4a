"""Measures with their intervals, by bootstrap over particles."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


from cryodrgn_amort.measures.catalogue import DEFINITIONS

__all__ = [
    "Measure",
    "centred",
    "measure",
    "measure_ratio",
    "ratio",
    "ratio_of_means",
    "resampled_by",
    "resampled_means",
    "single",
]
_T = TypeVar("_T")

_COUNTS_KEPT = 1 << 26  # bytes


@dataclass(frozen=True)
class Measure:
    """One number with all that is needed to read it.

    Attributes
    ----------
    low, high
        Bootstrap 95 % interval over particles; None where there is none.
    null, ideal
        Its value if the transform destroyed everything, and if it changed nothing.
    n
        Number of particles it was computed from.
    attainable
        What the data allow of it; None where that is not known. See ``Definition.attainable``.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    null: float | None
    ideal: float | None
    n: int
    attainable: float | None = None

    @property
    def share(self) -> float | None:
        """Value over what is attainable, the share of it that is reached; None below 0."""
        most = self.attainable
        return None if most is None or not (most > 0 and self.value >= 0) else self.value / most


def measure(
    name: str,
    statistic: Callable[..., float],
    *arrays: np.ndarray,
    null: float | None = None,
    ideal: float | None = None,
    rounds: int = 500,
    seed: int = 0,
) -> Measure:
    """Compute ``statistic(*arrays)`` and its bootstrap interval over the rows of the arrays.

    Null and ideal are those of the catalogue; they are given where that says that they are measured
    with the value, or does not know the name.

    Those statistics that are computed from all particles are resampled without touching the rows
    one by one, as counts of how often each was drawn; the draws are the same.
    """
    n = len(arrays[0])
    fast = _RESAMPLED.get(statistic)
    if not rounds:
        drawn = np.empty(0)
    elif fast is not None and all(np.isfinite(a).all() for a in arrays):
        drawn = fast(_counts(n, rounds, seed), *arrays)
    else:
        draws = _draws(n, rounds, seed)
        drawn = np.array([statistic(*(a[rows] for a in arrays)) for rows in draws])
    low, high = map(float, np.percentile(drawn, [2.5, 97.5])) if rounds else (None, None)
    return single(name, float(statistic(*arrays)), n, low, high, null=null, ideal=ideal)


def single(
    name: str,
    value: float,
    n: int,
    low: float | None = None,
    high: float | None = None,
    *,
    null: float | None = None,
    ideal: float | None = None,
) -> Measure:
    """Return a measure as it is, with null and ideal of the catalogue unless they are given."""
    known = DEFINITIONS.get(name)
    if known is not None:
        null = known.null if isinstance(known.null, float) else null
        ideal = known.ideal if isinstance(known.ideal, float) else ideal
    return Measure(name, value, low, high, null, ideal, n)


def measure_ratio(
    name: str,
    values: np.ndarray,
    reference: np.ndarray,
    *,
    rounds: int = 500,
    seed: int = 0,
) -> Measure:
    """Compute the ratio of the means of two samples `(N,)` and `(M,)`, each resampled by itself."""
    low, high = None, None
    if rounds:
        drawn = (
            _resampled_mean(_counts(len(sample), rounds, seed + k), sample)
            for k, sample in enumerate((values, reference))
        )
        ratios = [ratio(float(a), float(b)) for a, b in zip(*drawn, strict=True)]
        low, high = map(float, np.percentile(ratios, [2.5, 97.5]))
    return single(name, ratio_of_means(values, reference), len(values), low, high)


def ratio(value: float, reference: float) -> float:
    """Return one number over another; NaN over 0, as where a run has collapsed."""
    return float(value / reference) if reference else math.nan


def _draws(n: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """Draw rows with replacement, `(n,)` in each round."""
    rng = np.random.default_rng(seed)
    return (rng.integers(n, size=n) for _ in range(rounds))


def _counts(n: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """Count how often each row is drawn, `(R, n)`, for some rounds at a time."""
    if n * rounds <= _COUNTS_KEPT:
        yield _kept_counts(n, rounds, seed)
        return
    draws = _draws(n, rounds, seed)
    step = max(1, _COUNTS_KEPT // n)
    for start in range(0, rounds, step):
        yield _counted(draws, min(step, rounds - start), n)


@functools.lru_cache(maxsize=4)  # measures of as many rows have the same draws
def _kept_counts(n: int, rounds: int, seed: int) -> np.ndarray:
    return _counted(_draws(n, rounds, seed), rounds, n)


def _counted(draws: Iterator[np.ndarray], rounds: int, n: int) -> np.ndarray:
    counts = np.empty((rounds, n), np.uint8)  # where n > 255, a count above 255 is no event
    for row in counts:
        row[:] = np.bincount(next(draws), minlength=n)
    return counts


def resampled_means(
    counts: Iterator[np.ndarray], columns: Callable[..., np.ndarray], *arrays: np.ndarray
) -> np.ndarray:
    """Average ``columns(*arrays)``, `(n, C)`, over the rows drawn in each round: `(rounds, C)`."""
    width = columns(*(a[:1] for a in arrays)).shape[1]
    found = []
    for part in counts:
        n = part.shape[1]
        step = max(64, 1_000_000 // max(width, len(part)))
        sums = np.zeros((len(part), width))
        for start in range(0, n, step):
            rows = slice(start, start + step)
            sums += part[:, rows].astype(np.float64) @ columns(*(a[rows] for a in arrays))
        found.append(sums / n)
    return np.concatenate(found)


def _resampled_mean(counts: Iterator[np.ndarray], values: np.ndarray) -> np.ndarray:
    return resampled_means(counts, lambda part: part[:, None].astype(np.float64), values)[:, 0]


def _resampled_median(counts: Iterator[np.ndarray], values: np.ndarray) -> np.ndarray:
    n, order = len(values), np.argsort(values)
    ordered = values[order].astype(np.float64)
    middle = np.array([(n - 1) // 2, n // 2])
    # how many of the drawn values are up to each of the ordered ones
    reached = (row[order].cumsum(dtype=np.int64) for part in counts for row in part)
    at = np.stack([row.searchsorted(middle, "right") for row in reached])
    medians: np.ndarray = ordered[at].mean(1)
    return medians


_RESAMPLED: dict[Callable[..., float], Callable[..., np.ndarray]] = {
    np.mean: _resampled_mean,
    np.median: _resampled_median,
}
"""How statistics of all particles are bootstrapped: from counts and arrays, one value a round."""


def resampled_by(fast: Callable[..., np.ndarray]) -> Callable[[_T], _T]:
    """Let a statistic be bootstrapped from counts and arrays, one value a round."""

    def known(statistic: _T) -> _T:
        _RESAMPLED[statistic] = fast  # type: ignore[index]
        return statistic

    return known


def centred(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return arrays `(N, ...)` minus their means over the rows, in double precision."""
    wide = (np.asarray(a, np.float64) for a in arrays)
    return tuple(a - a.mean(0) for a in wide)


def ratio_of_means(values: np.ndarray, reference: np.ndarray) -> float:
    """Mean of some values over that of others."""
    return ratio(values.mean(), reference.mean())
