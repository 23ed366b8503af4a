"""What this machine has, as its system tells. Imports nothing that takes time or memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


__all__ = ["available_memory", "cores", "read_fact"]


def read_fact(path: str, name: str) -> str | None:
    """Return the first value of that name in a file of lines ``name: value``, if there is one."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Return how many bytes of memory are free for this process, cgroup limits included."""
    known = read_fact("/proc/meminfo", "MemAvailable")
    if known is None:  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(min([1024 * int(known.split()[0]), *_left_to_groups()]), 0)


_GROUPS = Path("/proc/self/cgroup")
_GROUPS_AT = Path("/sys/fs/cgroup")
# where a kind of cgroups has memory: below _GROUPS_AT, limit, use
_VERSIONS = {
    "": (".", "memory.max", "memory.current"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
}


def _left_to_groups() -> Iterator[int]:
    """Yield what is left, in bytes, to each cgroup with a limit that this process is in.

    A group is bound by those around it as well. In a container the group's own path may not be
    there, but what is around it.
    """
    with contextlib.suppress(OSError):
        for line in _GROUPS.read_text(errors="replace").splitlines():
            _, controllers, group = line.split(":", 2)
            for kind in _VERSIONS.keys() & set(controllers.split(",")):
                root, *names = _VERSIONS[kind]
                around = Path(group.lstrip("/"))
                for folder in (around, *around.parents):
                    with contextlib.suppress(OSError, ValueError):  # no limit, or not there
                        files = (_GROUPS_AT / root / folder / name for name in names)
                        limit, used = (int(file.read_text("ascii")) for file in files)
                        yield limit - used
