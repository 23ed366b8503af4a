"""A study as rules of Snakemake: the same steps, marks and dependencies."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from study.test_study import ONE, PLAN, new_study, numbers, run

from cryodrgn_amort.study.snakefile import _literal

SNAKEMAKE = shutil.which(os.environ.get("SNAKEMAKE", "snakemake"))
TWO = {**ONE, "recipes": {"baseline": {"enc-dim": 16}, "vlt": {}}}


def rules(text):
    """Return what rules need, make, and do, by name."""
    found = {}
    for name, body in re.findall(r"^rule (\w+):\n((?:    .*\n?)+)", text, re.MULTILINE):
        lines = dict(re.findall(r"^    (\w+): (.*)$", body, re.MULTILINE))
        found[name] = {
            key: re.findall(r"'([^']+)'", value)
            for key, value in lines.items() if key in ("input", "output")
        }  # fmt: skip
        found[name]["text"] = body
    return found


def test_rules_are_the_steps(tmp_path):
    folder = new_study(tmp_path / "of all kinds", **TWO)
    said = run(folder, "--dry-run", "snakemake").stdout
    assert shlex.split(said)[:3] == ["snakemake", "-s", f"{folder}/Snakefile"]
    assert not (folder / "runs").exists()
    text = (folder / "Snakefile").read_text()
    found = rules(text)
    shells = [
        ast.literal_eval(line) for line in re.findall(r"^    shell: (.*)$", text, re.MULTILINE)
    ]
    words = [shlex.split(line.replace("{log:q}", "log").format()) for line in shells]
    assert all(any(str(folder) in word for word in line) for line in words)
    assert words[0] == ["cryodrgn", "study_amort", "-o", str(folder)]
    lines = run(folder, "--dry-run").stdout.splitlines()
    steps = [re.search(r"# (\S+?)(?:,|$)", line)[1] for line in lines]
    assert set(found) == {"all", "report", *(re.sub(r"\W", "_", step) for step in steps)}
    mark = f"{folder}/steps/%s.json"
    assert set(found["report"]["input"]) == {mark % step for step in steps}
    train = found["train_vlt_seed0"]
    assert train["input"] == [mark % "simulate"]
    assert train["output"] == [mark % "train.vlt.seed0"]
    assert found["eval_vlt_seed0"]["input"] == [mark % "train.vlt.seed0"]
    assert "gpu=GPU" in train["text"]
    assert "gpu=0" in found["simulate"]["text"]


def test_braces_in_paths_are_refused_and_those_of_flags_are_kept(tmp_path):
    braces = new_study(tmp_path / "of {all} kinds", **ONE)
    said = run(braces, "--dry-run", "snakemake", code=2).stderr
    assert "braces are wildcards to Snakemake" in said.splitlines()[-1]
    assert not (braces / "Snakefile").exists()
    assert not (braces / "steps").exists()
    assert ast.literal_eval(_literal("-o a{b}", " > {log:q} && ", "mv {c}")) == (
        "-o a{{b}} > {log:q} && mv {{c}}"
    )


def test_trainings_are_timed_on_the_users_particles(stack, tmp_path):
    plan = {name: part for name, part in {**PLAN, **TWO}.items() if name != "data"}
    poses, ctf = ({f: getattr(stack, f)} for f in ("poses", "ctf"))
    data = {"particles": stack.particles, **poses, **ctf}
    folder = new_study(tmp_path / "study", **{**plan, "data": data})
    before = sorted(os.listdir(stack.folder))
    run(folder, "--dry-run", "snakemake")
    text = (folder / "Snakefile").read_text()
    assert "Times are 2 times what was measured by a few batches on " in text
    assert all(int(n) >= 10 for n in re.findall(r"runtime=(\d+)", text))
    assert not (folder / "runs").exists()
    assert sorted(os.listdir(stack.folder)) == before


@pytest.mark.skipif(SNAKEMAKE is None, reason="no snakemake (name it with SNAKEMAKE=...)")
def test_snakemake_makes_the_same_report(tmp_path):
    folder = new_study(tmp_path / "of all kinds", **TWO)
    run(folder, "--dry-run", "snakemake")
    scripts = os.path.dirname(sys.executable)
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    command = [SNAKEMAKE, "-s", folder / "Snakefile", "--cores", "2", "--config", "gpu=0"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").is_file()
    assert run(folder, "--dry-run").stdout.strip() == ""
    other = new_study(tmp_path / "own", **TWO)
    run(other)
    same_numbers(numbers(folder)["recipes"], numbers(other)["recipes"], "")


def same_numbers(found, expected, where):
    """Compare what was measured, but for times and folders; threads differ."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected.keys() - {"encoding_cost", "folder", "report"}:
            same_numbers(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, pair in enumerate(zip(found, expected, strict=True)):
            same_numbers(*pair, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=0.02, abs=0.02, nan_ok=True), where
    elif not isinstance(expected, str):
        assert found == expected, where
