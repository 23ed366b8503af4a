"""Flags of ``train_amort`` that concern some of our encoders alone.

Their values are in ``TrainSettings.extra``, as those of plugins are: only those that were given.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from cryodrgn_amort.core import InputError
from cryodrgn_amort.options.fields import Options, flag

__all__ = ["LINEAR", "STARTS", "AnchorFlags", "TableFlags", "TurnFlags"]

LINEAR = "linear"
STARTS = ("normal", "zeros", LINEAR)
"""Starts of a table by name."""

_TABLE = "Lookup table (--encoder vlt)"
_TURNS = "Decoder and encoder in turns (--encoder alternate)"


def _start(text: str) -> str:
    return text if text in STARTS else os.path.abspath(text)


@dataclass(frozen=True)
class TableFlags(Options):
    """Of the lookup table."""

    table_init: str = flag(
        "--table-init", default="normal", group=_TABLE, type=_start,
        metavar="normal|zeros|linear|PATH",
        help="Start of the means: N(0,1), 0, or the means and log variances of a linear model\n"
        "(principal components of the structures, found before training), of a z.pkl or of a\n"
        "finished run's folder",
    )  # fmt: skip
    table_logvar: float = flag(
        "--table-logvar", default=-4.0, group=_TABLE,
        help="Start of the log variances (default: -4, or those of --table-init)",
    )  # fmt: skip
    table_lr: float = flag(
        "--table-lr", default=3e-2, above=0,
        wanted="must be positive; --table-freeze keeps the table fixed", group=_TABLE,
        help="Learning rate of the table's own Adam. A row is visited once per epoch, so at the\n"
        "decoder's rate it would hardly move",
    )  # fmt: skip
    table_lr_end: float | None = flag(
        "--table-lr-end", default=None, above=0, group=_TABLE,
        help="What that rate falls to by the last epoch, along half a cosine, so that rows end\n"
        "where their posteriors are (default: it stays the same)",
    )  # fmt: skip
    table_freeze: bool = flag(
        "--table-freeze", default=False, group=_TABLE,
        help="Keep the table as it starts and train the decoder only",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not abs(self.table_logvar) < float("inf"):
            raise InputError(f"--table-logvar {self.table_logvar}: must be finite")


@dataclass(frozen=True)
class AnchorFlags(Options):
    """Of ``--encoder anchored``: each anchor costs a decoded image per particle that it encodes."""

    anchors: int = flag(
        "--anchors", default=16, least=2, wanted="at least 2 are needed",
        group="Second stage (--from)", metavar="K",
        help="Latents that --encoder anchored compares with",
    )  # fmt: skip


@dataclass(frozen=True)
class TurnFlags(Options):
    """Of ``--encoder alternate``, beside its anchors and its table's rates."""

    rounds: int = flag(
        "--rounds", default=2, least=1, group=_TURNS, metavar="R",
        help="How often the encoder has its turn; between two, the decoder is trained on its\n"
        "answers. Fewer if particles held out (--holdout) say that it does not help",
    )  # fmt: skip
    l_start: int | None = flag(
        "--l-start", default=None, least=2, group=_TURNS, metavar="PX",
        help="Latents are found at spatial frequencies up to so many Fourier pixels; the decoder\n"
        "sees all in its last turn (default: where the signal has a twentieth of the noise's\n"
        "power, by what the decoder has learnt in a tenth of the table's epochs)",
    )  # fmt: skip
