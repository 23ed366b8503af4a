"""What the measures mean, in words: one line each, used by every table, report and file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryodrgn_amort.metrics import Measure
    from cryodrgn_amort.results import Evaluation, TransformResult

__all__ = [
    "DEFINITIONS",
    "GAIN_BOUNDS",
    "MODE_NOTES",
    "TIMED",
    "VERDICT_RULE",
    "Definition",
    "Verdict",
    "number",
    "plain_number",
    "text_row",
    "text_table",
    "verdict",
]


@dataclass(frozen=True)
class Definition:
    """What a measure is: a title, one line, and its unit (empty: a pure number)."""

    title: str
    text: str
    unit: str = ""


DEFINITIONS = {
    "retrieval_rank": Definition(
        "Retrieval rank",
        "Share of the other particles that lie nearer to a particle's transformed copy than the "
        "particle itself does; mean over particles.",
    ),
    "top1": Definition(
        "Found again",
        "Share of particles that are the nearest of all particles to their own transformed copy.",
    ),
    "displacement": Definition(
        "Displacement",
        "Distance from a particle to its transformed copy in latent space, next to the median "
        "distance of two random particles; median over particles.",
        "median pair distances",
    ),
    "displacement_sigma": Definition(
        "Displacement in sigma",
        "The same distance in the particle's own posterior standard deviations; median over "
        "particles. Null: random pairs.",
        "standard deviations",
    ),
    "latent_correlation": Definition(
        "Latent correlation",
        "Correlation of latent coordinates before and after, averaged over dimensions by variance.",
    ),
    "label_agreement": Definition(
        "Label agreement",
        "Share of particles whose 15 nearest neighbours vote for the same class before and after. "
        "Null: copies of other particles.",
    ),
    "amortization_loss_fraction": Definition(
        "Amortization loss fraction",
        "Of the fit to the images that is gained by each particle having its own latent, the "
        "share that is lost with the copy's latent. Above 1: worse than one latent for all.",
    ),
    "control": Definition(
        "Control",
        "Change of the reconstruction loss when image, pose and CTF are transformed together and "
        "the latent stays; mean over particles.",
        "nats per particle",
    ),
    "volume_change": Definition(
        "Volume change",
        "Distance between the volumes decoded for a particle and for its copy, next to that "
        "between two particles (medians).",
        "median pair distances",
    ),
    "volume_fsc_loss": Definition(
        "Volume FSC loss",
        "1 minus the mean Fourier shell correlation of the volumes decoded for a particle and for "
        "its copy. Null: two particles.",
    ),
    "amortization_gap": Definition(
        "Amortization gap",
        "By how much the ELBO of a posterior that was fitted to a particle alone is above that of "
        "the encoder's answer, or of its row of the table, with the same decoder; mean over the "
        "sampled particles.",
        "nats per particle",
    ),
    "generalisation_gap": Definition(
        "Generalisation gap",
        "The amortization gap of particles that were held out, minus that of as many that were "
        "trained on: what is lost because the encoder never saw them.",
        "nats per particle",
    ),
    "held_out_score": Definition(
        "Held-out score",
        "Of the fit to the images of held-out particles that fitted latents gain over one latent "
        "for all, the share that the encoder's latents gain. 0: the encoder is no better than a "
        "constant; below: worse.",
    ),
    "approximation_gap": Definition(
        "Approximation gap",
        "By how much an importance-weighted bound of log p(x), with 64 samples, is above the ELBO "
        "of the fitted posterior: what is lost because posteriors are Gaussians without "
        "correlations. A lower estimate.",
        "nats per particle",
    ),
    **{
        f"coverage_{level}": Definition(
            f"Coverage at {level} %",
            f"How often the central {level} % interval of a posterior holds the true latent, by "
            "dimension, of images that the run's decoder makes up. Less: the encoder is too sure; "
            "more: not sure enough.",
        )
        for level in (50, 80, 95)
    },
    "class_knn_held_out": Definition(
        "Class kNN, held out",
        "Share of held-out particles whose class is that of most of the 15 training particles "
        "nearest to the encoder's latent. Null: guessing by class size.",
    ),
    "coordinate_r2_held_out": Definition(
        "Coordinate R², held out",
        "Share of the variance of held-out particles' coordinate that the mean of the 15 training "
        "particles nearest to the encoder's latents explains.",
    ),
    "encoding_cost": Definition(
        "Encoding cost",
        "Time in which the encoder answers, next to 50 steps of a fit of the same particles; "
        "median, least and greatest of 5 rounds.",
        "50 fitting steps",
    ),
    "gain_ratio": Definition(
        "Gain ratio",
        "What the encoder's latents gain in fit over one latent for all, of particles (held-out "
        "ones, if there are any), next to what they gain of images that the decoder makes up. "
        "Below 1: the decoder shows differences that particles do not have, or the encoder fails "
        "on these. Above: particles differ more than the decoder shows, as when it was trained for "
        "too short a time.",
    ),
    "converged": Definition(
        "Converged", "Share of the fitted particles whose ELBO had stopped improving."
    ),
    "class_knn_encoder": Definition(
        "Class kNN, encoder", "Class kNN, held out, of the particles that were fitted."
    ),
    "class_knn_fitted": Definition(
        "Class kNN, fitted", "The same with the fitted latents: what the decoder makes possible."
    ),
    "noise_swap_signal": Definition(
        "Noise swap, signal",
        "Latent correlation of a particle with a made-up image: its own noise-free projection in "
        "the noise of another particle, as the encoder was shown that. 1: it sees the signal.",
    ),
    "noise_swap_noise": Definition(
        "Noise swap, noise",
        "The same with the latents of the particle whose noise it is. 1: the encoder recognises "
        "the noise.",
    ),
    **{
        f"nuisance_leak_{name}": Definition(
            f"Nuisance leak, {title}",
            f"Share of the variance of the {what} that the mean of the 15 nearest neighbours in "
            "latent space explains. Null: particles shuffled. Above it, the latents hold what "
            "they should not.",
        )
        for name, title, what in (
            ("view", "view", "direction of view"),
            ("inplane", "in-plane angle", "in-plane angle"),
            ("defocus", "defocus", "defocus"),
            ("shift", "shift", "shift"),
        )
    },
    "active_units": Definition(
        "Active units",
        "Latent dimensions whose posterior means vary over particles (variance above 0.01).",
        "dimensions",
    ),
    "kl": Definition(
        "KL",
        "Divergence of a particle's posterior from the prior N(0, I); mean over particles. Near "
        "0, the latents carry no information.",
        "nats per particle",
    ),
    "aggregate_kl": Definition(
        "Aggregate KL",
        "Divergence of all posteriors together, as one distribution, from the prior. An upper "
        "estimate: N particles cannot show less than KL - ln N. Near 0, a latent drawn from the "
        "prior is one that a particle could have.",
        "nats",
    ),
    "kl_per_dimension": Definition(
        "KL per dimension", "The KL of each latent dimension; their sum is KL.", "nats per particle"
    ),
    "reconstruction": Definition(
        "Reconstruction loss",
        "Half the squared distance between a particle's image and the one decoded for it, in units "
        "of the data's standard deviation; mean over the sampled particles, which are the same in "
        "every run of as many particles. Null: the mean latent for all.",
        "nats per particle",
    ),
    "class_knn": Definition(
        "Class kNN accuracy",
        "Share of particles whose class is that of most of their 15 nearest neighbours. Null: "
        "guessing by class size.",
    ),
    "knn_overlap": Definition(
        "Neighbour overlap",
        "Share of a particle's 15 nearest neighbours in one run that are so in the other; mean.",
    ),
    "linear_cka": Definition(
        "Linear CKA", "Alignment of the two sets of latents up to rotation and scale."
    ),
    "procrustes_disparity": Definition(
        "Procrustes disparity",
        "Squared distance of the two sets after the best translation, rotation and scaling.",
    ),
    "kmeans_ari": Definition(
        "k-means ARI", "Adjusted Rand index of the two runs' k-means clusters."
    ),
    "volume_fsc": Definition(
        "Volume FSC",
        "Mean Fourier shell correlation of the volumes that the two runs decode for the same "
        "particle. Null: for two particles.",
    ),
    "memorisation": Definition(
        "Memorisation",
        "Of the fit to the images that the reference gains over one volume for all, the share that "
        "is also gained without being shown the particle. 1: the input does not matter. Beside "
        "vlt-frozen-zero, on the same particles.",
    ),
    "volume_spread": Definition(
        "Volume spread",
        "Mean squared distance of the numbered particles' volumes to their mean, next to that of "
        "the reference's. 0: one volume for all.",
    ),
    "relative_time": Definition(
        "Relative time", "Seconds per epoch next to those of the first recipe of the table."
    ),
    "coordinate_r2": Definition(
        "Coordinate R²",
        "Share of the coordinate's variance that the mean of the 15 nearest neighbours explains.",
    ),
    "neighbourhood": Definition(
        "Neighbourhood",
        "Share of a particle's nearest neighbours, 5 % of all, that are among as many nearest by "
        "true volume, or as near as those; mean over the sampled particles.",
    ),
    "per_image_fsc": Definition(
        "Per-image FSC",
        "Area under the Fourier shell correlation of the decoded and the true volume of a "
        "particle, from 0 to just below 0.5 cycles per pixel, as in CryoBench; mean. Null: one "
        "volume for all, the mean of the decoded ones.",
        "cycles per pixel",
    ),
    "volume_fve": Definition(
        "Volume variance explained",
        "Share of what the true volumes differ from their mean that the decoded volumes explain, "
        "up to 9/32 cycles per pixel. 0 or less: no better than one true volume for all.",
    ),
}
"""Measure name -> what it is. Numbers and null values: see ``metrics``."""

TIMED = frozenset({"encoding_cost"})
"""Measures that no second evaluation gives again."""

MODE_NOTES = {
    "held": "only the image is transformed; the pose and CTF tables stay as they are (as in the "
    "paper)",
    "follow": "pose and CTF are transformed with the image, so that nothing about the particle "
    "has changed. The network never sees the rotation: the modes differ only in how its image is "
    "centred and phase-flipped",
}

GAIN_BOUNDS = (0.95, 1.05)
"""A gain ratio that is surely outside is said in the headline of a report."""

# Upper end of the retrieval rank, and what is said of it.
_WORDS = (
    (0.01, "stays where its particle is", "good"),
    (0.10, "stays near its particle", "good"),
    (0.25, "moves away from its particle", "fair"),
    (0.45, "loses most of the relation to its particle", "poor"),
    (math.inf, "lands at a place that has next to nothing to do with its particle", "poor"),
)


VERDICT_RULE = (
    "by the largest mean retrieval rank that is not a control. "
    + "; ".join(f"{words}: up to {most:g}" for most, words, _ in _WORDS[:-1])
    + f"; {_WORDS[-1][1]}: above"
)
"""How the headline of a report is chosen."""


@dataclass(frozen=True)
class Verdict:
    """The headline of a report.

    Attributes
    ----------
    tone
        "good", "fair", "poor", or "none" where there is no verdict.
    lines
        One sentence per transform and mode.
    cautions
        Why the numbers may say less than they seem to.
    """

    headline: str
    tone: str
    lines: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()


def number(value: float | None) -> str:
    """Write a number with three significant digits; an en dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value)).replace("-", "−")
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return text.replace("-", "−")


