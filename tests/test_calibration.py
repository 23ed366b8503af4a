"""Coverage of posteriors: exact ones, ones that are too sure, and the whole way from a run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cryodrgn_amort import calibration
from cryodrgn_amort.calibration import LEVELS, calibration_ranks, coverage
from cryodrgn_amort.metrics import Measure
from cryodrgn_amort.particles import Batch


@pytest.mark.parametrize(("sureness", "sign"), [(1.0, 0), (0.5, -1), (2.0, 1)])
def test_coverage_is_that_of_the_posterior(sureness, sign, monkeypatch):
    """True posteriors of z ~ N(0, 1), seen with noise of variance 1/4; or wider, or narrower."""
    generator = torch.Generator().manual_seed(0)

    class Lesson:
        def __init__(self, *_, **__):
            pass

        def epoch_start(self, epoch):
            pass

        def dream(self, batch):
            z = torch.randn(len(batch.index), 3, generator=generator)
            seen = z + 0.5 * torch.randn(z.shape, generator=generator)
            return SimpleNamespace(z=z, y=seen)

    class Model:
        amort = fast = None

        def posterior(self, batch):
            logvar = torch.full_like(batch.y, np.log(0.2))
            return 0.8 * batch.y, logvar + 2 * np.log(sureness)

    monkeypatch.setattr(calibration, "Sleep", Lesson)
    feed = SimpleNamespace(read=lambda index: Batch(index, None, None, None, None))
    monkeypatch.setattr(calibration, "Feed", lambda *_, **__: feed)
    particles = SimpleNamespace(n=50, device=torch.device("cpu"))
    ranks = calibration_ranks(Model(), particles, np.zeros((50, 3)), np.zeros((50, 3)), 0)
    assert ranks.shape == (1024, 3)
    for level in LEVELS:
        found = coverage(ranks, level).mean() - level / 100
        assert abs(found) < 0.03 if sign == 0 else sign * found > 0.03
    if sign == 0:
        assert np.abs(np.histogram(ranks, 10, (0, 1))[0] / ranks.size - 0.1).max() < 0.02


def test_intervals_are_central():
    ranks = np.array([[0.26, 0.74], [0.24, 0.5], [0.02, 0.98]])
    assert coverage(ranks, 50).tolist() == [1.0, 0.5, 0.0]
    assert coverage(ranks, 95).tolist() == [1.0, 1.0, 0.0]


def test_an_evaluation_measures_it(train, flags, plugins, tmp_path):
    import json

    from cryodrgn_amort.evaluation import evaluate
    from cryodrgn_amort.report import write_evaluation
    from cryodrgn_amort.results import EvalOptions
    from cryodrgn_amort.runs import load_run

    options = EvalOptions(transforms=(), umap=False, volumes=2, labelled=2, fit=2, bootstrap=10)
    train(flags, qdim=16)
    found = evaluate(load_run(tmp_path / "run", plugins), options)
    for level in LEVELS:
        measure = found.measures[f"coverage_{level}"]
        assert isinstance(measure, Measure)
        assert 0 <= measure.value <= 1
        assert measure.ideal == level / 100
    write_evaluation(found, tmp_path / "report")
    facts = json.loads((tmp_path / "report/amortization.json").read_text())
    assert [sum(column) for column in facts["calibration_ranks"]] == [1024] * 3
    assert (tmp_path / "report/calibration.png").is_file()
    train(flags, encoder="twin", qdim=16, overwrite=True)
    found = evaluate(load_run(tmp_path / "run", plugins), options)
    assert "coverage_50" not in found.measures  # it is shown something else
