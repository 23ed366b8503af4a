"""The lookup table and its optimizer."""

import copy
import io

import numpy as np
import pytest
import torch
from helpers import write_pickle
from hypothesis import given, settings, strategies as st

from cryodrgn_amort.core import InputError, read_z, write_z
from cryodrgn_amort.data import Batch
from cryodrgn_amort.models import LookupTable
from cryodrgn_amort.models.lazy_adam import LazyAdam
from cryodrgn_amort.training.encoding import encode


def batch_of(index):
    index = torch.as_tensor(index)
    return Batch(index, torch.zeros(0), None, torch.zeros(0), None)


def visit(table, index, grad):
    """Take one step; ``grad`` `(B, 2 zdim)` is the loss's gradient by the rows."""
    rows = torch.cat(table(batch_of(index)), 1)
    (rows * grad).sum().backward()
    table.after_backward()


def adam_step_by_step(grad, t, betas, eps, gaps):
    """Where Adam (lr 1) has moved 0: by ``grad`` at step ``t``, then in each of ``gaps`` without.

    Gap -> position.
    """
    m, v, moved, found = (1 - betas[0]) * grad, (1 - betas[1]) * grad**2, 0.0, {}
    for gap in range(max(gaps) + 1):
        step = t + gap
        moved = moved - m / (1 - betas[0] ** step) / (np.sqrt(v / (1 - betas[1] ** step)) + eps)
        m, v = m * betas[0], v * betas[1]
        if gap in gaps:
            found[gap] = moved
    return found


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(5, 300),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_table_equals_dense_adam(n, seed, dtype):
    """Four epochs, rows left out at random; gradients from 1e-10, far below eps, to 1."""
    torch.manual_seed(seed)
    scale = 10 ** -torch.randint(0, 11, (n, 1)).to(dtype)
    target = torch.randn(n, 4, dtype=dtype)
    table = LookupTable(torch.zeros(n, 2), torch.zeros(n, 2), lr=1e-2).to(dtype)
    dense = torch.nn.Parameter(torch.zeros(n, 4, dtype=dtype))
    optimizer = torch.optim.Adam([dense], lr=1e-2)
    for _ in range(4):
        for rows in torch.randperm(n)[: n - n // 4].split(min(16, max(2, n // 3))):
            grad = scale[rows] * (dense[rows].detach() - target[rows] + torch.randn(len(rows), 4))
            dense.grad = torch.zeros_like(dense).index_copy_(0, rows, grad)
            optimizer.step()
            visit(table, rows, grad)
    latents = torch.cat(table.latents(), 1)
    assert latents.dtype == dtype
    close = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 1e-11}
    torch.testing.assert_close(latents, dense.data, **close)


@pytest.mark.parametrize(
    ("betas", "eps", "tolerance"),
    [
        ((0.9, 0.999), 1e-8, 1e-10),
        ((0.9, 0.999), 1e-3, 1e-10),
        ((0.99, 0.999), 1e-8, 1e-8),
        ((0.9, 0.95), 1e-8, 1e-6),
        ((0.9, 0.9), 1e-8, 1e-10),
        ((0.0, 0.9), 1e-8, 1e-10),
    ],
)
def test_a_gap_of_any_length_equals_its_steps(betas, eps, tolerance):
    grad, rows = 10 ** np.linspace(-12, 1, 14), torch.tensor([0])
    starts = np.array([1, 2, 10, 150, 400, 3000, 10**6])
    at_rest = 4000
    wanted = adam_step_by_step(
        grad, starts[:, None], betas, eps, (0, 1, 2, 7, 50, 250, 1000, at_rest)
    )
    for i, start in enumerate(starts.tolist()):
        lazy, weight = LazyAdam(1, 14, 1.0, betas, eps).double(), torch.zeros(1, 14).double()
        lazy.t = start - 1
        lazy.step(weight, lazy.begin(weight, rows), torch.from_numpy(grad)[None])
        for gap, moved in wanted.items():
            lazy.t = start + (10**6 if gap == at_rest else gap)
            for found in (lazy.read(weight, rows), lazy.read_all(weight)):
                np.testing.assert_allclose(found[0], moved[i], rtol=tolerance)