def text_row(m: Measure) -> tuple[str, ...]:
    """Write name, value, interval, null and ideal of a measure in plain ASCII."""
    interval = "-" if m.low is None else f"{plain_number(m.low)} to {plain_number(m.high)}"
    return (m.name, plain_number(m.value), interval, plain_number(m.null), plain_number(m.ideal))


def plain_number(value: float | None) -> str:
    """Write a number as ``number`` does, in plain ASCII."""
    return number(value).replace("–", "-").replace("−", "-")


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns of a table of plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def verdict(evaluation: Evaluation) -> Verdict:
    """Say in plain words whether a transformed copy finds its way back to its particle."""
    if not evaluation.applicable:
        headline = "Amortization: not applicable"
        return Verdict(headline, "none", (evaluation.reason,), _cautions(evaluation))
    if not evaluation.results:
        headline = "Amortization: not measured (no transforms were asked for)"
        return Verdict(headline, "none", (), _cautions(evaluation))
    tests = [r for r in evaluation.results if not r.is_control] or evaluation.results
    known = [r for r in tests if math.isfinite(r.measures["retrieval_rank"].value)]
    lines = tuple(_sentence(r) for r in evaluation.results)
    if not known:
        return Verdict("Amortization: could not be measured", "none", lines, _cautions(evaluation))
    worst = max(known, key=lambda r: r.measures["retrieval_rank"].value)
    words, tone = _words(worst.measures["retrieval_rank"].value)
    rank = number(worst.measures["retrieval_rank"].value)
    headline = f"An image that is {worst.title} {words} (retrieval rank {rank})"
    return Verdict(headline, tone, lines, _cautions(evaluation))


