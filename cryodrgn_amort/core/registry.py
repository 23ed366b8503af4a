"""What plugins bring, by name, and whose it is; how their hooks are called, each by itself.

Knows nothing of the things themselves, nor where plugins come from: see ``cryodrgn_amort.plugins``.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.core.errors import InputError, Stopped

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    import pluggy


__all__ = ["BUILTIN", "KINDS", "CommandSpec", "Owned", "Registry", "warn"]

BUILTIN = "built-in"
KINDS = ("commands", "encoders", "encoder_inputs", "recipes", "transforms")
SHARED_NAMES = {"encoder_inputs": "encoders"}  # both are names for --encoder


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


class Registry:
    """All plugins, and what they bring.

    A plugin whose hook fails is reported in one line and left out. A name that is taken already is
    refused, naming both plugins; the first one keeps it.

    Parameters
    ----------
    manager
        Pluggy's, with all plugins.
    origins
        Plugin name -> the distribution that it came from, in the order of loading.
    """

    def __init__(self, manager: pluggy.PluginManager, origins: dict[str, str]) -> None:
        self._manager, self._origins = manager, origins
        self._items: dict[str, dict[str, Owned]] = {}
        self._failed: set[str] = set()

    @property
    def hook(self) -> Any:
        """Pluggy's relay: ``plugins.hook.training_start(trainer=...)`` calls every plugin."""
        return self._manager.hook

    def origins(self) -> dict[str, str]:
        """Plugin name -> the distribution that it came from, in the order of loading."""
        return dict(self._origins)

    def bringing(self, *items: tuple[str, str], hook: str = "") -> tuple[str, ...]:
        """Return where plugins are from, beside ours, that bring ``items`` or implement a hook.

        Parameters
        ----------
        items
            One of ``KINDS``, and the name of an item, which need not be there.
        """
        owned = [self.owned(kind).get(name) for kind, name in items]
        names = {item.plugin for item in owned if item is not None}
        names |= {name for name in self._origins if hook in self.observed(name)}
        return tuple(sorted(self._origins[name] for name in names - {BUILTIN}))

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
        for owner, call in self.each(kind):
            try:
                items = list(call())
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

    def each(self, hook: str, **facts: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield every plugin that implements a hook, built-ins first, and what calls it.

        Parameters
        ----------
        facts
            Arguments of the hook; a plugin gets those that it takes.
        """
        for impl in getattr(self.hook, hook).get_hookimpls():  # in the order of registration
            given = (facts[name] for name in impl.argnames)
            yield impl.plugin_name, functools.partial(impl.function, *given)

    def _named(self, kinds: tuple[str, ...], name: str, flag: str) -> Any:
        known = {name: owned for kind in kinds for name, owned in self.owned(kind).items()}
        if name not in known:
            raise InputError(f"{flag} {name}: unknown; known are {', '.join(sorted(known))}")
        return known[name].item

    def encoder(self, name: str) -> Any:
        """What ``--encoder NAME`` stands for: an encoder, or an input for a network encoder."""
        return self._named(("encoders", "encoder_inputs"), name, "--encoder")

    def encoder_input(self, name: str) -> Any:
        """Return the encoder input of that name."""
        return self._named(("encoder_inputs",), name, "--encoder")

    def recipe(self, name: str) -> Any:
        """Return the recipe of that name."""
        return self._named(("recipes",), name, "--recipe")

    def transform(self, name: str) -> Any:
        """Return the transform of that name."""
        return self._named(("transforms",), name, "--transform")

    def commands(self) -> dict[str, CommandSpec]:
        """All subcommands by name."""
        return {name: owned.item for name, owned in self.owned("commands").items()}

    def add_train_args(self, parser: argparse.ArgumentParser) -> None:
        """Let every plugin add its flags to ``train_amort``; one that fails is left out."""
        for owner, call in self.each("train_args", parser=parser):
            try:
                call()
            except (Exception, SystemExit) as err:
                said = f"{type(err).__name__}: {err}"
                warn(f"plugin {owner!r}: train_args left out ({said})")

    def listens(self, event: str) -> bool:
        """Whether any plugin has the hook of an event."""
        return bool(getattr(self.hook, event).get_hookimpls())

    def tell(self, event: str, **facts: Any) -> None:
        """Call the hook of an event of a training; a plugin that fails is told of none any more.

        An InputError stops the training.
        """
        for plugin, call in reversed([*self.each(event, **facts)]):  # in pluggy's order
            if plugin in self._failed:
                continue
            try:
                call()
            except (InputError, Stopped):
                raise
            except Exception as err:
                self._failed.add(plugin)
                said = f"{type(err).__name__}: {err}"
                warn(f"plugin {plugin!r}: {event} failed, left out from here on ({said})")
