"""Read run folders: of ours and of the host's commands."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort import host
from cryodrgn_amort.core import (
    OWN_KEY,
    InputError,
    default_device,
    epochs,
    half_precision,
    odd_rows,
    odd_text,
    read_ind,
    read_pickle,
    read_weights,
    read_yaml,
    read_z,
    without_odd,
)
from cryodrgn_amort.data import load_particles
from cryodrgn_amort.models import AmortVAE, EncoderSpec, build_model, resolve
from cryodrgn_amort.options import TrainSettings, flag_name
from cryodrgn_amort.runs.config import (
    TRAINED,
    settings_of,
    source_of,
)
from cryodrgn_amort.runs.origins import Origin, origin_of

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from cryodrgn_amort.core import Registry
    from cryodrgn_amort.data import EncoderInput, Particles
    from cryodrgn_amort.models import Encoder, InputSpec


__all__ = ["Run", "load_run"]
logger = logging.getLogger("cryodrgn_amort")


@dataclass(frozen=True, repr=False)
class Run:
    """A finished or growing run, of ours or of the host's, at one epoch.

    Attributes
    ----------
    folder
        Where it is.
    epoch
        The epoch whose weights and latents these are.
    final
        Whether they are those in ``weights.pkl`` and ``z.pkl``: there are no others.
    origin
        The command that wrote it.
    config
        What config.yaml holds.
    settings
        What it was trained with.
    encoder, shown
        The kind of its encoder, and of what that is shown; None: of nothing.
    plugins
        Those that it was opened with.
    asked_precision
        What ``--precision`` of another command asks for; None: see ``precision``.
    """

    folder: Path
    epoch: int
    final: bool
    origin: Origin
    config: dict[str, Any]
    settings: TrainSettings
    encoder: EncoderSpec
    shown: InputSpec | None
    plugins: Registry
    asked_precision: str | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def device(self) -> torch.device:
        """Where models and particles are put."""
        return default_device()

    def multiplying(self, precision: str | None) -> Run:
        """Return this run with a decoder that multiplies as asked for; None: as it would."""
        return self if precision is None else replace(self, asked_precision=precision)

    @property
    def precision(self) -> str:
        """Of the decoder's matrix products: what was asked for; else single, but on a GPU as there.

        That is what a training with the run's flags has there.
        """
        if self.asked_precision is not None:
            return self.asked_precision
        half = half_precision(self.device)
        found = self.settings.matmul_precision(half) if half else "fp32"
        return "fp32" if found == "fp64" else found

    @property
    def autodecoder(self) -> bool:
        """Whether it has latents without posteriors: of ``train_dec``, ``abinit``."""
        return not self.origin.logvar

    def file(self, kind: str) -> Path:
        """Return its "config", or its file of "weights", "z" or "pose"."""
        if kind == "config":
            return _config_file(self.folder)
        return _file(self.folder, kind, None if self.final else self.epoch)

    @property
    def shows_particles(self) -> bool:
        """Whether its encoder is shown the particle that it is to encode."""
        return self.shown is not None and self.shown.name == "particle"

    def __repr__(self) -> str:
        s = self.settings
        return f"<Run {self.folder}, epoch {self.epoch}, --encoder {s.encoder}, zdim {s.zdim}>"

    @cached_property
    def z_mu(self) -> np.ndarray:
        """Latents: posterior means of its particles `(N, zdim)`, as saved by the training."""
        return self.z()[0]

    @cached_property
    def z_logvar(self) -> np.ndarray:
        """Log variances of the posteriors `(N, zdim)`; NaN where there are none (train_dec)."""
        return self.z()[1]

    @property
    def n(self) -> int:
        """Number of particles that it was trained on, and has latents of."""
        return len(self.z_mu)

    @cached_property
    def index(self) -> np.ndarray | None:
        """Positions of its particles in the stack `(N,)`, in the order of its latents.

        None: not known, since what ``--ind`` named, or what the run kept of ``--holdout``, is not
        there any more.
        """
        whole = self.whole_index
        return None if whole is None else np.delete(whole, self.odd)

    @cached_property
    def whole_index(self) -> np.ndarray | None:
        """The same with those whose latents are not finite."""
        kept = str(self.folder / TRAINED)
        path = kept if self.settings.holdout is not None else self.settings.ind
        total = self.n + len(self.odd)
        if path is None:
            return np.arange(total)
        if not Path(path).is_file():
            return None
        ind = read_ind(path, f"RUN {self.folder}: --ind")
        return ind if len(ind) == total else None

    def volumes(self, z: np.ndarray) -> np.ndarray:
        """Decode volumes `(M, box, box, box)` at latents `(M, zdim)`, as ``eval_vol`` does.

        For more than fit into memory, see ``decode``; raises what that does.
        """
        decoded = self.decode(z)
        found = np.empty((len(z), *[self.config["lattice_args"]["D"] - 1] * 3), np.float32)
        for number, volume in enumerate(decoded):
            found[number] = volume
        return found

    def decode(self, z: np.ndarray) -> Iterator[np.ndarray]:
        """Decode volumes `(box, box, box)` at latents `(M, zdim)`, one by one.

        Raises
        ------
        InputError
            If the latents do not have the dimensions of the run's.
        """
        z = np.asarray(z, np.float32)
        if z.ndim != 2 or z.shape[1] != self.settings.zdim:
            raise InputError(f"z: has shape {z.shape}, (M, {self.settings.zdim}) is needed")
        if not len(z):
            return iter(())
        model, norm = self.load_decoder()
        decoded = model.decode_volumes(torch.from_numpy(z).to(self.device), norm)
        return (volume.numpy() for volume in decoded)

    def z(self, *, complete: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return the saved means and log variances, each `(N, zdim)`; NaN where it has none.

        Parameters
        ----------
        complete
            Whether those of ``particles(complete=True)`` are wanted: where they are not finite,
            the mean of the others.
        """
        if complete:
            return without_odd(*self._saved)
        mean, logvar = (np.delete(part, self.odd, 0) for part in self._saved)
        return mean, logvar

    @cached_property
    def _saved(self) -> tuple[np.ndarray, np.ndarray]:
        return read_z(self.file("z"), "RUN")

    @cached_property
    def odd(self) -> np.ndarray:
        """Which of the latents that were saved are not finite: positions `(M,)`.

        Their particles are left out, as if they were not the run's.
        """
        found = odd_rows(*self._saved)
        if len(found):
            logger.warning(f"RUN {self.folder}: left out are {odd_text(found)}")
        return found

    @property
    def refined_poses(self) -> Path | None:
        """The file of the poses that its particles have got by this epoch; None: those given."""
        path = self.file("pose")
        there = OWN_KEY in self.config or path.exists()  # the host has none before --pretrain
        return path if self.settings.do_pose_sgd and there else None

    def particles(self, *, complete: bool = False, **moved: Any) -> Particles:
        """Open the particles that it was trained on, with the poses that it has refined, if any.

        Parameters
        ----------
        complete
            Whether those are wanted, too, whose latents are not finite.
        moved
            ``INPUTS`` that are others now, if not None.
        """
        given = {name: path for name, path in moved.items() if path is not None}
        return self.open(**given, without=() if complete else tuple(self.odd.tolist()))

    def held_out(self, **moved: Any) -> Particles | None:
        """Open the particles that were held out from it, if there are any."""
        if self.settings.holdout is None:
            return None
        given = {name: path for name, path in moved.items() if path is not None}
        return self.open(**given, held_out=True)

    def open(self, **given: Any) -> Particles:
        """Open particles as it sees them; ``given`` are fields of ``ParticleSource``.

        Poses that it has refined are those of its own particles: of others, ``poses`` or
        ``refined`` has to be given.
        """
        for name in ("dose_per_tilt", "angle_per_tilt"):
            if given.get(name) is None:
                given.pop(name, None)
            elif not self.settings.tilted:
                raise InputError(f"{flag_name(name)}: RUN {self.folder} is not of tilt series")
        refined = self.refined_poses
        others = "refined" in given or given.get("poses") is not None or given.get("held_out")
        if refined and not others:
            given.update(refined=str(refined), refined_px=self.origin.poses_px)
        source = replace(source_of(self.settings), **given)
        return load_particles(source, self.device, whole=self.settings.enc_mask == -1)

    def load(self, particles: Particles) -> tuple[AmortVAE, EncoderInput | None]:
        """Load the model, and what its encoder was shown in training.

        A table is not loaded: its latents are those of ``z()``, and the model only decodes.

        Raises
        ------
        InputError
            If particles are left out to which what the others are shown belongs.
        """
        amort = self.encoder.make(self.settings, particles) if self.encoder.shown_images else None
        model, own = self._model(particles.lattice, amort)
        if self.shown is None:
            return model, None
        if particles.left_out and not self.shows_particles:  # its permutation, the noise of row i
            raise InputError(
                f"RUN {self.folder}: {odd_text(self.odd)}; --encoder {self.settings.encoder} needs "
                "every particle: infer_amort fits them anew, and what it writes can be evaluated"
            )
        shown = self.shown.build(self.settings, particles)
        try:
            shown.load_state_dict(own.get("input_state", {}))
        except InputError as err:
            raise InputError(f"RUN {self.folder}: {err}") from None
        return model, shown

    def load_decoder(self) -> tuple[AmortVAE, tuple[float, float]]:
        """Load a model that decodes, and the normalisation of its images; needs no particles."""
        args = self.config["lattice_args"]
        lattice = host.Lattice(args["D"], extent=args["extent"], device=self.device)
        assert self.settings.norm is not None
        return self._model(lattice, None)[0], self.settings.norm

    def _model(
        self, lattice: host.Lattice, amort: Encoder | None
    ) -> tuple[AmortVAE, dict[str, Any]]:
        """Load the model in evaluation mode; also returns our part of the checkpoint."""
        path = self.file("weights")
        checkpoint = read_weights(path, "RUN")
        own = checkpoint.get(OWN_KEY, {})
        model = build_model(self.origin.model_args(self.config), lattice, amort, self.precision)
        try:
            state = self.origin.state(checkpoint, model.state_dict())
        except (KeyError, AttributeError):
            raise InputError(f"RUN {path}: a damaged checkpoint, or of another command") from None
        model.restore(state, own["encoder_state_dict"] if amort is not None else {}, f"RUN {path}")
        model.eval()
        return model, own


