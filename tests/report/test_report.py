"""What eval_amort writes: complete, strict, escaped, self-contained, and whole or not at all."""

import base64
import hashlib
import html
import json
import pickle
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import read_pickles, write_pickle
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from cryodrgn_amort import hookimpl
from cryodrgn_amort.core import CHECKSUMS, InputError, number, recorded, write_json
from cryodrgn_amort.evaluation import calibration, evaluate
from cryodrgn_amort.measures import DEFINITIONS
from cryodrgn_amort.options import EvalOptions
from cryodrgn_amort.plugins import Plugins
from cryodrgn_amort.report import (
    Section,
    evaluation_figures,
    evaluation_page,
    evaluation_report as report,
    evaluation_summary,
    meshes as surfaces,
    plots as figures,
    write_evaluation,
)
from cryodrgn_amort.report.methods import methods
from cryodrgn_amort.report.verdict import verdict
from cryodrgn_amort.runs import load_run, settings_from_flags
from cryodrgn_amort.training import Trainer

AMORTIZATION = {
    "retrieval_rank", "top1", "displacement", "displacement_sigma", "latent_correlation",
    "label_agreement", "volume_change", "volume_fsc_loss", "amortization_loss_fraction", "control",
}  # fmt: skip
LEAKS = {f"nuisance_leak_{name}" for name in ("view", "inplane", "defocus", "shift")}
COVERAGE = {
    "calibration_p",
    "encoding_cost",
    "likelihood_rank",
    "made_up_distance",
    *(f"coverage_{level}" for level in (50, 80, 95)),
}
LATENTS = {"active_units", "kl", "aggregate_kl", "reconstruction", *LEAKS}
FITTED = {"amortization_gap", "approximation_gap", "converged", "effective_samples", "khat",
          "khat_high", "training_score"}  # fmt: skip
RUN = LATENTS | COVERAGE | {"class_knn", "coordinate_r2"}
KEYS = ["roll-1.held", "roll-1.follow", "rotate-90.held", "rotate-90.follow"]
HOSTILE = "<script>alert(1)</script>"


def run_of(encoder, stack, folder, **more):
    plugins = Plugins(found={})
    flags = {
        "particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf, "zdim": 3,
        "outdir": str(folder), "num_epochs": 1, "do_analysis": False, "seed": 3, "pdim": 16,
        "players": 1, "encoder": encoder, **more,
    }  # fmt: skip
    Trainer(settings_from_flags(flags, plugins), plugins).fit()
    return load_run(folder, plugins)


@pytest.fixture(scope="module")
def known(stack, tmp_path_factory):
    """Labels, one of them hostile, and a coordinate."""
    folder = tmp_path_factory.mktemp("known")
    labels = np.where(np.arange(stack.n) % 3, HOSTILE, "$a & b")
    return SimpleNamespace(
        labels=write_pickle(folder / "labels.pkl", labels),
        coordinate=write_pickle(folder / "coordinate.pkl", np.linspace(0, 1, stack.n)),
    )


@pytest.fixture(scope="module")
def evaluation(stack, known, tmp_path_factory):
    run = run_of("resid", stack, tmp_path_factory.mktemp("network") / "run", qdim=16, qlayers=1)
    return evaluate(
        run,
        EvalOptions(labels=known.labels, coordinate=known.coordinate, volumes=3, labelled=2, fit=4,
                    bootstrap=5, umap=False),
    )  # fmt: skip


@pytest.fixture(scope="module")
def table_evaluation(stack, tmp_path_factory):
    run = run_of("vlt", stack, tmp_path_factory.mktemp("table") / "run")
    return evaluate(run, EvalOptions(volumes=2, labelled=2, bootstrap=5, umap=False, fit=4))


