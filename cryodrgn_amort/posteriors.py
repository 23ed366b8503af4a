"""Latents for the particles of any run, or for new ones: fitted, and kept as a table run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cryodrgn_amort import __version__
from cryodrgn_amort.checkpoints import write_pickle, write_weights, write_z
from cryodrgn_amort.errors import InputError
from cryodrgn_amort.feed import Feed
from cryodrgn_amort.files import (
    CHECKSUMS,
    digest,
    locked,
    recorded,
    replacing,
    write_json,
    write_text,
)
from cryodrgn_amort.inference import (
    FitOptions,
    Fitted,
    Posterior,
    Yardstick,
    anchored,
    elbo,
    errors_at,
    infer,
)
from cryodrgn_amort.metrics import kl_by_dimension
from cryodrgn_amort.model import build_model
from cryodrgn_amort.parallel import Team
from cryodrgn_amort.poses import write_poses
from cryodrgn_amort.products import matrix_products
from cryodrgn_amort.progress import bar, on_terminal
from cryodrgn_amort.repair import cluster_centres
from cryodrgn_amort.runs import CHOSEN, INPUT_FILES, INPUTS, model_args, write_config
from cryodrgn_amort.table import VLT, LookupTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cryodrgn_amort.inputs import EncoderInput
    from cryodrgn_amort.model import AmortVAE
    from cryodrgn_amort.particles import Batch, Particles
    from cryodrgn_amort.runs import Run

__all__ = ["STARTS", "Fitter", "InferOptions", "Inferred", "facts", "infer_run", "summary"]

logger = logging.getLogger("cryodrgn_amort")

STARTS = {
    "encoder": "the encoder's answer, or the particle's row of the table",
    "anchors": "latents of others, weighted by how well they explain the particle",
    "mean": "the mean of all latents",
    "prior": "zero",
}
_MANY = 500  # particles; more are fitted quickly unless told otherwise
_QUICK = FitOptions(steps=30, draws=8)
_PROBED, _FEWEST = 32, 4  # particles that tell beforehand what all take
_GAIN = 0.5  # nats that are worth more steps
_START_ANCHORS = 32  # decoded once, before hundreds of steps: more than ``anchored`` has
_VARIANCE_SAMPLE = 512
_PARTS = ".posteriors"
_RESULTS = ("mean", "logvar", "elbo", "converged", "start", "encoder_elbo")
_OF = "particles"  # in a part: digest of what was fitted


@dataclass(frozen=True)
class InferOptions:
    """What ``infer_amort`` is asked to do.

    Attributes
    ----------
    particles, poses, ctf, ind, datadir
        New particles; without ``particles``, new places of the run's own inputs.
    dose_per_tilt, angle_per_tilt
        Of tilt series, for runs that do not tell: those of ``train_vae``.
    held_out
        Whether the particles that were held out from the training are wanted.
    starts
        Names in ``STARTS``; None: the encoder's answer, where it has one, and "anchors".
    steps
        At most so many per particle and start; None: 400. But of more than 500 particles, with
        ``starts`` None as well, 30 from "anchors" alone.
    beta
        Weight of the KL divergence: "train", "implied" by the noise in the images, or a number.
    """

    particles: str | None = None
    poses: str | None = None
    ctf: str | None = None
    ind: str | None = None
    datadir: str | None = None
    dose_per_tilt: float | None = None
    angle_per_tilt: float | None = None
    held_out: bool = False
    starts: tuple[str, ...] | None = None
    beta: str = "train"
    steps: int | None = None
    seed: int = 0
    batch_size: int = 256
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 0:
            raise InputError(f"--steps {self.steps}: must not be negative")
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"--seed {self.seed}: must not be negative, nor huge")
        for name in self.starts or ():
            if name not in STARTS:
                raise InputError(f"--start {name}: not one of {', '.join(STARTS)}")
        if self.beta not in ("train", "implied"):
            try:
                usable = 0 <= float(self.beta) < float("inf")
            except ValueError:
                usable = False
            if not usable:
                raise InputError(f'--beta {self.beta}: "train", "implied" or a number is needed')
        if self.particles and not self.poses:
            raise InputError(f"PARTICLES {self.particles}: need their --poses")
        if self.particles and self.held_out:
            raise InputError("--held-out: is about the run's own particles, PARTICLES are new")


@dataclass(frozen=True)
class Inferred:
    """Fitted posteriors of some particles.

    Attributes
    ----------
    mean, logvar
        `(N, zdim)`.
    elbo, encoder_elbo
        In nats by ``yardstick``, `(N,)`; the second one NaN where there is no encoder.
    converged
        `(N,)` bool.
    start
        Positions in ``starts``, `(N,)`; -1: the encoder's answer as it was.
    fitted
        Whether any step was taken.
    would_gain
        If all were fitted quickly: share of a few that gain half a nat from a thorough fit.
    """

    mean: np.ndarray
    logvar: np.ndarray
    elbo: np.ndarray
    converged: np.ndarray
    start: np.ndarray
    encoder_elbo: np.ndarray
    starts: tuple[str, ...]
    yardstick: Yardstick
    fitted: bool = True
    would_gain: float | None = None

    @property
    def gap(self) -> np.ndarray:
        """What the encoder's answers lack in ELBO, in nats: `(N,)`."""
        gap: np.ndarray = self.elbo - self.encoder_elbo
        return gap

    @property
    def failed(self) -> np.ndarray:
        """Positions of the particles whose loss is not a number."""
        return np.flatnonzero(~np.isfinite(self.elbo))


