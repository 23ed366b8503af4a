from .checks import COMMANDS as COMMANDS
from .facts import claims_table as claims_table
from .planfile import changed_plan as changed_plan, load_plan as load_plan, write_plan as write_plan
from .progress import commands_line as commands_line
from .report import write_study_report as write_study_report
from .results import read_study as read_study
from .runner import (
    check_inputs as check_inputs,
    default_jobs as default_jobs,
    run_steps as run_steps,
    work_locked as work_locked,
)
from .snakefile import snakemake_rules as snakemake_rules
from .steps import work_of as work_of