def load_run(
    folder: str | os.PathLike[str], plugins: Registry, epoch: int | None = None, flag: str = "RUN"
) -> Run:
    """Open a run folder of ``train_amort``, or of the host's commands that find latents.

    Those are ``train_vae``, ``train_dec``, ``abinit`` and ``abinit_het``. Where there are no files
    of single epochs, the final ones are opened.

    Parameters
    ----------
    epoch
        Which epoch; the latest one that is complete unless given.
    flag
        What named the folder.

    Raises
    ------
    InputError
        If the folder is no such run, or does not have that epoch.
    """
    path, what = Path(folder), f"{flag} {folder}"
    config_path = _config_file(path)
    if not config_path.is_file():
        raise InputError(f"{what}: not a run folder (it has no config.yaml)")
    is_old = config_path.suffix == ".pkl"
    config = read_pickle(config_path, flag) if is_old else read_yaml(config_path, flag)
    try:
        origin = origin_of(config, what)
        known = epochs(path)
        final = not known and all(_file(path, kind).is_file() for kind in ("weights", "z"))
        if final:
            known = [read_weights(_file(path, "weights"), flag)["epoch"]]
        if not known:
            raise InputError(f"{what}: no epoch has both weights and z yet")
        if epoch is not None and epoch not in known:
            listed = ", ".join(map(str, known))
            raise InputError(f"--epoch {epoch}: {folder} does not have it; it has {listed}")
        epoch = known[-1] if epoch is None else epoch
        poses = _file(path, "pose", None if final else epoch)
        settings = settings_of(config, origin, path, poses)
    except InputError:
        raise
    except Exception as err:
        raise InputError(f"{flag} {config_path}: damaged ({type(err).__name__}: {err})") from None
    named = resolve(settings, plugins)
    return Run(path, epoch, final, origin, config, settings, *named, plugins)


def _file(folder: Path, kind: str, epoch: int | None = None) -> Path:
    """Return a run's file of some kind: of an epoch, or the final one."""
    return folder / (f"{kind}.pkl" if epoch is None else f"{kind}.{epoch}.pkl")


def _config_file(folder: Path) -> Path:
    """Return config.yaml, or the config.pkl of cryodrgn before version 2 if only that is there."""
    new, old = folder / "config.yaml", folder / "config.pkl"
    return old if old.is_file() and not new.is_file() else new
