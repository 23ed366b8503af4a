"""What the finished steps of a study left on disk, read and put side by side.

Only steps that are done for the present plan count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort import host
from cryodrgn_amort.core import (
    InputError,
    check_intact,
    read_json,
    read_pickle,
    read_table,
    to_array,
)
from cryodrgn_amort.measures import Measure, measure, memorisation, ratio_of_means
from cryodrgn_amort.runs import METRICS
from cryodrgn_amort.study.progress import Progress
from cryodrgn_amort.study.steps import work_of

if TYPE_CHECKING:
    from cryodrgn_amort.options import Recipe
    from cryodrgn_amort.study.plan import Plan


__all__ = ["Agreement", "Member", "Study", "read_study"]

HOMOGENEOUS = "vlt-frozen-zero"
"""The recipe with one volume for all particles: where memorisation is zero."""

_ROUNDS = 200
_FITTED = {  # which of an evaluation's fits -> what of them
    "training.train": ("amortization_gap",),
    "held-out.train": (
        "generalisation_gap", "held_out_score", "class_knn_encoder", "class_knn_fitted",
    ),
    "training.implied": ("approximation_gap",),
}  # fmt: skip


@dataclass
class Member:
    """One recipe with one seed.

    Attributes
    ----------
    folder
        Its evaluation.
    facts
        Its amortization.json.
    measures
        Of the run itself, by name.
    transforms
        Name and mode of a transform -> its measures.
    losses
        Columns of csv, `(epochs,)` each; empty if nothing was trained for it.
    """

    recipe: str
    seed: int
    folder: Path
    facts: dict[str, Any]
    measures: dict[str, Measure]
    transforms: dict[tuple[str, str], dict[str, Measure]]
    losses: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As in file names: ``vlt.seed0``."""
        return f"{self.recipe}.seed{self.seed}"

    def array(self, name: str) -> np.ndarray:
        """Return values per particle, `(N,)`."""
        path = self.folder / f"{name}.pkl"
        return to_array(read_pickle(path, "STUDY"), str(path))

    def volumes(self, transform: str = "") -> np.ndarray:
        """Return the volumes of the numbered particles, `(L, box, box, box)`.

        With a transform and mode, as in ``roll-1.held``, those of their copies.

        Raises
        ------
        InputError
            If a file is damaged.
        """
        end = f".{transform}.mrc" if transform else ".mrc"
        paths = [self.folder / f"vol.{name}{end}" for name in self.facts["labelled"]]
        found = [_volume(path) for path in paths]
        for path, volume in zip(paths, found, strict=True):
            if volume.shape != found[0].shape:
                raise InputError(f"STUDY {path}: damaged (another size than the others)")
        return np.stack(found)


def _volume(path: Path) -> np.ndarray:
    check_intact(path, "STUDY")
    try:
        volume: np.ndarray = host.parse_mrc(str(path))[0]
    except Exception as err:  # whatever the host's reader raises for damaged files
        raise InputError(f"STUDY {path}: damaged ({type(err).__name__}: {err})") from None
    return volume


@dataclass(frozen=True)
class Agreement:
    """Of two runs: recipe and seed of each, and the measures by name."""

    first: tuple[str, int]
    second: tuple[str, int]
    measures: dict[str, Measure]

    @property
    def only_seed(self) -> bool:
        """Whether they are of one recipe: what other pairs are held against."""
        return self.first[0] == self.second[0]

    @property
    def label(self) -> str:
        """For humans: "baseline and vlt"."""
        return f"{self.first[0]} and {self.second[0]}"


@dataclass
class Study:
    """All that a study has found so far.

    Attributes
    ----------
    members
        By recipe and seed.
    agreement
        Every pair of runs that was compared, once.
    seconds
        Recipe -> seconds per epoch in each round, `(rounds,)`.
    digits
        Method of ``mnist_amort`` -> for each seed, part ("train", "held_out", "shift1") -> its
        measures by name.
    missing
        Recipes of the plan of which nothing is there yet.
    """

    plan: Plan
    members: dict[tuple[str, int], Member]
    agreement: list[Agreement]
    seconds: dict[str, np.ndarray]
    timing: dict[str, Any]
    digits: dict[str, list[dict[str, dict[str, Measure]]]]
    missing: list[str]

    def of(self, recipe: str) -> list[Member]:
        """Return the members of a recipe, by seed."""
        return [m for (name, _), m in self.members.items() if name == recipe]

    def recipe(self, name: str) -> Recipe:
        """Return a recipe of the plan."""
        return self.plan.recipe(name)

    def pairs(self, recipe: str) -> list[Agreement]:
        """Return the agreement of a recipe's runs with those of its reference."""
        names = {recipe, self.recipe(recipe).reference}
        if len(names) < 2:
            return []
        return [a for a in self.agreement if {a.first[0], a.second[0]} == names]

    def seed_pairs(self, recipe: str) -> list[Agreement]:
        """Return the agreement of a recipe's runs with each other: of its seeds."""
        return [a for a in self.agreement if a.first[0] == a.second[0] == recipe]

    def measured(self, recipe: str, name: str) -> list[Measure]:
        """Return a measure of the run itself, of every seed that has it."""
        return [m.measures[name] for m in self.of(recipe) if name in m.measures]

    def transformed(self, recipe: str, transform: str, mode: str, name: str) -> list[Measure]:
        """Return a measure of a transform, of every seed that has it."""
        found = [m.transforms.get((transform, mode), {}) for m in self.of(recipe)]
        return [measures[name] for measures in found if name in measures]


