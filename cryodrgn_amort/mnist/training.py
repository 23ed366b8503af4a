"""Train the recipes of Appendix B: one folder per method and seed, each trained once."""

from __future__ import annotations

import contextlib
import csv
import logging
import math
import re
import shutil
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from cryodrgn_amort.checkpoints import OWN_KEY, read_weights, write_weights, write_z
from cryodrgn_amort.errors import InputError
from cryodrgn_amort.files import read_json, read_table, recorded, replacing, write_json
from cryodrgn_amort.inputs import EncoderInput, Noise, Twin
from cryodrgn_amort.latent import adam, train_step
from cryodrgn_amort.mnist.data import BOX, LEAST_TRAINING
from cryodrgn_amort.mnist.model import BETA, DigitNetwork, DigitVAE
from cryodrgn_amort.products import matrix_products
from cryodrgn_amort.progress import on_terminal
from cryodrgn_amort.table import LookupTable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from cryodrgn_amort.mnist.data import Digits, DigitSets

__all__ = ["METHODS", "MnistSettings", "Trained", "check_folder", "encode", "one_thread", "train"]

logger = logging.getLogger("cryodrgn_amort")

METHODS = {
    "vae": "a network that is shown the image (figures 12 to 17)",
    "vlt": "a lookup table, means 0 at the start (figures 18 and 19)",
    "twin": "the network, shown another image, always the same one",
    "noise": "the network, shown one fixed noise image per image",
}
DEFAULT_EPOCHS = {"digits": 200}
PAPER_EPOCHS = 100
TABLE_LR, TABLE_LR_END, TABLE_LOGVAR = 3e-2, 1e-4, -4.0
_ENCODE_BATCH = 1000
_EPS = 1e-12  # Adam's: the loss is a mean over pixels, its gradients by many weights are below 1e-8
_WRITTEN = {"report.html", "mnist.json", "figures", "runs"}
_RUN = re.compile(rf"({'|'.join(METHODS)})\.seed\d+")


