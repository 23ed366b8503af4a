"""Our training against the installed host's on a GPU: ``python -m cryodrgn_amort.bench --gpu``.

In one process, one after the other: a GPU is nobody else's meanwhile. Where there is none, sizes
are a toy's and all runs on the CPU, to see that it works.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cryodrgn_amort import host
from cryodrgn_amort.bench.processes import say
from cryodrgn_amort.bench.sections import Section
from cryodrgn_amort.bench.sizes import GPU, GPU_TOY, ZDIM, GpuSizes, Shape
from cryodrgn_amort.bench.workers import features, half_plane, make_stack
from cryodrgn_amort.core import default_device, device_name, number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cryodrgn_amort.training import Trainer


__all__ = ["GpuBench"]

_WARM = 8  # steps before the clock starts: some are run as written, then one is recorded
_PAPER = 131_899  # particles of EMPIAR-10076, of 128 px: 8 hours in Table 1 of arXiv 2303.07487
_OURS: dict[str, dict[str, Any]] = {
    "ours, bf16": {"precision": "bf16"},
    "launched anew": {"precision": "bf16", "graph": False},
    "ours, tf32": {"precision": "tf32"},
    "ours, fp32": {"precision": "fp32"},
}
_HOST = {"train_vae": True, "train_vae --no-amp": False}


@dataclass(frozen=True)
class Rate:
    """How fast steps were: images and steps per second, the CPU's seconds a step, peak in bytes."""

    images: float
    steps: float
    cpu: float
    peak: int

    def __str__(self) -> str:
        return (
            f"{number(self.images)} ({1e3 / self.steps:.2f} ms, CPU {1e3 * self.cpu:.2f}, "
            f"{self.peak / 1e9:.1f} GB)"
        )


