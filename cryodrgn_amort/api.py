"""What ``import cryodrgn_amort as ca`` offers to scripts and notebooks: the commands as functions.

They raise ``InputError``, a ``ValueError``, where the commands print a line and exit. Arrays are
numpy's, tables are pandas', figures are matplotlib's and leave the state of pyplot alone. Paths are
strings or ``pathlib.Path``.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_amort.core import InputError, Stopped
from cryodrgn_amort.evaluation import compare, evaluate as _evaluate
from cryodrgn_amort.inference import infer_run
from cryodrgn_amort.options import (
    CompareOptions,
    EvalOptions,
    InferOptions,
    SimulateOptions,
    ValidateOptions,
    parsed_keywords,
)
from cryodrgn_amort.plugins import load_plugins
from cryodrgn_amort.report import Figures, Result, frame
from cryodrgn_amort.runs import Run, add_train_flags, load_run as _load_run
from cryodrgn_amort.simulation import Simulation, simulate
from cryodrgn_amort.study.validation import Validated, validate_run
from cryodrgn_amort.training import train_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    Location = str | os.PathLike[str]
    PerParticle = Location | np.ndarray | Sequence[Any]

__all__ = [
    "Figures",
    "InputError",
    "Result",
    "Run",
    "Simulation",
    "Stopped",
    "Validated",
    "compare_runs",
    "evaluate",
    "infer",
    "load_run",
    "simulate_particles",
    "train",
    "validate",
]


def load_run(folder: Location, epoch: int | None = None) -> Run:
    """Open a run folder of ``train_amort``, ``train_vae``, ``train_dec`` or ``infer_amort``.

    Parameters
    ----------
    epoch
        Which epoch; the latest one that is complete unless given.

    Returns
    -------
    Run
        With latents ``z_mu`` and ``z_logvar`` `(N, zdim)`, ``volumes(z)``, ``epoch``, ``config``.

    Raises
    ------
    InputError
        If the folder is no such run, or does not have that epoch.

    Examples
    --------
    >>> run = load_run("baseline")
    >>> run.z_mu.shape
    (60, 2)
    >>> run.volumes(run.z_mu[:3]).shape
    (3, 16, 16, 16)
    """
    return _load_run(folder, load_plugins(), epoch)


def train(particles: Location | None = None, *, outdir: Location, **flags: Any) -> Run:
    """Train as ``cryodrgn train_amort`` does, in this process.

    Parameters
    ----------
    particles
        Not needed with ``from_run=``.
    **flags
        Those of the command, with underscores: ``poses=``, ``ctf=``, ``zdim=``, ``num_epochs=``,
        ``enc_dim=``, ``encoder="vlt"``, ``load="latest"``, ``no_window=True``; ``from_run=`` is
        ``--from``. ``do_analysis=True`` lets ``cryodrgn analyze`` run at the end, as the command
        does by itself.

    Returns
    -------
    Run
        At its last epoch.

    Raises
    ------
    InputError
        If a flag does not exist, has no such value, or does not go with another one; or if inputs
        do not fit. Nothing has been written then.
    Stopped
        If it was interrupted (SIGTERM, Ctrl-C, a notebook's stop button); what was done is kept,
        and ``load="latest"`` goes on.

    Examples
    --------
    >>> run = train("data/particles.mrcs", poses="data/poses.pkl", ctf="data/ctf.pkl", zdim=2,
    ...             encoder="vlt", dec_dim=16, dec_layers=1, num_epochs=1, seed=0, outdir="table")
    >>> run
    <Run table, epoch 1, --encoder vlt, zdim 2>
    """
    start = flags.get("from_run")
    if isinstance(start, Run):
        flags["from_run"] = start.folder
    given = {"particles": particles, "outdir": outdir, "do_analysis": False, **flags}
    plugins = load_plugins()
    parsed = parsed_keywords(lambda parser: add_train_flags(parser, plugins), given)
    trainer = train_run(vars(parsed), plugins)
    trainer.processes.wait()  # until the leading process has written all
    return load_run(outdir)


def evaluate(
    run: Run,
    transforms: str | Sequence[str] = EvalOptions.transforms,
    *,
    labels: PerParticle | None = None,
    coordinate: PerParticle | None = None,
    truth: Location | None = None,
    fit: int = EvalOptions.fit,
    **options: Any,
) -> Result:
    """Measure a run as ``cryodrgn eval_amort`` does; writes nothing.

    Parameters
    ----------
    transforms
        Changes of the image, ``NAME`` or ``NAME:ARGUMENT``; none if empty.
    labels, coordinate
        A class and a number for each particle `(N,)`: of the run's particles, or of the whole
        stack. Arrays, or paths of pickled ones.
    truth
        Output folder of ``simulate_amort`` that the particles are from.
    fit
        Number of particles whose posteriors are fitted, to see what the encoder loses; and of
        particles held out.
    **options
        Others of ``cryodrgn_amort.options.EvalOptions``: ``bootstrap=``, ``umap=False``,
        ``particles=``, if they have moved, and more.

    Raises
    ------
    InputError
        If the run's inputs are gone or do not fit, or a transform cannot be applied to it.

    Examples
    --------
    >>> run = load_run("baseline")
    >>> result = evaluate(run, "roll:1", labels="data/labels.pkl", fit=2, bootstrap=10, umap=False)
    >>> result.table.columns.to_list()[3:]
    ['value', 'low', 'high', 'null', 'ideal', 'n']
    >>> result.table.query("mode == 'held' and measure == 'retrieval_rank'").null.item()
    0.5
    >>> result.per_particle["rank.roll-1.held"].between(0, 1).all()
    np.True_
    >>> list(result.plot())
    ['latents', 'ranks']
    """
    given = {
        "transforms": (transforms,) if isinstance(transforms, str) else tuple(transforms),
        "labels": _per_particle(labels),
        "coordinate": _per_particle(coordinate),
        "truth": truth,
        "fit": fit,
        **options,
    }
    found = _evaluate(_opened(run), EvalOptions.of_keywords(given))
    return Result(**{f.name: getattr(found, f.name) for f in fields(found)})


def infer(
    run: Run,
    outdir: Location,
    particles: Location | None = None,
    *,
    starts: str | Sequence[str] | None = None,
    beta: str | float = InferOptions.beta,
    steps: int | None = InferOptions.steps,
    **options: Any,
) -> Run:
    """Fit latents particle by particle with a run's decoder, as ``cryodrgn infer_amort`` does.

    Parameters
    ----------
    outdir
        Is written: a table run with the decoder of ``run``.
    particles
        New ones, with ``poses=`` and ``ctf=``; without, the run's own.
    starts
        Where fits start; the best result of each particle is kept. "encoder", "anchors", "mean",
        "prior"; None: the encoder's answer, where it has one, and "anchors".
    beta
        Weight of the KL divergence: "train", "implied" by the noise in the images, or a number.
    steps
        At most so many per particle and start; 0: the starts as they are. None: 400; but of more
        than 500 particles, unless ``starts`` are given, 30 from "anchors" alone.
    **options
        Others of ``cryodrgn_amort.options.InferOptions``: ``held_out=True``, ``overwrite=True``
        and more.

    Returns
    -------
    Run
        The one in ``outdir``.

    Raises
    ------
    InputError
        If inputs, options or folder do not fit; nothing has been written then.

    Examples
    --------
    >>> fitted = infer(load_run("baseline"), "fitted", steps=5)
    >>> fitted.z_mu.shape
    (60, 2)
    """
    given = {
        "particles": particles,
        "starts": (starts,) if isinstance(starts, str) else starts,
        "beta": str(beta),
        "steps": steps,
        **options,
    }
    infer_run(_opened(run), InferOptions.of_keywords(given), os.fspath(outdir))
    return load_run(outdir)


def compare_runs(*runs: Run, volumes: int = CompareOptions.volumes, **options: Any) -> pd.DataFrame:
    """Measure the agreement of runs of the same particles, as ``cryodrgn compare_amort`` does.

    Parameters
    ----------
    volumes
        Number of particles whose decoded volumes are compared; 0: none.
    **options
        Others of ``cryodrgn_amort.options.CompareOptions``: ``clusters=``, ``bootstrap=``,
        ``seed=``.

    Returns
    -------
    pandas.DataFrame
        A row for each measure of each pair: ``first``, ``second`` (folders), ``only_seed`` (they
        differ in nothing else: the agreement to hold others against), ``measure``, and the columns
        of ``Result.table``.

    Raises
    ------
    InputError
        If there are fewer than two runs, or they are not of the same particles.

    Examples
    --------
    >>> agreement = compare_runs(load_run("baseline"), load_run("vlt"), volumes=2, bootstrap=10)
    >>> agreement.measure.to_list()[:2]
    ['knn_overlap', 'linear_cka']
    """
    asked = CompareOptions.of_keywords({"volumes": volumes, **options})
    pairs = compare(list(map(_opened, runs)), asked)
    return frame(
        ("first", "second", "only_seed"),
        ((p.first, p.second, p.only_seed, m) for p in pairs for m in p.measures.values()),
    )


def validate(run: Run, outdir: Location, **options: Any) -> Validated:
    """Ask what of a run is in its particles, as ``cryodrgn validate_amort`` does.

    Goes on where an earlier call has stopped.

    Parameters
    ----------
    outdir
        Where halves, fits, ``report.html`` and ``validation.json`` are written.
    **options
        Others of ``cryodrgn_amort.options.ValidateOptions``: ``quick=True``, ``nulls=`` and more.

    Returns
    -------
    Validated
        Its ``answers`` have ``question``, ``said`` ("yes", "no", "cannot tell"), ``because`` and
        ``do``.

    Raises
    ------
    InputError
        If the run cannot be validated, the folder is another's, or a step failed.

    Examples
    --------
    >>> found = validate(load_run("vlt"), "valid")  # doctest: +SKIP
    >>> [(answer.question, answer.said) for answer in found.answers]  # doctest: +SKIP
    """
    given = {"run": os.fspath(_opened(run).folder), "outdir": os.fspath(outdir), **options}
    found = validate_run(run, ValidateOptions.of_keywords(given), run.plugins)
    if isinstance(found, str):
        raise InputError("dry_run, part: are for the command line")
    return found


def simulate_particles(
    outdir: Location,
    *,
    n: int | None = None,
    heldout: int = SimulateOptions.heldout,
    D: int | None = None,
    snr: float | None = SimulateOptions.snr,
    **options: Any,
) -> Simulation:
    """Simulate particles with known heterogeneity, as ``cryodrgn simulate_amort`` does.

    Parameters
    ----------
    n, heldout
        Particles for training (2000 unless given), and held out; the stack holds both, mixed.
    D
        Box size in pixels (32 unless given).
    snr
        Variance of the noise-free images over that of the noise.
    **options
        Others of ``cryodrgn_amort.options.SimulateOptions``: ``classes=``, ``hinge_deg=``,
        ``volumes=``, ``atoms=``, ``turn=``, ``like=``, ``homogeneous=True``, ``poses=``,
        ``ctf=``, ``seed=``, ``overwrite=True``
        and more.

    Returns
    -------
    Simulation
        Its ``outdir`` holds particles.mrcs, poses.pkl, ctf.pkl, and the truth: labels.pkl,
        coordinate.pkl, volumes/, ind_train.pkl, ind_heldout.pkl.

    Raises
    ------
    InputError
        If a value makes no sense, or the folder holds a simulation.

    Examples
    --------
    >>> data = simulate_particles("small", n=4, D=16, seed=0)
    >>> sorted(path.name for path in data.outdir.glob("*.mrcs"))
    ['particles.mrcs']
    """
    given = {"n": n, "heldout": heldout, "D": D, "snr": snr, **options}
    asked = SimulateOptions.of_keywords({"outdir": os.fspath(outdir), **given})
    return simulate(asked, load_plugins())


def _opened(run: Run) -> Run:
    if not isinstance(run, Run):
        raise InputError(f"run {run!r}: not a run; open its folder by load_run")
    return run


def _per_particle(values: PerParticle | None) -> str | np.ndarray | None:
    """Return a path as text and anything else as an array; words are not Python objects there."""
    if values is None or isinstance(values, str | os.PathLike):
        return None if values is None else os.fspath(values)
    found = np.asarray(values)
    words = found.dtype.kind == "O" and all(isinstance(value, str) for value in found.flat)
    return found.astype(str) if words else found
