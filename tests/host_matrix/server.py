"""Runs commands of the installed ``cryodrgn``, each in a child that has all imports done.

A process of an environment's own Python. It says the version first, then reads orders, one JSON
object per line, and answers with one line per command that has ended. It knows of ``cryodrgn``
alone: this package must not be importable where it is to be the unmodified host.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pkgutil
import signal
import sys
import warnings

os.environ["MPLBACKEND"] = "Agg"
os.environ["NUMBA_NUM_THREADS"] = "1"
os.environ["NUMBA_THREADING_LAYER"] = "workqueue"  # the others do not survive a fork
warnings.simplefilter("ignore")

SELECTION = "SELECTION"
"""Environment variable: x-axis column and threshold of what the user of ``filter`` circles."""


def preload() -> str:
    """Import the host, and have UMAP compile; returns the version."""
    import cryodrgn
    import cryodrgn.command_line
    import numpy as np
    import umap

    for package in ("commands", "commands_utils"):
        found = importlib.import_module(f"cryodrgn.{package}")
        for module in pkgutil.iter_modules(found.__path__, f"cryodrgn.{package}."):
            importlib.import_module(module.name)
    umap.UMAP(n_neighbors=5).fit_transform(np.random.default_rng(0).normal(size=(40, 3)))
    return str(cryodrgn.__version__)


def circle_points() -> None:
    """Be the user of ``filter``: circle all points left of a threshold, and press Save.

    The first window that is shown gets the mouse's events: along the lasso, then on the button.
    """
    import matplotlib.pyplot as plt
    from matplotlib.backend_bases import MouseEvent

    column, threshold = os.environ[SELECTION].split()
    state = {"busy": False}

    def mouse(canvas: object, name: str, point: tuple[float, float], **more: object) -> None:
        canvas.callbacks.process(name, MouseEvent(name, canvas, *point, **more))

    def click(canvas: object, point: tuple[float, float]) -> None:
        for name in ("button_press_event", "button_release_event"):
            mouse(canvas, name, point, button=1)

    def show(*args: object, **more: object) -> None:
        if state["busy"]:
            return
        state["busy"] = True
        figure = plt.gcf()
        figure.set_size_inches(20, 15)
        canvas = figure.canvas
        canvas.draw()
        menu = next(a for a in figure.axes if a.get_title() == "choose\nx-axis")
        label = next(t for t in menu.texts if t.get_text() == column)
        click(canvas, tuple(label.get_window_extent().get_points().mean(0)))
        axes = next(a for a in figure.axes if a.get_xlabel() == column)
        canvas.draw()
        box = axes.get_window_extent()
        x = min(axes.transData.transform((float(threshold), 0))[0], box.x1 - 1)
        corners = [(box.x0 + 1, box.y0 + 1), (x, box.y0 + 1), (x, box.y1 - 1),
                   (box.x0 + 1, box.y1 - 1)]  # fmt: skip
        path = [*corners, corners[0]]
        mouse(canvas, "button_press_event", path[0], button=1)
        for point in path:
            mouse(canvas, "motion_notify_event", point, button=1)
        mouse(canvas, "button_release_event", path[-1], button=1)
        canvas.draw()
        button = next(a for a in figure.axes if any(
            t.get_text() == "Save Selection" for t in a.texts))  # fmt: skip
        assert button.get_visible(), "nothing was selected"
        click(canvas, tuple(button.get_window_extent().get_points().mean(0)))
        assert not plt.get_fignums(), "the window did not close"

    plt.show = show


def child(order: dict[str, object]) -> None:
    """Do what the installed script does, with stdout and stderr in a file."""
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    os.chdir(order["folder"])
    os.environ.update(order["environ"])
    if SELECTION in order["environ"]:
        circle_points()
    import logging

    for handler in logging.getLogger().handlers:
        handler.flush()
    from cryodrgn import command_line

    script, *sys.argv[1:] = order["argv"]
    sys.argv[0] = script
    {"cryodrgn": command_line.main_commands, "cryodrgn_utils": command_line.util_commands}[script]()


def main() -> None:
    """Serve until the input ends; then end what still runs."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    plugin = importlib.util.find_spec("cryodrgn_amort") is not None
    print(json.dumps({"version": preload(), "plugin": plugin}), file=answers, flush=True)
    import threading

    running: dict[int, object] = {}

    def wait(pid: int, order: dict[str, object]) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        del running[pid]
        print(json.dumps({"id": order["id"], "code": code}), file=answers, flush=True)

    for line in sys.stdin:
        order = json.loads(line)
        if "end" in order:
            for pid, had in list(running.items()):
                if had["id"] == order["end"]:
                    os.killpg(pid, signal.SIGTERM)
            continue
        pid = os.fork()
        if not pid:
            code = 1
            try:
                child(order)
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        running[pid] = order
        threading.Thread(target=wait, args=(pid, order), daemon=True).start()
    for pid in list(running):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
