"""What all models of images share: a posterior, a decoder, and one training step."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cryodrgn_amort.models.objective import Losses, falling_rate, losses

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from cryodrgn_amort.core import ProcessGroup
    from cryodrgn_amort.data import Batch
    from cryodrgn_amort.models.encoders import Encoder


__all__ = ["LatentModel", "NotFiniteError", "Objective", "adam", "set_rate", "train_step"]

_MOST = 1e9  # of a loss: images are normalised, so that those that learn have losses near 1


class LatentModel(ABC):
    """A variational autoencoder, whatever its images, its decoder and its encoder are.

    To be a base class beside a ``torch.nn.Module``.

    Attributes
    ----------
    amort
        The encoder, a network or a table; None: a network that the model has itself.
    training
        As of every module.
    """

    amort: Encoder | None
    training: bool

    @abstractmethod
    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z) for the batch, each `(B, zdim)`."""

    @abstractmethod
    def errors(self, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
        """Compare the images that latents `(B, zdim)` decode to with those of the batch.

        By -2 log p(x | z), up to a constant, at noise of variance 1: for Gaussian noise, squared
        errors. Returns their total, which can be differentiated, and that of each particle, over
        all its images, `(B,)`, which cannot.
        """

    def sample(self, mean: Tensor, logvar: Tensor, batch: Batch) -> Tensor:
        """Draw latents from the posterior `(B, zdim)`; its means when not training.

        Noise is drawn for the whole batch, so that several processes draw what one would.
        """
        if not self.training:
            return mean
        noise = torch.randn(batch.size, mean.shape[1], dtype=mean.dtype, device=mean.device)
        noise = noise if batch.share is None else noise[batch.share.places]
        return mean + noise * torch.exp(0.5 * logvar)

    def loss(
        self, batch: Batch, beta: float, beta_control: float | None = None
    ) -> tuple[Losses, Tensor]:
        """Return the ELBO's losses, and the posterior means, detached."""
        mean, logvar = self.posterior(batch)
        return self.losses_of(batch, mean, logvar, beta, beta_control), mean.detach()

    def losses_of(
        self,
        batch: Batch,
        mean: Tensor,
        logvar: Tensor,
        beta: float,
        beta_control: float | None = None,
    ) -> Losses:
        """Return the ELBO's losses of a posterior of the batch, mean and log variance `(B, zdim)`.

        Draws a latent from it.
        """
        error, _ = self.errors(batch, self.sample(mean, logvar, batch))
        error, pixels = error / batch.tilts, batch.y.shape[1]
        return losses(mean, logvar, error, pixels, batch.size, beta, beta_control)

    @torch.no_grad()
    def posteriors(self, batches: Iterable[Batch]) -> Tensor:
        """Return means and log variances of all particles, side by side: `(N, 2 zdim)`.

        Batches of these are gone through, unless the encoder knows them without any images.
        """
        known = None if self.amort is None else self.amort.latents()
        if known is not None:
            return torch.cat(known, 1)
        return torch.cat([torch.cat(self.posterior(batch), 1).float() for batch in batches])

    def own_state_dict(self) -> dict[str, Any]:
        """Return the state of the encoder ``amort``; empty if there is none."""
        return {} if self.amort is None else dict(self.amort.state_dict())


def adam(
    parameters: list[nn.Parameter], lr: float, wd: float = 0.0, eps: float = 1e-8
) -> torch.optim.Adam:
    """Make the common optimizer; fused where PyTorch can."""
    make = functools.partial(torch.optim.Adam, parameters, lr=lr, weight_decay=wd, eps=eps)
    try:
        return make(fused=True)
    except RuntimeError:  # before PyTorch 2.4 not on CPUs
        return make()


def set_rate(
    optimizer: torch.optim.Optimizer, start: float, end: float | None, done: float, halvings: int
) -> None:
    """Set the learning rate after a share of the training.

    It falls from ``start`` to ``end`` (None: it does not), and is halved ``halvings`` times.
    """
    if end is None and not halvings:  # it is what the optimizer has
        return
    rate = start if end is None else falling_rate(start, end, done)
    for group in optimizer.param_groups:
        group["lr"] = rate / 2**halvings


class Objective:
    """What a model learns from: the ELBO of the particles, unless a subclass has something else."""

    def epoch_start(self, epoch: int) -> None:
        """Be told that an epoch begins, from 1."""

    def loss(
        self, model: LatentModel, batch: Batch, beta: float, beta_control: float | None
    ) -> tuple[Losses, Tensor]:
        """Return the losses of a batch, or of others in its place, and posterior means, detached.

        With several processes, they are those of each one's share of the batch.
        """
        return model.loss(batch, beta, beta_control)

    def epoch_metrics(self) -> dict[str, float]:
        """Return further columns for metrics.csv, always the same ones."""
        return {}

    def epoch_state(self) -> dict[str, Any]:
        """Return what changes within an epoch, for a training that stops in it."""
        return {}

    def set_epoch_state(self, state: dict[str, Any]) -> None:
        """Go on in an epoch, after ``epoch_start``."""


_ELBO = Objective()


class NotFiniteError(Exception):
    """The loss of a batch is not a number, or beyond all bounds; nothing was changed."""


def train_step(
    model: LatentModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    beta: float,
    beta_control: float | None = None,
    processes: ProcessGroup | None = None,
    objective: Objective = _ELBO,
    *,
    check: bool = False,
) -> tuple[Losses, Tensor]:
    """Take one optimizer step; returns the losses and the posterior means, detached.

    With several processes, the losses and gradients of each are its share of the batch's.

    Parameters
    ----------
    beta, beta_control
        Weight of the KL divergence; see ``losses``.
    processes
        This process among several; None: it is alone.

    Raises
    ------
    NotFiniteError
        With ``check``: if the loss is not finite or above 1e9, before anything is changed.
    """
    optimizer.zero_grad()
    result, mean = objective.loss(model, batch, beta, beta_control)
    if check:
        lost = not abs(result.total.item()) <= _MOST
        if lost if processes is None else processes.max(int(lost)):
            raise NotFiniteError
    result.total.backward()
    if model.amort is not None:
        model.amort.after_backward()
    if processes is not None:
        trained = (p for group in optimizer.param_groups for p in group["params"])
        processes.sum_(p.grad for p in trained if p.grad is not None)
    optimizer.step()
    return result.detach(), mean
