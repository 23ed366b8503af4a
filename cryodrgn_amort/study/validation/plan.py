"""What is done to validate a run: halves, nulls, fits, and what is asked of them, as steps."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from cryodrgn_amort.core import (
    InputError,
    default_device,
    device_name,
    digest,
    read_yaml,
    write_pickle,
    write_text,
)
from cryodrgn_amort.runs import (
    Run,
    load_run,
    settings_argv,
    settings_from_flags,
    trained_settings,
)
from cryodrgn_amort.study.progress import Progress
from cryodrgn_amort.study.snakefile import measured_seconds
from cryodrgn_amort.study.steps import Step, Work, parse
from cryodrgn_amort.study.validation.case import Case, other_half

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from cryodrgn_amort.core import Registry
    from cryodrgn_amort.options import TrainSettings, ValidateOptions


__all__ = ["OF_PARTICLES", "Validation"]

_ASKED = "validation.yaml"
_KEPT = ("quick", "nulls", "sample", "maps", "bootstrap", "seed")
_CHECKPOINTS = 10
OF_PARTICLES = ("misfits", "poses", "noise")
"""Parts that tell of single particles."""
_FEWEST = 50  # particles


@dataclass(frozen=True)
class Validation:
    """A run that is validated, and where.

    Attributes
    ----------
    parser
        Of ``train_amort``.
    """

    run: Run
    options: ValidateOptions
    plugins: Registry
    parser: argparse.ArgumentParser

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.options.outdir)

    @property
    def nulls(self) -> list[str]:
        """Names of the cases without heterogeneity."""
        return [] if self.options.quick else [f"null{k}" for k in range(self.options.nulls)]

    @property
    def halves(self) -> list[str]:
        """Names of the cases of the run's own particles."""
        return ["run"] if self.options.quick else ["half0", "half1"]

    def part(self, name: str, ending: str = "json") -> Path:
        """Return the file of a part's results."""
        return self.folder / "parts" / f"{name}.{ending}"

    def _ind(self, name: str) -> Path:
        return self.folder / "halves" / f"{name}.pkl"

    def _trained(self, name: str) -> Path:
        return self.folder / "runs" / name

    @cached_property
    def settings(self) -> TrainSettings:
        """What the run was trained with.

        Raises
        ------
        InputError
            If it is not known, or nothing of the kind can be trained again.
        """
        settings = trained_settings(self.run, self.parser)
        what = f"RUN {self.run.folder}"
        if settings.from_run:
            raise InputError(
                f"{what}: has the decoder of {settings.from_run}: validate that, or give --quick"
            )
        return replace(settings, num_epochs=self.run.epoch)

    def check(self) -> None:
        """Refuse what cannot be validated, before anything is written; raises as ``prepare``."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise InputError(f"-o {folder}: not a folder")
        names = (p.name for p in folder.iterdir()) if folder.is_dir() else ()
        there = any(not name.startswith(".") for name in names)  # ours, that keep others out
        if there and not (folder / _ASKED).is_file():
            raise InputError(f"-o {folder}: is not empty, and no validation")
        if self.run.n < _FEWEST:
            raise InputError(f"RUN {self.run.folder}: {self.run.n} particles are too few")
        if self.run.settings.tilted:
            raise InputError(f"RUN {self.run.folder}: of tilt series, which are not validated")
        if not self.options.quick:
            _ = self.settings
            if self.run.index is None:
                raise InputError(f"RUN {self.run.folder}: which particles it has is not known")

    def cost(self, work: Work) -> str:
        """Say what is still to be done costs, in epochs of the run, and in time where measured."""
        progress = Progress(work)
        left = [step for step in work.steps.values() if not progress.is_done(step)]
        trained = [step for step in left if step.argv[0] == "train_amort"]
        epochs = self.run.epoch * len(trained) / 2
        more = f"{len(left)} of {len(work.steps)} steps are to be done"
        if not trained:
            return f"{more}; nothing is trained"
        flags = parse(self.parser, trained[0].argv[1:])
        settings = settings_from_flags(flags, self.plugins)
        seconds = measured_seconds(settings, self.plugins) * len(trained)
        return (
            f"{more}: training as for {epochs:g} epochs of RUN, which takes about "
            f"{timedelta(seconds=round(seconds))} (h:mm:ss) one by one on "
            f"{device_name(default_device())}; then fits"
        )

    def prepare(self) -> None:
        """Make the folder, or find it as it was made by the same call.

        Raises
        ------
        InputError
            If it is someone else's, or the run cannot be validated.
        """
        known, asked = self.folder / _ASKED, self._asked()
        if known.is_file():
            found = read_yaml(known, "-o")
            for name, value in asked.items():
                if found.get(name) != value:
                    raise InputError(
                        f"-o {self.folder}: was made with {name}: {found.get(name)}, not {value}; "
                        "choose another folder"
                    )
            return
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.options.quick:
            self._write_halves()
        write_text(known, yaml.safe_dump(asked, sort_keys=False))

    def _asked(self) -> dict[str, object]:
        options = asdict(self.options)
        run = {
            "run": os.path.relpath(self.run.folder.resolve(), self.folder.resolve()),
            "epoch": self.run.epoch, "weights": digest(self.run.file("weights")),
        }  # fmt: skip
        return {**run, **{name: options[name] for name in _KEPT}}

    def _write_halves(self) -> None:
        """Write which particles are of which half: of the stack, and of the run's."""
        index = self.run.index
        assert index is not None
        mixed = np.random.default_rng(self.options.seed).permutation(len(index))
        (self.folder / "halves").mkdir(exist_ok=True)
        for k, rows in enumerate(np.array_split(mixed, 2)):
            write_pickle(self._ind(f"half{k}"), np.sort(index[rows]))
            write_pickle(self._ind(f"null{k}"), np.sort(rows))

    def case(self, name: str) -> Case:
        """Open a case: "run", "half0", "half1" (by the decoder of that half), "null0", ..."""
        seed = self.options.seed
        if name == "run":
            held = self.run.held_out()
            particles = self.run.particles() if held is None else held
            return Case(self.run, particles, own=held is None, seed=seed)
        run = load_run(self._trained(name), self.plugins)
        given: dict[str, Any] = {"ind": str(self._ind("null1")), "refined": None}
        if name in self.halves:  # with the poses that the half which has the particles refined
            other = other_half(name)
            given["ind"] = str(self._ind(other))
            theirs = load_run(self._trained(other), self.plugins)
            if theirs.refined_poses is not None:
                given["refined"] = str(theirs.refined_poses)
                given["refined_px"] = theirs.origin.poses_px
        return Case(run, run.open(**given, holdout=None), own=False, seed=seed)

    def trained(self, name: str) -> Run:
        """Open the run of a half or a null."""
        return load_run(self._trained(name), self.plugins)

    def work(self) -> Work:
        """Return all that is to be done."""
        steps = {step.name: step for step in self._steps()}
        parsers = {"train_amort": self.parser}
        return Work(self.folder, steps, self._argv(), parsers, self.plugins)

    def _argv(self) -> tuple[str, ...]:
        """Return the command that asks for the same."""
        options = self.options
        argv = ["validate_amort", options.run, "-o", str(self.folder)]
        for name in _KEPT:
            value, default = getattr(options, name), getattr(type(options), name)
            if value is True:
                argv.append(f"--{name}")
            elif value != default:
                argv += [f"--{name}", str(value)]
        return tuple(argv)

    def _steps(self) -> Iterator[Step]:
        cases = [*self.halves, *self.nulls]
        if not self.options.quick:
            for k in (0, 1):
                yield self._train(f"half{k}", {"ind": str(self._ind(f"half{k}"))}, (), k)
            for k, name in enumerate(self.nulls):
                yield self._simulate(name, k)
                yield self._train(name, self._of_null(name), (f"simulate.{name}",), k)
        for name in cases:
            after: tuple[str, ...] = () if name == "run" else (f"train.{name}",)
            if name in self.halves and not self.options.quick:
                after = ("train.half0", "train.half1")
            yield self._part(f"fit.{name}", after, "npz")
        fits = tuple(f"fit.{name}" for name in cases)
        yield self._part("poses", tuple(f"fit.{name}" for name in self.halves))
        yield self._part("misfits", fits)
        if not self.run.autodecoder:  # whose latents have no posteriors
            yield self._part("noise", ())
        if not self.options.quick:
            yield self._part("gain", fits)
            yield self._part("maps", ("fit.half0", "fit.half1"))
            yield self._part("epochs", ("fit.half0",))

    def _part(self, name: str, after: tuple[str, ...], ending: str = "json") -> Step:
        step, argv = f"part.{name}" if ending == "json" else name, (*self._argv(), "--part", name)
        outputs = [self.part(name, ending)]
        if name in OF_PARTICLES:
            outputs.append(self.part(name, "npz"))
        return Step(step, argv, after, tuple(outputs))

    def _train(
        self, name: str, given: dict[str, str | None], after: tuple[str, ...], k: int
    ) -> Step:
        settings, out = self.settings, self._trained(name)
        changed: dict[str, Any] = {
            "holdout": None, "do_analysis": False, "norm": None, "outdir": str(out),
            "checkpoint": max(1, settings.num_epochs // _CHECKPOINTS),
            "seed": self.options.seed + k, **given,
        }  # fmt: skip
        asked = replace(settings, **changed)
        argv = ("train_amort", *settings_argv(asked, self.parser))
        outputs = (out / "z.pkl", out / "weights.pkl")
        brought = self.plugins.bringing(("encoders", settings.encoder))
        return Step(f"train.{name}", argv, after, outputs, brought_by=brought)

    def _simulate(self, name: str, k: int) -> Step:
        out = self.folder / name
        argv = ("simulate_amort", "--like", self.options.run, "--homogeneous", "--seed",
                str(self.options.seed + k), "-o", str(out), "--overwrite")  # fmt: skip
        return Step(f"simulate.{name}", argv, (), (out / "simulation.yaml",))

    def _of_null(self, name: str) -> dict[str, str | None]:
        out = self.folder / name
        return {
            "particles": str(out / "particles.mrcs"), "poses": str(out / "poses.pkl"),
            "ctf": None if self.settings.ctf is None else str(out / "ctf.pkl"), "datadir": None,
            "ind": str(self._ind("null0")),
        }  # fmt: skip