class Fitter:
    """Fits posteriors of particles with the decoder of a run.

    Parameters
    ----------
    particles
        Any that the run's decoder can explain.
    own
        Whether they are those that the run was trained on.
    """

    def __init__(self, run: Run, particles: Particles, *, own: bool, seed: int = 0) -> None:
        self.run, self.particles, self.own, self.seed = run, particles, own, seed
        known = run.z()
        # its own particles with those that have no finite latents, or without
        complete = own and particles.n == run.n + len(run.odd)
        self.saved = run.z(complete=True) if complete else known
        if own and len(self.saved[0]) != particles.n:
            raise InputError(
                f"RUN {run.folder}: has latents of {len(self.saved[0])} particles, its inputs hold "
                f"{particles.n}"
            )
        self._rows = own and not run.encoder.shown_images
        shown: EncoderInput | None = None
        if run.encoder.shown_images and (own or run.shows_particles):
            self.model, shown = run.load(particles)
        else:
            self.model = run.load_decoder()[0]
        self.model.requires_grad_(False)
        self.feed = Feed(particles, shown, memory=0)
        device = particles.device
        mean, logvar = (torch.from_numpy(part).to(device) for part in known)
        self._means = known[0]
        self.spread = mean.std(0) if len(mean) > 1 else torch.ones_like(mean[0])
        self.centre = mean.mean(0)
        posteriors = bool(logvar.isfinite().all())
        self.usual_logvar = (
            logvar.mean(0) if posteriors else 2 * self.spread.clamp(min=1e-3).log() - 4
        )

    @property
    def has_answers(self) -> bool:
        """Whether there is an encoder's answer, or a row of a table, for these particles."""
        return self._rows or self.feed.shown is not None

    @torch.no_grad()
    def answer(self, batch: Batch) -> Posterior | None:
        """Return the encoder's posterior, or that in the table.

        What is not finite - a posterior of ``train_dec``, an answer to a damaged image - is the
        mean of all, or their usual variance.
        """
        if self._rows:
            parts = (torch.from_numpy(part[batch.index.numpy()]) for part in self.saved)
            mean, logvar = (part.to(self.particles.device) for part in parts)
        elif self.feed.shown is None:
            return None
        else:
            mean, logvar = (part.float() for part in self.model.posterior(batch))
        return (
            torch.where(mean.isfinite(), mean, self.centre),
            torch.where(logvar.isfinite(), logvar, self.usual_logvar),
        )

    def yardstick(self, beta: str) -> Yardstick:
        """Return that of a ``--beta``.

        Raises
        ------
        InputError
            If the run was trained with none that could be used.
        """
        if beta == "implied":
            return Yardstick.implied(self.variance)
        tilts = self.particles.ntilts  # errors add up over them; training takes their mean
        if beta != "train":
            return Yardstick(float(beta) * tilts)
        settings = self.run.settings
        value = settings.beta_value()
        if settings.beta_control is not None or isinstance(value, str):
            raise InputError(
                f"--beta train: RUN {self.run.folder} was trained with --beta-control, which "
                "weighs no single particle; give a number, or implied"
            )
        return Yardstick(value * tilts)

    @cached_property
    def anchors(self) -> Tensor:
        """Centres of clusters of the run's latents, `(K, zdim)`."""
        centres = cluster_centres(self._means, _START_ANCHORS, self.seed)
        return torch.from_numpy(centres).to(self.particles.device)

    @cached_property
    def variance(self) -> float:
        """Variance of the noise in a pixel: of what is left of a sample of the particles.

        At the saved latents of the run's own particles, else at the best anchors.
        """
        total, pixels = 0.0, 0
        for batch in self.sample():
            answer = self.answer(batch) if self.own else None
            if answer is not None:
                errors = errors_at(self.model, batch, answer[0][None])[0]
            else:
                errors = anchored(self.model, batch, self.anchors, 1.0)[1]
            sound = errors[errors.isfinite()]
            total += float(sound.double().sum())
            pixels += len(sound) * batch.tilts * batch.y.shape[1]
        if not pixels:
            raise InputError(f"PARTICLES {self.particles.images.src.filenames[0]}: no loss of a "
                             "sample of them is a number")  # fmt: skip
        return total / pixels

    def sample(self) -> Iterator[Batch]:
        """Read the particles that tell of the noise."""
        sample = np.random.default_rng(self.seed).permutation(self.particles.n)[:_VARIANCE_SAMPLE]
        return map(self.feed.read, torch.from_numpy(np.sort(sample)).split(128))

    def starts(
        self, batch: Batch, names: Sequence[str], answer: Posterior | None
    ) -> dict[str, Posterior]:
        """Return where fits start, by name."""
        size = len(batch.index)
        logvar = self.usual_logvar.expand(size, -1)
        found: dict[str, Posterior] = {}
        for name in names:
            if name == "encoder":
                assert answer is not None
                found[name] = answer
            elif name == "anchors":
                found[name] = anchored(self.model, batch, self.anchors, self.variance)[0], logvar
            elif name == "mean":
                found[name] = self.centre.expand(size, -1), logvar
            else:
                zero = torch.zeros_like(logvar)
                found[name] = zero, zero
        return found

    def fit(
        self, index: Tensor, names: Sequence[str], yardstick: Yardstick, options: FitOptions
    ) -> Fitted:
        """Fit the particles at positions ``index``."""
        batch = self.feed.read(index)
        answer = self.answer(batch)
        starts = self.starts(batch, names, answer)
        seed = int(np.random.SeedSequence([self.seed, int(index[0])]).generate_state(1)[0])
        fit, own = infer(self.model, batch, answer, starts, yardstick, options, self.spread, seed)
        return batch, fit, own, answer


