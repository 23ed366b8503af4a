"""Do runs of the same particles agree? Pair by pair, next to what a change of seed alone does."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort.core import InputError, number, text_table, write_json
from cryodrgn_amort.measures import (
    DEFINITIONS,
    K,
    Measure,
    fsc,
    kmeans_ari,
    knn_overlap,
    linear_cka,
    measure,
    procrustes_disparity,
    single,
    text_row,
    with_before,
)
from cryodrgn_amort.runs import TRAINED, load_run

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from cryodrgn_amort.options import CompareOptions
    from cryodrgn_amort.runs import Run


__all__ = ["Comparison", "compare", "comparison_table", "write_comparison"]
logger = logging.getLogger("cryodrgn_amort")

_JUDGED = ("knn_overlap", "volume_fsc")
_HARDLY = 4.0  # times what is shared by chance
_FEWEST = 3  # particles that runs must have in common
_NOT_CONFIGURATION = {
    "seed", "shuffle_seed", "outdir", "load", "overwrite", "do_analysis", "checkpoint",
    "log_interval", "verbose", "lazy", "memory", "num_workers", "max_threads", "recipe",
    "particles", "poses", "ctf", "ind", "holdout", "datadir", "norm",
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Agreement of two runs.

    Attributes
    ----------
    first, second
        Their folders.
    only_seed
        Whether they differ in nothing but the seed: the figure to hold the others against.
    measures
        By name.
    """

    first: str
    second: str
    only_seed: bool
    measures: dict[str, Measure]


def compare(runs: Sequence[Run], options: CompareOptions) -> list[Comparison]:
    """Measure the agreement of every pair of runs, on the particles that all of them have.

    Raises
    ------
    InputError
        If there are fewer than two runs, or they do not have enough particles in common.
    """
    if len(runs) < 2:
        raise InputError("RUN: at least two runs are needed")
    latents = [run.z_mu[rows] for run, rows in zip(runs, _common(runs), strict=True)]
    n = len(latents[0])
    if options.clusters > n:
        raise InputError(f"--clusters {options.clusters}: there are only {n} particles")
    sample = np.random.default_rng(options.seed).permutation(n)[: options.volumes]
    volumes = _volume_measures(runs, [z[sample] for z in latents], options) if len(sample) else {}
    found = []
    for i, j in combinations(range(len(runs)), 2):
        measures = _latent_measures(latents[i], latents[j], options)
        measures += [volumes[i, j]] if volumes else []
        found.append(
            Comparison(
                str(runs[i].folder),
                str(runs[j].folder),
                _only_seed(runs[i], runs[j]),
                {m.name: m for m in measures},
            )
        )
    return found


def _common(runs: Sequence[Run]) -> list[np.ndarray]:
    """Return where each run has the particles that all have, in the order of the stack."""
    known = [run.index for run in runs]
    index = [found for found in known if found is not None]
    if len(index) < len(runs):
        if len({run.n for run in runs}) > 1:
            raise InputError(
                f"RUN {runs[known.index(None)].folder}: which particles it has is not known: what "
                f"its --ind named, or its {TRAINED}, is gone"
            )
        logger.warning(
            f"What --ind named, or {TRAINED}, is gone: taken to be the same particles in all runs"
        )
        return [np.arange(run.n) for run in runs]
    shared = reduce(np.intersect1d, index)
    if len(shared) < _FEWEST:
        raise InputError(f"RUN: these have {len(shared)} particles in common")
    if len(shared) < max(map(len, index)):
        logger.info(f"Compared on the {len(shared)} particles that all runs have")
    orders = map(np.argsort, index)
    return [
        order[np.isin(found[order], shared)] for found, order in zip(index, orders, strict=True)
    ]


def _latent_measures(a: np.ndarray, b: np.ndarray, options: CompareOptions) -> list[Measure]:
    n, opts = len(a), {"rounds": options.bootstrap, "seed": options.seed}
    k = min(K, n - 1)
    ari = kmeans_ari(a, b, options.clusters, options.seed)
    disparity = procrustes_disparity(a, b)
    return [
        measure("knn_overlap", np.mean, knn_overlap(a, b), null=k / n, **opts),  # type: ignore[arg-type]
        measure("linear_cka", linear_cka, a, b, **opts),  # type: ignore[arg-type]
        single("procrustes_disparity", disparity, n),
        single("kmeans_ari", ari, n),
    ]


