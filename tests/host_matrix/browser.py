"""A browser at the host's dashboard: Chromium without a window, by its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    def screenshot(self, path: Path) -> None:
        """Write what is seen as PNG."""
        picture = self.call("Page.captureScreenshot", format="png")["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(picture))


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
            yield Page(_address(Path(profile), process))
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


_PLOT = "[...document.querySelectorAll('.js-plotly-plot')].find(p => p.data && p.data[0].x)"
_COLOURS = f"Array.from(({_PLOT}).data[0].marker.color)"
_LOAD = "__load_covariate_pkl__"


def colour_by(page: Page, values: Path) -> list[float | None]:
    """Colour the particle explorer by a file of values, as a user does by the mouse.

    Chooses "Load covariate" in the menu of colours, and the file in the dialogue that it opens.

    Returns
    -------
    list
        The values that the points have in the page; None where they are not finite.
    """
    page.until(f"{_PLOT} && document.querySelector('#sc option[value={_LOAD}]') && true")
    page.js(f"s = document.getElementById('sc'); s.value = '{_LOAD}';"
            "s.dispatchEvent(new Event('change', {bubbles: true}))")  # fmt: skip
    shown = "document.getElementById('covariate-pkl-path').textContent"
    here = Path(page.until(shown))
    while here not in values.parents:
        page.js("document.getElementById('covariate-pkl-up').click()")
        page.until(f"{shown} == {json.dumps(str(here.parent))}")
        here = here.parent
    for part in values.relative_to(here).parts:
        entry = ("[...document.querySelectorAll('#covariate-pkl-list li')]"
                 f".find(li => li.querySelector('.fb-name').textContent == {json.dumps(part)})")  # fmt: skip
        page.until(f"{entry} && true")
        page.js(f"{entry}.click()")
    column = page.until(
        f"v = document.getElementById('sc').value; v != '{_LOAD}' && v != 'none' && v"
    )
    page.until(f"Array.isArray(({_PLOT}).data[0].marker.color) ||"
               f" ArrayBuffer.isView(({_PLOT}).data[0].marker.color)")  # fmt: skip
    stem = values.stem.replace(".", "_").replace("-", "_")
    assert column == stem, f"coloured by {column}"
    return list(page.js(f"{_COLOURS}.map(v => Number.isFinite(v) ? v : null)"))
