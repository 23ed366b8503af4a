"""What makes the images of a simulation, of whatever is imaged: a model, or a run's decoder."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort.core import InputError, available_memory
from cryodrgn_amort.options import MOST_CLASSES
from cryodrgn_amort.simulation.atoms import load_atoms
from cryodrgn_amort.simulation.draw import draw, most_shift_px, table_apix
from cryodrgn_amort.simulation.noise_spectrum import noise_power, read_spectrum, spectrum_power
from cryodrgn_amort.simulation.parts import PartModel
from cryodrgn_amort.simulation.specimens import BlobModel, VolumeModel, clean_images, read_volume

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from cryodrgn_amort.options import SimulateOptions
    from cryodrgn_amort.simulation.draw import Drawn
    from cryodrgn_amort.simulation.noise_spectrum import Spectrum
    from cryodrgn_amort.simulation.specimens import Model


__all__ = ["Imager", "ModelImager", "Streams", "split"]
logger = logging.getLogger("cryodrgn_amort")

Streams = dict[str, np.random.Generator]
"""Random numbers, for each use their own."""
_BLOCK = 64
"""Particles computed together, whatever the chunk: rounding can depend on it."""
_SIGNAL_SAMPLE = 1000


def split(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield blocks of rows that are computed together."""
    return (rows[i : i + _BLOCK] for i in range(0, len(rows), _BLOCK))


