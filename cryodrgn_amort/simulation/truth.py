"""What is known of the particles: a class, a coordinate, or all that a simulation knows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.interpolate import CubicSpline

from cryodrgn_amort.core import InputError, read_pickle, read_yaml, to_array
from cryodrgn_amort.runs import Run, load_run
from cryodrgn_amort.simulation.like import TRUTH, decoded_images
from cryodrgn_amort.simulation.parts import PartModel
from cryodrgn_amort.simulation.specimens import BlobModel, VolumeModel, clean_images, read_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from cryodrgn_amort.core import Registry
    from cryodrgn_amort.data import Particles
    from cryodrgn_amort.models import AmortVAE
    from cryodrgn_amort.options import EvalOptions
    from cryodrgn_amort.simulation.specimens import Model


__all__ = ["Known", "Truth", "load_known", "load_truth"]

_MOST_CLASSES = 500
_NODES = 33
_POSITIONS_BOX = 32  # the made-up object scales with its box, and so do all distances
_PARTS_BOX = 64  # of molecules: frequencies beyond it hardly change distances
_MOST_APART_DEG = 60.0  # orientations that have nothing to do with each other: 132 degrees


@dataclass(frozen=True)
class Truth:
    """What a simulation knows of each particle of a run.

    Attributes
    ----------
    labels, coordinate
        `(N,)`; None if nothing moves.
    render
        Makes the volume `(box, box, box)` of a label and a coordinate, density positive.
    model
        Makes what was simulated; None: it is not made of a few classes.
    positions
        `(N, d)`: Euclidean distances are those between the particles' true volumes, but for a
        factor. The volumes' principal components; between 33 coordinates, cubic splines of them.
        Of atoms in more than 64 pixels: distances at the frequencies of 64.
    """

    labels: np.ndarray
    coordinate: np.ndarray | None
    render: Callable[[int, float], np.ndarray]
    model: Callable[[], Model] | None
    positions: np.ndarray

    def clean(self, particles: Particles, rows: Tensor) -> Tensor:
        """Return the noise-free raw images of ``rows``, `(B, box, box)`."""
        owner = rows if particles.tilts is None else particles.tilts.owner(rows)
        at = owner.cpu().numpy()
        coordinate = np.full(len(at), 0.5) if self.coordinate is None else self.coordinate[at]
        rots = particles.rots[rows].cpu().numpy()
        none = np.zeros((len(at), 2), np.float32)
        trans = none if particles.trans is None else particles.trans[rows].cpu().numpy()
        ctf = None if particles.ctf_params is None else particles.ctf_params[rows].cpu().numpy()
        assert self.model is not None
        return clean_images(self.model(), rots, trans, self.labels[at], coordinate, ctf)

    def volumes(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Render the true volumes of some particles, one by one."""
        at = np.full(len(self.labels), 0.5) if self.coordinate is None else self.coordinate
        return (self.render(int(self.labels[i]), float(at[i])) for i in rows)


