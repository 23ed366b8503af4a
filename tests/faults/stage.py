"""Small runs of every kind, to be damaged."""

from __future__ import annotations

import gzip
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from helpers import write_pickle, write_stack

from faults.trials import digest, run

SMALL = ["--dec-dim", "8", "--dec-layers", "1", "--seed", "1", "--no-analysis", "-b", "8"]
NET = [*SMALL, "--enc-dim", "8", "--enc-layers", "1"]
TURNS = [*NET, "--encoder", "alternate", "--anchors", "3", "--checkpoint", "1"]
PARTICLES = ["in/particles.mrcs", "--poses", "in/poses.pkl", "--ctf", "in/ctf.pkl", "--zdim", "2"]
EVALUATE = ["--bootstrap", "5", "--volumes", "2", "--labelled", "2", "--fit", "2", "--no-umap",
            "--maps", "0"]  # fmt: skip
STUDY = {
    "data": {"simulate": {"n": 24, "heldout": 4, "D": 16, "seed": 0}},
    "seeds": [0],
    "train": {
        "zdim": 2, "num-epochs": 2, "dec-layers": 1, "dec-dim": 8, "batch-size": 8,
        "checkpoint": 1,
    },
    "evaluate": {
        "transform": ["roll:1"], "bootstrap": 5, "volumes": 2, "labelled": 2, "no-umap": True,
        "fit": 2,
    },
    "recipes": {"baseline": {"enc-dim": 8, "enc-layers": 1}, "vlt": {}},
}  # fmt: skip


VALIDATE = ["validate_amort", "asked", "--sample", "20", "--bootstrap", "20", "--maps", "2",
            "--jobs", "1", "-o"]  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """A command, and the files that it reads.

    Attributes
    ----------
    argv
        Of ``cryodrgn_amort``, in the stage's folder.
    reads
        Patterns of the files to damage.
    gives
        Folder of its results.
    vouched
        Whether what is read was written by us: a change must not go unnoticed.
    """

    name: str
    argv: list[str]
    reads: tuple[str, ...]
    gives: str
    vouched: bool = True

    @property
    def slow(self) -> bool:
        """Whether it is left out of a quick trial."""
        return self.argv[0] in ("eval_amort", "mnist_amort", "study_amort", "validate_amort")


def _idx(values: np.ndarray) -> bytes:
    shape = values.shape
    return struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape) + values.tobytes()


