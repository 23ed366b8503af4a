"""Train the recipes of Appendix B: one folder per method and seed, each trained once."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from tqdm import tqdm

from cryodrgn_amort.core import (
    OWN_KEY,
    InputError,
    matrix_products,
    on_terminal,
    read_json,
    read_table,
    read_weights,
    recorded,
    replacing,
    write_json,
    write_weights,
    write_z,
)
from cryodrgn_amort.data import EncoderInput, Noise, Twin
from cryodrgn_amort.models import LookupTable, adam, train_step
from cryodrgn_amort.options import METHODS, MnistSettings
from cryodrgn_amort.study.digits.data import BOX, LEAST_TRAINING
from cryodrgn_amort.study.digits.model import BETA, DigitNetwork, DigitVAE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from cryodrgn_amort.study.digits.data import Digits, DigitSets


__all__ = ["Trained", "check_digits_folder", "encode", "one_thread", "train_digits"]
logger = logging.getLogger("cryodrgn_amort")

_ENCODE_BATCH = 1000
_EPS = 1e-12  # Adam's: the loss is a mean over pixels, its gradients by many weights are below 1e-8
_WRITTEN = {"report.html", "mnist.json", "figures", "runs"}
_RUN = re.compile(rf"({'|'.join(METHODS)})\.seed\d+")


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


def settings_of_run(
    settings: MnistSettings, method: str, seed: int, data: DigitSets
) -> dict[str, Any]:
    """Return all that the result of one training depends on."""
    names = ("table_lr", "table_lr_end", "table_logvar")
    table = {name: getattr(settings, name) for name in names}
    return {
        "method": method,
        "seed": seed,
        "images": data.training.digest(),
        "num_epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "lr": settings.lr,
        "zdim": settings.zdim,
        **(table if method == "vlt" else {}),
    }


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


def check_digits_folder(
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
    return bool(_read_settings(folder) != settings_of_run(settings, method, int(seed), data))


def _read_settings(folder: Path) -> Any:
    try:
        return read_json(folder / "settings.json", "-o")
    except InputError:  # damaged: trained anew
        return None


def train_digits(
    settings: MnistSettings, method: str, seed: int, data: DigitSets, folder: Path
) -> Trained:
    """Train a method from one seed into its folder; or read it, if that has been done."""
    digits, wanted = data.training, settings_of_run(settings, method, seed, data)
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
    shown_of = _kept(digits, shown)
    history: list[dict[str, float]] = []
    started = time.monotonic()
    bar = tqdm(range(1, settings.epochs + 1), name, leave=False, disable=not on_terminal())
    for epoch in bar:
        begun = time.monotonic()
        sums = torch.zeros(2, dtype=torch.float64)
        model.amort.epoch_start((epoch - 1) / settings.epochs)
        for index in torch.randperm(digits.n, generator=generator).split(settings.batch_size):
            batch = digits.batch(index, None)
            batch.image = None if shown_of is None else shown_of(index)
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
    with replacing(folder / "metrics.csv") as temporary:
        pd.DataFrame(found.history).to_csv(temporary, index=False, lineterminator="\r\n")
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
