"""Encoders for the decoder of a finished run (``--from``), which see no particle while they learn.

Plain networks of the host can be trained so as well; what they learn from is in ``synthetic``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from cryodrgn_amort import host
from cryodrgn_amort.core import InputError, epochs
from cryodrgn_amort.models.encoders import Encoder
from cryodrgn_amort.models.lookup_table import build_table
from cryodrgn_amort.models.synthetic import whole_ctf
from cryodrgn_amort.options import AnchorFlags

if TYPE_CHECKING:
    from cryodrgn_amort.data import Batch, Particles
    from cryodrgn_amort.options import TrainSettings


__all__ = [
    "AnchoredEncoder",
    "SecondStage",
    "SleepEncoder",
    "build_semi",
    "cluster_centres",
    "split_pose",
]

_SAMPLE = 20_000
_DEFOCUS_SCALE = 5000.0  # angstroms


def cluster_centres(mean: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return centres of clusters of latents `(N, zdim)`, at most ``count``: `(K, zdim)`."""
    rng = np.random.default_rng(seed)
    sample = mean[np.sort(rng.permutation(len(mean))[:_SAMPLE])]
    count = min(count, len(np.unique(sample, axis=0)))
    centres = KMeans(count, n_init=1, random_state=seed).fit(sample).cluster_centers_
    found: np.ndarray = centres.astype(np.float32)
    return found


