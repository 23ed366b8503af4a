"""Plans: what they stand for, what a change of them changes, and what is wrong with bad ones."""

import argparse
import importlib
import shlex
import shutil
import types

import pytest
import yaml
from helpers import write_pickle
from hypothesis import HealthCheck, given, settings, strategies as st

from cryodrgn_amort import hookimpl
from cryodrgn_amort.core import InputError
from cryodrgn_amort.options import RECIPES, REPAIR, Recipe
from cryodrgn_amort.plugins import Plugins
from cryodrgn_amort.runs import settings_from_flags
from cryodrgn_amort.study import COMMANDS, changed_plan, load_plan
from cryodrgn_amort.study.plan import PLAN
from cryodrgn_amort.study.planfile import PRESETS
from cryodrgn_amort.study.steps import Fingerprints, parse, steps_of, work_of


@pytest.fixture(scope="session")
def parsers(plugins):
    found = {}
    for name in COMMANDS:
        found[name] = argparse.ArgumentParser(prog=name)
        importlib.import_module(plugins.commands()[name].module).add_args(found[name])
    return found


@pytest.fixture
def plan_of(plugins, parsers, tmp_path):
    """Make a plan of the demo's text, some sections replaced."""

    def make(folder=None, plugins=plugins, **sections):
        text = changed_plan(tmp_path / "new", "demo", {}, None)
        text = yaml.safe_dump({**yaml.safe_load(text), **sections}, sort_keys=False)
        return load_plan(folder or tmp_path / "study", text, plugins, parsers)

    return make


def fingerprints(plan):
    work = work_of(plan)
    known = Fingerprints(work)
    return {name: known.of(step) for name, step in work.steps.items()}


def test_recipes_of_plugins_that_need_each_other_or_nothing_that_is_trained(plan_of):
    bring = [
        Recipe("a", "", {"encoder": "vlt"}, {"table_init": "b"}),
        Recipe("b", "", {"encoder": "vlt"}, {"table_init": "a"}),
        Recipe("c", "", {"encoder": "vlt"}, {"table_init": "shift"}),
        Recipe("d", "", {}, {}, command="eval_amort"),
    ]
    plugins = Plugins(found={"p": types.SimpleNamespace(recipes=hookimpl(lambda: bring))})
    for names, says in (
        (["a", "b"], "which needs itself"),
        (["c", "shift"], "train.c.seed0 needs train.shift.seed0, which is not in the plan"),
        (["d"], "eval.d.seed0 needs train.d.seed0, which is not in the plan"),
    ):
        with pytest.raises(InputError, match=says):
            plan_of(plugins=plugins, recipes=dict.fromkeys(["baseline", *names]), more_seeds={})


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_a_plan_holds_it_is_read_or_refused(plugins, parsers, tmp_path, data):
    """Junk at one random place of the demo's plan never gets past as anything but InputError."""
    junk = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=4),
        st.lists(st.integers(-1, 2), max_size=2), st.lists(st.lists(st.text(max_size=2))),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), st.integers(), max_size=2),
    )  # fmt: skip
    plan = yaml.safe_load(changed_plan(tmp_path / "new", "demo", {}, None))
    place = plan
    while isinstance(place, dict) and place:
        key = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(junk)
        break
    try:
        read = load_plan(tmp_path, yaml.safe_dump(plan), plugins, parsers)
    except InputError:
        return
    assert steps_of(read) or not read.recipes


def test_the_real_preset_holds_turns_and_what_they_are_held_against(plugins, parsers, tmp_path):
    plan = load_plan(tmp_path, changed_plan(tmp_path, "real", {}, None), plugins, parsers)
    assert {"baseline", "vlt", "anchored", "alternate", "vlt-frozen-zero"} <= set(plan.recipes)
    assert plan.data["simulate"]["snr"] == 0.1
    assert plan.data["simulate"]["noise"] == "coloured"


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "real"])
def test_presets_hold_every_recipe(preset, plugins, parsers, tmp_path):
    plan = load_plan(tmp_path, changed_plan(tmp_path, preset, {}, None), plugins, parsers)
    assert set(plan.recipes) == {recipe.name for recipe in RECIPES}
    assert len(plan.recipes) == 15


