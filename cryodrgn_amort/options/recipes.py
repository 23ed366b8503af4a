"""Recipes: the paper's experiments as named sets of flags. Data, not code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = ["RECIPES", "REPAIR", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """A named set of flags of one of our commands; an experiment of ``study_amort``.

    Attributes
    ----------
    flags
        Argument name -> value, as in ``TrainSettings``; what the user gives overrides them. Of
        other commands: their flags by name, without the dashes.
    parents
        Flag -> recipe. The flag names a finished run; a study gives it that recipe's (with the
        same seed), anyone else must give it. ``run`` is the run that ``eval_amort`` measures.
    command
        ``train_amort``; ``eval_amort`` for what is measured of another recipe's run;
        ``time_amort`` for what is measured of several (flag ``recipes``); ``mnist_amort`` for
        handwritten digits.
    figure
        Where the paper shows it.
    reference
        The recipe that a study holds it against: same latent dimensions, shown the particle.
    """

    name: str
    summary: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    parents: Mapping[str, str] = field(default_factory=dict)
    command: str = "train_amort"
    figure: str = ""
    reference: str = "baseline"


_NET = {"qlayers": 3, "qdim": 256}
_LARGE = {"qlayers": 5, "qdim": 1024}
_SMALL = {"qlayers": 2, "qdim": 256, "zdim": 2}
# Edelberg & Lederman (arXiv 2303.07487), Sections 3.1-3.4 and Appendices C, D. The log variance of
# the frozen tables is that of vlt-zero: the paper gives it for that experiment only.
RECIPES = (
    Recipe(
        "baseline",
        "the particle, 3 x 256 network",
        {"encoder": "resid", **_NET},
        figure="Figures 3 and 20",
    ),
    Recipe(
        "vlt",
        "lookup table, means from N(0, 1)",
        {"encoder": "vlt", "table_init": "normal"},
        figure="Figure 5",
    ),
    Recipe(
        "twin", "another particle, 3 x 256 network", {"encoder": "twin", **_NET}, figure="Figure 7"
    ),
    Recipe(
        "twin-large",
        "another particle, 5 x 1024 network",
        {"encoder": "twin", **_LARGE},
        figure="Figure 8",
    ),
    Recipe(
        "noise-large",
        "fixed noise, 5 x 1024 network",
        {"encoder": "noise", **_LARGE},
        figure="Figure 9",
    ),
    Recipe(
        "shift",
        "the baseline's encoder, shown particles rolled by 1 to 8 px",
        {"transform": [f"roll:{px}" for px in range(1, 9)], "maps": 1, "fit": 0},
        {"run": "baseline"},
        command="eval_amort",
        figure="Figure 10",
    ),
    Recipe(
        "rotate",
        "the baseline's encoder, shown particles turned by 5 to 180 degrees",
        {
            "transform": [f"rotate:{angle}" for angle in (90, 5, 15, 30, 45, 135, 180)],
            "maps": 1,
            "fit": 0,
        },
        {"run": "baseline"},
        command="eval_amort",
        figure="Figure 11",
    ),
    Recipe(
        "vlt-zero",
        "lookup table, means start at 0, log variance at -8",
        {"encoder": "vlt", "table_init": "zeros", "table_logvar": -8.0},
        figure="Figure 21",
    ),
    Recipe(
        "vlt-frozen-zero",
        "lookup table frozen at 0: one volume for all particles",
        {"encoder": "vlt", "table_init": "zeros", "table_logvar": -8.0, "table_freeze": True},
        figure="Figure 22",
    ),
    Recipe(
        "vlt-frozen-random",
        "lookup table frozen at random means",
        {"encoder": "vlt", "table_init": "normal", "table_logvar": -8.0, "table_freeze": True},
        figure="Figure 23",
    ),
    Recipe(
        "vlt-frozen-encoder",
        "lookup table frozen at a finished run's latents (--table-init RUN), a new decoder",
        {"encoder": "vlt", "table_freeze": True},
        {"table_init": "baseline"},
        figure="Figure 24",
    ),
    Recipe(
        "small",
        "the particle, 2 x 256 network, z in R^2",
        {"encoder": "resid", **_SMALL},
        figure="Figure 25",
        reference="small",
    ),
    Recipe(
        "twin-small",
        "another particle, 2 x 256, z in R^2",
        {"encoder": "twin", **_SMALL},
        figure="Figure 26",
        reference="small",
    ),
    Recipe(
        "timing",
        "seconds per epoch, side by side",
        {"recipes": ["baseline", "vlt", "twin", "twin-large", "twin-small"]},
        command="time_amort",
        figure="Table 1",
    ),
    Recipe(
        "mnist",
        "handwritten digits: the network, the table, a twin and noise, shifted by 1 to 5 px",
        {"data": "digits"},
        command="mnist_amort",
        figure="Figures 12 to 19",
        reference="mnist",
    ),
)
# Encoders that are to generalise, and what they are compared with (``study_amort --repair``).
REPAIR = (
    Recipe(
        "sleep",
        "second stage on vlt: a network that is told the pose, trained on images made up",
        {"encoder": "sleep"},
        {"from_run": "vlt"},
        reference="vlt",
    ),
    Recipe(
        "anchored",
        "second stage on vlt: compares the particle with images of 16 latents at its pose",
        {"encoder": "anchored"},
        {"from_run": "vlt"},
        reference="vlt",
    ),
    Recipe(
        "alternate",
        "decoder and encoder in turns: a table, an encoder that has seen no particle, the decoder",
        {"encoder": "alternate"},
        reference="vlt",
    ),
    Recipe(
        "semi",
        "second stage on baseline: its latents become rows of a table, which is trained on",
        {"encoder": "semi"},
        {"from_run": "baseline"},
    ),
    Recipe(
        "augment",
        "the baseline, trained on copies that are turned and rolled, whose poses follow",
        {"encoder": "resid", **_NET, "augment": 1},
    ),
    Recipe(
        "consistent",
        "the same, and the posteriors of copy and particle are pulled together",
        {"encoder": "resid", **_NET, "augment": 1, "consistency": 1.0},
    ),
)
