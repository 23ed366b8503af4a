"""Noise of a measured spectrum: what is read, what is in the images, what is stored."""

import json

import numpy as np
import pytest
import torch
import yaml
from helpers import volume_at, write_pickle

from cryodrgn_amort.core import InputError, write_json
from cryodrgn_amort.options import SimulateOptions
from cryodrgn_amort.simulation import simulate
from cryodrgn_amort.simulation.noise_spectrum import (
    noise_power,
    read_spectrum,
    spectrum_power,
    stored_noise,
)

D = 32
SHELLS = 1 + 3 * np.exp(-(((np.arange(16) - 5) / 3) ** 2))


def write(folder, name, content):
    path = folder / name
    path.write_text(content)
    return str(path)


@pytest.fixture
def file(tmp_path):
    return write(tmp_path, "shells.txt", "\n".join(map(str, SHELLS)))


def test_images_have_the_spectrum_and_the_variance(tmp_path, file):
    done = simulate(
        SimulateOptions(str(tmp_path / "sim"), n=1500, D=D, snr=0.2, clean=True,
                        noise_spectrum=file)
    )  # fmt: skip
    clean = volume_at(tmp_path / "sim/clean.mrcs").astype(float)
    added = volume_at(tmp_path / "sim/particles.mrcs") - clean
    assert clean.var() / added.var() == pytest.approx(0.2, rel=0.03)
    assert done.noise_sigma == pytest.approx(added.std(), rel=0.01)
    power = (np.abs(np.fft.fft2(added)) ** 2).mean(0) / D**2 / added.var()
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(D, 1 / D), np.fft.fftfreq(D, 1 / D)))
    expected = np.interp(radius, np.arange(16), SHELLS)  # the file's box is the images'
    expected /= expected.mean()
    shell = radius.round().astype(int).ravel()
    seen, wanted = (np.bincount(shell, v.ravel()) / np.bincount(shell) for v in (power, expected))
    np.testing.assert_allclose(seen, wanted, rtol=0.08)
    np.testing.assert_allclose(seen[3:17], wanted[3:17], rtol=0.03)


def test_the_folder_knows_the_noise_without_the_file(tmp_path, file):
    simulate(SimulateOptions(str(tmp_path / "sim"), n=4, D=D, noise_spectrum=file))
    expected = spectrum_power(read_spectrum(file, D), D)
    (tmp_path / "shells.txt").unlink()
    found = yaml.safe_load((tmp_path / "sim/simulation.yaml").read_text())
    sigma, power = stored_noise(found)
    assert sigma == found["noise_sigma"]
    torch.testing.assert_close(power, expected, rtol=0, atol=0)
    assert power.shape == (D, D // 2 + 1)
    full = torch.cat([power, power[:, 1 : D // 2]], 1)
    assert full.mean() == pytest.approx(1, abs=1e-6)
    for noise in ("white", "coloured"):
        simulate(SimulateOptions(str(tmp_path / noise), n=4, D=D, noise=noise))
        stored = yaml.safe_load((tmp_path / noise / "simulation.yaml").read_text())
        power, wanted = stored_noise(stored)[1], noise_power(noise, D)
        assert power is wanted is None if noise == "white" else torch.equal(power, wanted)
    with pytest.raises(ValueError, match="as many"):
        stored_noise({**found, "noise_spectrum": {"frequency": [0.1], "variance": []}})


def test_another_box_is_read_as_fractions_of_nyquist(tmp_path):
    fine = np.interp(np.arange(64) / 4, np.arange(16), SHELLS)
    power = [
        spectrum_power(read_spectrum(write_pickle(tmp_path / f"{len(v)}.pkl", v), D), D)
        for v in (SHELLS, fine)
    ]
    torch.testing.assert_close(power[1], power[0], rtol=0.02, atol=0)


def test_files_of_all_kinds(tmp_path):
    frequency = np.arange(1, 17) / D
    np.save(tmp_path / "a.npy", SHELLS)
    np.save(tmp_path / "column.npy", SHELLS[:, None].astype(np.float32))
    noise = {"groups": [3, 1], "noise_variance": [SHELLS.tolist(), (5 * SHELLS).tolist()]}
    write_json(tmp_path / "noise.json", {**noise, "frequency": frequency.tolist()})
    rows = "\n".join(f"{k},{v}" for k, v in zip(frequency, SHELLS, strict=True))
    alone = [
        str(tmp_path / "a.npy"),
        str(tmp_path / "column.npy"),
        write(tmp_path, "a.csv", "variance\n" + "\n".join(map(str, SHELLS))),
        write(tmp_path, "a.json", json.dumps(SHELLS.tolist())),
        write_pickle(tmp_path / "a.pkl", SHELLS),
    ]
    for path in alone:
        found = read_spectrum(path, D)
        np.testing.assert_allclose(found["variance"], SHELLS, rtol=1e-6)
        np.testing.assert_allclose(found["frequency"], np.arange(16) / D)
    for path, scale in (
        (write(tmp_path, "two.csv", "frequency,variance\n" + rows), 1),
        (write(tmp_path, "two.txt", "# shells\n" + rows.replace(",", "  ")), 1),
        (str(tmp_path / "noise.json"), 2),
    ):
        found = read_spectrum(path, D)
        np.testing.assert_allclose(found["variance"], scale * SHELLS)
        np.testing.assert_allclose(found["frequency"], frequency)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "", "one or two columns"),
        ("a.txt", "1 2 3\n4 5 6", "one or two columns"),
        ("a.txt", "1\n2 3", "not a spectrum"),
        ("a.txt", "1\nx", "not a spectrum"),
        ("a.txt", "1\n-1", "not negative"),
        ("a.txt", "1\nnan", "must be finite"),
        ("a.txt", "0\n0", "some above 0"),
        ("a.txt", "0.2 1\n0.1 1", "frequencies must rise"),
        ("a.txt", "0 1\n5 1", "frequencies must rise"),
        ("a.json", "{}", "not a spectrum"),
        ("a.json", "[", "damaged"),
        ("a.json", '{"noise_variance": [[1, 2]], "frequency": [0.1]}', "not a spectrum"),
        ("a.npy", "rubbish", "not a spectrum"),
        ("a.pkl", "rubbish", "not a usable pickle"),
        ("missing.txt", None, "no such file"),
    ],
)
def test_bad_spectra(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as caught:
        simulate(SimulateOptions(str(tmp_path / "sim"), n=4, noise_spectrum=str(path)))
    assert str(caught.value).startswith(f"--noise-spectrum {path}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sim").exists()