def test_the_paper_preset_is_the_papers_set_up(plugins, parsers, tmp_path):
    from cryodrgn_amort.runs import settings_from_flags

    text = changed_plan(tmp_path, "paper", {}, None)
    plan = load_plan(tmp_path, text, plugins, parsers)
    found = {}
    for step in steps_of(plan).values():
        if step.argv[0] == "train_amort":
            settings = settings_from_flags(parse(parsers["train_amort"], step.argv[1:]), plugins)
            assert (settings.num_epochs, settings.lr) == (50, 1e-4)
            assert (settings.players, settings.pdim, settings.batch_size) == (3, 256, 16)
            found[settings.recipe] = settings
    sizes = {name: (s.qlayers, s.qdim, s.zdim) for name, s in found.items() if "vlt" not in name}
    assert sizes == {
        "baseline": (3, 256, 8), "twin": (3, 256, 8), "twin-large": (5, 1024, 8),
        "noise-large": (5, 1024, 8), "small": (2, 256, 2), "twin-small": (2, 256, 2),
    }  # fmt: skip
    assert plan.data["simulate"]["D"] == 128


def test_parents_come_first_and_are_named(plan_of):
    plan = plan_of(seeds=[4, 7], more_seeds={})
    steps = steps_of(plan)
    order = list(steps)
    step = steps["train.vlt-frozen-encoder.seed7"]
    where = step.argv.index("--table-init")
    assert step.argv[where + 1] == str(plan.folder / "runs" / "baseline.seed7")
    assert "train.baseline.seed7" in step.after
    for name, step in steps.items():
        assert all(order.index(parent) < order.index(name) for parent in step.after)
    assert steps["eval.rotate.seed4"].argv[1] == str(plan.folder / "runs" / "baseline.seed4")
    assert steps["compare.vlt"].argv.count("compare_amort") == 1
    assert len([a for a in steps["compare.vlt"].argv if ".seed" in a]) == 4


def test_a_plugins_recipe_is_like_ours(plan_of, parsers, tmp_path):
    theirs = types.SimpleNamespace(
        recipes=hookimpl(lambda: [Recipe("wide", "a wide network", {"qdim": 2048})])
    )
    plan = plan_of(plugins=Plugins(found={"theirs": theirs}), recipes={"baseline": {}, "wide": {}})
    assert steps_of(plan)["train.wide.seed0"].argv.count("wide") == 1
    assert "compare.wide" in steps_of(plan)


def test_a_change_reaches_what_depends_on_it_and_nothing_else(plan_of):
    before, recipes = fingerprints(plan_of()), dict(plan_of().recipes)

    def changed(**sections):
        after = fingerprints(plan_of(**sections))
        return {name for name in before if before[name] != after.get(name)}

    assert changed() == set()
    vlt = {"train.vlt.seed0", "eval.vlt.seed0", "compare.vlt", "timing"}
    assert changed(recipes={**recipes, "vlt": {"table-lr": 0.01}}) == vlt
    of_baseline = changed(recipes={**recipes, "baseline": {"enc-dim": 64}})
    assert {"train.vlt-frozen-encoder.seed0", "eval.shift.seed0", "compare.vlt"} <= of_baseline
    assert not {"train.vlt.seed0", "eval.vlt.seed0", "simulate"} & of_baseline
    assert changed(evaluate={"bootstrap": 10}) == {n for n in before if n.startswith("eval.")}
    assert changed(data={"simulate": {"n": 10, "D": 32}}) == set(before) - {"mnist"}
    assert changed(recipes={**recipes, "shift": {"transform": ["roll:2"]}}) == {"eval.shift.seed0"}


