"""One training step, and what is minimised in it."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cryodrgn_amort.core import ProcessGroup, all_finite
from cryodrgn_amort.models.objective import falling_rate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from cryodrgn_amort.data import Batch
    from cryodrgn_amort.models.base import LatentModel
    from cryodrgn_amort.models.objective import Losses


__all__ = [
    "Lost",
    "NotFiniteError",
    "Objective",
    "adam",
    "keep_rate_on_device",
    "plain_state",
    "recorded_by",
    "set_rate",
    "train_step",
]

_MOST = 1e9  # of a loss: images are normalised, so that those that learn have losses near 1


def adam(
    parameters: list[nn.Parameter], lr: float, wd: float = 0.0, eps: float = 1e-8
) -> torch.optim.Adam:
    """Make the common optimizer; fused where PyTorch can."""
    make = functools.partial(torch.optim.Adam, parameters, lr=lr, weight_decay=wd, eps=eps)
    try:
        return make(fused=True)
    except RuntimeError:  # before PyTorch 2.4 not on CPUs
        return make()


def keep_rate_on_device(optimizer: torch.optim.Adam) -> None:
    """Let a fused Adam on a GPU read its learning rate there, as a step that is replayed needs."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        group["lr"] = torch.tensor(float(group["lr"]), device=device)


@contextlib.contextmanager
def recorded_by(optimizer: torch.optim.Adam) -> Iterator[None]:
    """Let Adam take a step that is recorded, for a while."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False


def plain_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state as any other one can take it up: on a CPU, by the host."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def set_rate(
    optimizer: torch.optim.Optimizer, start: float, end: float | None, done: float, halvings: int
) -> None:
    """Set the learning rate after a share of the training.

    It falls from ``start`` to ``end`` (None: it does not), and is halved ``halvings`` times.
    """
    if end is None and not halvings:  # it is what the optimizer has
        return
    rate = (start if end is None else falling_rate(start, end, done)) / 2**halvings
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Objective:
    """What a model learns from: the ELBO of the particles, unless a subclass has something else.

    Attributes
    ----------
    generator
        What it draws random numbers from by itself, on the device; None: nothing.
    """

    generator: torch.Generator | None = None

    def epoch_start(self, epoch: int) -> None:
        """Be told that an epoch begins, from 1."""

    def loss(
        self, model: LatentModel, batch: Batch, beta: float | Tensor, beta_control: float | None
    ) -> tuple[Losses, Tensor]:
        """Return the losses of a batch, or of others in its place, and posterior means, detached.

        With several processes, they are those of each one's share of the batch.
        """
        return model.loss(batch, beta, beta_control)

    def count(self, lost: Tensor | None) -> None:
        """Count the last batch in the epoch's metrics, unless it is ``lost``."""

    def epoch_metrics(self) -> dict[str, float]:
        """Return further columns for metrics.csv, always the same ones."""
        return {}

    def epoch_state(self) -> dict[str, Any]:
        """Return what changes within an epoch, for a training that stops in it."""
        return {}

    def set_epoch_state(self, state: dict[str, Any]) -> None:
        """Go on in an epoch, after ``epoch_start``."""


_ELBO = Objective()


class NotFiniteError(Exception):
    """The loss of a batch is not a number, or beyond all bounds; nothing was changed."""


class Lost:
    """Which of the last batches have no loss that could be used, known to the device alone.

    Such a batch changes nothing. Asking for a loss in every step would make the processor wait for
    the GPU; so it is asked for those of many steps at once.

    Parameters
    ----------
    most
        How many steps there are at most before somebody looks.
    for_good
        Whether nothing changes after such a batch either, until somebody has looked.
    """

    def __init__(self, device: torch.device, most: int, *, for_good: bool) -> None:
        self._each = torch.zeros(most, dtype=torch.bool, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._any = torch.zeros((), dtype=torch.bool, device=device)
        self._for_good = for_good
        self.now = self._any
        """Whether the last step was none, a scalar."""
        self.steps = 0
        """Steps since somebody looked."""

    def judge(self, bad: Tensor) -> Tensor:
        """Note that a batch is ``bad``, a scalar; returns whether it must not change anything."""
        self._each.index_copy_(0, self._place, bad.view(1))
        self._place += 1
        self.now = bad
        if self._for_good:
            self._any |= bad
            self.now = self._any.clone()
        return self.now

    @property
    def due(self) -> bool:
        """Whether somebody has to look before the next step."""
        return self.steps == len(self._each)

    def look(self) -> list[int]:
        """Return which of the last steps had such a batch, and forget them; waits for a GPU."""
        found = self._each[: self.steps].nonzero()[:, 0].tolist() if self.steps else []
        self.steps = 0
        self._each.zero_()
        self._place.zero_()
        self._any.zero_()
        return found


def train_step(
    model: LatentModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    beta: float | Tensor,
    beta_control: float | None = None,
    processes: ProcessGroup | None = None,
    objective: Objective = _ELBO,
    *,
    check: bool = False,
    lost: Lost | None = None,
) -> tuple[Losses, Tensor]:
    """Take one optimizer step; returns the losses and the posterior means, detached.

    With several processes, the losses and gradients of each are its share of the batch's.

    Parameters
    ----------
    beta, beta_control
        Weight of the KL divergence; see ``losses``.
    processes
        This process among several; None: it is alone.
    check
        Whether to look at the loss before anything is changed.
    lost
        Is told of the loss instead, by whoever looks later.

    Raises
    ------
    NotFiniteError
        With ``check``: if the loss is not finite or above 1e9, before anything is changed.
    """
    processes = processes or ProcessGroup()
    optimizer.zero_grad()
    result, mean = objective.loss(model, batch, beta, beta_control)
    if check and lost is None and processes.max(int(not abs(result.total.item()) <= _MOST)):
        raise NotFiniteError
    result.total.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in trained if p.grad is not None]
    beyond = ~all_finite(gradients) if model.narrow and gradients else None
    if lost is not None:
        bad = ~(result.total.detach().abs() <= _MOST)
        _step_or_not(model, optimizer, lost, bad if beyond is None else bad | beyond, processes)
        objective.count(lost.now)
        return result.detach(), mean
    if check and beyond is not None and processes.max(int(beyond)):
        raise NotFiniteError
    if model.amort is not None:
        model.amort.after_backward()
    processes.sum_(gradients)
    optimizer.step()
    objective.count(None)
    return result.detach(), mean


def _step_or_not(
    model: LatentModel,
    optimizer: torch.optim.Optimizer,
    lost: Lost,
    bad: Tensor,
    processes: ProcessGroup,
) -> None:
    """Take the step, or none if the batch is ``bad`` in any process; nobody waits to know."""
    if processes.size > 1:
        trained = (p for group in optimizer.param_groups for p in group["params"])
        several = bad.to(torch.float32)
        processes.sum_([*(p.grad for p in trained if p.grad is not None), several])
        bad = several > 0
    nothing = lost.judge(bad)
    optimizer.found_inf = nothing.float()  # type: ignore[attr-defined] # a fused step is none then
    optimizer.step()
    if model.amort is not None:
        model.amort.after_backward(nothing)