@pytest.fixture(scope="module")
def written(evaluation, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "out"
    path = write_evaluation(evaluation, out)
    assert path == out / "report.html"
    assert [p.name for p in out.parent.iterdir()] == ["out"]  # nothing left beside it
    return out


@pytest.fixture(scope="module")
def light(evaluation):
    """Return the evaluation with one transform and few figures, to write quickly."""
    return with_(evaluation, results=evaluation.results[:1], embeddings={})


def with_(evaluation, **changes):
    return replace(evaluation, **changes)


def with_plugin(evaluation, **hooks):
    plugin = SimpleNamespace(**{name: hookimpl(function) for name, function in hooks.items()})
    run = replace(evaluation.run, plugins=Plugins(found={"mine": plugin}))
    return with_(evaluation, run=run)


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


class Page(HTMLParser):
    """Collects what a page would load, link to, run, and say."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.loads, self.links, self.images, self.texts = [], [], [], [], []
        self.ids, self.canvases = [], []
        self._hidden = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self._hidden = tag in ("style", "script")
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "srcset", "data", "poster"):
            self.loads += [attrs[name]] if name in attrs else []
        if "href" in attrs:
            (self.links if tag == "a" else self.loads).append(attrs["href"])
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag in ("img", "canvas"):
            (self.images if tag == "img" else self.canvases).append(attrs)

    def handle_data(self, data):
        if not self._hidden:
            self.texts.append(data)

    def handle_endtag(self, tag):
        self._hidden = False

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def test_the_json_is_strict_and_complete(written, evaluation):
    facts = strict_json(written / "amortization.json")
    assert list(facts["transforms"]) == KEYS
    for result in evaluation.results:
        entry = facts["transforms"][result.key]
        assert set(entry["measures"]) == AMORTIZATION
        assert (entry["name"], entry["mode"]) == (result.name, result.mode)
        for name, m in entry["measures"].items():
            assert set(m) == {"value", "low", "high", "null", "ideal", "n"}
            assert m["value"] == pytest.approx(result.measures[name].value)
    assert set(facts["measures"]) == RUN
    assert set(facts["definitions"]) == RUN | AMORTIZATION | FITTED
    assert set(DEFINITIONS) > RUN | AMORTIZATION
    assert facts["run"]["epoch"] == 1
    assert facts["run"]["encoder_input"] == "particle"
    assert facts["run"]["n"] == 70
    assert facts["options"]["bootstrap"] == 5
    assert facts["labelled"] == {"1": 0, "2": 1}
    assert {"cryodrgn", "cryodrgn_amort"} <= set(facts)
    assert {*facts["files"], CHECKSUMS} == {p.name for p in written.iterdir()}


def test_what_is_not_finite_becomes_null_and_a_dash(light, tmp_path):
    first = light.results[0]
    rank = replace(first.measures["retrieval_rank"], value=np.nan, low=-np.inf, high=None)
    broken = replace(first, measures={**first.measures, "retrieval_rank": rank})
    write_evaluation(with_(light, results=[broken]), tmp_path / "out")
    m = strict_json(tmp_path / "out/amortization.json")["transforms"]["roll-1.held"]["measures"]
    assert m["retrieval_rank"]["value"] is m["retrieval_rank"]["low"] is None
    page = Page((tmp_path / "out/report.html").read_text())
    assert "could not be measured" in page.text
    assert not re.search(r"\b(nan|inf)\b", page.text)


def test_arrays_latents_and_volumes(written, evaluation):
    from cryodrgn.dashboard.covariate_pkl import _parse_particle_covariate_raw
    from cryodrgn.mrcfile import parse_mrc

    for result in evaluation.results:
        for name, values in result.arrays.items():
            path = written / f"{name}.{result.key}.pkl"
            array, kind = _parse_particle_covariate_raw(read_pickles(path), str(path))
            assert kind == "numeric"
            np.testing.assert_array_equal(array, values)
            with open(path, "rb") as handle:  # one pickle and nothing behind it
                pickle.load(handle)
                assert not handle.read()
        mean, logvar = read_pickles(written / f"z.{result.key}.pkl", 2)
        np.testing.assert_array_equal(mean, result.z)
        np.testing.assert_array_equal(logvar, result.logvar)
        for i in (1, 2):
            volume, header = parse_mrc(str(written / f"vol.{i}.{result.key}.mrc"))
            np.testing.assert_array_equal(volume, result.volumes[i - 1])
            assert header.apix == pytest.approx(evaluation.apix)
    volume, _ = parse_mrc(str(written / "vol.2.mrc"))
    np.testing.assert_array_equal(volume, evaluation.volumes[1])


def test_every_figure_as_png_and_pdf(written):
    names = ["latents", "ranks", "calibration", "map.pca", *(f"map.{key}.pca" for key in KEYS)]
    for name in names:
        assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (written / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    page = Page((written / "report.html").read_text())
    assert len(page.images) == len(names)
    assert all(len(image["alt"]) > 20 for image in page.images)


def test_the_report_loads_nothing_and_runs_its_own_script_alone(written):
    html = (written / "report.html").read_text()
    page = Page(html)
    assert all(url.startswith("data:image/png;base64,") for url in page.loads)
    outside = [link for link in page.links if not link.startswith("#")]
    assert outside == ["https://arxiv.org/abs/2303.07487"]
    assert not {"iframe", "link", "object", "form"} & set(page.tags)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    (script,) = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    assert "<script>" in html  # without src
    assert not re.search(r"https?:|import|fetch|XMLHttpRequest|eval|innerHTML", script)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'", "img-src": "data:", "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip


def test_every_name_of_a_measure_leads_to_its_definition(written, evaluation):
    page = Page((written / "report.html").read_text())
    anchors = [link[1:] for link in page.links if link.startswith("#")]
    named = {*evaluation.measures, *evaluation.results[0].measures, *FITTED}
    assert set(anchors) == {f"def-{name}" for name in named} <= set(page.ids)
    assert anchors.count("def-control") == 2  # once for each transform
    assert len(set(page.ids)) == len(page.ids)


def test_the_volumes_of_every_map_can_be_turned(written):
    page = Page((written / "report.html").read_text())
    assert len(page.canvases) == 2 + len(KEYS) * 4  # two particles; for each result copies as well
    assert {c["data-mesh"] for c in page.canvases} <= set(page.ids)
    held = [c for c in page.canvases if "data-triangles" in c]
    assert len(held) == len({c["data-triangles"] for c in held})  # each mesh once
    assert [c["data-colour"] for c in page.canvases[-2:]] == figures.particle_colours(2)
    for copies in range(0, 4 * len(KEYS), 4):
        some = page.canvases[copies : copies + 4]
        assert [c["data-colour"] for c in some] == [figures.ORIGINAL, figures.MOVED] * 2
        names = [re.match("Volume (.+?):", c["aria-label"])[1] for c in some]
        assert names == ["1", "1′", "2", "2′"]


def test_the_report_says_what_the_numbers_mean(written, evaluation):
    page = Page((written / "report.html").read_text())
    assert verdict(evaluation).headline in page.text
    for name in RUN | AMORTIZATION:
        assert DEFINITIONS[name].text in page.text
        assert name in page.text
    for result in evaluation.results:
        for m in result.measures.values():
            assert number(m.value) in page.text
    assert page.text.index("Retrieval rank") < page.text.index("Methods and versions")
    assert page.tags.count("h1") == 1


def test_hostile_text_is_escaped(light, tmp_path):
    settings = replace(light.run.settings, particles=f"{HOSTILE}.mrcs")
    options = replace(light.options, labels=f"{HOSTILE}.pkl")
    section = Section(HOSTILE, HOSTILE, [[HOSTILE], [HOSTILE]], {HOSTILE: Figure()})
    hostile = with_plugin(light, report_sections=lambda: [section])
    run = replace(hostile.run, settings=settings)
    results = [replace(light.results[0], title=HOSTILE)]
    write_evaluation(with_(hostile, run=run, options=options, results=results), tmp_path / "out")
    html = (tmp_path / "out/report.html").read_text()
    page = Page(html)
    assert HOSTILE not in html
    assert page.tags.count("script") == 1  # ours
    assert page.text.count(HOSTILE) >= 7


def test_a_table_gets_no_score(table_evaluation, tmp_path):
    write_evaluation(table_evaluation, tmp_path / "out")
    facts = strict_json(tmp_path / "out/amortization.json")
    assert facts["applicable"] is False
    assert facts["reason"].startswith("not applicable")
    assert facts["transforms"] == {}
    assert set(facts["measures"]) == LATENTS == set(facts["definitions"]) - FITTED
    names = {p.name for p in (tmp_path / "out").iterdir()}
    files = {"amortization.json", "report.html", "reconstruction.pkl", "vol.1.mrc", "vol.2.mrc",
             "trust.csv", "gap.pkl", CHECKSUMS}  # fmt: skip
    assert names == files | {
        f"{name}.{kind}" for name in ("latents", "map.pca") for kind in ("png", "pdf")
    }
    page = Page((tmp_path / "out/report.html").read_text())
    assert "not applicable" in page.text
    assert "is a table" in page.text
    for name in AMORTIZATION - {"control"}:
        assert name not in page.text
    assert "not applicable" in evaluation_summary(table_evaluation)
    assert "retrieval_rank" not in evaluation_summary(table_evaluation)


@pytest.mark.parametrize("step", ["page_of", "_write_arrays", "pictures_of", "write_json"])
def test_a_failure_leaves_what_was_there(step, light, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("halfway")

    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("old")
    (out / "amortization.json").write_text('{"files": ["report.html"]}')
    (out / "notes.txt").write_text("mine")
    monkeypatch.setattr(report, step, fail)
    with pytest.raises(RuntimeError, match="halfway"):
        write_evaluation(light, out)
    assert {p.name: p.read_text() for p in out.iterdir()} == {
        "report.html": "old", "notes.txt": "mine",
        "amortization.json": '{"files": ["report.html"]}',
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def whole_folder(light, tmp_path_factory):
    """Write the light evaluation, and return its folder."""
    return write_evaluation(light, tmp_path_factory.mktemp("light") / "out").parent


@pytest.mark.parametrize("part", ["verdict", "latents", "paper"])
def test_a_part_that_fails_is_left_out_and_no_other(
    part, light, whole_folder, tmp_path, monkeypatch, capsys
):
    def fail(_):
        raise ValueError(HOSTILE)

    whole = Page((whole_folder / "report.html").read_text())
    monkeypatch.setitem(evaluation_page._PARTS, part, fail)
    page = Page(write_evaluation(light, tmp_path / "out").read_text())
    assert f"Left out: {part}" in page.text
    assert HOSTILE in page.text
    assert f"report: part {part!r} left out (ValueError" in capsys.readouterr().err
    headings = {
        "paper": "In a paper",
        "methods": "Methods and versions",
        "latents": "The run itself",
    }
    for name, heading in headings.items():
        assert heading in whole.text
        assert (heading in page.text) == (name != part)
    same = (whole_folder / "z.roll-1.held.pkl", tmp_path / "out/z.roll-1.held.pkl")
    assert same[0].read_bytes() == same[1].read_bytes()


def test_a_figure_that_fails_is_left_out_and_no_other(light, whole_folder, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no colours")

    names = {p.name for p in whole_folder.iterdir()}
    monkeypatch.setattr(evaluation_figures.plots, "ranks", fail)
    text = write_evaluation(light, tmp_path / "out").read_text()
    assert "A figure could not be drawn (ValueError: no colours)" in Page(text).text
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert names - left == {"ranks.png", "ranks.pdf"}
    assert left <= names


def test_the_methods_paragraph_is_of_this_run(evaluation, table_evaluation):
    said = methods(evaluation)
    text, run = " ".join(said.paragraphs), evaluation.run
    rank = next(r for r in evaluation.results if not r.is_control).measures["retrieval_rank"]
    gap = evaluation.fits[0].measures["amortization_gap"]
    for words in (
        f"{len(evaluation.z)} particles", f"box of {evaluation.volumes.shape[-1]} px",
        f"{run.epoch} epochs", f"seed {run.settings.seed}", number(rank.value), number(gap.value),
        f"{run.settings.players} layers of {run.settings.pdim} units", "cryoDRGN 4.",
    ):  # fmt: skip
        assert words in text
    cited = {int(n) for n in re.findall(r"\[(\d)\]", text)}
    assert cited == set(range(1, len(said.references) + 1))
    table = " ".join(methods(table_evaluation).paragraphs)
    assert "no network" in table
    assert "retrieval rank" not in table


def test_writing_again_removes_what_is_stale_and_nothing_else(light, tmp_path):
    out = tmp_path / "out"
    again = replace(light.results[0], name="rotate:90")
    write_evaluation(with_(light, results=[*light.results, again]), out)
    assert list(out.glob("*rotate-90*"))
    facts = json.loads((out / "amortization.json").read_text())
    facts["files"] += ["notes.txt", "../outside.held.pkl", "weights.1.pkl"]
    with recorded(out, "amortization.json"):
        write_json(out / "amortization.json", facts)
    others = [out / "notes.txt", tmp_path / "outside.held.pkl", out / "weights.1.pkl"]
    for path in others:
        path.write_text("mine")
    write_evaluation(light, out)
    assert not list(out.glob("*rotate-90*"))
    assert list(out.glob("*roll-1.held*"))
    assert all(path.read_text() == "mine" for path in others)


def test_every_measure_says_of_how_many_it_is(written, evaluation):
    facts, html = strict_json(written / "amortization.json"), (written / "report.html").read_text()
    assert "every particle" not in html
    kinds = [facts, *facts["transforms"].values(), *facts["fits"].values()]
    counts = [m["n"] for kind in kinds for m in kind["measures"].values()]
    assert sorted(map(str, counts)) == sorted(re.findall(r"<small>N = (\d+)</small>", html))
    of = {name: m["n"] for name, m in facts["measures"].items()}
    assert (of["kl"], of["aggregate_kl"], of["coverage_95"], of["encoding_cost"]) == (
        70, 70, calibration.IMAGES, 4,
    )  # fmt: skip
    assert facts["transforms"]["roll-1.held"]["measures"]["volume_change"]["n"] == 3
    assert facts["fits"]["training.train"]["measures"]["amortization_gap"]["n"] == 4


def test_all_that_is_written_goes_when_it_is_stale(written):
    names = {path.name for path in written.iterdir()} - {"report.html", "amortization.json"}
    stay = {name for name in names if not report._OURS.fullmatch(name)}
    assert stay == {CHECKSUMS}


def test_an_output_that_cannot_be(light, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(InputError, match="not a folder"):
            write_evaluation(light, out)
    (tmp_path / "out/report.html").mkdir(parents=True)
    with pytest.raises(InputError, match=r"a folder report\.html is in the way"):
        write_evaluation(light, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]


def test_plugin_sections(light, tmp_path):
    def report_sections(evaluation):
        figure = Figure()
        figure.subplots().plot([0, 1])
        table = [["name", "value"], ["particles", len(evaluation.z)], ["third", 1 / 3], ["x", None]]
        yield Section("My section", "One.\n\nTwo.", table, {"A line of my own": figure})

    write_evaluation(with_plugin(light, report_sections=report_sections), tmp_path / "out")
    page = Page((tmp_path / "out/report.html").read_text())
    for text in ("My section", "From plugin mine", "One.", "Two.", "0.333", "A line of my own"):
        assert text in page.text
    assert "A line of my own" in [image["alt"] for image in page.images]


def test_a_plugin_that_fails_is_named(light, tmp_path, capsys):
    def report_sections():
        raise RuntimeError("no luck")

    write_evaluation(with_plugin(light, report_sections=report_sections), tmp_path / "out")
    assert "no luck" in Page((tmp_path / "out/report.html").read_text()).text
    assert "plugin 'mine': report_sections left out (RuntimeError: no luck)" in (
        capsys.readouterr().err
    )


def test_the_verdict_follows_the_worst_test_and_not_the_control(evaluation):
    def at(rank, index):
        result = evaluation.results[index]
        m = replace(result.measures["retrieval_rank"], value=rank)
        return replace(result, measures={**result.measures, "retrieval_rank": m})

    ranks = {0: 0.005, 1: 0.49, 2: 0.2, 3: 0.005}  # 1 is the control: roll, follow
    said = verdict(with_(evaluation, results=[at(r, i) for i, r in ranks.items()]))
    assert said.tone == "fair"
    assert "turned 90 degrees clockwise" in said.headline
    assert "control" in said.lines[1]
    assert verdict(with_(evaluation, results=[at(0.005, 0)])).tone == "good"
    assert verdict(with_(evaluation, results=[at(0.48, 3)])).tone == "poor"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.123"), (-2.0, "−2"), (0, "0"), (1e-7, "1e−07"), (12345.6, "12346"),
     (None, "–"), (float("nan"), "–")],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize("volume", [np.zeros((8, 8, 8)), np.full((9, 9, 9), np.nan)])
def test_what_has_no_surface_is_said_to_have_none(volume, light, evaluation, tmp_path):
    volumes = np.stack([volume, volume]).astype(np.float32)
    empty = replace(light.results[0], volumes=volumes)
    shown = with_(light, results=[empty], embeddings=evaluation.embeddings)
    write_evaluation(shown, tmp_path / "out")
    page = Page((tmp_path / "out/report.html").read_text())
    assert page.text.count("nothing above the threshold") == 2
    pictures = surfaces.render_all(surfaces.isosurfaces(volumes), figures.particle_colours(2), 1.0)
    figure = figures.latent_map(evaluation.embeddings["PCA"], pictures)
    texts = [text.get_text() for text in figure.findobj(match_text)]
    assert texts.count("nothing above\nthe threshold") == 2


def match_text(artist):
    return hasattr(artist, "get_text")


def test_a_map_shows_both_ends_of_every_pair(evaluation):
    result = evaluation.results[0]
    pictures, moved = (
        surfaces.render_all(surfaces.isosurfaces(some), figures.particle_colours(2), 1.0)
        for some in (evaluation.volumes, result.volumes)
    )
    figure = figures.latent_map(evaluation.embeddings["PCA"], pictures, result, moved)
    texts = [text.get_text() for text in figure.findobj(match_text)]
    for name in ("1", "2", "1′", "2′"):
        assert texts.count(name) == 2  # in the plane and at the volume


def test_a_particle_has_the_colour_of_its_volume(evaluation):
    """Red and green with copies, as in the paper; else each its own, and ten that differ."""
    result, pictures = evaluation.results[0], [np.ones((2, 2, 4))] * 2
    embedding = evaluation.embeddings["PCA"]
    pairs = figures.latent_map(embedding, pictures, result, pictures)
    alone = figures.latent_map(embedding, pictures)
    own = figures.particle_colours(2)
    assert len({*own, figures.ORIGINAL, figures.MOVED}) == 4
    for figure, points, frames in (
        (pairs, [figures.MOVED, figures.ORIGINAL], [figures.ORIGINAL, figures.MOVED] * 2),
        (alone, own, own),
    ):
        plane, volumes = figure.axes
        # all particles are drawn first
        dots = [c for cloud in plane.collections[1:] for c in map(to_hex, cloud.get_facecolors())]
        assert list(dict.fromkeys(dots)) == points
        assert [to_hex(p.get_edgecolor()) for p in volumes.patches] == frames
    assert len(set(figures.particle_colours(10))) == 10
    assert len(figures.particle_colours(25)) == 25


def test_latents_of_one_dimension_have_no_map(light, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_evaluation(light, tmp_path / "out")
    assert "one dimension" not in (tmp_path / "out/report.html").read_text()
    assert (tmp_path / "out/ranks.png").is_file()


QUICK = ("--no-umap", "--bootstrap", "3", "--volumes", "2", "--labelled", "2", "--sample", "20",
         "--fit", "2")  # fmt: skip


def test_the_command(evaluation, cli, tmp_path):
    folder = evaluation.run.folder
    code, out, err = cli("eval_amort", folder, *QUICK, "--transform", "rotate:180")
    assert code == 0, err
    assert "retrieval_rank" in out
    assert f"Report: {folder / 'amort.1/report.html'}" in out
    facts = strict_json(folder / "amort.1/amortization.json")
    assert list(facts["transforms"]) == ["rotate-180.held", "rotate-180.follow"]
    assert facts["options"]["sample"] == 20


def test_the_command_on_a_table(table_evaluation, cli, tmp_path):
    folder = table_evaluation.run.folder
    code, out, err = cli("eval_amort", folder, *QUICK, "-o", tmp_path / "out")
    assert code == 0, err
    assert "not applicable: this run's encoder is a table" in out
    assert "retrieval_rank" not in out
    assert (tmp_path / "out/report.html").is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--transform", "mirror"], "--transform mirror: unknown; known are roll, rotate"),
        (["--transform", "rotate:abc"], "--transform rotate:abc"),
        (["--epoch", "9"], "--epoch 9"),
        (["--labels", "SHORT"], "has shape (3,)"),
        (["--coordinate", "MISSING"], "no such file"),
        (["--sample", "1"], "--sample 1"),
        (["-o", "SHORT"], "not a folder"),
    ],
)
def test_bad_input_writes_nothing(argv, message, evaluation, cli, tmp_path):
    words = {
        "SHORT": write_pickle(tmp_path / "short.pkl", np.zeros(3)),
        "MISSING": str(tmp_path / "missing.pkl"),
    }
    argv = [words.get(word, word) for word in argv]
    place = [] if "-o" in argv else ["-o", tmp_path / "out"]
    code, out, err = cli("eval_amort", evaluation.run.folder, *QUICK, *argv, *place)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not out
    assert [p.name for p in tmp_path.iterdir()] == ["short.pkl"]


def test_the_help_names_the_defaults_of_the_options(cli):
    code, out, _ = cli("eval_amort", "--help")
    assert code == 0
    text = re.sub(r"\s+", " ", out)
    for name in ("sample", "volumes", "labelled", "bootstrap", "batch_size", "seed"):
        default = getattr(EvalOptions(), name)
        flag = "--" + name.replace("_", "-")
        assert re.search(rf"{flag} N [^(]*\(default: {default}\)", text), flag
    assert " ".join(EvalOptions().transforms) in text


def test_damaged_runs_are_one_line(train, flags, plugins, cli, tmp_path):
    import yaml

    folder = train(flags, qdim=16).folder
    good = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "checksums.sha256").unlink()  # as if written so
    for change, says in (
        (lambda c: c["model_args"].pop("pe_dim"), "lacks pe_dim"),
        (lambda c: c["model_args"].update(activation="gelu"), "gelu"),
        (lambda c: c["model_args"].update(zdim=7), "zdim 7"),
        (lambda c: c.clear(), "damaged"),
    ):
        config = yaml.safe_load(yaml.safe_dump(good))
        change(config)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        code, _, err = cli("eval_amort", folder, "--no-umap")
        assert code == 2
        assert err.count("\n") == 1
        assert says in err
    assert not list(folder.glob("amort*"))


def test_somebody_elses_report_is_not_replaced(train, flags, cli, tmp_path):
    folder = train(flags, qdim=16).folder
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.html").write_text("mine")
    code, _, err = cli("eval_amort", folder, "-o", tmp_path / "out")
    assert code == 2
    assert "holds a report.html that is not of eval_amort" in err
    assert (tmp_path / "out/report.html").read_text() == "mine"


def test_names_that_are_no_text_do_not_lose_the_evaluation(evaluation, tmp_path):
    """They are written last: a byte that is not UTF-8, a line break, mathematics that is none."""
    name = "p\udcff\n$x^$"
    run = replace(evaluation.run, folder=tmp_path / name)
    odd = with_(
        evaluation, run=run, results=evaluation.results[:1], label_names=("$\\frac$", "\udcff\n\0")
    )
    page = write_evaluation(odd, tmp_path / name / "out").read_text(encoding="utf-8")
    assert "p\\udcff\n$x^$" in html.unescape(page)
    figure = figures.embeddings(odd.embeddings, odd.labels, None, odd.label_names)
    texts = [t.get_text() for legend in figure.findobj(Legend) for t in legend.get_texts()]
    assert set(texts) >= {"$\\frac$", r"\udcff\n\x00"}
