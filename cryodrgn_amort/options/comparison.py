"""What ``compare_amort`` and ``time_amort`` are asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from cryodrgn_amort.options.fields import Options, flag

__all__ = ["CompareOptions", "TimingOptions"]


@dataclass(frozen=True)
class CompareOptions(Options):
    """What ``compare_amort`` is asked to do."""

    volumes: int = flag(
        "--volumes", default=20, least=0, metavar="N",
        help="Particles whose decoded volumes are compared; 0: none",
    )  # fmt: skip
    clusters: int = flag("--clusters", default=10, least=2, metavar="K", help="k of the k-means")
    bootstrap: int = flag(
        "--bootstrap", default=200, least=0, metavar="N", help="Rounds for the 95 %% intervals"
    )
    seed: int = flag("--seed", default=0, least=0, help="Random seed")


@dataclass(frozen=True)
class TimingOptions(Options):
    """What ``time_amort`` is asked to do. A round more, before the others, is not counted."""

    rounds: int = flag("--rounds", default=6, least=1, metavar="N", help="Turns of each run")
    batches: int = flag("--batches", default=25, least=1, metavar="N", help="Batches in a turn")
