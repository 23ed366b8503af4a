from .evaluation_page import Section as Section
from .evaluation_report import (
    check_outdir as check_outdir,
    evaluation_summary as evaluation_summary,
    write_evaluation as write_evaluation,
)
from .html import (
    Picture as Picture,
    Turnable as Turnable,
    capital as capital,
    environment as environment,
    picture as picture,
    turnable as turnable,
)
from .meshes import (
    THRESHOLD_RULE as THRESHOLD_RULE,
    common_reach as common_reach,
    isosurfaces as isosurfaces,
    render as render,
)
from .methods import CITATION as CITATION
from .notebook import Figures as Figures, Result as Result, frame as frame
from .plots import (
    MOST_VOLUMES as MOST_VOLUMES,
    MOVED as MOVED,
    ORIGINAL as ORIGINAL,
    STYLE as STYLE,
    draw_volume as draw_volume,
    particle_colours as particle_colours,
    particle_numbers as particle_numbers,
)
from .results import (
    MODES as MODES,
    NOT_APPLICABLE as NOT_APPLICABLE,
    Evaluation as Evaluation,
    FitResult as FitResult,
    TransformResult as TransformResult,
)
