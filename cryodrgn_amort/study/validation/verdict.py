"""The answers of a validation: yes, no, or that it cannot be told, with the numbers behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cryodrgn_amort.core import number
from cryodrgn_amort.study.validation.misfits import LOW

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = ["CANNOT", "NO", "YES", "Answer", "answers", "any_misfits"]

YES, NO, CANNOT = "yes", "no", "cannot tell"
_AGREE, _ALIKE = 0.2, 0.1  # correlation of halves that is something, and that is nothing
_ABOVE = 1.5  # times the gain of particles without heterogeneity
_OF_DECODERS = {"gain", "maps", "poses", "misfits"}  # answers that need good ones
_OFF_DEG, _MISFITS = 2.5, 0.06
_ERROR_BARS = 1 / 2.25, 2.25  # variance that is found over the one that is claimed


@dataclass(frozen=True)
class Answer:
    """An answer to a user's question.

    Attributes
    ----------
    said
        "yes", "no", "cannot tell".
    tone
        "good", "fair", "poor", "none".
    because
        The numbers, with what they would be if there were nothing.
    do
        What to do next.
    """

    question: str
    said: str
    tone: str
    because: str
    do: str = ""


def answers(found: Mapping[str, Mapping[str, Any]]) -> list[Answer]:
    """Return answers by what the parts have found, by name; parts may be missing."""
    asked = (
        ("gain", _heterogeneity), ("maps", _maps), ("epochs", _epochs), ("poses", _poses),
        ("misfits", _misfits), ("noise", _noise),
    )  # fmt: skip
    said = {name: answer(found[name]) for name, answer in asked if name in found}
    if "epochs" in found and found["epochs"]["improves"]:
        but = "But the decoder has not been trained for long enough to tell."
        for name in _OF_DECODERS & said.keys():
            said[name] = _taken_back(said[name], but, "Train longer, and ask again.")
    elif "poses" in said and ("gain" not in said or said["gain"].said == CANNOT):
        but = "But so does heterogeneity that the decoder has not found, if there is any."
        do = said["poses"].do if said["poses"].said == CANNOT else "Find out about that first."
        said["poses"] = _taken_back(said["poses"], but, do)
    return list(said.values())


def _taken_back(answer: Answer, but: str, do: str) -> Answer:
    """Take back what a decoder that may be at fault says against the particles."""
    if answer.tone != "poor":
        return answer if answer.said != CANNOT else replace(answer, do=do)
    return replace(answer, said=CANNOT, tone="fair", because=f"{answer.because} {but}", do=do)


def corrected(found: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return the pose error, and its interval, less what the decoder's own faults look like.

    These are told by images that the other half's decoder makes up at known poses; squares add up.
    Half of what two decoders differ by is one's, if their faults have nothing to do with each
    other; the interval goes from all of it being taken off to nothing.
    """
    base = found["of_decoders"] or 0.0

    def less(value: float, times: float) -> float:
        return math.sqrt(max(0.0, value**2 - times * base**2))

    return less(found["degrees"], 1), less(found["low"], 2), less(found["high"], 0)


def _interval(m: Mapping[str, Any]) -> str:
    return f"{number(m['value'])} ({number(m['low'])} to {number(m['high'])})"


def _heterogeneity(found: Mapping[str, Any]) -> Answer:
    question = "Is there heterogeneity in the particles, beyond noise?"
    halves = [m for name, m in found["gain"].items() if not name.startswith("null")]
    nulls = [m for name, m in found["gain"].items() if name.startswith("null")]
    agree = [pair["halves_agreement"] for pair in found["agreement"].values()]
    crossed = [pair["halves_agreement_others"] for pair in found["agreement"].values()]
    most = max(m["high"] for m in nulls)
    gains = all(m["low"] > _ABOVE * max(most, 0.0) for m in halves)
    none = all(m["low"] <= _ABOVE * max(most, 0.0) for m in halves)
    together = all(m["low"] > _AGREE for m in agree)
    apart = all(m["low"] < _ALIKE for m in agree)
    because = (
        "Latents of their own explain particles that the decoder has not seen by "
        f"{' and '.join(map(_interval, halves))} nats better than one latent for all; without "
        f"heterogeneity by {' and '.join(map(_interval, nulls))}. What two halves show for a "
        f"particle correlates by {' and '.join(map(_interval, agree))}, with another particle's "
        f"by {' and '.join(map(_interval, crossed))}."
    )
    if gains and together:
        return Answer(question, YES, "good", because, "Both halves find it: look at its volumes.")
    if none and apart:
        return Answer(
            question, NO, "poor", because,
            "What the volumes of this run differ by is noise. Refine as one structure.",
        )  # fmt: skip
    return Answer(
        question, CANNOT, "fair", because,
        "More particles, or --encoder alternate, which finds more where there is little signal.",
    )  # fmt: skip


