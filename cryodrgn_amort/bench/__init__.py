"""Our training against the installed host: ``python -m cryodrgn_amort.bench``."""