def test_reading_changes_nothing():
    table = LookupTable(torch.zeros(6, 2), torch.zeros(6, 2), lr=0.1)
    for step in range(30):
        visit(table, [step % 3], torch.ones(1, 4))
    before = copy.deepcopy(table.state_dict())
    latents = table.eval().latents()
    for both, all_rows in zip(table(batch_of(range(6))), latents, strict=True):
        assert torch.equal(both, all_rows)
    after = table.state_dict()
    assert before.pop("adam._extra_state") == after.pop("adam._extra_state")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_training_goes_on_from_a_state():
    torch.manual_seed(1)
    steps = [(torch.randperm(40)[:4], torch.randn(4, 4)) for _ in range(60)]
    whole, part, later = (LookupTable(torch.zeros(40, 2), torch.zeros(40, 2), 0.1) for _ in "123")
    for step in steps:
        visit(whole, *step)
    for step in steps[:30]:
        visit(part, *step)
    state = part.state_dict()
    assert set(state) == {"weight", "adam.m", "adam.v", "adam.last", "adam._extra_state"}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    later.load_state_dict(torch.load(file, weights_only=True))
    for step in steps[30:]:
        visit(later, *step)
    assert all(map(torch.equal, later.latents(), whole.latents()))


def test_training_goes_on_from_an_older_state():
    """Version 0.1.0 wrote dense Adam's state: rows where they are, moments of the present step."""
    torch.manual_seed(1)
    dense = torch.nn.Parameter(torch.zeros(40, 4))
    optimizer = torch.optim.Adam([dense], lr=0.1)
    table = LookupTable(torch.zeros(40, 2), torch.zeros(40, 2), lr=0.1)
    for step in range(60):
        rows, grad = torch.randperm(40)[:4], torch.randn(4, 4)
        dense.grad = torch.zeros_like(dense).index_copy_(0, rows, grad)
        optimizer.step()
        if step == 29:
            adam = optimizer.state[dense]
            state = {
                "weight": dense.data,
                "adam.m": adam["exp_avg"],
                "adam.v": adam["exp_avg_sq"],
                "adam.last": torch.full((40,), 30),
                "adam._extra_state": {"t": 30},
            }
            table.load_state_dict(state)
            torch.testing.assert_close(torch.cat(table.latents(), 1), dense.data, rtol=0, atol=1e-6)
        elif step > 29:
            visit(table, rows, grad)
    torch.testing.assert_close(torch.cat(table.latents(), 1), dense.data, rtol=0, atol=2e-6)
    assert table.state_dict()["adam._extra_state"]["at_rest"]


def test_a_rate_that_falls_moves_rows_as_dense_adams_does():
    """Rows still move by momentum when the rate changes; in between, the table is written, read."""
    torch.manual_seed(1)
    dense = torch.nn.Parameter(torch.zeros(40, 4, dtype=torch.float64))
    optimizer = torch.optim.Adam([dense], lr=0.1)
    rates = 0.1, 0.001
    table = LookupTable(torch.zeros(40, 2), torch.zeros(40, 2), *rates).double()
    for epoch in range(6):
        rate = 0.001 + 0.099 * (1 + np.cos(np.pi * epoch / 6)) / 2
        optimizer.param_groups[0]["lr"] = rate
        table.epoch_start(epoch / 6)
        for _ in range(7):
            rows, grad = torch.randperm(40)[:4], torch.randn(4, 4, dtype=torch.float64)
            dense.grad = torch.zeros_like(dense).index_copy_(0, rows, grad)
            optimizer.step()
            visit(table, rows, grad)
        state = copy.deepcopy(table.state_dict())
        table = LookupTable(torch.zeros(40, 2), torch.zeros(40, 2), *rates).double()
        table.load_state_dict(state)
        latents = torch.cat(table.latents(), 1)
        torch.testing.assert_close(latents, dense.data, rtol=0, atol=1e-9)
    assert table.adam.lr == pytest.approx(rate)


