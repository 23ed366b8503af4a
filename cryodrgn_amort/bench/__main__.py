"""Our training against the installed host's, on this machine: ``python -m cryodrgn_amort.bench``.

What is compared takes turns, one active at a time, so that whatever else the machine does meets
all alike; ratios are taken within a round. Neither numpy nor torch is imported here: see
``processes``.

Examples
--------
$ python -m cryodrgn_amort.bench -o BENCH.md
$ python -m cryodrgn_amort.bench --only step table --rounds 5
$ python -m cryodrgn_amort.bench --only command --epochs 5 --repeats 3 --threads 1
$ python -m cryodrgn_amort.bench --gpu -o GPU.md
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.bench.processes import (
    Failed,
    Finished,
    Worker,
    environment,
    run_command,
    say,
    stack,
    take_turns,
    working,
)
from cryodrgn_amort.bench.sections import Section, machine_facts, middle, ratio, render
from cryodrgn_amort.bench.sizes import (
    BATCH,
    FULL,
    GIB,
    QUICK,
    ZDIM,
    Command,
    Shape,
    Sizes,
    variants,
)
from cryodrgn_amort.core import InputError, available_memory, cores, number

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

__all__ = ["Bench", "main"]

BENCHES = ("step", "command", "table", "memory", "fit")
STAGES = ("parity", "syncs", "step", "table", "second", "infer", "eval")  # of gpu.py
_FEW = 1000
"""Particles of the commands that ``--epochs`` is for."""
_TUNED = {  # the allocator keeps what is freed, instead of faulting it in again
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**29),
}
_OURS = {"ours, fp32": "fp32", "ours, bf16": "bf16"}
_TABLES = {
    "ours": "LookupTable",
    "Adam": "torch Adam, dense",
    "SparseAdam": "torch SparseAdam",
}
_FLOORS = {
    "mkl": "GEMM only, MKL fp32",
    "onednn": "GEMM only, oneDNN fp32",
    "bf16": "GEMM only, bf16",
}
_STEP_NOTE = (
    "Host: its loader and `train_batch` as shipped. Tuned: the same with glibc keeping freed "
    f"memory ({', '.join(_TUNED)}) and oneDNN for float32 products. zdim {ZDIM}, as many layers in "
    "the encoder as in the decoder, 3 unless this is a quick run."
)
_FLOOR_NOTE = (
    "Floor: the decoder's matrix products alone, forward and backward over half of the Fourier "
    "plane, in memory that is there; the fastest of the same precision."
)


@dataclass(frozen=True)
class Bench:
    """What the user asked for."""

    sizes: Sizes
    rounds: int
    seconds: float
    repeats: int
    threads: int

    @property
    def env(self) -> dict[str, str]:
        """Environment of what is measured as shipped."""
        return environment(self.threads)

    def rates(self, workers: Mapping[str, Worker]) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Let workers take turns; see ``take_turns``."""
        turns = {name: partial(worker.rate, self.seconds) for name, worker in workers.items()}
        return take_turns(turns, self.rounds)

    def step(self) -> list[Section]:
        """Measure training steps."""
        measured: dict[Shape, dict[str, list[float]]] = {}
        notes = []
        with working(self.env, "gemm_error") as checking:
            for shape in self.sizes.shapes:
                say(f"step {shape}")
                if available_memory() < shape.bytes_needed:
                    needed = shape.bytes_needed / GIB
                    notes.append(f"{shape} left out: needs {needed:.0f} GiB.")
                    continue
                measured[shape], failures = self._step_rates(shape)
                notes += [f"{shape}, {name} failed: {why}." for name, why in failures.items()]
            error = checking.answer()["error"]

        def by_shape(title: str, names: Sequence[str], cell: Callable[..., str]) -> Section:
            rows = [
                (str(shape), *(cell(rates, name) for name in names))
                for shape, rates in measured.items()
            ]
            return Section(title, ("D / width / batch", *names), rows)

        names = ("host", "host, tuned", *_OURS)
        speed = by_shape("Training step: images per second", names, _speed)
        shares = by_shape("Training step: speed next to the host's, [range]; share of the floor",
                          names, _relative)  # fmt: skip
        floors = by_shape("The floor: images per second", list(_FLOORS.values()), _speed)
        speed.notes = [_STEP_NOTE, *notes]
        shares.notes = ["Medians over rounds of the ratio within a round.", _FLOOR_NOTE]
        if error is not None:
            floors.notes = [f"Error of oneDNN's float32 product here: {error:.0e} of the largest "
                            "entry. 1e-6 is true float32, 1e-3 would be bfloat16."]  # fmt: skip
        return [speed, shares, floors]

    def _step_rates(self, shape: Shape) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Return images per second of every variant, in every round; and failures."""
        network = {"width": shape.width, "layers": shape.layers}
        n = max(256, 4 * shape.batch)
        n -= n % shape.batch
        with contextlib.ExitStack() as opened:
            files = opened.enter_context(stack(self.env, n, shape.box))
            training = {**files, **network, "zdim": ZDIM, "batch_size": shape.batch}
            tuned = environment(self.threads, _TUNED)

            def start(env: Mapping[str, str], task: str, **arguments: Any) -> Worker:
                return opened.enter_context(working(env, task, **arguments))

            workers = {
                "host": start(self.env, "host", onednn=False, **training),
                "host, tuned": start(tuned, "host", onednn=True, **training),
            }
            for name, precision in _OURS.items():
                workers[name] = start(self.env, "ours", precision=precision, **training)
            for gemm, name in _FLOORS.items():
                workers[name] = start(self.env, "floor", box=shape.box, gemm=gemm, **network)
            return self.rates(workers)

    def fit(self) -> list[Section]:
        """Measure the fitting of posteriors, as ``infer_amort`` does it."""
        names = ("decoder alone", "infer_amort")
        section = Section(
            "Fitted posteriors: image steps per second",
            ("D / width / batch", *names, "cost next to the decoder's"),
            notes=[
                f"{self.sizes.fit_steps} steps for every particle, reading, preprocessing and the "
                "final ELBO included; decoder alone: its forward and backward pass for as many "
                "images, which are there."
            ],
        )
        for shape in self.sizes.fits:
            say(f"fit {shape}")
            with contextlib.ExitStack() as opened:
                files = opened.enter_context(stack(self.env, 2 * shape.batch, shape.box))
                size = {"zdim": ZDIM, "width": shape.width, "layers": shape.layers}
                size |= {"batch_size": shape.batch, "steps": self.sizes.fit_steps}
                workers = {
                    name: opened.enter_context(
                        working(self.env, "fit", alone=name == names[0], **files, **size)
                    )
                    for name in names
                }
                rates, failures = self.rates(workers)
            cost = ratio(rates[names[0]], rates[names[1]])
            section.rows.append((str(shape), *(middle(rates[name]) for name in names), cost))
            section.notes += [f"{shape}, {who} failed: {why}." for who, why in failures.items()]
        return [section]

    def table(self) -> list[Section]:
        """Measure the lookup table's optimizer."""
        flush = "LookupTable, all latents"
        section = Section(
            f"Table of latents: milliseconds per step on {BATCH} rows of zdim {ZDIM}",
            ("rows", *_TABLES.values(), f"{flush}: seconds per million rows"),
            notes=["A step: look up, backward, update. All latents: after 200 steps."],
        )
        for n in self.sizes.table_rows:
            say(f"table of {n:,} rows")
            needed = 16 * 2 * ZDIM * 4 * n + GIB  # copies that the three hold together
            if available_memory() < needed:
                section.notes.append(f"{n:,} rows left out: need {needed / GIB:.0f} GiB.")
                continue
            with contextlib.ExitStack() as opened:
                size = {"n": n, "zdim": ZDIM}
                workers = {
                    name: opened.enter_context(
                        working(self.env, "table", optimizer=optimizer, **size)
                    )
                    for optimizer, name in _TABLES.items()
                }
                workers[flush] = opened.enter_context(working(self.env, "flush", **size))
                rates, failures = self.rates(workers)
            steps = (middle([1e3 / rate for rate in rates[name]]) for name in _TABLES.values())
            rows = middle([1e6 / rate for rate in rates[flush]])
            section.rows.append((f"{n:,}", *steps, rows))
            section.notes += [f"{n:,} rows, {who} failed: {why}." for who, why in failures.items()]
        return [section]

    def command(self) -> list[Section]:
        """Measure whole commands."""
        section = self._commands("Whole commands", self.sizes.commands, _OURS.values())
        section.notes.append(
            f"Start to end without analysis, zdim {ZDIM}, batch {BATCH}, checkpoints included."
        )
        return [section]

    def memory(self) -> list[Section]:
        """Measure the memory of whole commands."""
        section = self._commands("Memory of whole commands", self.sizes.memory)
        section.notes.append(
            f"Batch {BATCH}. Stopped when the training is under way: no end, no checkpoint."
        )
        return [section]

    def _commands(
        self, title: str, commands: Sequence[Command], precisions: Collection[str] = ()
    ) -> Section:
        header = ("particles, network", "epochs", "command", "seconds", "speed", "peak MiB")
        section = Section(title, header)
        script = shutil.which("cryodrgn", path=sysconfig.get_path("scripts"))
        if script is None:
            raise InputError("there is no `cryodrgn` command beside this Python")
        for command in commands:
            with stack(self.env, command.n, command.box) as files:
                say(f"{command.host}, {command}")
                turns = {
                    name: partial(self._run_and_remove, [script], command, who, more, files)
                    for name, who, more in variants(command, precisions)
                }
                finished, failures = take_turns(turns, self.repeats, warm_up=0)
            reference = [run.seconds for run in finished[command.host]]
            for name, runs in finished.items():
                seconds = [run.seconds for run in runs]
                peak = [run.peak_bytes / 2**20 for run in runs]
                section.rows.append((
                    str(command), str(command.epochs), f"`{name}`", middle(seconds),
                    ratio(reference, seconds), number(round(median(peak)) if peak else None),
                ))  # fmt: skip
            section.notes += [f"`{name}`, {command}, failed: {failures[name]}" for name in failures]
        return section

    def _run_and_remove(
        self, prefix: list[str], command: Command, who: str, more: list[str],
        files: Mapping[str, str],
    ) -> Finished:  # fmt: skip
        """Run a command of the host or ours; what it writes is thrown away."""
        with tempfile.TemporaryDirectory(prefix="cryodrgn-amort-bench-") as folder:
            argv = [*prefix, *command.argv(who, files, f"{folder}/run"), *more]
            return run_command(argv, self.env, command.until)


