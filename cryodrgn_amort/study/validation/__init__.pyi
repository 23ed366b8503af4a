from .parts import do_part as do_part
from .plan import Validation as Validation
from .report import write_validation as write_validation
