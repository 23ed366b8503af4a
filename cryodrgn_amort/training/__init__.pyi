from .from_flags import train_run as train_run
from .timing import (
    endless_steps as endless_steps,
    time_epochs as time_epochs,
    times_table as times_table,
    write_times as write_times,
)
from .trainer import Trainer as Trainer
