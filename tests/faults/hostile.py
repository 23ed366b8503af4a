"""Files that were made to do harm: to run code, to take all memory or time, to write elsewhere."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from faults.damage import Finding
from faults.stage import EVALUATE, NET, PARTICLES, SMALL
from faults.trials import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_OWNED = "owned"  # the file that code in a file would make
_LIMIT = 40.0  # seconds
_TRAIN = ["train_amort", *PARTICLES, *NET, "-n", "1", "-o", "out"]
_EVALUATE = ["eval_amort", "net", "--transform", *EVALUATE, "-o", "out"]


class _Call:
    """Pickles as a call: what a pickle may ask for."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self._parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._parts


@dataclass(frozen=True)
class Hostile:
    """A hostile file.

    Attributes
    ----------
    make
        Puts it into a copy of the stage; returns the command that meets it.
    harmless
        Whether the command is to succeed without harm, and not to be refused.
    """

    name: str
    make: Callable[[Path], list[str]]
    harmless: bool = False


def _shell() -> _Call:
    return _Call(os.system, f"touch {_OWNED}")


def _replaced(flag: str, value: object) -> Callable[[Path], list[str]]:
    """Give a pickle, or bytes, in place of an input."""

    def make(folder: Path) -> list[str]:
        path = folder / "evil.pkl"
        path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))
        if flag in _TRAIN:
            return [
                *_TRAIN[: _TRAIN.index(flag) + 1],
                "evil.pkl",
                *_TRAIN[_TRAIN.index(flag) + 2 :],
            ]
        return [*(_EVALUATE if flag in ("--labels", "--coordinate") else _TRAIN), flag, "evil.pkl"]

    return make


def _in_run(name: str, content: bytes | Callable[[Path], None], *, then: list[str] = _EVALUATE
            ) -> Callable[[Path], list[str]]:  # fmt: skip
    """Put a file into the run ``net``, as its owner would: with no checksums."""

    def make(folder: Path) -> list[str]:
        path = folder / "net" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        (folder / "net/checksums.sha256").unlink()
        if callable(content):
            content(path)
        else:
            path.write_bytes(content)
        return then

    return make


def _checkpoint(**more: object) -> Callable[[Path], None]:
    """Put something into a real checkpoint."""

    def write(path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        torch.save({**checkpoint, **more}, path)

    return write


def _zip_bomb(path: Path) -> None:
    """Compress a gigabyte of zeros as a tensor's data."""
    checkpoint = torch.load(path, weights_only=True)
    name = next(iter(checkpoint["model_state_dict"]))
    checkpoint["model_state_dict"][name] = torch.zeros(1 << 22)
    torch.save(checkpoint, path)
    packed = path.with_suffix(".zip")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry) * (64 if entry.file_size > 1e6 else 1))
    packed.replace(path)


def _nested(depth: int, width: int) -> list[Any]:
    """Few bytes that stand for width ** depth numbers."""
    found: list[Any] = [0] * width
    for _ in range(depth):
        found = [found] * width
    return found


def _cycle() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def _huge_memo() -> bytes:
    """A pickle that claims to have four billion objects: memory for their places, 32 GB."""
    return b"\x80\x02]r" + struct.pack("<I", 0xFFFFFFF0) + b"."


def _huge_bytes() -> bytes:
    return b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"x."


def _deep() -> bytes:
    return b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b"."


def _object_array() -> np.ndarray:
    found = np.empty(40, object)
    found[:] = [_shell() for _ in found]
    return found


def _legacy(path: Path) -> None:
    """A checkpoint as PyTorch wrote them before 1.6: bare pickles."""
    path.write_bytes(pickle.dumps({"epoch": 2, "model_state_dict": _shell()}, protocol=2))


def _malicious_zip(path: Path) -> None:
    """Replace the pickle within a real checkpoint."""
    changed = path.with_suffix(".new")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.infolist():
            evil = entry.filename.endswith("data.pkl")
            data = pickle.dumps({"epoch": 2, "model_state_dict": _shell()}, protocol=2)
            new.writestr(entry.filename, data if evil else old.read(entry))
    changed.replace(path)


def _hidden() -> object:
    return _Call(np.ndarray, (1,), state=(1, (1,), np.dtype("O"), False, [_shell()]))


