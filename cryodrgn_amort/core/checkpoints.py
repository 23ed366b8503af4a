"""Pickles and checkpoints, the host's and ours: read so that none runs code."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pickle
import re
import warnings
import zipfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort.core.errors import InputError
from cryodrgn_amort.core.files import check_intact, check_plain, replacing
from cryodrgn_amort.core.pickles import read_pickle, write_pickle
from cryodrgn_amort.core.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = [
    "INTERRUPTED",
    "OWN_KEY",
    "epochs",
    "latest_z",
    "odd_rows",
    "odd_text",
    "read_weights",
    "read_z",
    "without_odd",
    "write_weights",
    "write_z",
]

OWN_KEY = "amort"
"""Our key in config.yaml and in checkpoints; the host ignores it."""
OWN_PARTS = frozenset({"encoder", "encoder_state_dict", "input_state", "norm", "random"})
"""What a checkpoint holds under ``OWN_KEY``."""
INTERRUPTED = ".interrupted.pkl"
"""Checkpoint within an epoch; named unlike what the host takes for its own."""
_NAMED = 10  # particles in a message
_PARALLEL = "module."
"""What PyTorch's data-parallel wrappers put before every name."""


def read_z(path: str | os.PathLike[str], flag: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a z.pkl of the host: means and log variances, each `(N, zdim)` float32.

    Log variances are NaN where the file has none, as those of ``train_dec`` and ``abinit``. Rows
    may hold values that are not finite: see ``odd_rows``.

    Raises
    ------
    InputError
        If the file is no z file, or no row is finite.
    """
    parts = read_pickle(path, flag, count=None)
    usable = all(isinstance(p, np.ndarray) and p.ndim == 2 and p.dtype.kind == "f" for p in parts)
    if not usable or not 1 <= len(parts) <= 2 or len({p.shape for p in parts}) > 1:
        raise InputError(f"{flag} {path}: not a z file (two pickled arrays, N x zdim each)")
    mean = parts[0].astype(np.float32, copy=False)
    logvar = np.full_like(mean, np.nan) if len(parts) == 1 else parts[1]
    if len(odd_rows(mean, logvar)) == len(mean):
        raise InputError(f"{flag} {path}: holds no latent that is finite")
    return mean, logvar.astype(np.float32, copy=False)


def odd_rows(mean: np.ndarray, logvar: np.ndarray) -> np.ndarray:
    """Return the positions of latents `(N, zdim)` that are not finite, `(M,)`.

    Log variances count, unless they are all NaN: there are none then.
    """
    good = np.isfinite(mean).all(1)
    if not np.isnan(logvar).all():
        good &= np.isfinite(logvar).all(1)
    return np.flatnonzero(~good)


def without_odd(mean: np.ndarray, logvar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return latents `(N, zdim)` with the mean of the others where they are not finite."""
    odd, parts = odd_rows(mean, logvar), []
    for part in (mean, logvar):
        filled = part.copy()
        filled[odd] = np.delete(part, odd, 0).mean(0)
        parts.append(filled)
    return parts[0], parts[1]


def odd_text(rows: np.ndarray) -> str:
    """Name particles whose latents are not finite, by their rows among the latents."""
    some = ", ".join(map(str, rows[:_NAMED])) + (", ..." if len(rows) > _NAMED else "")
    one = len(rows) == 1
    count = "1 particle whose latent is" if one else f"{len(rows)} particles whose latents are"
    return f"{count} not finite ({'row' if one else 'rows'} {some} of its z.pkl, from 0)"


def read_weights(path: str | os.PathLike[str], flag: str) -> dict[str, Any]:
    """Read a weights.pkl of ours or of the host, onto the CPU.

    Raises
    ------
    InputError
        If the file is missing, damaged, or no checkpoint.
    """
    check_intact(path, flag)
    _check_archive(path, flag)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles, which are refused below
            try:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:  # of abinit_het: it holds arrays
                with _arrays_admitted():
                    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as err:
        raise InputError(f"{flag} {path}: {err.strerror or 'cannot be read'}") from None
    except Exception:  # torch raises many kinds for damaged or foreign files
        raise InputError(f"{flag} {path}: not a checkpoint (a weights.pkl is needed)") from None
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    if not (
        isinstance(parts.get("epoch"), int) and isinstance(parts.get("model_state_dict"), dict)
    ):
        raise InputError(f"{flag} {path}: not a checkpoint (a weights.pkl is needed)")
    state = parts["model_state_dict"]
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise InputError(f"{flag} {path}: a damaged checkpoint (its model_state_dict)")
    if state and all(name.startswith(_PARALLEL) for name in state):
        parts["model_state_dict"] = {k.removeprefix(_PARALLEL): v for k, v in state.items()}
    own = parts.get(OWN_KEY, {})
    if not isinstance(own, dict) or (own and not own.keys() >= OWN_PARTS):
        raise InputError(f"{flag} {path}: a damaged checkpoint (its part {OWN_KEY!r})")
    check_plain(parts, os.path.getsize(path), f"{flag} {path}")
    return parts


@functools.cache
def _array_types() -> list[Any]:
    """Return what pickles of numpy arrays, and of the time in a config, are made of."""
    value = np.float64(0)
    made = [(value.__reduce__()[0], "scalar"), (np.array(value).__reduce__()[0], "_reconstruct")]
    types = [type(np.dtype(code)) for code in "?bhilqBHILQefdSU"]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    named = [(make, f"{module}.{name}") for make, name in made for module in modules]
    return [np.ndarray, np.dtype, *types, datetime, *named]


def _arrays_admitted() -> contextlib.AbstractContextManager[Any]:
    """Let PyTorch read arrays in checkpoints, where it can be told to (from 2.6 on)."""
    try:
        return torch.serialization.safe_globals(_array_types())
    except (AttributeError, TypeError):
        return contextlib.nullcontext()


def _check_archive(path: str | os.PathLike[str], flag: str) -> None:
    """Refuse a checkpoint that is compressed, as PyTorch's are not: it could be without end."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # of another kind, or damaged: PyTorch says so
    if packed:
        raise InputError(f"{flag} {path}: not a checkpoint (it is compressed)")


def write_weights(
    path: str | os.PathLike[str],
    epoch: int,
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any] | None = None,
    **own: Any,
) -> None:
    """Write a weights.pkl, which the host can read.

    Parameters
    ----------
    model, optimizer
        Their states.
    own
        Of ``OWN_PARTS``: ``encoder`` and ``encoder_state_dict``; what else is not given is empty.
    """
    rest: dict[str, Any] = {"input_state": {}, "norm": None, "random": {}}
    checkpoint = {
        "epoch": epoch,
        "model_state_dict": dict(model),
        "optimizer_state_dict": dict(optimizer or {}),
        OWN_KEY: {"version": __version__, **rest, **own},
    }
    with replacing(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as err:  # PyTorch writes without Python, and hides what went wrong
            reason = f"cannot be written ({str(err).splitlines()[0]}): is the disk full?"
            raise OSError(errno.EIO, reason) from None


def write_z(path: str | os.PathLike[str], mean: np.ndarray, logvar: np.ndarray) -> None:
    """Write a z.pkl as the host does."""
    write_pickle(path, np.asarray(mean, np.float32), np.asarray(logvar, np.float32))


def epochs(folder: str | os.PathLike[str]) -> list[int]:
    """Return the epochs of a run folder that have both weights and z, in order."""
    names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    found = (re.fullmatch(r"weights\.(\d+)\.pkl", name) for name in names)
    return sorted(int(m[1]) for m in found if m and f"z.{m[1]}.pkl" in names)


def latest_z(folder: str | os.PathLike[str], flag: str) -> Path:
    """Return the final z file of a run folder, or that of its latest epoch."""
    final = Path(folder) / "z.pkl"
    if final.is_file():
        return final
    known = epochs(folder)
    if not known:
        raise InputError(f"{flag} {folder}: no z.pkl in this folder")
    return Path(folder) / f"z.{known[-1]}.pkl"