class _Inference:
    """Fits all particles that were asked for, part by part; what is done is kept in ``OUT``."""

    def __init__(self, run: Run, options: InferOptions, out: Path, team: Team) -> None:
        self.run, self.options, self.out, self.team = run, options, out, team
        self.particles = _particles(run, options)
        own = options.particles is None and not options.held_out
        self.fitter = Fitter(run, self.particles, own=own, seed=options.seed)
        self.quick = options.starts is None and options.steps is None and self.particles.n > _MANY
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
            "steps": self.fit_options.steps, "contents": self._contents(),
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
        ours = sorted(path.name for path in _earlier(out))
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
            if number % self.team.size == self.team.rank and not self._is_done(number, index)
        ]
        done = len(range(self.team.rank, len(chunks), self.team.size)) - len(todo)
        if done and self.team.leads:
            logger.info(f"Going on after {done} of {done + len(todo)} parts")
        return todo

    def foresee(self, yardstick: Yardstick, left: int) -> None:
        """Fit a few particles, to say how long ``left`` take, and what quick fits will lack."""
        fitter, n = self.fitter, self.particles.n
        most = _PROBED if fitter.feed.particles.device.type == "cpu" else self.options.batch_size
        count = min(most, n // 10)  # a GPU takes as long for a few
        if count < _FEWEST or not (left or self.quick):
            return
        mixed = np.random.default_rng(self.options.seed + 1).permutation(n)
        index = torch.from_numpy(np.sort(mixed[:count]))
        if "anchors" in self.names:
            _ = fitter.anchors, fitter.variance  # which all particles share

        def timed(names: Sequence[str], options: FitOptions) -> tuple[Batch, Posterior, str]:
            began = time.perf_counter()
            batch, fit, _, _ = fitter.fit(index, names, yardstick, options)
            seconds = (time.perf_counter() - began) * left / count
            return batch, (fit.mean, fit.logvar), str(timedelta(seconds=round(seconds)))

        batch, found, took = timed(self.names, self.fit_options)
        many = f"{left} particles" if self.team.size == 1 else f"{left} particles in each process"
        logger.info(f"Fitting {many} takes about {took} (h:mm:ss), as {count} of them tell")
        if not self.quick:
            return
        _, better, took = timed(self._starts(), self.thorough)
        generator = torch.Generator().manual_seed(self.options.seed)
        draws = torch.randn(8, *found[0].shape, generator=generator).to(found[0])
        old, new = (elbo(fitter.model, batch, q, yardstick, draws) for q in (found, better))
        self.would_gain = float((new - old > _GAIN).float().mean())
        logger.info(f"{_lacking(self.would_gain)}: that takes about {took}")

    def fit(self, yardstick: Yardstick, todo: list[tuple[int, Tensor]]) -> None:
        """Fit these parts."""
        for number, index in _progress(todo, silent=not self.team.leads):
            batch, fit, own, _ = self.fitter.fit(index, self.names, yardstick, self.fit_options)
            values = [fit.mean, fit.logvar, fit.elbo, fit.converged, fit.start,
                      torch.full_like(fit.elbo, torch.nan) if own is None else own]  # fmt: skip
            arrays = (value.cpu().numpy() for value in values)
            with replacing(self._part(number)) as temporary, open(temporary, "wb") as handle:
                kept = dict(zip(_RESULTS, arrays, strict=True))
                np.savez(handle, **{_OF: _digest(batch)}, **kept)  # type: ignore[arg-type]

    def _is_done(self, number: int, index: Tensor) -> bool:
        """Tell whether a part is whole, and of the particles as they are now."""
        found = self._done(number, len(index))
        return found is not None and found[_OF] == _digest(self.fitter.feed.read(index))

    def _done(self, number: int, count: int) -> dict[str, np.ndarray] | None:
        """Read a part of ``count`` particles; None: it is not there, or not whole."""
        try:
            with np.load(self._part(number), allow_pickle=False) as part:
                found = {name: part[name] for name in (_OF, *_RESULTS)}
        except Exception:  # zip, numpy and the system have many for a damaged one
            return None
        return found if all(len(found[name]) == count for name in _RESULTS) else None

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.npz"

    def collect(self, yardstick: Yardstick) -> Inferred:
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
            **whole, starts=self.names, yardstick=yardstick, fitted=stepped,
            would_gain=self.would_gain,
        )  # fmt: skip


