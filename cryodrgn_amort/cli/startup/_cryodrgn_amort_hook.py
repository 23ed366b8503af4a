"""Add cryodrgn_amort's subcommands to the ``cryodrgn`` command line.

cryoDRGN has no entry-point group for commands: its command line imports a literal list of
modules. This module is therefore installed at the root of site-packages beside a one-line
``.pth`` file (and a ``.start`` file, which takes over from Python 3.15, PEP 829). At interpreter
start it puts one finder in front of ``sys.meta_path``; the finder fires once, when
``cryodrgn.command_line`` is imported, and then removes itself.

Rules: standard library only, nothing heavy at import, and no fault of ours ever stops the host.
"""

import sys

TARGET = "cryodrgn.command_line"


class _Finder:
    """Hands out cryodrgn's own spec for ``TARGET``, with one call added after its execution."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != TARGET:
            return None
        uninstall()
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            try:
                from cryodrgn_amort.cli import join_host

                join_host(module)
            except (Exception, SystemExit) as err:
                reason = " ".join(f"{type(err).__name__}: {err}".split())
                sys.stderr.write(f"cryodrgn_amort: subcommands not added ({reason})\n")

        spec.loader.exec_module = exec_module
        return spec


def install():
    """Wait for cryodrgn's command line to be imported."""
    if TARGET not in sys.modules and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def uninstall():
    """Stop waiting."""
    if _Finder in sys.meta_path:
        sys.meta_path.remove(_Finder)
