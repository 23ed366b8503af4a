"""The lookup table and its optimizer."""

import numpy as np
import pytest
import torch
from helpers import write_pickle
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodrgn_amort.checkpoints import read_z, write_z
from cryodrgn_amort.errors import InputError
from cryodrgn_amort.particles import Batch
from cryodrgn_amort.table import LazyAdam, LookupTable


def batch_of(index):
    index = torch.as_tensor(index)
    return Batch(index, torch.zeros(0), None, torch.zeros(0), None)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(5, 400), seed=st.integers(0, 10_000), scale=st.sampled_from([1e-6, 1e-3, 1.0]))
def test_lazy_adam_equals_dense_adam(n, seed, scale):
    torch.manual_seed(seed)
    start, target = torch.randn(n, 4), torch.randn(n, 4)
    dense = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([dense], lr=1e-2)
    weight, lazy = start.clone(), LazyAdam(n, 4, 1e-2)
    for _ in range(4):
        for rows in torch.randperm(n).split(min(16, max(2, n // 3))):
            noise = torch.randn(len(rows), 4)
            optimizer.zero_grad()
            (scale * ((dense[rows] - target[rows] + noise) ** 2 / 2).sum()).backward()
            optimizer.step()
            current = lazy.catch_up(weight, rows)
            lazy.step(weight, rows, scale * (current - target[rows] + noise))
    lazy.flush(weight)
    torch.testing.assert_close(weight, dense.data, rtol=1e-5, atol=2e-5)
    assert (lazy.last == lazy.t).all()


def test_reading_a_row_does_not_change_what_it_will_be():
    torch.manual_seed(0)
    tables = [LookupTable(torch.zeros(6, 2), torch.zeros(6, 2), lr=0.1) for _ in range(2)]
    for step in range(30):
        for number, table in enumerate(tables):
            rows = [step % 3]
            mean, logvar = table(batch_of(rows))
            (mean.sum() + 2 * logvar.sum()).backward()
            table.after_backward()
            if number == 1:  # looked at between the steps
                table.latents()
    for a, b in zip(tables[0].latents(), tables[1].latents(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_only_the_rows_of_the_batch_get_a_gradient():
    table = LookupTable(torch.zeros(10, 2), torch.zeros(10, 2), lr=0.1)
    mean, _ = table(batch_of([2, 7]))
    mean.sum().backward()
    table.after_backward()
    moved = (table.latents()[0] != 0).any(1).nonzero()[:, 0]
    assert moved.tolist() == [2, 7]
    torch.testing.assert_close(table.latents()[0][2], torch.full((2,), -0.1))  # Adam's first step


def test_overflowed_gradients_are_skipped():
    table = LookupTable(torch.zeros(3, 2), torch.zeros(3, 2), lr=0.1)
    (table(batch_of([0]))[0].sum() * float("inf")).backward()
    table.after_backward(grad_scale=1024.0)
    assert (table.latents()[0] == 0).all()
    (table(batch_of([0]))[0].sum() * 1024).backward()
    table.after_backward(grad_scale=1024.0)
    torch.testing.assert_close(table.latents()[0][0], torch.full((2,), -0.1))


def test_frozen_table_stays(train, flags):
    trainer = train(flags, encoder="vlt", table_init="zeros", table_freeze=True)
    mean, logvar = trainer.encode()
    assert (mean == 0).all()
    assert (logvar == -4).all()
    assert (trainer.folder / "metrics.csv").read_text().splitlines()[-1].endswith(",0.0")


def test_table_trains_and_moves_are_logged(train, flags):
    trainer = train(flags, encoder="vlt")
    start = torch.randn(70, 3, generator=torch.Generator().manual_seed(3)).numpy()
    moved = np.linalg.norm(trainer.encode()[0] - start, axis=1)
    assert moved.min() > 0.02
    header, first, second = (trainer.folder / "metrics.csv").read_text().splitlines()
    assert header.split(",")[-1] == "table_moved"
    assert float(first.split(",")[-1]) > 0.01
    assert float(second.split(",")[-1]) > 0.01
    np.testing.assert_array_equal(read_z(trainer.folder / "z.pkl", "")[0], trainer.encode()[0])


def test_start_from_a_run_and_from_a_z_file(train, flags, tmp_path):
    network = train(flags, outdir=str(tmp_path / "network"), qdim=16)
    z = network.encode()
    for start in (tmp_path / "network", tmp_path / "network" / "z.2.pkl"):
        table = train(
            flags, outdir=str(tmp_path / "t"), encoder="vlt", table_init=str(start),
            table_freeze=True, overwrite=True,
        )  # fmt: skip
        for a, b in zip(table.encode(), z, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_wrong_starts_are_refused(train, flags, tmp_path):
    z = np.zeros((4, 3), np.float32)
    write_z(tmp_path / "few.pkl", z, z)
    with pytest.raises(InputError, match=r"--table-init .*few.pkl: holds 4 particles"):
        train(flags, encoder="vlt", table_init=str(tmp_path / "few.pkl"))
    write_pickle(tmp_path / "one.pkl", z)
    with pytest.raises(InputError, match=r"--table-init .*one.pkl: not a usable pickle"):
        train(flags, encoder="vlt", table_init=str(tmp_path / "one.pkl"))
    with pytest.raises(InputError, match="--table-lr 0"):
        train(flags, encoder="vlt", table_lr=0.0)
    with pytest.raises(InputError, match="exclude each other"):
        train(flags, encoder="vlt", table_lr=0.1, table_freeze=True)
    assert not (tmp_path / "run").exists()
