"""Encode particles and transformed copies, decode, measure: one result object with raw arrays."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort import metrics
from cryodrgn_amort.calibration import calibrate, calibration_measures
from cryodrgn_amort.embeddings import embed
from cryodrgn_amort.errors import InputError
from cryodrgn_amort.gaps import encoding_cost, fit_results, told_classes
from cryodrgn_amort.measures import MovedLosses, moved_arrays, moved_measures, spread
from cryodrgn_amort.metrics import Measure, Neighbours, measure
from cryodrgn_amort.parallel import Team
from cryodrgn_amort.particles import Batch
from cryodrgn_amort.posteriors import Fitter
from cryodrgn_amort.products import matrix_products
from cryodrgn_amort.progress import bar
from cryodrgn_amort.results import MODES, EvalOptions, Evaluation, TransformResult
from cryodrgn_amort.runs import INPUTS
from cryodrgn_amort.truth import Known, load_known, volume_errors, volume_fve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from cryodrgn_amort.calibration import Calibration
    from cryodrgn_amort.inputs import EncoderInput
    from cryodrgn_amort.model import AmortVAE
    from cryodrgn_amort.particles import Particles
    from cryodrgn_amort.results import FitResult
    from cryodrgn_amort.runs import Run
    from cryodrgn_amort.transforms import Transform
    from cryodrgn_amort.truth import Truth

__all__ = ["EvalOptions", "assist", "evaluate"]

logger = logging.getLogger("cryodrgn_amort")

_ACTIVE_VARIANCE = 0.01
_Tables = tuple["Tensor", "Tensor | None", "Tensor | None"]
"""Rotations, translations and CTFs, as ``Particles`` has them."""
_Volumes = Callable[[], "Iterator[np.ndarray]"]
"""Gives volumes one by one, whenever it is called."""
_Pairs = tuple[np.ndarray, np.ndarray]
_VOXELS_KEPT = 250_000_000  # of the particles' own volumes: 1 GB


@matrix_products()
def evaluate(run: Run, options: EvalOptions, team: Team | None = None) -> Evaluation:
    """Measure a run. Reads only; writing is ``report.write_evaluation``.

    Parameters
    ----------
    team
        Processes that share the encoding. This is the leading one; the others call ``assist``.

    Raises
    ------
    InputError
        If the inputs are gone or do not fit, or a transform cannot be applied to this run.
    """
    evaluator, transforms = _prepare(run, options, team or Team())
    particles, known, shown = evaluator.particles, evaluator.known, evaluator.shown
    clock = evaluator.clock
    z, logvar = run.z()
    if len(z) != particles.n:
        raise InputError(
            f"RUN {run.folder}: has latents of {len(z)} particles, its inputs hold {particles.n}"
        )
    copies: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    if shown is not None:
        with clock.stage("encoding"):
            z, logvar, copies = evaluator.encode(transforms)
    mean = np.broadcast_to(z.mean(0, dtype=np.float64), z.shape)
    with clock.stage("reconstruction"):
        losses = evaluator.reconstruction({"own": z, "mean": mean})
    near = Neighbours(z, evaluator.queries)
    measures, arrays = evaluator.run_measures(z, logvar, losses, near)
    labelled = evaluator.labelled
    decoded = evaluator.volume_sample if copies else labelled
    with clock.stage("volumes"):
        volumes = evaluator.own_volumes(z[decoded])
        shown_volumes = np.stack(list(itertools.islice(volumes(), len(labelled))))
    result = Evaluation(
        run=run,
        options=options,
        applicable=shown is not None,
        z=z,
        logvar=logvar,
        apix=1.0 if particles.ctf_params is None else float(particles.ctf_params[0, 0]),
        index=np.arange(particles.n) if particles.ind is None else particles.ind,
        total=particles.total,
        left_out=run.odd,
        measures=measures,
        labelled=labelled,
        volumes=shown_volumes,
        arrays=arrays,
        labels=known.labels,
        coordinate=known.coordinate,
        label_names=known.label_names,
    )
    if np.isfinite(logvar).all():
        result.kl_per_dimension = metrics.kl_by_dimension(z, logvar).mean(0)
    if copies:
        result.results = evaluator.results(z, logvar, transforms, copies, volumes, losses, near)
    if options.fit and not run.autodecoder:  # that has no posteriors
        with clock.stage("fits"):
            result.fits = evaluator.fits()
    if options.fit and run.shows_particles and shown is not None:
        with clock.stage("calibration"):
            evaluator.calibrate(result)
    with clock.stage("embeddings"):
        result.embeddings = embed(result)
    logger.info(f"Evaluated in {clock}")
    return result


@matrix_products()
def assist(run: Run, options: EvalOptions, team: Team) -> None:
    """Encode what falls to this process, for another one's ``evaluate``."""
    evaluator, transforms = _prepare(run, options, team)
    if evaluator.shown is not None:
        evaluator.encode(transforms)


