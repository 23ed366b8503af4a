"""From flags to a trained run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cryodrgn_amort.runs import settings_from_flags, with_run
from cryodrgn_amort.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryodrgn_amort.core import Registry


__all__ = ["train_run"]


def train_run(given: Mapping[str, Any], plugins: Registry) -> Trainer:
    """Train from the flags that were given, and no others, as ``train_amort`` does.

    Raises
    ------
    InputError
        If a flag does not apply, or inputs do not fit; nothing has been written then.
    """
    trainer = Trainer(settings_from_flags(with_run(given, plugins), plugins), plugins)
    trainer.fit()
    return trainer
