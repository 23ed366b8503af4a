"""Latents for the particles of any run, or for new ones: fitted, and kept as a table run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cryodrgn_amort.core import (
    Halving,
    InputError,
    ProcessGroup,
    __version__,
    bar,
    digest,
    locked,
    matrix_products,
    on_terminal,
    read_arrays,
    write_arrays,
)
from cryodrgn_amort.inference.bounds import ElboScale, Posterior, elbo
from cryodrgn_amort.inference.fitter import Fitter
from cryodrgn_amort.inference.inferred import GAIN, MANY, Inferred, lacking
from cryodrgn_amort.inference.optimisation import FitOptions
from cryodrgn_amort.inference.table_run import earlier_files, write_table_run
from cryodrgn_amort.runs import INPUT_FILES, INPUTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cryodrgn_amort.data import Batch, Particles
    from cryodrgn_amort.options import InferOptions
    from cryodrgn_amort.runs import Run


__all__ = ["infer_run"]
logger = logging.getLogger("cryodrgn_amort")

_QUICK = FitOptions(steps=30, draws=8)
_PROBED, _FEWEST = 32, 4  # particles that tell beforehand what all take
_PARTS = ".posteriors"
_RESULTS = ("mean", "logvar", "elbo", "converged", "start", "encoder_elbo")
_OF = "particles"  # in a part: digest of what was fitted


class _Inference:
    """Fits all particles that were asked for, part by part; what is done is kept in ``OUT``."""

    def __init__(self, run: Run, options: InferOptions, out: Path, processes: ProcessGroup) -> None:
        self.run, self.options, self.out, self.processes = run, options, out, processes
        self.particles = _particles(run, options)
        own = options.particles is None and not options.held_out
        self.fitter = Fitter(run, self.particles, own=own, seed=options.seed)
        self.quick = options.starts is None and options.steps is None and self.particles.n > MANY
        self.thorough = FitOptions(
            steps=FitOptions.steps if options.steps is None else options.steps
        )
        self.fit_options = _QUICK if self.quick else self.thorough
        self.names = ("anchors",) if self.quick else self._starts()
        self.would_gain: float | None = None
        self.parts = out / _PARTS
        self.plan = json.dumps({
            "run": str(run.folder.resolve()), "epoch": run.epoch, "seed": options.seed,
            "particles": self.particles.n, "starts": self.names, "version": __version__,
            **{k: v for k, v in asdict(options).items() if k not in ("starts", "overwrite")},
            "steps": self.fit_options.steps, "precision": run.precision,
            "contents": self._contents(),
        })  # fmt: skip

    def _contents(self) -> dict[str, str]:
        """Return digests of what all parts depend on; of its own particles, each has one itself."""
        files = (self.run.file(kind) for kind in ("config", "weights", "z"))
        noise = hashlib.sha256("".join(map(_digest, self.fitter.sample())).encode())
        return {path.name: digest(path) for path in files} | {"noise": noise.hexdigest()}

    def _starts(self) -> tuple[str, ...]:
        given, has = self.options.starts, self.fitter.has_answers
        if given is None:
            return ("encoder", "anchors") if has else ("anchors",)
        if "encoder" in given and not has:
            what = (
                "shown something else than the particle"
                if self.run.encoder.shown_images
                else ("a table, which has no row for these particles")
            )
            raise InputError(f"--start encoder: the encoder of RUN {self.run.folder} is {what}")
        return tuple(dict.fromkeys(given))

    def check_folder(self) -> None:
        """Refuse a folder that holds anything else, before anything is written."""
        out, overwrite = self.out, self.options.overwrite
        if out.exists() and not out.is_dir():
            raise InputError(f"-o {out}: is not a folder")
        if out.resolve() == self.run.folder.resolve():
            raise InputError(f"-o {out}: is the RUN itself")
        done, begun = (out / "inference.json").is_file(), self.parts.is_dir()
        if (out / "config.yaml").exists() and not done and not begun:
            raise InputError(f"-o {out}: holds a run that is not of infer_amort")
        ours = sorted(path.name for path in earlier_files(out))
        if not done and not begun and ours:
            raise InputError(
                f"-o {out}: holds no run, but {', '.join(ours[:3])}, which would be replaced; "
                "choose another folder"
            )
        if done and not overwrite:
            raise InputError(f"-o {out}: holds latents already; --overwrite replaces them")
        for name in INPUT_FILES:
            path = getattr(self.options, name)
            if path is not None and Path(path).resolve() in {(out / o).resolve() for o in ours}:
                raise InputError(f"--{name} {path}: would be replaced; choose another -o")

    def prepare_folder(self) -> None:
        """Keep the parts of an interrupted call for the same; drop those of others."""
        plan = self.parts / "plan.json"
        if not plan.is_file() or plan.read_bytes() != self.plan.encode():
            if self.parts.is_dir():
                logger.info("What an interrupted call left is of another RUN, input or option")
            shutil.rmtree(self.parts, ignore_errors=True)
            self.parts.mkdir(parents=True)
            plan.write_text(self.plan, encoding="utf-8")

    def todo(self) -> list[tuple[int, Tensor]]:
        """Return the parts that are not done yet, as far as they fall to this process."""
        chunks = torch.arange(self.particles.n).split(self.options.batch_size)
        todo = [
            (number, index)
            for number, index in enumerate(chunks)
            if number % self.processes.size == self.processes.rank
            and not self._is_done(number, index)
        ]
        done = len(range(self.processes.rank, len(chunks), self.processes.size)) - len(todo)
        if done and self.processes.leads:
            logger.info(f"Going on after {done} of {done + len(todo)} parts")
        return todo

    def foresee(self, elbo_scale: ElboScale, left: int) -> None:
        """Fit a few particles, to say how long ``left`` take, and what quick fits will lack."""
        fitter, n = self.fitter, self.particles.n
        most = _PROBED if fitter.loader.particles.device.type == "cpu" else self.options.batch_size
        count = min(most, n // 10)  # a GPU takes as long for a few
        if count < _FEWEST or not (left or self.quick):
            return
        mixed = np.random.default_rng(self.options.seed + 1).permutation(n)
        index = torch.from_numpy(np.sort(mixed[:count]))
        if "anchors" in self.names:
            _ = fitter.anchors, fitter.variance  # which all particles share

        def timed(names: Sequence[str], options: FitOptions) -> tuple[Batch, Posterior, str]:
            began = time.perf_counter()
            batch, fit, _, _ = fitter.fit(index, names, elbo_scale, options)
            seconds = (time.perf_counter() - began) * left / count
            return batch, (fit.mean, fit.logvar), str(timedelta(seconds=round(seconds)))

        batch, found, took = timed(self.names, self.fit_options)
        many = (
            f"{left} particles" if self.processes.size == 1 else f"{left} particles in each process"
        )
        logger.info(f"Fitting {many} takes about {took} (h:mm:ss), as {count} of them tell")
        if not self.quick:
            return
        _, better, took = timed(self._starts(), self.thorough)
        generator = torch.Generator().manual_seed(self.options.seed)
        draws = torch.randn(8, *found[0].shape, generator=generator).to(found[0])
        old, new = (elbo(fitter.model, batch, q, elbo_scale, draws) for q in (found, better))
        self.would_gain = float((new - old > GAIN).float().mean())
        logger.info(f"{lacking(self.would_gain)}: that takes about {took}")

    def fit(self, elbo_scale: ElboScale, todo: list[tuple[int, Tensor]]) -> None:
        """Fit these parts."""
        halving = Halving("Particles that are fitted")

        def fitted(batch: Batch, some: slice) -> list[Tensor]:
            how = self.names, elbo_scale, self.fit_options
            _, fit, own, _ = self.fitter.fit_batch(batch.of(some), *how)
            own = torch.full_like(fit.elbo, torch.nan) if own is None else own
            return [fit.mean, fit.logvar, fit.elbo, fit.converged, fit.start, own]

        for number, index in _progress(todo, silent=not self.processes.leads):
            batch = self.fitter.loader.read(index)
            pieces = halving(partial(fitted, batch), len(index))
            arrays = (torch.cat(parts).cpu().numpy() for parts in zip(*pieces, strict=True))
            kept = {_OF: np.array(_digest(batch)), **dict(zip(_RESULTS, arrays, strict=True))}
            write_arrays(self._part(number), **kept)

    def _is_done(self, number: int, index: Tensor) -> bool:
        """Tell whether a part is whole, and of the particles as they are now."""
        found = self._done(number, len(index))
        return found is not None and found[_OF] == _digest(self.fitter.loader.read(index))

    def _done(self, number: int, count: int) -> dict[str, np.ndarray] | None:
        """Read a part of ``count`` particles; None: it is not there, or not whole."""
        try:
            found = read_arrays(self._part(number), "-o")
        except InputError:
            return None
        whole = found.keys() == {_OF, *_RESULTS}
        return found if whole and all(len(found[name]) == count for name in _RESULTS) else None

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.npz"

    def collect(self, elbo_scale: ElboScale) -> Inferred:
        """Put the parts together."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in _RESULTS}
        chunks = torch.arange(self.particles.n).split(self.options.batch_size)
        for number, index in enumerate(chunks):
            part = self._done(number, len(index))
            if part is None:
                raise InputError(f"-o {self._part(number)}: damaged; the same call fits it anew")
            for name, arrays in found.items():
                arrays.append(part[name])
        whole = {name: np.concatenate(arrays) for name, arrays in found.items()}
        stepped = self.fit_options.steps > 0
        return Inferred(
            **whole, starts=self.names, elbo_scale=elbo_scale, fitted=stepped,
            would_gain=self.would_gain,
        )  # fmt: skip


