"""How far each single particle can be trusted: a table, and selections that other tools take."""

from __future__ import annotations

import csv
import math
from typing import TYPE_CHECKING

import numpy as np

from cryodrgn_amort.core import replacing, write_pickle
from cryodrgn_amort.measures import looked_up, retrieval_rank

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cryodrgn_amort.report.results import Evaluation


__all__ = ["STABLE", "stable_rows", "trust_table", "write_trust"]

STABLE = 0.05
"""A particle is stable if under no transform a larger share of the others is nearer to its copy."""


def trust_table(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """Return what is known of each particle, each `(N,)`; NaN where it was not measured.

    ``rank.KEY`` and ``displacement.KEY`` for each transform and mode, ``reconstruction`` and
    ``gap`` in nats, ``khat`` of the weights behind fits (above 0.63 the gap is not to be trusted),
    and ``trust``: 1 minus the largest rank of ``Evaluation.tests``.
    """
    z, n = evaluation.z, len(evaluation.z)
    others = looked_up(n, evaluation.options.seed)
    table: dict[str, np.ndarray] = {}
    worst, tests = np.full(n, np.nan), {r.key for r in evaluation.tests}
    for result in evaluation.results:
        rank = result.arrays["retrieval_rank"]
        if np.isnan(rank).any():  # of large sets, all particles among a sample of the others
            rank = retrieval_rank(z, result.z, others=others)
        table[f"rank.{result.key}"] = rank
        table[f"displacement.{result.key}"] = result.arrays["displacement"]
        if result.key in tests and not result.is_control:
            worst = np.fmax(worst, rank)
    table["reconstruction"] = evaluation.arrays["reconstruction"]
    fits = {f.key: f for f in evaluation.fits}
    for name, key in (("gap", "training.train"), ("khat", "training.implied")):
        table[name] = np.full(n, np.nan)
        if key in fits:
            table[name][fits[key].index] = getattr(fits[key], name)
    if evaluation.results:
        table["trust"] = 1 - worst
    return table


def stable_rows(table: Mapping[str, np.ndarray]) -> np.ndarray:
    """Tell which particles of a ``trust_table`` are stable, `(N,)` bool."""
    stable: np.ndarray = table["trust"] >= 1 - STABLE
    return stable


def write_trust(evaluation: Evaluation, folder: Path) -> None:
    """Write ``trust.csv``, the columns that are no one else's as pickles, and selections.

    ``ind_stable.pkl`` and ``ind_unstable.pkl`` hold positions in the stack, for ``--ind``,
    ``cryodrgn_utils filter_star`` and ``filter_cs``; neither is written if it would be empty.
    """
    table, stack = evaluation.trust, evaluation.index
    with (
        replacing(folder / "trust.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as handle,
    ):
        writer = csv.writer(handle)
        writer.writerow(["particle", *table])
        columns = (column.tolist() for column in table.values())
        for particle, *values in zip(stack.tolist(), *columns, strict=True):
            known = ("" if math.isnan(value) else f"{value:.6g}" for value in values)
            writer.writerow([particle, *known])
    if evaluation.fits:
        write_pickle(folder / "gap.pkl", evaluation.of_all(table["gap"]))
    if "trust" not in table:
        return
    write_pickle(folder / "trust.pkl", evaluation.of_all(table["trust"]))
    stable = stable_rows(table)
    for name, chosen in (("stable", stable), ("unstable", ~stable)):
        if chosen.any():
            write_pickle(folder / f"ind_{name}.pkl", stack[chosen])
