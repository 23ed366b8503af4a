"""What the measures of posteriors are: fitted ones, and how far an encoder's can be believed."""

from __future__ import annotations

from cryodrgn_amort.measures.definition import Definition

__all__ = ["OF_POSTERIORS"]


OF_POSTERIORS = {
    "amortization_gap": Definition(
        "Amortization gap",
        "By how much the ELBO of a posterior that was fitted to a particle alone is above that of "
        "the encoder's answer, or of its row of the table, with the same decoder; mean over the "
        "sampled particles.",
        "nats per particle",
        ideal=0.0,
    ),
    "generalisation_gap": Definition(
        "Generalisation gap",
        "The amortization gap of particles that were held out, minus that of as many that were "
        "trained on: what is lost because the encoder never saw them.",
        "nats per particle",
        ideal=0.0,
    ),
    "held_out_score": Definition(
        "Held-out score",
        "Of the fit to the images of held-out particles that fitted latents gain over one latent "
        "for all, the share that the encoder's latents gain. 0: the encoder is no better than a "
        "constant; below: worse.",
        null=0.0,
        ideal=1.0,
    ),
    "training_score": Definition(
        "Training score",
        "The same of particles that were trained on: what the encoder's latents, or the table's "
        "rows, gain over one latent for all, of what fitted ones gain.",
        null=0.0,
        ideal=1.0,
    ),
    "approximation_gap": Definition(
        "Approximation gap",
        "By how much an importance-weighted bound of log p(x), with 500 samples, is above the ELBO "
        "of the fitted posterior: what is lost because posteriors are Gaussians without "
        "correlations. A lower estimate.",
        "nats per particle",
        ideal=0.0,
    ),
    "khat": Definition(
        "Pareto k-hat",
        "Shape of the tail of the importance weights behind the approximation gap (Vehtari et al., "
        "arXiv 1507.02646); median over particles. Up to 0.63 they can be believed; above, the "
        "fitted posterior misses a part of the true one, and no gap is to be trusted.",
        ideal=0.0,
    ),
    "khat_high": Definition(
        "k-hat too high",
        "Share of the fitted particles whose k-hat is above 0.63, the limit for 500 samples.",
        ideal=0.0,
    ),
    "effective_samples": Definition(
        "Effective samples",
        "How many of the 500 samples their importance weights are worth, as a share of them; mean "
        "over particles. 1: the fitted posterior is the true one.",
        ideal=1.0,
    ),
    **{
        f"coverage_{level}": Definition(
            f"Coverage at {level} %",
            f"How often the central {level} % interval of a posterior holds the true latent, by "
            "dimension, of images that the run's decoder makes up. Less: the encoder is too sure; "
            "more: not sure enough.",
            ideal=level / 100,
        )
        for level in (50, 80, 95)
    },
    "calibration_p": Definition(
        "Calibration, p",
        "How likely right posteriors are as far from right as the encoder's, by images that the "
        "decoder makes up: by the places of the true latents in each dimension, by what they "
        "explain of the image next to the posterior's draws, and by how near both are to another "
        "image's latent; the least of them, times their number. Below 0.05: intervals are wrong.",
        ideal=1.0,
    ),
    "likelihood_rank": Definition(
        "Likelihood rank",
        "Share of the posterior's draws that explain an image made up worse than its true latent "
        "does; mean over images. Above 0.5: the posterior is off or too wide; one that is the "
        "prior has right intervals, but a rank near 1.",
        ideal=0.5,
    ),
    "made_up_distance": Definition(
        "Distance of made-up images",
        "Energy distance of particles (held-out ones, if there are any) and images that the "
        "decoder makes up, by their power in shells; 0: alike, 1: nothing in common. Above the "
        "null, what 95 % of random divisions stay below: they can be told apart, by noise, "
        "contrast or junk.",
        null="random divisions",
        ideal=0.0,
    ),
    "class_knn_held_out": Definition(
        "Class kNN, held out",
        "Share of held-out particles whose class is that of most of the 15 training particles "
        "nearest to the encoder's latent. Null: guessing by class size.",
        null="class shares",
        ideal=1.0,
        attainable="attainable_class",
    ),
    "coordinate_r2_held_out": Definition(
        "Coordinate R², held out",
        "Share of the variance of held-out particles' coordinate that the mean of the 15 training "
        "particles nearest to the encoder's latents explains.",
        null=0.0,
        ideal=1.0,
        attainable="attainable_r2",
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
        null=0.0,
        ideal=1.0,
    ),
    "converged": Definition(
        "Converged", "Share of the fitted particles whose ELBO had stopped improving.", ideal=1.0
    ),
    "class_knn_encoder": Definition(
        "Class kNN, encoder",
        "Class kNN, held out, of the particles that were fitted.",
        null="class shares",
        ideal=1.0,
        attainable="attainable_class",
    ),
    "class_knn_fitted": Definition(
        "Class kNN, fitted",
        "The same with the fitted latents: what the decoder makes possible.",
        null="class shares",
        ideal=1.0,
        attainable="attainable_class",
    ),
}
"""Part of the catalogue, in its order."""
