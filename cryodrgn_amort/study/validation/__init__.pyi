from .case import Case as Case
