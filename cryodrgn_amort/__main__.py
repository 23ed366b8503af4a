"""``python -m cryodrgn_amort COMMAND``: the same as the ``cryodrgn_amort`` script."""

from cryodrgn_amort.cli import main

if __name__ == "__main__":
    main()