def infer_run(
    run: Run, options: InferOptions, outdir: str | Path, team: Team | None = None
) -> Inferred | None:
    """Fit posteriors, and write them as a table run that everything opens that opens a run.

    Parameters
    ----------
    team
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
    team, out = team or Team(), Path(outdir)
    work = _Inference(run, options, out, team)
    work.check_folder()
    with matrix_products(), contextlib.ExitStack() as held:
        yardstick = work.fitter.yardstick(options.beta)
        team.wait()  # until all have seen what the folder holds
        if team.leads:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out, "another infer_amort writes to it"))
            work.check_folder()  # another may just have ended
            work.prepare_folder()
        team.wait()
        todo = work.todo()
        if team.leads:
            work.foresee(yardstick, sum(len(index) for _, index in todo))
        work.fit(yardstick, todo)
        team.wait()
        if not team.leads:
            return None
        found = work.collect(yardstick)
        _write(run, options, out, work, found)
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


def _names(epoch: int) -> list[str]:
    """Name what is written beside config.yaml and inference.json."""
    kinds = [f"{kind}{of}.pkl" for kind in ("z", "pose", "weights") for of in ("", f".{epoch}")]
    return [*kinds, *(f"{name}.pkl" for name in ("ind", "elbo", "converged", "gap"))]


def _earlier(out: Path) -> list[Path]:
    """Return what an earlier call left that another one must replace, or remove."""
    names = {*_names(0), CHECKSUMS}
    of_epoch = re.compile(r"(?:z|pose|weights)\.\d+\.pkl")
    there = out.iterdir() if out.is_dir() else ()
    return [path for path in there if path.name in names or of_epoch.fullmatch(path.name)]


def _write(run: Run, options: InferOptions, out: Path, work: _Inference, found: Inferred) -> None:
    """Write a table run, and what is known of each particle."""
    (out / "inference.json").unlink(missing_ok=True)  # nothing is done until all is written
    for path in _earlier(out):
        path.unlink()
    with recorded(out, "config.yaml", *_names(run.epoch)):
        _write_files(run, options, out, work, found)
    write_json(out / "inference.json", {"plan": json.loads(work.plan), **facts(found)})


def _write_files(
    run: Run, options: InferOptions, out: Path, work: _Inference, found: Inferred
) -> None:
    particles, epoch = work.particles, run.epoch
    given: dict[str, Any] = {
        name: None if path is None else str(Path(path).absolute())
        for name in INPUT_FILES
        if (path := getattr(options, name)) is not None or options.particles is not None
    }
    doses = {name: getattr(options, name) for name in INPUTS if name not in INPUT_FILES}
    given |= {name: value for name, value in doses.items() if value is not None}
    if options.particles is None and run.settings.holdout is not None:
        write_pickle(out / CHOSEN, particles.ind)
        given["ind"] = str((out / CHOSEN).absolute())
    own = options.particles is None and not options.held_out and options.poses is None
    if own and run.refined_poses is not None:
        for name in (f"pose.{epoch}.pkl", "pose.pkl"):
            write_poses(out / name, particles.rots, particles.trans, particles.D)
    else:
        given["do_pose_sgd"] = False
    settings = replace(
        run.settings, encoder="vlt", recipe=None, holdout=None, outdir=str(out.absolute()),
        extra={"table_freeze": True}, **given,
    )  # fmt: skip
    particles.held_out = None
    write_config(out, settings, VLT, particles)
    table = LookupTable(torch.from_numpy(found.mean), torch.from_numpy(found.logvar), None)
    args = model_args(settings, VLT, particles.D)
    model: AmortVAE = build_model(args, particles.lattice, table)
    model.decoder.load_state_dict(work.fitter.model.decoder.state_dict())
    for name in (f"z.{epoch}.pkl", "z.pkl"):
        write_z(out / name, found.mean, found.logvar)
    for name in (f"weights.{epoch}.pkl", "weights.pkl"):
        write_weights(
            out / name, epoch, model.host_state_dict(), encoder="vlt",
            encoder_state_dict=model.own_state_dict(), norm=list(particles.norm),
        )  # fmt: skip
    _write_log(out, work, found)
    write_pickle(out / "elbo.pkl", found.elbo)
    write_pickle(out / "converged.pkl", found.converged)
    if work.fitter.has_answers:
        write_pickle(out / "gap.pkl", found.gap)


def _write_log(out: Path, work: _Inference, found: Inferred) -> None:
    """Write run.log, from which ``cryodrgn analyze`` reads the losses of epochs."""
    sound = np.isfinite(found.elbo)
    if not sound.any():
        sound[:] = True  # the line says "nan"
    pixels = len(work.particles.mask) * work.particles.ntilts
    total = float(-2 * found.yardstick.variance * found.elbo[sound].mean() / pixels)
    kld = float(kl_by_dimension(found.mean[sound], found.logvar[sound]).sum(1).mean())
    gen_loss = total - found.yardstick.beta * kld / pixels
    lines = [
        " ".join(sys.argv),
        f"Latents fitted with the decoder of {work.run.folder}, epoch {work.run.epoch}",
        *summary(found).splitlines(),
        f"# =====> Epoch: {work.run.epoch} Average gen loss = {gen_loss:.6}, KLD = {kld:.6f}, "
        f"total loss = {total:.6f}; Finished",
    ]
    write_text(out / "run.log", "".join(f"{line}\n" for line in lines))


def facts(found: Inferred) -> dict[str, Any]:
    """Return the main numbers."""
    sound = np.isfinite(found.elbo)
    gap = found.gap[np.isfinite(found.gap)]
    best = np.bincount(found.start[sound] + 1, minlength=len(found.starts) + 1) / max(
        sound.sum(), 1
    )
    return {
        "particles": len(sound),
        "converged": float(found.converged.mean()),
        "failed": found.failed.tolist(),
        "beta": found.yardstick.beta,
        "variance": found.yardstick.variance,
        "elbo": float(found.elbo[sound].mean()) if sound.any() else None,
        "amortization_gap": float(gap.mean()) if len(gap) else None,
        "would_gain": found.would_gain,
        "best_start": dict(zip(("kept", *found.starts), best.tolist(), strict=True)),
    }


def summary(found: Inferred) -> str:
    """Return the main numbers as text."""
    f = facts(found)
    shares = ", ".join(
        f"{name} {100 * share:.0f} %" for name, share in f["best_start"].items() if share
    )
    lines = [
        f"{f['particles']} particles, beta {f['beta']:.4g}, noise variance {f['variance']:.4g}: "
        + (f"{100 * f['converged']:.1f} % converged" if found.fitted else "not fitted"),
        f"ELBO {_nats(f['elbo'])}; best from: {shares}",
    ]
    if f["amortization_gap"] is not None:
        lines.append(f"Amortization gap: {_nats(f['amortization_gap'])} on average")
    if found.would_gain is not None:
        lines.append(_lacking(found.would_gain))
    if len(found.failed):
        named = ", ".join(map(str, found.failed[:10])) + (", ..." if len(found.failed) > 10 else "")
        lines.append(
            f"The loss of {len(found.failed)} particles is not a number; they keep where they "
            f"started: {named}"
        )
    return "\n".join(lines)


def _lacking(share: float) -> str:
    return (
        f"More than {_MANY} particles are fitted quickly; of a few that were tried, "
        f"{100 * share:.0f} % would gain {_GAIN} nats or more by --steps {FitOptions.steps}"
    )


def _nats(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g} nats"