def test_a_step_never_waits_for_the_device():
    """Tensors of the meta device have no values: whatever asks for one fails."""
    with torch.device("meta"):
        table = LookupTable(torch.zeros(6, 2), torch.zeros(6, 2), lr=0.1)
        for _ in range(2):
            visit(table, [1, 2], torch.ones(2, 4))
    assert table.weight.is_meta


def test_only_the_rows_of_the_batch_get_a_gradient():
    table = LookupTable(torch.zeros(10, 2), torch.zeros(10, 2), lr=0.1)
    mean, _ = table(batch_of([2, 7]))
    mean.sum().backward()
    table.after_backward()
    moved = (table.latents()[0] != 0).any(1).nonzero()[:, 0]
    assert moved.tolist() == [2, 7]
    torch.testing.assert_close(table.latents()[0][2], torch.full((2,), -0.1))  # Adam's first step


def test_frozen_table_stays(train, flags):
    trainer = train(flags, encoder="vlt", table_init="zeros", table_freeze=True)
    mean, logvar = encode(trainer)
    assert (mean == 0).all()
    assert (logvar == -4).all()
    assert (trainer.folder / "metrics.csv").read_text().splitlines()[-1].endswith(",0.0")


def test_table_trains_and_moves_are_logged(train, flags):
    trainer = train(flags, encoder="vlt")
    start = torch.randn(70, 3, generator=torch.Generator().manual_seed(3)).numpy()
    moved = np.linalg.norm(encode(trainer)[0] - start, axis=1)
    assert moved.min() > 0.02
    header, first, second = (trainer.folder / "metrics.csv").read_text().splitlines()
    assert header.split(",")[-1] == "table_moved"
    assert float(first.split(",")[-1]) > 0.01
    assert float(second.split(",")[-1]) > 0.01
    np.testing.assert_array_equal(read_z(trainer.folder / "z.pkl", "")[0], encode(trainer)[0])


def test_start_from_a_run_and_from_a_z_file(train, flags, tmp_path):
    network = train(flags, outdir=str(tmp_path / "network"), qdim=16)
    z = encode(network)
    for start in (tmp_path / "network", tmp_path / "network" / "z.2.pkl"):
        table = train(
            flags, outdir=str(tmp_path / "t"), encoder="vlt", table_init=str(start),
            table_freeze=True, overwrite=True,
        )  # fmt: skip
        for a, b in zip(encode(table), z, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_wrong_starts_are_refused(train, flags, tmp_path):
    z = np.zeros((4, 3), np.float32)
    write_z(tmp_path / "few.pkl", z, z)
    with pytest.raises(InputError, match=r"--table-init .*few.pkl: holds 4 particles"):
        train(flags, encoder="vlt", table_init=str(tmp_path / "few.pkl"))
    write_pickle(tmp_path / "one.pkl", z[0])
    with pytest.raises(InputError, match=r"--table-init .*one.pkl: not a z file"):
        train(flags, encoder="vlt", table_init=str(tmp_path / "one.pkl"))
    with pytest.raises(InputError, match="--table-lr 0"):
        train(flags, encoder="vlt", table_lr=0.0)
    with pytest.raises(InputError, match="--table-lr-end -1"):
        train(flags, encoder="vlt", table_lr_end=-1.0)
    for rate in ("table_lr", "table_lr_end"):
        with pytest.raises(InputError, match="exclude each other"):
            train(flags, encoder="vlt", table_freeze=True, **{rate: 0.1})
    assert not (tmp_path / "run").exists()
