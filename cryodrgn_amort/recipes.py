"""Recipes: named choices of encoder, input and defaults. Data, not code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """A named set of ``train_amort`` flags.

    Attributes
    ----------
    flags
        Argument name -> value, as in ``TrainSettings``; what the user gives overrides them.
    needs
        Flags without which the recipe means nothing: the user must give them.
    """

    name: str
    summary: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


_NET = {"qlayers": 3, "qdim": 256}
_LARGE = {"qlayers": 5, "qdim": 1024}
_SMALL = {"qlayers": 2, "qdim": 256, "zdim": 2}

# Edelberg & Lederman (arXiv 2303.07487), Sections 3.1-3.3 and Appendix C. The log variance of the
# frozen tables is that of vlt-zero: the paper gives it for that experiment only.
RECIPES = (
    Recipe("baseline", "the particle, 3 x 256 network", {"encoder": "resid", **_NET}),
    Recipe("vlt", "lookup table, means from N(0, 1)", {"encoder": "vlt", "table_init": "normal"}),
    Recipe(
        "vlt-zero",
        "lookup table, means start at 0, log variance at -8",
        {"encoder": "vlt", "table_init": "zeros", "table_logvar": -8.0},
    ),
    Recipe(
        "vlt-frozen-zero",
        "lookup table frozen at 0: one volume for all particles",
        {"encoder": "vlt", "table_init": "zeros", "table_logvar": -8.0, "table_freeze": True},
    ),
    Recipe(
        "vlt-frozen-random",
        "lookup table frozen at random means",
        {"encoder": "vlt", "table_init": "normal", "table_logvar": -8.0, "table_freeze": True},
    ),
    Recipe(
        "vlt-frozen-encoder",
        "lookup table frozen at a finished run's latents (--table-init RUN), a new decoder",
        {"encoder": "vlt", "table_freeze": True},
        needs=("table_init",),
    ),
    Recipe("twin", "another particle, 3 x 256 network", {"encoder": "twin", **_NET}),
    Recipe("twin-large", "another particle, 5 x 1024 network", {"encoder": "twin", **_LARGE}),
    Recipe("noise-large", "fixed noise, 5 x 1024 network", {"encoder": "noise", **_LARGE}),
    Recipe("small", "the particle, 2 x 256 network, z in R^2", {"encoder": "resid", **_SMALL}),
    Recipe("twin-small", "another particle, 2 x 256, z in R^2", {"encoder": "twin", **_SMALL}),
)
