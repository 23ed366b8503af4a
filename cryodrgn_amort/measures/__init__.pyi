from .agreement import (
    kmeans_ari as kmeans_ari,
    knn_overlap as knn_overlap,
    linear_cka as linear_cka,
    procrustes_disparity as procrustes_disparity,
)
from .attainable import (
    StructurePosterior as StructurePosterior,
    structure_posterior as structure_posterior,
    with_attainable as with_attainable,
)
from .bootstrap import (
    Measure as Measure,
    measure as measure,
    ratio as ratio,
    ratio_of_means as ratio_of_means,
    single as single,
)
from .calibration import (
    Calibration as Calibration,
    calibration_measures as calibration_measures,
    ecdf as ecdf,
    ecdf_band as ecdf_band,
)
from .catalogue import (
    DEFINITIONS as DEFINITIONS,
    TIMED as TIMED,
)
from .definition import Definition as Definition
from .embeddings import Embedding as Embedding, embed as embed
from .gaps import (
    FitValues as FitValues,
    class_measures as class_measures,
    fit_measures as fit_measures,
    told_classes as told_classes,
)
from .importance import SAMPLES as SAMPLES, tail_shapes as tail_shapes
from .latents import (
    MOST_QUERIES as MOST_QUERIES,
    OF_LATENTS as OF_LATENTS,
    K as K,
    Neighbours as Neighbours,
    class_knn as class_knn,
    coordinate_r2 as coordinate_r2,
    knn_coordinate as knn_coordinate,
    knn_labels as knn_labels,
    latent_correlation as latent_correlation,
    looked_up as looked_up,
    neighbourhood as neighbourhood,
    nuisances as nuisances,
)
from .losses import (
    aggregate_kl as aggregate_kl,
    kl_by_dimension as kl_by_dimension,
    memorisation as memorisation,
)
from .tables import (
    measure_facts as measure_facts,
    text_row as text_row,
    text_share as text_share,
)
from .transformed_copies import (
    MovedLosses as MovedLosses,
    moved_arrays as moved_arrays,
    moved_measures as moved_measures,
    retrieval_rank as retrieval_rank,
    spread as spread,
)
from .volumes import (
    fourier_radius as fourier_radius,
    fsc as fsc,
    fve_radius as fve_radius,
    fve_voxels as fve_voxels,
    volume_change as volume_change,
    volume_errors as volume_errors,
    volume_fve as volume_fve,
    with_before as with_before,
)