def _speed(rates: Mapping[str, Sequence[float]], name: str) -> str:
    return middle(rates[name])


def _relative(rates: Mapping[str, Sequence[float]], name: str) -> str:
    """Write the ratio to the host and the share of the floor of a variant."""
    same = ("bf16",) if name.endswith("bf16") else ("mkl", "onednn")
    floors = [rates[_FLOORS[gemm]] for gemm in same if rates[_FLOORS[gemm]]]
    cells = [] if name == "host" else [ratio(rates[name], rates["host"])]
    if floors and rates[name]:
        best = [max(of_round) for of_round in zip(*floors, strict=True)]
        share = median(a / b for a, b in zip(rates[name], best, strict=True))
        cells.append(f"{100 * share:.0f} %")
    return "; ".join(cells)


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m cryodrgn_amort.bench",
        description=summary.partition(":")[0] + ".",
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", metavar="OUT.md", type=Path, help="Default: stdout")
    parser.add_argument(
        "--gpu", action="store_true",
        help="On the GPU, in this process: parity, waits, steps, table, second stage, fits, eval",
    )  # fmt: skip
    every = dict.fromkeys((*BENCHES, *STAGES))
    parser.add_argument("--only", nargs="+", choices=every, help="Parts (default: all)")
    parser.add_argument(
        "--rounds", type=int, help=f"Turns of each worker that count (default: {FULL.rounds})"
    )
    parser.add_argument(
        "--seconds", type=float, help=f"Of a turn; at least one step (default: {FULL.seconds:g})"
    )
    parser.add_argument("--threads", type=int, default=cores(), help="Default: all cores")
    parser.add_argument(
        "--epochs", type=int, help="Of whole commands with 1,000 particles (default: 1)"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="Runs of each whole command (default: 1)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="Toy sizes, to see that it works; numbers say nothing"
    )
    return parser


