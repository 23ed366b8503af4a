"""Particles as those of a run, with known truth: what its decoder shows, in the noise that is left.

Poses, CTFs, shifts, optics groups and the scale of the images are the run's; so is the spectrum of
the noise, which is what the run's latents leave unexplained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort.core import InputError, record
from cryodrgn_amort.models import cluster_centres, measure_noise, whole_ctf
from cryodrgn_amort.runs import load_run, write_table
from cryodrgn_amort.simulation.draw import Drawn
from cryodrgn_amort.simulation.imager import Imager

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from cryodrgn_amort.core import Registry
    from cryodrgn_amort.data import Particles
    from cryodrgn_amort.models import AmortVAE
    from cryodrgn_amort.options import SimulateOptions
    from cryodrgn_amort.simulation.imager import Streams


__all__ = ["TRUTH", "RunImager", "decoded_images"]

TRUTH = "truth"
"""A run folder within that of a simulation: the decoder and the latents that it shows."""
_CLASSES = 20
_CERTAIN = -20.0  # log variance of what is known
_SAMPLE = 256


def decoded_images(model: AmortVAE, particles: Particles, z: Tensor, rows: Tensor) -> Tensor:
    """Return the raw images `(B, box, box)`, without noise, of latents `(B, zdim)`.

    Parameters
    ----------
    rows
        Whose poses, CTFs and translations they have, `(B,)`.
    """
    at = rows.to(particles.device)
    y = model.fast.images(particles.rots[at], z[:, None])[:, 0]
    ctf = particles.half(particles.ctf(at), at)
    return particles.unprocessed(y if ctf is None else y * whole_ctf(ctf), at)


class RunImager(Imager):
    """Images what the decoder of ``--like`` shows, for each of the run's particles once.

    A latent is drawn from the posterior of each, or is the mean of all (``--homogeneous``). Classes
    are the clusters of these latents.

    Raises
    ------
    InputError
        If the run cannot be read, or is of tilt series.
    """

    moves = False

    def __init__(self, options: SimulateOptions, streams: Streams, plugins: Registry) -> None:
        what = f"--like {options.like}"
        self.run = run = load_run(str(options.like), plugins, flag="--like")
        if run.settings.tilted:
            raise InputError(f"{what}: of tilt series, which are not made up like a run's")
        self.particles = particles = run.particles()
        count = self._count(options)
        self.model = run.load_decoder()[0]
        mean, logvar = run.z()
        if len(mean) != particles.n:
            raise InputError(
                f"{what}: has latents of {len(mean)} particles, its inputs hold {particles.n}"
            )
        spread = np.nan_to_num(np.exp(0.5 * logvar))  # of train_dec: none
        drawn = mean + spread * streams["latents"].standard_normal(mean.shape, np.float32)
        self.z = np.broadcast_to(mean.mean(0), mean.shape) if options.homogeneous else drawn
        self.z = np.ascontiguousarray(self.z[:count], np.float32)
        classes = 1 if options.homogeneous else _CLASSES
        self.centres = cluster_centres(self.z, classes, options.seed)
        self.truth, self.D = self._drawn(count), particles.box
        ctf = self.truth.ctf
        self.apix = 1.0 if ctf is None else round(float(ctf[0, 0]), 6)
        latents = torch.from_numpy(mean).to(particles.device)
        self.noise_model = measure_noise(self.model.fast, particles, latents, options.seed)
        self.variance = self.signal_variance(streams["signal"])
        sample = np.arange(count)[:: -(-count // _SAMPLE)]
        self.sigma = float(self.noise(sample, np.random.default_rng(options.seed)).std())

    def _count(self, options: SimulateOptions) -> int:
        n = self.particles.n
        count = n if options.n is None else options.n + options.heldout
        if count > n or count <= options.heldout:
            asked = f"-n {options.n} and " if options.n else ""
            raise InputError(
                f"{asked}--heldout {options.heldout}: --like {options.like} has only {n} particles"
            )
        return count

    def _drawn(self, count: int) -> Drawn:
        p = self.particles
        tables = (p.rots, p.trans, p.ctf_params)
        rots, trans, ctf = (None if t is None else t[:count].cpu().numpy() for t in tables)
        assert rots is not None
        away = ((self.z[:, None] - self.centres) ** 2).sum(2)
        none = np.zeros((count, 2), np.float32)
        return Drawn(
            rots, none if trans is None else trans, ctf, away.argmin(1), np.full(count, 0.5)
        )

    def clean(self, rows: np.ndarray) -> Tensor:
        """Return noise-free raw images `(B, D, D)`."""
        z = torch.from_numpy(self.z[rows]).to(self.particles.device)
        return decoded_images(self.model, self.particles, z, torch.from_numpy(rows)).cpu()

    def noise(self, rows: np.ndarray, stream: np.random.Generator) -> Tensor:
        """Return noise `(B, D, D)` with the spectrum of each particle's optics group."""
        size, device = (len(rows), self.D, self.D), self.particles.device
        white = torch.from_numpy(stream.standard_normal(size, np.float32)).to(device)
        return self.noise_model.raw(torch.from_numpy(rows).to(device), white).cpu()

    def volumes(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield volumes at the centres of the classes, and at the mean latent, density positive."""
        named = [(f"class{k}", z) for k, z in enumerate(self.centres)]
        named.append(("mean", self.z.mean(0)))
        sign = 1 if self.run.settings.invert_data else -1
        decoded = self.run.decode(np.stack([z for _, z in named]))
        return ((name, sign * volume) for (name, _), volume in zip(named, decoded, strict=True))

    def settled(self, options: SimulateOptions) -> dict[str, Any]:
        """Return what is known of the run."""
        return {"like": str(self.run.folder.absolute()), "use_ctf": self.truth.ctf is not None}

    def facts(self) -> dict[str, Any]:
        """Return the classes, and the noise's mean spectrum."""
        shares = np.bincount(self.truth.labels, minlength=len(self.centres)) / len(self.z)
        facts = self.noise_model.facts()
        groups = np.array(facts["groups"], float)
        mean = groups / groups.sum() @ np.array(facts["noise_variance"])
        frequency = (np.arange(len(mean)) + 1) / self.D
        return {
            "classes": [
                {"holds": f"latents near centre {k}", "share": float(share)}
                for k, share in enumerate(shares)
            ],
            "noise_spectrum": {"frequency": frequency.tolist(), "variance": mean.tolist()},
        }

    def write(self, folder: Path) -> None:
        """Write the truth: the decoder with these latents, as a run."""
        out = folder / TRUTH
        out.mkdir()
        stored = {name: str((folder / f"{name}.pkl").absolute()) for name in ("poses", "ctf")}
        if self.truth.ctf is None:
            del stored["ctf"]
        given: dict[str, Any] = {
            **stored, "particles": str((folder / "particles.mrcs").absolute()), "ind": None,
            "datadir": None, "do_pose_sgd": False, "from_run": None,
        }  # fmt: skip
        latents = (self.z, np.full_like(self.z, _CERTAIN))
        write_table(out, self.run, self.particles, self.model, latents, given)
        record(out, *(path.name for path in out.iterdir()))
