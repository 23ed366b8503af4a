"""The training step against the host's own ``train_batch``: loss and every gradient."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import write_stack
from hypothesis import HealthCheck, given, settings, strategies as st

from cryodrgn_amort.core import matrix_products
from cryodrgn_amort.data import BatchLoader, EncoderInput, ParticleSource, load_particles
from cryodrgn_amort.models import build_model, decoder, pieces
from cryodrgn_amort.models.objective import losses

pytestmark = pytest.mark.usefixtures("two_threads")

N = 5
PE_TYPES = ("gaussian", "geom_ft", "geom_full", "geom_lowf", "geom_nohighf", "linear_lowf", "none")


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    @functools.cache
    def stack(box):
        return write_stack(tmp_path_factory.mktemp(f"box{box}"), n=N, box=box)

    return stack


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def opened(stack, dtype, ctf, shifts, whole=False):
    """Particles whose lattice, poses and CTF are of ``dtype``, as the host's are then."""
    found = load_particles(
        ParticleSource(stack.particles, stack.poses, stack.ctf if ctf else None), whole=whole
    )
    found.lattice.coords = found.lattice.coords.to(dtype)
    found.lattice.freqs2d = found.lattice.freqs2d.to(dtype)
    found.rots = found.rots.to(dtype)
    found.trans = found.trans.to(dtype) if shifts else None
    found.ctf_params = found.ctf_params.to(dtype) if ctf else None
    return found


def model_of(particles, **args):
    torch.manual_seed(3)
    args = {
        "qlayers": 1, "qdim": 6, "players": 2, "pdim": 7, "zdim": 2, "encode_mode": "resid",
        "enc_mask": particles.box // 2, "pe_type": "gaussian", "feat_sigma": 0.5, "pe_dim": None,
        "domain": "fourier", "activation": "relu", "precision": "fp32", **args,
    }  # fmt: skip
    precision = args.pop("precision")
    return build_model(args, particles.lattice, None, precision).train()


def first_batch(particles, size):
    return next(iter(BatchLoader(particles, EncoderInput(), memory=0).batches(size, shuffle=False)))


def ours(model, particles, size, beta):
    model.zero_grad()
    batch = first_batch(particles, size)
    torch.manual_seed(1)
    mean, logvar = model.posterior(batch)
    error, _ = model.errors(batch, model.sample(mean, logvar, batch))
    found = losses(mean, logvar, error, batch.y.shape[1], batch.size, beta)
    found.total.backward()
    terms = (found.total, found.gen_loss, found.kld)
    return [float(x.detach()) for x in terms], gradients(model)


