"""List the loaded plugins of cryodrgn_amort and what each of them brings.

Example usage
-------------
$ cryodrgn amort_plugins

# Leave out everything that is not built in
$ CRYODRGN_AMORT_DISABLE_PLUGINS=1 cryodrgn amort_plugins

"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryodrgn_amort.core import KINDS
from cryodrgn_amort.plugins import load_plugins

if TYPE_CHECKING:
    import argparse


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add no flags: there are none."""


def main(args: argparse.Namespace) -> None:
    """Print a block per plugin."""
    plugins = load_plugins()
    for plugin, origin in plugins.origins().items():
        print(f"{plugin} ({origin})")
        for kind in KINDS:
            for name, owned in plugins.owned(kind).items():
                if owned.plugin == plugin:
                    what = kind.rstrip("s").replace("_", " ")
                    print(f"  {what:14} {name:20} {owned.item.summary}")
        observed = plugins.observed(plugin)
        if observed:
            print(f"  {'hooks':14} {', '.join(observed)}")
