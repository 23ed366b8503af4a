"""What each measure is, in words: its title, unit and meaning, once for all that shows it."""

from __future__ import annotations

from cryodrgn_amort.measures.definition import Definition
from cryodrgn_amort.measures.posterior_definitions import OF_POSTERIORS

__all__ = [
    "ATTAINABLE",
    "DEFINITIONS",
    "TIMED",
]


DEFINITIONS = {
    "retrieval_rank": Definition(
        "Retrieval rank",
        "Share of the other particles that lie nearer to a particle's transformed copy than the "
        "particle itself does; mean over particles.",
        null=0.5,
        ideal=0.0,
        per_image=True,
    ),
    "top1": Definition(
        "Found again",
        "Share of particles that are the nearest of all particles to their own transformed copy.",
        null="1/N",
        ideal=1.0,
    ),
    "displacement": Definition(
        "Displacement",
        "Distance from a particle to its transformed copy in latent space, next to the median "
        "distance of two random particles; median over particles.",
        "median pair distances",
        null="copies of others",
        ideal=0.0,
        per_image=True,
    ),
    "displacement_sigma": Definition(
        "Displacement in sigma",
        "The same distance in the particle's own posterior standard deviations; median over "
        "particles. Null: random pairs.",
        "standard deviations",
        null="random pairs",
        ideal=0.0,
        per_image=True,
    ),
    "latent_correlation": Definition(
        "Latent correlation",
        "Correlation of latent coordinates before and after, averaged over dimensions by variance.",
        null=0.0,
        ideal=1.0,
    ),
    "label_agreement": Definition(
        "Label agreement",
        "Share of particles whose 15 nearest neighbours vote for the same class before and after. "
        "Null: copies of other particles.",
        null="copies of others",
        ideal=1.0,
    ),
    "amortization_loss_fraction": Definition(
        "Amortization loss fraction",
        "Of the fit to the images that is gained by each particle having its own latent, the "
        "share that is lost with the copy's latent. Above 1: worse than one latent for all.",
        null=1.0,
        ideal=0.0,
    ),
    "control": Definition(
        "Control",
        "Change of the reconstruction loss when image, pose and CTF are transformed together and "
        "the latent stays; mean over particles.",
        "nats per particle",
        ideal=0.0,
    ),
    "volume_change": Definition(
        "Volume change",
        "Distance between the volumes decoded for a particle and for its copy, next to that "
        "between two particles (medians).",
        "median pair distances",
        null=1.0,
        ideal=0.0,
    ),
    "volume_fsc_loss": Definition(
        "Volume FSC loss",
        "1 minus the mean Fourier shell correlation of the volumes decoded for a particle and for "
        "its copy. Null: two particles.",
        null="two particles",
        ideal=0.0,
    ),
    **OF_POSTERIORS,
    "noise_swap_signal": Definition(
        "Noise swap, signal",
        "Latent correlation of a particle with a made-up image: its own noise-free projection in "
        "the noise of another particle, as the encoder was shown that. 1: it sees the signal.",
        null=0.0,
        ideal=1.0,
    ),
    "noise_swap_noise": Definition(
        "Noise swap, noise",
        "The same with the latents of the particle whose noise it is. 1: the encoder recognises "
        "the noise.",
        null=0.0,
        ideal=0.0,
    ),
    **{
        f"nuisance_leak_{name}": Definition(
            f"Nuisance leak, {title}",
            f"Share of the variance of the {what} that the mean of the 15 nearest neighbours in "
            "latent space explains. Null: particles shuffled. Above it, the latents hold what "
            "they should not.",
            null="particles shuffled",
            ideal=0.0,
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
        null=0.0,
    ),
    "kl": Definition(
        "KL",
        "Divergence of a particle's posterior from the prior N(0, I); mean over particles. Near "
        "0, the latents carry no information.",
        "nats per particle",
        null=0.0,
    ),
    "aggregate_kl": Definition(
        "Aggregate KL",
        "Divergence of all posteriors together, as one distribution, from the prior. An upper "
        "estimate: N particles cannot show less than KL - ln N. Near 0, a latent drawn from the "
        "prior is one that a particle could have.",
        "nats",
        ideal=0.0,
    ),
    "kl_per_dimension": Definition(
        "KL per dimension",
        "The KL of each latent dimension; their sum is KL.",
        "nats per particle",
        null=0.0,
    ),
    "reconstruction": Definition(
        "Reconstruction loss",
        "Half the squared distance between a particle's image and the one decoded for it, in units "
        "of the data's standard deviation; mean over the sampled particles, which are the same in "
        "every run of as many particles. Null: the mean latent for all.",
        "nats per particle",
        null="the mean latent for all",
        per_image=True,
    ),
    "class_knn": Definition(
        "Class kNN accuracy",
        "Share of particles whose class is that of most of their 15 nearest neighbours. Null: "
        "guessing by class size.",
        null="class shares",
        ideal=1.0,
        attainable="attainable_class",
    ),
    "heterogeneity_gain": Definition(
        "Heterogeneity gain",
        "By how much the ELBO of latents fitted to particles that the decoder has not seen is "
        "above their log likelihood at the one latent that explains all of them best, by the "
        "noise's spectrum; mean over the particles. Its null is that of a run on particles without "
        "heterogeneity.",
        "nats per particle",
        null="measured",
    ),
    "halves_agreement": Definition(
        "Agreement of the halves",
        "Correlation of the volumes that the decoders of two halves show for a particle, each "
        "minus its mean over particles, up to 16 Fourier pixels; one of them has not seen the "
        "particle.",
        null=0.0,
        ideal=1.0,
    ),
    "halves_agreement_others": Definition(
        "Agreement of the halves, other particles",
        "The same with the volume that the other half shows for another particle.",
        null=0.0,
    ),
    "renoised_spread": Definition(
        "Spread under new noise",
        "Variance of a particle's latent when its decoded image is shown again with new noise, "
        "over what the run's log variances say it should be; median over particles. Above 1: they "
        "are too small.",
        ideal=1.0,
    ),
    "renoised_bias": Definition(
        "Bias under new noise",
        "Distance of the mean of these latents from the latent that was decoded, as the prior "
        "pulls it, in the run's standard deviations (root mean square over dimensions); median "
        "over particles.",
        "standard deviations",
        ideal=0.0,
    ),
    "map_agreement": Definition(
        "Agreement with maps",
        "Correlation of what a half's decoded volumes differ by (each minus their mean) with what "
        "maps differ by that the host backprojects, without a decoder, from the particles that "
        "the other half's decoder selects for them; up to 16 Fourier pixels, a quarter of the box "
        "at most; mean over maps.",
        null=0.0,
        ideal=1.0,
    ),
    "map_agreement_random": Definition(
        "Agreement with random maps",
        "The same with maps of as many particles at random.",
        null=0.0,
    ),
    "map_halves_agreement": Definition(
        "Agreement of maps",
        "The same of the maps of both halves, each selected by the other half's decoder.",
        null=0.0,
        ideal=1.0,
    ),
    "map_halves_agreement_random": Definition(
        "Agreement of random maps", "The same of maps of particles at random.", null=0.0
    ),
    "knn_overlap": Definition(
        "Neighbour overlap",
        "Share of a particle's 15 nearest neighbours in one run that are so in the other; mean.",
        null="15/N",
        ideal=1.0,
    ),
    "linear_cka": Definition(
        "Linear CKA",
        "Alignment of the two sets of latents up to rotation and scale.",
        null=0.0,
        ideal=1.0,
    ),
    "procrustes_disparity": Definition(
        "Procrustes disparity",
        "Squared distance of the two sets after the best translation, rotation and scaling.",
        null=1.0,
        ideal=0.0,
    ),
    "kmeans_ari": Definition(
        "k-means ARI", "Adjusted Rand index of the two runs' k-means clusters.", null=0.0, ideal=1.0
    ),
    "volume_fsc": Definition(
        "Volume FSC",
        "Mean Fourier shell correlation of the volumes that the two runs decode for the same "
        "particle. Null: for two particles.",
        null="two particles",
        ideal=1.0,
    ),
    "memorisation": Definition(
        "Memorisation",
        "Of the fit to the images that the reference gains over one volume for all, the share that "
        "is also gained without being shown the particle. 1: the input does not matter. Beside "
        "vlt-frozen-zero, on the same particles.",
        null=0.0,
    ),
    "volume_spread": Definition(
        "Volume spread",
        "Mean squared distance of the numbered particles' volumes to their mean, next to that of "
        "the reference's. 0: one volume for all.",
        null=0.0,
        ideal=1.0,
    ),
    "relative_time": Definition(
        "Relative time", "Seconds per epoch next to those of the first recipe of the table."
    ),
    "coordinate_r2": Definition(
        "Coordinate R²",
        "Share of the coordinate's variance that the mean of the 15 nearest neighbours explains.",
        null=0.0,
        ideal=1.0,
        attainable="attainable_r2",
    ),
    "neighbourhood": Definition(
        "Neighbourhood",
        "Share of a particle's nearest neighbours, 5 % of all, that are among as many nearest by "
        "true volume, or as near as those; mean over the sampled particles.",
        null="random neighbours",
        ideal=1.0,
        per_image=True,
    ),
    "per_image_fsc": Definition(
        "Per-image FSC",
        "Area under the Fourier shell correlation of the decoded and the true volume of a "
        "particle, from 0 to just below 0.5 cycles per pixel, as in CryoBench; mean. Null: one "
        "volume for all, the mean of the decoded ones.",
        "cycles per pixel",
        null="the mean decoded volume for all",
        ideal="1/2 - 1/D",
        per_image=True,
    ),
    "volume_fve": Definition(
        "Volume variance explained",
        "Share of what the true volumes differ from their mean that the decoded volumes explain, "
        "up to 9/32 cycles per pixel. 0 or less: no better than one true volume for all.",
        null=0.0,
        ideal=1.0,
        attainable="attainable_fve",
    ),
    "attainable_class": Definition(
        "Attainable class accuracy",
        "Share of the sampled particles whose class is the most probable one by the exact "
        "posterior, given the true volumes, poses, CTFs and noise: no method is right more often. "
        "Null: the share of the largest class.",
        null="largest class share",
        ideal=1.0,
    ),
    "attainable_r2": Definition(
        "Attainable R²",
        "Share of the coordinate's variance that its mean by the same posterior explains: no "
        "method explains more.",
        null=0.0,
        ideal=1.0,
    ),
    "attainable_fve": Definition(
        "Attainable variance explained",
        "Volume variance explained by the mean volume of the same posterior: no method explains "
        "more.",
        null=0.0,
        ideal=1.0,
    ),
}
"""Measure name -> what it is: the only list of them."""
ATTAINABLE = {name: d.attainable for name, d in DEFINITIONS.items() if d.attainable}
"""Measure name -> the measure that says what the data allow of it."""
TIMED = frozenset({"encoding_cost"})
"""Measures that no second evaluation gives again."""