class SecondStage(Encoder):
    """A network that is told view and defocus besides what it sees of a particle.

    Parameters
    ----------
    seen
        Number of values that it sees.
    """

    replays = True
    centre: Tensor
    spread: Tensor
    usual_defocus: Tensor
    _defocus: Tensor

    def __init__(self, seen: int, settings: TrainSettings, particles: Particles) -> None:
        super().__init__()
        self.zdim = settings.zdim
        defocus = torch.zeros(particles.n)
        if particles.ctf_params is not None:
            defocus = particles.ctf_params[:, 1:3].mean(1).cpu()
        self.register_buffer("_defocus", defocus, persistent=False)
        self.register_buffer("usual_defocus", defocus.mean())
        self.register_buffer("centre", torch.zeros(self.zdim))
        self.register_buffer("spread", torch.ones(self.zdim))
        self.network = host.ResidLinearMLP(
            seen + 10, settings.qlayers, settings.qdim, 2 * self.zdim, torch.nn.ReLU
        )

    def learn_from(self, mean: Tensor) -> None:
        """Scale the answers by the latents `(N, zdim)` of the run whose decoder this is for."""
        self.centre.copy_(mean.mean(0))
        self.spread.copy_(mean.std(0).clamp(min=1e-3))

    def answer(self, seen: Tensor, view: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior by what is seen `(B, ...)`, the view `(B, 3, 3)`, and defocus.

        ``index`` is on the device.
        """
        defocus = self._defocus[index] - self.usual_defocus
        parts = (seen, 3 * view.flatten(1), defocus[:, None] / _DEFOCUS_SCALE)
        both = self.network(torch.cat([part.to(self.centre) for part in parts], 1))
        mean, logvar = both[:, : self.zdim], both[:, self.zdim :]
        return self.centre + self.spread * mean, logvar + 2 * self.spread.log()


class SleepEncoder(SecondStage):
    """The network sees the image itself, turned so that its in-plane angle is always the same."""

    def __init__(self, settings: TrainSettings, particles: Particles) -> None:
        super().__init__(len(particles.mask), settings, particles)
        self._mask, self._size = particles.mask, particles.D
        plane = particles.lattice.coords[particles.mask, :2]
        self._plane = plane / particles.lattice.extent  # of the whole lattice: -1 to 1

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Encode what the batch shows."""
        assert batch.image is not None
        assert batch.rot is not None
        turn, view = split_pose(batch.rot.float())
        return self.answer(self._turned(batch.image.float(), turn), view, batch.device_index)

    def _turned(self, image: Tensor, turn: Tensor) -> Tensor:
        """Turn Hartley images `(B, P)` back by in-plane rotations `(B, 2, 2)`."""
        whole = image.new_zeros(len(image), self._size**2)
        whole[:, self._mask] = image
        grid = self._plane.to(image) @ turn.transpose(1, 2)
        found = torch.nn.functional.grid_sample(
            whole.view(-1, 1, self._size, self._size), grid[:, None], align_corners=True
        )
        return found[:, 0, 0]


def split_pose(rot: Tensor) -> tuple[Tensor, Tensor]:
    """Split rotations `(B, 3, 3)` into one in the image plane, and one by the view alone.

    Returns
    -------
    turn
        `(B, 2, 2)`.
    view
        `(B, 3, 3)`: ``rot`` is ``turn``, with the third axis left as it is, times this.
    """
    third = rot[:, 2]
    pole = (third[:, 2].abs() > 1 - 1e-6).to(third)
    aside = torch.stack([torch.zeros_like(pole), pole, 1 - pole], 1)
    first = torch.nn.functional.normalize(torch.linalg.cross(aside, third), dim=1)
    view = torch.stack([first, torch.linalg.cross(third, first), third], 1)
    turn = rot @ view.transpose(1, 2)
    return turn[:, :2, :2], view


class AnchoredEncoder(SecondStage):
    """The network sees how well the images of K anchors explain the particle.

    An anchor is a latent: the centre of a cluster of those of the run. Its image is decoded at the
    particle's own pose and CTF. Seen are, in units of the noise, how much better each anchor
    explains the particle than the mean latent does, and how different from its image it is.
    """

    anchors: Tensor
    precision: Tensor

    def __init__(self, settings: TrainSettings, particles: Particles) -> None:
        count = AnchorFlags.of(settings.extra).anchors
        super().__init__(3 * count, settings, particles)
        self.register_buffer("anchors", torch.zeros(count, self.zdim))
        self.register_buffer("precision", torch.ones(len(particles.mask)))
        self._seed = settings.seed

    def learn_from(self, mean: Tensor) -> None:
        """Choose anchors among the latents `(N, zdim)` of the run.

        Raises
        ------
        InputError
            If it has fewer different ones.
        """
        super().learn_from(mean)
        found = cluster_centres(mean.cpu().numpy(), len(self.anchors), self._seed)
        if len(found) < len(self.anchors):
            raise InputError(f"--anchors {len(self.anchors)}: the run has {len(found)} latents")
        self.anchors.copy_(torch.from_numpy(found))

    def learn_noise(self, precision: Tensor) -> None:
        """Weigh pixels by the noise's precision `(P,)`."""
        self.precision.copy_(precision)

    def template_latents(self) -> Tensor:
        """Return the latents that are compared: the mean one, and the anchors, `(1 + K, zdim)`."""
        return torch.cat([self.centre[None], self.anchors])

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compare the batch with the anchors, and encode that."""
        assert batch.rot is not None
        return self.answer(
            self._compared(batch), split_pose(batch.rot.float())[1], batch.device_index
        )

    @torch.no_grad()
    def _compared(self, batch: Batch) -> Tensor:
        """Compare particles with the images of the anchors at their poses: `(B, 3 K)`."""
        return torch.cat([self._seen(part, images) for part, images in self.with_templates(batch)])

    def _seen(self, batch: Batch, images: Tensor) -> Tensor:
        """Compare particles with templates, as ``with_templates`` yields both: `(B, 3 K)`."""
        images, y = images.to(self.precision), batch.y.to(self.precision)
        usual, others = images[:, 0], images[:, 1:]
        ctf = torch.ones_like(y) if batch.ctf is None else whole_ctf(batch.ctf.to(y))
        left = (y - usual * ctf) * self.precision * ctf
        weight = self.precision * ctf.square()
        fit = torch.bmm(others, left[:, :, None])[:, :, 0]
        size = torch.bmm(others.square(), weight[:, :, None])[:, :, 0]
        likelihood = torch.softmax(fit - 0.5 * size, 1)
        return torch.cat([fit / (size + 4).sqrt() / 3, size.sqrt() / 5, 3 * likelihood], 1)


def build_semi(settings: TrainSettings, particles: Particles) -> Encoder:
    """Make the table of ``--encoder semi``: it starts from the answers of the run of ``--from``."""
    run = Path(str(settings.from_run))
    known = epochs(run)  # the table is of the epoch that the decoder is of
    latest = run / f"z.{known[-1]}.pkl" if known else run
    start = {"table_init": str(latest), **settings.extra}
    return build_table(replace(settings, extra=start), particles)
