"""The flags of ``train_amort`` on a parser: those of ``train_vae``, ours, and those of plugins."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cryodrgn_amort import host
from cryodrgn_amort.core import abbreviate, actions_of
from cryodrgn_amort.options import REPLACED, TrainSettings, add_flags

if TYPE_CHECKING:
    from cryodrgn_amort.core import Registry

__all__ = ["add_train_flags"]

_HELP = {  # where the host's is not what it does, or not all that we do
    "do_pose_sgd": "Refine poses with gradient descent, in either --domain; RUN/pose.pkl has them",
    "pretrain": "First epoch in which poses are moved (default: 1)",
    "num_epochs": "Number of training epochs (default: 20; with --from and an encoder that learns\n"
    "from images made up, as many as make 500,000 of them)",
    "emb_type": "Without effect, as in train_vae, which refines s2s2",
}
_FORMER = {  # flags of older hosts, which tutorials and scripts still have: their names now
    "--qdim": ("qdim", int), "--qlayers": ("qlayers", int), "--pdim": ("pdim", int),
    "--players": ("players", int), "--amp": ("amp", bool), "--relion31": ("relion31", bool),
}  # fmt: skip


def add_train_flags(parser: argparse.ArgumentParser, plugins: Registry) -> None:
    """Add every flag of ``train_vae``, then ours; a flag that is not given leaves no trace."""
    host.add_train_vae_args(parser)
    of_host = list(actions_of(parser))
    for action in of_host:
        if action.dest == "help":
            continue
        if action.help:  # the defaults are about to go
            action.help = action.help.replace("%(default)s", str(action.default))
        action.help = _HELP.get(action.dest, action.help)
        if action.dest in REPLACED:
            action.help = f"Not here: {REPLACED[action.dest]}"
        action.default = argparse.SUPPRESS
        if action.dest in ("particles", "poses", "zdim"):
            action.required = False  # a recipe or --from may set it
        if action.dest == "particles":
            action.nargs, action.type = "?", None  # the type would change the default
    add_flags(parser, TrainSettings)
    plugins.add_train_args(parser)
    for action in actions_of(parser):
        action.default = argparse.SUPPRESS  # also what plugins added
    abbreviate(parser, of_host)
    for name, (dest, kind) in _FORMER.items():
        more: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(
            name, dest=dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **more
        )