def read_study(plan: Plan) -> Study:
    """Read what is done of a plan.

    Raises
    ------
    InputError
        If a file is damaged, or gone.
    """
    progress = Progress(work_of(plan))
    done = {name for name, step in progress.steps.items() if progress.is_done(step)}
    members: dict[tuple[str, int], Member] = {}
    missing = []
    for name in plan.recipes:
        if plan.recipe(name).command in ("time_amort", "mnist_amort"):
            missing += [] if name in done else [name]
            continue
        seeds = [seed for seed in plan.seeds_of(name) if f"eval.{name}.seed{seed}" in done]
        missing += [] if seeds else [name]
        for seed in seeds:
            members[(name, seed)] = _member(plan, name, seed)
    agreement: dict[tuple[tuple[str, int], tuple[str, int]], Agreement] = {}
    for name in plan.recipes:
        if f"compare.{name}" in done:
            for pair in _agreement(plan.layout.agreement(name)):
                agreement[(pair.first, pair.second)] = pair
    timed = [n for n in plan.recipes if plan.recipe(n).command == "time_amort" and n in done]
    timing = _json(plan.layout.timing) if timed else {}
    seconds = {
        _recipe_seed(folder)[0]: np.array(values)
        for folder, values in timing.get("seconds_per_epoch", {}).items()
    }
    digits = {
        method: [
            {part: _measures(found) for part, found in parts.items() if _is_measures(found)}
            for parts in seeds.values()
        ]
        for name in plan.recipes
        if plan.recipe(name).command == "mnist_amort" and name in done
        for method, seeds in _json(plan.layout.digits)["methods"].items()
    }
    study = Study(plan, members, list(agreement.values()), seconds, timing, digits, missing)
    _add_relative(study)
    return study


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(path, "STUDY")
    except InputError as err:
        raise InputError(f"{err}; delete it to have it made anew") from None
    return found


def _is_measures(found: dict[str, Any]) -> bool:
    return all(isinstance(facts, dict) and "null" in facts for facts in found.values())


def _measures(found: dict[str, Any]) -> dict[str, Measure]:
    """Read measures as reports write them; what was not finite is null there."""

    def one(name: str, facts: dict[str, Any]) -> Measure:
        value = math.nan if facts["value"] is None else facts["value"]
        rest = {k: facts[k] for k in ("low", "high", "null", "ideal", "n")}
        return Measure(name, value, **rest, attainable=facts.get("attainable"))

    return {name: one(name, facts) for name, facts in found.items()}


def _member(plan: Plan, name: str, seed: int) -> Member:
    folder = plan.layout.evaluation(name, seed)
    facts = _json(folder / "amortization.json")
    transforms = {
        (result["name"], result["mode"]): _measures(result["measures"])
        for result in facts["transforms"].values()
    }
    losses: dict[str, np.ndarray] = {}
    if plan.recipe(name).command == "train_amort":
        rows = read_table(plan.layout.run(name, seed) / METRICS, "STUDY")
        names = ("epoch", "gen_loss", "kld", "loss")
        losses = {n: np.array([float(row[n]) for row in rows]) for n in names}
    measures = _measures(facts["measures"])
    for of, wanted in _FITTED.items():
        found = facts["fits"].get(of, {"measures": {}})["measures"]
        measures |= _measures({n: found[n] for n in wanted if n in found})
    return Member(name, seed, folder, facts, measures, transforms, losses)


def _recipe_seed(folder: str) -> tuple[str, int]:
    name, _, seed = Path(folder).name.rpartition(".seed")
    return name, int(seed)


def _agreement(path: Path) -> list[Agreement]:
    return [
        Agreement(
            _recipe_seed(pair["first"]), _recipe_seed(pair["second"]), _measures(pair["measures"])
        )
        for pair in _json(path)["pairs"]
    ]


def _add_relative(study: Study) -> None:
    """Add what takes several runs to say: ``memorisation`` and ``volume_spread``."""
    for member in study.members.values():
        recipe = study.recipe(member.recipe)
        real = study.members.get((recipe.reference, member.seed))
        if recipe.command != "train_amort" or real is None:
            continue
        opts: dict[str, Any] = {"rounds": _ROUNDS, "seed": 0}
        own, others = (_spread(m.volumes()) for m in (member, real))
        spread = measure("volume_spread", ratio_of_means, own, others, **opts)  # fmt: skip
        member.measures["volume_spread"] = spread
        homogeneous = study.members.get((HOMOGENEOUS, member.seed))
        if homogeneous is None or member is homogeneous or member is real:
            continue
        losses = [m.array("reconstruction") for m in (homogeneous, member, real)]
        known = np.isfinite(losses).all(0)
        member.measures["memorisation"] = measure(
            "memorisation", memorisation, *(loss[known] for loss in losses), **opts,
        )  # fmt: skip


def _spread(volumes: np.ndarray) -> np.ndarray:
    """Squared distance of each volume to the mean of all, `(L,)`."""
    squared: np.ndarray = np.square(volumes - volumes.mean(0), dtype=np.float64).sum((1, 2, 3))
    return squared
