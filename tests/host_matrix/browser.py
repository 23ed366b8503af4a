"""A browser at the host's dashboard: Chromium without a window, by its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = (1500, 1100)  # of the page, px


def program() -> str | None:
    """Return the browser's program; None: there is none."""
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


class Page:
    """A page in the browser."""

    def __init__(self, address: str) -> None:
        import websocket  # of the package websocket-client, which the host's jupyterlab brings

        self._socket = websocket.create_connection(address, suppress_origin=True, timeout=120)
        self._ids = itertools.count(1)

    def call(self, method: str, **given: object) -> dict[str, Any]:
        """Call a method of the protocol.

        Raises
        ------
        RuntimeError
            If it fails.
        """
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": given}))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def js(self, code: str) -> Any:
        """Evaluate JavaScript; returns its value.

        Raises
        ------
        RuntimeError
            If it throws.
        """
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{code}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def until(self, code: str, seconds: float = 60.0) -> Any:
        """Wait until JavaScript gives something true; returns it.

        Raises
        ------
        AssertionError
            If it never does.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(RuntimeError):  # as long as the page is loading
                if value := self.js(code):
                    return value
            time.sleep(0.1)
        raise AssertionError(f"the page never has {code}")

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def picture(self) -> bytes:
        """Return what is seen as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def opened(url: str) -> Iterator[Page]:
    """Open a page in a browser of its own.

    Raises
    ------
    RuntimeError
        If there is no browser, or it does not start.
    """
    found = program()
    if found is None:
        raise RuntimeError("no Chromium (Debian: chromium; or name it with CHROMIUM=...)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--remote-debugging-port=0", "--no-first-run",
                 "--disable-dev-shm-usage", "--use-angle=swiftshader",
                 "--enable-unsafe-swiftshader",  # WebGL, which the dashboard draws points with
                 f"--window-size={SIZE[0]},{SIZE[1]}", f"--user-data-dir={profile}"]  # fmt: skip
        process = subprocess.Popen(
            [found, *flags, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            with contextlib.closing(Page(_address(Path(profile), process))) as page:
                yield page
        finally:
            process.terminate()
            process.wait(timeout=30)


def _address(profile: Path, process: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, StopIteration, IndexError):
            port = int((profile / "DevToolsActivePort").read_text().split()[0])
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
                pages = json.loads(answer.read())
            return next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page")
        time.sleep(0.1)
    raise RuntimeError("Chromium does not start")


_POINTS = "document.querySelector('#scatter')._fullData[0]"
_LOAD = "__load_covariate_pkl__"


def colour_by(page: Page, values: Path) -> np.ndarray:
    """Colour the particle explorer by a file of values, as a user does by the mouse.

    Chooses "Load covariate" in the menu of colours, and the file in the dialogue that it opens.

    Returns
    -------
    np.ndarray
        The values that the points have in the page; NaN where they have none.
    """
    page.until(f"{_POINTS}.x.length && document.querySelector('#sc option[value={_LOAD}]') && true")
    page.js(f"s = document.getElementById('sc'); s.value = '{_LOAD}';"
            "s.dispatchEvent(new Event('change', {bubbles: true}))")  # fmt: skip
    shown = "document.getElementById('covariate-pkl-path').textContent"
    here = Path(page.until(shown))
    while here not in values.parents:
        page.js("document.getElementById('covariate-pkl-up').click()")
        page.until(f"{shown} == {json.dumps(str(here.parent))}")
        here = here.parent
    for part in values.relative_to(here).parts:
        entry = (
            "[...document.querySelectorAll('#covariate-pkl-list li')]"
            f".find(li => li.querySelector('.fb-name')?.textContent == {json.dumps(part)})"
        )
        page.until(f"{entry} && true")
        page.js(f"{entry}.click()")
    column = re.sub(r"\W+", "_", values.stem)  # numbered, if it was loaded before
    page.until(f"document.getElementById('sc').value.startsWith('{column}')")
    page.until(f"{_POINTS}.marker.color.length == {_POINTS}.x.length")
    colours = f"Array.from({_POINTS}.marker.color, v => Number.isFinite(v) ? v : null)"
    return np.array(page.js(colours), float)


def coloured(page: Page) -> int:
    """Count the pixels of the explorer's plot in other colours than that of all points alike."""
    box = page.js("b = document.querySelector('#scatter .nsewdrag').getBoundingClientRect();"
                  "[b.top, b.bottom, b.left, b.right]")  # fmt: skip
    top, bottom, left, right = (round(edge) for edge in box)
    rgb = plt.imread(io.BytesIO(page.picture()))[top:bottom, left:right, :3]
    hue, saturation, _ = np.moveaxis(matplotlib.colors.rgb_to_hsv(rgb), 2, 0)
    alike = matplotlib.colors.rgb_to_hsv(matplotlib.colors.to_rgb("#4a5568"))[0]
    return int(((saturation > 0.08) & (np.abs(hue - alike) > 0.06)).sum())


def show(url: str, values: Path, picture: Path | None) -> None:
    """Colour the dashboard's particle explorer by values of ours, and look at it.

    Raises
    ------
    AssertionError
        If it does not show them.
    """
    with open(values, "rb") as handle:
        expected = pickle.load(handle)
    with opened(f"{url}explorer") as page:
        page.until(f"{_POINTS}.x.length")
        before = coloured(page)
        found = colour_by(page, values)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        until = time.monotonic() + 20
        least = before + np.isfinite(expected).sum() // 5
        while (after := coloured(page)) < least and time.monotonic() < until:
            time.sleep(0.5)
        if picture:
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(page.picture())
        assert after >= least, f"{after} coloured pixels, {before} before"
