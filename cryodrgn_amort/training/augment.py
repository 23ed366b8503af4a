"""Training a network on copies of the particles, turned and rolled, whose poses follow.

What augmentation can do for an encoder, next to images made up by a decoder: as much as turning and
rolling change, it sees each particle's noise again and again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from cryodrgn_amort import host
from cryodrgn_amort.data import ASTIGMATISM_ANGLE, Batch, sheared_turn
from cryodrgn_amort.models import Losses, Objective, divergence

if TYPE_CHECKING:
    from torch import Tensor

    from cryodrgn_amort.data import Particles
    from cryodrgn_amort.models import LatentModel


__all__ = ["Augmented"]


class Augmented(Objective):
    """The ELBO of copies: all of a batch turned by a random angle, each rolled for itself.

    Image, pose and CTF turn together. A roll that the pose follows is undone by centring, so what
    the decoder has to explain stays centred: only what the network is shown is rolled.

    Parameters
    ----------
    roll_px
        Copies are rolled by whole pixels up to so many, along both axes.
    consistency
        Weight, next to that of the KL divergence to the prior, of KL(q(z | copy) || q(z | x)):
        Sinha & Dieng, arXiv 2105.14859.
    """

    def __init__(self, particles: Particles, roll_px: int, consistency: float) -> None:
        self.particles, self.roll_px, self.consistency = particles, roll_px, consistency
        places = torch.arange(particles.D**2, device=particles.device)
        places = places.view(particles.D, particles.D)
        self._quarters = torch.stack([torch.rot90(places, -k).flatten() for k in range(4)])

    def loss(
        self, model: LatentModel, batch: Batch, beta: float | Tensor, beta_control: float | None
    ) -> tuple[Losses, Tensor]:
        """Return the losses of copies, and their posterior means, detached."""
        copy = self.copied(batch)
        mean, logvar = model.posterior(copy)
        result = model.losses_of(copy, mean, logvar, beta, beta_control)
        if self.consistency:
            apart = divergence((mean, logvar), model.posterior(batch)).sum() / batch.size
            weight = beta if beta_control is None else beta_control
            more = self.consistency * weight * apart / batch.y.shape[1]
            result = replace(result, total=result.total + more)
        return result, mean.detach()

    def copied(self, batch: Batch) -> Batch:
        """Turn and roll a batch; draws from the device's generator, for the whole of it."""
        device, most = self.particles.device, self.roll_px
        angle_deg = 360 * torch.rand((), device=device)
        shifts = torch.randint(-most, most + 1, (batch.size, 2), device=device)
        if batch.share is not None:
            shifts = shifts[batch.share.places.to(device)]
        return self.copy(batch, angle_deg, shifts)

    def copy(self, batch: Batch, angle_deg: Tensor, shift_px: Tensor) -> Batch:
        """Turn a batch clockwise, and roll what the network is shown.

        Parameters
        ----------
        angle_deg
            A scalar on the device.
        shift_px
            `(B, 2)`, x and y.
        """
        p = self.particles
        if not len(batch.index):  # all of the batch is other processes'
            return batch
        assert batch.rot is not None
        turn, index = _Turn(angle_deg.double()), batch.device_index
        params = None
        if p.ctf_params is not None:
            params = p.ctf_params[index]
            params[:, ASTIGMATISM_ANGLE] += angle_deg
        ctf = p.ctf_of(params)
        whole = batch.y.new_zeros(len(index), p.D**2)
        if batch.image is not None and p.whole:  # the corners are wanted, too
            whole = p.flip(batch.image, p.ctf(index))
        whole[:, p.mask] = batch.y
        y = turn.hartley(whole.view(-1, p.D, p.D), self._quarters)
        rolled = p.centre(y, shift_px.to(y))
        return Batch(
            batch.index, p.masked(p.centre(y, None)), p.flip(rolled, ctf),
            turn.matrix.to(batch.rot) @ batch.rot, p.half(ctf, index), batch.share, sent=index,
        )  # fmt: skip


class _Turn:
    """A clockwise turn of images by an angle that is on the device, as ``Rotation`` turns them.

    Attributes
    ----------
    matrix
        That of rotations, `(3, 3)`.
    """

    def __init__(self, angle_deg: Tensor) -> None:
        quarters = torch.round(angle_deg / 90)
        self._quarters = quarters.long().remainder(4).view(1)
        self._rest = torch.deg2rad(angle_deg - 90 * quarters)
        cos, sin = torch.cos(self._rest), torch.sin(self._rest)
        none, one = torch.zeros_like(cos), torch.ones_like(cos)
        matrices = [  # exact, unlike the cosine of a right angle
            torch.stack([c, -s, none, s, c, none, none, none, one])
            for c, s in ((cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos))
        ]
        self.matrix = torch.stack(matrices).index_select(0, self._quarters).view(3, 3)

    def hartley(self, y: Tensor, quarters: Tensor) -> Tensor:
        """Turn preprocessed images `(B, D, D)`: by index permutation, the rest by shears.

        ``quarters``: where pixels come from in each number of quarter turns, `(4, D * D)`.
        """
        size = y.shape[-1]
        at = quarters.index_select(0, self._quarters)[0]
        y = y.flatten(1).index_select(1, at).view_as(y)
        along_x, along_y = -torch.tan(self._rest / 2), torch.sin(self._rest)
        real = sheared_turn(host.iht2_center(y[:, :-1, :-1]), along_x, along_y)
        found: Tensor = host.symmetrize_ht(host.ht2_center(real)).view(-1, size, size)
        return torch.where(self._rest == 0, y, found)  # whose edge shears do not keep
