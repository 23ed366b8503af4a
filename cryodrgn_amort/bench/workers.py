"""What ``bench`` times. Each task runs in a process of its own: ``python -m ... TASK ARGUMENTS``.

A task is an iterator: each ``next`` does a piece of work and yields how many units (images, steps,
rows) were done, or 0 for a preparation, whose time does not count. A job does one thing and
returns what it found. Arguments and answers are JSON, an answer a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from cryodrgn_amort.core import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["JOBS", "TASKS", "serve"]

_TABLE_BATCH = 16
_TABLE_BATCHES = 1000
_MISSED = 200
"""Steps before a flush: more change nothing, momentum has died away by then."""


def _use_onednn() -> None:
    from cryodrgn_amort.core import use_onednn

    if use_onednn() is None:
        raise InputError(f"torch {torch.__version__} has no switch to oneDNN; 2.9 has")


def host_steps(*, onednn: bool, **arguments: Any) -> Iterator[int]:
    """Prepare the host's optimizer steps; arguments as ``host.training_steps``."""
    from cryodrgn_amort import host

    if onednn:
        _use_onednn()
    return host.training_steps(**arguments)


def our_steps(
    particles: str, poses: str, ctf: str, *, zdim: int, width: int, layers: int, batch_size: int,
    precision: str,
) -> Iterator[int]:  # fmt: skip
    """Prepare ours, as ``train_amort`` with the flags of these names does."""
    from cryodrgn_amort.plugins import load_plugins
    from cryodrgn_amort.runs import settings_from_flags
    from cryodrgn_amort.training import Trainer, endless_steps

    flags = {
        "particles": particles, "poses": poses, "ctf": ctf, "zdim": zdim, "seed": 0,
        "outdir": str(Path(particles).parent / "never-written"), "batch_size": batch_size,
        "qdim": width, "pdim": width, "qlayers": layers, "players": layers, "precision": precision,
    }  # fmt: skip
    plugins = load_plugins()
    trainer = Trainer(settings_from_flags(flags, plugins), plugins)
    return (batch_size for _ in endless_steps(trainer))


def fit_steps(
    particles: str, poses: str, ctf: str, *, zdim: int, width: int, layers: int, batch_size: int,
    steps: int, alone: bool,
) -> Iterator[int]:  # fmt: skip
    """Prepare the fitting of posteriors, so many steps for each particle; units are image steps.

    Parameters
    ----------
    alone
        Whether to do no more than the decoder's forward and backward pass, for as many images.
    """
    import math

    from cryodrgn_amort.core import matrix_products
    from cryodrgn_amort.data import BatchLoader
    from cryodrgn_amort.inference import ElboScale, FitOptions, infer
    from cryodrgn_amort.plugins import load_plugins
    from cryodrgn_amort.runs import settings_from_flags
    from cryodrgn_amort.training import Trainer

    flags = {
        "particles": particles, "poses": poses, "ctf": ctf, "zdim": zdim, "seed": 0,
        "outdir": str(Path(particles).parent / "never-written"), "pdim": width, "players": layers,
        "encoder": "vlt",
    }  # fmt: skip
    plugins = load_plugins()
    trainer = Trainer(settings_from_flags(flags, plugins), plugins)
    model, n = trainer.model.requires_grad_(False), trainer.particles.n
    loader = BatchLoader(trainer.particles, None, memory=0)
    # as if no particle ever stopped getting better
    options = FitOptions(steps=steps, tolerance=-math.inf)
    start = torch.zeros(batch_size, zdim), torch.full((batch_size, zdim), -2.0)
    with matrix_products():
        for first in range(0, 2**40, batch_size):
            batch = loader.read((torch.arange(batch_size) + first) % n)
            if alone:
                z = torch.randn(batch_size, zdim).requires_grad_()
                for _ in range(steps):
                    torch.autograd.grad(model.errors(batch, z)[0], z)
                    yield batch_size
                continue
            ones = torch.ones(zdim)
            infer(model, batch, None, {"mean": start}, ElboScale(1 / zdim), options, ones, 0)
            yield batch_size * steps


def half_plane(box: int) -> int:
    """Count the pixels of one half of the masked Fourier plane, without its centre."""
    radius = box // 2
    axis = range(-radius, radius + 1)
    return sum(0 < x * x + y * y <= radius * radius for x in axis for y in axis) // 2


def features(box: int) -> int:
    """Count the features that encode a coordinate: sine and cosine of 3 (box / 2) frequencies."""
    return 6 * (box // 2)


def floor_steps(*, box: int, width: int, layers: int, gemm: str) -> Iterator[int]:
    """Multiply the matrices of the decoder's forward and backward pass of one image, no more.

    Half of the plane is enough for a real volume. Coordinates need no gradient.

    Parameters
    ----------
    gemm
        "mkl" or "onednn", both float32, or "bf16".
    """
    if gemm == "onednn":
        _use_onednn()
    dtype = torch.bfloat16 if gemm == "bf16" else torch.float32
    h, encoded = half_plane(box), features(box)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns).to(dtype)

    encoding, hidden, grad, out = (matrix(h, n) for n in (encoded, width, width, width))
    first, weight = matrix(width, encoded), matrix(width, width)
    d_first, d_weight = torch.empty_like(first), torch.empty_like(weight)
    while True:
        torch.mm(encoding, first.t(), out=out)
        for _ in range(layers):
            torch.mm(hidden, weight.t(), out=out)
        for _ in range(layers):
            torch.mm(grad, weight, out=out)
            torch.mm(grad.t(), hidden, out=d_weight)
        torch.mm(grad.t(), encoding, out=d_first)
        yield 1


