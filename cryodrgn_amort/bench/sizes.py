"""What ``bench`` compares, and in which sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = [
    "BATCH",
    "FULL",
    "GIB",
    "GPU",
    "GPU_TOY",
    "QUICK",
    "ZDIM",
    "Command",
    "GpuSizes",
    "Shape",
    "Sizes",
    "variants",
]

ZDIM, BATCH = 8, 16
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Of a training step: box in pixels, width of the layers, images in a batch."""

    box: int
    width: int
    batch: int
    layers: int = 3

    def __str__(self) -> str:
        return f"{self.box} / {self.width} / {self.batch}"

    @property
    def bytes_needed(self) -> int:
        """Memory for a host at work and one at rest, by a generous rule of thumb."""
        return 40 * self.box**2 * self.batch * self.width + 2 * GIB


@dataclass(frozen=True)
class Command:
    """A training by the host, ``train_vae`` or ``train_dec``, and the same by ``train_amort``."""

    host: str
    n: int
    box: int
    width: int
    layers: int = 3
    epochs: int = 1
    images: int | None = None
    """So many are trained on before it is stopped; None: to the end."""

    def __str__(self) -> str:
        return f"{self.n:,} of {self.box} px, {self.layers} x {self.width}"

    @property
    def until(self) -> str | None:
        """What host and ours print when it is to be stopped."""
        return None if self.images is None else f"[{self.images}/{self.n} "

    def argv(self, command: str, files: Mapping[str, str], outdir: str) -> list[str]:
        """Return the arguments of the training by ``command``, without a run of ``analyze``."""
        layers, width, table = str(self.layers), str(self.width), self.host == "train_dec"
        if command == "train_dec":
            network = ["--layers", layers, "--dim", width]
        else:
            network = ["--dec-layers", layers, "--dec-dim", width]
            network += [] if table else ["--enc-layers", layers, "--enc-dim", width]
        if self.images is not None:
            network += ["--log-interval", str(self.images)]
        mode = ["--encoder", "vlt"] if table else []
        if command == self.host:
            mode = ["--no-amp"]
        return [
            command, files["particles"], "--poses", files["poses"], "--ctf", files["ctf"],
            "--zdim", str(ZDIM), "-n", str(self.epochs), "-b", str(BATCH), "--seed", "0",
            "--no-analysis", "-o", outdir, *network, *mode,
        ]  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is measured, for how long."""

    shapes: tuple[Shape, ...]
    table_rows: tuple[int, ...]
    commands: tuple[Command, ...]
    memory: tuple[Command, ...]
    fits: tuple[Shape, ...]
    fit_steps: int
    rounds: int
    seconds: float


FULL = Sizes(
    shapes=(
        Shape(64, 256, 16), Shape(64, 256, 64), Shape(128, 256, 16), Shape(128, 256, 64),
        Shape(64, 1024, 16), Shape(128, 1024, 8),
    ),
    table_rows=tuple(10**power for power in range(3, 8)),
    commands=(
        Command("train_vae", 1000, 64, 256), Command("train_dec", 1000, 64, 256),
        Command("train_dec", 100_000, 32, 32, layers=2),
    ),
    memory=(
        Command("train_vae", 10_000, 128, 256, images=8 * BATCH),
        Command("train_dec", 10_000, 128, 256, images=8 * BATCH),
    ),
    fits=(Shape(32, 64, 256), Shape(32, 256, 32)),
    fit_steps=200,
    rounds=3,
    seconds=1.0,
)  # fmt: skip
QUICK = Sizes(
    shapes=(Shape(16, 16, 4, layers=1),),
    table_rows=(1000,),
    commands=(Command("train_vae", 32, 16, 16, layers=1),),
    memory=(Command("train_dec", 64, 16, 16, layers=1, images=2 * BATCH),),
    fits=(Shape(16, 16, 4, layers=1),),
    fit_steps=4,
    rounds=1,
    seconds=0.01,
)


@dataclass(frozen=True)
class GpuSizes:
    """What is measured on a GPU.

    Attributes
    ----------
    n
        Particles of a training step, at least.
    second, evaluated
        Of the second stage and of fits, and of an evaluation with so many particles.
    """

    shapes: tuple[Shape, ...]
    n: int
    table_rows: int
    second: Shape
    fit_steps: int | None
    evaluated: Shape
    evaluated_n: int


GPU = GpuSizes(
    shapes=tuple(
        Shape(box, width, batch)
        for box in (64, 128, 256) for width in (256, 1024) for batch in (8, 64)
    ),
    n=256,
    table_rows=10**6,
    second=Shape(128, 256, 64),
    fit_steps=None,
    evaluated=Shape(64, 256, 64),
    evaluated_n=20_000,
)  # fmt: skip
GPU_TOY = GpuSizes(
    shapes=(Shape(16, 16, 8, layers=1),),
    n=32,
    table_rows=1000,
    second=Shape(16, 16, 16, layers=1),
    fit_steps=10,
    evaluated=Shape(16, 16, 16, layers=1),
    evaluated_n=64,
)


def variants(
    command: Command, precisions: Collection[str] = ()
) -> list[tuple[str, str, list[str]]]:
    """Return what is compared: its name, the command, more flags; ours in each precision given."""
    ours = "train_amort --encoder vlt" if command.host == "train_dec" else "train_amort"
    found: list[tuple[str, str, list[str]]] = [(command.host, command.host, [])]
    for flags in [["--precision", p] for p in precisions] or [[]]:
        found.append((" ".join([ours, *flags]), "train_amort", flags))
    return found