@dataclass(frozen=True)
class MnistSettings:
    """What ``mnist_amort`` is asked to do; the paper's unless told otherwise.

    Attributes
    ----------
    num_epochs
        None: 200 of the 1,500 embedded digits, which makes as many steps as 5 of MNIST, else 100.
    table_lr, table_lr_end, table_logvar
        Of the lookup table: its learning rate, what that falls to, and the start of the log
        variances.
    fit
        Number of images whose posteriors are fitted, of those trained on and of those held out.
    """

    data: str = "digits"
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0,)
    num_epochs: int | None = None
    batch_size: int = 100
    lr: float = 1e-3
    zdim: int = 2
    table_lr: float = TABLE_LR
    table_lr_end: float = TABLE_LR_END
    table_logvar: float = TABLE_LOGVAR
    fit: int = 500
    bootstrap: int = 500

    def __post_init__(self) -> None:
        least_of = {"batch_size": 1, "zdim": 1, "fit": 2, "bootstrap": 0}
        if self.num_epochs is not None:
            least_of["num_epochs"] = 1
        for name, least in least_of.items():
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {getattr(self, name)}: must be at least {least}")
        for name in ("lr", "table_lr", "table_lr_end"):
            if not 0 < getattr(self, name) < math.inf:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {getattr(self, name)}: must be positive")
        if not abs(self.table_logvar) < math.inf:
            raise InputError(f"--table-logvar {self.table_logvar}: must be finite")
        for name in self.methods:
            if name not in METHODS:
                raise InputError(f"--methods {name}: not one of {', '.join(METHODS)}")
        for seed in self.seeds:
            if not 0 <= seed < 2**31:
                raise InputError(f"--seeds {seed}: must not be negative, nor huge")
        for flag in ("methods", "seeds"):
            if not getattr(self, flag) or len(set(getattr(self, flag))) < len(getattr(self, flag)):
                raise InputError(f"--{flag}: each once, and at least one")

    @property
    def epochs(self) -> int:
        """Number of epochs."""
        default = DEFAULT_EPOCHS.get(self.data, PAPER_EPOCHS)
        return default if self.num_epochs is None else self.num_epochs

    def of_run(self, method: str, seed: int, data: DigitSets) -> dict[str, Any]:
        """Return all that the result of one training depends on."""
        names = ("table_lr", "table_lr_end", "table_logvar")
        table = {name: getattr(self, name) for name in names}
        return {
            "method": method,
            "seed": seed,
            "images": data.training.digest(),
            "num_epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "zdim": self.zdim,
            **(table if method == "vlt" else {}),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, with the number of epochs."""
        return {**asdict(self), "num_epochs": self.epochs}


@dataclass(frozen=True)
class Trained:
    """A method as trained from one seed.

    Attributes
    ----------
    shown
        What the network is shown; None: there is none, its latents are a table.
    history
        Rows of metrics.csv: losses in nats per image.
    z, logvar
        Posterior of the training images, `(N, zdim)`.
    """

    method: str
    seed: int
    model: DigitVAE
    shown: EncoderInput | None
    history: list[dict[str, float]]
    z: np.ndarray
    logvar: np.ndarray

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.method}.seed{self.seed}"


def build(
    settings: MnistSettings, method: str, seed: int, digits: Digits
) -> tuple[DigitVAE, EncoderInput | None]:
    """Make a model and what it is shown; the table and the inputs are those for particles."""
    torch.manual_seed(seed)
    shown: EncoderInput | None = None
    if method == "vlt":
        start = torch.zeros(digits.n, settings.zdim)
        rates = settings.table_lr, settings.table_lr_end
        table = LookupTable(start, start + settings.table_logvar, *rates)
        return DigitVAE(table, settings.zdim), shown
    if method == "twin":
        shown = Twin(digits.n, seed)
    elif method == "noise":
        shown = Noise(digits.box, *digits.raw_mean_std, seed)
    else:
        shown = EncoderInput()
    return DigitVAE(DigitNetwork(settings.zdim), settings.zdim), shown


def check_folder(
    folder: Path, settings: MnistSettings, data: DigitSets, overwrite: bool = False
) -> list[Path]:
    """Return which runs in the folder have other settings, and are to be replaced.

    Raises
    ------
    InputError
        If there are some but not ``overwrite``, or the folder holds something else.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise InputError(f"-o {folder}: {there} is not a folder")
    if data.training.n < max(LEAST_TRAINING, settings.batch_size):
        raise InputError(
            f"--batch-size {settings.batch_size}: there are {data.training.n} images to train on"
        )
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    runs = sorted((folder / "runs").iterdir()) if (folder / "runs").is_dir() else []
    others = sorted(n for n in names - _WRITTEN if not n.startswith("."))
    others += [f"runs/{p.name}" for p in runs if not _RUN.fullmatch(p.name)]
    if "report.html" in names and not (folder / "mnist.json").is_file():
        others.append("report.html, of another command")
    if others:
        raise InputError(f"-o {folder}: holds {others[0]}; a folder of its own is needed")
    stale = [p for p in runs if _stale(p, settings, data)]
    if stale and not overwrite:
        raise InputError(
            f"-o {folder}: runs/{stale[0].name} was trained with other settings; replace it with "
            "--overwrite, or choose another folder"
        )
    return stale


def _stale(folder: Path, settings: MnistSettings, data: DigitSets) -> bool:
    if not (folder / "settings.json").is_file():
        return False  # killed; trained anew
    method, _, seed = folder.name.partition(".seed")
    return bool(_read_settings(folder) != settings.of_run(method, int(seed), data))


def _read_settings(folder: Path) -> Any:
    try:
        return read_json(folder / "settings.json", "-o")
    except InputError:  # damaged: trained anew
        return None


def train(
    settings: MnistSettings, method: str, seed: int, data: DigitSets, folder: Path
) -> Trained:
    """Train a method from one seed into its folder; or read it, if that has been done."""
    digits, wanted = data.training, settings.of_run(method, seed, data)
    model, shown = build(settings, method, seed, digits)
    if _read_settings(folder) == wanted:
        history = _restore(model, shown, folder)
        logger.info(f"{folder.name}: trained already")
        return Trained(method, seed, model, shown, history, *encode(model, digits, shown))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    history = _train(model, shown, settings, digits, folder.name, seed)
    found = Trained(method, seed, model, shown, history, *encode(model, digits, shown))
    with recorded(folder, "metrics.csv", "weights.pkl", "z.pkl"):
        _write(found, settings, folder)
    write_json(folder / "settings.json", wanted)  # the last one: the run is whole
    return found


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: such small steps gain little by more, which wait for each other.

    Where others use the cores as well, that took up to sixty times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
@matrix_products()
def _train(
    model: DigitVAE,
    shown: EncoderInput | None,
    settings: MnistSettings,
    digits: Digits,
    name: str,
    seed: int,
) -> list[dict[str, float]]:
    model.train()
    optimizer = adam(list(model.parameters()), settings.lr, eps=_EPS)
    generator = torch.Generator().manual_seed(seed)
    feed = _kept(digits, shown)
    history: list[dict[str, float]] = []
    started = time.monotonic()
    bar = tqdm(range(1, settings.epochs + 1), name, leave=False, disable=not on_terminal())
    for epoch in bar:
        begun = time.monotonic()
        sums = torch.zeros(2, dtype=torch.float64)
        model.amort.epoch_start((epoch - 1) / settings.epochs)
        for index in torch.randperm(digits.n, generator=generator).split(settings.batch_size):
            batch = digits.batch(index, None)
            batch.image = None if feed is None else feed(index)
            result, _ = train_step(model, optimizer, batch, BETA)
            # errors are twice the cross entropy, per pixel
            nats = torch.stack([result.gen_loss * (BOX**2 / 2), result.kld])
            sums += batch.size * nats
        reconstruction, kl = (sums / digits.n).tolist()
        if not math.isfinite(reconstruction + kl):
            raise InputError(
                f"{name}: the loss of epoch {epoch} is not a number, training has diverged; "
                "try a smaller --lr"
            )
        row = {"epoch": epoch, "reconstruction": reconstruction, "kl": kl,
               "loss": reconstruction + kl, "seconds": round(time.monotonic() - begun, 4),
               **model.amort.epoch_metrics()}  # fmt: skip
        history.append(row)
        if bar.disable and epoch % max(1, settings.epochs // 10) == 0:
            logger.info(f"{name}: epoch {epoch}/{settings.epochs}, reconstruction "
                        f"{reconstruction:.1f}, KL {kl:.2f}, loss {row['loss']:.1f} nats per "
                        f"image, {time.monotonic() - started:.0f} s")  # fmt: skip
    return history


def _kept(digits: Digits, shown: EncoderInput | None) -> Any:
    """Return a function from index to what a network is shown; images made anew are made once."""
    if shown is None:
        return None
    if shown.raw(torch.zeros(1, dtype=torch.long)) is None:
        return lambda index: digits.shown(index, shown).flatten(1)
    parts = torch.arange(digits.n).split(_ENCODE_BATCH)
    made = torch.cat([digits.shown(index, shown).flatten(1) for index in parts])
    return lambda index: made[index]


@torch.no_grad()
def encode(
    model: DigitVAE, digits: Digits, shown: EncoderInput | None, transform: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return means and log variances of all pictures, each `(N, zdim)`; of a table, its own."""
    model.eval()
    known = model.amort.latents()
    if known is None:
        parts: list[Tensor] = [
            torch.cat(model.posterior(digits.batch(index, shown, transform)), 1)
            for index in torch.arange(digits.n).split(_ENCODE_BATCH)
        ]
        both = torch.cat(parts)
        known = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
    mean, logvar = (part.contiguous().numpy() for part in known)
    return mean, logvar


def _write(found: Trained, settings: MnistSettings, folder: Path) -> None:
    with (
        replacing(folder / "metrics.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as handle,
    ):
        writer = csv.DictWriter(handle, list(found.history[0]))
        writer.writeheader()
        writer.writerows(found.history)
    model = found.model
    write_weights(
        folder / "weights.pkl", settings.epochs, model.decoder.state_dict(), encoder=found.method,
        encoder_state_dict=model.own_state_dict(),
        input_state={} if found.shown is None else found.shown.state_dict(),
    )  # fmt: skip
    write_z(folder / "z.pkl", found.z, found.logvar)


def _restore(model: DigitVAE, shown: EncoderInput | None, folder: Path) -> list[dict[str, float]]:
    """Read what ``_write`` wrote; returns the rows of metrics.csv."""
    checkpoint = read_weights(folder / "weights.pkl", "-o")
    try:
        model.decoder.load_state_dict(checkpoint["model_state_dict"])
        model.amort.load_state_dict(checkpoint[OWN_KEY]["encoder_state_dict"])
        if shown is not None:
            shown.load_state_dict(checkpoint[OWN_KEY]["input_state"])
        rows = read_table(folder / "metrics.csv", "-o")
        return [{k: float(v) for k, v in row.items()} for row in rows]
    except (KeyError, RuntimeError, ValueError) as err:
        reason = str(err).splitlines()[0]
        raise InputError(f"-o {folder}: damaged ({reason}); remove this folder") from None
