"""A methods paragraph for a paper, filled from a run and its evaluation, with what to cite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cryodrgn_amort import host
from cryodrgn_amort.core import __version__, number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryodrgn_amort.measures import Measure
    from cryodrgn_amort.report.results import Evaluation


__all__ = ["CITATION", "Methods", "methods"]

CITATION = (
    "D. G. Edelberg, R. R. Lederman: Using VAEs to Learn Latent Variables: Observations on "
    "Applications in cryo-EM. arXiv:2303.07487 (2023)"
)
_CRYODRGN = (
    "E. D. Zhong, T. Bepler, B. Berger, J. H. Davis: CryoDRGN: reconstruction of heterogeneous "
    "cryo-EM structures using neural networks. Nature Methods 18, 176-185 (2021)"
)
_ELBO = "D. P. Kingma, M. Welling: Auto-Encoding Variational Bayes. arXiv:1312.6114 (2013)"
_OURS = f"cryodrgn_amort {__version__}, see its CITATION.cff"


@dataclass(frozen=True)
class Methods:
    """Paragraphs of plain text, with numbers in brackets that stand for the references in order."""

    paragraphs: list[str]
    references: list[str]


def methods(evaluation: Evaluation) -> Methods:
    """Write what was done and found, for the methods section of a paper."""
    parts = (_training(evaluation), _generalisation(evaluation), _fits(evaluation))
    return Methods(
        [" ".join(part) for part in map(list, parts) if part],
        [_CRYODRGN, CITATION, _ELBO, _OURS],
    )


def _training(evaluation: Evaluation) -> Iterator[str]:
    run, s = evaluation.run, evaluation.run.settings
    box = evaluation.volumes.shape[-1]
    what = "tilt series" if s.tilted else "particles"
    yield (f"{len(evaluation.z):,} {what} (box of {box} px{_pixel(evaluation)}) were analysed with "
           f"cryoDRGN {host.VERSION} [1] and cryodrgn_amort {__version__} [4].")  # fmt: skip
    yield f"Latents of {s.zdim} dimensions came from {_encoder(evaluation)}."
    yield (
        f"The decoder, {s.players} layers of {s.pdim} units ({s.pe_type} positional encoding, "
        f"{s.domain} domain), was trained for {run.epoch} epochs in batches of {s.batch_size} "
        f"at a learning rate of {s.lr:g}{_falling(s.lr_end)}, a weight of the KL divergence of "
        f"{_weight(s.beta_value())}, and random seed {s.seed} (PyTorch {torch.__version__})."
    )
    if s.holdout:
        yield "Some particles were kept out of the training, to judge the encoder by."
    if s.do_pose_sgd:
        yield f"Poses were refined from epoch {s.pretrain} on."


def _weight(beta: float | str) -> str:
    return "twice the noise's variance" if beta == "implied" else str(beta)


def _pixel(evaluation: Evaluation) -> str:
    known = evaluation.options.ctf or evaluation.run.settings.ctf
    return f", {evaluation.apix:.3g} Å per pixel" if known else ""


def _falling(end: float | None) -> str:
    return "" if end is None else f", which fell to {end:g}"


def _encoder(evaluation: Evaluation) -> str:
    run, s = evaluation.run, evaluation.run.settings
    if run.encoder.host_mode is not None:
        network = f"an encoder of {s.qlayers} layers of {s.qdim} units"
        shown = "" if run.shown is None or run.shown.name == "particle" else (
            f" that was shown {run.shown.summary.lower()} in place of the particle")  # fmt: skip
        return network + shown
    if run.shown is None:
        return f"no network ({_summary(run.encoder.summary)})"
    return f"the encoder `{run.encoder.name}` ({_summary(run.encoder.summary)})"


def _summary(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(". ,")


def _said(m: Measure) -> str:
    interval = "" if m.low is None else f" (95 % interval {number(m.low)} to {number(m.high)})"
    return f"{number(m.value)}{interval}"


def _generalisation(evaluation: Evaluation) -> Iterator[str]:
    tried = [r for r in evaluation.results if not r.is_control and "retrieval_rank" in r.measures]
    if not tried:
        return
    yield ("To ask whether the encoder generalises [2], each particle's image was changed in ways "
           "that leave the molecule as it is, and encoded again. The retrieval rank - the share of "
           "other particles that lie nearer to the copy's latent than the particle's own; 0.5 by "
           "chance - was, on average, in copies that were")  # fmt: skip
    each = [f"{r.title} (pose and CTF "
            f"{'kept' if r.mode == 'held' else 'transformed with the image'}) "
            f"{_said(r.measures['retrieval_rank'])}"
            for r in tried]  # fmt: skip
    yield "; ".join(each) + "."


def _fits(evaluation: Evaluation) -> Iterator[str]:
    fits = [f for f in evaluation.fits if "amortization_gap" in f.measures]
    if fits:
        first = fits[0]
        yield (f"Gaussian posteriors of {len(first.index)} particles were fitted one by one with "
               "the decoder kept as it was; their evidence lower bound [3] was above that of the "
               f"encoder's answers by {_said(first.measures['amortization_gap'])} nats per "
               "particle.")  # fmt: skip
        for f in evaluation.fits:
            if "held_out_score" in f.measures:
                score = _said(f.measures["held_out_score"])
                yield (f"Of what fitted latents explain of particles held out, the encoder's "
                       f"explained a share of {score}.")  # fmt: skip
                break
    if evaluation.results or fits:
        yield (f"Intervals are of {evaluation.options.bootstrap} bootstrap samples of the "
               "particles.")  # fmt: skip
    if len(evaluation.left_out):
        yield f"{len(evaluation.left_out)} particles without finite latents were left out."
