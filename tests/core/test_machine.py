"""What is read of the machine."""

import pytest

from cryodrgn_amort.core import machine

GB = 10**9
UNLIMITED = 9223372036854771712  # as cgroups of version 1 say it


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/", {}, None),
        ("0::/job/step", {"job/step": ("max", 1), "job": (3, 2), ".": (9, 1)}, 1),
        ("0::/job/step", {"job/step": (8, 2), "job": ("max", 2)}, 6),
        ("0::/elsewhere/in/a/container", {".": (3, 1)}, 2),
        ("4:memory:/slurm/job/step\n0::/", {
            "memory/slurm/job/step": (UNLIMITED, 1), "memory/slurm/job": (4, 1), "memory": (9, 1),
        }, 3),
        ("4:cpu,memory:/job\n3:name=systemd:/a:b", {"memory/job": (5, 1)}, 4),
        ("4:memory:/docker/x", {"memory": (2, 1)}, 1),
        ("4:memory:/job", {"memory/job": (UNLIMITED, 1)}, None),
        ("4:memory:/job", {"memory/job": (2, 3)}, 0),
    ],
)  # fmt: skip
def test_memory_that_cgroups_leave(groups, files, left, tmp_path, monkeypatch):
    names = {False: ("max", "current"), True: ("limit_in_bytes", "usage_in_bytes")}
    for folder, values in files.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, value in zip(names[folder.startswith("memory")], values, strict=True):
            text = value if value in ("max", UNLIMITED) else value * GB
            (tmp_path / folder / f"memory.{name}").write_text(f"{text}\n")
    (tmp_path / "self").write_text(groups)
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "self")
    monkeypatch.setattr(machine, "_GROUPS_AT", tmp_path)
    monkeypatch.setattr(machine, "read_fact", lambda *_: f"{20 * GB // 1024} kB")
    assert machine.available_memory() // GB == (20 if left is None else left)
