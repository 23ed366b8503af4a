"""Encode particles and transformed copies, decode, measure: one result object with raw arrays."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from cryodrgn_amort import metrics
from cryodrgn_amort.checkpoints import read_pickle, to_array
from cryodrgn_amort.errors import InputError
from cryodrgn_amort.metrics import Measure, measure
from cryodrgn_amort.objective import kl_divergence, reconstruction_nats
from cryodrgn_amort.particles import Batch
from cryodrgn_amort.results import MODES, Embedding, EvalOptions, Evaluation, TransformResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from cryodrgn_amort.inputs import EncoderInput
    from cryodrgn_amort.model import AmortVAE
    from cryodrgn_amort.particles import Particles
    from cryodrgn_amort.runs import Run
    from cryodrgn_amort.transforms import Transform

__all__ = ["EvalOptions", "evaluate"]

_UMAP_MOST = 20_000
_MOST_CLASSES = 500
_ACTIVE_VARIANCE = 0.01


def evaluate(run: Run, options: EvalOptions) -> Evaluation:
    """Measure a run. Reads only; writing is ``report.write_evaluation``.

    Raises
    ------
    InputError
        If the inputs are gone or do not fit, or a transform cannot be applied to this run.
    """
    moved = {n: getattr(options, n) for n in ("particles", "poses", "ctf", "ind", "datadir")}
    particles = run.particles(**moved)
    if particles.n < 2:
        raise InputError(f"RUN {run.folder}: one particle alone has none to be compared with")
    names = dict.fromkeys(options.transforms)  # each once, in order
    transforms = [(name, _build(run, name, particles)) for name in names]
    labels = _per_particle(options.labels, "--labels", particles)
    coordinate = _per_particle(options.coordinate, "--coordinate", particles)
    label_names: tuple[str, ...] = ()
    if labels is not None:
        found, labels = np.unique(labels, return_inverse=True)
        labels, label_names = labels.ravel(), tuple(map(str, found))
        if len(found) > _MOST_CLASSES:
            raise InputError(
                f"--labels {options.labels}: {len(found)} different values are no classes; is it "
                "for --coordinate?"
            )
    model, shown = run.load(particles)
    evaluator = _Evaluator(run, options, particles, model, shown, labels)
    z, logvar = run.z()
    if len(z) != particles.n:
        raise InputError(
            f"RUN {run.folder}: has latents of {len(z)} particles, its inputs hold {particles.n}"
        )
    copies: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    if shown is not None:
        z, logvar, copies = evaluator.encode(transforms)
    measures = evaluator.run_measures(z, logvar, coordinate)
    labelled = evaluator.labelled
    decoded = evaluator.volume_sample if copies else labelled
    volumes = evaluator.decode(z[decoded])
    result = Evaluation(
        run=run,
        options=options,
        applicable=shown is not None,
        z=z,
        logvar=logvar,
        apix=1.0 if particles.ctf_params is None else float(particles.ctf_params[0, 0]),
        measures=measures,
        labelled=labelled,
        volumes=volumes[: len(labelled)],
        labels=labels,
        coordinate=coordinate,
        label_names=label_names,
    )
    if copies:
        result.results = evaluator.results(z, logvar, transforms, copies, volumes)
    result.embeddings = _embeddings(result)
    return result


def _build(run: Run, name: str, particles: Particles) -> Transform:
    kind, colon, argument = name.partition(":")
    return run.plugins.transform(kind).build(argument if colon else None, particles)


def _per_particle(path: str | None, flag: str, particles: Particles) -> np.ndarray | None:
    """Read one value per particle: of the run's particles, or of the whole stack."""
    if path is None:
        return None
    values = to_array(read_pickle(path, flag), f"{flag} {path}")
    if particles.ind is not None and values.shape == (particles.images.src.orig_n,):
        values = values[particles.ind]
    if values.shape != (particles.n,):
        raise InputError(f"{flag} {path}: has shape {values.shape}, not one value for each of the "
                         f"{particles.n} particles")  # fmt: skip
    if flag == "--coordinate" and not (values.dtype.kind in "fiu" and np.isfinite(values).all()):
        raise InputError(f"{flag} {path}: finite numbers are needed")
    if flag == "--labels" and values.dtype.kind not in "biufSU":
        raise InputError(f"{flag} {path}: numbers or words are needed, not Python objects")
    return values