def hosts(model, particles, size, beta):
    from cryodrgn.commands.train_vae import train_batch

    model.zero_grad()
    index = torch.arange(size)
    y = particles.hartley(particles.raw(index)).to(particles.rots.dtype)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    torch.manual_seed(1)
    found = train_batch(
        model,
        particles.lattice,
        y,
        None,
        particles.rots[:size],
        None if particles.trans is None else particles.trans[:size],
        still,
        beta,
        None,
        ctf_params=None if particles.ctf_params is None else particles.ctf_params[:size],
    )
    return list(found), gradients(model)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(mine, other, rtol):
    np.testing.assert_allclose(mine[0], other[0], rtol=rtol)
    assert mine[1].keys() == other[1].keys()
    for name, grad in other[1].items():
        scale = max(float(grad.abs().max()), 1e-6)
        np.testing.assert_allclose(
            mine[1][name] / scale, grad / scale, atol=10 * rtol, err_msg=name
        )


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_step_is_the_hosts(data, stacks, double, monkeypatch):
    draw = data.draw
    monkeypatch.setattr(pieces, "_CPU_ROWS", draw(st.sampled_from([7, 60, 100, 4096])))
    monkeypatch.setattr(pieces, "_FEWEST_ROWS", 7)
    monkeypatch.setattr(pieces, "_WORTH", draw(st.sampled_from([0, 5e7])))  # several threads
    domain = draw(st.sampled_from(["fourier", "hartley"]))
    pe_type = draw(st.sampled_from(PE_TYPES[:-1] if domain == "fourier" else PE_TYPES))
    box = draw(st.sampled_from([8, 10, 16]))
    enc_mask = draw(st.sampled_from([box // 2, 3, -1]))
    particles = opened(
        stacks(box), torch.float64, draw(st.booleans()), draw(st.booleans()), enc_mask == -1
    )
    zdim, pe_dim = draw(st.integers(1, 4)), draw(st.sampled_from([None, 3]))
    if pe_type == "linear_lowf":  # the host's has one size only
        pe_dim = None
    features = 6 * (pe_dim or (box + 1) // 2) + zdim if pe_type != "none" else 3 + zdim
    model = model_of(
        particles,
        enc_mask=enc_mask,
        players=draw(st.integers(1, 3)),
        # as wide as the input, or the output: the host makes such layers residual
        pdim=draw(st.sampled_from([1, 2, 9, features])),
        zdim=zdim,
        pe_type=pe_type,
        pe_dim=pe_dim,
        domain=domain,
        activation=draw(st.sampled_from(["relu", "leaky_relu"])),
        precision="fp64",
    )
    size, beta = draw(st.integers(1, N)), draw(st.sampled_from([0.0, 0.25, 3.0]))
    host = hosts(model, particles, size, beta)
    assert_same_step(ours(model, particles, size, beta), host, rtol=1e-9)


@pytest.mark.parametrize("domain", ["fourier", "hartley"])
def test_a_step_in_single_precision(domain, stacks):
    particles = opened(stacks(16), torch.float32, True, True)
    model = model_of(particles, domain=domain, pdim=32)
    with matrix_products():
        mine = ours(model, particles, N, 0.5)
    assert_same_step(mine, hosts(model, particles, N, 0.5), rtol=3e-6)


@pytest.mark.parametrize(("precision", "rtol"), [("bf16", 1e-2), ("fp16", 2e-3)])
def test_a_step_in_half_precision_is_close(precision, rtol, stacks):
    particles = opened(stacks(16), torch.float32, True, True)
    model = model_of(particles, pdim=32, precision=precision)
    mine, host = ours(model, particles, N, 0.5), hosts(model, particles, N, 0.5)
    np.testing.assert_allclose(mine[0], host[0], rtol=rtol)
    for name, grad in host[1].items():
        assert mine[1][name].dtype == torch.float32
        if grad.norm() > 0:
            assert (mine[1][name] - grad).norm() < 10 * rtol * grad.norm(), name


def test_errors_of_each_image_and_gradients_of_latents_alone(stacks):
    """What fits latents with the decoder frozen: each image's gradient is its own."""
    particles = opened(stacks(10), torch.float32, True, False)
    model = model_of(particles).requires_grad_(False)
    batch = first_batch(particles, N)
    z = torch.randn(N, 2, requires_grad=True)
    total, each = model.errors(batch, z)
    total.backward()
    with torch.no_grad():
        decoded = model(particles.lattice.coords[particles.mask] @ particles.rots, z)
    ctf = particles.ctf(torch.arange(N))
    expected = (decoded * ctf - batch.y).square().sum(1)
    torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-5, atol=1e-5)
    alone = z[2:3].detach().requires_grad_()
    third = batch.__class__(batch.index[2:3], batch.y[2:3], None, batch.rot[2:3], batch.ctf[2:3])
    model.errors(third, alone)[0].backward()
    torch.testing.assert_close(alone.grad, z.grad[2:3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("domain", ["fourier", "hartley"])
def test_images_are_the_hosts_at_every_latent(domain, stacks, double):
    particles = opened(stacks(10), torch.float64, False, False)
    model = model_of(particles, domain=domain, precision="fp64")
    z = torch.randn(N, 3, 2, dtype=torch.float64)
    found = model.fast.images(particles.rots, z)
    for k in range(3):
        with torch.no_grad():
            coords = particles.lattice.coords[particles.mask] @ particles.rots
            expected = model.double()(coords, z[:, k])
        torch.testing.assert_close(found[:, k], expected.view(N, -1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tilts", [1, 2])
@pytest.mark.parametrize(("domain", "ctf"), [("fourier", True), ("hartley", False)])
def test_errors_at_several_latents_are_those_of_each(domain, ctf, tilts, stacks, monkeypatch):
    particles = opened(stacks(10), torch.float32, ctf, False)
    model = model_of(particles, domain=domain).eval()
    whole = first_batch(particles, N)
    four = {name: None if part is None else part[:4]
            for name, part in (("y", whole.y), ("rot", whole.rot), ("ctf", whole.ctf))}  # fmt: skip
    batch = replace(whole, index=whole.index[: 4 // tilts], image=None, **four)
    assert batch.tilts == tilts
    z = torch.randn(5, 4 // tilts, 2)
    expected = torch.stack([model.errors(batch, latent)[1] for latent in z])
    for together in (1 << 25, 2 * batch.y.numel()):  # all at once, and two at a time
        monkeypatch.setattr(decoder, "_TOGETHER", together)
        torch.testing.assert_close(model.errors_at(batch, z), expected, rtol=1e-5, atol=1e-4)
    model.train()
    torch.testing.assert_close(model.errors_at(batch, z), expected, rtol=1e-5, atol=1e-4)


def test_an_empty_share_of_a_batch_has_no_error_and_no_gradient(stacks):
    particles = opened(stacks(10), torch.float32, True, False)
    model = model_of(particles)
    batch = first_batch(particles, N)
    nobody = batch.__class__(
        batch.index[:0], batch.y[:0], batch.image[:0], batch.rot[:0], batch.ctf[:0]
    )
    z = torch.cat(model.posterior(nobody), 1)[:, :2]
    total, each = model.errors(nobody, z)
    total.backward()
    assert total.item() == 0
    assert len(each) == 0
    assert all(not grad.any() for grad in gradients(model).values())


def test_other_weights_and_frequencies_are_noticed(stacks):
    particles = opened(stacks(10), torch.float32, False, False)
    a, b = model_of(particles), model_of(particles, feat_sigma=2.0)
    batch, z = first_batch(particles, N), torch.randn(N, 2)
    before = a.errors(batch, z)[1]
    expected = b.errors(batch, z)[1]
    assert not torch.allclose(before, expected)
    a.restore(b.state_dict(), {}, "b")
    torch.testing.assert_close(a.errors(batch, z)[1], expected)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize(
    ("domain", "pe_type"),
    [
        ("fourier", "gaussian"),
        ("fourier", "geom_lowf"),
        ("hartley", "gaussian"),
        ("hartley", "none"),
    ],
)
def test_gradients_by_rotations_and_pixels(
    domain, pe_type, activation, stacks, double, monkeypatch
):
    """Against finite differences, and autograd through the host's decoder where it allows that."""
    monkeypatch.setattr(pieces, "_CPU_ROWS", 60)
    monkeypatch.setattr(pieces, "_FEWEST_ROWS", 7)
    monkeypatch.setattr(pieces, "_WORTH", 0)
    particles = opened(stacks(10), torch.float64, True, True)
    model = model_of(
        particles, domain=domain, pe_type=pe_type, activation=activation, precision="fp64"
    )
    model.requires_grad_(False)
    batch = first_batch(particles, N)
    rot, y = particles.rots.requires_grad_(), batch.y.double().requires_grad_()
    z, ctf = torch.randn(N, 2), batch.ctf

    def total(rot, y):
        return model.fast.squared_errors(rot, y, ctf, z)[0]

    by_rot, by_y = torch.autograd.grad(3 * total(rot, y), (rot, y))
    assert by_rot.shape == rot.shape
    assert by_y.shape == y.shape
    for values, found in ((rot, by_rot), (y, by_y)):
        for seed in range(3):
            step = 1e-6 * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
            there = total(*(v + step if v is values else v for v in (rot, y)))
            back = total(*(v - step if v is values else v for v in (rot, y)))
            expected = 3 * (there - back) / 2
            torch.testing.assert_close((found * step).sum(), expected, rtol=1e-5, atol=0)
    if domain == "hartley":
        coords = particles.lattice.coords[particles.mask] @ rot
        decoded = model(coords, z).view(N, -1) * torch.cat([ctf, ctf.flip(1)], 1)
        expected = torch.autograd.grad(3 * (decoded - y).square().sum(), (rot, y))
        torch.testing.assert_close(by_rot, expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(by_y, expected[1], rtol=1e-9, atol=1e-9)


def test_gradients_by_rotations_in_half_precision_are_close(stacks):
    particles = opened(stacks(16), torch.float32, True, False)
    found = []
    for precision in ("fp32", "fp16"):
        model = model_of(particles, pdim=32, precision=precision)
        rot = particles.rots.clone().requires_grad_()
        batch = first_batch(particles, N)
        z = torch.ones(N, 2)
        model.fast.squared_errors(rot, batch.y, batch.ctf, z)[0].backward()
        found.append(rot.grad)
    assert found[1].dtype == torch.float32
    assert (found[1] - found[0]).norm() < 2e-2 * found[0].norm()