def _words(rank: float) -> tuple[str, str]:
    return next((words, tone) for most, words, tone in _WORDS if rank <= most)


def _sentence(result: TransformResult) -> str:
    m = result.measures["retrieval_rank"]
    interval = f", 95 % interval {number(m.low)} to {number(m.high)}" if _finite(m.low) else ""
    tail = ". A control: centring undoes it" if result.is_control else ""
    return f"{result.title}, {result.mode}: {number(m.value)}{interval}{tail}"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _cautions(evaluation: Evaluation) -> tuple[str, ...]:
    found = []
    if _value(evaluation.measures, "active_units") == 0:
        found.append(
            "No latent dimension is active: all particles lie nearly at one place, and ranks and "
            "distances say little."
        )
    gain = evaluation.measures.get("gain_ratio")
    if gain is not None:
        low, high = (gain.value if end is None else end for end in (gain.low, gain.high))
        least, most = GAIN_BOUNDS
        if high < least or low > most:
            what, why = (
                ("less", "it shows differences that they do not have, or the encoder fails on them")
                if high < least
                else ("more", "it does not show all that they differ by")
            )
            found.append(
                f"Latents of their own gain {what} for particles than for images that the decoder "
                f"makes up (gain ratio {number(gain.value)}): {why}."
            )
    if len(evaluation.z) < 100:
        found.append(f"Only {len(evaluation.z)} particles: small ranks are coarse.")
    return tuple(found)


def _value(measures: dict[str, Measure], name: str) -> float | None:
    return measures[name].value if name in measures else None
