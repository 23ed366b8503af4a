from .alternating import AlternatingEncoder as AlternatingEncoder
from .base import LatentModel as LatentModel
from .encoders import Encoder as Encoder
from .linear_model import LinearModel as LinearModel
from .lookup_table import LookupTable as LookupTable
from .objective import Losses as Losses, divergence as divergence, kl_divergence as kl_divergence
from .second_stage import cluster_centres as cluster_centres
from .specs import (
    ENCODERS as ENCODERS,
    INPUTS as INPUTS,
    VLT as VLT,
    EncoderSpec as EncoderSpec,
    InputSpec as InputSpec,
    resolve as resolve,
)
from .step import (
    Lost as Lost,
    NotFiniteError as NotFiniteError,
    Objective as Objective,
    adam as adam,
    keep_rate_on_device as keep_rate_on_device,
    plain_state as plain_state,
    recorded_by as recorded_by,
    set_rate as set_rate,
    train_step as train_step,
)
from .synthetic import (
    SyntheticBatch as SyntheticBatch,
    SyntheticImages as SyntheticImages,
    measure_noise as measure_noise,
    unexplained as unexplained,
    whole_ctf as whole_ctf,
    with_ctf as with_ctf,
)
from .vae import (
    TOKEN_ENCODER as TOKEN_ENCODER,
    TOKEN_TILT_PARAMS as TOKEN_TILT_PARAMS,
    AmortVAE as AmortVAE,
    build_model as build_model,
)