def _moved(options: EvalOptions) -> dict[str, Any]:
    """Return where the run's inputs are now."""
    return {name: getattr(options, name) for name in INPUTS}


def _known_like(known: Known, options: EvalOptions, held: Particles) -> Known:
    """Return what is known of held-out particles, classes numbered as those of the others."""
    try:
        theirs = load_known(options, held)
    except InputError:  # of the training particles alone
        return Known()
    names = {name: number for number, name in enumerate(known.label_names)}
    if theirs.labels is None or not names.keys() >= set(theirs.label_names):
        return Known(coordinate=theirs.coordinate)
    numbers = np.array([names[name] for name in theirs.label_names])
    return Known(numbers[theirs.labels], known.label_names, theirs.coordinate)


def _prepare(
    run: Run, options: EvalOptions, team: Team
) -> tuple[_Evaluator, list[tuple[str, Transform]]]:
    particles = run.particles(**_moved(options))
    if particles.n < 2:
        raise InputError(f"RUN {run.folder}: one particle alone has none to be compared with")
    names = dict.fromkeys(options.transforms)  # each once, in order
    transforms = [(name, _build(run, name, particles)) for name in names]
    known = load_known(options, particles)
    model, shown = run.load(particles)
    return _Evaluator(run, options, particles, model, shown, known, team), transforms


def _build(run: Run, name: str, particles: Particles) -> Transform:
    kind, colon, argument = name.partition(":")
    return run.plugins.transform(kind).build(argument if colon else None, particles)


