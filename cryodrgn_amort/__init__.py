"""Replace cryoDRGN's amortized encoder, and measure how far an encoder can be trusted.

Importing this package is cheap: it is imported whenever the ``cryodrgn`` command starts. The
functions of the Python API load what they need when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import os

    from cryodrgn_amort.results import Evaluation
    from cryodrgn_amort.runs import Run

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "hookimpl", "load_run", "train"]

hookimpl = pluggy.HookimplMarker("cryodrgn_amort")
"""Marks a function of a plugin as one of the hooks of ``cryodrgn_amort.hookspecs``."""


def load_run(folder: str | os.PathLike[str], epoch: int | None = None) -> Run:
    """Open a run folder of ``train_amort`` or ``train_vae``, at its latest epoch unless given."""
    from cryodrgn_amort.plugins import load_plugins
    from cryodrgn_amort.runs import load_run

    return load_run(folder, load_plugins(), epoch)


def train(**flags: Any) -> Run:
    """Train as ``cryodrgn train_amort`` does; flags by argument name (``outdir=``, ``zdim=``)."""
    from cryodrgn_amort.plugins import load_plugins
    from cryodrgn_amort.runs import with_run
    from cryodrgn_amort.settings import settings_from_flags
    from cryodrgn_amort.training import Trainer

    plugins = load_plugins()
    Trainer(settings_from_flags(with_run(flags, plugins), plugins), plugins).fit()
    return load_run(flags["outdir"])


def evaluate(run: Run, **options: Any) -> Evaluation:
    """Measure a run as ``cryodrgn eval_amort`` does; options as ``EvalOptions``. Writes nothing."""
    from cryodrgn_amort.evaluation import EvalOptions, evaluate

    return evaluate(run, EvalOptions(**options))
