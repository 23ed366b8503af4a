"""The training loop, readable from top to bottom."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from dataclasses import replace
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from cryodrgn_amort import __version__, host
from cryodrgn_amort.augment import Augmented
from cryodrgn_amort.checkpoints import (
    INTERRUPTED,
    OWN_KEY,
    epochs,
    read_weights,
    write_weights,
    write_z,
)
from cryodrgn_amort.draws import Draws
from cryodrgn_amort.epoch import Part
from cryodrgn_amort.errors import InputError, Stopped
from cryodrgn_amort.feed import Feed
from cryodrgn_amort.files import locked, recorded, write_json
from cryodrgn_amort.folders import METRICS, NOISE, RunFolder
from cryodrgn_amort.interrupts import Requests
from cryodrgn_amort.latent import NotFiniteError, adam, train_step
from cryodrgn_amort.machine import available_memory
from cryodrgn_amort.model import build_model
from cryodrgn_amort.objective import falling_rate, kl_divergence
from cryodrgn_amort.parallel import join
from cryodrgn_amort.particles import odd_images
from cryodrgn_amort.poses import RefinedPoses
from cryodrgn_amort.products import matrix_products
from cryodrgn_amort.progress import bar, logging_to, on_terminal
from cryodrgn_amort.repair import AnchoredEncoder, SecondStage
from cryodrgn_amort.resume import check_start, checkpoint_of, holdout_of
from cryodrgn_amort.runs import (
    HOLDOUT,
    TRAINED,
    default_device,
    load_run,
    model_args,
    source_of,
    write_config,
)
from cryodrgn_amort.sleep import Sleep
from cryodrgn_amort.sources import load_particles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from cryodrgn_amort.latent import Lesson
    from cryodrgn_amort.objective import Losses
    from cryodrgn_amort.particles import Batch, Particles
    from cryodrgn_amort.plugins import Plugins
    from cryodrgn_amort.settings import TrainSettings

__all__ = ["Trainer"]

logger = logging.getLogger("cryodrgn_amort")

_ENCODE_BATCH = 256
_MOST_LEFT_OUT = 0.1  # of the particles in an epoch, by --on-nan skip
_MOST_ROLLBACKS = 5


class _RollbackError(Exception):
    """Training is to go back to the last checkpoint."""


class Trainer:
    """Trains one run. Making it checks everything and writes nothing; ``fit`` trains.

    ``particles`` are those that the settings name, if they have been opened already.

    The baseline makes the same random draws in the same order as ``cryodrgn train_vae``, so that
    equal seeds give equal weights.

    Attributes
    ----------
    settings, plugins, particles, model
        What is trained, on what.
    folder
        The run folder.
    team
        This process among those that train the run.
    shown
        What a network encoder is shown; None for tables.
    stage
        Latents of the run whose decoder this one has: mean and log variance; None: there is none.
    poses
        Poses that are refined; None: they stay as given.
    lesson
        What the encoder learns from in place of the particles; None: from these.
    draws
        All random states.
    optimizer
        The common optimizer: decoder and network. A table has its own.
    epoch
        The epoch that is running or has last ended, from 1.
    seen
        Particles gone through since training began, all epochs together; a run that goes on
        counts on.
    """

    def __init__(
        self, settings: TrainSettings, plugins: Plugins, particles: Particles | None = None
    ) -> None:
        self.settings, self.plugins = settings, plugins
        self.team = join()
        if self.team.size > 1 and settings.beta_control is not None:
            raise InputError("--beta-control: not with several processes, whose KL it does not add")
        if self.team.size > 1 and settings.shuffler_size:
            raise InputError("--shuffler-size: not with several processes")
        if self.team.size > 1 and settings.do_pose_sgd:
            raise InputError("--do-pose-sgd: not with several processes")
        self.folder = Path(settings.outdir)
        self.files = RunFolder(self.folder)
        self.device = default_device()
        self.encoder_spec, input_spec = settings.resolve(plugins)
        checkpoint, own = checkpoint_of(settings, self.files, self.encoder_spec)
        self.settings = settings = replace(settings, holdout=holdout_of(settings))

        source = source_of(settings)
        if source.norm is None and own.get("norm"):  # a resumed run keeps its normalisation
            source = replace(source, norm=tuple(own["norm"]))
        source = replace(source, refined=own.get("pose_file"))
        whole = settings.enc_mask == -1
        self.particles = particles or load_particles(source, self.device, whole=whole)
        check_start(settings, self.encoder_spec, self.particles, plugins)
        amort = self.encoder_spec.make(settings, self.particles)
        if amort is not None:
            self.team.split(amort, amort.per_particle)
        self.shown = input_spec.build(settings, self.particles) if input_spec else None

        tilts = self.particles.tilts
        self.draws = Draws(
            self.device,  # and the generator that the host draws tilts from
            np.random.RandomState(settings.seed % 2**32) if tilts and tilts.random else None,
        )
        torch.manual_seed(settings.seed)
        refined = settings.do_pose_sgd
        self.poses = RefinedPoses(self.particles, settings.pose_lr) if refined else None
        args = model_args(settings, self.encoder_spec, self.particles.D)
        precision = settings.matmul_precision(self.device.type)
        self.model = build_model(args, self.particles.lattice, amort, precision)
        self.stage = self._second_stage() if settings.from_run else None
        self.lesson: Lesson | None = None
        self.optimizer = adam(self.model.trained_parameters(), settings.lr, settings.wd)
        self.beta = host.get_beta_schedule(settings.beta_value())
        self.epoch = self.seen = 0
        self._random: dict[str, Any] = {}
        self._part: Part | None = None
        self._rollbacks = 0
        if checkpoint:
            self._restore(checkpoint, own)

    def fit(self) -> None:
        """Train to the last epoch, with a checkpoint every ``--checkpoint`` epochs."""
        beside = (self.folder, *self.folder.absolute().parents)
        self._prepare_particles(next(path for path in beside if path.is_dir()))
        self.team.wait()  # until all have seen what the folder holds
        with contextlib.ExitStack() as held:
            if self.team.leads:
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(self.folder, "another training writes to it"))
                self._prepare_folder()
            try:
                path = self.folder / "run.log" if self.team.leads else None
                with logging_to(path, self.settings.verbose), matrix_products():
                    self._train()
            finally:  # a run that ends before its first checkpoint replaces nothing
                if self.team.leads:
                    self.files.put_back()
        if self.settings.do_analysis and self.team.leads:
            self._analyze()

    def _analyze(self) -> None:
        """Let the host analyze the run, which is complete whatever comes of it."""
        n, zdim = self.particles.n, self.settings.zdim
        try:
            left_out = host.analyze(str(self.folder), self.epoch, n, zdim)
        except Exception as err:  # whatever its own libraries raise
            left_out = f"{type(err).__name__}: {err}".splitlines()[0]
        if left_out is not None:
            logger.warning(f"cryodrgn analyze, not all of it: {left_out}")

    def _second_stage(self) -> tuple[Tensor, Tensor]:
        """Take over the decoder of ``--from``; returns the latents of its run."""
        name = f"--from {self.settings.from_run}"
        run = load_run(str(self.settings.from_run), self.plugins, flag="--from")
        if self.particles.whole and self.encoder_spec.sleeps:
            raise InputError(f"--enc-mask -1: {name} makes up no corners of images")
        try:
            self.model.decoder.load_state_dict(run.load_decoder()[0].decoder.state_dict())
        except RuntimeError:
            raise InputError(f"{name}: its decoder is another one than was asked for") from None
        self.model.fast.forget()
        mean, logvar = (torch.from_numpy(part).to(self.device) for part in run.z(complete=True))
        if not logvar.isfinite().all():  # of train_dec: it has no posteriors
            logvar = torch.full_like(mean, -np.inf)
        if self.encoder_spec.sleeps:
            self.model.fix_decoder()
            if isinstance(self.model.amort, SecondStage):
                self.model.amort.learn_from(mean)
        return mean, logvar

    def _prepare_lesson(self) -> None:
        """Make what the encoder learns from, if that is not the particles as they are."""
        settings = self.settings
        if settings.augment is not None:
            self.lesson = Augmented(self.particles, settings.augment, settings.consistency)
        if self.stage is None or not self.encoder_spec.sleeps:
            return
        amort = self.model.amort
        anchored = amort if isinstance(amort, AnchoredEncoder) else None
        templates = None if anchored is None else anchored.templates
        self.lesson = sleep = Sleep(
            self.model.fast, self.particles, *self.stage, templates, settings.seed
        )
        if anchored is not None and not self.epoch:
            anchored.precision.copy_(sleep.noise.precision())

    def _compare_images(self) -> None:
        """Write how alike the images made up and the particles are, and warn if they are not."""
        known = (self.epoch or self._part) and (self.folder / NOISE).is_file()
        if known or not isinstance(self.lesson, Sleep) or not self.team.leads:
            return
        self.lesson.epoch_start(self.epoch + 1)
        found = self.lesson.agreement()
        write_json(self.folder / NOISE, {**self.lesson.noise.facts(), **found.facts()})
        ratio = found.power_ratio
        logger.info(
            f"Images made up have {ratio.min():.2f} to {ratio.max():.2f} times the particles' power"
        )
        if warning := found.warning():
            logger.warning(warning)

    def endless_steps(self) -> Iterator[None]:
        """Take optimizer steps, epoch after epoch, and keep nothing: for whoever times them."""
        self._prepare_particles(None)
        self.model.train()
        self.epoch = self.settings.pretrain  # poses move, if they are refined
        while True:
            if self.model.amort is not None:
                self.model.amort.epoch_start(0.0)
            if self.lesson is not None:
                self.lesson.epoch_start(1)
            for batch in self.batches:
                with matrix_products():
                    self._step(batch, self.beta(0))
                yield

    def _prepare_particles(self, folder: Path | None) -> None:
        settings = self.settings
        half = available_memory() // 2 // self.team.local_size
        memory = half if settings.memory is None else int(settings.memory * 1e9)
        self.feed = Feed(
            self.particles if self.poses is None else self.poses.particles,
            self.shown,
            memory=0 if settings.lazy else memory,
            folder=folder,
            team=self.team,
            progress=lambda items, total: self._bar(items, "preprocessing", total),
        )
        threads = 2 if settings.num_workers is None else max(1, settings.num_workers)
        self.batches = self.feed.batches(
            settings.batch_size,
            shuffle=True,
            shuffle_seed=settings.shuffle_seed,
            threads=threads,
            rng=self.draws.tilts,
            shuffler_size=settings.shuffler_size,
        )
        self.draws.shuffle = self.batches.generator
        self._prepare_lesson()

    def _train(self) -> None:
        settings = self.settings
        self._log_start()
        self._compare_images()
        self.draws.restore(self._random)
        self._tell("training_start")
        started, first = time.monotonic(), self.epoch + 1
        with Requests(several=self.team.size > 1) as requests:
            while self.epoch < settings.num_epochs:
                self.epoch += 1
                try:
                    row = self._train_epoch(requests)
                except _RollbackError as why:
                    self._roll_back(str(why))
                    continue
                if self.team.leads:
                    self.files.write_metrics(row)
                self._tell("epoch_end", metrics=row)
                if settings.is_checkpoint(self.epoch) or self.epoch == settings.num_epochs:
                    self._write_checkpoint()
        if self.team.leads:
            self.files.finish(self.epoch)
            logger.info("Training complete")
        took = timedelta(seconds=time.monotonic() - started)
        each = took / max(self.epoch - first + 1, 1)
        logger.info(f"Finished in {took} ({each} per epoch)")
        self._tell("training_end")

    def _tell(self, event: str, **facts: Any) -> None:
        """Tell plugins of an event; of several processes the leading one does."""
        if self.team.leads:
            self.plugins.tell(event, trainer=self, **facts)

    def _train_epoch(self, requests: Requests) -> dict[str, float]:
        """Go through all particles once; returns the epoch's row of metrics.csv."""
        self.model.train()
        part = self._begin_epoch()
        started = time.monotonic() - part.seconds
        what = f"epoch {self.epoch}/{self.settings.num_epochs}"
        with contextlib.closing(iter(self.batches)) as coming:  # if need be, before its end
            for number, batch in enumerate(self._bar(coming, what, len(self.batches))):
                if number < part.batches:  # done before training was stopped
                    continue
                self._train_batch(batch, part)
                part.seconds = time.monotonic() - started
                if part.batches < len(self.batches) and self._is_stopped(requests):
                    self._stop(part, requests)
        self.team.add([part.sums, part.moments])
        gen_loss, kld, total = part.averages()
        if not math.isfinite(total) or not part.counted:
            raise InputError(self._diverged())
        took = time.monotonic() - started
        logger.info(  # cryodrgn analyze reads this line
            f"# =====> Epoch: {self.epoch} Average gen loss = {gen_loss:.6}, KLD = {kld:.6f}, "
            f"total loss = {total:.6f}; Finished in {timedelta(seconds=took)}"
        )
        own = {} if self.model.amort is None else self.model.amort.epoch_metrics()
        own |= {} if self.lesson is None else self.lesson.epoch_metrics()
        return {
            "epoch": self.epoch,
            "gen_loss": gen_loss,
            "kld": kld,
            "loss": total,
            "seconds": round(took, 3),
            "images_per_second": round(part.seen * self.particles.ntilts / took, 1),
            "active_units": part.active_units(),
            **own,
        }

    def _train_batch(self, batch: Batch, part: Part) -> None:
        """Take a step, and add what it found to the epoch's sums."""
        settings = self.settings
        if self._random:  # the first one after training was stopped
            self.draws.restore(self._random)
            self._random = {}
        self.seen = self.particles.n * (self.epoch - 1) + part.seen + batch.size
        beta = self.beta(self.seen)
        random, lesson = self.draws.state(), self._lesson_state()
        try:
            losses, mean = self._step(batch, beta)
        except NotFiniteError:
            if self.lesson is not None:
                self.lesson.set_epoch_state(lesson)
            self._no_loss(batch, part, random)
            part.leave_out(batch)
            return
        part.add(batch, losses, mean)
        self._tell("batch_end", losses=losses)
        if part.seen % settings.log_interval < settings.batch_size and not on_terminal():
            self._log_batch(part.seen, losses)

    def _diverged(self) -> str:
        kept = f"epoch {epochs(self.folder)[-1]}" if epochs(self.folder) else "none"
        return (
            f"the loss of epoch {self.epoch} is no usable number: training has diverged (last good "
            f"checkpoint: {kept}); try a smaller --lr"
        )

    @torch.no_grad()
    def _no_loss(self, batch: Batch, part: Part, random: dict[str, Any]) -> None:
        """Do what ``--on-nan`` says about a batch without a loss, before which all is as it was."""
        batch = self._posed(batch)
        mean, logvar = self.model.posterior(batch)
        each = self.model.errors(batch, mean)[1] + kl_divergence(mean, logvar)
        bad = self.team.together(batch.index[~each.isfinite().cpu()].tolist())
        named = 0 < len(bad) < batch.size  # else the weights are to blame, not the particles
        if not named:
            what = self._diverged()
        else:
            rows = np.array(sorted(bad))
            rows = rows if self.particles.ind is None else self.particles.ind[rows]
            noun = "image" if self.particles.tilts is None else "particle"
            what = f"{odd_images(rows.tolist(), 'without a loss', noun)}, in epoch {self.epoch}"
        if self.settings.on_nan == "rollback":
            raise _RollbackError(what)
        if self.settings.on_nan == "skip":
            logger.warning(f"Batch left out: {what}")
            if part.left_out > _MOST_LEFT_OUT * self.particles.n:
                raise InputError(f"more than a tenth of the particles have no loss: {what}")
            return
        if named:
            self.draws.restore(random)
            self._keep(part)
            what += "; --load latest goes on before this batch, with --on-nan skip without it"
        raise InputError(what)

    def _roll_back(self, why: str) -> None:
        """Go back to the last checkpoint, with half the learning rate."""
        known = epochs(self.folder)
        self._rollbacks += 1
        if not known or self._rollbacks > _MOST_ROLLBACKS:
            raise InputError(f"{why}; --on-nan rollback: " + (
                f"{_MOST_ROLLBACKS} times were not enough" if known else "there is no checkpoint"
            ))  # fmt: skip
        checkpoint = read_weights(self.folder / f"weights.{known[-1]}.pkl", "-o")
        self._restore(checkpoint, checkpoint[OWN_KEY])
        self.draws.restore(self._random)
        self._set_rate(self.epoch / self.settings.num_epochs)
        rate = self.optimizer.param_groups[0]["lr"]
        logger.warning(f"Back to epoch {self.epoch}, learning rate {rate:g}: {why}")

    def _begin_epoch(self) -> Part:
        """Begin the epoch, or go on in one that training was stopped in."""
        part, self._part = self._part, None
        amort, lesson, done = self.model.amort, self.lesson, self.epoch - 1
        stopped_at = self.draws.state()
        if lesson is not None:
            lesson.epoch_start(self.epoch)
        if amort is not None:
            amort.epoch_start(done / self.settings.num_epochs)
        self._set_rate(done / self.settings.num_epochs)
        if part is not None:
            for name in ("shuffle", "tilts"):  # the loader draws these itself, ahead
                stopped_at.pop(name, None)
            self._random = stopped_at
            self.draws.restore(part.begin)  # it draws what it drew
            if amort is not None:
                amort.set_epoch_state(part.encoder)
            if lesson is not None:
                lesson.set_epoch_state(part.lesson)
            return part
        self._random = {}
        return Part.new(self.draws.state(), self.settings.zdim, self.device, self._given())

    def _given(self) -> list[str]:
        """Say what the batches of an epoch depend on."""
        settings = self.settings
        flags = {
            "-b": settings.batch_size,
            "--shuffle-seed": settings.shuffle_seed,
            "--augment": settings.augment,
            "--from": None if settings.from_run is None else "RUN",
        }
        if settings.tilted:
            flags |= {"--ntilts": settings.ntilts, "--random-tilts": settings.random_tilts}
        if settings.shuffler_size:
            flags["--shuffler-size"] = settings.shuffler_size
        texts = (f"no {flag}" if v is None else f"{flag} {v}" for flag, v in flags.items())
        return [f"{self.particles.n} particles", *texts]

    def _is_stopped(self, requests: Requests) -> bool:
        """Tell whether any process was asked to stop."""
        requests.number = self.team.most(requests.number or 0) or None
        return requests.number is not None

    def _stop(self, part: Part, requests: Requests) -> NoReturn:
        """Keep all that is needed to go on with the next batch, and stop."""
        self._keep(part)
        assert requests.number is not None
        where = f"in epoch {self.epoch} after {part.batches} of {len(self.batches)} batches"
        logger.info(f"Stopped by {requests.name} {where}")
        raise Stopped(
            f"stopped by {requests.name} {where}; --load latest goes on from there",
            requests.number,
        )

    def _keep(self, part: Part) -> None:
        """Write a checkpoint within the epoch."""
        amort = self.model.amort
        if amort is not None:
            state = amort.epoch_state()
            part.encoder = self.team.rows_of_all(state, amort.per_particle, self.particles.n)
        part.lesson = self._lesson_state()
        self.team.add([part.sums, part.moments])
        random, own_state = self.draws.state(), self._own_state()
        if not self.team.leads:
            return
        with recorded(self.folder, INTERRUPTED, METRICS):
            self._write_weights(INTERRUPTED, self.epoch - 1, random, part, own_state)
        self.files.drop_replaced()

    def _lesson_state(self) -> dict[str, Any]:
        return {} if self.lesson is None else self.lesson.epoch_state()

    def _step(self, batch: Batch, beta: float) -> tuple[Losses, Tensor]:
        moving = self.poses if self.epoch >= self.settings.pretrain else None
        with torch.set_grad_enabled(moving is not None):
            batch = self._posed(batch)
        found = train_step(
            self.model, self.optimizer, batch, beta, self.settings.beta_control, self.team,
            self.lesson, check=True,
        )  # fmt: skip
        if moving is not None:
            moving.step()
        return found

    def _posed(self, batch: Batch) -> Batch:
        """Give a batch the poses that its images have by now."""
        return batch if self.poses is None else self.poses.posed(batch)

    def _set_rate(self, done: float) -> None:
        """Let the learning rate fall, when it is asked for."""
        start, end = self.settings.lr, self.settings.lr_end
        if end is None and not self._rollbacks:
            return
        rate = start if end is None else falling_rate(start, end, done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate / 2**self._rollbacks

    @torch.no_grad()
    def encode(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the posterior means and log variances of all particles, each `(N, zdim)`.

        Of several processes, only the leading one gets them.
        """
        self.model.eval()
        known = None if self.model.amort is None else self.model.amort.latents()
        if known is not None:
            parts = [torch.cat(known, 1)]
        else:
            # a loader draws a seed from the global generator, as the host's eval_z does
            batches = self.feed.batches(
                max(1, _ENCODE_BATCH // self.particles.ntilts), shuffle=False, rng=self.draws.tilts
            )
            parts = [
                torch.cat(self.model.posterior(self._posed(batch)), 1).float() for batch in batches
            ]
        both = self.team.collect(torch.cat(parts), self.particles.n).cpu().numpy()
        return both[:, : self.settings.zdim], both[:, self.settings.zdim :]

    def _write_checkpoint(self) -> None:
        """Write z.EPOCH.pkl, weights.EPOCH.pkl last: a checkpoint is complete once both exist."""
        # an extra checkpoint at the very end must not change how the run would go on
        extra = not self.settings.is_checkpoint(self.epoch)
        before = self.draws.state()
        z = self.encode()
        random = before if extra else self.draws.state()
        own_state = self._own_state()
        if not self.team.leads:
            return
        names = [f"{kind}.{self.epoch}.pkl" for kind in ("z", "pose", "weights")]
        with recorded(self.folder, *names, METRICS):
            write_z(self.folder / names[0], *z)
            if self.poses is not None:
                self.poses.write(self.folder / names[1])
            self._write_weights(names[2], self.epoch, random, own_state=own_state)
        (self.folder / INTERRUPTED).unlink(missing_ok=True)
        self.files.drop_replaced()
        self._tell("checkpoint_written", path=self.folder / names[2])

    def _write_weights(
        self,
        name: str,
        epoch: int,
        random: dict[str, Any],
        part: Part | None = None,
        own_state: dict[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint after ``epoch`` epochs, and ``part`` of the next one."""
        more: dict[str, Any] = {} if part is None else {"part": vars(part)}
        more |= {} if self.poses is None else {"poses": self.poses.state_dict()}
        write_weights(
            self.folder / name, epoch, self.model.host_state_dict(), self.optimizer.state_dict(),
            encoder=self.settings.encoder, random=random, norm=list(self.particles.norm),
            encoder_state_dict=self._own_state() if own_state is None else own_state,
            input_state={} if self.shown is None else self.shown.state_dict(), **more,
        )  # fmt: skip

    def _own_state(self) -> dict[str, Any]:
        """Return the state of an encoder of ours, rows of all processes together."""
        amort = self.model.amort
        if amort is None:
            return {}
        state = self.model.own_state_dict()
        return self.team.rows_of_all(state, amort.per_particle, self.particles.n)

    def _restore(self, checkpoint: dict[str, Any], own: dict[str, Any]) -> None:
        name = f"--load {self.settings.load}"
        own_state = own.get("encoder_state_dict", {})
        if self.model.amort is not None:
            own_state = self.team.own_rows(own_state, self.model.amort.per_particle)
        sleeps = self.stage is not None and self.encoder_spec.sleeps
        fixed = [v.clone() for v in self.model.decoder.state_dict().values()] if sleeps else []
        self.model.restore(checkpoint["model_state_dict"], own_state, name)
        if not all(map(torch.equal, fixed, self.model.decoder.state_dict().values())):
            raise InputError(
                f"--from {self.settings.from_run}: its decoder is not the one that {name} was "
                "trained for: it has been trained since; begin anew with --overwrite"
            )
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        except (KeyError, ValueError) as err:
            raise InputError(f"{name}: optimizer of another model ({err})") from None
        if self.shown is not None and "input_state" in own:
            try:
                self.shown.load_state_dict(own["input_state"])
            except InputError as err:
                raise InputError(f"{name}: {err}") from None
        if self.poses is not None:
            self.poses.restore(own.get("poses"), name)
        self._random = own.get("random", {})
        self.epoch = int(checkpoint["epoch"])
        try:
            if "torch" in self._random:
                torch.Generator().set_state(self._random["torch"])  # it is one
            self._part = self._restored(own["part"], name) if "part" in own else None
        except InputError:
            raise
        except Exception as err:  # whatever a damaged one leads to
            reason = f"{type(err).__name__}: {err}".splitlines()[0]
            raise InputError(f"{name}: a damaged checkpoint ({reason})") from None
        done = 0 if self._part is None else self._part.seen
        self.seen = self.epoch * self.particles.n + done

    def _restored(self, kept: dict[str, Any], name: str) -> Part:
        """Take up the part of an epoch that a checkpoint holds."""
        part = Part(**kept)
        for was, now in zip_longest(part.given, self._given(), fillvalue="nothing more"):
            if was != now:
                raise InputError(f"{name}: stopped within an epoch, with {was}, not {now}")
        torch.Generator().set_state(part.begin["torch"])
        if self.model.amort is not None:
            part.encoder = self.team.own_rows(part.encoder, self.model.amort.per_particle)
        return part.to(self.device, keep_sums=self.team.leads)

    def _prepare_folder(self) -> None:
        """Make room in the run folder. From here on files are written."""
        self.files.make_room(overwrite=self.settings.overwrite, after=self.epoch)
        with recorded(self.folder, "config.yaml", HOLDOUT, TRAINED):
            write_config(self.folder, self.settings, self.encoder_spec, self.particles)

    def _log_start(self) -> None:
        logger.info(" ".join(sys.argv))
        logger.info(f"cryodrgn_amort {__version__}, cryodrgn {host.VERSION}, {self.device}")
        logger.info(self.settings)
        particles, model = self.particles, self.model
        each = "" if particles.tilts is None else f" in {particles.ntilts} tilts each"
        logger.info(f"{particles.n} particles of {particles.box} px{each}, norm {particles.norm}")
        logger.info(f"Particles: {self.feed.description}")
        if particles.held_out is not None:
            logger.info(f"{len(particles.held_out)} more are held out: {self.folder / HOLDOUT}")
        if self.team.size > 1:
            logger.info(f"{self.team.size} processes")
        sizes = {
            "encoder": model.amort or model.encoder,
            "decoder": model.decoder,
        }
        for name, part in sizes.items():
            count = sum(p.numel() for p in part.parameters() if p.requires_grad)
            logger.info(f"{count} parameters in {name}")
        for line in self.settings.ignored:
            logger.warning(line)
        for reason in self.files.skipped:
            logger.warning(f"Skipped {reason}")
        if self._part is not None:
            logger.info(f"Continuing in epoch {self.epoch + 1} after {self._part.batches} batches")
        elif self.epoch:
            logger.info(f"Continuing after epoch {self.epoch} of {self.settings.load}")
        if self.files.replaced.is_dir():
            names = ", ".join(sorted(p.name for p in self.files.replaced.iterdir()))
            logger.info(f"To be replaced once there is a new checkpoint: {names}")

    def _log_batch(self, seen: int, result: Losses) -> None:
        logger.info(
            f"# [Train Epoch: {self.epoch}/{self.settings.num_epochs}] "
            f"[{seen}/{self.particles.n} particles] gen loss={result.gen_loss.item():.6f}, "
            f"kld={result.kld.item():.6f}, beta={result.beta:.6f}, loss={result.total.item():.6f}"
        )

    def _bar(self, items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        return bar(items, what, total, silent=not self.team.leads)