class GpuBench:
    """Measures on the GPU; each stage returns tables.

    Parameters
    ----------
    seconds
        How long each is timed.
    """

    def __init__(self, seconds: float) -> None:
        self.device = default_device()
        self.sizes: GpuSizes = GPU if self.device.type == "cuda" else GPU_TOY
        self.seconds = seconds if self.device.type == "cuda" else min(seconds, 0.05)
        logging.disable(logging.WARNING)  # what trainings say of themselves
        self._folder = tempfile.TemporaryDirectory(prefix="cryodrgn-amort-bench-")
        self._count = 0

    def facts(self) -> dict[str, str]:
        """Return what the numbers depend on."""
        facts = {"Device": device_name(self.device), "zdim": str(ZDIM)}
        if self.device.type == "cuda":
            card = torch.cuda.get_device_properties(self.device)
            facts["Card"] = (
                f"{card.total_memory / 1e9:.0f} GB, {card.multi_processor_count} multiprocessors, "
                f"compute capability {card.major}.{card.minor}, CUDA {torch.version.cuda}"
            )
        return facts

    @functools.cache  # noqa: B019 # one bench in a process
    def stack(self, box: int, n: int) -> dict[str, str]:
        """Make particles of noise; returns their files."""
        folder = Path(self._folder.name) / f"{box}px-{n}"
        folder.mkdir()
        return make_stack(folder=str(folder), n=n, box=box)

    def trainer(self, shape: Shape, n: int | None = None, **more: Any) -> Trainer:
        """Make a training that keeps nothing."""
        from cryodrgn_amort.plugins import load_plugins
        from cryodrgn_amort.runs import settings_from_flags, with_run
        from cryodrgn_amort.training import Trainer

        self._count += 1
        given = {
            "outdir": str(Path(self._folder.name) / f"run{self._count}"), "num_epochs": 1,
            "seed": 0, "do_analysis": False, "batch_size": shape.batch, **more,
        }  # fmt: skip
        if "from_run" not in more:
            network = {"qdim": shape.width, "qlayers": shape.layers}
            given |= {
                **self.stack(shape.box, n or max(self.sizes.n, 8 * shape.batch)), "zdim": ZDIM,
                "pdim": shape.width, "players": shape.layers, "encoder": "resid",
                **(network if more.get("encoder", "resid") == "resid" else {}), **more,
            }  # fmt: skip
        plugins = load_plugins()
        return Trainer(settings_from_flags(with_run(given, plugins), plugins), plugins)

    def timed(self, make: Callable[[], Iterator[int]]) -> Rate | None:
        """Take steps for a while, after some; None: there is no memory for them."""
        cuda = self.device.type == "cuda"
        try:
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            steps = make()
            for _ in range(_WARM):
                next(steps)
            self.wait()
            began, cpu, count, images = time.perf_counter(), time.process_time(), 0, 0
            while count < 3 or time.perf_counter() - began < self.seconds:
                images += next(steps)
                count += 1
            spent = time.process_time() - cpu
            self.wait()
        except torch.OutOfMemoryError:
            return None
        took = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        return Rate(images / took, count / took, spent / count, peak)

    def wait(self) -> None:
        """Wait until the GPU has done all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def ours(self, shape: Shape, **more: Any) -> Iterator[int]:
        """Take our steps."""
        from cryodrgn_amort.training import endless_steps

        steps = endless_steps(self.trainer(shape, **more))
        return (shape.batch for _ in steps)

    def hosts(self, shape: Shape, *, amp: bool) -> Iterator[int]:
        """Take the host's."""
        files = self.stack(shape.box, max(self.sizes.n, 8 * shape.batch))
        return host.training_steps(
            **files, zdim=ZDIM, width=shape.width, layers=shape.layers, batch_size=shape.batch,
            device=self.device, amp=amp and self.device.type == "cuda",
        )  # fmt: skip

    def floor(self, shape: Shape) -> float:
        """Return how many images per second the card's bf16 products of our decoder alone allow."""
        rows = half_plane(shape.box) * min(shape.batch, max(1, (1 << 18) // half_plane(shape.box)))
        products = _products(rows, shape, self.device)

        def steps() -> Iterator[int]:
            while True:
                for multiply in products:
                    multiply()
                yield 1

        found = self.timed(steps)
        return 0.0 if found is None else found.steps * rows / half_plane(shape.box)

    def parity(self) -> list[Section]:
        """Compare a step's loss and gradients with those of the host's ``train_batch``."""
        section = Section(
            "The same step as the host's, on the device",
            ("precision", "loss, relative difference", "gradients, largest relative difference"),
        )
        for precision in ("fp64", "fp32", "tf32", "bf16", "fp16"):
            trainer = self.trainer(Shape(self.sizes.shapes[0].box, 32, 8), precision=precision)
            trainer.prepare_particles(None)
            model, p = trainer.model.train(), trainer.particles
            batch = next(iter(trainer.batches))
            model.zero_grad()
            torch.manual_seed(1)
            mine, _ = model.loss(batch, 0.5)
            mine.total.backward()
            found = {n: q.grad.clone() for n, q in model.named_parameters() if q.grad is not None}
            model.zero_grad()
            torch.manual_seed(1)
            loss = host.train_batch(model, p, batch.index, 0.5, double=precision == "fp64")
            apart = max(
                float((found[n] - q.grad).norm() / q.grad.norm().clamp(min=1e-12))
                for n, q in model.named_parameters()
                if q.grad is not None
            )
            of_loss = abs(float(mine.total.detach()) / loss - 1)
            section.rows.append((precision, f"{of_loss:.1e}", f"{apart:.1e}"))
        return [section]

    def syncs(self) -> list[Section]:
        """Count how often a step that is not replayed waits for the GPU, as PyTorch warns of it."""
        section = Section("Waits in a training step, launched anew", ("encoder", "waits", "where"))
        for encoder in ("resid", "vlt"):
            steps = self.ours(self.sizes.shapes[0], encoder=encoder, graph=False)
            for _ in range(_WARM):
                next(steps)
            if self.device.type != "cuda":
                section.rows.append((encoder, "–", "no GPU"))
                continue
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                next(steps)
                torch.cuda.set_sync_debug_mode("default")
            where = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught})
            section.rows.append((encoder, str(len(caught)), " ".join(where)))
        return [section]

    def step(self) -> list[Section]:
        """Measure training steps."""
        names = (*_HOST, *_OURS)
        speed = Section(
            "Training step: images per second (a step, of which the CPU works; peak memory)",
            ("box / width / batch", *names),
        )
        shares = Section(
            "The same next to the host's; an epoch of the paper's particles",
            ("box / width / batch", "of train_vae", "of train_vae --no-amp",
             "of the card's bf16 products", f"an epoch of {_PAPER:,}"),
            notes=["Products: those of the decoder alone, forward and backward, measured as well. "
                   "An epoch: by the steps, without preprocessing and checkpoints."],
        )  # fmt: skip
        for shape in self.sizes.shapes:
            say(f"step {shape}")
            rates = {
                n: self.timed(functools.partial(self.hosts, shape, amp=a)) for n, a in _HOST.items()
            }
            rates |= {
                n: self.timed(functools.partial(self.ours, shape, **f)) for n, f in _OURS.items()
            }
            floor, best = self.floor(shape), rates["ours, bf16"]
            speed.rows.append(
                (str(shape), *("no memory" if r is None else str(r) for r in rates.values()))
            )
            if best is not None:
                times = [
                    f"{best.images / r.images:.2f} ×" if (r := rates[n]) else "–" for n in _HOST
                ]
                shares.rows.append((
                    str(shape), *times, f"{100 * best.images / floor:.0f} %" if floor else "–",
                    f"{_PAPER / best.images:.0f} s",
                ))  # fmt: skip
        return [speed, shares]

    def table(self) -> list[Section]:
        """Measure the lookup table's optimizer."""
        from cryodrgn_amort.models import LookupTable

        n = self.sizes.table_rows
        section = Section(
            f"Table of {n:,} rows of zdim {ZDIM}", ("batch", "a step, ms", "all latents, s")
        )
        start = torch.full((n, ZDIM), -4.0)
        table = LookupTable(torch.randn(n, ZDIM), start, 1e-3).to(self.device)
        adam = table.adam
        assert adam is not None
        for size in (8, 64):
            rows = torch.randperm(n)[:size].to(self.device)
            grad = torch.randn(size, 2 * ZDIM, device=self.device)

            def steps(rows: torch.Tensor = rows, grad: torch.Tensor = grad) -> Iterator[int]:
                while True:
                    adam.step(table.weight, adam.begin(table.weight, rows), grad)
                    yield 1

            rate = self.timed(steps)
            self.wait()
            began = time.perf_counter()
            table.latents()
            self.wait()
            took = time.perf_counter() - began
            if rate is not None:
                section.rows.append((str(size), f"{1e3 / rate.steps:.3f}", f"{took:.4f}"))
        return [section]

    def second(self) -> list[Section]:
        """Measure the second stage."""
        shape = self.sizes.second
        first = self.trainer(shape, encoder="vlt")
        first.fit()
        section = Section(
            f"Second stage, {shape}: images per second", ("encoder", "replayed", "launched anew")
        )
        for encoder in ("sleep", "anchored"):
            cells = []
            for graph in (True, False):
                more = {"from_run": first.settings.outdir, "encoder": encoder, "graph": graph}
                rate = self.timed(functools.partial(self.ours, shape, **more))
                cells.append("no memory" if rate is None else str(rate))
            section.rows.append((encoder, *cells))
        return [section]

    def infer(self) -> list[Section]:
        """Measure ``infer_amort``."""
        from cryodrgn_amort.inference import infer_run
        from cryodrgn_amort.options import InferOptions
        from cryodrgn_amort.plugins import load_plugins
        from cryodrgn_amort.runs import load_run

        shape = self.sizes.second
        trainer = self.trainer(shape)
        trainer.fit()
        section = Section(
            f"infer_amort, {trainer.particles.n} particles, {shape.box} / {shape.width}",
            ("precision", "particles per second"),
        )
        for precision in ("bf16", "fp32"):
            run = load_run(trainer.settings.outdir, load_plugins())
            options = InferOptions(precision=precision, steps=self.sizes.fit_steps)
            self.wait()
            began = time.perf_counter()
            infer_run(run, options, f"{trainer.settings.outdir}-{precision}")
            self.wait()
            rate = trainer.particles.n / (time.perf_counter() - began)
            section.rows.append((precision, number(rate)))
        return [section]

    def eval(self) -> list[Section]:
        """Measure ``eval_amort``, its encoding next to encoding and FFT alone."""
        from cryodrgn_amort.evaluation import evaluate
        from cryodrgn_amort.options import EvalOptions
        from cryodrgn_amort.plugins import load_plugins
        from cryodrgn_amort.runs import load_run

        shape, n = self.sizes.evaluated, self.sizes.evaluated_n
        began = time.perf_counter()
        trainer = self.trainer(shape, n)
        trainer.fit()
        trained = time.perf_counter()
        run = load_run(trainer.settings.outdir, load_plugins())
        said: list[str] = []
        with _told(said):
            evaluate(run, EvalOptions(transforms=("roll:1", "rotate:37"), umap=False, fit=0))
        self.wait()
        ended = time.perf_counter()
        section = Section(
            f"{n:,} particles of {shape.box} px: seconds",
            (
                "an epoch, with preprocessing and a checkpoint",
                "eval_amort, two transforms, no fits",
            ),
        )
        section.rows.append((f"{trained - began:.1f}", f"{ended - trained:.1f}"))
        section.notes = [line for line in said if line.startswith("Evaluated")]
        return [section]


def _products(rows: int, shape: Shape, device: torch.device) -> list[Callable[[], torch.Tensor]]:
    """Return the decoder's products in bf16, forward and backward, for so many pixels."""
    encoded, width = features(shape.box), shape.width

    def product(a: int, b: int, c: int) -> Callable[[], torch.Tensor]:
        first, second, out = (
            torch.randn(*size, device=device).to(torch.bfloat16)
            for size in ((a, b), (b, c), (a, c))
        )
        return functools.partial(torch.mm, first, second, out=out)

    found = [product(rows, width, width)] * (2 * shape.layers)  # forward, and by its input
    found += [product(width, rows, width)] * shape.layers  # by its weight
    return [*found, product(rows, encoded, width), product(width, rows, encoded)]


@contextlib.contextmanager
def _told(lines: list[str]) -> Iterator[None]:
    """Collect what our commands say meanwhile."""
    logger, before = logging.getLogger("cryodrgn_amort"), logging.root.manager.disable
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.disable(logging.NOTSET)
    logger.addHandler(handler)
    level, propagates = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = propagates
        logger.setLevel(level)
        logger.removeHandler(handler)
        logging.disable(before)
