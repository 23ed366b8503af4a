"""Encoders: what yields q(z_i) = N(mu_i, diag exp(log variance_i)) for particle i."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from cryodrgn_amort.models.synthetic import SyntheticBatch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryodrgn_amort.data import Batch
    from cryodrgn_amort.models.decoder import FastDecoder


__all__ = ["Encoder"]

_VALUES = 1 << 24  # pixels of templates at a time


class Encoder(nn.Module, ABC):
    """Base of every encoder that is not one of the host's own networks.

    Parameters (``nn.Parameter``) are trained together with the decoder. What needs an optimizer
    of its own, as a table's rows do, takes its step in ``after_backward``. Buffers, parameters
    and ``get_extra_state`` are all that a checkpoint keeps.

    Only ``forward`` is needed: the other methods do nothing unless a subclass has them. Those for a
    second stage, an encoder for the decoder of a finished run, are ``learn_from``, ``learn_noise``
    and ``template_latents``; ``with_templates`` then yields what to compare.

    Attributes
    ----------
    per_particle
        Names of buffers, and of tensors in ``epoch_state``, with one row per particle. When several
        processes train, each holds the rows of its own particles: those of a batch are at
        ``batch.rows``.
    replays
        Whether every step in training is the same work on a GPU, whatever the batch: the same
        kernels with the same Python numbers, what changes being in tensors there, random numbers
        drawn there, positions being ``batch.device_index`` or ``batch.device_rows``, and no number
        asked for. Then steps are recorded once and replayed, and ``after_backward`` is given
        ``lost``, a scalar of truth, where nothing must change. False: every step is run as written.
    decoder
        The decoder of the model that it is part of, for encoders that compare images; the model
        puts it here.
    """

    per_particle: ClassVar[frozenset[str]] = frozenset()
    replays: ClassVar[bool] = False
    decoder: FastDecoder | None = None

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the posterior's mean and log variance, each `(B, zdim)`."""

    def after_backward(self, lost: Tensor | None = None) -> None:
        """Take the step of an own optimizer; ``lost`` is given if the encoder ``replays``."""

    def epoch_start(self, done: float) -> None:
        """Be told that an epoch begins, and what share of the training is done: 0 to below 1."""

    def epoch_metrics(self) -> dict[str, float]:
        """Return further columns for metrics.csv, always the same ones."""
        return {}

    def epoch_state(self) -> dict[str, Any]:
        """Return what ``epoch_metrics`` needs and a checkpoint lacks, when training stops early."""
        return {}

    def set_epoch_state(self, state: dict[str, Any]) -> None:
        """Go on in an epoch, after ``epoch_start``."""

    def latents(self) -> tuple[Tensor, Tensor] | None:
        """Return all means and log variances `(N, zdim)` if they are known without any images.

        When several processes train, those of the own particles.
        """
        return None

    def learn_from(self, mean: Tensor) -> None:
        """Be told the latents `(N, zdim)` of the run whose decoder the encoder is for.

        Before training, with ``EncoderSpec.sleeps``. A training that goes on does so, too, and then
        gets its buffers and parameters from the checkpoint.

        Raises
        ------
        InputError
            If it can make nothing of them.
        """

    def learn_noise(self, precision: Tensor) -> None:
        """Be told 1 / variance of the noise in each masked pixel `(P,)`, before the first epoch.

        It is that of the images that the decoder makes up: with ``EncoderSpec.sleeps``.
        """

    def template_latents(self) -> Tensor | None:
        """Return latents `(K, zdim)` whose images the encoder compares with particles, if any."""
        return None

    def with_templates(self, batch: Batch) -> Iterator[tuple[Batch, Tensor]]:
        """Go through a batch, some particles at a time, with templates: images of those latents.

        They are decoded at each particle's pose, without CTF, unless they come with images that the
        decoder made up. To be called under ``torch.no_grad``.

        Yields
        ------
        part
            Some particles of the batch, in order.
        images
            `(B, K, P)`: the image of the first latent, and what the others' have more than that.
        """
        if isinstance(batch, SyntheticBatch) and batch.templates is not None:
            yield batch, batch.templates
            return
        latents, decoder = self.template_latents(), self.decoder
        assert latents is not None
        assert decoder is not None
        together = max(1, _VALUES // (len(latents) * batch.y.shape[1]))
        for first in range(0, len(batch.index), together):
            part = batch.of(slice(first, first + together))
            assert part.rot is not None
            images = decoder.images(part.rot, latents.expand(len(part.index), -1, -1))
            images[:, 1:] -= images[:, :1]
            yield part, images
