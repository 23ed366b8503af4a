"""What all models of images share: a posterior and a decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cryodrgn_amort.models.objective import Losses, losses

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cryodrgn_amort.data import Batch
    from cryodrgn_amort.models.encoders import Encoder


__all__ = ["LatentModel"]


class LatentModel(ABC):
    """A variational autoencoder, whatever its images, its decoder and its encoder are.

    To be a base class beside a ``torch.nn.Module``.

    Attributes
    ----------
    amort
        The encoder, a network or a table; None: a network that the model has itself.
    training
        As of every module.
    narrow
        Whether gradients may be beyond the range of what they are computed in: of fp16.
    """

    amort: Encoder | None
    training: bool
    narrow: bool = False

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

    @torch.no_grad()
    def errors_at(self, batch: Batch, z: Tensor) -> Tensor:
        """Return the error of each particle at several latents `(K, B, zdim)`: `(K, B)`."""
        return torch.stack([self.errors(batch, latent)[1] for latent in z])

    def pixels(self, batch: Batch) -> int:
        """Return how many pixels of an image are compared."""
        return batch.y.shape[1]

    def sample(self, mean: Tensor, logvar: Tensor, batch: Batch) -> Tensor:
        """Draw latents from the posterior `(B, zdim)`; its means when not training.

        Noise is drawn for the whole batch, so that several processes draw what one would.
        """
        if not self.training:
            return mean
        noise = torch.randn(batch.size, mean.shape[1], dtype=mean.dtype, device=mean.device)
        noise = noise if batch.share is None else noise[batch.share.places.to(noise.device)]
        return mean + noise * torch.exp(0.5 * logvar)

    def loss(
        self, batch: Batch, beta: float | Tensor, beta_control: float | None = None
    ) -> tuple[Losses, Tensor]:
        """Return the ELBO's losses, and the posterior means, detached."""
        mean, logvar = self.posterior(batch)
        return self.losses_of(batch, mean, logvar, beta, beta_control), mean.detach()

    def losses_of(
        self,
        batch: Batch,
        mean: Tensor,
        logvar: Tensor,
        beta: float | Tensor,
        beta_control: float | None = None,
    ) -> Losses:
        """Return the ELBO's losses of a posterior of the batch, mean and log variance `(B, zdim)`.

        Draws a latent from it.
        """
        error, _ = self.errors(batch, self.sample(mean, logvar, batch))
        error, pixels = error / batch.tilts, self.pixels(batch)
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