def _table_batches(n: int) -> Iterator[torch.Tensor]:
    """Yield distinct rows `(16,)` in random order, for ever."""
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(n, generator=generator)[: _TABLE_BATCH * _TABLE_BATCHES]
    while True:
        for rows in shuffled.split(_TABLE_BATCH):
            if len(rows) == _TABLE_BATCH:
                yield rows.clone()


def _our_table(n: int, zdim: int) -> tuple[Any, Callable[[torch.Tensor], None]]:
    """Make a table of ours, and a function that takes one of its steps."""
    from cryodrgn_amort.data import Batch
    from cryodrgn_amort.models import LookupTable
    from cryodrgn_amort.options import TableFlags

    flags = TableFlags()
    start = torch.full((n, zdim), flags.table_logvar)
    table = LookupTable(torch.randn(n, zdim), start, flags.table_lr)
    nothing = torch.empty(0)

    def step(rows: torch.Tensor) -> None:
        mean, logvar = table(Batch(rows, nothing, None, nothing, None))
        (mean.sum() + logvar.sum()).backward()
        table.after_backward()

    return table, step


def table_steps(*, n: int, zdim: int, optimizer: str) -> Iterator[int]:
    """Take steps on 16 rows of a table of ``n``.

    Parameters
    ----------
    optimizer
        "ours" for ``LookupTable``; "Adam" or "SparseAdam" for that of torch over an embedding.
    """
    if optimizer == "ours":
        step = _our_table(n, zdim)[1]
    else:
        embedding = torch.nn.Embedding(n, 2 * zdim, sparse=optimizer == "SparseAdam")
        torch_optimizer = getattr(torch.optim, optimizer)(embedding.parameters(), lr=3e-2)

        def step(rows: torch.Tensor) -> None:
            torch_optimizer.zero_grad()
            embedding(rows).sum().backward()
            torch_optimizer.step()

    for rows in _table_batches(n):
        step(rows)
        yield 1


def flush_rows(*, n: int, zdim: int) -> Iterator[int]:
    """Bring a table of ``n`` rows, nearly all of them behind, to the present step."""
    table, step = _our_table(n, zdim)
    for done, rows in enumerate(_table_batches(n), 1):
        step(rows)
        if done % _MISSED == 0:
            yield 0
            table.latents()
            yield n


def make_stack(*, folder: str, n: int, box: int) -> dict[str, str]:
    """Write particles of noise with random poses, shifts and CTFs; returns their paths."""
    import numpy as np
    from scipy.spatial.transform import Rotation

    from cryodrgn_amort import host
    from cryodrgn_amort.core import write_pickle

    paths = {name: os.path.join(folder, file) for name, file in STACK_FILES.items()}
    rng = np.random.default_rng(0)
    host.write_mrc(paths["particles"], rng.standard_normal((n, box, box), np.float32))
    rots = Rotation.from_quat(rng.standard_normal((n, 4))).as_matrix().astype(np.float32)
    write_pickle(paths["poses"], (rots, rng.uniform(-0.05, 0.05, (n, 2)).astype(np.float32)))
    ctf = np.tile(np.array([box, 192 / box, 0, 0, 0, 300, 2.7, 0.1, 0], np.float32), (n, 1))
    ctf[:, 2], ctf[:, 4] = rng.uniform(10000, 25000, n), rng.uniform(0, 180, n)
    ctf[:, 3] = ctf[:, 2] + rng.uniform(0, 300, n)
    write_pickle(paths["ctf"], ctf)
    return paths


STACK_FILES = {"particles": "particles.mrcs", "poses": "poses.pkl", "ctf": "ctf.pkl"}


def gemm_error() -> dict[str, float | None]:
    """Return ``onednn_error``."""
    from cryodrgn_amort.core import onednn_error

    return {"error": onednn_error()}


TASKS: dict[str, Callable[..., Iterator[int]]] = {
    "host": host_steps,
    "ours": our_steps,
    "floor": floor_steps,
    "fit": fit_steps,
    "table": table_steps,
    "flush": flush_rows,
}
JOBS: dict[str, Callable[..., Mapping[str, Any]]] = {"stack": make_stack, "gemm_error": gemm_error}


def serve(task: Iterator[int], requests: IO[str], answers: IO[str]) -> None:
    """Work for as many seconds as each line of ``requests`` asks, and say how it went.

    Each answer names the units done and the seconds that they took: at least one piece of work,
    and whole ones. Preparations take time of the turn, too.
    """
    for line in requests:
        done, seconds = 0, 0.0
        ending = time.perf_counter() + float(line)
        while not done or time.perf_counter() < ending:
            began = time.perf_counter()
            units = next(task)
            if units:
                seconds += time.perf_counter() - began
                done += units
        _say(answers, {"done": done, "seconds": seconds})


def _say(answers: IO[str], found: Mapping[str, Any]) -> None:
    answers.write(json.dumps(found) + "\n")
    answers.flush()


def main(name: str, arguments: str) -> None:
    """Do a job, or serve a task until standard input ends."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # whatever else is printed is no answer
        try:
            if name in JOBS:
                _say(answers, JOBS[name](**json.loads(arguments)))
            else:
                serve(TASKS[name](**json.loads(arguments)), sys.stdin, answers)
        except InputError as err:
            sys.exit(str(err))


if __name__ == "__main__":
    main(*sys.argv[1:])
