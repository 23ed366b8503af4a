"""Run every command of README.md and docs/, in a folder that has the files that it names.

They are those of a small simulation, and trainings are short: ``CHANGES`` has all that is changed
in a command. What is not run is in ``NOT_RUN``, with the reason.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from .commands import MANUAL, ROOT, Command, commands

CHANGES = (  # pattern -> what stands in its place
    (r"-n (100|50)(?= .*-o (more-)?turns)|-n 50(?= -o more-turns)", "-n 4 --anchors 4"),
    (r"-n 50\b", "-n 2"),
    (r"\bnew 50\b", "new 3"),  # of vlt, which has gone on
    (r"\bamort\.50\b", "amort.2"),
    (r"-n 2(?= .*--load latest)", "-n 3"),
    (r"ind_stable", "ind_unstable"),  # after two epochs none is stable
    (r"-n 2000 --heldout 400", "-n 100 --heldout 20 --overwrite"),  # it is there: `prepare`
    (r"--nproc-per-node 4", "--nproc-per-node 2"),
    (r"--ntilts 10", "--ntilts 3"),
    (r"--preset demo", "--preset small.yaml"),
    (r"(study_amort particles.*)", r"\1 --dry-run"),  # the paper's settings take days
    (r"(train_amort particles\.128\.mrcs)(?!.*--encoder)", r"\1 --enc-dim 16"),
    (r"(train_amort particles\.128\.mrcs)", r"\1 --holdout held.pkl --dec-dim 16 --seed 0"),
    (r"--encoder anchored -o", "--encoder anchored -n 2 --enc-dim 16 --anchors 4 -o"),
    (r"(eval_amort \S+)", r"\1 --bootstrap 10 --volumes 3 --fit 4 --no-umap --labelled 2"),
    (r"(infer_amort)(?!.*--steps)", r"\1 --steps 10"),
    (r"(time_amort.*)", r"\1 --rounds 1 --batches 2"),
    (r"pip install examples/(\S+)", rf"pip install --no-deps -q -t site {ROOT}/examples/\1"),
)
NOT_RUN = {
    "bash tests/run.sh": "is the other test command",
    "pip install .": "done by the environment that this runs in",
}
SMALL_STUDY = """\
data: {simulate: {n: 40, heldout: 4, D: 16}}
train: {zdim: 2, num-epochs: 1, dec-layers: 1, dec-dim: 16}
evaluate: {transform: ["roll:1"], bootstrap: 5, volumes: 3, labelled: 2, no-umap: true, fit: 2}
recipes: {baseline: {enc-dim: 16}, vlt: {}}
"""
FLAGS = "--poses pose.pkl --ctf ctf.pkl --zdim 8 --dec-dim 16 -n 2 --no-analysis --enc-dim 16"


def prepare(folder: Path) -> None:
    """Make the files that the documents name."""

    def run(line: str) -> None:
        done = subprocess.run(line.split(), cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{line}\n{done.stdout}{done.stderr}")

    run("cryodrgn simulate_amort -o data -n 100 --heldout 20 -D 32 --snr 0.3")
    run("cryodrgn simulate_amort -o tilts -n 20 -D 32 --tilts 4")
    tilt = folder / "tilt"
    tilt.mkdir()
    for source, where in ((folder / "data", folder), (folder / "tilts", tilt)):
        for name, other in (("poses.pkl", "pose.pkl"), ("ctf.pkl", "ctf.pkl")):
            shutil.copy(source / name, where / other)
    shutil.copy(folder / "tilts/particles.star", tilt)
    shutil.move(folder / "tilts", tilt / "particles")
    (folder / "moved").mkdir()
    for name in ("particles.mrcs", "particles.128.mrcs", "moved/particles.mrcs", "new.mrcs"):
        shutil.copy(folder / "data/particles.mrcs", folder / name)
    for name, other in (
        ("pose.pkl", "new_pose.pkl"), ("ctf.pkl", "new_ctf.pkl"), ("data/labels.pkl", "labels.pkl"),
        ("data/coordinate.pkl", "angle.pkl"), ("data/ind_heldout.pkl", "held.pkl"),
    ):  # fmt: skip
        shutil.copy(folder / name, folder / other)
    for name, part in (("a", "class0_t0.50"), ("b", "class1_t0.50")):
        shutil.copy(folder / f"data/volumes/{part}.mrc", folder / f"{name}.mrc")
    (folder / "small.yaml").write_text(SMALL_STUDY)
    _write_digits(folder / "FOLDER")
    images = "".join(f"{i + 1}@particles.mrcs {i}\n" for i in range(120))
    (folder / "run_data.star").write_text(
        "data_particles\n\nloop_\n_rlnImageName #1\n_rlnClassNumber #2\n" + images
    )
    with open(folder / "J42_particles.cs", "wb") as handle:
        np.save(handle, np.zeros(120, [("uid", "<u8"), ("blob/idx", "<u4")]))
    for name, more in (("baseline-seed1", "--seed 1"), ("twin", "--encoder twin --seed 0")):
        run(f"cryodrgn train_amort particles.mrcs --holdout held.pkl {more} {FLAGS} -o {name}")
    with open(folder / "held.pkl", "rb") as handle:
        held = pickle.load(handle)
    with open(folder / "kept.pkl", "wb") as handle:
        pickle.dump(np.setdiff1d(np.arange(120), held), handle)
    run(f"cryodrgn train_vae particles.mrcs {FLAGS} -o old-run")


def _write_digits(folder: Path) -> None:
    """Write a few digits of scikit-learn as MNIST's four files."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.kron(digits.images, np.ones((3, 3)))  # 24 of 28 px
    images = np.pad(images * 15, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    folder.mkdir()
    for part, rows in (("train", slice(400)), ("t10k", slice(400, 500))):
        for name, values in (("images-idx3", images), ("labels-idx1", digits.target)):
            chosen = values[rows].astype(np.uint8)
            head = struct.pack(f">{1 + chosen.ndim}I", 0x800 + chosen.ndim, *chosen.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(head + chosen.tobytes())


def changed(command: Command) -> str:
    """Return the command line that is run."""
    text = command.text
    for pattern, other in CHANGES:
        text = re.sub(pattern, other, text)
    return text


def run(command: Command, folder: Path) -> tuple[str, float, str]:
    """Run a command; returns what came of it, the seconds, and the end of what it said."""
    text = changed(command)
    words = text.split()
    if "--encode-mode tilt" in text:
        folder = folder / "tilt"
    if text.startswith("bash "):
        small = "QUICKSTART_PARTICLES=100 QUICKSTART_EPOCHS=2"
        text = f"{small} bash {ROOT}/{words[1]} {folder / 'quickstart'}"
    started = time.monotonic()
    done = subprocess.run(text, shell=True, cwd=folder, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip().splitlines()[-12:]
    return str(done.returncode), time.monotonic() - started, "\n".join([text, *said])


def main() -> None:
    """Run them, and print a table."""
    failed = []
    print("| command | exit code | seconds |\n|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="documents") as name:
        prepare(Path(name))
        for command in (command for page in MANUAL for command in commands(page)):
            if command.text.startswith("bash tests/") and command.text not in NOT_RUN:
                code, took, said = "another suite", 0.0, ""
            elif reason := NOT_RUN.get(command.text):
                code, took, said = reason, 0.0, ""
            else:
                code, took, said = run(command, Path(name))
                if code != "0":
                    failed.append(said)
            print(f"| `{command.text}` | {code} | {took:.0f} |", flush=True)
    notebook = ROOT / "examples/amortization.ipynb"
    if notebook.is_file():
        with tempfile.TemporaryDirectory() as name:
            started = time.monotonic()
            copy = shutil.copy(notebook, name)  # it is executed where it is
            argv = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute",
                    "--output", "executed", copy]  # fmt: skip
            done = subprocess.run(argv, capture_output=True, text=True, cwd=name, env=os.environ)
            took = time.monotonic() - started
            print(f"| `examples/amortization.ipynb` | {done.returncode} | {took:.0f} |")
            if done.returncode:
                failed.append(done.stderr[-3000:])
    print("\n\n".join(["", *failed]))
    print(f"{len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