def infer_run(
    run: Run, options: InferOptions, outdir: str | Path, processes: ProcessGroup | None = None
) -> Inferred | None:
    """Fit posteriors, and write them as a table run that everything opens that opens a run.

    Parameters
    ----------
    processes
        Processes that share the particles.

    Returns
    -------
    Inferred
        None in processes that do not lead.

    Raises
    ------
    InputError
        If inputs, options or folder do not fit; nothing has been written then.
    """
    processes, out = processes or ProcessGroup(), Path(outdir)
    work = _Inference(run.multiplying(options.precision), options, out, processes)
    work.check_folder()
    with matrix_products(), contextlib.ExitStack() as held:
        elbo_scale = work.fitter.elbo_scale(options.beta)
        processes.wait()  # until all have seen what the folder holds
        if processes.leads:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out, "another infer_amort writes to it"))
            work.check_folder()  # another may just have ended
            work.prepare_folder()
        processes.wait()
        todo = work.todo()
        if processes.leads:
            work.foresee(elbo_scale, sum(len(index) for _, index in todo))
        work.fit(elbo_scale, todo)
        processes.wait()
        if not processes.leads:
            return None
        found = work.collect(elbo_scale)
        write_table_run(work.fitter, options, out, work.plan, found)
        shutil.rmtree(work.parts)
    return found


