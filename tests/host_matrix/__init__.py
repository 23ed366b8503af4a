"""What the unmodified ``cryodrgn`` makes of our run folders: ``bash tests/host_matrix.sh``."""