@dataclass(frozen=True)
class DecodedTruth(Truth):
    """The truth of particles made up ``--like`` a run.

    Attributes
    ----------
    run
        The decoder that showed them.
    z
        True latents, `(N, zdim)`.
    """

    run: Run
    z: np.ndarray

    def clean(self, particles: Particles, rows: Tensor) -> Tensor:
        """Return the noise-free raw images of ``rows``, `(B, box, box)`."""
        decoder, z = self._decoder, torch.from_numpy(self.z[rows.cpu().numpy()])
        return decoded_images(decoder, particles, z.to(particles.device), rows).cpu()

    @functools.cached_property
    def _decoder(self) -> AmortVAE:
        return self.run.load_decoder()[0]

    def volumes(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Decode the true volumes of some particles, one by one."""
        sign = 1 if self.run.settings.invert_data else -1
        return (sign * volume for volume in self.run.decode(self.z[rows]))


@dataclass(frozen=True)
class Known:
    """What is known of the particles of a run, each None if it is not.

    Attributes
    ----------
    labels
        Positions in ``label_names``: `(N,)`.
    coordinate
        `(N,)`.
    """

    labels: np.ndarray | None = None
    label_names: tuple[str, ...] = ()
    coordinate: np.ndarray | None = None
    truth: Truth | None = None


def load_known(
    options: EvalOptions, particles: Particles, plugins: Registry | None = None
) -> Known:
    """Read what ``--truth``, ``--labels`` and ``--coordinate`` name.

    Parameters
    ----------
    plugins
        With which the run is opened that the particles were made up like.

    Raises
    ------
    InputError
        Names the flag and file that do not fit.
    """
    truth = None if options.truth is None else load_truth(options.truth, particles, plugins)
    labels = _per_particle(options.labels, "--labels", particles)
    coordinate = _per_particle(options.coordinate, "--coordinate", particles)
    if truth is not None:
        labels = truth.labels if labels is None else labels
        coordinate = truth.coordinate if coordinate is None else coordinate
    if labels is None:
        return Known(None, (), coordinate, truth)
    found, labels = np.unique(labels, return_inverse=True)
    if options.labels is not None and len(found) > _MOST_CLASSES:
        what = _named("--labels", options.labels)
        raise InputError(
            f"{what}: {len(found)} different values are no classes; is it for --coordinate?"
        )
    return Known(labels.ravel(), tuple(map(str, found)), coordinate, truth)


def _per_particle(
    given: str | np.ndarray | None, flag: str, particles: Particles
) -> np.ndarray | None:
    """Read one value per particle: of the run's particles, all of them, or of the whole stack."""
    if given is None:
        return None
    what = _named(flag, given)
    values = to_array(read_pickle(given, flag), what) if isinstance(given, str) else given
    if particles.ind is not None and values.shape == (particles.total,):
        values = values[particles.ind]
    elif particles.left_out and values.shape == (particles.n + len(particles.left_out),):
        values = np.delete(values, particles.left_out)
    if values.shape != (particles.n,):
        raise InputError(f"{what}: has shape {values.shape}, not one value for each of the "
                         f"{particles.n} particles")  # fmt: skip
    if flag == "--coordinate" and not (values.dtype.kind in "fiu" and np.isfinite(values).all()):
        raise InputError(f"{what}: finite numbers are needed")
    if flag == "--labels" and values.dtype.kind not in "biufSU":
        raise InputError(f"{what}: numbers or words are needed, not Python objects")
    return values


def _named(flag: str, given: str | np.ndarray) -> str:
    return f"{flag} {given}" if isinstance(given, str) else flag


def load_truth(folder: str, particles: Particles, plugins: Registry | None = None) -> Truth:
    """Read the output folder of ``simulate_amort`` that a run's particles are from.

    Raises
    ------
    InputError
        If it is none, is damaged, or is of other particles.
    """
    what, path = f"--truth {folder}", Path(folder)
    if not (path / "simulation.yaml").is_file():
        raise InputError(f"{what}: not a folder of simulate_amort (it has no simulation.yaml)")
    found = read_yaml(path / "simulation.yaml", "--truth")
    try:
        settings = found["settings"]
        box, files = int(settings["D"]), list(settings["volumes"])
        apart, like = bool(settings.get("atoms")), bool(settings.get("like"))
        made = None
        if not files and not apart and not like:
            made = int(settings["classes"]), float(settings["hinge_deg"])
        blobs = BlobModel(box, *made) if made else None
    except Exception as err:  # whatever a damaged file leads to
        raise InputError(f"{what}: simulation.yaml is damaged ({type(err).__name__})") from None
    if box != particles.box:
        raise InputError(f"{what}: of {box} px, but the run's particles have {particles.box} px")
    if like:
        assert plugins is not None
        return _of_run(path, len(found["classes"]), particles, plugins)
    if apart:
        return _of_parts(path, found, particles)
    classes = len(files) if blobs is None else len(blobs.shares)
    labels = _stored_labels(path, classes, particles)
    if blobs is None:
        volumes = [_stored_volume(path, f"class{k}", box) for k in range(classes)]
        positions = _positions(lambda k, _: volumes[k], classes, labels, None)
        names = [f"class{k}" for k in range(classes)]
        model = functools.cache(lambda: VolumeModel(volumes, names))  # takes a while
        return Truth(labels, None, lambda k, _: volumes[k], model, positions)
    small = BlobModel(_POSITIONS_BOX, *(made or ()))
    return _of_model(path, blobs, small, labels, particles)


def _of_run(path: Path, classes: int, particles: Particles, plugins: Registry) -> DecodedTruth:
    """Read the truth of particles made up like a run's: distances are those at some frequencies."""
    labels = _stored_labels(path, classes, particles)
    run = load_run(path / TRUTH, plugins, flag="--truth")
    z = run.z()[0]
    _check_count(path, f"{TRUTH}/z.pkl", z, particles)
    z = z if particles.ind is None else z[particles.ind]
    positions = run.load_decoder()[0].sampled(torch.from_numpy(z))
    return DecodedTruth(labels, None, _no_render, None, positions - positions.mean(0), run, z)


def _no_render(label: int, coordinate: float) -> np.ndarray:
    raise NotImplementedError("each particle has a volume of its own")


def _of_parts(path: Path, found: Mapping[str, Any], particles: Particles) -> Truth:
    """Read the truth of a simulation of atoms from the volumes of its parts."""
    stored = functools.cache(lambda name: read_volume(str(path / "volumes" / name), "--truth")[0])
    try:
        model = PartModel.read(found, stored)
        small = model if model.D <= _PARTS_BOX else PartModel.read(found, stored, _PARTS_BOX)
    except InputError:
        raise
    except Exception as err:  # whatever a damaged file leads to
        what = f"--truth {path}: simulation.yaml is damaged"
        raise InputError(f"{what} ({type(err).__name__})") from None
    labels = _stored_labels(path, len(model.names), particles)
    return _of_model(path, model, small, labels, particles)


def _of_model(
    path: Path, model: BlobModel | PartModel, small: BlobModel | PartModel, labels: np.ndarray,
    particles: Particles,
) -> Truth:  # fmt: skip
    """Return the truth of a model that moves, or not; ``small`` renders fewer pixels."""
    name, volume = next(model.volumes())
    stored = _stored_volume(path, name, model.D)
    if not np.allclose(stored, volume, atol=1e-3 * volume.max()):
        raise InputError(
            f"--truth {path}: volumes/{name}.mrc is not what simulation.yaml describes"
        )
    coordinate = None
    if model.hinge_deg:
        coordinate = _stored_values(path, "coordinate.pkl", 1, particles)
    positions = _positions(small.volume, len(model.names), labels, coordinate)
    return Truth(labels, coordinate, model.volume, lambda: model, positions)


def _stored_labels(path: Path, classes: int, particles: Particles) -> np.ndarray:
    labels = _stored_values(path, "labels.pkl", classes - 1, particles)
    if labels.dtype.kind not in "iu":
        raise InputError(f"--truth {path}: labels.pkl does not hold integers")
    _check_orientations(path, particles)
    return labels


def _stored_values(folder: Path, name: str, most: int, particles: Particles) -> np.ndarray:
    """Read numbers from 0 to ``most``, one for each particle of the stack; pick the run's."""
    values = to_array(read_pickle(folder / name, "--truth"), f"--truth {folder / name}")
    _check_count(folder, name, values, particles)
    if values.ndim != 1 or values.dtype.kind not in "fiu":
        raise InputError(f"--truth {folder}: {name} does not hold a number per particle")
    if not ((values >= 0) & (values <= most)).all():
        raise InputError(f"--truth {folder}: {name} does not hold numbers from 0 to {most}")
    return values if particles.ind is None else values[particles.ind]


def _check_count(folder: Path, name: str, values: np.ndarray, particles: Particles) -> None:
    if values.ndim and len(values) != particles.total:
        raise InputError(
            f"--truth {folder}: {name} is of {len(values)} particles, the run's stack of "
            f"{particles.total}"
        )


def _check_orientations(folder: Path, particles: Particles) -> None:
    """Refuse the truth of another data set: its poses have nothing to do with the run's."""
    loaded = read_pickle(folder / "poses.pkl", "--truth")
    parts = loaded if isinstance(loaded, (tuple, list)) and loaded else (loaded,)
    rots = to_array(parts[0], f"--truth {folder / 'poses.pkl'}")
    images, rows = int(particles.images.src.orig_n), particles.images.ind
    if rots.ndim and len(rots) != images:
        raise InputError(
            f"--truth {folder}: poses.pkl is of {len(rots)} images, the run's stack of {images}"
        )
    if rots.shape[1:] != (3, 3) or rots.dtype.kind != "f":
        raise InputError(f"--truth {folder}: poses.pkl does not hold rotations")
    rots = rots if rows is None else rots[rows]
    traces = (rots * particles.rots.cpu().numpy()).sum((1, 2))
    apart = float(np.median(np.rad2deg(np.arccos(np.clip((traces - 1) / 2, -1, 1)))))
    if not apart < _MOST_APART_DEG:
        raise InputError(
            f"--truth {folder}: of other particles: their orientations are {apart:.0f} degrees "
            "from those of the run (median)"
        )


def _stored_volume(folder: Path, name: str, box: int) -> np.ndarray:
    volume, _ = read_volume(str(folder / "volumes" / f"{name}.mrc"), "--truth")
    if len(volume) != box:
        raise InputError(f"--truth {folder}: volumes/{name}.mrc has {len(volume)} px, not {box}")
    return volume


def _positions(
    render: Callable[[int, float], np.ndarray],
    classes: int,
    labels: np.ndarray,
    coordinate: np.ndarray | None,
) -> np.ndarray:
    """Return ``Truth.positions``."""
    nodes = np.full(1, 0.5) if coordinate is None else np.linspace(0, 1, _NODES)
    volumes = np.stack([render(k, t).ravel() for k in range(classes) for t in nodes])
    volumes = volumes - volumes.mean(0)
    values, vectors = np.linalg.eigh(volumes @ volumes.T)
    kept = values >= 1e-6 * values[-1]  # the rest is rounding
    at_nodes = (vectors[:, kept] * np.sqrt(np.abs(values[kept]))).reshape(classes, len(nodes), -1)
    if coordinate is None:
        positions: np.ndarray = at_nodes[labels, 0]
        return positions
    positions = np.empty((len(labels), at_nodes.shape[2]))
    for k in range(classes):
        positions[labels == k] = CubicSpline(nodes, at_nodes[k])(coordinate[labels == k])
    return positions
