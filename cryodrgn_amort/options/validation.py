"""What ``validate_amort`` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from cryodrgn_amort.options.fields import Options, flag
from cryodrgn_amort.options.study import NOW, dry_run_flag, jobs_flag

__all__ = ["ValidateOptions"]


@dataclass(frozen=True)
class ValidateOptions(Options):
    """What ``validate_amort`` is asked to do; ``run`` is a folder."""

    run: str = flag("run", metavar="RUN", help="Run folder of train_amort or train_vae")
    outdir: str = flag("-o", "--outdir", metavar="OUT", help="Output folder")
    quick: bool = flag(
        "--quick", default=False,
        help="Train nothing: ask RUN's own decoder, of the particles held out from it, or else of\n"
        "its own. Leaves out heterogeneity and epochs",
    )  # fmt: skip
    nulls: int = flag(
        "--nulls", default=1, least=1, metavar="N",
        help="Data sets like RUN's without heterogeneity, on each of which a half is trained",
    )  # fmt: skip
    sample: int = flag(
        "--sample", default=300, least=20, metavar="N",
        help="Particles of each half that are fitted one by one",
    )  # fmt: skip
    maps: int = flag(
        "--maps", default=6, least=2, metavar="K",
        help="At so many latents particles are selected and backprojected",
    )  # fmt: skip
    bootstrap: int = flag(
        "--bootstrap", default=200, least=20, metavar="N", help="Rounds for the 95 %% intervals"
    )
    seed: int = flag("--seed", default=0, least=0, help="Of halves, nulls, samples and trainings")
    jobs: int | None = jobs_flag()
    dry_run: str | None = dry_run_flag("Run nothing", "OUT")
    part: str | None = flag(
        "--part", default=None, group=NOW, metavar="NAME",
        help="Do this part alone, as the steps of --dry-run do",
    )  # fmt: skip
