"""A new encoder: a small convolutional network that sees the particle in real space.

To the host's networks an image is a list of numbers: none is next to another, and a particle that
is moved by a pixel is another list. A convolution knows what is next to what, and its mean over
the image hardly changes when the particle moves. Install it beside cryodrgn_amort and ask whether
that makes it an encoder that can be trusted:

    pip install ./examples/plugins/conv_encoder
    cryodrgn train_amort particles.mrcs ... --encoder conv --conv-channels 32 -o conv
    cryodrgn eval_amort conv
"""

from __future__ import annotations

import argparse
from itertools import pairwise

from torch import nn

from cryodrgn_amort import hookimpl
from cryodrgn_amort.core import InputError
from cryodrgn_amort.models import Encoder, EncoderSpec

CHANNELS = 16


class Conv(Encoder):
    """Three convolutions, each to half the size, their mean over the image, and a linear layer.

    All that a checkpoint must keep is in parameters and buffers, and no shape depends on the
    number of particles: so a run goes on, is evaluated, and encodes new particles.
    """

    def __init__(self, particles, zdim: int, channels: int) -> None:
        super().__init__()
        self.real = particles.real
        layers = []
        for before, after in pairwise((1, channels, 2 * channels, 4 * channels)):
            layers += [nn.Conv2d(before, after, 5, stride=2, padding=2), nn.ReLU()]
        self.seen = nn.Sequential(*layers)
        self.answer = nn.Linear(4 * channels, 2 * zdim)

    def forward(self, batch):
        """Return mean and log variance, `(B, zdim)` each.

        ``batch.image`` is what the host shows its networks: Hartley images, centred, phases
        flipped. A particle's number is in ``batch.index``, its pose in ``batch.rot``.
        """
        image = self.real(batch.image).to(self.answer.weight.dtype)  # of --precision fp64: double
        both = self.answer(self.seen(image[:, None]).mean((2, 3)))
        return both.chunk(2, dim=1)


def build(settings, particles) -> Conv:
    """Check our flag, which is in ``settings.extra`` if it was given, and make the encoder."""
    channels = settings.extra.get("conv_channels", CHANNELS)
    if not 1 <= channels <= 1024:
        raise InputError(f"--conv-channels {channels}: must be between 1 and 1024")
    return Conv(particles, settings.zdim, channels)


@hookimpl
def encoders():
    """Bring ``--encoder conv``.

    ``flags``: those that are for this encoder, so that others refuse them by name. With
    ``sleeps``, ``--from RUN`` trains it on images that the decoder of RUN makes up.
    """
    return [
        EncoderSpec(
            "conv",
            "a convolutional network on real-space images",
            build=build,
            flags=frozenset({"conv_channels", "from_run"}),
            sleeps=True,
            defaults={"lr": 1e-3, "lr_end": 2e-5, "batch_size": 128},
        )
    ]


@hookimpl
def train_args(parser):
    """Add a flag of our own to ``train_amort``."""
    parser.add_argument(
        "--conv-channels",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help=f"Channels of the first convolution of --encoder conv (default: {CHANNELS})",
    )
