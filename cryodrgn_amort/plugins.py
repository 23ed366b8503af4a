"""Finding plugins and collecting what they bring."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from cryodrgn_amort import builtin, hookspecs
from cryodrgn_amort.errors import InputError, Stopped

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from cryodrgn_amort.encoders import EncoderSpec
    from cryodrgn_amort.inputs import InputSpec
    from cryodrgn_amort.recipes import Recipe
    from cryodrgn_amort.transforms import TransformSpec

__all__ = ["CommandSpec", "Owned", "Plugins", "load_plugins"]

GROUP = "cryodrgn_amort"
OFF_SWITCH = "CRYODRGN_AMORT_DISABLE_PLUGINS"
BUILTIN = "built-in"
KINDS = ("commands", "encoders", "encoder_inputs", "recipes", "transforms")
SHARED_NAMES = {"encoder_inputs": "encoders"}  # both are names for --encoder

T = TypeVar("T")


@dataclass(frozen=True)
class CommandSpec:
    """A subcommand of ``cryodrgn``.

    ``module`` is imported when the command line starts; like the host's own command modules it
    has a docstring (first line: description, rest: examples), ``add_args(parser)`` and
    ``main(args)``. Heavy imports belong into ``main``.
    """

    name: str
    module: str
    summary: str


@dataclass(frozen=True)
class Owned:
    """Something that a plugin brought, and which plugin that was."""

    item: Any
    plugin: str


def warn(message: str) -> None:
    """Say one line on stderr; the host goes on."""
    sys.stderr.write(f"cryodrgn_amort: {' '.join(message.split())}\n")


class Plugins:
    """All loaded plugins.

    A plugin that cannot be loaded, that implements a hook which does not exist or a hook wrapper,
    or whose hook fails is reported in one line and left out. A name that is taken already is
    refused, naming both plugins; the first one keeps it.
    """

    def __init__(self, found: Mapping[str, Any] | None = None) -> None:
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._manager.register(builtin, name=BUILTIN)
        self._origin = {BUILTIN: "cryodrgn-amort"}
        third_party = _installed() if found is None else found
        for name, plugin in third_party.items():
            self._register(name, plugin)
        self._items: dict[str, dict[str, Owned]] = {}
        self._failed: set[str] = set()

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
        self._origin[name] = origin

    def _refuse_wrappers(self, plugin: Any) -> None:
        """Refuse hooks that are to go around those of others: each is called by itself."""
        for caller in self._manager.get_hookcallers(plugin) or []:
            for impl in caller.get_hookimpls():
                if impl.plugin is plugin and (impl.wrapper or impl.hookwrapper):
                    raise TypeError(f"{caller.name} is a hook wrapper, which is never run here")

    @property
    def hook(self) -> Any:
        """Pluggy's relay: ``plugins.hook.training_start(trainer=...)`` calls every plugin."""
        return self._manager.hook

    def origins(self) -> dict[str, str]:
        """Plugin name -> the distribution that it came from, in the order of loading."""
        return dict(self._origin)

    def bringing(self, *items: tuple[str, str], hook: str = "") -> tuple[str, ...]:
        """Return where plugins are from, beside ours, that bring ``items`` or implement a hook.

        Parameters
        ----------
        items
            One of ``KINDS``, and the name of an item, which need not be there.
        """
        owned = [self.owned(kind).get(name) for kind, name in items]
        names = {item.plugin for item in owned if item is not None}
        names |= {name for name in self._origin if hook in self.observed(name)}
        return tuple(sorted(self._origin[name] for name in names - {BUILTIN}))

    def observed(self, plugin: str) -> list[str]:
        """Return the hooks that a plugin implements beside those that bring named items."""
        callers = self._manager.get_hookcallers(self._manager.get_plugin(plugin)) or []
        return sorted(caller.name for caller in callers if caller.name not in KINDS)

    def owned(self, kind: str) -> dict[str, Owned]:
        """Name -> item and owner for one of ``KINDS``; collected on first use."""
        if kind not in self._items:
            self._items[kind] = self._collect(kind)
        return self._items[kind]

    def _collect(self, kind: str) -> dict[str, Owned]:
        taken: dict[str, Owned] = {}
        elsewhere = self.owned(SHARED_NAMES[kind]) if kind in SHARED_NAMES else {}
        # get_hookimpls is in the order of registration: built-ins first
        for impl in getattr(self.hook, kind).get_hookimpls():
            owner = impl.plugin_name
            try:
                items = list(impl.function())
                for item in items:
                    if not (isinstance(item.name, str) and isinstance(item.summary, str)):
                        raise TypeError(f"name and summary must be strings, not {item.name!r}")
            except (Exception, SystemExit) as err:
                warn(f"plugin {owner!r}: {kind} left out ({type(err).__name__}: {err})")
                continue
            for item in items:
                other = taken.get(item.name) or elsewhere.get(item.name)
                if other is not None:
                    warn(
                        f"plugin {owner!r}: {kind} {item.name!r} refused, "
                        f"plugin {other.plugin!r} has that name already"
                    )
                    continue
                taken[item.name] = Owned(item, owner)
        return taken

    def _get(self, kind: str, name: str, flag: str) -> Any:
        known = self.owned(kind)
        if name not in known:
            raise InputError(f"{flag} {name}: unknown; known are {', '.join(sorted(known))}")
        return known[name].item

    def encoder(self, name: str) -> EncoderSpec | InputSpec:
        """What ``--encoder NAME`` stands for: an encoder, or an input for a network encoder."""
        known = {**self.owned("encoders"), **self.owned("encoder_inputs")}
        if name not in known:
            raise InputError(f"--encoder {name}: unknown; known are {', '.join(sorted(known))}")
        spec: EncoderSpec | InputSpec = known[name].item
        return spec

    def encoder_input(self, name: str) -> InputSpec:
        """Return the encoder input of that name."""
        spec: InputSpec = self._get("encoder_inputs", name, "--encoder")
        return spec

    def recipe(self, name: str) -> Recipe:
        """Return the recipe of that name."""
        recipe: Recipe = self._get("recipes", name, "--recipe")
        return recipe

    def transform(self, name: str) -> TransformSpec:
        """Return the transform of that name."""
        spec: TransformSpec = self._get("transforms", name, "--transform")
        return spec

    def add_train_args(self, parser: argparse.ArgumentParser) -> None:
        """Let every plugin add its flags to ``train_amort``; one that fails is left out."""
        for impl in self.hook.train_args.get_hookimpls():
            try:
                _call(impl, {"parser": parser})
            except (Exception, SystemExit) as err:
                why = f"{type(err).__name__}: {err}"
                warn(f"plugin {impl.plugin_name!r}: train_args left out ({why})")

    def tell(self, event: str, **facts: Any) -> None:
        """Call the hook of an event of a training; a plugin that fails is told of none any more.

        An InputError stops the training.
        """
        for impl in reversed(getattr(self.hook, event).get_hookimpls()):  # in pluggy's order
            if impl.plugin_name in self._failed:
                continue
            try:
                _call(impl, facts)
            except (InputError, Stopped):
                raise
            except Exception as err:
                self._failed.add(impl.plugin_name)
                why = f"{type(err).__name__}: {err}"
                warn(f"plugin {impl.plugin_name!r}: {event} failed, left out from here on ({why})")

    def commands(self) -> dict[str, CommandSpec]:
        """All subcommands by name."""
        return {name: owned.item for name, owned in self.owned("commands").items()}


def _call(impl: pluggy.HookImpl, facts: Mapping[str, Any]) -> None:
    """Call a hook with those of its arguments that the plugin takes."""
    impl.function(*(facts[name] for name in impl.argnames))


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
