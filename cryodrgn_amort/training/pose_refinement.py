"""Poses that are refined together with the decoder: ``train_amort --do-pose-sgd``."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from cryodrgn_amort import host
from cryodrgn_amort.core import InputError, write_poses

if TYPE_CHECKING:
    import os

    from cryodrgn_amort.data import Batch, Particles


__all__ = ["RefinedPoses"]


class RefinedPoses:
    """Rotations and translations of all images, and the optimizer that moves those of a batch.

    As in ``train_vae``: rotations are two vectors that are made orthonormal (Zhou et al., arXiv
    1812.07035), translations are in pixels, the optimizer is sparse Adam. Making it draws as many
    random numbers as the host does, which are not used.

    Parameters
    ----------
    particles
        With the poses that are to be refined; left as they are.
    lr
        Learning rate.

    Attributes
    ----------
    particles
        The same without translations: a ``BatchLoader`` of these hands out images that are not
        centred, for ``posed``.
    """

    def __init__(self, particles: Particles, lr: float) -> None:
        self._rots, self._trans, self._lr = particles.rots, particles.trans, lr
        self.particles = copy.copy(particles)
        self.particles.trans = self.particles.prepared = None
        trans = None if self._trans is None else self._trans.cpu().numpy()
        self._tracker = host.PoseTracker(
            self._rots.cpu().numpy(), trans, particles.D, "s2s2", particles.device
        )
        self._optimizer = self._adam()

    def _adam(self) -> torch.optim.SparseAdam:
        return torch.optim.SparseAdam(list(self._tracker.parameters()), lr=self._lr)

    def posed(self, batch: Batch) -> Batch:
        """Centre images that are not, and give them their rotations, as they are now.

        All can be differentiated by the poses, unless gradients are disabled.
        """
        rows = batch.device_images
        y, image = batch.y, batch.image
        if self._tracker.trans_emb is not None:
            trans = self._tracker.trans_emb(rows)
            y = self.particles.shift(y, trans)
            # flipped phases stay so: the CTF is the same at opposite points
            image = None if image is None else self.particles.shift(image, trans)
        rot = host.s2s2_to_rotmat(self._tracker.rots_emb(rows))
        return replace(batch, y=y, image=image, rot=rot)

    def step(self) -> None:
        """Move the poses of the batch whose loss has been differentiated."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def write(self, path: str | os.PathLike[str]) -> None:
        """Write all poses as they are now, as the host does."""
        emb = self._tracker.trans_emb
        rots = host.s2s2_to_rotmat(self._tracker.rots_emb.weight)
        write_poses(path, rots, None if emb is None else emb.weight, self.particles.D)

    def state_dict(self) -> dict[str, Any]:
        """Return poses and the optimizer's state."""
        return {"poses": self._tracker.state_dict(), "optimizer": self._optimizer.state_dict()}

    @torch.no_grad()
    def restore(self, state: dict[str, Any] | None, name: str) -> None:
        """Become what was kept; None: begin with the poses given.

        Raises
        ------
        InputError
            If it is of other particles; ``name`` says where it came from.
        """
        self._optimizer = self._adam()
        if state is None:
            self._tracker.rots_emb.weight.copy_(self._rots[:, :2].flatten(1))
            if self._trans is not None:
                self._tracker.trans_emb.weight.copy_(self._trans)
            return
        try:
            self._tracker.load_state_dict(state["poses"])
        except RuntimeError:
            raise InputError(f"{name}: its refined poses are those of other particles") from None
        self._optimizer.load_state_dict(state["optimizer"])
