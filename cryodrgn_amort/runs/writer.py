"""The folder of a run while it is trained: checkpoints, metrics, a run that is to be replaced."""

from __future__ import annotations

import csv
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.core import (
    CHECKSUMS,
    INTERRUPTED,
    OWN_KEY,
    InputError,
    check_intact,
    epochs,
    forget,
    is_recorded,
    read_table,
    read_weights,
    read_yaml,
    recorded,
    replacing,
)
from cryodrgn_amort.runs.config import HOLDOUT, TRAINED

if TYPE_CHECKING:
    from pathlib import Path


__all__ = ["METRICS", "NOISE", "RunFolder"]

METRICS, NOISE = "metrics.csv", "noise.json"
_FILES = (
    "z.pkl", "weights.pkl", "pose.pkl", METRICS, NOISE, "run.log", HOLDOUT, TRAINED, INTERRUPTED,
    CHECKSUMS, "config.yaml",
)  # fmt: skip


class RunFolder:
    """A folder that a run is trained into.

    A run that is replaced, and epochs that are trained again, wait in ``replaced`` until there is a
    new checkpoint; without one they come back.

    Attributes
    ----------
    path
        The folder; it need not be there yet.
    skipped
        Why checkpoints were passed over by ``latest``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replaced = path / ".replaced"
        self.skipped: list[str] = []
        self._rows: list[dict[str, Any]] = []

    def present(self, after: int = -1) -> list[Path]:
        """Return the files of a run in the folder; of epochs after ``after`` only, if given.

        The config is last: where it is, the rest is (see ``put_back``).
        """
        found = []
        for path in self.path.glob("*.pkl"):
            match = re.fullmatch(r"(?:weights|z|pose)\.(\d+)\.pkl", path.name)
            if match and int(match[1]) > after:
                found.append(path)
        found += [] if after >= 0 else [self.path / name for name in _FILES]
        return [path for path in found if path.exists()]

    def foreign(self) -> list[Path]:
        """Return files that a run would replace, in a folder that has no run."""
        found = self.present()
        of_run = any(p.name == "config.yaml" or p.name.startswith("weights") for p in found)
        return [] if of_run or self.replaced.exists() else found

    @property
    def is_bare(self) -> bool:
        """Whether all that is there is what a training of ours left that made no checkpoint."""
        names = {path.name for path in self.present()}
        if self.replaced.exists() or any(n.startswith(("weights", INTERRUPTED)) for n in names):
            return False
        try:
            return OWN_KEY in read_yaml(self.path / "config.yaml", "-o")
        except (InputError, TypeError):
            return False

    @property
    def is_orphaned(self) -> bool:
        """Whether its run was moved aside by a training that was killed before a checkpoint."""
        return self.replaced.is_dir() and not epochs(self.path)

    def make_room(self, *, overwrite: bool, after: int) -> None:
        """Move aside the whole run, or what comes after an epoch (0: nothing)."""
        if (self.replaced / "config.yaml").exists() and epochs(self.path):
            shutil.rmtree(self.replaced)  # killed just after the first checkpoint
        self.put_back()  # or before it
        if self.is_bare:
            for path in self.present():
                path.unlink()
        stale = self.present() if overwrite else []
        if after and not overwrite:  # later epochs will be trained again
            stale = self.present(after)
        if stale:
            self.replaced.mkdir()
            for path in stale:
                os.replace(path, self.replaced / path.name)

    def put_back(self) -> None:
        """Undo ``make_room``, unless there is a new checkpoint."""
        if not self.replaced.is_dir():
            return
        config_first = sorted(self.replaced.iterdir(), key=lambda p: p.name != "config.yaml")
        for path in config_first:
            os.replace(path, self.path / path.name)
        self.replaced.rmdir()

    def drop_replaced(self) -> None:
        """Remove what waits: there is a new checkpoint."""
        shutil.rmtree(self.replaced, ignore_errors=True)

    def drop_after(self, epoch: int) -> None:
        """Remove the checkpoints of later epochs."""
        for path in self.present(epoch):
            forget(self.path, path.name)
            path.unlink()

    def latest(self) -> tuple[str, dict[str, Any]]:
        """Read the newest checkpoint that is whole; returns its path, too.

        Raises
        ------
        InputError
            If there is none.
        """
        known = epochs(self.path)
        stopped = self.path / INTERRUPTED
        candidates = [self.path / f"weights.{epoch}.pkl" for epoch in reversed(known)]
        candidates = [stopped, *candidates] if stopped.is_file() else candidates
        for path in candidates:
            try:
                checkpoint = read_weights(path, "--load latest")
                for kind in () if path == stopped else ("z", "pose"):
                    file = self.path / f"{kind}.{checkpoint['epoch']}.pkl"
                    if kind == "z" or file.exists():
                        check_intact(file, "--load latest")
            except InputError as err:
                self.skipped.append(str(err).removeprefix("--load latest "))
                continue
            if path != stopped or checkpoint["epoch"] >= (known or [0])[-1]:
                return str(path), checkpoint
        none = f"--load latest: {self.path} has no checkpoint"
        raise InputError(f"{none} that is whole ({self.skipped[0]})" if self.skipped else none)

    def write_metrics(self, row: dict[str, float]) -> None:
        """Append to metrics.csv; epochs that are trained again replace their old rows.

        Its checksum is kept with the next checkpoint's.
        """
        self._rows = [r for r in self._rows if float(r["epoch"]) < row["epoch"]]
        self._rows.append(row)
        forget(self.path, METRICS)
        path = self.path / METRICS
        with (
            replacing(path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as handle,
        ):
            writer = csv.DictWriter(handle, list(row), extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(self._rows)

    def read_metrics(self) -> None:
        """Read what metrics.csv has of a run that goes on.

        Raises
        ------
        InputError
            If it is damaged.
        """
        path = self.path / METRICS
        rows = read_table(path, "-o") if path.exists() else []
        if any("epoch" not in row for row in rows):
            raise InputError(f"-o {path}: damaged (it has no column epoch)")
        self._rows = list(rows)

    def finish(self, epoch: int) -> None:
        """Put the final files, weights.pkl and so on, beside the last epoch's, which they equal."""
        kinds = [k for k in ("z", "pose", "weights") if (self.path / f"{k}.{epoch}.pkl").exists()]
        with recorded(self.path, *(f"{kind}.pkl" for kind in kinds)):
            for kind in kinds:
                with replacing(self.path / f"{kind}.pkl") as temporary:
                    shutil.copyfile(self.path / f"{kind}.{epoch}.pkl", temporary)

    def lacks_the_end_alone(self, load: str, last: int) -> bool:
        """Tell whether all that is missing is what ``finish`` does after epoch ``last``."""
        final = ("weights.pkl", "z.pkl")
        is_last = os.path.realpath(load) == os.path.realpath(self.path / f"weights.{last}.pkl")
        there = all((self.path / name).exists() for name in final)
        return is_last and not (there and is_recorded(self.path, *final))