class Imager(ABC):
    """Makes images in blocks, noise-free or not, and knows their truth.

    Attributes
    ----------
    truth
        What was drawn for each particle.
    D, apix
        Pixels of the box, and their size in angstroms.
    moves
        Whether the coordinate means anything.
    variance, sigma
        Variance of noise-free images over all pixels, standard deviation of the noise.
    """

    truth: Drawn
    D: int
    apix: float
    moves: bool
    variance: float
    sigma: float

    @abstractmethod
    def clean(self, rows: np.ndarray) -> Tensor:
        """Return noise-free raw images `(B, D, D)`."""

    @abstractmethod
    def noise(self, rows: np.ndarray, stream: np.random.Generator) -> Tensor:
        """Return the noise of images, `(B, D, D)`."""

    @abstractmethod
    def volumes(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the true volumes that are kept, named, one at a time in memory."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what simulation.yaml holds beside settings and versions."""

    @abstractmethod
    def settled(self, options: SimulateOptions) -> dict[str, Any]:
        """Return the settings that follow from what is imaged, by name."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write what else is known of the truth."""

    def signal_variance(self, stream: np.random.Generator) -> float:
        """Measure the variance of noise-free images, not tilted, over all pixels, on a sample."""
        N = len(self.truth.labels)
        rows = np.sort(stream.permutation(N)[:_SIGNAL_SAMPLE]) * self.truth.tilts
        blocks = (self.clean(part).double() for part in split(rows))
        sums = np.array([(block.sum().item(), block.square().sum().item()) for block in blocks])
        mean, square = sums.sum(0) / (len(rows) * self.D**2)
        return float(square - mean**2)


class ModelImager(Imager):
    """Images a made-up object, volumes or atoms.

    Raises
    ------
    InputError
        Names the flag that does not fit.
    """

    def __init__(self, options: SimulateOptions, streams: Streams) -> None:
        self.model, apix = _load_model(options)
        self.D, self.moves = self.model.D, bool(self.model.hinge_deg)
        self._spectrum, self._power = _noise(options, self.D)
        self.truth = draw(options, self.model, apix, streams)
        if options.ctf and self.truth.ctf is not None:
            own = self.truth.ctf[0, 0]
            if options.volumes and abs(own / apix - 1) > 0.01:
                logger.warning(f"--ctf has {own:.4g} angstroms per pixel, not {apix:.4g}")
            apix = round(float(own), 6)
        self.apix = apix
        self.variance = self.signal_variance(streams["signal"])
        snr = 0.3 if options.snr is None else options.snr
        self.sigma = math.sqrt(self.variance * self.truth.tilts / snr)

    def clean(self, rows: np.ndarray) -> Tensor:
        """Return noise-free raw images `(B, D, D)`."""
        t = self.truth
        ctf = None if t.ctf is None else t.ctf[rows]
        of = rows // t.tilts
        return clean_images(
            self.model, t.rots[rows], t.trans_px[rows], t.labels[of], t.coordinate[of], ctf
        )

    def noise(self, rows: np.ndarray, stream: np.random.Generator) -> Tensor:
        """Return noise `(B, D, D)`."""
        if not self.sigma:
            return torch.zeros(())
        size = (len(rows), self.D, self.D)
        white = torch.from_numpy(stream.standard_normal(size, np.float32))
        if self._power is None:
            return self.sigma * white
        fourier = torch.fft.rfft2(white) * self._power.sqrt()
        coloured: Tensor = torch.fft.irfft2(fourier, s=(self.D, self.D))
        return self.sigma * coloured

    def volumes(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield those of the classes, their mean over the particles, and rigid parts."""
        yield from self.model.volumes()
        yield "mean", self.model.mean(self.truth.labels, self.truth.coordinate)
        for number, part in enumerate(self._parts):
            yield f"part{number}", part.volume

    @property
    def _parts(self) -> list[Any]:
        return self.model.parts if isinstance(self.model, PartModel) else []

    def settled(self, options: SimulateOptions) -> dict[str, Any]:
        """Return the settings that follow from the object."""
        found: dict[str, Any] = {"snr": 0.3 if options.snr is None else options.snr}
        if options.poses is None:
            found["shift_px"] = most_shift_px(options, self.D)
        if options.noise_spectrum is None:
            found["noise"] = options.noise or "white"
        if isinstance(self.model, BlobModel):
            found.update(classes=len(self.model.shares), hinge_deg=self.model.hinge_deg)
        return found

    def write(self, folder: Path) -> None:
        """Write nothing: tables and volumes tell all."""

    def facts(self) -> dict[str, Any]:
        """Return classes, the hinge and the parts, the noise's spectrum."""
        classes = [
            {"holds": name, "share": float(np.mean(self.truth.labels == k))}
            for k, name in enumerate(self.model.names)
        ]
        more = {"object": self.model.facts()} if isinstance(self.model, PartModel) else {}
        spectrum = {} if self._spectrum is None else {"noise_spectrum": self._spectrum}
        return {"classes": classes, **more, **spectrum}


def _load_model(options: SimulateOptions) -> tuple[Model, float]:
    """Return the object and its pixel size in angstroms."""
    voxels = (options.D or 0) ** 3 * max(1, len(options.volumes))
    if 32 * voxels > available_memory():
        raise InputError(f"-D {options.D}: volumes of this box do not fit memory")
    if options.atoms:
        D = options.D or 64
        model = load_atoms(options, D, options.apix or table_apix(options, D))
        return model, model.apix
    if not options.volumes:
        D = options.D or 32
        classes = options.classes or MOST_CLASSES
        hinge = 45.0 if options.hinge_deg is None else options.hinge_deg
        return BlobModel(D, classes, hinge), options.apix or 192 / D
    read = [read_volume(path, box=options.D) for path in options.volumes]
    (first, apix), largest = read[0], max(len(volume) for volume, _ in read)
    for path, (volume, own) in zip(options.volumes, read, strict=True):
        if len(volume) != len(first):
            raise InputError(
                f"--volumes {path}: its box of {len(volume)} px is not that of --volumes "
                f"{options.volumes[0]} ({len(first)}); -D {largest} pads smaller ones"
            )
        if not options.apix and not options.ctf and (not own > 0 or abs(own / apix - 1) > 1e-3):
            raise InputError(
                f"--volumes {path}: its pixel size of {own} does not fit; give --apix for all"
            )
    return VolumeModel([volume for volume, _ in read], options.volumes), options.apix or apix


def _noise(options: SimulateOptions, D: int) -> tuple[Spectrum | None, Tensor | None]:
    """Return the spectrum that ``--noise-spectrum`` names, and the noise's power."""
    if options.noise_spectrum is None:
        return None, noise_power(options.noise or "white", D)
    spectrum = read_spectrum(options.noise_spectrum, D)
    return spectrum, spectrum_power(spectrum, D)
