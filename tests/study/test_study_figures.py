"""Figures of a study: what is drawn is what was measured, everything named, nothing in the way."""

import warnings
from io import BytesIO

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from cryodrgn_amort.measures import Measure
from cryodrgn_amort.study.curve_figures import Curve, invariance, losses
from cryodrgn_amort.study.drawing import look_of
from cryodrgn_amort.study.recovery_figure import Point, recovery
from cryodrgn_amort.study.results import Agreement
from cryodrgn_amort.study.row_figures import agreement, times, volumes

NAN = float("nan")
RECIPES = (
    "baseline", "vlt", "twin", "twin-large", "noise-large", "vlt-zero", "vlt-frozen-zero",
    "vlt-frozen-random", "vlt-frozen-encoder", "small", "twin-small",
)  # fmt: skip
RECOVERY = ("class_knn", "volume_fve")


def known(value, null=0.0, ideal=1.0, spread=0.02):
    return Measure("any", value, value - spread, value + spread, null, ideal, 2000)


def pair(first, second, measures):
    return Agreement((first, 0), (second, 1), measures)


def bare(value):
    return Measure("any", value, None, None, None, None, 2000)


def draw(figure):
    """Draw it in full and hand it back; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(BytesIO(), format="png", dpi=30)
    return figure


def words(figure):
    """All that is written."""
    texts = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return [t.get_text() for t in texts if t.get_visible() and t.get_text()]


def lines(axes, label=None):
    return [line for line in axes.lines if label is None or line.get_label() == label]


def boxes(texts):
    """Return where words stand, without the lines that lead to them."""
    return [Text.get_window_extent(text).shrunk(1, 0.8) for text in texts]


def apart(found):
    return not any(a.overlaps(b) for i, a in enumerate(found) for b in found[:i])


def legends_cover_nothing(figure):
    figure.draw_without_rendering()
    frames = [axes.get_window_extent() for axes in figure.axes if axes.axison]
    return all(
        not legend.get_window_extent().overlaps(frame)
        for legend in [*figure.legends, *filter(None, (a.get_legend() for a in figure.axes))]
        for frame in frames
    )


def curve(label="held, seed 0", sizes=(1, 2, 4), **values):
    values = values or {"retrieval_rank": [known(0.1 * s, 0.5, 0.0) for s in sizes]}
    return Curve(label, np.array(sizes, float), values)


def table(seed=0, epochs=25, **changes):
    epoch = np.arange(1, epochs + 1)
    gen_loss = 0.5 + 0.01 * seed + np.exp(-epoch)
    return {"epoch": epoch, "gen_loss": gen_loss, "kld": 5.0 + epoch, "loss": gen_loss + 0.01,
            **changes}  # fmt: skip


def points(recipes=RECIPES, seeds=(0, 1, 2), **memorisation):
    """Everything at nearly the same place: the worst case for names."""
    rng = np.random.default_rng(0)
    return [
        Point(
            recipe, seed,
            memorisation.get(recipe.replace("-", "_"), known(1 + rng.normal(0, 0.02), ideal=None)),
            {name: known(0.9 + rng.normal(0, 0.01)) for name in RECOVERY},
        )
        for recipe in recipes for seed in seeds
    ]  # fmt: skip


def test_every_recipe_has_a_look_of_its_own():
    looks = [look_of(i) for i in range(28)]
    for i, a in enumerate(looks):
        for b in looks[:i]:
            assert sum(a[part] == b[part] for part in a) <= 1


# invariance


def test_invariance_draws_every_curve_from_the_ideal_at_0():
    shift = [curve("held, seed 0"), curve("held, seed 1"), curve("follow, seed 0")]
    angle = [curve("held, seed 0", (5, 90), displacement=[known(0.3, 0.9, 0), known(0.8, 1, 0)])]
    figure = draw(invariance({"shift": shift, "angle": angle}))
    grid = np.array(figure.axes).reshape(2, 2)
    for one in shift:
        [line] = lines(grid[0, 0], one.label)
        assert line.get_xdata().tolist() == [0, 1, 2, 4]
        assert line.get_ydata().tolist() == [0, *(m.value for m in one.values["retrieval_rank"])]
    bars = [line.get_ydata() for line in grid[0, 0].lines if len(line.get_xdata()) == 2]
    assert [[m.low, m.high] for m in shift[0].values["retrieval_rank"]] == [
        list(bar) for bar in bars[:3]
    ]
    [line] = lines(grid[1, 1], "held, seed 0")
    assert line.get_ydata().tolist() == [0, 0.3, 0.8]
    said = words(figure)
    for word in (
        "Shift",
        "Angle",
        "shift (px)",
        "angle (degrees)",
        "Retrieval rank",
        "null",
        "ideal",
        "Displacement\n(median pair distances)",
        *(c.label for c in shift),
    ):
        assert word in said  # fmt: skip
    assert legends_cover_nothing(figure)


def test_invariance_tells_curves_apart_by_more_than_colour():
    labels = [f"{mode}, seed {seed}" for seed in range(3) for mode in ("held", "follow")]
    figure = invariance({"shift": [curve(label) for label in labels]})
    drawn = [lines(figure.axes[0], label)[0] for label in labels]
    assert len({(to_hex(line.get_color()), line.get_linestyle()) for line in drawn}) == 2
    assert len({line.get_marker() for line in drawn}) == 6
    keys = [text.get_text() for text in figure.legends[0].get_texts()]
    assert keys == sorted(labels, key=lambda label: (label.startswith("follow"), label))


def test_invariance_says_whose_null_it_is_where_they_differ():
    def moved(label, nulls):
        return curve(label, (1, 2), displacement=[known(0.4, null, 0.0) for null in nulls])

    def nulls_of(*curves):
        [axes] = invariance({"shift": curves}).axes
        return [line for line in axes.lines if line.get_linestyle() == ":"]

    held, follow = nulls_of(moved("held", [0.9, 1.0]), moved("follow", [0.9, 1.2]))
    assert held.get_ydata().tolist() == [0.9, 1.0]
    assert follow.get_ydata().tolist() == [0.9, 1.2]
    assert held.get_color() != follow.get_color()
    assert held.get_marker() != follow.get_marker()
    same = nulls_of(moved("held", [1, 1]), moved("follow", [1, 1]))
    assert same[0].get_color() == same[1].get_color()


def test_invariance_bears_what_is_missing():
    odd = curve("held, seed 1", (1, 2), retrieval_rank=[bare(NAN), bare(0.4)])
    only = curve("held, seed 2", (1,), latent_correlation=[known(0.2)])
    figure = draw(invariance({"angle": [curve(), odd, only]}))
    assert len(figure.axes) == 2  # nothing of the two other measures
    [line] = lines(figure.axes[0], "held, seed 1")
    np.testing.assert_array_equal(line.get_ydata(), [NAN, NAN, 0.4])
    for nothing in ({}, {"shift": []}, {"shift": [curve(top1=[known(0.5)])]}):
        assert "nothing of this was measured" in words(draw(invariance(nothing)))


# recovery


def test_recovery_draws_seeds_and_their_mean_and_the_others_beside():
    found = [
        Point("twin", 0, known(0.8), {"class_knn": known(0.90, null=0.2)}),
        Point("twin", 1, known(1.0), {"class_knn": known(0.94, null=0.2)}),
        Point("vlt", 0, known(0.5), {"class_knn": bare(NAN)}),
        Point("baseline", 0, None, {"class_knn": known(0.93, null=0.2)}),
        Point("small", 0, bare(NAN), {}),
    ]
    figure = draw(recovery(found))
    [axes] = figure.axes
    assert {line.get_label() for line in axes.lines if line.get_label()[0] != "_"} == {
        "twin", "baseline"
    }  # fmt: skip
    [mean] = lines(axes, "twin")
    np.testing.assert_allclose(mean.get_xydata(), [[0.9, 0.92]])
    marks = [line.get_xydata().tolist() for line in axes.lines if line.get_markersize() == 3]
    assert [[0.8, 0.9]] in marks
    assert [[1.0, 0.94]] in marks
    [beside] = lines(axes, "baseline")
    assert beside.get_xdata()[0] < 0  # left of all that has a value
    spans = [sorted(line.get_xdata()) for line in axes.lines if line.get_linewidth() == 1.1]
    assert [pytest.approx(0.78), pytest.approx(0.82)] in spans
    assert any(set(line.get_ydata()) == {0.2} for line in axes.lines)  # null
    said = words(figure)
    for word in ("Class kNN accuracy", "share of particles", "none", "null", "1", "3"):
        assert word in said
    assert [t.get_text().split() for t in figure.legends[0].get_texts()] == [
        ["1", "twin"], ["2", "vlt"], ["3", "baseline"], ["4", "small"]
    ]  # fmt: skip
    assert legends_cover_nothing(figure)


def test_recovery_names_never_overlap():
    figure = draw(recovery(points(baseline=None, small=None)))
    assert len(figure.axes) == 2
    figure.draw_without_rendering()
    for axes in figure.axes:
        numbers = [text for text in axes.texts if text.get_text().isdigit()]
        assert sorted(int(t.get_text()) for t in numbers) == list(range(1, 12))
        assert apart(boxes(numbers))


def test_recovery_of_one_recipe_of_plugins_and_of_nothing():
    draw(recovery(points(("baseline",), (0,), baseline=None)))
    figure = draw(recovery(points(("$a_b$", "_c"), (0,))))
    assert [t.get_text().split()[1] for t in figure.legends[0].get_texts()] == ["$a_b$", "_c"]
    for nothing in ([], [Point("vlt", 0, None, {})]):
        assert "nothing of this was measured" in words(draw(recovery(nothing)))


# losses


def test_losses_draws_every_seed_of_every_recipe_and_names_it_at_its_end():
    runs = {recipe: [table(seed) for seed in range(3)] for recipe in RECIPES}
    figure = draw(losses(runs))
    main, beside = figure.axes[::2], figure.axes[1::2]
    assert [len(axes.lines) for axes in main] == [33, 33, 33]
    for axes, name in zip(main, ("gen_loss", "kld", "loss"), strict=True):
        for i, line in enumerate(axes.lines):
            np.testing.assert_array_equal(line.get_ydata(), runs["baseline"][i % 3][name])
    figure.draw_without_rendering()
    for axes in beside:
        assert [text.get_text() for text in axes.texts] == list(RECIPES)
        assert apart(boxes(axes.texts))
    said = words(figure)
    for word in (
        "epoch",
        "nats per particle",
        "mean squared error per pixel",
        "KL divergence",
        "Reconstruction loss, without its steep start",
    ):
        assert word in said  # fmt: skip


def test_losses_shows_the_end_of_every_curve_and_says_when_the_start_is_not_there():
    low = table(gen_loss=np.linspace(0.1, 0.9, 25))
    figure = losses({"rises": [low], "falls": [table()]})
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < 0.1
    assert top > 0.9
    short = losses({"short": [table(epochs=3)]})
    assert short.axes[0].get_title("left") == "Reconstruction loss"
    assert short.axes[0].get_ylim()[1] > table(epochs=3)["gen_loss"][0]


def test_losses_bears_what_is_missing():
    broken = table(gen_loss=np.full(25, NAN))
    broken["kld"][-3:] = NAN
    figure = draw(losses({"$x$": [broken], "one": [table(epochs=1)], "none": []}))
    assert [len(axes.lines) for axes in figure.axes[::2]] == [1, 2, 2]
    assert "$x$" in words(figure)
    without = draw(losses({"a": [{"epoch": np.arange(2), "kld": np.ones(2)}]}))
    assert len(without.axes) == 2
    for nothing in ({}, {"a": []}):
        assert "nothing of this was measured" in words(draw(losses(nothing)))


# agreement


def test_agreement_draws_all_pairs_and_the_band_of_the_seeds():
    rows = [
        pair("vlt", "baseline", {"knn_overlap": known(0.2, 0.0075)}),
        pair("vlt", "baseline", {"knn_overlap": known(0.3, 0.0075)}),
        pair("baseline", "baseline", {"knn_overlap": known(0.4), "other": bare(1)}),
        pair("baseline", "baseline", {"knn_overlap": known(0.5)}),
        pair("twin", "baseline", {"volume_fsc": bare(0.97), "knn_overlap": bare(NAN)}),
    ]  # fmt: skip
    figure = draw(agreement(rows))
    overlap, fsc = figure.axes
    dots = [
        line for line in overlap.lines if line.get_label() in ("o", "D") and len(line.get_xdata())
    ]
    assert [line.get_xdata().tolist() for line in dots[:2]] == [[0.4, 0.5], [0.2, 0.3]]
    assert [round(float(np.mean(line.get_ydata())), 6) for line in dots[:2]] == [0, 1]
    [band] = overlap.patches
    corners = band.get_extents().transformed(overlap.transData.inverted())
    np.testing.assert_allclose([corners.x0, corners.x1], [0.38, 0.52])
    assert not fsc.patches
    assert [t.get_text() for t in overlap.get_yticklabels()] == [
        "baseline and baseline (seeds)", "vlt and baseline", "twin and baseline"
    ]  # fmt: skip
    said = words(figure)
    for word in ("Neighbour overlap", "Volume FSC", "mean correlation", "null"):
        assert word in said
    assert legends_cover_nothing(figure)


def test_agreement_of_one_pair_and_of_nothing():
    draw(agreement([pair("a", "a", {"knn_overlap": bare(0.4)})]))
    draw(agreement([pair("a", "b", {"volume_fsc": bare(NAN)})]))
    for nothing in ([], [pair("a", "b", {"linear_cka": known(1)})]):
        assert "nothing of this was measured" in words(draw(agreement(nothing)))


# times, volumes


def test_times_are_relative_to_the_median_of_the_first():
    rows = {"baseline": np.array([9.0, 10.0, 12.0]), "vlt": np.array([5.0, NAN]), "x": np.array([])}
    figure = draw(times(rows))
    [axes] = figure.axes
    np.testing.assert_allclose(lines(axes, "a round")[0].get_xdata(), [0.9, 1, 1.2])
    np.testing.assert_allclose(lines(axes, "a round")[1].get_xdata(), [0.5, NAN])
    assert [line.get_xdata().tolist() for line in lines(axes, "median")[:2]] == [[1.0], [0.5]]
    said = words(figure)
    for word in ("Time per epoch", "seconds per epoch, relative to baseline", "10 s", "5 s", "vlt"):
        assert word in said
    assert legends_cover_nothing(figure)
    draw(times({"baseline": np.array([NAN]), "vlt": np.array([1.0])}))
    assert "nothing of this was measured" in words(draw(times({})))


def test_volumes_are_framed_and_named():
    pictures = [np.ones((8, 8, 4))] * 2
    figure = draw(volumes(pictures, ["1", "2"], ["#ff0000", "#0000ff"]))
    assert isinstance(figure, Figure)
    [axes] = figure.axes
    assert len(axes.images) == 2
    assert [to_hex(frame.get_edgecolor()) for frame in axes.patches] == ["#ff0000", "#0000ff"]
    assert [text.get_text() for text in axes.texts] == ["1", "2"]
