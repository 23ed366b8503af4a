"""Training a network on copies of the particles, turned and rolled, whose poses follow.

What augmentation can do for an encoder, next to images made up by a decoder: as much as turning and
rolling change, it sees each particle's noise again and again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from cryodrgn_amort import host
from cryodrgn_amort.data import Batch, Rotation
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

    def loss(
        self, model: LatentModel, batch: Batch, beta: float, beta_control: float | None
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
        """Turn and roll a batch; draws from the global generator, for the whole of it."""
        angle_deg = float(360 * torch.rand(()))
        shifts = torch.randint(-self.roll_px, self.roll_px + 1, (batch.size, 2))
        shifts = shifts if batch.share is None else shifts[batch.share.places]
        return self.copy(batch, Rotation(angle_deg), shifts)

    def copy(self, batch: Batch, turn: Rotation, shift_px: Tensor) -> Batch:
        """Turn a batch, and roll what the network is shown by ``shift_px`` `(B, 2)`, x and y."""
        p, index = self.particles, batch.index
        if not len(index):  # all of the batch is other processes'
            return batch
        assert batch.rot is not None
        rot, _ = turn.pose(batch.rot, batch.rot.new_zeros(len(index), 2))
        params = None if p.ctf_params is None else turn.ctf(p.ctf_params[index])
        ctf = p.ctf_of(params)
        whole = batch.y.new_zeros(len(index), p.D**2)
        if batch.image is not None and p.whole:  # the corners are wanted, too
            whole = p.flip(batch.image, p.ctf(index))
        whole[:, p.mask] = batch.y
        y = Rotation(90 * turn.quarters).hartley(whole.view(-1, p.D, p.D))
        assert y is not None
        if turn.rest_deg:
            real = Rotation(turn.rest_deg).image(host.iht2_center(y[:, :-1, :-1]))
            y = host.symmetrize_ht(host.ht2_center(real)).view(-1, p.D, p.D)
        rolled = p.centre(y, shift_px.to(y))
        return Batch(
            index,
            p.masked(p.centre(y, None)),
            p.flip(rolled, ctf),
            rot,
            p.half(ctf, index),
            batch.share,
        )
