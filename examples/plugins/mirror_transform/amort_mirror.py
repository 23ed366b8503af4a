"""A new transform: the particle as it looks from behind.

A projection seen from the opposite side is its mirror image. So a mirrored particle is an image of
the same molecule, of the same hand, if its pose is turned by half a turn about the mirror axis
with it - at the old pose it would be one of the other hand. (This holds where the projection
theorem does, which cryoDRGN's decoder has built in: the curvature of the Ewald sphere is
neglected.) Install it beside cryodrgn_amort and ask an encoder whether it knows the back of what
it has seen the front of:

    pip install ./examples/plugins/mirror_transform
    cryodrgn eval_amort baseline --transform mirror
"""

from __future__ import annotations

import torch

from cryodrgn_amort import hookimpl
from cryodrgn_amort.core import InputError
from cryodrgn_amort.data import Transform, TransformSpec

ASTIGMATISM_ANGLE = 3  # of the CTF parameters


class Mirror(Transform):
    """Swap left and right. The true latent stays: image, pose and CTF change together.

    ``eval_amort`` reports a ``control``, which is 0 if they do.
    """

    title = "seen from behind"

    def image(self, raw):
        """Mirror images `(B, box, box)` about pixel box / 2, the origin.

        An even number of pixels has its middle half a pixel further left: hence the roll.
        """
        return torch.roll(raw.flip(-1), 1, -1)

    def hartley(self, y):
        """Do the same to preprocessed images `(B, box + 1, box + 1)`; here just as exact.

        This method may be left out; it spares windows and Fourier transforms.
        """
        return y.flip(-1)

    def pose(self, rot, trans_px):
        """Turn by 180 degrees about y, the mirror axis: x and z change their signs.

        ``rot`` takes the volume to the view; what is done to the view is multiplied from the left.
        """
        behind = rot.new_tensor([[-1, 0, 0], [0, 1, 0], [0, 0, -1]])
        return behind @ rot, trans_px * trans_px.new_tensor([-1, 1])

    def ctf(self, params):
        """The axis of astigmatism is mirrored with the image; all else is round."""
        params = params.clone()
        params[:, ASTIGMATISM_ANGLE] *= -1
        return params


def build(argument: str | None, particles) -> Mirror:
    """Take what stands behind the colon of ``--transform mirror:ARGUMENT``; None: nothing."""
    if argument is not None:
        raise InputError(f"--transform mirror:{argument}: mirror takes no argument")
    return Mirror()


@hookimpl
def transforms():
    """Bring ``--transform mirror``."""
    return [TransformSpec("mirror", "mirrored left to right: seen from behind", build)]
