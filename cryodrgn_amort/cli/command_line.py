"""How our subcommands join the ``cryodrgn`` command line, and our own script."""

from __future__ import annotations

import argparse
import errno
import functools
import importlib
import os
import re
import sys
import types
from typing import TYPE_CHECKING, Any, NoReturn

from cryodrgn_amort.core import CommandSpec, InputError, Stopped, __version__, forgive, warn
from cryodrgn_amort.plugins import load_plugins

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


__all__ = ["join_host", "main"]

USAGE_ERROR = 2
INTERRUPTED = 130


def _fail(command: str, message: str) -> NoReturn:
    sys.stderr.write(f"cryodrgn {command}: error: {' '.join(message.split())}\n")
    raise SystemExit(USAGE_ERROR)


def _guarded(command: str, run: Callable[[argparse.Namespace], Any]) -> Callable[..., Any]:
    """Turn what a user can mend into one line and exit code 2; our bugs keep their traceback."""

    @functools.wraps(run)
    def guarded(args: argparse.Namespace) -> Any:
        forgive()
        try:
            return run(args)
        except InputError as err:
            _fail(command, str(err))
        except OSError as err:
            if err.filename is None and getattr(args, "outdir", None):
                from cryodrgn_amort.core import named

                err = named(err, f"{args.outdir}/")
            where = f"{err.filename}: " if err.filename else ""
            _fail(command, f"{where}{err.strerror or err}{_elsewhere(err, args)}")
        except (MemoryError, RuntimeError) as err:
            from cryodrgn_amort.core import out_of_memory

            if said := out_of_memory(err):
                _fail(command, f"{said}; {_of_less_memory(args)}")
            if not _of_memory(err):
                raise
            _fail(command, f"out of memory: {str(err).partition(chr(10))[0] or 'no more is free'}")
        except Stopped as stop:
            if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
                sys.stderr.write(f"cryodrgn {command}: {stop}\n")
            raise SystemExit(128 + stop.number) from None
        except KeyboardInterrupt:
            sys.stderr.write(f"cryodrgn {command}: interrupted\n")
            raise SystemExit(INTERRUPTED) from None

    return guarded


def _of_memory(err: Exception) -> bool:
    """Tell whether Python's, NumPy's or PyTorch's error says that this machine's memory is full."""
    return isinstance(err, MemoryError) or "can't allocate memory" in str(err)


def _of_less_memory(args: argparse.Namespace) -> str:
    """Say which flags let a command need less of a GPU's memory."""
    if hasattr(args, "num_epochs"):
        return "a smaller -b, a smaller --memory, or --precision bf16 helps; --load latest goes on"
    return "a smaller --batch-size, or --precision bf16 helps"


def _elsewhere(err: OSError, args: argparse.Namespace) -> str:
    """Suggest ``-o`` where nothing may be written."""
    out = getattr(args, "outdir", None) or getattr(args, "output", None)
    if out is None or err.filename is None:
        return ""
    out, path = os.path.abspath(out), os.path.abspath(err.filename)
    of_out = os.path.commonpath([out, path]) in (out, path)
    denied = err.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    return "; choose another place with -o" if of_out and denied else ""


def _load(spec: CommandSpec) -> types.ModuleType:
    """Import a command and check it here, so that a fault of ours never reaches the host."""
    source = importlib.import_module(spec.module)
    source.add_args(argparse.ArgumentParser())
    module = types.ModuleType(spec.module, source.__doc__ or spec.summary)
    vars(module).update(add_args=source.add_args, main=_guarded(spec.name, source.main))
    return module


def _usable() -> dict[str, types.ModuleType]:
    usable = {}
    for name, spec in load_plugins().commands().items():
        try:
            usable[name] = _load(spec)
        except (Exception, SystemExit) as err:
            warn(f"`{name}` is not available ({type(err).__name__}: {err})")
    return usable


def join_host(command_line: Any) -> None:
    """Make the host's ``cryodrgn`` list and run our subcommands.

    Wraps ``cryodrgn.command_line._get_commands``, which imports ``cryodrgn.<folder>.<command>``
    for each name it is given: our names are appended and our modules stand under those names.
    A command that the host has itself stays the host's.
    """
    get_commands = command_line._get_commands

    @functools.wraps(get_commands)
    def _get_commands(cmd_dir: str, cmds: list[str], *args: Any, **kwargs: Any) -> Any:
        names = list(cmds)
        if os.path.basename(cmd_dir) == "commands":
            try:
                ours = _usable()
            except (Exception, SystemExit) as err:
                warn(f"subcommands not added ({type(err).__name__}: {err})")
                ours = {}
            for name, module in ours.items():
                if name not in names:
                    sys.modules[f"cryodrgn.commands.{name}"] = module
                    names.append(name)
        return get_commands(cmd_dir, names, *args, **kwargs)

    command_line._get_commands = _get_commands


def main(argv: Sequence[str] | None = None) -> None:
    """``cryodrgn_amort COMMAND``: our subcommands without the host's, where no hook is installed.

    Imports only the command that is asked for.
    """
    try:
        forgive()
        _main(argv)
    except KeyboardInterrupt:
        sys.stderr.write("cryodrgn_amort: interrupted\n")
        raise SystemExit(INTERRUPTED) from None


class _Version(argparse.Action):
    """Says the versions that a report of a fault needs, and the device."""

    def __init__(self, **more: Any) -> None:
        super().__init__(nargs=0, **more)

    def __call__(self, *_: Any) -> NoReturn:
        import platform
        from importlib.metadata import version

        from cryodrgn_amort.core import default_device, device_name

        used = ", ".join(f"{name} {version(name)}" for name in ("cryodrgn", "torch", "numpy"))
        python = f"Python {platform.python_version()}, {platform.system()}"
        print(f"cryodrgn_amort {__version__}\n{used}, {python}\n{device_name(default_device())}")
        raise SystemExit(0)


def _main(argv: Sequence[str] | None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = load_plugins().commands()
    parser = argparse.ArgumentParser(
        prog="cryodrgn_amort",
        description="Replace cryoDRGN's amortized encoder, and measure how far it can be trusted",
    )
    parser.add_argument("--version", action=_Version, help="Also those of what it stands on")
    subparsers = parser.add_subparsers(title="Choose a command", metavar="COMMAND", required=True)
    wanted = argv[0] if argv and argv[0] in commands else None
    for name, spec in commands.items():
        if name != wanted:
            subparsers.add_parser(name, help=spec.summary)
            continue
        module = _load(spec)
        summary, _, examples = (module.__doc__ or spec.summary).partition("\n")
        sub = subparsers.add_parser(
            name,
            help=spec.summary,
            description=summary,
            # in a docstring, a line continuation reads as a run of spaces
            epilog=re.sub(" ([ ]+)", " \\\\\n\\1", examples),
            formatter_class=argparse.RawTextHelpFormatter,
        )
        module.add_args(sub)
        sub.set_defaults(func=module.main)
    args = parser.parse_args(argv)
    args.func(args)
