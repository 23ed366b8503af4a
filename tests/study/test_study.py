"""Studies end to end: everything is done once, a killed one goes on, a change reruns its part."""

import argparse
import contextlib
import html
import importlib
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers import write_pickle

from cryodrgn_amort import host
from cryodrgn_amort.cli import main
from cryodrgn_amort.core import InputError, __version__
from cryodrgn_amort.study import COMMANDS, load_plan
from cryodrgn_amort.study.results import Member
from cryodrgn_amort.study.steps import work_of

PLAN = {
    "data": {"simulate": {"n": 60, "heldout": 4, "D": 16, "seed": 0}},
    "seeds": [0],
    "more_seeds": {"baseline": [1]},
    "train": {"zdim": 2, "num-epochs": 2, "lr": 0.001, "dec-layers": 1, "dec-dim": 16},
    "evaluate": {
        "transform": ["roll:1"], "bootstrap": 10, "volumes": 4, "labelled": 2, "no-umap": True,
        "fit": 2,
    },
    "recipes": {
        "baseline": {"enc-dim": 16}, "vlt": {}, "vlt-frozen-zero": {}, "vlt-frozen-encoder": {},
        "anchored": {"num-epochs": 1, "enc-dim": 16, "anchors": 3},
        "twin": {"enc-dim": 16}, "shift": {"transform": ["roll:1", "roll:2"]},
        "timing": {"recipes": ["baseline", "vlt"], "rounds": 2, "batches": 1},
    },
}  # fmt: skip
# one run, and an evaluation of the least
ONE = {
    "recipes": {"baseline": {"enc-dim": 16}}, "more_seeds": {},
    "evaluate": {
        "transform": ["roll:1"], "bootstrap": 10, "volumes": 2, "labelled": 2, "no-umap": True,
        "fit": 0,
    },
}  # fmt: skip


def command(folder, *more):
    return [sys.executable, "-m", "cryodrgn_amort", "study_amort", "-o", str(folder), *more]


def run(folder, *more, code=0, jobs=1):
    """Run the command in this process; returns what it says on stdout and stderr."""
    out, err, stopped = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["study_amort", "-o", str(folder), "--jobs", str(jobs), *map(str, more)])
        except SystemExit as stop:
            stopped = stop.code
    assert stopped == code, out.getvalue() + err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def new_study(folder, **sections):
    folder.mkdir()
    (folder / "plan.yaml").write_text(yaml.safe_dump({**PLAN, **sections}, sort_keys=False))
    return folder


def numbers(folder):
    """Return study.json without what is about time."""
    facts = json.loads((folder / "study.json").read_text())
    del facts["times"], facts["sha256"]
    return facts


def ran(folder):
    """Count how often each step was run."""
    return {
        log.stem: len(re.findall(r"^cryodrgn \w+_amort ", log.read_text(), re.MULTILINE))
        for log in (folder / "logs").iterdir()
    }


@pytest.fixture
def plan_of_study(plugins):
    """Read the plan in a study's folder."""

    def read(folder):
        parsers = {}
        for name in COMMANDS:
            parsers[name] = argparse.ArgumentParser(prog=name)
            importlib.import_module(plugins.commands()[name].module).add_args(parsers[name])
        return load_plan(folder, (folder / "plan.yaml").read_text(), plugins, parsers)

    return read


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = new_study(tmp_path_factory.mktemp("studies") / "whole")
    said = run(folder, jobs=2).stdout
    return folder, said


