"""What this machine has, as its system tells. Imports nothing that takes time or memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["available_memory", "read_fact"]


def read_fact(path: str, name: str) -> str | None:
    """Return the first value of that name in a file of lines ``name: value``, if there is one."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None


def available_memory() -> int:
    """Return how many bytes of memory are free for this process, cgroup limits included."""
    known = read_fact("/proc/meminfo", "MemAvailable")
    if known is None:  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = 1024 * int(known.split()[0])
    group = (read_fact("/proc/self/cgroup", "0") or "").rpartition(":")[2].lstrip("/")
    for folder in (Path("/sys/fs/cgroup", group), Path("/sys/fs/cgroup")):
        with contextlib.suppress(OSError, ValueError):  # no limit, or none for this group
            limit, used = (int((folder / f"memory.{n}").read_text()) for n in ("max", "current"))
            free = min(free, limit - used)
    return max(free, 0)
