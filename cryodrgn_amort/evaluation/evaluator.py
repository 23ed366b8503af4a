"""Evaluate a run: encode particles and transformed copies, decode, measure; one result object."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

import numpy as np

from cryodrgn_amort.core import InputError, matrix_products
from cryodrgn_amort.evaluation.fits import fit_results
from cryodrgn_amort.evaluation.run_measures import calibrated, run_measures
from cryodrgn_amort.evaluation.subject import Own, Subject
from cryodrgn_amort.evaluation.transform_results import transform_results
from cryodrgn_amort.measures import Neighbours, embed, kl_by_dimension
from cryodrgn_amort.report import Evaluation

if TYPE_CHECKING:
    from cryodrgn_amort.core import ProcessGroup
    from cryodrgn_amort.evaluation.codec import Posteriors
    from cryodrgn_amort.measures import Measure
    from cryodrgn_amort.options import EvalOptions
    from cryodrgn_amort.runs import Run


__all__ = ["assist", "evaluate"]
logger = logging.getLogger("cryodrgn_amort")


@matrix_products()
def evaluate(run: Run, options: EvalOptions, processes: ProcessGroup | None = None) -> Evaluation:
    """Measure a run. Reads only; writing is ``report.write_evaluation``.

    Parameters
    ----------
    processes
        Processes that share the encoding. This is the leading one; the others call ``assist``.

    Raises
    ------
    InputError
        If the inputs are gone or do not fit, or a transform cannot be applied to this run.
    """
    run = run.multiplying(options.precision)
    subject = Subject(run, options, processes)
    clock, codec = subject.clock, subject.codec
    z, logvar = run.z()
    if len(z) != subject.particles.n:
        raise InputError(
            f"RUN {run.folder}: has latents of {len(z)} particles, its inputs hold "
            f"{subject.particles.n}"
        )
    copies: Posteriors = {}
    if codec.shown is not None:
        with clock.stage("encoding"):
            z, logvar, copies = codec.encode(subject.transforms)
    mean = np.broadcast_to(z.mean(0, dtype=np.float64), z.shape)
    with clock.stage("reconstruction"):
        losses = codec.losses({"own": z, "mean": mean}, subject.sample)
    own = Own(z, logvar, losses, Neighbours(z, subject.queries))
    measures, arrays = run_measures(subject, own)
    labelled = subject.labelled
    with clock.stage("volumes"):
        volumes = codec.volumes(z[subject.volume_sample if copies else labelled])
        shown = np.stack(list(itertools.islice(volumes(), len(labelled))))
    result = _result(subject, own, measures, arrays, shown)
    if copies:
        result.results = transform_results(subject, own, copies, volumes)
    if options.fit and not run.autodecoder:  # that has no posteriors
        with clock.stage("fits"):
            result.fits = fit_results(subject)
    if options.fit and run.shows_particles and codec.shown is not None:
        with clock.stage("calibration"):
            result.calibration, more = calibrated(subject, own)
            result.measures |= {m.name: m for m in more}
    result.allow()
    with clock.stage("embeddings"):
        moved = {r.key: r.z[labelled] for r in result.mapped}
        result.embeddings = embed(z, labelled, moved, options.seed, umap=options.umap)
    logger.info(f"Evaluated in {clock}")
    return result


def _result(
    subject: Subject,
    own: Own,
    measures: dict[str, Measure],
    arrays: dict[str, np.ndarray],
    volumes: np.ndarray,
) -> Evaluation:
    """Put together what was measured of the run itself."""
    run, particles, known = subject.run, subject.particles, subject.known
    posteriors = np.isfinite(own.logvar).all()
    return Evaluation(
        run=run,
        options=subject.options,
        applicable=subject.codec.shown is not None,
        z=own.z,
        logvar=own.logvar,
        apix=1.0 if particles.ctf_params is None else float(particles.ctf_params[0, 0]),
        index=np.arange(particles.n) if particles.ind is None else particles.ind,
        total=particles.total,
        left_out=run.odd,
        measures=measures,
        labelled=subject.labelled,
        volumes=volumes,
        arrays=arrays,
        kl_per_dimension=kl_by_dimension(own.z, own.logvar).mean(0) if posteriors else None,
        labels=known.labels,
        coordinate=known.coordinate,
        label_names=known.label_names,
    )


@matrix_products()
def assist(run: Run, options: EvalOptions, processes: ProcessGroup) -> None:
    """Encode what falls to this process, for another one's ``evaluate``.

    Raises
    ------
    InputError
        As ``evaluate``.
    """
    subject = Subject(run.multiplying(options.precision), options, processes)
    if subject.codec.shown is not None:
        subject.codec.encode(subject.transforms)