def _maps(found: Mapping[str, Any]) -> Answer:
    question = "Are these volumes in the particles?"
    m, null = found["map_agreement"], found["map_agreement_random"]
    both, chance = found["map_halves_agreement"], found["map_halves_agreement_random"]
    because = (
        f"At {found['latents']} latents the {found['particles']} particles of each half that the "
        "other half's decoder explains best were backprojected, without any decoder. Volumes "
        f"differ from their mean as these maps do: correlation {_interval(m)}; maps of as many "
        f"random particles {_interval(null)}. Maps of both halves: {_interval(both)}, random "
        f"{_interval(chance)}."
    )
    if m["low"] > max(_AGREE, null["high"]):
        return Answer(question, YES, "good", because, "Look at maps/.")
    if m["low"] < _ALIKE and m["high"] < _AGREE:
        return Answer(
            question, NO, "poor", because, "Do not show the volumes: particles do not have them."
        )
    return Answer(
        question, CANNOT, "fair", because,
        "Fewer latents (--maps), so that each map has more particles, or more particles.",
    )  # fmt: skip


def _epochs(found: Mapping[str, Any]) -> Answer:
    question = "Has it been trained for long enough?"
    last = found["epochs"][-1]
    gained, error = found["last_quarter"], found["last_quarter_error"]
    because = (
        f"The last quarter of {last} epochs changed the ELBO of particles not seen by "
        f"{number(gained)} +- {number(error)} nats, all of them by {number(found['all'])}. From "
        f"epoch {found['best']} on none is surely better."
    )
    if found["improves"]:
        return Answer(question, NO, "fair", because, f"Train longer than {last} epochs.")
    if found["declines"]:
        return Answer(
            question, YES, "fair", because,
            f"Take epoch {found['best']}: later ones follow the noise of the particles trained on.",
        )  # fmt: skip
    return Answer(question, YES, "good", because, "")


def _poses(found: Mapping[str, Any]) -> Answer:
    question = "Are the poses right?"
    value, low, high = corrected(found)
    because = (
        f"Turning particles explains them as images would be that are off by {number(value)} "
        f"degrees rms ({number(low)} to {number(high)})"
    )
    if found["of_decoders"] is not None:
        because += (
            f"; {number(found['degrees'])} before {number(found['of_decoders'])} is taken off, "
            "what the faults of a decoder look like at known poses (the interval: twice that, or "
            "nothing)"
        )
    because += "."
    if low > _OFF_DEG:
        return Answer(question, NO, "poor", because, "Refine the poses, or --do-pose-sgd.")
    if high < 2 * _OFF_DEG:
        return Answer(question, YES, "good", because, "")
    return Answer(question, CANNOT, "fair", because, "More particles (--sample) narrow it.")


def _noise(found: Mapping[str, Any]) -> Answer:
    question = "Are the error bars of the latents right?"
    spread, bias = found["spread"], found["bias"]
    if spread is None:
        return Answer(
            question, CANNOT, "fair", "The posteriors are as wide as the prior: they tell nothing."
        )
    how = "encoded" if found["encoded"] else "fitted"
    because = (
        f"Images of {found['n']} particles as decoded, shown again with new noise and {how} again, "
        f"have latents whose variance is {_interval(spread)} times that of the run's log "
        f"variances; their mean is off by {_interval(bias)} standard deviations."
    )
    least, most = _ERROR_BARS
    if least < spread["low"] and spread["high"] < most and bias["high"] < 1:
        return Answer(question, YES, "good", because)
    if spread["high"] < least or spread["low"] > most or bias["low"] > 1:
        return Answer(
            question, NO, "poor", because,
            "Do not weigh particles by them; infer_amort --beta implied fits ones that mean it.",
        )  # fmt: skip
    return Answer(question, CANNOT, "fair", because, "More particles (--sample) narrow it.")


def any_misfits(found: Mapping[str, Any]) -> bool:
    """Tell whether more particles are explained badly than the decoder's own faults make so."""
    usual = [LOW, found["below_of_decoders"] or 0.0, *found["below_of_nulls"].values()]
    return bool(found["below"] > max(usual) + _MISFITS)


def _misfits(found: Mapping[str, Any]) -> Answer:
    question = "Are there particles that the decoder cannot explain?"
    small, usual = found["below"], list(found["below_of_nulls"].values())
    crossed = found["below_of_decoders"]
    because = (
        f"{number(100 * small)} % of {found['n']} particles are explained worse than 95 % of "
        "images made up in their place"
    )
    if usual:
        because += (
            f"; of particles with one structure {' and '.join(number(100 * u) for u in usual)} %"
        )
    if crossed is not None:
        because += f", of images that the other half's decoder makes up {number(100 * crossed)} %"
    because += "."
    if any_misfits(found):
        return Answer(
            question, YES, "poor", because, "Look at ind_misfit.pkl; train without them (--ind)."
        )
    return Answer(question, NO, "good", because, "")