def _volume_measures(
    runs: Sequence[Run], latents: Sequence[np.ndarray], options: CompareOptions
) -> dict[tuple[int, int], Measure]:
    """Compare the volumes that pairs of runs decode for the same particles, one after the other."""
    first, *others = ((run, run.config["lattice_args"]["D"] - 1) for run in runs)
    for run, box in others:
        if box != first[1]:
            raise InputError(
                f"RUN {run.folder}: volumes of {box} px, those of {first[0].folder} have "
                f"{first[1]}; compare latents alone with --volumes 0"
            )
    pairs = list(combinations(range(len(runs)), 2))
    areas, nulls = ({pair: [] for pair in pairs} for _ in range(2))  # type: ignore[var-annotated]
    decoded = zip(*(run.decode(z) for run, z in zip(runs, latents, strict=True)), strict=True)
    for own, before in with_before(decoded):
        for i, j in pairs:
            areas[i, j].append(fsc(own[i], own[j])[1:].mean())
            nulls[i, j].append(fsc(own[i], before[j])[1:].mean())
    return {
        pair: measure("volume_fsc", np.mean, np.roll(areas[pair], 1),
                      null=float(np.mean(nulls[pair])),
                      rounds=options.bootstrap, seed=options.seed)
        for pair in pairs
    }  # fmt: skip


def _only_seed(first: Run, second: Run) -> bool:
    same = _configuration(first) == _configuration(second)
    return same and first.settings.seed != second.settings.seed


def _configuration(run: Run, before: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what a run's latents depend on but for seeds and particles, and so on for parents."""
    settings = asdict(run.settings)
    kept = {name: value for name, value in settings.items() if name not in _NOT_CONFIGURATION}
    before = (*before, run.folder.resolve())
    start = kept["extra"].get("table_init")
    return {
        **kept,
        "epoch": run.epoch,
        "from_run": _parent(kept["from_run"], run, before),
        "extra": {**kept["extra"], "table_init": _parent(start, run, before)},
    }


def _parent(path: str | None, run: Run, before: tuple[Path, ...]) -> Any:
    """Return the configuration of a run that another one begins with; its path, if it is gone."""
    folder, file = (Path(path), "") if path else (None, "")
    if folder is not None and folder.is_file():
        folder, file = folder.parent, folder.name
    if folder is None or folder.resolve() in before:
        return path
    try:
        return file, _configuration(load_run(folder, run.plugins), before)
    except InputError:
        return path


def comparison_table(found: Sequence[Comparison]) -> str:
    """Return all pairs as a table of plain text; those that differ in the seed alone are marked."""
    rows: list[tuple[str, ...]] = [
        ("first", "second", "measure", "value", "95 % interval", "null", "ideal")
    ]
    for pair in found:
        seed = " (other seed)" if pair.only_seed else ""
        names = (Path(pair.first).name, Path(pair.second).name + seed)
        rows += [(*names, *text_row(m)) for m in pair.measures.values()]
    return "\n".join([text_table(rows), *comparison_words(found)])


def comparison_words(found: Sequence[Comparison]) -> list[str]:
    """Say which pairs agree as two seeds do, a sentence each."""
    seeds = [pair for pair in found if pair.only_seed]
    if not seeds:
        return [
            "No two runs differ in the seed alone: what counts as agreement here is not known. "
            f"Train {Path(found[0].first).name} once more with another --seed, and give it, too."
        ]
    said, hardly = [], False
    for pair in seeds:
        knn = pair.measures["knn_overlap"]
        few = knn.value < _HARDLY * (knn.null or 0.0)
        hardly |= few
        verdict = (
            "little is found again, do not believe its latents"
            if few
            else "what others are held against"
        )
        said.append(
            f"{_names(pair)}, two seeds: share {number(knn.value)} of neighbours, "
            f"{number(knn.null)} by chance: {verdict}"
        )
    for pair in found:
        if pair.only_seed:
            continue
        below = [name for name in _JUDGED if _is_below(pair, seeds, name)]
        alike = "as little as two seeds do" if hardly else "as two seeds do"
        agrees = f"less than two seeds do ({', '.join(below)})" if below else alike
        said.append(f"{_names(pair)}: agree {agrees}")
    return said


def _names(pair: Comparison) -> str:
    return f"{Path(pair.first).name} and {Path(pair.second).name}"


def _is_below(pair: Comparison, seeds: Sequence[Comparison], name: str) -> bool:
    """Tell whether a measure is surely below those of all pairs of seeds, over their nulls."""
    if name not in pair.measures:
        return False
    m = pair.measures[name]
    high = (m.value if m.high is None else m.high) - (m.null or 0.0)
    others = [seed.measures[name] for seed in seeds]
    return high < min((o.value if o.low is None else o.low) - (o.null or 0.0) for o in others)


def write_comparison(found: Sequence[Comparison], path: str | os.PathLike[str]) -> None:
    """Write all pairs as JSON."""
    names = dict.fromkeys(name for pair in found for name in pair.measures)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "definitions": {name: DEFINITIONS[name].words() for name in names},
            "pairs": [asdict(pair, dict_factory=_known) for pair in found],
        },
    )


def _known(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a pair or a measure; nothing is attainable of agreement."""
    return {name: value for name, value in fields if name != "attainable"}
