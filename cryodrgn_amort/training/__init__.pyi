from .timing import (
    time_epochs as time_epochs,
    times_table as times_table,
    write_times as write_times,
)
from .trainer import Trainer as Trainer, train_run as train_run
