"""Finding plugins: what ships in the box, and what installed packages name as entry points."""

from __future__ import annotations

import functools
import os
import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from cryodrgn_amort.core import BUILTIN, Registry, warn
from cryodrgn_amort.plugins import builtin, hookspecs

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = ["Plugins", "load_plugins"]

GROUP = "cryodrgn_amort"
OFF_SWITCH = "CRYODRGN_AMORT_DISABLE_PLUGINS"


class Plugins(Registry):
    """The built-ins, and all plugins that are installed, or ``found``: name -> plugin.

    One that cannot be loaded, that implements a hook which does not exist or a hook wrapper, is
    reported in one line and left out.
    """

    def __init__(self, found: Mapping[str, Any] | None = None) -> None:
        super().__init__(pluggy.PluginManager(GROUP), {BUILTIN: "cryodrgn-amort"})
        self._manager.add_hookspecs(hookspecs)
        self._manager.register(builtin, name=BUILTIN)
        third_party = _installed() if found is None else found
        for name, plugin in third_party.items():
            self._register(name, plugin)

    def _register(self, name: str, plugin: Any) -> None:
        origin = "given"
        try:
            if isinstance(plugin, EntryPoint):
                dist = plugin.dist
                origin = f"{dist.name} {dist.version}" if dist else plugin.value
                plugin = plugin.load()
            with warnings.catch_warnings(record=True) as said:  # of hooks that are to go
                warnings.simplefilter("always")
                self._manager.register(plugin, name=name)
            self._manager.check_pending()  # refuses hooks that do not exist
            self._refuse_wrappers(plugin)
        except (Exception, SystemExit) as err:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            warn(f"plugin {name!r} left out ({type(err).__name__}: {err})")
            return
        for warning in said:
            warn(f"plugin {name!r}: {warning.message}")
        self._origins[name] = origin

    def _refuse_wrappers(self, plugin: Any) -> None:
        """Refuse hooks that are to go around those of others: each is called by itself."""
        for caller in self._manager.get_hookcallers(plugin) or []:
            for impl in caller.get_hookimpls():
                if impl.plugin is plugin and (impl.wrapper or impl.hookwrapper):
                    raise TypeError(f"{caller.name} is a hook wrapper, which is never run here")


def _installed() -> dict[str, EntryPoint]:
    if os.environ.get(OFF_SWITCH, "") not in ("", "0"):
        return {}
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in found or point.name == BUILTIN:
            warn(f"plugin {point.name!r} ({point.value}) left out: that plugin name is taken")
            continue
        found[point.name] = point
    return found


@functools.cache
def load_plugins() -> Plugins:
    """Load the built-ins and, unless the off switch is set, every installed plugin; once."""
    return Plugins()
