"""The device that is worked on, and what it can do: a GPU if there is one, else the processor."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


__all__ = [
    "Graph",
    "Halving",
    "default_device",
    "device_name",
    "free_memory",
    "generator",
    "half_precision",
    "on_gpu",
    "out_of_memory",
    "tf32",
    "wide_products",
]

logger = logging.getLogger("cryodrgn_amort")
T = TypeVar("T")

_NATIVE_BF16 = (8, 0)  # compute capability from which tensor cores take bfloat16: Ampere


def default_device() -> torch.device:
    """Return the device that the host would use: the first GPU, if there is one."""
    return _gpu() or torch.device("cpu")


def _gpu() -> torch.device | None:
    return torch.device("cuda") if torch.cuda.is_available() else None


def on_gpu(device: torch.device) -> bool:
    """Tell whether a device works by itself, so that whoever asks it for a number has to wait."""
    return device.type != "cpu"


def half_precision(device: torch.device) -> str | None:
    """Return the half precision that a GPU multiplies fast, "bf16" or "fp16"; None: it is none.

    Before Ampere tensor cores take fp16 alone; PyTorch takes bfloat16 there as well, and is ten
    times slower at it.
    """
    if not on_gpu(device):
        return None
    if device.type != "cuda" or torch.version.hip:
        return "bf16"
    return "bf16" if torch.cuda.get_device_capability(device) >= _NATIVE_BF16 else "fp16"


def device_name(device: torch.device) -> str:
    """Return what a log line calls a device: its type, and the card's name if there is one."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes a GPU has left for us; None: that is not known.

    What PyTorch holds and does not use counts as left.
    """
    return _free(device) if on_gpu(device) else None


def _free(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + held)


def out_of_memory(err: BaseException) -> str | None:
    """Say what PyTorch says of a GPU without room; None: the error is another one."""
    text, size = str(err), r"(\S+ [KMGT]?i?B)"
    asked = re.search(rf"Tried to allocate {size}", text)
    free = re.search(rf"of which {size} is free", text)
    if type(err).__name__ != "OutOfMemoryError" and "out of memory" not in text:
        return None
    wanted = f": {asked[1]} more were asked for" if asked else ""
    return f"the GPU has no memory left{wanted}" + (f", {free[1]} are free" if free else "")


class Graph:
    """Work of a GPU that is recorded once, and replayed with whatever its memory then holds.

    Parameters
    ----------
    generators
        Those that random numbers are drawn from, beside the default one.
    """

    def __init__(self, generators: Iterable[torch.Generator]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        for one in generators:
            if not hasattr(self._graph, "register_generator_state"):
                raise RuntimeError(f"PyTorch {torch.__version__} replays no generators")
            self._graph.register_generator_state(one)

    @staticmethod
    def possible(device: torch.device) -> bool:
        """Tell whether a device can do so."""
        return device.type == "cuda"

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the work that this thread asks for; none is done. Others may go on reading."""
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            yield

    def replay(self) -> None:
        """Do the work."""
        self._graph.replay()


class Halving:
    """Does work on as many things at a time as a GPU has room for.

    Parameters
    ----------
    what
        The things, for humans.
    """

    def __init__(self, what: str) -> None:
        self._what, self._most = what, 2**62

    def __call__(self, do: Callable[[slice], T], count: int) -> Iterator[T]:
        """Yield what ``do`` returns for all of ``count`` things, some at a time, in order."""
        first = 0
        while first < count:
            piece = slice(first, min(first + self._most, count))
            try:
                found = do(piece)
            except RuntimeError as err:
                size = piece.stop - piece.start
                said = out_of_memory(err)
                if said is None or size < 2:
                    raise
                self._most = size // 2
            else:
                first = piece.stop
                yield found
                continue
            # here the error, and what it holds, is gone
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning(f"{self._what}: {self._most} at a time from here on; {said}")


def generator(device: torch.device, seed: int) -> torch.Generator:
    """Make a generator that draws on a device."""
    made = torch.Generator(device if device.type == "cuda" else "cpu")
    return made.manual_seed(seed)


@contextlib.contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Let a GPU round the float32 matrices that it multiplies to TF32, for a while."""
    switch: Any = torch.backends.cuda.matmul
    if device.type != "cuda":
        yield
        return
    name, value = (
        ("fp32_precision", "tf32") if hasattr(switch, "fp32_precision") else ("allow_tf32", True)
    )
    before = getattr(switch, name)
    setattr(switch, name, value)
    try:
        yield
    finally:
        setattr(switch, name, before)


@functools.cache
def wide_products(device: torch.device) -> bool:
    """Tell whether a product of half-precision matrices can be had in single precision.

    So that it is not rounded, nor summed up in half precision, where it is long.
    """
    if device.type != "cuda":
        return False
    probe = torch.ones(16, 16, dtype=torch.float16, device=device)
    try:
        found: Any = torch.mm(probe, probe, out_dtype=torch.float32)  # type: ignore[call-overload]
    except (TypeError, RuntimeError):  # before PyTorch 2.8
        return False
    return bool(found.dtype == torch.float32)
