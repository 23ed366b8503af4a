"""The training loop, readable from top to bottom."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cryodrgn_amort.core import (
    OWN_KEY,
    InputError,
    bar,
    default_device,
    join,
    locked,
    logging_to,
    matrix_products,
    on_terminal,
    recorded,
)
from cryodrgn_amort.data import load_particles
from cryodrgn_amort.models import (
    NotFiniteError,
    Objective,
    SyntheticImages,
    adam,
    resolve,
)
from cryodrgn_amort.runs import (
    HOLDOUT,
    TRAINED,
    RunFolder,
    write_config,
)
from cryodrgn_amort.training.analysis import analyze_run
from cryodrgn_amort.training.checkpoints import Checkpoints
from cryodrgn_amort.training.encoding import encode, end_turn
from cryodrgn_amort.training.epoch_metrics import EpochProgress
from cryodrgn_amort.training.held_out import take_back
from cryodrgn_amort.training.implied_beta import ImpliedBeta
from cryodrgn_amort.training.interrupts import StopSignals
from cryodrgn_amort.training.linear_start import start_linearly
from cryodrgn_amort.training.on_nan import (
    RollbackError,
    diverged,
    last_checkpoint,
    leave_out,
    without_loss,
)
from cryodrgn_amort.training.resume import check_start, checkpoint_of, holdout_of, source_for
from cryodrgn_amort.training.run_log import log_batch, log_epoch, log_stage, log_start
from cryodrgn_amort.training.second_stage import take_over
from cryodrgn_amort.training.setup import (
    check_processes,
    make_beta,
    make_model,
    open_loader,
    shuffled_batches,
)
from cryodrgn_amort.training.stages import begin_stage, stages_of, weigh_pixels

if TYPE_CHECKING:
    from cryodrgn_amort.core import Registry
    from cryodrgn_amort.data import Loaded, Particles
    from cryodrgn_amort.options import TrainSettings
    from cryodrgn_amort.training.stages import Stage
    from cryodrgn_amort.training.stepper import Before, Stepper


__all__ = ["Trainer"]
logger = logging.getLogger("cryodrgn_amort")


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
    processes
        This process among those that train the run.
    shown
        What a network encoder is shown; None for tables.
    latents
        Those of the run whose decoder this one has: mean and log variance; None: there is none.
    stages, stage, begins
        What is trained in which epochs, the present stage, and whether it began here.
    poses
        Poses that are refined; None: they stay as given.
    objective
        What the model learns from.
    random_state
        The states of all random numbers.
    optimizer
        The common optimizer: decoder and network. A table has its own.
    epoch
        The epoch that is running or has last ended, from 1.
    seen
        Particles gone through since training began, all epochs together; a run that goes on
        counts on.
    """

    def __init__(
        self, settings: TrainSettings, plugins: Registry, particles: Particles | None = None
    ) -> None:
        self.plugins, self.processes = plugins, join()
        check_processes(settings, self.processes)
        self.folder = Path(settings.outdir)
        self.files = RunFolder(self.folder)
        self.device = default_device()
        self.encoder_spec, input_spec = resolve(settings, plugins)
        checkpoint, own = checkpoint_of(settings, self.files, self.encoder_spec)
        self.settings = settings = replace(settings, holdout=holdout_of(settings))
        source, whole = source_for(settings, own), settings.enc_mask == -1
        self.particles = particles or load_particles(source, self.device, whole=whole)
        check_start(settings, self.encoder_spec, self.particles, plugins)
        amort = self.encoder_spec.make(settings, self.particles)
        if amort is not None:
            self.processes.split(amort, amort.per_particle)
        self.shown = input_spec.build(settings, self.particles) if input_spec else None

        made = make_model(settings, self.particles, self.encoder_spec, amort)
        self.random_state, self.poses, self.model = made
        self.latents = take_over(
            self.model, settings, self.encoder_spec, self.particles, plugins, self.processes
        )
        self.stages = stages_of(settings, self.particles.n, in_turns=self.encoder_spec.in_turns)
        self.stage: Stage
        self.begins = True
        self.optimizer = adam(self.model.trained_parameters(), settings.lr, settings.wd)
        self.objective = Objective()
        self.beta = make_beta(settings, self.particles)
        self.epoch = self.seen = self._rollbacks = 0
        self._random: dict[str, Any] = {}  # states to go on from, before the next batch
        self.progress: EpochProgress | None = None  # of the next epoch, to go on with
        self.steps: Stepper
        self._checkpoints = Checkpoints(
            settings, self.files, self.processes, self.particles, self.model, self.optimizer,
            self.shown, self.poses, self.random_state, self.beta,
        )  # fmt: skip
        if checkpoint:
            self.restore(checkpoint, own)

    def restore(self, checkpoint: dict[str, Any], own: dict[str, Any]) -> None:
        """Go on from a checkpoint; ``own`` is our part of it."""
        self.epoch, self._random, self.progress = self._checkpoints.restore(checkpoint, own)
        done = 0 if self.progress is None else self.progress.seen
        self.seen = self.epoch * self.particles.n + done

    @matrix_products()
    def fit(self) -> None:
        """Train to the last epoch, with a checkpoint every ``--checkpoint`` epochs.

        Raises
        ------
        InputError
            If inputs cannot be read, or the loss is no usable number and ``--on-nan`` gives up.
        Stopped
            If a signal asked for it, after a checkpoint within the epoch.
        """
        beside = (self.folder, *self.folder.absolute().parents)
        self.prepare_particles(next(path for path in beside if path.is_dir()))
        self.processes.wait()  # until all have seen what the folder holds
        with contextlib.ExitStack() as held:
            if self.processes.leads:
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(self.folder, "another training writes to it"))
                self.files.make_room(overwrite=self.settings.overwrite, after=self.epoch)
                with recorded(self.folder, "config.yaml", HOLDOUT, TRAINED):
                    write_config(self.folder, self.settings, self.encoder_spec, self.particles)
            try:
                path = self.folder / "run.log" if self.processes.leads else None
                with logging_to(path, self.settings.verbose):
                    self._train()
            finally:  # a run that ends before its first checkpoint replaces nothing
                if self.processes.leads:
                    self.files.put_back()
        if self.settings.do_analysis and self.processes.leads:
            analyze_run(self.folder, self.epoch, self.particles.n, self.settings.zdim)

    def prepare_particles(self, folder: Path | None) -> None:
        """Preprocess the particles, perhaps into a file in ``folder``, and make the batches."""
        settings = self.settings
        given = self.particles if self.poses is None else self.poses.particles
        self.loader = open_loader(settings, given, self.shown, self.processes, folder)
        self.batches = shuffled_batches(settings, self.loader, self.random_state)
        begin_stage(self, self.epoch + 1)

    def _train(self) -> None:
        settings = self.settings
        log_start(self, self.progress)
        log_stage(self)
        start_linearly(self)
        self.random_state.restore(self._random)
        self._tell("training_start")
        started, first = time.monotonic(), self.epoch + 1
        with StopSignals(several=self.processes.size > 1) as signals:
            while self.epoch < settings.num_epochs:
                self.epoch += 1
                if begin_stage(self, self.epoch):
                    log_stage(self)
                try:
                    row = self._train_epoch(signals)
                except RollbackError as why:
                    self._roll_back(str(why))
                    continue
                turned = self.stage.what == "encoder" and self.epoch == self.stage.last
                if turned and (best := end_turn(self)) < self.epoch:
                    take_back(self, best)
                    break
                if self.processes.leads:
                    self.files.write_metrics(row)
                self._tell("epoch_end", metrics=row)
                wanted = settings.is_checkpoint(self.epoch)
                if wanted or turned or self.epoch == settings.num_epochs:
                    self._write_checkpoint(extra=not wanted)
        if self.processes.leads:
            self.files.finish(self.epoch)
            logger.info("Training complete")
        took = timedelta(seconds=time.monotonic() - started)
        each = took / max(self.epoch - first + 1, 1)
        logger.info(f"Finished in {took} ({each} per epoch)")
        self._tell("training_end")

    def _tell(self, event: str, **facts: Any) -> None:
        """Tell plugins of an event; of several processes the leading one does."""
        if self.processes.leads:
            self.plugins.tell(event, trainer=self, **facts)

    def _train_epoch(self, signals: StopSignals) -> dict[str, float]:
        """Go through all particles once; returns the epoch's row of metrics.csv."""
        self.model.train()
        progress = self._begin_epoch()
        started = time.monotonic() - progress.seconds
        what = f"epoch {self.epoch}/{self.settings.num_epochs}"
        total = min(len(self.batches), self.stage.batches or len(self.batches))
        with contextlib.closing(self.batches.loaded()) as coming:  # if need be, before its end
            for number, loaded in enumerate(
                bar(coming, what, total, silent=not self.processes.leads)
            ):
                if number == total:
                    break
                if number < progress.batches:  # done before training was stopped
                    continue
                self._train_batch(loaded, progress)
                progress.seconds = time.monotonic() - started
                asks = progress.batches < total and self.steps.asks(progress.batches)
                if asks and signals.came(self.processes):
                    self._look(progress)
                    self._checkpoints.write_within(self.epoch, progress, self.objective)
                    raise signals.stopped(self.epoch, progress.batches, total)
        self._look(progress)
        self.processes.sum_([progress.sums, progress.moments])
        if not progress.counted or not math.isfinite(progress.averages()[2]):
            raise InputError(diverged(self.folder, self.epoch))
        took = time.monotonic() - started
        row = progress.metrics(self.epoch, took, progress.seen * self.particles.ntilts)
        log_epoch(row, took)
        if isinstance(self.beta, ImpliedBeta) and not isinstance(self.objective, SyntheticImages):
            self.beta.learn(row["gen_loss"])
        own = {} if self.model.amort is None else self.model.amort.epoch_metrics()
        return row | own | self.objective.epoch_metrics()

    def _begin_epoch(self) -> EpochProgress:
        """Begin the epoch, or go on in one that training was stopped in."""
        settings, progress, self.progress = self.settings, self.progress, None
        stage = self.stage
        stopped_at = self.random_state.state()
        self.objective.epoch_start(self.epoch - stage.first + 1)
        if self.model.amort is not None:
            self.model.amort.epoch_start(stage.done(self.epoch))
        stage.set_rate(self.optimizer, self.epoch, self._rollbacks)
        if progress is None:
            weigh_pixels(self)
            self._random = {}
            progress = EpochProgress.new(self.random_state.state(), settings, self.particles)
            self.steps.begin(progress)
            return progress
        # after the batches that are done, but for what the loader draws itself, ahead
        self._random = {k: v for k, v in stopped_at.items() if k not in ("shuffle", "tilts")}
        self.random_state.restore(progress.begin)  # it draws what it drew
        progress.hand_over(self.model.amort, self.objective)
        self.steps.begin(progress)
        return progress

    def _train_batch(self, loaded: Loaded, progress: EpochProgress) -> None:
        """Take a step, and add what it found to the epoch's sums."""
        settings, steps = self.settings, self.steps
        if self._random:  # the first one after training was stopped
            self.random_state.restore(self._random)
            self._random = {}
        steps.remember(loaded, self.random_state.state(), progress)
        self.seen = self.particles.n * (self.epoch - 1) + progress.seen + loaded.size
        try:
            losses = steps.take(loaded, self.beta(self.seen), moving=self.moving)
        except NotFiniteError:
            self._no_loss(steps.before[-1], progress)
            progress.left_out += loaded.size
            losses = None
        progress.count(loaded.size)
        if steps.lost is None:
            steps.before.clear()
        elif steps.lost.due:
            self._look(progress)
        if losses is None:
            return
        if self.plugins.listens("batch_end"):
            self._tell("batch_end", losses=losses.clone())
        if progress.seen % settings.log_interval < settings.batch_size and not on_terminal():
            log_batch(self, progress.seen, losses)

    @property
    def moving(self) -> bool:
        """Whether poses move by now."""
        return self.poses is not None and self.epoch >= self.settings.pretrain

    def _look(self, progress: EpochProgress) -> None:
        """See whether the last steps had losses that could be used, if nobody has yet."""
        lost = self.steps.lost
        if lost is None:
            return
        for step in lost.look():
            before = self.steps.before[step]
            self._no_loss(before, progress)
            progress.left_out += before.loaded.size
        self.steps.before.clear()

    @torch.no_grad()
    def _no_loss(self, before: Before, progress: EpochProgress) -> None:
        """Do what ``--on-nan`` says about a batch without a loss, before which all is as it was."""
        settings, particles = self.settings, self.particles
        named = without_loss(self.model, self.steps.again(before), particles, self.processes)
        why = f"{named}, in epoch {self.epoch}" if named else diverged(self.folder, self.epoch)
        if named and settings.on_nan == "stop":
            self.random_state.restore(before.random)
            if before.generator is not None and self.objective.generator is not None:
                self.objective.generator.set_state(before.generator)
            progress.batches, progress.seen = before.batches, before.seen
            self._checkpoints.write_within(self.epoch, progress, self.objective)
            why += "; --load latest goes on before this batch, with --on-nan skip without it"
        leave_out(settings.on_nan, why, progress.left_out, particles.n)

    def _roll_back(self, why: str) -> None:
        """Go back to the last checkpoint, with half the learning rate."""
        self._rollbacks += 1
        checkpoint = last_checkpoint(self.folder, self._rollbacks, why)
        self.restore(checkpoint, checkpoint[OWN_KEY])
        if len(self.stages) > 1:  # it may have been in another one, or have begun this one
            del self.stage
            begin_stage(self, self.epoch + 1)
        else:
            self.steps.forget()
        self.random_state.restore(self._random)
        self.stage.set_rate(self.optimizer, self.epoch + 1, self._rollbacks)
        rate = self.optimizer.param_groups[0]["lr"]
        logger.warning(f"Back to epoch {self.epoch}, learning rate {rate:g}: {why}")

    def _write_checkpoint(self, *, extra: bool) -> None:
        """Write a checkpoint; an ``extra`` one must not change how the run would go on."""
        before = self.random_state.state()
        z = encode(self)
        path = self._checkpoints.write(
            self.epoch, z, before if extra else self.random_state.state()
        )
        self._tell("checkpoint_written", path=path)
