"""The run that is evaluated, what is known of its particles, and which of them are looked at."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort.core import InputError, ProcessGroup
from cryodrgn_amort.evaluation.codec import Codec
from cryodrgn_amort.inference import Fitter
from cryodrgn_amort.measures import Measure, Neighbours, looked_up, measure
from cryodrgn_amort.runs import INPUTS
from cryodrgn_amort.simulation import Known, load_imaging, load_known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cryodrgn_amort.data import Transform
    from cryodrgn_amort.options import EvalOptions
    from cryodrgn_amort.runs import Run


__all__ = ["Clock", "Own", "Subject"]


class Clock:
    """Tells how long the stages took; what is within none of them is "measures"."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what is done within as this stage."""
        self._count("measures")
        yield
        self._count(name)

    def _count(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def __str__(self) -> str:
        each = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._seconds.items())
        return f"{sum(self._seconds.values()):.1f} seconds: {each}"


@dataclass(frozen=True)
class Own:
    """Latents of the particles themselves, with which those of copies are compared.

    Attributes
    ----------
    z, logvar
        `(N, zdim)`.
    losses
        Reconstruction losses of ``Subject.sample``, `(S,)` each: at their "own" latents, and at the
        "mean" of all.
    near
        Neighbours of ``Subject.queries``.
    """

    z: np.ndarray
    logvar: np.ndarray
    losses: dict[str, np.ndarray]
    near: Neighbours


class Subject:
    """A run that is evaluated, opened with its particles and its model.

    Samples depend on the number of particles and the seed alone, so that runs can be compared
    particle by particle. All are positions among the particles.

    Attributes
    ----------
    codec
        Encodes and decodes.
    known
        What is known of the particles.
    imaging
        How their images were made; None without ``--truth``.
    transforms
        Those that were asked for, by name.
    sample, truth_sample
        Particles whose losses, and whose true volumes, are looked at; sorted.
    queries
        Particles whose neighbours are looked up.
    labelled
        Particles that are shown by number.
    volume_sample
        Particles whose volumes are compared with those of copies; the labelled ones come first,
        so that theirs are decoded once.
    clock
        Counts the stages of the evaluation.
    opts
        Keyword arguments of ``measure``: how intervals are drawn.

    Raises
    ------
    InputError
        If the inputs are gone or do not fit, there is one particle only, or a transform cannot be
        applied to this run.
    """

    def __init__(
        self, run: Run, options: EvalOptions, processes: ProcessGroup | None = None
    ) -> None:
        self.run, self.options, self.clock = run, options, Clock()
        self.particles = particles = run.particles(**self._moved)
        n, seed = particles.n, options.seed
        if n < 2:
            raise InputError(f"RUN {run.folder}: one particle alone has none to be compared with")
        self.opts: dict[str, Any] = {"rounds": options.bootstrap, "seed": seed}
        names = dict.fromkeys(options.transforms)  # each once, in order
        self.transforms = [(name, self._transform(name)) for name in names]
        rng = np.random.default_rng(seed)
        mixed = rng.permutation(n)
        self.sample = np.sort(mixed[: options.sample])
        self.truth_sample = np.sort(mixed[: options.truth_volumes])
        self.queries = looked_up(n, seed)
        self.labelled = np.arange(min(options.labelled, n))
        rest = len(self.labelled) + rng.permutation(n - len(self.labelled))
        count = max(options.volumes, len(self.labelled))
        self.volume_sample = np.concatenate([self.labelled, rest])[:count]
        self.known = load_known(options, particles, run.plugins)
        truth = options.truth
        self.imaging = None if truth is None else load_imaging(truth, particles)
        self.codec = Codec(particles, *run.load(particles), options.batch_size, processes)

    @property
    def _moved(self) -> dict[str, Any]:
        """Where the run's inputs are now."""
        return {name: getattr(self.options, name) for name in INPUTS}

    def _transform(self, name: str) -> Transform:
        kind, colon, argument = name.partition(":")
        spec = self.run.plugins.transform(kind)
        built: Transform = spec.build(argument if colon else None, self.particles)
        return built

    def measure(
        self,
        name: str,
        statistic: Callable[..., float],
        *arrays: np.ndarray,
        **given: Any,
    ) -> Measure:
        """Measure with an interval as the options want it; see ``measures.measure``."""
        return measure(name, statistic, *arrays, **given, **self.opts)

    @cached_property
    def fitters(self) -> dict[str, Fitter]:
        """Of the "training" particles, and of the "held-out" ones, if there are any."""
        run, seed = self.run, self.options.seed
        found = {"training": Fitter(run, self.particles, own=True, seed=seed)}
        held = run.held_out(**self._moved)
        if held is not None:
            found["held-out"] = Fitter(run, held, own=False, seed=seed)
        return found

    @cached_property
    def held_known(self) -> Known:
        """What is known of the held-out particles; classes are numbered as those of the others."""
        if "held-out" not in self.fitters:
            return Known()
        try:
            theirs = load_known(self.options, self.fitters["held-out"].particles, self.run.plugins)
        except InputError:  # of the training particles alone
            return Known()
        names = {name: number for number, name in enumerate(self.known.label_names)}
        if theirs.labels is None or not names.keys() >= set(theirs.label_names):
            return Known(coordinate=theirs.coordinate)
        numbers = np.array([names[name] for name in theirs.label_names])
        return Known(numbers[theirs.labels], self.known.label_names, theirs.coordinate)
