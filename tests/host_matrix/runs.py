"""The runs that the host is given: every recipe's, every encoder's, and its own to compare with."""

from __future__ import annotations

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from cryodrgn_amort.models import EncoderSpec
from cryodrgn_amort.plugins import Plugins

if TYPE_CHECKING:
    from pathlib import Path

    from host_matrix.host import Host

N, D = 300, 32
PARTICLES = ["data/particles.mrcs", "--poses", "data/poses.pkl", "--ctf", "data/ctf.pkl"]
_TILTS = ["--ntilts", "3", "--dose-per-tilt", "3", "--angle-per-tilt", "3"]
TILT_SERIES = [
    "tilts/particles.star",
    "--poses",
    "tilts/poses.pkl",
    "--ctf",
    "tilts/ctf.pkl",
    *_TILTS,
]
NET = ["--enc-dim", "64", "--enc-layers", "3"]
_DECODER = ["--dec-dim", "32", "--dec-layers", "2"]
_TRAIN = ["-b", "16", "--lr", "5e-4", "--seed", "0", "--no-analysis"]
STOCK = {  # a train_vae run for each kind of run: what files there are depends on these
    "train_vae": [*PARTICLES, "--zdim", "3"],
    "train_vae, zdim 2": [*PARTICLES, "--zdim", "2"],
    "train_vae, tilts": [*TILT_SERIES, "--encode-mode", "tilt", "--zdim", "3"],
    "train_vae --ind": [*PARTICLES, "--zdim", "3", "--ind", "data/kept.pkl"],
}
ONE_Z = "train_vae, one z"  # the same, its latents overwritten by one and the same
# A run with the weights of train_vae's. Not `tilt`: images 1e-6 brighter move the latents of
# train_vae's own run by 5e-3 (its network is deep), more than the 1e-3 that results are held to.
SAME = {"baseline": "train_vae"}
HOSTS_OWN = {  # what it cannot do with its own runs
    ("train_vae, zdim 2", "analyze_landscape"),  # reads umap.pkl, which analyze does not write
    ("train_vae, zdim 2", "analyze_landscape_full"),
    ("train_vae, zdim 2", "filter"),
    ("train_vae, tilts", "eval_images"),  # asks for a flag that there is not
    (ONE_Z, "eval_images"),  # its encoder knows nothing of the one z
    (ONE_Z, "graph_traversal"),
    (ONE_Z, "analyze_landscape"),
    (ONE_Z, "analyze_landscape_full"),
}


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes
    ----------
    name
        As the table in docs/host.md has it.
    host
        Version of the host that is to open it.
    like
        The train_vae run whose files it should have; empty: it is one.
    sees
        What its encoder was shown: ``particle``, ``other`` or ``nothing`` that the host can show.
    """

    name: str
    folder: Path
    host: str
    like: str = ""
    sees: str = "particle"

    @cached_property
    def epoch(self) -> int:
        """Its last epoch."""
        return max(int(p.name.split(".")[1]) for p in self.folder.glob("z.*.pkl"))

    @cached_property
    def z(self) -> np.ndarray:
        """Its latents, `(N, zdim)`."""
        with open(self.folder / f"z.{self.epoch}.pkl", "rb") as handle:
            return pickle.load(handle)

    @property
    def tilted(self) -> bool:
        """Whether its particles are tilt series."""
        return "tilt" in self.name

    @property
    def rows(self) -> np.ndarray:
        """Where its particles stand in the stack."""
        return kept() if self.name.endswith("--ind") else np.arange(N)


def kept() -> np.ndarray:
    """Return the particles of runs on a part of the stack."""
    return np.delete(np.arange(N), np.arange(0, N, 5))


EVALUATED = ("baseline", "vlt")
"""Runs whose values per particle the dashboard is given."""
IN_BROWSER = "baseline/retrieval_rank.roll-1.held.pkl"
"""Values that it shows in a browser, for all of them: where a table puts what a network lost."""


def rows_of_the_table(plugins: Plugins) -> list[str]:
    """Name every run: recipes that train, encoders without a recipe, and what else makes runs."""
    recipes = {n: r.item for n, r in plugins.owned("recipes").items()}
    trained = {n: r for n, r in recipes.items() if r.command == "train_amort"}
    met = {str(r.flags["encoder"]) for r in trained.values()}
    encoders = [*plugins.owned("encoders"), *plugins.owned("encoder_inputs")]
    alone = [n for n in encoders if n not in met and n != "particle"]
    return [*trained, *alone, "vlt, tilts", "twin, tilts", "vlt --ind", "infer_amort"]


def _flags(name: str, plugins: Plugins) -> tuple[list[str], str | None]:
    """Return flags of ``train_amort`` for a row of the table, and the row that it needs."""
    if name == "vlt --ind":
        return ["--encoder", "vlt", "--ind", "data/kept.pkl"], None
    if name not in plugins.owned("recipes"):
        return ["--encoder", name.removesuffix(", tilts")], None
    recipe = plugins.recipe(name)
    needs = next(iter(recipe.parents.items()), None)
    flags = ["--recipe", name]
    if needs:
        flags += [
            {"from_run": "--from", "table_init": "--table-init"}[needs[0]],
            f"runs/{needs[1]}",
        ]
    return flags, needs and needs[1]


def _epochs(name: str) -> list[str]:
    """Train what is compared by its numbers so little that rounding has not grown."""
    return ["-n", "1" if name in SAME.values() or name in SAME else "6"]


def _sees(name: str, plugins: Plugins) -> str:
    if name in ("vlt --ind", "infer_amort"):
        return "nothing"
    known = plugins.owned("recipes")
    encoder = known[name].item.flags["encoder"] if name in known else name.removesuffix(", tilts")
    spec = plugins.encoder(encoder)
    if not isinstance(spec, EncoderSpec):
        return "other"
    return "nothing" if spec.host_mode is None else "particle"


def make(work: Path, stock: Host, ours: Host, jobs: int) -> list[Run]:
    """Simulate particles and train every run; those of the host come first.

    Raises
    ------
    RuntimeError
        If a command fails.
    """
    plugins = Plugins(found={})
    (work / "runs").mkdir(parents=True)

    def done(host: Host, command: str, *argv: str, out: str) -> None:
        log = work / "logs" / f"{out.replace('/', '_')}.log"
        if host.run(["cryodrgn", command, *argv, "-o", out], work, log):
            raise RuntimeError(f"{command} {out}:\n{log.read_text()}")

    def train_stock(name: str) -> None:
        argv = [*STOCK[name], *_DECODER, *_TRAIN, *_epochs(name), *NET]
        done(stock, "train_vae", *argv, out=f"runs/{name}")

    def train(name: str) -> None:
        if name == "infer_amort":
            return done(ours, "infer_amort", "runs/baseline", "--steps", "5", out=f"runs/{name}")
        flags, needs = _flags(name, plugins)
        zdim = [] if "small" in name else ["--zdim", "3"]
        net = [] if _sees(name, plugins) == "nothing" else ["--enc-dim", "64"]
        if "--from" in flags:
            short = ["--enc-dim", "32", "--enc-layers", "2", "-n", "2"] if needs == "vlt" else []
            argv = [*flags, *short, "--seed", "0", "--no-analysis"]
            argv += ["--anchors", "4"] if name == "anchored" else []
            argv += ["-n", "4"] if needs != "vlt" else []
        else:
            data = [*TILT_SERIES, "--encode-mode", "tilt"] if "tilt" in name else PARTICLES
            argv = [*data, *_DECODER, *_TRAIN, *_epochs(name), *flags, *zdim, *net]
            if name == "alternate":  # whose turns take more
                argv += ["-n", "24", "--lr", "5e-3", "--beta", "0.01"]
        return done(ours, "train_amort", *argv, out=f"runs/{name}")

    done(ours, "simulate_amort", "-n", str(N), "-D", str(D), "--snr", "0.5", "--seed", "0",
         out="data")  # fmt: skip
    done(ours, "simulate_amort", "-n", str(N), "-D", str(D), "--tilts", "3", "--seed", "0",
         out="tilts")  # fmt: skip
    (work / "data/kept.pkl").write_bytes(pickle.dumps(kept()))
    _write_tables(work / "data")
    names = rows_of_the_table(plugins)
    needing = [n for n in names if n == "infer_amort" or _flags(n, plugins)[1]]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train_stock, STOCK))
        list(pool.map(train, [n for n in names if n not in needing]))
        list(pool.map(train, needing))
    _copy_with_one_z(work / "runs/train_vae", work / "runs" / ONE_Z)
    runs = [Run(n, work / "runs" / n, stock.version) for n in (*STOCK, ONE_Z)]
    for name in names:
        like = "train_vae, zdim 2" if "small" in name else "train_vae"
        like = "train_vae --ind" if name.endswith("--ind") else like
        like = "train_vae, tilts" if "tilt" in name else like
        like = ONE_Z if name == "vlt-frozen-zero" else like
        runs.append(Run(name, work / "runs" / name, stock.version, like, _sees(name, plugins)))
    for name in EVALUATED:
        done(
            ours,
            "eval_amort",
            f"runs/{name}",
            "--no-umap",
            "--bootstrap",
            "5",
            "--volumes",
            "2",
            "--labelled",
            "2",
            "--maps",
            "0",
            "--transform",
            "roll:1",
            out=f"evals/{name}",
        )
    return runs


def _copy_with_one_z(folder: Path, copy: Path) -> None:
    shutil.copytree(folder, copy)
    for path in copy.glob("z.*pkl"):
        with open(path, "rb") as handle:
            parts = [pickle.load(handle) for _ in range(2)]
        path.write_bytes(b"".join(pickle.dumps(np.zeros_like(part)) for part in parts))


def _write_tables(data: Path) -> None:
    """Write the particles as a .star file with optics groups and as a .cs file."""
    import pandas as pd
    import starfile

    optics = pd.DataFrame({
        "rlnOpticsGroup": [1, 2], "rlnImagePixelSize": [2.0, 2.0], "rlnImageSize": [D, D],
        "rlnVoltage": [300.0, 300.0],
    })  # fmt: skip
    particles = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@particles.mrcs" for i in range(N)],
            "rlnMicrographName": [f"mic{i % 7}.mrc" for i in range(N)],
            "rlnDefocusU": np.linspace(1e4, 2e4, N).round(3),
            "rlnOpticsGroup": 1 + (np.arange(N) >= N // 2),
        }
    )
    starfile.write({"optics": optics, "particles": particles}, data / "particles.star")
    table = np.zeros(N, [("uid", "<u8"), ("blob/path", "S40"), ("blob/idx", "<u4")])
    table["uid"] = np.random.default_rng(0).integers(1, 1 << 62, N)
    table["blob/path"], table["blob/idx"] = b"particles.mrcs", np.arange(N)
    with open(data / "particles.cs", "wb") as handle:
        np.save(handle, table)
