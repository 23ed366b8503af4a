"""Standard output and error that cannot end the work, whoever reads them."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys

__all__ = ["forgive"]

_GONE = (errno.EPIPE, errno.EIO)  # a pipe, a terminal


class _File(io.FileIO):
    """A file descriptor that leads nowhere once nobody reads it any more."""

    def write(self, data: object) -> int:  # type: ignore[override]
        """Write all, or lose all."""
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as err:
            if err.errno not in _GONE:
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return memoryview(data).nbytes  # type: ignore[arg-type]


def forgive() -> None:
    """Let no write to standard output or error fail for its reader, or for its encoding.

    What the encoding lacks is written as Python writes it in a program. Streams that are
    somebody's replacement (a test's, a notebook's) stay as they are.
    """
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if old is None:  # closed by the caller
            nowhere = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
            setattr(sys, name, nowhere)
            continue
        if old is not getattr(sys, f"__{name}__"):
            continue
        try:
            old.flush()
            file = _File(old.fileno(), "w", closefd=False)
        except (OSError, ValueError):  # it has no descriptor
            continue
        new = io.TextIOWrapper(
            io.BufferedWriter(file),
            encoding=old.encoding,
            errors="backslashreplace",
            line_buffering=old.line_buffering,
            write_through=old.write_through,
        )
        setattr(sys, name, new)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)
