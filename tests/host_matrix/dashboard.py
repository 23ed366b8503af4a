"""The host's dashboard as a web server: its pages, its data, and our values as its covariates."""

from __future__ import annotations

import base64
import json
import pickle
import socket
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import numpy as np

from host_matrix.folders import close, read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from host_matrix.runs import Run

PAGES = ("", "explorer", "pairplot", "latent-3d", "trajectory", "command-builder",
         "landscape-volpca", "landscape-full-3d")  # fmt: skip
OURS = ("retrieval_rank.*.pkl", "displacement*.pkl", "reconstruction.pkl", "trust.pkl", "gap.pkl")
"""What ``eval_amort`` writes for it."""


def free_port() -> int:
    """Return a port of this machine that nothing listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def fetch(url: str, **given: object) -> bytes:
    """Get a page, or post what is given as JSON.

    Raises
    ------
    OSError
        If the server refuses.
    """
    data = json.dumps(given).encode() if given else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def wait_for(url: str, has_ended: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until a server answers.

    Parameters
    ----------
    has_ended
        Whether it never will.

    Raises
    ------
    AssertionError
        If it does not.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until and not has_ended():
        try:
            fetch(url)
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError("does not answer")


def _numbers(value: Any) -> np.ndarray:
    """Return an array of Plotly's JSON, which may be packed."""
    if isinstance(value, dict):
        packed = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
        return packed.astype(float)
    return np.array(value, float)


def covariates(run: Run) -> list[Path]:
    """Return the values per particle that ``eval_amort`` has written of a run, if it was asked."""
    folder = run.folder.parent.parent / "evals" / run.name
    return sorted(path for pattern in OURS for path in folder.glob(pattern))


def check(run: Run, url: str, out: Path, has_ended: Callable[[], bool]) -> bool:
    """Open the pages and compare the data with the run's; returns whether ours were loaded.

    Raises
    ------
    AssertionError, OSError
        If something is not as it should be.
    """
    wait_for(url, has_ended)
    for page in PAGES:
        try:
            text = fetch(url + page).decode()
        except urllib.error.HTTPError as err:
            if err.code == 404 and page.startswith("landscape"):
                continue  # not in early versions
            raise
        assert "</html>" in text, f"{page}: not a page"
    plot = json.loads(fetch(f"{url}api/scatter?x=z0&y=z1"))["data"][0]
    close(_numbers(plot["x"]), run.z[:, 0], "z0", 1e-6)
    close(_numbers(plot["y"]), run.z[:, 1], "z1", 1e-6)
    some = [1, 5, len(run.z) - 1]
    fetch(f"{url}api/save_selection", rows=some, sel_dir=str(out), basename="picked")
    assert (read(out / "picked.pkl") == run.rows[some]).all(), "saves other particles than selected"
    for path in covariates(run):
        try:
            column = json.loads(fetch(f"{url}api/load_covariate_pkl", path=str(path)))["columns"][0]
        except urllib.error.HTTPError as err:
            if err.code == 404:
                return False  # from 4.3 on
            raise AssertionError(f"{path.name}: {err.read().decode()}") from err
        plot = json.loads(fetch(f"{url}api/scatter?x=z0&y=z1&color={column}"))["data"][0]
        with open(path, "rb") as handle:
            values = pickle.load(handle)
        np.testing.assert_allclose(_numbers(plot["marker"]["color"]), values, rtol=1e-6)
    return bool(covariates(run))
