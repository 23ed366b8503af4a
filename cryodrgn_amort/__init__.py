"""Replace cryoDRGN's amortized encoder, and measure how far an encoder can be trusted.

``import cryodrgn_amort as ca`` gives the commands as functions: ``ca.load_run``, ``ca.train``,
``ca.evaluate``, ``ca.infer``, ``ca.compare_runs``, ``ca.validate``, ``ca.simulate_particles``,
with numpy arrays, pandas tables and matplotlib figures; ``cryodrgn_amort.api`` documents them.

Importing this package is cheap: it is imported whenever the ``cryodrgn`` command starts. The Python
API is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cryodrgn_amort.core.version import __version__

if TYPE_CHECKING:
    from cryodrgn_amort.api import (
        Figures,
        Result,
        Run,
        Simulation,
        Validated,
        compare_runs,
        evaluate,
        infer,
        load_run,
        simulate_particles,
        train,
        validate,
    )
    from cryodrgn_amort.core import InputError, Stopped
    from cryodrgn_amort.plugins import hookimpl

__all__ = [
    "Figures",
    "InputError",
    "Result",
    "Run",
    "Simulation",
    "Stopped",
    "Validated",
    "__version__",
    "compare_runs",
    "evaluate",
    "hookimpl",
    "infer",
    "load_run",
    "simulate_particles",
    "train",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "hookimpl":
        from cryodrgn_amort import plugins

        return plugins.hookimpl
    from cryodrgn_amort import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
