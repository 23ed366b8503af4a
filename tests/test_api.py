"""The Python API, as a script or a notebook uses it, and examples/amortization.ipynb."""

import doctest
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import read_pickles
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import cryodrgn_amort as ca
from cryodrgn_amort import api

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples/amortization.ipynb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a simulation and the runs that the examples name."""
    folder = tmp_path_factory.mktemp("api")
    data = ca.simulate_particles(folder / "data", n=60, heldout=8, D=16, seed=0)
    given = {"poses": data.outdir / "poses.pkl", "ctf": data.outdir / "ctf.pkl", "zdim": 2,
             "num_epochs": 1, "dec_dim": 16, "dec_layers": 1, "seed": 0,
             "ind": data.outdir / "ind_train.pkl"}  # fmt: skip
    for name, more in (("baseline", {"enc_dim": 16}), ("vlt", {"encoder": "vlt"})):
        ca.train(data.outdir / "particles.mrcs", outdir=folder / name, **given, **more)
    return folder


def test_everything_is_there_and_documented():
    assert set(ca.__all__) <= set(dir(ca))
    for name in ca.__all__:
        found = getattr(ca, name)
        if name.startswith("__") or name == "hookimpl":
            continue
        assert inspect.getdoc(found), name
        if inspect.isfunction(found):
            text = inspect.getdoc(found)
            assert "Raises\n------" in text, name
            assert "Examples\n--------" in text, name
    for cls in (ca.Result, ca.Run, ca.Figures):
        for name, member in vars(cls).items():
            if not name.startswith("_") and (callable(member) or isinstance(member, property)):
                assert inspect.getdoc(member), f"{cls.__name__}.{name}"


def test_the_examples_in_docstrings(folder, monkeypatch):
    monkeypatch.chdir(folder)
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    order = (
        "load_run",
        "train",
        "evaluate",
        "infer",
        "compare_runs",
        "simulate_particles",
        "validate",
    )
    for name in order:
        for test in finder.find(getattr(api, name), name, globs=vars(api).copy()):
            runner.run(test)
    results = runner.summarize()
    assert results.attempted > 10
    assert results.failed == 0


def test_a_run_is_arrays(folder):
    run = ca.load_run(folder / "baseline")
    mean, logvar = read_pickles(folder / "baseline/z.pkl", 2)
    np.testing.assert_array_equal(run.z_mu, mean)
    np.testing.assert_array_equal(run.z_logvar, logvar)
    assert run.n == 60
    assert run.epoch == 1
    volumes = run.volumes(run.z_mu[:2])
    assert volumes.shape == (2, 16, 16, 16)
    assert not np.array_equal(volumes[0], volumes[1])


def test_an_evaluation_is_tables_and_figures(folder, tmp_path):
    run = ca.load_run(folder / "baseline")
    labels = read_pickles(folder / "data/labels.pkl")
    opened = plt.get_fignums()
    result = ca.evaluate(run, "roll:1", labels=labels, fit=3, bootstrap=5, volumes=3, umap=False)
    table, each = result.table, result.per_particle
    assert isinstance(table, pd.DataFrame)
    held = table.query("transform == 'roll:1' and mode == 'held' and measure == 'retrieval_rank'")
    rank = each["rank.roll-1.held"]
    assert held["value"].item() == pytest.approx(rank.mean(), abs=1e-6)
    assert held["null"].item() == 0.5
    assert len(each) == 60
    assert set(each["particle"]) == set(read_pickles(folder / "data/ind_train.pkl"))
    figures = result.plot()
    assert list(figures) == ["latents", "ranks"]
    assert all(isinstance(figure, Figure) for figure in figures.values())
    assert plt.get_fignums() == opened  # pyplot is left alone
    assert figures._repr_html_().count("data:image/png;base64,") == 2
    assert "retrieval_rank" in result._repr_html_()
    with pytest.raises(ca.InputError, match="there are latents"):
        result.plot("nothing")
    report = result.save(tmp_path / "saved")
    assert report.name == "report.html"
    facts = json.loads((tmp_path / "saved/amortization.json").read_text())
    assert facts["options"]["labels"] == "68 values"


def test_runs_are_compared_and_fitted(folder, tmp_path):
    run = ca.load_run(folder / "baseline")
    agreement = ca.compare_runs(run, run, volumes=2, bootstrap=5)
    knn = agreement.query("measure == 'knn_overlap'")
    assert knn["value"].item() == 1
    fitted = ca.infer(run, tmp_path / "fitted", steps=3)
    assert fitted.z_mu.shape == (60, 2)


def test_mistakes_are_value_errors(folder, tmp_path):
    for call, says in (
        (lambda: ca.load_run(tmp_path), "not a run folder"),
        (lambda: ca.train("p.mrcs", outdir=tmp_path / "x", zdmi=2), "is zdim meant"),
        (lambda: ca.train("p.mrcs", outdir=tmp_path / "x", zdim="two"), "zdim"),
        (lambda: ca.evaluate(ca.load_run(folder / "baseline"), "flip"), "flip: unknown"),
        (lambda: ca.simulate_particles(tmp_path / "x", D=15), "-D 15"),
        (lambda: ca.simulate_particles(tmp_path / "x", tilt=3), "tilt: .*is tilts meant"),
        (lambda: ca.simulate_particles(tmp_path / "x", heldout=4.5), "heldout 4.5: int is needed"),
        (lambda: ca.evaluate("baseline"), "'baseline': not a run"),
        (lambda: ca.infer("baseline", tmp_path / "x"), "'baseline': not a run"),
        (lambda: ca.compare_runs("baseline", "vlt"), "'baseline': not a run"),
        (lambda: ca.evaluate(ca.load_run(folder / "baseline"), [], fitt=3), "is fit meant"),
        (lambda: ca.evaluate(ca.load_run(folder / "baseline"), fit="3"), "fit '3': int"),
        (lambda: ca.infer(ca.load_run(folder / "baseline"), "o", step=3), "is steps meant"),
        (lambda: ca.train("p.mrcs", outdir=tmp_path / "x", ind=np.arange(3)), "ind: an array"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    assert not (tmp_path / "x").exists()


def test_importing_it_is_cheap():
    code = "import sys, cryodrgn_amort; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_script_trains_is_logged():
    """Cryodrgn's import disables the loggers that there are."""
    code = (
        "import logging; ours = logging.getLogger('cryodrgn_amort')\n"
        "import cryodrgn_amort; cryodrgn_amort.load_run\n"
        "ours.info('heard')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "heard" in done.stdout


def test_a_users_script_is_type_checked(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import cryodrgn_amort as ca\n"
        "run = ca.load_run('baseline')\n"
        "result = ca.evaluate(run, ['roll:1'], fit=0)\n"
        "figures = result.plot()\n"
        "reveal_type(run.z_mu)\n"
        "ca.evaluate(run, fit='many')\n"
    )
    argv = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", script]
    said = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False).stdout
    assert "ndarray" in said
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1, said
    assert '"fit"' in errors[0]


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Cell by cell, with fewer particles and epochs; tests/documents.sh runs it in a kernel."""
    book = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    monkeypatch.chdir(tmp_path)
    scope = {}
    for cell in cells:
        source = "".join(cell["source"]).replace("epochs = 400, 25", "epochs = 40, 1")
        exec(compile(source, str(NOTEBOOK), "exec"), scope)
    plt.close("all")
    assert scope["particles"] == 40
    assert (tmp_path / "amortization/report/report.html").is_file()
    assert scope["fitted"].n == 8