def _write_inputs(folder: Path) -> None:
    import pandas as pd
    import starfile
    from cryodrgn.mrcfile import write_mrc

    made = write_stack(folder, 40)
    rng = np.random.default_rng(0)
    write_pickle(folder / "ind.pkl", np.arange(36))
    write_pickle(folder / "held.pkl", np.arange(4))
    write_pickle(folder / "labels.pkl", np.arange(40) % 3)
    write_pickle(folder / "coordinate.pkl", rng.uniform(size=40))
    write_mrc(str(folder / "volume.mrc"), np.float32(rng.uniform(size=(16, 16, 16))))
    write_mrc(str(folder / "part1.mrcs"), made.images[:25])
    write_mrc(str(folder / "part2.mrcs"), made.images[25:])
    (folder / "list.txt").write_text("part1.mrcs\npart2.mrcs\n")
    names = [f"{i + 1:06d}@particles.mrcs" for i in range(40)]
    starfile.write(pd.DataFrame({"rlnImageName": names}), folder / "particles.star")
    table = np.zeros(40, [("blob/path", "S40"), ("blob/idx", "<u4"), ("blob/shape", "<u4", (2,))])
    table["blob/path"], table["blob/idx"] = b"particles.mrcs", np.arange(40)
    table["blob/shape"] = 16
    with open(folder / "particles.cs", "wb") as handle:
        np.save(handle, table)
    (folder / "noise.txt").write_text("".join(f"{4 - shell / 3:.3f}\n" for shell in range(8)))
    _write_model(folder / "model.cif")
    digits = folder / "digits"
    digits.mkdir()
    for part, n in (("train", 40), ("t10k", 40)):
        images = rng.integers(0, 255, (n, 28, 28)).astype(np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        (digits / f"{part}-images-idx3-ubyte").write_bytes(_idx(images))
        (digits / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(_idx(labels)))


def _train(source: str, *more: str, out: str = "out") -> list[str]:
    return ["train_amort", source, *PARTICLES[1:], "-n", "1", *NET, *more, "-o", out]


_MNIST = ["mnist_amort", "--data", "in/digits", "--methods", "vae", "vlt", "-n", "2", "-b", "10",
          "--fit", "2", "--bootstrap", "5", "-o", "mnist"]  # fmt: skip

SCENES = (
    Scene("particles", _train("in/particles.mrcs"), ("in/particles.mrcs",), "out", vouched=False),
    Scene("poses, CTF, selections",
          _train("in/particles.mrcs", "--ind", "in/ind.pkl", "--holdout", "in/held.pkl"),
          ("in/poses.pkl", "in/ctf.pkl", "in/ind.pkl", "in/held.pkl"), "out", vouched=False),
    Scene(".star", _train("in/particles.star"), ("in/particles.star",), "out", vouched=False),
    Scene(".cs", _train("in/particles.cs"), ("in/particles.cs",), "out", vouched=False),
    Scene(".txt", _train("in/list.txt"), ("in/list.txt", "in/part?.mrcs"), "out", vouched=False),
    Scene("volume", ["simulate_amort", "-n", "12", "-D", "16", "--volumes", "in/volume.mrc",
                     "--poses", "in/poses.pkl", "-o", "out"],
          ("in/volume.mrc", "in/poses.pkl"), "out", vouched=False),
    Scene("labels", ["eval_amort", "net", "--transform", *EVALUATE, "--labels", "in/labels.pkl",
                     "--coordinate", "in/coordinate.pkl", "-o", "out"],
          ("in/labels.pkl", "in/coordinate.pkl"), "out", vouched=False),
    Scene("digits", _MNIST, ("in/digits/*",), "mnist", vouched=False),
    Scene("a table goes on", ["train_amort", *PARTICLES, "--encoder", "vlt", *SMALL, "-n", "3",
                              "--load", "latest", "-o", "vlt"], ("vlt/*",), "vlt"),
    Scene("a network goes on within an epoch",
          ["train_amort", *PARTICLES, *NET, "-n", "3", "--holdout", "0.2", "--load", "latest",
           "-o", "stopped"], ("stopped/*", "stopped/.interrupted.pkl"), "stopped"),
    Scene("second stage", ["train_amort", "--from", "vlt", "--encoder", "anchored", "--anchors",
                           "3", "--enc-dim", "8", "--enc-layers", "1", "-n", "1", "--seed", "1",
                           "--no-analysis", "-o", "out"], ("vlt/*",), "out"),
    Scene("turns go on", ["train_amort", *PARTICLES, *TURNS, "--holdout", "0.2", "-n", "4",
                          "--load", "latest", "-o", "turns"],
          ("turns/*", "turns/.interrupted.pkl"), "turns"),
    Scene("atoms", ["simulate_amort", "-n", "12", "-D", "16", "--atoms", "in/model.cif", "--turn",
                    "B:10", "--noise-spectrum", "in/noise.txt", "-o", "out"],
          ("in/model.cif", "in/noise.txt"), "out", vouched=False),
    Scene("evaluation", ["eval_amort", "net", "--transform", "roll:1", *EVALUATE, "-o", "out"],
          ("net/*",), "out"),
    Scene("truth", ["eval_amort", "simulated", "--transform", *EVALUATE, "--truth", "sim", "-o",
                    "out"], ("sim/*", "sim/volumes/*"), "out"),
    Scene("comparison", ["compare_amort", "net", "stopped", "-o", "out"], ("net/*",), "out"),
    Scene("fits go on", ["infer_amort", "vlt", "--start", "mean", "--steps", "3", "--batch-size",
                         "10", "-o", "fitted"], ("fitted/.posteriors/*",), "fitted"),
    Scene("study", ["study_amort", "-o", "study", "--jobs", "1"],
          ("study/plan.yaml", "study/steps/*", "study/evals/*/*", "study/runs/*/*",
           "study/compare/*/*"), "study"),
    Scene("validation", [*VALIDATE, "valid"],
          ("valid/validation.yaml", "valid/halves/*", "valid/parts/*", "valid/steps/*",
           "valid/runs/*/*"), "valid"),
    Scene("digits go on", _MNIST, ("mnist/runs/*/*",), "mnist"),
)  # fmt: skip
"""Every command that reads files, and files of every kind that we read."""


def _write_model(path: Path) -> None:
    """Write two chains of carbon atoms, the second where the first one ends."""
    import gemmi

    structure, model = gemmi.Structure(), gemmi.Model(1)
    for name, start in (("A", 0), ("B", 6)):
        chain = gemmi.Chain(name)
        for number in range(6):
            residue, atom = gemmi.Residue(), gemmi.Atom()
            residue.name, residue.seqid = "ALA", gemmi.SeqId(number + 1, " ")
            atom.name, atom.element = "CA", gemmi.Element("C")
            at = start + number
            atom.pos, atom.b_iso = gemmi.Position(3.0 * at, 2.0 * at, at % 2), 30.0
            residue.add_atom(atom)
            chain.add_residue(residue)
        model.add_chain(chain)
    structure.add_model(model)
    structure.make_mmcif_document().write_file(str(path))


def build(folder: Path, *, quick: bool) -> None:
    """Make what the scenes read; ``quick``: no study, and no digits that were trained.

    Raises
    ------
    RuntimeError
        If a command fails.
    """

    def made(*argv: str, **more: float) -> None:
        found = run(list(argv), folder, limit=600, **more)
        if found.code and not more:
            raise RuntimeError(f"{' '.join(argv)}: {found.said}")

    _write_inputs(folder / "in")
    made("train_amort", *PARTICLES, "--encoder", "vlt", *SMALL, "-n", "2", "-o", "vlt")
    made("train_amort", *PARTICLES, *NET, "-n", "2", "--holdout", "0.2", "-o", "net")
    stopped = ["train_amort", *PARTICLES, *NET, "--holdout", "0.2", "-o", "stopped"]
    made(*stopped, "-n", "2")
    _stop_within_an_epoch(folder, [*stopped, "-n", "3", "--load", "latest"], 2)
    turns = ["train_amort", *PARTICLES, *TURNS, "--holdout", "0.2", "-o", "turns", "-n", "4"]
    _stop_within_an_epoch(folder, turns, 6)
    made("simulate_amort", "-n", "24", "-D", "16", "--seed", "0", "-o", "sim")
    made("train_amort", "sim/particles.mrcs", "--poses", "sim/poses.pkl", "--ctf", "sim/ctf.pkl",
         "--zdim", "2", *NET, "-n", "1", "-o", "simulated")  # fmt: skip
    if not quick:
        made("simulate_amort", "-n", "60", "-D", "16", "--seed", "1", "-o", "many")
        made("train_amort", "many/particles.mrcs", "--poses", "many/poses.pkl", "--ctf",
             "many/ctf.pkl", "--zdim", "2", "--encoder", "vlt", *SMALL, "-n", "2", "--checkpoint",
             "1", "-o", "asked")  # fmt: skip
    (folder / "study").mkdir()
    (folder / "study/plan.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    _interrupt_fits(folder)
    if not quick:
        made("study_amort", "-o", "study", "--jobs", "1")
        made(*_MNIST)
        made(*VALIDATE, "valid")


def _stop_within_an_epoch(folder: Path, argv: list[str], after: int) -> None:
    """Stop a training by SIGTERM, so many steps after it has begun or goes on."""
    child = os.fork()
    if not child:
        import signal

        from cryodrgn_amort.training import stepper as training

        step, count = training.train_step, iter(range(100))

        def stopped(*args: object, **kwargs: object) -> object:
            if next(count) == after:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args, **kwargs)

        training.train_step = stopped
        found = run(argv, folder)
        os._exit(0 if found.code == 128 + signal.SIGTERM else 1)
    out = argv[argv.index("-o") + 1]
    if os.waitpid(child, 0)[1] or not (folder / out / ".interrupted.pkl").exists():
        raise RuntimeError(f"{out}: was not stopped")


def _interrupt_fits(folder: Path) -> None:
    """Leave the parts of fits as a kill does, by a writer of the result that fails."""
    child = os.fork()
    if not child:
        from cryodrgn_amort.inference import posteriors

        posteriors._Inference.collect = None
        run(["infer_amort", "vlt", "--start", "mean", "--steps", "3", "--batch-size", "10", "-o",
             "fitted"], folder)  # fmt: skip
        os._exit(0)
    os.waitpid(child, 0)
    if not list((folder / "fitted/.posteriors").glob("*.npz")):
        raise RuntimeError("fitted: no parts")


def reference(scene: Scene, folder: Path) -> tuple[dict[str, str], float]:
    """Run a scene in an undamaged copy of the stage: its results, and seconds."""
    found = run(scene.argv, folder, limit=600)
    if found.code:
        raise RuntimeError(f"{scene.name}: {found.said}")
    return digest(folder / scene.gives, folder), found.seconds
