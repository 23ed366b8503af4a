from .bounds import (
    ElboScale as ElboScale,
    anchored as anchored,
    elbo as elbo,
)
from .fitter import Fitter as Fitter
from .gaps import fit_values as fit_values
from .inferred import inferred_summary as inferred_summary
from .optimisation import FitOptions as FitOptions, Fitted as Fitted, fit as fit, infer as infer
from .posteriors import infer_run as infer_run
