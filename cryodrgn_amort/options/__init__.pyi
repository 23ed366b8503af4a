from .comparison import CompareOptions as CompareOptions, TimingOptions as TimingOptions
from .digits import METHODS as METHODS, MnistSettings as MnistSettings
from .encoder_flags import (
    LINEAR as LINEAR,
    STARTS as STARTS,
    AnchorFlags as AnchorFlags,
    TableFlags as TableFlags,
    TurnFlags as TurnFlags,
)
from .evaluation import EvalOptions as EvalOptions
from .fields import add_flags as add_flags, of_kind as of_kind
from .inference import InferOptions as InferOptions
from .keywords import parsed_keywords as parsed_keywords
from .recipes import RECIPES as RECIPES, REPAIR as REPAIR, Recipe as Recipe
from .simulation import MOST_CLASSES as MOST_CLASSES, SimulateOptions as SimulateOptions
from .study import ScoresOptions as ScoresOptions, StudyOptions as StudyOptions
from .train import (
    REPLACED as REPLACED,
    TrainSettings as TrainSettings,
    check_mode as check_mode,
    flag_name as flag_name,
)
from .validation import ValidateOptions as ValidateOptions
