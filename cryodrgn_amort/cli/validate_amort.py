"""Is it in the particles? A verdict on a run of your own, without any truth.

Trains halves of the particles with RUN's settings, and a half of particles that are like them but
have no heterogeneity; asks what each decoder explains of particles that it has not seen. Ends in
report.html: is there heterogeneity, was it trained for long enough, are the poses right, which
particles are not explained. A call that was killed goes on where it stopped.

Example usage
-------------
$ cryodrgn validate_amort outs/vlt -o outs/vlt-valid

# Train nothing: poses and misfits by RUN's own decoder
$ cryodrgn validate_amort outs/vlt -o outs/vlt-quick --quick

# The commands, for a scheduler; then the first call makes the report
$ cryodrgn validate_amort outs/vlt -o outs/vlt-valid --dry-run

"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryodrgn_amort.options import ValidateOptions, add_flags

if TYPE_CHECKING:
    import argparse


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``ValidateOptions``."""
    add_flags(parser, ValidateOptions)


def main(args: argparse.Namespace) -> None:
    """Validate."""
    from cryodrgn_amort.plugins import load_plugins
    from cryodrgn_amort.runs import load_run
    from cryodrgn_amort.study.validation import validate_run

    options, plugins = ValidateOptions.of(args), load_plugins()
    print(validate_run(load_run(options.run, plugins), options, plugins))