class _Clock:
    """Tells how long the stages took; what is within none of them is "measures"."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
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


class _Evaluator:
    """The steps of an evaluation; holds what they share."""

    def __init__(
        self,
        run: Run,
        options: EvalOptions,
        particles: Particles,
        model: AmortVAE,
        shown: EncoderInput | None,
        known: Known,
        team: Team | None = None,
    ) -> None:
        self.team = team or Team()
        self.run, self.options, self.particles = run, options, particles
        self.model, self.shown, self.known = model, shown, known
        self.clock = _Clock()
        self.at_once = max(1, options.batch_size // particles.ntilts)  # particles
        rng = np.random.default_rng(options.seed)
        # samples depend on the number of particles and the seed alone, so that runs can be
        # compared particle by particle
        mixed = rng.permutation(particles.n)
        self.sample = np.sort(mixed[: options.sample])
        self.truth_sample = np.sort(mixed[: options.truth_volumes])
        self.queries = metrics.looked_up(particles.n, options.seed)
        self.labelled = np.arange(min(options.labelled, particles.n))
        rest = len(self.labelled) + rng.permutation(particles.n - len(self.labelled))
        # the labelled particles first: their volumes are decoded once, to show and to compare
        self.volume_sample = np.concatenate([self.labelled, rest])
        self.volume_sample = self.volume_sample[: max(options.volumes, len(self.labelled))]

    @torch.no_grad()
    def encode(
        self, transforms: list[tuple[str, Transform]]
    ) -> tuple[np.ndarray, np.ndarray, dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]]:
        """Encode all particles and all copies, from one reading of the images.

        Of several processes, only the leading one gets all of them.
        """
        assert self.shown is not None
        particles, team = self.particles, self.team
        keys = [("", "held")] + [(name, mode) for name, _ in transforms for mode in MODES]
        parts: dict[tuple[str, str], list[Tensor]] = {key: [] for key in keys}
        own = torch.arange(team.rank, particles.n, team.size)
        for index in bar(own.split(self.at_once), "encoding"):
            rows = particles.rows_of(self.shown.rows(index))
            raw = self.shown.raw(particles.rows_of(index))
            raw = particles.raw(rows) if raw is None else raw
            y, held = particles.hartley(raw), self._tables(rows, None)
            parts[("", "held")].append(self._posterior(index, rows, y, held))
            for name, transform in transforms:
                copy = self._copy(raw, y, transform)
                for mode in MODES:
                    tables = self._tables(rows, transform, held) if mode == "follow" else held
                    parts[(name, mode)].append(self._posterior(index, rows, copy, tables))
        zdim = self.run.settings.zdim
        joined = {
            key: team.collect(torch.cat(parts.pop(key)), particles.n).cpu().numpy() for key in keys
        }
        split = {key: (both[:, :zdim], both[:, zdim:]) for key, both in joined.items()}
        z, logvar = split.pop(("", "held"))
        return z, logvar, split

    def _copy(self, raw: Tensor, y: Tensor, transform: Transform) -> Tensor:
        """Transform images `(B, box, box)`, preprocessed as ``y`` `(B, D, D)`; to the latter."""
        copy = transform.hartley(y)
        return self.particles.hartley(transform.image(raw)) if copy is None else copy

    def _tables(
        self, rows: Tensor, transform: Transform | None, held: _Tables | None = None
    ) -> _Tables:
        """Return rotation, translation and CTF of ``rows``, changed by a transform if given.

        ``held`` are those that are not changed, if known: the CTF may be as it was.
        """
        p = self.particles
        rot = p.rots[rows]
        trans = None if p.trans is None else p.trans[rows]
        params = None if p.ctf_params is None else p.ctf_params[rows]
        if transform is not None:
            trans = rot.new_zeros(len(rows), 2) if trans is None else trans
            rot, trans = transform.pose(rot, trans)
        if transform is not None and params is not None:
            own, params = params, transform.ctf(params.clone())
            if held is not None and bool((params == own).all()):
                return rot, trans, held[2]
        return rot, trans, p.ctf_of(params)

    def _posterior(self, index: Tensor, rows: Tensor, hartley: Tensor, tables: _Tables) -> Tensor:
        batch = self._batch(index, rows, hartley, tables)
        return torch.cat(self.model.posterior(batch), 1).float()

    def _batch(self, index: Tensor, rows: Tensor, hartley: Tensor, tables: _Tables) -> Batch:
        """Make a batch of particles `(B,)` from images of ``rows`` and their tables."""
        rot, trans, ctf = tables
        p = self.particles
        y = p.centre(hartley, trans)
        return Batch(index, p.masked(y), p.flip(y, ctf), rot, p.half(ctf, rows))

    @torch.no_grad()
    def reconstruction(
        self, zs: dict[str, np.ndarray], transform: Transform | None = None
    ) -> dict[str, np.ndarray]:
        """Reconstruction loss in nats of the sampled particles, for several sets of latents.

        With a transform, of the transformed particles with transformed pose and CTF.
        """
        p, model = self.particles, self.model
        found: dict[str, list[np.ndarray]] = {name: [] for name in zs}
        for index in torch.from_numpy(self.sample).split(self.at_once):
            rows = p.rows_of(index)
            raw = p.raw(rows)
            y = p.hartley(raw)
            y = y if transform is None else self._copy(raw, y, transform)
            rot, trans, ctf = self._tables(rows, transform)
            y = p.masked(p.centre(y, trans))
            batch = Batch(index, y, None, rot, p.half(ctf, rows))
            for name, z in zs.items():
                latent = torch.from_numpy(z[index.numpy()]).float().to(p.device)
                # in units of the noise's standard deviation (the host's normalisation): nats
                found[name].append(model.errors(batch, latent)[1].cpu().numpy() / 2)
        return {name: np.concatenate(parts).astype(np.float64) for name, parts in found.items()}

    def fits(self) -> list[FitResult]:
        """Fit posteriors to some particles, and to some that were held out."""
        both = {"training": self.known.labels, "held-out": self.held_known.labels}
        labels = {which: found for which, found in both.items() if found is not None}
        return fit_results(self.run, self.options, self.fitters, labels)

    @cached_property
    def held_known(self) -> Known:
        """What is known of the held-out particles."""
        if "held-out" not in self.fitters:
            return Known()
        return _known_like(self.known, self.options, self.fitters["held-out"].particles)

    @cached_property
    def fitters(self) -> dict[str, Fitter]:
        """Of the "training" particles, and of the "held-out" ones, if there are any."""
        run, seed = self.run, self.options.seed
        found = {"training": Fitter(run, self.particles, own=True, seed=seed)}
        held = run.held_out(**_moved(self.options))
        if held is not None:
            found["held-out"] = Fitter(run, held, own=False, seed=seed)
        return found

    def nuisance_leaks(self, near: Neighbours) -> list[Measure]:
        """Measure what neighbours in latent space tell of pose, defocus and shift."""
        p, seed = self.particles, self.options.seed
        opts: dict[str, Any] = {"rounds": self.options.bootstrap, "seed": seed}
        first = p.rows_of(torch.arange(p.n))[:: p.ntilts]  # of a tilt series, the first image
        rots, trans, ctf = (
            None if t is None else t[first].cpu().numpy() for t in (p.rots, p.trans, p.ctf_params)
        )
        assert rots is not None
        mixed = np.random.default_rng(seed).permutation(p.n)
        found = []
        for name, values in metrics.nuisances(rots, trans, ctf).items():
            told, other = (metrics.knn_coordinate(near.own, v) for v in (values, values[mixed]))
            truth = values[near.rows]
            null = metrics.coordinate_r2(other, values[mixed][near.rows])
            found.append(
                measure(f"nuisance_leak_{name}", metrics.coordinate_r2, told, truth,
                        null=null, ideal=0.0, **opts)
            )  # fmt: skip
        return found

    @torch.no_grad()
    def noise_swap(self, z: np.ndarray) -> list[Measure]:
        """Encode the signal of each sampled particle in the noise of another.

        The noise is that which the encoder was shown: centred and phase-flipped with its own image.
        """
        truth, p, rows = self.known.truth, self.particles, self.sample
        if truth is None or self.shown is None or not self.run.shows_particles:
            return []
        opts: dict[str, Any] = {"rounds": self.options.bootstrap, "seed": self.options.seed}
        noisy, parts = np.roll(rows, 1), []
        both = torch.from_numpy(np.stack([rows, noisy], 1))
        for index, other in (pair.unbind(1) for pair in both.split(self.at_once)):
            own, theirs = p.rows_of(index), p.rows_of(other)
            clean = p.hartley(truth.clean(p, own))
            signal = self._batch(index, own, clean, self._tables(own, None))
            noise = p.hartley(p.raw(theirs)) - p.hartley(truth.clean(p, theirs))
            shown = self._batch(other, theirs, noise, self._tables(theirs, None)).image
            assert signal.image is not None
            assert shown is not None
            signal.image = signal.image + shown
            parts.append(torch.cat(self.model.posterior(signal), 1))
        swapped = torch.cat(parts)[:, : z.shape[1]].cpu().numpy()
        return [
            measure(f"noise_swap_{name}", metrics.latent_correlation, z[at], swapped,
                    null=0.0, ideal=ideal, **opts)
            for name, at, ideal in (("signal", rows, 1.0), ("noise", noisy, 0.0))
        ]  # fmt: skip

    def calibrate(self, result: Evaluation) -> None:
        """Measure how far the encoder's intervals, and the decoder's images, can be believed."""
        if self.particles.whole or self.particles.tilts:  # it makes up no corners, nor tilts
            return
        seed = self.run.settings.seed + 1  # not what an encoder may have been trained on
        others = self.fitters.get("held-out", self.fitters["training"])
        found = calibrate(self.model, self.particles, result.z, result.logvar, others, seed)
        opts: dict[str, Any] = {"rounds": self.options.bootstrap, "seed": self.options.seed}
        result.calibration = found.ranks
        measures = calibration_measures(found, opts) + self.held_out_measures(found, result.z)
        measures.append(encoding_cost(others, self.options.fit))
        result.measures |= {m.name: m for m in measures}

    def held_out_measures(self, found: Calibration, z: np.ndarray) -> list[Measure]:
        """Measure what neighbours among the training particles ``z`` tell of held-out ones."""
        labels, coordinate = self.held_known.labels, self.held_known.coordinate
        opts: dict[str, Any] = {"rounds": self.options.bootstrap, "seed": self.options.seed}
        measures, sample = [], found.sample
        if labels is None and coordinate is None:
            return []
        near = Neighbours(z, np.arange(0)).of(found.means.astype(z.dtype))
        if labels is not None and self.known.labels is not None:
            measures.append(
                told_classes("class_knn_held_out", near, self.known.labels, labels[sample], opts)
            )
        if coordinate is not None and self.known.coordinate is not None:
            told = metrics.knn_coordinate(near, self.known.coordinate)
            measures.append(
                measure("coordinate_r2_held_out", metrics.coordinate_r2, told, coordinate[sample],
                        null=0.0, ideal=1.0, **opts)
            )  # fmt: skip
        return measures

    def own_volumes(self, z: np.ndarray) -> _Volumes:
        """Decode volumes `(box, box, box)` once if they fit into memory, else whenever needed."""
        if len(z) * self.particles.D**3 > _VOXELS_KEPT:
            return lambda: self._decoded(z)
        kept = list(self._decoded(z))
        return lambda: iter(kept)

    def _decoded(self, z: np.ndarray) -> Iterator[np.ndarray]:
        """Decode volumes `(box, box, box)` as ``cryodrgn eval_vol`` does, one by one."""
        latents = torch.from_numpy(z).float().to(self.particles.device)
        volumes = self.model.decode_volumes(latents, self.particles.norm)
        return (volume.numpy().astype(np.float32) for volume in bar(volumes, "volumes", len(z)))

    def run_measures(
        self, z: np.ndarray, logvar: np.ndarray, losses: dict[str, np.ndarray], near: Neighbours
    ) -> tuple[dict[str, Measure], dict[str, np.ndarray]]:
        """Measure latent use, the fit to the images and, where it is known, the heterogeneity.

        Returns measures by name, and arrays of values per particle `(N,)`.
        """
        opts: dict[str, Any] = {"rounds": self.options.bootstrap, "seed": self.options.seed}
        active = int((z.var(0, dtype=np.float64) > _ACTIVE_VARIANCE).sum())
        found = [Measure("active_units", active, None, None, 0.0, None, len(z))]
        if np.isfinite(logvar).all():  # train_dec has no posteriors
            kl = metrics.kl_by_dimension(z, logvar).sum(1)
            aggregate = metrics.aggregate_kl(z, logvar, self.options.seed)
            found += [
                measure("kl", np.mean, kl, null=0.0, ideal=None, **opts),
                measure("aggregate_kl", np.mean, aggregate, null=None, ideal=0.0, **opts),
            ]
        null = float(losses["mean"].mean())
        found.append(
            measure("reconstruction", np.mean, losses["own"], null=null, ideal=None, **opts)
        )
        arrays = {"reconstruction": spread(losses["own"], self.sample, self.particles.n)}
        labels, coordinate, truth = self.known.labels, self.known.coordinate, self.known.truth
        if labels is not None:
            shares = np.bincount(labels) / len(labels)
            right = metrics.class_knn(near.own, labels, near.rows)
            null = float((shares**2).sum())
            found.append(measure("class_knn", np.mean, right, null=null, ideal=1.0, **opts))
        if coordinate is not None:
            predicted = metrics.knn_coordinate(near.own, coordinate)
            found.append(
                measure("coordinate_r2", metrics.coordinate_r2, predicted, coordinate[near.rows],
                        null=0.0, ideal=1.0, **opts)
            )  # fmt: skip
        if truth is not None:
            more, more_arrays = self._truth_measures(z, truth)
            found += more + self.noise_swap(z)
            arrays |= more_arrays
        found += self.nuisance_leaks(near)
        return {m.name: m for m in found}, arrays

    def _truth_measures(
        self, z: np.ndarray, truth: Truth
    ) -> tuple[list[Measure], dict[str, np.ndarray]]:
        """Compare neighbours and decoded volumes with the true ones."""
        opts: dict[str, Any] = {"rounds": self.options.bootstrap, "seed": self.options.seed}
        rows, box = self.truth_sample, self.particles.box
        overlap, null = metrics.neighbourhood(z, truth.positions, self.sample)
        # without the host's inversion, density is negative
        sign = 1 if self.run.settings.invert_data else -1
        decoded = (sign * volume for volume in self._decoded(z[rows]))
        volumes = volume_errors(truth, rows, decoded)
        one = float(volumes.null_areas.mean())
        found = [
            measure("neighbourhood", np.mean, overlap, null=null, ideal=1.0, **opts),
            measure("per_image_fsc", np.mean, volumes.areas, null=one, ideal=0.5 - 1 / box, **opts),
        ]
        positions = truth.positions[rows]
        if (positions != positions[0]).any():  # there is something to explain
            found.append(
                measure("volume_fve", volume_fve, volumes.errors, volumes.spreads,
                        null=0.0, ideal=1.0, **opts)
            )  # fmt: skip
        arrays = {
            "neighbourhood": spread(overlap, self.sample, self.particles.n),
            "per_image_fsc": spread(volumes.areas, rows, self.particles.n),
        }
        return found, arrays

    def results(
        self,
        z: np.ndarray,
        logvar: np.ndarray,
        transforms: list[tuple[str, Transform]],
        copies: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]],
        volumes: _Volumes,
        base: dict[str, np.ndarray],
        near: Neighbours,
    ) -> list[TransformResult]:
        """Measure every transform in every mode.

        ``volumes`` are those of ``volume_sample``; ``base`` the losses of the particles themselves.
        """
        found = []
        opts: dict[str, Any] = {"rounds": self.options.bootstrap, "seed": self.options.seed}
        with self.clock.stage("volumes"):
            pairs = _pairs(volumes())
        for number, (name, transform) in enumerate(transforms):
            shown = len(self.labelled) if number < self.options.maps else 0
            modes = {mode: copies[(name, mode)][0] for mode in MODES}
            with self.clock.stage("reconstruction"):
                losses = self.reconstruction({"control": z, **modes}, transform)
            for mode in MODES:
                moved, moved_logvar = copies[(name, mode)]
                arrays = moved_arrays(z, logvar, moved, self.queries, self.options.seed)
                known = MovedLosses(base["own"], base["mean"], losses[mode], losses["control"])
                measures = moved_measures(z, logvar, moved, arrays, near, self.known.labels, known,
                                          **opts)  # fmt: skip
                with self.clock.stage("volumes"):
                    copies_volumes = self._decoded(moved[self.volume_sample])
                    more, first = self._compare_volumes(volumes(), copies_volumes, pairs, shown)
                measures |= more
                found.append(
                    TransformResult(
                        name,
                        transform.title,
                        mode,
                        moved,
                        moved_logvar,
                        measures,
                        arrays,
                        first,
                        transform.undone_by_centring and mode == "follow",
                    )
                )
        return found

    def _compare_volumes(
        self, own: Iterator[np.ndarray], copies: Iterator[np.ndarray], pairs: _Pairs, shown: int
    ) -> tuple[dict[str, Measure], np.ndarray]:
        """Compare volumes with those of the copies; also returns the first ``shown`` of these."""
        changed, areas = [], []
        first: list[np.ndarray] = []
        for volume, copy in zip(own, copies, strict=True):
            changed.append(np.linalg.norm(volume - copy))
            areas.append(1 - metrics.fsc(volume, copy)[1:].mean())
            if len(first) < shown:
                first.append(copy)
        opts: dict[str, Any] = {"rounds": self.options.bootstrap, "seed": self.options.seed}
        distances, losses = pairs
        found = [
            measure("volume_change", metrics.volume_change, np.array(changed), distances,
                    null=1.0, ideal=0.0, **opts),
            measure("volume_fsc_loss", np.mean, np.array(areas),
                    null=float(losses.mean()), ideal=0.0, **opts),
        ]  # fmt: skip
        box = self.particles.box
        return {m.name: m for m in found}, np.array(first, np.float32).reshape(-1, box, box, box)


def _pairs(volumes: Iterator[np.ndarray]) -> _Pairs:
    """Return distance, and 1 minus mean FSC, of each volume from the one before it, `(M,)` each."""
    found = [
        (np.linalg.norm(own - before), 1 - metrics.fsc(own, before)[1:].mean())
        for own, before in metrics.with_before(volumes)
    ]
    distances, losses = np.roll(np.array(found), 1, axis=0).T
    return distances, losses