def test_everything_is_there(finished):
    folder, said = finished
    facts = json.loads((folder / "study.json").read_text())
    assert facts["missing"] == []
    assert set(facts["recipes"]) == set(PLAN["recipes"])
    assert set(facts["recipes"]["baseline"]["seeds"]) == {"0", "1"}
    assert set(facts["claims"]["vlt"]) >= {"claim", "rule", "rows", "verdict"}
    rows = {(r["label"], r["measure"]): r for r in facts["claims"]["vlt"]["rows"]}
    agreement = rows[("vlt and baseline", "knn_overlap")]
    assert agreement["count"] == 2  # with each of the baseline's seeds
    pairs = [
        p
        for p in facts["agreement"]
        if {p["first"], p["second"]} == {"baseline.seed0", "baseline.seed1"}
    ]
    assert len(pairs) == 1
    assert pairs[0]["only_seed"]
    assert agreement["against"] == pairs[0]["measures"]["knn_overlap"]["value"]
    assert "vlt and baseline" in said
    measures = facts["recipes"]["twin"]["seeds"]["0"]["measures"]
    assert {"class_knn", "volume_fve", "memorisation", "volume_spread"} <= set(measures)
    shifts = facts["recipes"]["shift"]["seeds"]["0"]["transforms"]
    assert set(shifts) == {"roll:1 held", "roll:1 follow", "roll:2 held", "roll:2 follow"}
    held = facts["claims"]["repair-held-out"]["rows"]
    labels = {r["label"] for r in held if r["measure"] == "class_knn_held_out"}
    assert labels == {"baseline, held out", "anchored, held out"}
    assert set(facts["times"]["claims"]) == {"times", "repair-cost"}
    assert set(facts["times"]["seconds_per_epoch"]) == {
        str(Path(folder) / "runs" / f"{name}.seed0") for name in ("baseline", "vlt")
    }
    for name in ("figure3", "figure5", "figure10", "figure20", "figure22", "losses", "table1"):
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
        assert (folder / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF"), name


def test_the_report_holds_every_claim_and_loads_nothing(finished):
    from cryodrgn_amort.study.claims import CLAIMS, REPAIR_CLAIMS

    page = (finished[0] / "report.html").read_text()
    for claim in (*CLAIMS, *REPAIR_CLAIMS):
        assert claim.text in html.unescape(page)
    assert not re.findall(r'(?:src|href)="(?!data:|#|https://arxiv)', page)
    names = set(re.findall(r'href="#([^"]+)"', page))
    assert names <= set(re.findall(r'id="([^"]+)"', page))
    assert "data-triangles" in page
    assert page.index("<h2>Claims") < page.index("recipe-baseline")


def test_memorisation_is_its_definition(finished):
    folder = finished[0]
    facts = numbers(folder)["recipes"]["twin"]["seeds"]["0"]["measures"]["memorisation"]
    losses = {}
    for name in ("vlt-frozen-zero", "twin", "baseline"):
        import pickle

        with open(folder / "evals" / f"{name}.seed0" / "reconstruction.pkl", "rb") as handle:
            losses[name] = np.nanmean(pickle.load(handle))
    hom, twin, real = losses.values()
    assert facts["value"] == pytest.approx((hom - twin) / (hom - real))


def test_a_second_call_runs_nothing(finished):
    folder = finished[0]
    before, counts = numbers(folder), ran(folder)
    assert "done already" in run(folder).stdout
    assert ran(folder) == counts
    assert numbers(folder) == before
    assert run(folder, "--dry-run").stdout.strip() == ""


def test_steps_of_other_versions(finished, tmp_path, monkeypatch, plan_of_study):
    """They are done again, which is said."""
    folder = tmp_path / "old"
    shutil.copytree(finished[0], folder)
    steps = work_of(plan_of_study(folder)).steps
    assert run(folder, "--dry-run").stdout.strip() == ""
    monkeypatch.setattr("cryodrgn_amort.study.steps.__version__", "99")
    assert len(run(folder, "--dry-run").stdout.splitlines()) == len(steps)

    def stop(*_):
        raise InputError("enough")

    monkeypatch.setattr("cryodrgn_amort.study.runner._Runner.run", stop)
    for path in (folder / "steps").glob("*.planned"):
        path.unlink()
    shutil.copytree(finished[0] / "steps", folder / "steps", dirs_exist_ok=True)
    said = run(folder, code=2).stdout
    assert f"{len(steps)} steps were done with cryodrgn-amort {__version__}" in said


CHANGED = {**PLAN, "recipes": {**PLAN["recipes"], "vlt": {"table-lr": 0.5}}}


def changed_copy(finished, folder):
    shutil.copytree(finished, folder)  # a study can be moved, too
    (folder / "plan.yaml").write_text(yaml.safe_dump(CHANGED))
    return folder


@pytest.fixture(scope="module")
def changed(finished, tmp_path_factory):
    folder = changed_copy(finished[0], tmp_path_factory.mktemp("studies") / "changed")
    run(folder, jobs=2)
    return folder


def test_a_change_of_the_plan_reruns_what_depends_on_it(finished, changed):
    counts, before, after = ran(finished[0]), numbers(finished[0]), numbers(changed)
    again = {name for name, count in ran(changed).items() if count > counts[name]}
    assert again == {
        "train.vlt.seed0", "eval.vlt.seed0", "compare.vlt", "timing",
        "train.anchored.seed0", "eval.anchored.seed0", "compare.anchored",
    }  # fmt: skip
    assert after["recipes"]["twin"] == before["recipes"]["twin"]
    assert after["recipes"]["vlt"] != before["recipes"]["vlt"]


def test_killed_and_started_again_it_ends_with_the_same_numbers(finished, changed, tmp_path):
    folder = changed_copy(finished[0], tmp_path / "killed")
    counts = ran(folder)
    env = {**os.environ, "CRYODRGN_AMORT_DISABLE_PLUGINS": "1"}
    for marker in ("runs/vlt.seed0/weights.1.pkl", "steps/eval.vlt.seed0.planned"):
        begun = time.time()
        with open(tmp_path / "out.log", "a") as log:
            process = subprocess.Popen(
                command(folder, "--jobs", "2"), stdout=log, stderr=log, env=env
            )
            while not written_since(folder / marker, begun) and process.poll() is None:
                time.sleep(0.02)
            assert process.poll() is None, (tmp_path / "out.log").read_text()
            process.send_signal(signal.SIGKILL)
            process.wait()
    run(folder, jobs=2)
    assert numbers(folder) == numbers(changed)
    assert ran(folder)["train.baseline.seed0"] == counts["train.baseline.seed0"]  # done: kept


def written_since(path, begun):
    try:
        return path.stat().st_mtime > begun
    except FileNotFoundError:
        return False


def test_dry_run_prints_commands_that_a_shell_can_run(tmp_path):
    """Ours are run in this process, as a shell would split them; what follows them in a shell."""
    folder = new_study(tmp_path / "dry run", **ONE)
    lines = run(folder, "--dry-run").stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["simulate_amort", "train_amort", "eval_amort"]
    assert not (folder / "runs").exists()
    for line in lines:
        ours, then = line.split(" && ")
        assert ours.startswith("cryodrgn ")
        main(shlex.split(ours)[1:])
        subprocess.run(["bash", "-c", then], check=True)
    assert run(folder, "--dry-run").stdout.strip() == ""
    assert "done already" in run(folder).stdout
    assert not (folder / "logs").exists()  # the study itself ran nothing
    assert set(numbers(folder)["recipes"]["baseline"]["seeds"]) == {"0"}


@pytest.mark.parametrize("kind", ["star", "cs", "txt"])
def test_the_users_own_files(kind, stack, tmp_path, monkeypatch):
    particles, more = tmp_path / f"particles.{kind}", []
    if kind == "star":
        monkeypatch.chdir(stack.folder)
        run_host_utils("write_star", "particles.mrcs", "--ctf", stack.ctf, "-o", particles)
        more = ["--datadir", stack.folder]
    elif kind == "cs":
        rows = np.zeros(stack.n, [("blob/path", "S64"), ("blob/idx", "u4"), ("uid", "u8")])
        rows["blob/path"], rows["blob/idx"] = b">particles.mrcs", np.arange(stack.n)
        with open(particles, "wb") as handle:
            np.save(handle, rows)
        more = ["--datadir", stack.folder]
    else:
        particles.write_text(stack.particles + "\n")
    labels = write_pickle(tmp_path / "labels.pkl", np.arange(stack.n) % 3)
    own = tmp_path / "plan.yaml"
    own.write_text(yaml.safe_dump({**PLAN, **ONE}))
    folder = tmp_path / "study"
    run(folder, particles, "--poses", stack.poses, "--ctf", stack.ctf, "--labels", labels,
        "--preset", own, *more)  # fmt: skip
    found = numbers(folder)["recipes"]["baseline"]["seeds"]["0"]
    assert found["n"] == stack.n
    assert "class_knn" in found["measures"]
    assert "volume_fve" not in found["measures"]  # there is no truth


def run_host_utils(name, *argv):
    module = importlib.import_module(f"cryodrgn.commands_utils.{name}")
    parser = argparse.ArgumentParser()
    module.add_args(parser)
    module.main(parser.parse_args([str(a) for a in argv]))


def test_labels_of_the_wrong_length_are_refused_before_anything_is_trained(stack, tmp_path):
    labels = write_pickle(tmp_path / "labels.pkl", np.arange(7))
    own = tmp_path / "plan.yaml"
    own.write_text(yaml.safe_dump({**PLAN, "recipes": {"baseline": {}}, "more_seeds": {}}))
    done = run(tmp_path / "study", stack.particles, "--poses", stack.poses, "--labels", labels,
               "--preset", own, code=2)  # fmt: skip
    assert done.stderr.count("\n") == 1
    assert "labels.pkl" in done.stderr
    assert not (tmp_path / "study" / "runs").exists()


def test_a_step_that_fails_spares_the_others(tmp_path):
    recipes = {**ONE["recipes"], "vlt": {"table-init": str(tmp_path / "none")}}
    folder = new_study(tmp_path / "failing", **{**ONE, "recipes": recipes})
    done = run(folder, code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert "train.vlt.seed0: --table-init" in last
    assert "eval.vlt.seed0: left out" in last
    assert numbers(folder)["missing"] == ["vlt"]
    assert numbers(folder)["recipes"]["baseline"]["seeds"]


@pytest.mark.parametrize("damage", [b"", b"\0" * 2000])
def test_damaged_volumes_without_a_checksum_are_named(damage, tmp_path):
    host.write_mrc(str(tmp_path / "vol.0.mrc"), np.ones((16, 16, 16), np.float32), is_vol=True)
    member = Member("vlt", 0, tmp_path, {"labelled": [0, 1]}, {}, {})
    (tmp_path / "vol.1.mrc").write_bytes(damage)
    with pytest.raises(InputError, match=r"vol\.1\.mrc: damaged"):
        member.volumes()


def test_two_at_a_time_are_refused(finished):
    from cryodrgn_amort.study import work_locked

    with work_locked(finished[0], "study_amort"):
        done = run(finished[0], code=2)
    assert "another study_amort is running it" in done.stderr


def test_after_ctrl_c_no_worker_goes_on(tmp_path, plan_of_study, plugins, monkeypatch):
    """All that the study started ends at once; what the caller started does not."""
    from cryodrgn_amort.study import runner as study

    def interrupted(self, waiting):
        self.pool.submit(time.sleep, 600)
        while not set(multiprocessing.active_children()) - {mine}:
            time.sleep(0.01)
        raise KeyboardInterrupt

    mine = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(600,))
    mine.start()
    try:
        folder = new_study(tmp_path / "study")
        monkeypatch.setattr(study._Runner, "run", interrupted)
        work = work_of(plan_of_study(folder))
        with study.work_locked(folder, "study_amort"), pytest.raises(KeyboardInterrupt):
            study.run_steps(work, plugins.commands(), 1)
        assert multiprocessing.active_children() == [mine]
    finally:
        mine.kill()
        mine.join()


def test_ctrl_c_while_workers_are_prepared_is_said_in_one_line(tmp_path):
    """It reaches all processes of a terminal, also one that imports for the workers."""
    code = (
        "import multiprocessing, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also in the background
        "from cryodrgn_amort.study import runner as study\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('forkserver')\n"
        "    context.set_forkserver_preload(['slow_import'])\n"
        "    study._start_server()\n"
        "    print('begun', flush=True)\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        time.sleep(1)\n"
    )
    (tmp_path / "slow_import.py").write_text("import time\ntime.sleep(0.5)\n")
    (tmp_path / "main.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, "main.py"], cwd=tmp_path, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 0


def test_digits_are_held_against_particles():
    from types import SimpleNamespace

    from cryodrgn_amort.measures import Measure
    from cryodrgn_amort.study.claims import CLAIMS
    from cryodrgn_amort.study.judging import HOLDS, NOT, OPEN, PART

    [claim] = [claim for claim in CLAIMS if claim.name == "digits"]

    def verdict(rank, score, with_digits=True):
        def measures(name, value, null):
            return {name: Measure(name, value, None, None, null, 0.0, 100)}

        parts = {
            "shift1": measures("retrieval_rank", rank, 0.5),
            "held_out": measures("held_out_score", score, 0.0),
        }
        study = SimpleNamespace(
            digits={"vae": [parts]} if with_digits else {},
            measured=lambda _, name: list(measures(name, 0.1, 0.0).values()),
            transformed=lambda *of: list(measures(of[-1], 0.4, 0.5).values()),
        )
        rows = claim.rows(study)
        return claim.bounds.judge(rows) if rows else OPEN

    assert verdict(0.1, 0.9) == HOLDS
    assert verdict(0.3, 0.9) == PART
    assert verdict(0.39, 0.9) == NOT
    assert verdict(0.1, 0.05) == NOT  # held-out digits fare no better
    assert verdict(0.1, 0.9, with_digits=False) == OPEN


def test_encoders_of_a_second_stage_are_judged_and_what_they_are_compared_with_is_not():
    from cryodrgn_amort.measures import Measure
    from cryodrgn_amort.study.claims import REPAIR_CLAIMS
    from cryodrgn_amort.study.judging import HOLDS, NOT, OPEN, PART

    nulls = {"class_knn": 0.2, "class_knn_held_out": 0.2, "retrieval_rank": 0.5}
    bad = {
        "class_knn": 0.9, "class_knn_held_out": 0.3, "retrieval_rank": 0.45, "encoding_cost": 0.7,
        "noise_swap_noise": 0.8,
    }  # fmt: skip
    good = {
        "class_knn": 0.9, "class_knn_held_out": 0.88, "retrieval_rank": 0.01, "encoding_cost": 0.1,
    }  # fmt: skip

    def verdicts(**recipes):
        def measured(recipe, name):
            value = recipes.get(recipe, {}).get(name)
            return (
                [] if value is None else [Measure(name, value, None, None, nulls.get(name), 0, 9)]
            )

        study = SimpleNamespace(
            measured=measured,
            transformed=lambda recipe, _t, _mode, name: measured(recipe, name),
            of=lambda recipe: [recipe] if recipe in recipes else [],
            recipe=lambda recipe: SimpleNamespace(reference="vlt"),
        )
        found = {}
        for claim in REPAIR_CLAIMS:
            rows = claim.rows(study)
            name = claim.name.removeprefix("repair-")
            found[name] = claim.bounds.judge(rows) if rows else OPEN
        return found

    both = verdicts(baseline=bad, vlt={"class_knn": 0.92}, sleep=good, anchored=good)
    assert both == dict.fromkeys(("heterogeneity", "held-out", "invariance", "cost"), HOLDS) | {
        "copies": OPEN
    }
    worse = {**good, "class_knn_held_out": 0.8, "retrieval_rank": 0.05, "encoding_cost": 0.3}
    found = verdicts(baseline=bad, vlt={"class_knn": 0.92}, sleep=good, anchored=worse)
    assert [found[k] for k in ("held-out", "invariance", "cost")] == [PART] * 3
    found = verdicts(baseline=bad, vlt={"class_knn": 0.92}, anchored=bad)
    assert [found[k] for k in ("held-out", "invariance", "cost")] == [NOT] * 3
    assert verdicts(baseline=bad)["held-out"] == OPEN
    assert verdicts(baseline=bad, augment={**bad, "class_knn": 0.4})["copies"] == HOLDS
    assert verdicts(baseline=bad, augment=good)["copies"] == NOT