def _bench(args: argparse.Namespace) -> Bench:
    """Check what the user asked for."""
    for name in ("rounds", "seconds", "threads", "epochs", "repeats"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name} {value}: must be positive")
    if args.threads > cores():
        raise InputError(f"--threads {args.threads}: this machine has {cores()} cores")
    if args.output is not None and (args.output.is_dir() or not args.output.parent.is_dir()):
        raise InputError(f"-o {args.output}: must name a file in a folder that exists")
    sizes = QUICK if args.quick else FULL
    if args.epochs is not None:
        commands = (replace(c, epochs=args.epochs) if c.n <= _FEW else c for c in sizes.commands)
        sizes = replace(sizes, commands=tuple(commands))
    return Bench(
        sizes, args.rounds or sizes.rounds, args.seconds or sizes.seconds, args.repeats,
        args.threads,
    )  # fmt: skip


def run(bench: Bench, parts: Sequence[str], output: Path | None, *, gpu: bool = False) -> None:
    """Measure, and write what there is after each part."""
    facts, sections, measuring = machine_facts(bench.threads), list[Section](), bench
    rounds = f"{bench.rounds}, turns of at least {bench.seconds:g} s"
    facts["Rounds"] = "one" if gpu else f"{rounds}; whole commands: {bench.repeats}"
    if gpu:
        from cryodrgn_amort.bench.gpu import GpuBench

        measuring = GpuBench(bench.seconds)  # type: ignore[assignment]
        facts |= measuring.facts()  # type: ignore[attr-defined]
    for part in parts:
        try:
            sections += getattr(measuring, part)()
        except Exception as err:  # what else can be measured is
            if not gpu:
                raise
            sections.append(Section(f"{part}: failed", (f"{type(err).__name__}: {err}"[:200],)))
        if output is not None:
            output.write_text(render(facts, sections), encoding="utf-8")
    if output is None:
        sys.stdout.write(render(facts, sections))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; what went wrong is one line and an exit code."""
    args = _parser().parse_args(argv)
    try:
        bench, known = _bench(args), STAGES if args.gpu else BENCHES
        parts = list(dict.fromkeys(args.only or known))
        if wrong := [part for part in parts if part not in known]:
            raise InputError(f"--only {wrong[0]}: not {'with' if args.gpu else 'without'} --gpu")
        run(bench, parts, args.output, gpu=args.gpu)
    except (InputError, Failed, OSError) as err:
        say(f"bench: error: {err}")
        raise SystemExit(2 if isinstance(err, InputError) else 1) from None
    except KeyboardInterrupt:
        say("bench: interrupted")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