def _second() -> bytes:
    """Means, and instead of log variances a call."""
    return pickle.dumps(np.zeros((32, 2), np.float32)) + pickle.dumps(_shell())


def _storage() -> object:
    """A tensor whose data are a pickle of their own."""
    inner = pickle.dumps(_shell(), protocol=2)
    load = _Call(torch.storage._load_from_bytes, inner)
    return _Call(torch._utils._rebuild_tensor_v2, load, 0, (40,), (1,), False, {})


def _endless_tensor() -> object:
    """A tensor of one number that is repeated without end."""
    return torch.zeros(1).expand(1 << 40)


def _yaml(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text + path.read_text())

    return write


_TAG = f"evil: !!python/object/apply:os.system ['touch {_OWNED}']\n"
_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k + 1}: &a{k + 1} [{', '.join([f'*a{k}'] * 9)}]\n" for k in range(12)
)


def _plan(change: Callable[[dict[str, Any]], None] | str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        path = folder / "study/plan.yaml"
        if isinstance(change, str):
            path.write_text(change + path.read_text())
        else:
            plan = yaml.safe_load(path.read_text())
            change(plan)
            path.write_text(yaml.safe_dump(plan))
        return ["study_amort", "-o", "study", "--jobs", "1"]

    return make


def _climbing_recipe(plan: dict[str, Any]) -> None:
    plan["recipes"] = {"../../climbed": {"encoder": "vlt"}}


def _listed_elsewhere(folder: Path) -> list[str]:
    """An earlier report that says a file outside of its folder is its own, to be replaced."""
    (folder / "out").mkdir()
    (folder / "keep.pkl").write_text("mine")
    listed = {"files": ["../keep.pkl", "report.html", str(folder / "keep.pkl")]}
    (folder / "out/amortization.json").write_text(json.dumps(listed))
    return _EVALUATE


def _checksum_elsewhere(folder: Path) -> list[str]:
    line = f"{'0' * 64}  ../../../../etc/passwd\n"
    (folder / "net/checksums.sha256").write_text(line)
    return _EVALUATE


def _markup(folder: Path) -> list[str]:
    """Labels and a particle file whose names are HTML."""
    script = f"<script>alert('{_OWNED}')</script>"
    names = np.array([script, "<img src=x onerror=alert(1)>", "b"])[np.arange(40) % 3]
    (folder / "in/labels.pkl").write_bytes(pickle.dumps(names))
    moved = folder / f"in/{script.replace('/', '_')}.mrcs"
    shutil.copyfile(folder / "in/particles.mrcs", moved)
    config = yaml.safe_load((folder / "net/config.yaml").read_text())
    config["dataset_args"]["particles"] = config["amort"]["settings"]["particles"] = str(moved)
    (folder / "net/config.yaml").write_text(yaml.safe_dump(config))
    (folder / "net/checksums.sha256").unlink()
    (folder / "net").rename(folder / "<b>net")
    return ["eval_amort", "<b>net", *_EVALUATE[2:], "--labels", "in/labels.pkl"]


def _mrc(**fields: int) -> Callable[[Path], list[str]]:
    """A stack whose header lies about its size, or its symmetry records."""

    def make(folder: Path) -> list[str]:
        path = folder / "in/particles.mrcs"
        data = bytearray(path.read_bytes())
        for name, value in fields.items():
            at = {"nx": 0, "ny": 4, "nz": 8, "mode": 12, "next": 92}[name]
            data[at : at + 4] = struct.pack("<i", value)
        path.write_bytes(data)
        return _TRAIN

    return make


def _star(name: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        path = folder / "in/particles.star"
        path.write_text(path.read_text().replace("particles.mrcs", name))
        return [*_TRAIN[:1], "in/particles.star", *_TRAIN[2:]]

    return make


def _object_cs(folder: Path) -> list[str]:
    with open(folder / "in/particles.cs", "wb") as handle:
        np.save(handle, _object_array(), allow_pickle=True)
    return [*_TRAIN[:1], "in/particles.cs", *_TRAIN[2:]]


def _endless_list(folder: Path) -> list[str]:
    (folder / "in/list.txt").write_text("list.txt\n" * 3)
    return [*_TRAIN[:1], "in/list.txt", *_TRAIN[2:]]


def _part(folder: Path) -> list[str]:
    """A part of fits whose arrays are objects."""
    for path in (folder / "fitted/.posteriors").glob("*.npz"):
        names = np.load(path).files
        np.savez(path, **{name: _object_array() for name in names})
    return ["infer_amort", "vlt", "--start", "mean", "--steps", "3", "--batch-size", "10", "-o",
            "fitted"]  # fmt: skip


def _digits_bomb(folder: Path) -> list[str]:
    for path in (folder / "in/digits").glob("*labels*"):
        path.write_bytes(gzip.compress(bytes(1 << 28)))
    return ["mnist_amort", "--data", "in/digits", "-n", "1", "-o", "out"]


def _pipe(folder: Path) -> list[str]:
    """A named pipe, from which nothing ever comes."""
    (folder / "in/poses.pkl").unlink()
    os.mkfifo(folder / "in/poses.pkl")
    return _TRAIN


def _endless_file(folder: Path) -> list[str]:
    (folder / "net/checksums.sha256").unlink()
    (folder / "net/weights.2.pkl").unlink()
    (folder / "net/weights.2.pkl").symlink_to("/dev/zero")
    return _EVALUATE


def _command_in_a_name(folder: Path) -> list[str]:
    """A run whose inputs have commands for names."""
    path = folder / "net/config.yaml"
    text = path.read_text().replace("particles.mrcs", f"$(touch {_OWNED}).mrcs")
    path.write_text(text)
    (folder / "net/checksums.sha256").unlink()
    return _EVALUATE


def _resume(folder: Path) -> list[str]:
    """A run stopped within an epoch, with random states that are none."""
    path = folder / "stopped/.interrupted.pkl"
    kept = torch.load(path, weights_only=True)
    kept["amort"]["random"]["torch"] = torch.zeros(3)
    kept["amort"]["part"]["sums"] = "none"
    torch.save(kept, path)
    (folder / "stopped/checksums.sha256").unlink()
    return ["train_amort", *PARTICLES, *NET, "-n", "3", "--holdout", "0.2", "--load", "latest",
            "-o", "stopped"]  # fmt: skip


_TABLE = ["train_amort", *PARTICLES, "--encoder", "vlt", *SMALL, "-n", "1", "-o", "out",
          "--table-init", "net"]  # fmt: skip

HOSTILE = (
    Hostile("poses that run a command", _replaced("--poses", _shell())),
    Hostile("CTFs that evaluate Python",
            _replaced("--ctf", _Call(eval, f"open('{_OWNED}', 'w').close()"))),
    Hostile("a selection that writes a file", _replaced("--ind", _Call(open, _OWNED, "w"))),
    Hostile("held-out particles that import", _replaced("--holdout", _Call(__import__, "this"))),
    Hostile("labels that start a process",
            _replaced("--labels", _Call(__import__("subprocess").call, ["touch", _OWNED]))),
    Hostile("an array of objects that run commands", _replaced("--labels", _object_array())),
    Hostile("a call hidden in an array's state", _replaced("--coordinate", _hidden())),
    Hostile("a tensor whose data run a command", _replaced("--coordinate", _storage())),
    Hostile("a tensor without end", _replaced("--coordinate", _endless_tensor())),
    Hostile("a list that unfolds to 10^12 numbers", _replaced("--ind", _nested(11, 10))),
    Hostile("a list that holds itself", _replaced("--labels", _cycle())),
    Hostile("a pickle nested 200,000 deep", _replaced("--poses", _deep())),
    Hostile("a pickle of four billion objects", _replaced("--ctf", _huge_memo())),
    Hostile("a pickle of 2^60 bytes", _replaced("--ctf", _huge_bytes())),
    Hostile("a latents file that runs a command", _in_run("z.2.pkl", _second())),
    Hostile("latents for a table", _in_run("z.pkl", pickle.dumps(_shell()), then=_TABLE)),
    Hostile("weights that run a command", _in_run("weights.2.pkl", _malicious_zip)),
    Hostile("weights of old that run a command", _in_run("weights.2.pkl", _legacy)),
    Hostile("weights that are a zip bomb", _in_run("weights.2.pkl", _zip_bomb)),
    Hostile("weights without end", _in_run("weights.2.pkl", _checkpoint(
        optimizer_state_dict={"x": torch.zeros(1).expand(1 << 40)}))),
    Hostile("weights that are no tensors", _in_run("weights.2.pkl", _checkpoint(
        model_state_dict={"encoder.main.0.weight": "x", 3: None}))),
    Hostile("weights from /dev/zero", _endless_file),
    Hostile("poses from a pipe", _pipe),
    Hostile("random states that are none", _resume),
    Hostile("a config with a Python tag", _in_run("config.yaml", _yaml(_TAG))),
    Hostile("a config of a billion laughs", _in_run("config.yaml", _yaml(_LAUGHS))),
    Hostile("a config nested 5,000 deep", _in_run("config.yaml", _yaml("x: " + "[" * 5000 + "\n"))),
    Hostile("a config with a command for a file name", _command_in_a_name),
    Hostile("a plan with a Python tag", _plan(_TAG)),
    Hostile("a plan of a billion laughs", _plan(_LAUGHS)),
    Hostile("a plan whose recipe climbs", _plan(_climbing_recipe)),
    Hostile("a simulation with a Python tag", lambda folder: [
        (folder / "sim/checksums.sha256").unlink(),
        _yaml(_TAG)(folder / "sim/simulation.yaml"),
        ["eval_amort", "simulated", *_EVALUATE[2:], "--truth", "sim"]][-1]),
    Hostile("a .cs of objects", _object_cs),
    Hostile("a .star that climbs", _star("../../../../etc/passwd")),
    Hostile("a .star with a command", _star(f"|touch${{IFS}}{_OWNED}")),
    Hostile("a list of files that holds itself", _endless_list),
    Hostile("a stack of 2^31 images", _mrc(nz=2**31 - 1)),
    Hostile("a stack of images of 2^31 px", _mrc(nx=2**31 - 1, ny=2**31 - 1)),
    Hostile("a stack of negative size", _mrc(nz=-5, next=-1)),
    Hostile("digits that are a gzip bomb", _digits_bomb),
    Hostile("fits of objects that run commands", _part, harmless=True),
    Hostile("a report that claims files elsewhere", _listed_elsewhere, harmless=True),
    Hostile("checksums of files elsewhere", _checksum_elsewhere, harmless=True),
    Hostile("names that are HTML", _markup, harmless=True),
)  # fmt: skip


def attack(name: str, stage: Path, seeds: range, work: Path) -> tuple[Counter[str], list[Finding]]:
    """Let a command meet the hostile file of that name.

    Returns
    -------
    counts
        Of "refused": one line, exit code 2; "harmless": done without harm; "executed": what it
        was made for has happened; and of faults.
    findings
        What went wrong.
    """
    hostile = next(h for h in HOSTILE if h.name == name)
    folder = work / f"hostile.{hostile.name.replace(' ', '_').replace('/', '_')}.{seeds.start}"
    shutil.copytree(stage, folder)
    argv = hostile.make(folder)
    around = {p.name for p in work.iterdir()}
    found = run(argv, folder, limit=_LIMIT)
    harm = _harm(folder) or bool({"climbed", _OWNED} & ({p.name for p in work.iterdir()} - around))
    counts: Counter[str] = Counter()
    findings = []
    fault = found.fault
    if harm:
        fault = "executed"
    elif fault is None and found.code != (0 if hostile.harmless else 2):
        fault = f"exit {found.code}"
    if fault is None:
        counts["harmless" if hostile.harmless else "refused"] += 1
    else:
        counts[fault.partition(" ")[0]] += 1
        findings.append(Finding(hostile.name, fault, found.said[-1500:]))
    shutil.rmtree(folder)
    return counts, findings


def _harm(folder: Path) -> bool:
    """Tell whether code was run, a file elsewhere was touched, or a page holds what would run."""
    kept = folder / "keep.pkl"
    pages = [p.read_text(errors="replace") for p in folder.glob("out/*.html")]
    return (
        bool(list(folder.rglob(_OWNED)))
        or (kept.exists() and kept.read_text() != "mine")
        or any("<script>alert" in page or "<img src=x" in page for page in pages)
    )