def test_a_study_can_be_moved(plan_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    assert fingerprints(plan_of(tmp_path / "a")) == fingerprints(plan_of(Path("b/c")))


def test_a_step_depends_on_the_files_that_it_reads(plan_of, stack, tmp_path):
    data = {"particles": stack.particles, "poses": stack.poses, "ctf": stack.ctf}
    truth, table, labels, poses = (tmp_path / n for n in ("truth", "z.pkl", "labels.pkl", "poses"))
    truth.mkdir()
    for path in (truth / "labels.pkl", table, labels):
        write_pickle(path, [1])
    shutil.copy(stack.poses, poses)
    data |= {"labels": str(labels), "truth": str(truth), "poses": str(poses)}
    recipes = {"baseline": None, "vlt": {"table-init": str(table)}, "mnist": None}
    before = fingerprints(plan_of(data=data, recipes=recipes, more_seeds={}))
    evaluations = {name for name in before if name.startswith("eval.")}
    of_vlt = {"train.vlt.seed0", "eval.vlt.seed0", "compare.vlt"}
    for path, changed in (
        (labels, evaluations),
        (truth / "labels.pkl", evaluations),
        (table, of_vlt),
        (poses, set(before) - {"mnist"}),
    ):
        write_pickle(path, [1, 2, 3])
        after = fingerprints(plan_of(data=data, recipes=recipes, more_seeds={}))
        assert {name for name in before if before[name] != after[name]} == changed, path
        before = after


def test_a_step_depends_on_what_its_recipe_says_and_on_versions(plan_of, monkeypatch):
    def plan(width, version="theirs 1.0"):
        recipe = Recipe("wide", "a wide network", {"qdim": width})
        theirs = types.SimpleNamespace(recipes=hookimpl(lambda: [recipe]))
        plugins = Plugins(found={"theirs": theirs})
        monkeypatch.setitem(plugins._origins, "theirs", version)
        return plan_of(plugins=plugins, recipes=dict.fromkeys(["baseline", "wide"]), more_seeds={})

    before = fingerprints(plan(2048))
    of_theirs = {"train.wide.seed0", "eval.wide.seed0", "compare.wide"}
    for other in (plan(1024), plan(2048, "theirs 1.1")):
        after = fingerprints(other)
        assert {name for name in before if before[name] != after[name]} == of_theirs
    assert fingerprints(plan(2048)) == before
    monkeypatch.setattr("cryodrgn_amort.study.steps.__version__", "99")
    assert not set(before.values()) & set(fingerprints(plan(2048)).values())


def test_recipes_that_are_held_against_each_other(plan_of):
    bring = [Recipe("a", "", reference="b"), Recipe("b", "", reference="a")]
    plugins = Plugins(found={"p": types.SimpleNamespace(recipes=hookimpl(lambda: bring))})
    plan = plan_of(plugins=plugins, recipes={"baseline": None, "a": None, "b": None}, more_seeds={})
    assert set(plan.only(["a"]).recipes) == {"a", "b"}


def test_own_flags_come_before_the_recipes_and_those_before_common_ones(plan_of):
    recipes = {"baseline": {}, "small": {}, "twin-small": {"zdim": 3, "window-r": 0.7}}
    plan = plan_of(recipes=recipes, train={"zdim": 8, "lazy": True})
    assert "--zdim" not in steps_of(plan)["train.small.seed0"].argv
    argv = shlex.join(steps_of(plan)["train.twin-small.seed0"].argv)
    assert "--zdim 3" in argv
    assert "--window-r 0.7" in argv
    assert "--lazy --recipe" not in argv
    assert "--lazy" in argv


def test_given_data_and_seeds_go_into_the_plan_and_its_comments_stay(stack, tmp_path):
    data = {"particles": stack.particles, "poses": stack.poses}
    text = changed_plan(tmp_path, None, data, [3, 1])
    found = yaml.safe_load(text)
    assert found["data"] == data
    assert found["seeds"] == [3, 1]
    assert "every choice that it leaves" in text  # the paper's preset
    assert found["train"]["num-epochs"] == 50
    assert "# Flags of eval_amort for all runs." in text
    (tmp_path / PLAN).write_text(text)
    again = changed_plan(tmp_path, None, {}, [5])
    assert yaml.safe_load(again) == {**found, "seeds": [5]}


def test_repair_is_added_to_a_plan_once_and_its_comments_stay(tmp_path):
    names = [recipe.name for recipe in REPAIR]
    plain = changed_plan(tmp_path / "new", "demo", {}, None)
    text = changed_plan(tmp_path / "new", "demo", {}, None, names)
    before, after = (list(yaml.safe_load(t)["recipes"]) for t in (plain, text))
    assert after == before + names
    assert text.startswith(plain.rstrip())
    (tmp_path / "study").mkdir()
    for recipes, wanted in (
        (text[text.index("recipes:") :], text[text.index("recipes:") :]),
        ("recipes:\n- baseline  # first\n- vlt\nseeds: [1]\n",
         "recipes:\n- baseline  # first\n- vlt\n" + "".join(f"- {n}\n" for n in names)
         + "seeds: [1]\n"),
        ("recipes: [baseline, vlt]\n", None),
        ("recipes: {baseline: null, vlt: {zdim: 2}}\n", None),
    ):  # fmt: skip
        (tmp_path / "study/plan.yaml").write_text(recipes)
        found = changed_plan(tmp_path / "study", None, {}, None, names)
        assert wanted in (None, found)
        own = list(yaml.safe_load(recipes)["recipes"])
        assert list(yaml.safe_load(found)["recipes"])[: len(own)] == own
        assert set(yaml.safe_load(found)["recipes"]) == {*own, *names}


def test_what_learns_from_images_made_up_has_its_runs_flags(plan_of):
    plan = plan_of(
        recipes={"baseline": {}, "vlt": {}, "semi": {}, "anchored": {"anchors": 8}, "sleep": {}}
    )
    step = steps_of(plan)["train.anchored.seed0"]
    assert step.after == ("simulate", "train.vlt.seed0")
    assert step.argv[step.argv.index("--from") + 1] == str(plan.layout.run("vlt", 0))
    assert step.argv[step.argv.index("--anchors") + 1] == "8"
    assert not {"--num-epochs", "--lr", "--zdim"} & set(step.argv)
    semi = steps_of(plan)["train.semi.seed0"]
    assert semi.argv[semi.argv.index("--from") + 1] == str(plan.layout.run("baseline", 0))
    assert {"--num-epochs", "--lr", "--zdim"} <= set(semi.argv)
    with pytest.raises(InputError, match=r"recipes\.anchored: needs the recipe vlt"):
        plan_of(recipes={"baseline": {}, "anchored": {}})
    with pytest.raises(InputError, match=r"--zdim 3: --from .* has 8"):
        plan_of(recipes={"baseline": {}, "vlt": {}, "anchored": {"zdim": 3}})


def test_tilt_series(plan_of, parsers, plugins):
    plan = plan_of(
        data={"simulate": {"n": 20, "tilts": 3}},
        train={"zdim": 2, "encode-mode": "tilt", "ntilts": 3},
        recipes={"baseline": {"tdim": 8}, "vlt": {}, "twin": {}},
    )
    for name, encoder in (("baseline", "tilt"), ("vlt", "vlt"), ("twin", "twin")):
        argv = steps_of(plan)[f"train.{name}.seed0"].argv
        settings = settings_from_flags(vars(parsers["train_amort"].parse_args(argv[1:])), plugins)
        assert (settings.encoder, settings.encode_mode) == (encoder, "tilt")
        assert settings.particles == str(plan.layout.simulated / "particles.star")


def test_only_takes_parents_along(plan_of):
    plan = plan_of()
    assert list(plan.only(["vlt-frozen-encoder"]).recipes) == ["baseline", "vlt-frozen-encoder"]
    assert set(plan.only(["twin-small"]).recipes) == {"small", "twin-small"}
    assert set(plan.only(["timing"]).recipes) >= {"baseline", "twin-small", "small", "timing"}
    with pytest.raises(InputError, match="--only nonsense"):
        plan.only(["nonsense"])


ALL = dict.fromkeys(recipe.name for recipe in RECIPES)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"recipes": {"baselin": None}}, "recipes: baselin: unknown"),
        ({"recipes": {}}, "recipes: at least one"),
        ({"recipes": {"vlt": None}}, "recipes.vlt: needs the recipe baseline"),
        ({"recipes": {**ALL, "vlt": 3}}, "recipes: vlt: flags are needed"),
        ({"recipes": {**ALL, "vlt": {"table-lrr": 3}}}, "recipes.vlt: table-lrr: train_amort has"),
        ({"recipes": {**ALL, "vlt": {"table-lr": "x"}}}, "recipes.vlt: argument --table-lr"),
        ({"recipes": {**ALL, "vlt": {"table-lr": {"a": 1}}}}, "recipes: vlt: table-lr: a value"),
        ({"recipes": {**ALL, "twin": {"table-lr": 0.1}}}, "recipes.twin: --table-lr: does not"),
        ({"recipes": {**ALL, "timing": {"only": 3}}}, "recipes.timing: only"),
        ({"recipes": {**ALL, "timing": {"recipes": 3}}}, "recipes.timing: needs the recipe 3"),
        ({"recipes": {**ALL, "timing": {"recipes": ["shift"]}}}, "timing needs train.shift.seed0"),
        ({"recipes": {**ALL, "timing": {"recipes": []}}}, "RUN"),
        ({"recipes": [["baseline"]]}, "recipes: at least one"),
        ({"recipes": {1: None}}, "recipes: 1: unknown"),
        ({"train": {"zdim": 8, "seed": 3}}, "train: seed: is given by the study itself"),
        ({"train": {"zdim": 0}}, "--zdim 0"),
        ({"train": ["zdim"]}, "train: flags are needed"),
        ({"evaluate": {"transform": ["turn:3"]}}, "--transform turn"),
        ({"evaluate": {"boot": 3}}, "evaluate: boot: eval_amort has no such flag"),
        ({"seeds": [0, 0]}, "seeds: [0, 0]"),
        ({"seeds": "0"}, "seeds: 0"),
        ({"seeds": [-1]}, "seeds: [-1]"),
        ({"more_seeds": {"x": [1]}}, "more_seeds: x"),
        ({"more_seeds": {"shift": [1]}}, None),  # has no runs of its own: nothing to do
        ({"more_seeds": {"vlt-frozen-encoder": [5]}}, "needs baseline with that seed"),
        ({"data": {}}, "data: either simulate or particles"),
        ({"data": {"simulate": {}, "particles": "x"}}, "data: simulate stands alone"),
        ({"data": {"simulate": {"N": 3}}}, "data.simulate: N: simulate_amort has no such flag"),
        ({"data": {"particles": "x.mrcs"}}, "data: poses: is needed"),
        ({"data": {"particles": "x.mrcs", "poses": "p.pkl"}}, "x.mrcs: does not exist"),
        ({"data": {"particles": 3, "poses": "p.pkl"}}, "data: particles: a path is needed"),
        ({"nonsense": 1}, "nonsense: no such section"),
    ],
)
def test_bad_plans(plan_of, sections, says):
    if says is None:
        plan_of(**sections)
        return
    with pytest.raises(InputError) as caught:
        plan_of(**sections)
    assert says in str(caught.value)
    assert PLAN in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "a", "[1, 2]", "a: [", "!!python/object/apply:os.system [ls]"]
)
def test_no_plans(text, plugins, parsers, tmp_path):
    with pytest.raises(InputError, match=PLAN):
        load_plan(tmp_path, text, plugins, parsers)


def test_bad_calls_leave_everything_as_it_was(cli, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("x")
    for argv, says in (
        (["-o", taken], "is not empty, and no study"),
        (["-o", taken / "mine.txt"], "not a folder"),
        (["-o", tmp_path / "new", "--preset", "nope"], "--preset nope"),
        (["-o", tmp_path / "new", "--only", "nope"], "--only nope"),
        (["-o", tmp_path / "new", "--jobs", "0"], "--jobs 0"),
        (["-o", tmp_path / "new", "--seeds", "1", "1"], "seeds: [1, 1]"),
        (["-o", tmp_path / "new", "--labels", "labels.pkl"], "PARTICLES"),
        (["x.mrcs", "-o", tmp_path / "new"], "--poses"),
    ):
        code, _, err = cli("study_amort", *argv)
        assert code == 2, err
        assert err.count("\n") == 1
        assert says in err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine.txt", "taken"]
