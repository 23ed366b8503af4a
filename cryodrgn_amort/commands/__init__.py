"""Our subcommands of ``cryodrgn``: one module each, no logic of their own."""
