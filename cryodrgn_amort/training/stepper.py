"""Optimizer steps: as written, or on a GPU recorded once and replayed."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from cryodrgn_amort.core import Graph, Overlapping, on_gpu
from cryodrgn_amort.models import Lost, keep_rate_on_device, recorded_by, train_step

if TYPE_CHECKING:
    from torch import Tensor

    from cryodrgn_amort.core import ProcessGroup
    from cryodrgn_amort.data import Batch, BatchLoader, Loaded
    from cryodrgn_amort.models import AmortVAE, Losses, Objective
    from cryodrgn_amort.options import TrainSettings
    from cryodrgn_amort.training.epoch_metrics import EpochProgress
    from cryodrgn_amort.training.pose_refinement import RefinedPoses


__all__ = ["Before", "Stepper"]
logger = logging.getLogger("cryodrgn_amort")

_LOOK = 50  # steps after which a GPU is asked whether losses could be used
_WARM = 3  # steps before one is recorded: libraries choose and allocate in the first ones


@dataclass
class Before:
    """What there was before a step that nobody has looked at yet.

    Attributes
    ----------
    loaded
        Its batch, without what was sent.
    random
        Random states.
    generator
        That of the objective's own random numbers, if it has any.
    batches, seen
        As of ``EpochProgress``.
    """

    loaded: Loaded
    random: dict[str, Any]
    generator: Tensor | None
    batches: int
    seen: int


class Stepper:
    """Takes the steps of a training.

    On a GPU no step waits for it. Whether a loss can be used is asked for of many steps at once,
    ``lost``; and steps of full batches are one CUDA graph, for encoders that ``replay``.

    Attributes
    ----------
    lost
        Which steps had no loss that could be used; None: each tells by an exception.
    before
        The steps that nobody has looked at.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: AmortVAE,
        optimizer: torch.optim.Adam,
        objective: Objective,
        loader: BatchLoader,
        poses: RefinedPoses | None,
        processes: ProcessGroup,
    ) -> None:
        self.settings, self.model, self.optimizer = settings, model, optimizer
        self.objective, self.loader = objective, loader
        trained = model.trained_parameters()
        of_decoder = {id(p) for p in model.decoder.parameters()}
        trained = [p for p in trained if p.requires_grad]
        first = [p for p in trained if id(p) in of_decoder]  # known when the loss is
        self.processes = Overlapping(processes, [first] if 0 < len(first) < len(trained) else [])
        self.poses = poses
        device = loader.particles.device
        amort = model.amort
        self.lost: Lost | None = None
        self.before: deque[Before] = deque()
        replays = poses is None and (amort is None or amort.replays)
        if on_gpu(device) and replays:
            self.lost = Lost(device, _LOOK, for_good=settings.on_nan != "skip")
            self._beta, self._last_beta = torch.zeros((), device=device), 0.0
            keep_rate_on_device(optimizer)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._moments = torch.zeros(2, settings.zdim, dtype=torch.float64, device=device)
        alone = processes.size == 1
        self._records = (
            Graph.possible(device) and replays and loader.replays and alone and settings.graph
        )
        self._recorded: _Recorded | None = None
        self._warm = 0

    def begin(self, progress: EpochProgress) -> None:
        """Let the sums of an epoch be where steps add to them."""
        self._sums.copy_(progress.sums)
        self._moments.copy_(progress.moments)
        progress.sums, progress.moments = self._sums, self._moments

    def remember(self, loaded: Loaded, random: dict[str, Any], progress: EpochProgress) -> None:
        """Keep what there is before a step: random states, and the place in the epoch."""
        own = self.objective.generator
        generator = None if own is None else own.get_state()
        kept = replace(loaded, parts={})
        self.before.append(Before(kept, random, generator, progress.batches, progress.seen))

    def asks(self, batches: int) -> bool:
        """Whether several processes ask each other for signals after so many batches.

        That waits for the GPUs: not after each.
        """
        return self.lost is None or self.processes.size == 1 or batches % _LOOK == 0

    def forget(self) -> None:
        """Record steps anew: the model or the optimizer has got another state."""
        self._recorded, self._warm = None, 0
        if self.lost is not None:
            keep_rate_on_device(self.optimizer)
            self.lost.look()
        self.before.clear()

    def batch(self, loaded: Loaded) -> Batch:
        """Make a batch of what was read, with the poses that its images have by now."""
        return self.posed(self.loader.finish(loaded))

    def posed(self, batch: Batch) -> Batch:
        """Give a batch the poses that its images have by now."""
        return batch if self.poses is None else self.poses.posed(batch)

    def again(self, before: Before) -> Batch:
        """Make the batch of an earlier step again."""
        return self.batch(self.loader.reload(before.loaded))

    def take(self, loaded: Loaded, beta: float, *, moving: bool = False) -> Losses:
        """Take a step, and add what it found to the epoch's sums.

        Parameters
        ----------
        moving
            Whether poses move as well.

        Raises
        ------
        NotFiniteError
            If the loss cannot be used, before anything is changed; with ``lost`` that notes it.
        """
        if self.lost is None:
            return self._step(loaded, beta, moving=moving)
        self.lost.steps += 1
        if beta != self._last_beta:
            self._beta.fill_(beta)
            self._last_beta = beta
        full = loaded.size == self.settings.batch_size
        if not (self._records and full):
            found = self._step(loaded, self._beta)
        elif self._recorded is None and self._warm < _WARM:
            self._warm += 1
            found = self._step(loaded, self._beta)
        else:
            found = self._replay(loaded)
        return replace(found, beta=beta)

    def _step(self, loaded: Loaded, beta: float | Tensor, *, moving: bool = False) -> Losses:
        """Take a step as it is written."""
        with torch.set_grad_enabled(moving):
            batch = self.batch(loaded)
        found, mean = train_step(
            self.model, self.optimizer, batch, beta, self.settings.beta_control, self.processes,
            self.objective, check=True, lost=self.lost,
        )  # fmt: skip
        if moving and self.poses is not None:
            self.poses.step()
        sums = torch.stack([found.gen_loss, found.kld, found.total]).double() * batch.size
        moments = torch.stack([mean.sum(0), mean.square().sum(0)]).double()
        if self.lost is not None:
            sums, moments = (part.masked_fill(self.lost.now, 0.0) for part in (sums, moments))
        self._sums += sums
        self._moments += moments
        return found

    def _replay(self, loaded: Loaded) -> Losses:
        """Take a step by replaying one that was recorded; record it first if need be."""
        if self._recorded is None:
            try:
                self._recorded = self._record(loaded)
            except RuntimeError as err:
                self._records = False
                reason = str(err).splitlines()[0]
                logger.warning(f"Steps are not replayed, which would be faster: {reason}")
                return self._step(loaded, self._beta)
        self._recorded.replay(loaded)
        return self._recorded.losses

    def _record(self, loaded: Loaded) -> _Recorded:
        parts = {name: value.clone() for name, value in loaded.parts.items()}
        own = self.objective.generator
        graph = Graph([] if own is None else [own])
        with recorded_by(self.optimizer), graph.recording():
            losses = self._step(replace(loaded, parts=parts), self._beta)
        return _Recorded(graph, parts, losses, self.model.held())


@dataclass
class _Recorded:
    """A step as a CUDA graph.

    Attributes
    ----------
    parts
        What it reads: ``Loaded.parts``, the same memory in every step.
    losses
        What it yields, the same memory in every step.
    held
        Memory that it uses, and that nobody may free.
    """

    graph: Graph
    parts: dict[str, Tensor]
    losses: Losses
    held: list[Tensor]

    def replay(self, loaded: Loaded) -> None:
        """Take the step with another batch."""
        for name, value in loaded.parts.items():
            self.parts[name].copy_(value)
        self.graph.replay()
