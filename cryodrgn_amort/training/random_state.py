"""The random numbers that a training draws: all states at once, kept in its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = ["RandomState"]


class RandomState:
    """The states of PyTorch's generators, of the shuffling, and of the drawing of tilts.

    Making it seeds PyTorch.

    Parameters
    ----------
    device
        The one that is trained on.
    tilts
        Whether tilts are drawn.

    Attributes
    ----------
    tilts
        The generator that the host would draw tilts from; None: none are drawn.
    shuffle
        The generator that batches are drawn from, if it is one of its own.
    """

    def __init__(self, seed: int, device: torch.device, *, tilts: bool) -> None:
        torch.manual_seed(seed)
        self._cuda = device if device.type == "cuda" else None
        self.tilts = np.random.RandomState(seed % 2**32) if tilts else None
        self.shuffle: torch.Generator | None = None

    def state(self) -> dict[str, Any]:
        """Return all states, as tensors and plain numbers."""
        state: dict[str, Any] = {"torch": torch.get_rng_state()}
        if self._cuda is not None:
            state["cuda"] = torch.cuda.get_rng_state(self._cuda)
        if self.shuffle is not None:
            state["shuffle"] = self.shuffle.get_state()
        if self.tilts is not None:
            tilts: dict[str, Any] = self.tilts.get_state(legacy=False)
            words = torch.from_numpy(tilts["state"]["key"].astype(np.int64))
            state["tilts"] = {**tilts, "state": {**tilts["state"], "key": words}}
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; what it does not hold stays as it is."""
        if "torch" in state:
            torch.set_rng_state(state["torch"])
        if "cuda" in state and self._cuda is not None:
            torch.cuda.set_rng_state(state["cuda"], self._cuda)
        if "shuffle" in state and self.shuffle is not None:
            self.shuffle.set_state(state["shuffle"])
        if "tilts" in state and self.tilts is not None:
            tilts = state["tilts"]
            words = tilts["state"]["key"].numpy().astype(np.uint32)
            self.tilts.set_state({**tilts, "state": {**tilts["state"], "key": words}})
