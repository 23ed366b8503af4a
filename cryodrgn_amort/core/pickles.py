"""Pickles of arrays and plain containers, read without running what is in them; written."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodrgn_amort.core.errors import InputError
from cryodrgn_amort.core.files import check_intact, check_plain, replacing
from cryodrgn_amort.core.private import PythonUnpickler

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["read_ind", "read_pickle", "to_array", "write_pickle", "write_poses"]

_LONGEST = 10**8  # range
_ARRAY_NAMES = {
    "numpy": {"ndarray"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "collections": {"OrderedDict"},
    "datetime": {"datetime"},  # of a config.pkl
    "_codecs": {"encode"},  # bytes in pickles of protocol 2
    "torch._utils": {"_rebuild_tensor_v2"},
}


def _storage_from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def _dtype(code: Any, *more: Any) -> np.dtype:
    """Make a type of array, but of times: one that a damaged file makes of them ends the process.

    NumPy looks for their unit where the state that follows has none.
    """
    found: np.dtype = np.dtype(code, *more)
    if found.kind in "mM":
        raise pickle.UnpicklingError("it holds times or dates, which are no numbers")
    return found


def _pandas_index(_: str, parts: dict[str, Any]) -> Any:
    """Stand in for what makes a pandas Index: the array that it holds, or the range."""
    if "data" in parts:
        return np.asarray(parts["data"])
    if "start" not in parts:
        raise pickle.UnpicklingError("it holds a pandas index of several levels; save one of them")
    return range(int(parts["start"]), int(parts["stop"]), int(parts["step"]))


class _ArrayUnpickler(PythonUnpickler):
    """Admits arrays, tensors, plain Python containers, pandas' indices, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage_from_bytes
        if (module, name) in (("builtins", "range"), ("__builtin__", "xrange")):  # protocol 2
            return range
        if module.split(".")[0] == "pandas":  # which need not be imported
            if name == "_new_Index":
                return _pandas_index
            if name.endswith("Index"):
                return name
            raise pickle.UnpicklingError(f"it holds a pandas {name}; save its .to_numpy()")
        if (module, name) == ("numpy", "dtype"):
            return _dtype
        if name in _ARRAY_NAMES.get(module, ()):
            return OrderedDict if name == "OrderedDict" else super().find_class(module, name)
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not plain data")


def read_pickle(path: str | os.PathLike[str], flag: str, count: int | None = 1) -> Any:
    """Read a pickle of arrays and plain containers from a user, running none of its code.

    Parameters
    ----------
    flag
        Names the file's role in errors.
    count
        Number of pickles in the file; a list of them is returned if more than one. None: all.

    Raises
    ------
    InputError
        If the file is missing, damaged, no pickle, or holds anything but plain data.
    """
    check_intact(path, flag)
    try:
        with open(path, "rb") as handle:
            if count is None:
                parts: list[Any] = []
                size = os.path.getsize(path)
                while handle.tell() < size or not parts:
                    parts.append(_ArrayUnpickler(handle).load())
            else:
                parts = [_ArrayUnpickler(handle).load() for _ in range(count)]
    except OSError as err:
        raise InputError(f"{flag} {path}: {err.strerror or 'cannot be read'}") from None
    except Exception as err:  # a damaged pickle can raise anything
        reason = " ".join(str(err).split())[:200] or type(err).__name__
        raise InputError(f"{flag} {path}: not a usable pickle ({reason})") from None
    check_plain(parts, os.path.getsize(path), f"{flag} {path}")
    return parts[0] if count == 1 else parts


def to_array(value: Any, what: str) -> np.ndarray:
    """Make an array of what a pickle held.

    Raises
    ------
    InputError
        If it has no regular shape, or is too long a range; ``what`` names flag and file.
    """
    if isinstance(value, range) and len(value) > _LONGEST:
        raise InputError(f"{what}: {value} has {len(value)} values")
    try:
        return np.asarray(value)
    except ValueError:
        raise InputError(f"{what}: a list of entries of different lengths, not an array") from None


def read_ind(path: str | os.PathLike[str], flag: str, n: int | None = None) -> np.ndarray:
    """Read indices of particles `(M,)` int64, each once, of a stack of ``n`` (None: not known).

    Raises
    ------
    InputError
        If the file holds anything else; ``flag`` names its role.
    """
    what = f"{flag} {path}"
    ind = to_array(read_pickle(path, flag), what)
    if ind.dtype == bool:
        raise InputError(f"{what}: holds booleans; indices are needed (numpy.flatnonzero)")
    if ind.ndim != 1 or not np.issubdtype(ind.dtype, np.integer):
        raise InputError(f"{what}: not a list of integer indices")
    if len(ind) == 0:
        raise InputError(f"{what}: selects no particle")
    if ind.min() < 0 or (n is not None and ind.max() >= n):
        bad = ind.min() if ind.min() < 0 else ind.max()
        of = "" if n is None else f", there are {n} particles"
        raise InputError(f"{what}: index {bad} is out of range{of}")
    if len(np.unique(ind)) != len(ind):
        raise InputError(f"{what}: holds an index more than once")
    return ind.astype(np.int64)


def write_pickle(path: str | os.PathLike[str], *values: Any) -> None:
    """Pickle ``values`` one after the other into one file."""
    with replacing(path) as temporary, open(temporary, "wb") as handle:
        for value in values:
            pickle.dump(value, handle)


def write_poses(
    path: str | os.PathLike[str], rots: Tensor, trans_px: Tensor | None, D: int
) -> None:
    """Write poses as the host does: rotations `(N, 3, 3)`, and translations `(N, 2)` over ``D``."""
    trans = () if trans_px is None else (trans_px.cpu().numpy() / D,)
    write_pickle(path, (rots.cpu().numpy(), *trans))