def _digest(batch: Batch) -> str:
    """Return a digest of all that is known of particles: images, poses, CTFs."""
    found = hashlib.sha256()
    for part in (batch.y, batch.image, batch.rot, batch.ctf):
        if part is not None:
            found.update(np.ascontiguousarray(part.cpu().numpy()).data)
    return found.hexdigest()


def _particles(run: Run, options: InferOptions) -> Particles:
    """Open the particles that are asked for, and check that the run's decoder can explain them."""
    given = {name: getattr(options, name) for name in INPUTS}
    if options.particles is None:
        if not options.held_out:
            return run.particles(complete=True, **given)
        held = run.held_out(**given)
        if held is None:
            raise InputError(f"--held-out: RUN {run.folder} was trained without --holdout")
        return held
    with_ctf = run.settings.ctf is not None
    if with_ctf != (options.ctf is not None):
        had, now = ("with", "give those of") if with_ctf else ("without", "leave out --ctf for")
        raise InputError(f"--ctf: RUN {run.folder} was trained {had} CTFs; {now} PARTICLES")
    found = run.open(**given, holdout=None)
    box = run.config["lattice_args"]["D"] - 1
    if found.box != box:
        raise InputError(
            f"PARTICLES {options.particles}: have {found.box} px, RUN {run.folder} was trained on "
            f"{box} px"
        )
    return found


def _progress(parts: list[Any], *, silent: bool) -> Iterator[Any]:
    """Show a bar on a terminal, a line every minute elsewhere."""
    if on_terminal() or silent:
        yield from bar(parts, "fitting", silent=silent)
        return
    said = time.monotonic()
    for count, part in enumerate(parts):
        yield part
        if time.monotonic() - said > 60:
            said = time.monotonic()
            logger.info(f"Fitted {count + 1} of {len(parts)} parts")
