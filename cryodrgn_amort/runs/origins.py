"""Which command wrote a run, and what its config and checkpoints call what is the same in all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.core import OWN_KEY, InputError
from cryodrgn_amort.models import TOKEN_ENCODER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


__all__ = ["Origin", "origin_of"]


@dataclass(frozen=True)
class Origin:
    """What is particular to the runs of one command.

    Attributes
    ----------
    command
        Its name.
    encoder
        Whether its runs have an encoder that can be asked again: one that is shown particles as
        ours are, centred by poses that are given.
    logvar
        Whether its ``z.EPOCH.pkl`` hold posteriors, and not latents alone.
    finds_poses
        Whether it finds the poses itself: the run's are those of ``pose.EPOCH.pkl``.
    poses_px
        Whether translations there are in pixels, not in fractions of the box.
    """

    command: str
    encoder: bool = True
    logvar: bool = True
    finds_poses: bool = False
    poses_px: bool = False

    def model_args(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``model_args`` that ``train_vae`` would have written."""
        args = {"activation": "relu", **config["model_args"]}  # older ones do not say
        if self.command == "abinit":
            training = config["training"]
            sizes = {"players": training["hypervolume_layers"], "pdim": training["hypervolume_dim"]}
            return {**args, **TOKEN_ENCODER, **sizes}
        if self.command == "train_dec":
            return {**args, **TOKEN_ENCODER, "players": args["layers"], "pdim": args["dim"]}
        return args if self.encoder else {**args, **TOKEN_ENCODER}

    def dataset_args(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``dataset_args`` that ``train_vae`` would have written, but for the poses."""
        args = dict(config["dataset_args"])
        if self.command == "abinit":
            args["norm"] = config["data_norm_mean"], config["data_norm_std"]
            args["window_r"] = config["training"]["window_radius_gt_real"]
        return args

    def state(
        self, checkpoint: Mapping[str, Any], token: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return a checkpoint's weights by the names of ``train_vae``'s model.

        Parameters
        ----------
        token
            Weights of the model as it was built, which what the run has no encoder for keeps.
        """
        state: dict[str, Tensor] = dict(checkpoint["model_state_dict"])
        if self.encoder:
            return state
        if self.command == "abinit":
            names = {"rand_freqs": "rand_freqs", "mlp": "decoder"}
            state = {
                ".".join(["decoder", names[first], *rest]): value
                for name, value in checkpoint["hypervolume_state_dict"].items()
                for first, *rest in [name.split(".")]
            }
        elif self.command == "train_dec":
            state = {f"decoder.{name}": value for name, value in state.items()}
        own = {name: value for name, value in state.items() if name.startswith("decoder.")}
        return {**{k: v for k, v in token.items() if k.startswith("encoder.")}, **own}


_OF_HOST = {
    origin.command: origin
    for origin in (
        Origin("train_vae"),
        Origin("train_dec", encoder=False, logvar=False),
        # its encoder is shown images before their poses are known, so not centred as ours are
        Origin("abinit_het", encoder=False, finds_poses=True),
        Origin("abinit", encoder=False, logvar=False, finds_poses=True, poses_px=True),
    )
}


def origin_of(config: Mapping[str, Any], what: str) -> Origin:
    """Tell which command of the host, or ``train_amort``, wrote a config.

    Raises
    ------
    InputError
        If its runs cannot be read, and why; ``what`` names flag and folder.
    """
    command = _command(config)
    if command in ("train_nn", "abinit_homo"):
        raise InputError(f"{what}: a run of cryodrgn {command}: it has one volume, no latents")
    if command == "abinit_het" and config["dataset_args"].get("particles_tilt") is not None:
        raise InputError(
            f"{what}: a run of cryodrgn {command} with --tilt: tilt pairs are not read"
        )
    if command == "abinit":
        training = config["training"]
        if not training["zdim"]:
            raise InputError(f"{what}: a run of cryodrgn abinit with --zdim 0: it has no latents")
        for name in ("pe_type_conf", "explicit_volume"):
            if training.get(name) not in (None, False, "None"):
                raise InputError(f"{what}: a run of cryodrgn abinit with --{name.replace('_', '-')}"
                                 ", whose decoder is none of train_vae's")  # fmt: skip
    return _OF_HOST[command]


def _command(config: Mapping[str, Any]) -> str:
    if OWN_KEY in config:
        return "train_vae"  # ours are like it
    args = config["model_args"]
    if "data_norm_mean" in config:
        return "abinit"
    if "encode_mode" in args:
        return "train_vae" if "poses" in config["dataset_args"] else "abinit_het"
    if "layers" in args:
        return "train_dec" if "zdim" in args else "train_nn"
    if "qlayers" in args:
        return "abinit_homo"
    raise ValueError("model_args of no command of cryodrgn's")
