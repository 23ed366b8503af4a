"""A second stage: an encoder for the decoder of a finished run, which compares images with it.

A few of the run's latents are templates. The decoder shows what a particle would look like with
each of them, at the particle's pose and CTF; Gaussian noise says how likely each is; and the answer
is their mean, weighted by that. How far the likelihoods can be trusted is learnt, from images that
the decoder makes up, whose latents are known. Install it beside cryodrgn_amort, and ask whether an
encoder that is that simple can be trusted:

    pip install ./examples/plugins/second_stage
    cryodrgn train_amort particles.mrcs ... --encoder vlt -o vlt
    cryodrgn train_amort --from vlt --encoder nearest -o nearest
    cryodrgn eval_amort nearest
"""

from __future__ import annotations

import torch
from torch import nn

from cryodrgn_amort import hookimpl
from cryodrgn_amort.core import InputError
from cryodrgn_amort.models import Encoder, EncoderSpec, cluster_centres

TEMPLATES = 16


class Nearest(Encoder):
    """The mean of some latents, each weighted by the likelihood of its image.

    Buffers are what it is told before training, parameters are what it learns: a checkpoint keeps
    both.
    """

    def __init__(self, zdim: int, pixels: int) -> None:
        super().__init__()
        self.register_buffer("templates", torch.zeros(TEMPLATES, zdim))
        self.register_buffer("precision", torch.ones(pixels))
        self.trust = nn.Parameter(torch.tensor(-1.0))  # log of what likelihoods are raised to
        self.between = nn.Parameter(torch.zeros(zdim))  # log variance that templates do not show
        self.map = nn.Linear(zdim, zdim)  # what is far out, a mean of templates draws inwards

    def learn_from(self, mean):
        """Choose templates among the run's latents `(N, zdim)`, and start from their spread."""
        found = torch.from_numpy(cluster_centres(mean.cpu().numpy(), TEMPLATES, seed=0))
        if len(found) < TEMPLATES:
            raise InputError(f"--from: {TEMPLATES} latents are needed, the run has {len(found)}")
        self.templates.copy_(found)
        self.between.copy_(2 * mean.std(0).log() - 1)
        nn.init.eye_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def learn_noise(self, precision):
        """Keep 1 / variance of the noise in each pixel `(P,)`."""
        self.precision.copy_(precision)

    def template_latents(self):
        """Return the latents whose images are compared, `(K, zdim)`."""
        return self.templates

    def forward(self, batch):
        """Return mean and log variance, `(B, zdim)` each."""
        with torch.no_grad():  # the decoder stays as it is
            parts = [self.log_likelihoods(*part) for part in self.with_templates(batch)]
        weights = torch.softmax(self.trust.exp() * torch.cat(parts), 1)
        mean = weights @ self.templates
        variance = (weights @ self.templates.square() - mean.square()).clamp(min=0)
        return self.map(mean), (variance + self.between.exp()).log()

    def log_likelihoods(self, batch, images):
        """Return log p(particle | template) `(B, K)`, less that of the first template.

        ``images`` `(B, K, P)`: the first template's, and what the others' have more than that.
        """
        y, images = batch.y.to(self.precision), images.to(self.precision)
        ctf = torch.ones_like(y)
        if batch.ctf is not None:  # at half of the pixels: the other half is its mirror image
            ctf = torch.cat([batch.ctf, batch.ctf.flip(1)], 1).to(y)
        left = y - ctf * images[:, 0]
        more = ctf[:, None] * torch.cat([torch.zeros_like(images[:, :1]), images[:, 1:]], 1)
        return (self.precision * more * (left[:, None] - 0.5 * more)).sum(2)


@hookimpl
def encoders():
    """Bring ``--encoder nearest``.

    ``second_stage``: it needs ``--from RUN``. ``sleeps``: it is trained on images that the decoder
    of RUN makes up; without, it and the decoder would be trained on the particles.
    """
    return [
        EncoderSpec(
            "nearest",
            "second stage: latents whose images are like the particle",
            build=lambda settings, particles: Nearest(settings.zdim, len(particles.mask)),
            flags=frozenset({"from_run"}),
            second_stage=True,
            sleeps=True,
            defaults={"lr": 1e-2, "lr_end": 1e-3, "batch_size": 128},
        )
    ]
