from .perform import Validated as Validated, validate_run as validate_run
