"""Which library multiplies float32 matrices."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch

from cryodrgn_amort.core.devices import default_device, on_gpu
from cryodrgn_amort.core.machine import read_fact

if TYPE_CHECKING:
    from collections.abc import Iterator


__all__ = ["matrix_products", "onednn_error", "use_onednn"]

_EXACT = 1e-5  # relative error of a float32 product


def use_onednn(precision: str = "bf16") -> str | None:
    """Let oneDNN multiply float32 matrices instead of MKL.

    The only switch that reaches it also allows it to round to bfloat16, which it does where the
    processor has instructions for that alone (AMX): see ``onednn_error``. Returns what undoes it;
    None where PyTorch has no such switch.
    """
    switch: Any = getattr(torch.backends.mkldnn, "matmul", None)  # from PyTorch 2.9
    if not hasattr(switch, "fp32_precision") or not torch.backends.mkldnn.is_available():
        return None
    before: str = switch.fp32_precision
    switch.fp32_precision = precision
    return before


@functools.cache
def onednn_error() -> float | None:
    """Return the largest error of oneDNN's product, relative to the largest entry; None: no switch.

    About 1e-6 in true float32, 1e-3 in bfloat16.
    """
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(512, 256, generator=generator)
    b = torch.randn(256, 256, generator=generator)
    before = use_onednn()
    if before is None:
        return None
    found = torch.mm(a, b)
    use_onednn(before)
    exact = a.double() @ b.double()
    return float((found - exact).abs().max() / exact.abs().max())


@contextlib.contextmanager
def matrix_products() -> Iterator[None]:
    """Multiply float32 matrices by the faster of PyTorch's libraries, as exactly as before.

    On AMD's processors that is oneDNN, where PyTorch by itself takes MKL. Beside a GPU nothing is
    changed: its switch to TF32 and this one are not meant to be mixed.
    """
    amd = read_fact("/proc/cpuinfo", "vendor_id") == "AuthenticAMD"
    amd = amd and not on_gpu(default_device())
    before = use_onednn() if amd and (onednn_error() or 1.0) < _EXACT else None
    try:
        yield
    finally:
        if before is not None:
            use_onednn(before)
