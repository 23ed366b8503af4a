"""The only importer of ``cryodrgn``: what we use of it, and what differs between its versions.

Supported span: cryodrgn >= 4.2, < 5.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import logging
import os
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

import matplotlib

with warnings.catch_warnings():  # the host's imports warn of their own dependencies
    warnings.simplefilter("ignore")
    from cryodrgn import __version__ as VERSION
    from cryodrgn.beta_schedule import get_beta_schedule
    from cryodrgn.ctf import compute_ctf
    from cryodrgn.dataset import ImageDataset, TiltSeriesData, make_dataloader
    from cryodrgn.fft import fftn_center, ht2_center, iht2_center, ihtn_center, symmetrize_ht
    from cryodrgn.lattice import Lattice
    from cryodrgn.lie_tools import s2s2_to_rotmat
    from cryodrgn.models import FTPositionalDecoder, HetOnlyVAE, ResidLinearMLP
    from cryodrgn.mrcfile import MRCHeader, parse_mrc, write_mrc as _write_mrc
    from cryodrgn.pose import PoseTracker
    from cryodrgn.source import (
        CsSource,
        ImageSource,
        MRCFileSource,
        TxtFileSource,
        parse_star,
    )

from cryodrgn_amort.core import actions_of, naming, replaced

logging.getLogger("cryodrgn_amort").disabled = False  # the host disables all that there are

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch

__all__ = [
    "VERSION",
    "FTPositionalDecoder",
    "HetOnlyVAE",
    "ImageDataset",
    "ImageSource",
    "Lattice",
    "MRCHeader",
    "PoseTracker",
    "ResidLinearMLP",
    "TiltSeriesData",
    "add_train_vae_args",
    "analyze",
    "any_suffix",
    "backproject",
    "compute_ctf",
    "eval_volume",
    "fftn_center",
    "get_beta_schedule",
    "ht2_center",
    "iht2_center",
    "make_dataloader",
    "parse_mrc",
    "parse_star",
    "preprocess",
    "quiet",
    "s2s2_to_rotmat",
    "save_config",
    "symmetrize_ht",
    "train_batch",
    "train_vae_defaults",
    "training_steps",
    "volume_of",
    "write_mrc",
]


# What train_vae imports for the notebooks that `analyze` copies: four of ten seconds.
_FOR_NOTEBOOKS = "nbformat"
_NEIGHBOURS = 15  # of UMAP
_MORE_STACKS = (".map", ".st")


def add_train_vae_args(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` every flag of the installed ``cryodrgn train_vae``."""
    _train_vae().add_args(parser)


@functools.cache
def train_vae_defaults() -> dict[str, Any]:
    """Return the defaults of the flags of the installed ``cryodrgn train_vae``, by argument."""
    parser = argparse.ArgumentParser()
    add_train_vae_args(parser)
    return {action.dest: action.default for action in actions_of(parser)}


def _train_vae() -> Any:
    """Import it when it is needed: half the time of all our imports goes into what it imports."""
    with warnings.catch_warnings(), _same_backend():
        warnings.simplefilter("ignore")
        if "cryodrgn.commands.train_vae" not in sys.modules:
            _import_later(_FOR_NOTEBOOKS)
        from cryodrgn.commands import train_vae
    return train_vae


class _Later(types.ModuleType):
    """Stands for a module that is imported when something of it is used.

    ``importlib.util.LazyLoader`` loads it as soon as there is another ``import`` of it.
    """

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        found = importlib.import_module(self.__name__)
        vars(self).update(vars(found))
        return getattr(found, name)


def _import_later(name: str) -> None:
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is not None:
        sys.modules[name] = later = _Later(name)
        later.__file__ = spec.origin


@contextlib.contextmanager
def _same_backend() -> Iterator[None]:
    """Keep the backend that matplotlib was told to use, if it was; close what is drawn meanwhile.

    The host chooses Agg for good. In a notebook, whose kernel names its backend, nothing that
    pyplot draws would be shown any more, not even with the backend set back.
    """
    if "MPLBACKEND" not in os.environ:
        yield
        return
    from matplotlib import pyplot as plt

    before = plt.get_fignums()
    try:
        with replaced(matplotlib, "use", lambda *args, **kwargs: None):
            yield
    finally:
        for number in set(plt.get_fignums()).difference(before):
            plt.close(number)