def _bar(items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
    return iter(tqdm(items, what, total, leave=False, disable=not sys.stderr.isatty()))


class _Evaluator:
    """The steps of an evaluation; holds what they share."""

    def __init__(
        self,
        run: Run,
        options: EvalOptions,
        particles: Particles,
        model: AmortVAE,
        shown: EncoderInput | None,
        labels: np.ndarray | None,
    ) -> None:
        self.run, self.options, self.particles = run, options, particles
        self.model, self.shown, self.labels = model, shown, labels
        rng = np.random.default_rng(options.seed)
        self.sample = np.sort(rng.permutation(particles.n)[: options.sample])
        self.labelled = np.arange(min(options.labelled, particles.n))
        rest = len(self.labelled) + rng.permutation(particles.n - len(self.labelled))
        # the labelled particles first: their volumes are decoded once, to show and to compare
        self.volume_sample = np.concatenate([self.labelled, rest])
        self.volume_sample = self.volume_sample[: max(options.volumes, len(self.labelled))]

    @torch.no_grad()
    def encode(
        self, transforms: list[tuple[str, Transform]]
    ) -> tuple[np.ndarray, np.ndarray, dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]]:
        """Encode all particles and all copies, from one reading of the images."""
        assert self.shown is not None
        particles = self.particles
        keys = [("", "held")] + [(name, mode) for name, _ in transforms for mode in MODES]
        parts: dict[tuple[str, str], list[Tensor]] = {key: [] for key in keys}
        batches = torch.arange(particles.n).split(self.options.batch_size)
        for index in _bar(batches, "encoding"):
            rows = self.shown.rows(index)
            raw = self.shown.raw(index)
            raw = particles.raw(rows) if raw is None else raw
            parts[("", "held")].append(self._posterior(index, rows, particles.hartley(raw), None))
            for name, transform in transforms:
                copy = particles.hartley(transform.image(raw))
                for mode in MODES:
                    changed = transform if mode == "follow" else None
                    parts[(name, mode)].append(self._posterior(index, rows, copy, changed))
        zdim = self.run.settings.zdim
        joined = {key: torch.cat(found).cpu().numpy() for key, found in parts.items()}
        split = {key: (both[:, :zdim], both[:, zdim:]) for key, both in joined.items()}
        z, logvar = split.pop(("", "held"))
        return z, logvar, split

    def _tables(
        self, rows: Tensor, transform: Transform | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return rotation, translation and CTF of ``rows``, changed by a transform if given."""
        p = self.particles
        rot = p.rots[rows]
        trans = None if p.trans is None else p.trans[rows]
        params = None if p.ctf_params is None else p.ctf_params[rows]
        if transform is not None:
            trans = rot.new_zeros(len(rows), 2) if trans is None else trans
            rot, trans = transform.pose(rot, trans)
            params = None if params is None else transform.ctf(params)
        return rot, trans, p.ctf_of(params)

    def _posterior(
        self, index: Tensor, rows: Tensor, hartley: Tensor, transform: Transform | None
    ) -> Tensor:
        rot, trans, ctf = self._tables(rows, transform)
        y = self.particles.centre(hartley, trans)
        batch = Batch(index, y, self.particles.flip(y, ctf), rot, ctf)
        return torch.cat(self.model.posterior(batch), 1).float()

    @torch.no_grad()
    def reconstruction(
        self, zs: dict[str, np.ndarray], transform: Transform | None = None
    ) -> dict[str, np.ndarray]:
        """Reconstruction loss in nats of the sampled particles, for several sets of latents.

        With a transform, of the transformed particles with transformed pose and CTF.
        """
        p, model = self.particles, self.model
        found: dict[str, list[np.ndarray]] = {name: [] for name in zs}
        for index in torch.from_numpy(self.sample).split(self.options.batch_size):
            raw = p.raw(index)
            raw = raw if transform is None else transform.image(raw)
            rot, trans, ctf = self._tables(index, transform)
            y = p.centre(p.hartley(raw), trans).view(len(index), -1)[:, p.mask]
            for name, z in zs.items():
                latent = torch.from_numpy(z[index.numpy()]).float().to(p.device)
                decoded = model.decode_images(p.coords, p.mask, rot, ctf, latent)
                found[name].append(reconstruction_nats(y, decoded).cpu().numpy())
        return {name: np.concatenate(parts).astype(np.float64) for name, parts in found.items()}

    def decode(self, z: np.ndarray) -> np.ndarray:
        """Decode volumes `(M, box, box, box)` as ``cryodrgn eval_vol`` does."""
        p = self.particles
        latents = torch.from_numpy(z).float().to(p.device)
        volumes = self.model.decode_volumes(latents, p.norm)
        return np.stack([v.numpy() for v in _bar(volumes, "volumes", len(z))]).astype(np.float32)

    def run_measures(
        self, z: np.ndarray, logvar: np.ndarray, coordinate: np.ndarray | None
    ) -> dict[str, Measure]:
        """Measure latent use and, where there are labels, the heterogeneity."""
        opts = {"rounds": self.options.bootstrap, "seed": self.options.seed}
        active = int((z.var(0) > _ACTIVE_VARIANCE).sum())
        kl = kl_divergence(torch.from_numpy(z), torch.from_numpy(logvar)).numpy()
        found = [
            Measure("active_units", active, None, None, 0.0, None, len(z)),
            measure("kl", np.mean, kl, null=0.0, ideal=None, **opts),  # type: ignore[arg-type]
        ]
        if self.labels is not None:
            shares = np.bincount(self.labels) / len(self.labels)
            right = metrics.class_knn(z, self.labels)
            null = float((shares**2).sum())
            found.append(measure("class_knn", np.mean, right, null=null, ideal=1.0, **opts))  # type: ignore[arg-type]
        if coordinate is not None:
            predicted = metrics.knn_coordinate(z, coordinate)
            found.append(
                measure("coordinate_r2", metrics.coordinate_r2, predicted, coordinate,
                        null=0.0, ideal=1.0, **opts)  # type: ignore[arg-type]
            )  # fmt: skip
        return {m.name: m for m in found}

    def results(
        self,
        z: np.ndarray,
        logvar: np.ndarray,
        transforms: list[tuple[str, Transform]],
        copies: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]],
        volumes: np.ndarray,
    ) -> list[TransformResult]:
        """Measure every transform in every mode; ``volumes`` are those of ``volume_sample``."""
        mean = np.broadcast_to(z.mean(0), z.shape)
        base = self.reconstruction({"own": z, "mean": mean})
        found = []
        for name, transform in transforms:
            modes = {mode: copies[(name, mode)][0] for mode in MODES}
            losses = self.reconstruction({"control": z, **modes}, transform)
            for mode in MODES:
                moved, moved_logvar = copies[(name, mode)]
                arrays = self._arrays(z, logvar, moved)
                measures = self._measures(z, logvar, moved, arrays, base, losses, mode)
                moved_volumes = self.decode(moved[self.volume_sample])
                measures |= self._volume_measures(volumes, moved_volumes)
                found.append(
                    TransformResult(
                        name,
                        transform.title,
                        mode,
                        moved,
                        moved_logvar,
                        measures,
                        arrays,
                        moved_volumes[: len(self.labelled)],
                    )
                )
        return found

    def _arrays(
        self, z: np.ndarray, logvar: np.ndarray, moved: np.ndarray
    ) -> dict[str, np.ndarray]:
        scale = metrics.pair_scale(z, self.options.seed)
        return {
            "retrieval_rank": metrics.retrieval_rank(z, moved),
            "displacement": metrics.displacement(z, moved, scale),
            "displacement_sigma": metrics.displacement_sigma(z, moved, logvar),
        }

    def _measures(
        self,
        z: np.ndarray,
        logvar: np.ndarray,
        moved: np.ndarray,
        arrays: dict[str, np.ndarray],
        base: dict[str, np.ndarray],
        losses: dict[str, np.ndarray],
        mode: str,
    ) -> dict[str, Measure]:
        n, seed = len(z), self.options.seed
        other = np.random.default_rng(seed).permutation(n)
        opts: dict[str, Any] = {"rounds": self.options.bootstrap, "seed": seed}
        rank = arrays["retrieval_rank"]
        shuffled = metrics.displacement(z, moved[other], metrics.pair_scale(z, seed))
        found = [
            measure("retrieval_rank", np.mean, rank, null=0.5, ideal=0.0, **opts),
            measure("top1", np.mean, (rank == 0).astype(float), null=1 / n, ideal=1.0, **opts),
            measure("displacement", np.median, arrays["displacement"],
                    null=float(np.median(shuffled)), ideal=0.0, **opts),
            measure("displacement_sigma", np.median, arrays["displacement_sigma"],
                    null=metrics.random_pair_sigma(z, logvar, seed), ideal=0.0, **opts),
            measure("latent_correlation", metrics.latent_correlation, z, moved,
                    null=0.0, ideal=1.0, **opts),
        ]  # fmt: skip
        if self.labels is not None:
            before = metrics.knn_labels(z, self.labels)
            after = metrics.knn_labels(z, self.labels, moved)
            null = metrics.label_agreement(before, after[other])
            found.append(
                measure("label_agreement", metrics.label_agreement, before, after,
                        null=null, ideal=1.0, **opts)
            )  # fmt: skip
        found += [
            measure("amortization_loss_fraction", metrics.loss_fraction, losses[mode], base["own"],
                    base["mean"], null=1.0, ideal=0.0, **opts),
            measure("control", np.mean, losses["control"] - base["own"],
                    null=None, ideal=0.0, **opts),
        ]  # fmt: skip
        return {m.name: m for m in found}

    def _volume_measures(self, volumes: np.ndarray, copies: np.ndarray) -> dict[str, Measure]:
        others = np.roll(volumes, 1, axis=0)
        changed, pairs, area, area_pairs = [], [], [], []
        for own, copy, other in zip(volumes, copies, others, strict=True):
            changed.append(np.linalg.norm(own - copy))
            pairs.append(np.linalg.norm(own - other))
            area.append(1 - metrics.fsc(own, copy)[1:].mean())
            area_pairs.append(1 - metrics.fsc(own, other)[1:].mean())
        opts: dict[str, Any] = {"rounds": self.options.bootstrap, "seed": self.options.seed}
        found = [
            measure("volume_change", metrics.volume_change, np.array(changed), np.array(pairs),
                    null=1.0, ideal=0.0, **opts),
            measure("volume_fsc_loss", np.mean, np.array(area),
                    null=float(np.mean(area_pairs)), ideal=0.0, **opts),
        ]  # fmt: skip
        return {m.name: m for m in found}


def _embeddings(result: Evaluation) -> dict[str, Embedding]:
    """Put latents into the plane: principal components, and UMAP where there are enough points."""
    z, labelled = result.z, result.labelled
    moved = {r.key: r.z[labelled] for r in result.results}
    rng = np.random.default_rng(result.options.seed)
    rest = rng.permutation(np.arange(len(labelled), len(z)))[: _UMAP_MOST - len(labelled)]
    shown = np.concatenate([labelled, np.sort(rest)])
    found = {}
    centre = z.mean(0)
    axes = np.linalg.svd(z[shown] - centre, full_matrices=False)[2][:2]
    if z.shape[1] == 2:  # as it is
        found["z"] = Embedding(z[shown], z[labelled], moved, ("z1", "z2"), shown)
    elif len(axes) == 2:
        share = ((z - centre) @ axes.T).var(0) / max(z.var(0).sum(), 1e-30)
        found["PCA"] = Embedding(
            (z[shown] - centre) @ axes.T,
            (z[labelled] - centre) @ axes.T,
            {key: (copy - centre) @ axes.T for key, copy in moved.items()},
            (f"PC1 ({share[0]:.0%} of variance)", f"PC2 ({share[1]:.0%})"),
            shown,
        )
    enough = len(shown) > 20 and z.shape[1] > 2 and z.std() > 0
    if result.options.umap and enough:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numba's and umap's own
            from umap import UMAP

            reducer = UMAP(random_state=result.options.seed)
            points = reducer.fit_transform(z[shown])
            copies = {key: reducer.transform(copy) for key, copy in moved.items()}
        found["UMAP"] = Embedding(
            points, points[: len(labelled)], copies, ("UMAP1", "UMAP2"), shown
        )
    return found
