from .again import settings_argv as settings_argv, trained_settings as trained_settings
from .config import (
    CHOSEN as CHOSEN,
    HOLDOUT as HOLDOUT,
    INPUT_FILES as INPUT_FILES,
    INPUTS as INPUTS,
    TRAINED as TRAINED,
    model_args as model_args,
    source_of as source_of,
    write_config as write_config,
)
from .flags import (
    inherited as inherited,
    settings_from_flags as settings_from_flags,
    with_run as with_run,
)
from .parser import add_train_flags as add_train_flags
from .reader import Run as Run, load_run as load_run
from .table import write_table as write_table
from .writer import METRICS as METRICS, NOISE as NOISE, RunFolder as RunFolder