def write_mrc(path: str, array: np.ndarray, **header: Any) -> None:
    """Write volumes or images as the host does; an OSError names the file."""
    with naming(path):
        _write_mrc(path, array, **header)


def preprocess(images: ImageDataset, raw: torch.Tensor) -> torch.Tensor:
    """Window, invert, Hartley-transform, symmetrise and normalise as ``train_vae`` does.

    Parameters
    ----------
    raw
        Real-space images `(B, box, box)`; left untouched.

    Returns
    -------
    torch.Tensor
        `(B, box + 1, box + 1)`, origin at the centre, float32.
    """
    if images.window is not None and images.window.device != raw.device:
        images.window = images.window.to(raw.device)
    processed: torch.Tensor = images._process(raw.clone())[1]
    # the host drops the batch axis of a single image
    return processed.view(len(raw), images.D, images.D)


def save_config(
    settings: dict[str, Any], images: ImageDataset, lattice: Lattice, path: str
) -> None:
    """Write config.yaml as ``train_vae`` does.

    Parameters
    ----------
    settings
        Values of train_vae's flags, by the host's argument names; its defaults for the rest.
    """
    parser = argparse.ArgumentParser()
    add_train_vae_args(parser)
    args = parser.parse_args(["particles", "-o", "out", "--zdim", "1", "--poses", "poses"])
    vars(args).update(settings)
    _train_vae().save_config(args, images, lattice, None, path)


def eval_volume(
    decoder: Any, lattice: Lattice, norm: tuple[float, float], z: np.ndarray
) -> torch.Tensor:
    """Decode one volume `(box, box, box)` at latent `z` `(zdim,)`, density positive."""
    volume: torch.Tensor = decoder.eval_volume(
        lattice.coords, lattice.D, lattice.extent, norm, z
    ).cpu()
    return volume


def volume_of(hartley: torch.Tensor, norm: tuple[float, float]) -> torch.Tensor:
    """Transform a decoded Hartley volume `(D, D, D)` to real space, `(box, box, box)`."""
    scaled = hartley * norm[1] + norm[0]
    volume: torch.Tensor = ihtn_center(scaled[:-1, :-1, :-1])
    return volume


def analyze(run_folder: str, epoch: int, n: int, zdim: int) -> str | None:
    """Run ``cryodrgn analyze RUN EPOCH`` with its defaults, as far as there are particles for it.

    Parameters
    ----------
    n, zdim
        How many particles there are, and dimensions of their latents.

    Returns
    -------
    str
        What is left out, and why; None: nothing.
    """
    if n < zdim > 1:
        return f"its principal components need {zdim} particles, there are {n}"
    with _same_backend():
        from cryodrgn.commands import analyze as host_analyze

        parser = argparse.ArgumentParser()
        host_analyze.add_args(parser)
        argv, left_out = [run_folder, str(epoch)], []
        if zdim > 1 and n < parser.get_default("ksample"):
            argv += ["--ksample", str(n)]
            left_out.append(f"k-means has {n} clusters, one for each particle")
        if n <= _NEIGHBOURS and zdim > 2:
            argv += ["--skip-umap"]
            left_out.append(f"UMAP needs more than {_NEIGHBOURS} particles")
        host_analyze.main(parser.parse_args(argv))
    return "; ".join(left_out) or None


def backproject(
    particles: str, poses: str, ctf: str | None, ind: str, outdir: str,
    *, datadir: str | None, invert: bool, lazy: bool,
) -> np.ndarray:  # fmt: skip
    """Run ``cryodrgn backproject_voxel``; returns its map, `(box, box, box)`."""
    from cryodrgn.commands import backproject_voxel

    parser = argparse.ArgumentParser()
    backproject_voxel.add_args(parser)
    argv = [particles, "--poses", poses, "--ind", ind, "-o", outdir, "--no-half-maps"]
    argv += [] if ctf is None else ["--ctf", ctf]
    argv += [] if datadir is None else ["--datadir", datadir]
    argv += [] if invert else ["--uninvert-data"]
    with quiet():
        backproject_voxel.main(parser.parse_args([*argv, *(["--lazy"] if lazy else [])]))
    found: np.ndarray = parse_mrc(os.path.join(outdir, "backproject.mrc"))[0]
    return found


@contextlib.contextmanager
def any_suffix() -> Iterator[None]:
    """Let the host read stacks and tables by names of theirs that it does not know.

    It goes by the last letters alone, in small ones; of .star files it insists on these.
    """
    known = ImageSource.from_file

    def from_file(filepath: str, **given: Any) -> ImageSource:
        suffix = os.path.splitext(filepath)[1]
        kind = suffix.lower()
        if suffix == kind and kind not in _MORE_STACKS:
            return known(filepath, **given)
        if kind in (".mrc", ".mrcs", *_MORE_STACKS):
            return MRCFileSource(filepath, lazy=given["lazy"], indices=given.get("indices"))
        source = {".cs": CsSource, ".txt": TxtFileSource}[kind]
        if kind == ".txt":
            given.pop("datadir", None)
        return source(filepath, **given)

    with replaced(ImageSource, "from_file", staticmethod(from_file)):
        yield


class quiet:
    """Silence the host's loggers for a while; its messages would repeat ours."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("cryodrgn")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *exc: object) -> None:
        self._logger.setLevel(self._level)


def training_steps(
    particles: str,
    poses: str,
    ctf: str,
    *,
    zdim: int,
    width: int,
    layers: int,
    batch_size: int,
    device: torch.device | None = None,
    amp: bool = False,
) -> Iterator[int]:
    """Prepare ``train_vae``'s own steps, epoch after epoch: what ours are timed against.

    Its ``main`` with its defaults, without logging and checkpoints: each step loads a batch, looks
    up poses and CTF, and calls its ``train_batch``.

    Parameters
    ----------
    width, layers
        Of the encoder and of the decoder.
    device, amp
        Where, None: on the CPU; and whether in mixed precision, as without ``--no-amp``.

    Returns
    -------
    Iterator
        Takes a step at each ``next``, and yields how many images were in the batch.
    """
    import torch
    from cryodrgn.ctf import load_ctf_for_training

    train_vae, device = _train_vae(), device or torch.device("cpu")
    with quiet():
        images = ImageDataset(particles, lazy=False, invert_data=True, device=device)
        tracker = PoseTracker.load(poses, images.N, images.D, None, None, device=device)
        ctf_params = torch.tensor(load_ctf_for_training(images.D - 1, ctf), device=device)
        loader = make_dataloader(images, batch_size=batch_size)
    lattice = Lattice(images.D, extent=0.5, device=device)
    mask = lattice.get_circular_mask(images.D // 2)
    model = HetOnlyVAE(
        lattice, layers, width, layers, width, int(mask.sum()), zdim,
        encode_mode="resid", enc_mask=mask, enc_type="gaussian", domain="fourier", feat_sigma=0.5,
    ).to(device)  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler(device.type) if amp else None

    def steps() -> Iterator[int]:
        while True:
            for batch in loader:
                index = batch["index"].to(device)
                rot, trans = tracker.get_pose(index)
                train_vae.train_batch(
                    model, lattice, batch["y"].to(device), None, rot, trans, optimizer, 1 / zdim,
                    ctf_params=ctf_params[index], use_amp=amp, scaler=scaler,
                )  # fmt: skip
                yield len(index)

    return steps()


def train_batch(
    model: Any, particles: Any, index: torch.Tensor, beta: float, *, double: bool = False
) -> float:
    """Differentiate the loss of some particles by the host's own step; returns it.

    Gradients are left with the parameters, which stay as they are.

    Parameters
    ----------
    particles
        Our ``Particles``, which have all that the host's step wants.
    double
        Whether in double precision, as the model is.
    """
    import torch

    kind = torch.float64 if double else torch.float32
    p, device, lattice = particles, particles.device, copy.copy(particles.lattice)
    lattice.coords, lattice.freqs2d = lattice.coords.to(kind), lattice.freqs2d.to(kind)
    with torch.no_grad():
        y = p.hartley(p.raw(index)).to(kind)
    at = index.to(device)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    trans = None if p.trans is None else p.trans[at].to(kind)
    ctf = None if p.ctf_params is None else p.ctf_params[at].to(kind)
    found = _train_vae().train_batch(
        model, lattice, y, None, p.rots[at].to(kind), trans, still, beta, None, ctf_params=ctf
    )
    return float(found[0])
