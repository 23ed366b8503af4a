"""One declaration per flag: it is the flag, its check, its help, and the API's keyword."""

import argparse
import math
from dataclasses import MISSING, dataclass, fields

import numpy as np
import pytest

from cryodrgn_amort import host
from cryodrgn_amort.core import InputError, actions_of
from cryodrgn_amort.options import (
    REPLACED,
    AnchorFlags,
    CompareOptions,
    EvalOptions,
    InferOptions,
    MnistSettings,
    ScoresOptions,
    SimulateOptions,
    StudyOptions,
    TableFlags,
    TimingOptions,
    TrainSettings,
    add_flags,
)
from cryodrgn_amort.options.fields import Options, flag, flags_of
from cryodrgn_amort.runs import settings_from_flags

ALL = (
    AnchorFlags, CompareOptions, EvalOptions, InferOptions, MnistSettings, ScoresOptions,
    SimulateOptions, StudyOptions, TableFlags, TimingOptions, TrainSettings,
)  # fmt: skip
ALONE = [kind for kind in ALL if not any(f.default is MISSING for f in fields(kind))]


@dataclass(frozen=True)
class Made(Options):
    count: int = flag("-c", "--count", default=3, least=1, most=9, help="How many")
    rate: float = flag("--rate", default=0.5, above=0, help="How fast")
    seed: int | None = flag("--seed", default=None, least=0, help="Any")
    loud: bool = flag("--quiet", default=True, help="Say nothing")
    kind: str = flag("--kind", default="a", choices=("a", "b"), help="Which")
    many: tuple[int, ...] = flag("--many", default=(1, 2), least=0, nargs="+", help="Some")


def parsed(kind, *argv):
    parser = argparse.ArgumentParser()
    add_flags(parser, kind)
    return kind.of(parser.parse_args(argv))


def test_a_field_is_a_flag():
    assert parsed(Made) == Made()
    given = parsed(Made, "-c", "4", "--rate", "2", "--quiet", "--many", "5", "6", "--kind", "b")
    assert given == Made(count=4, rate=2.0, loud=False, kind="b", many=(5, 6))
    parser = argparse.ArgumentParser()
    add_flags(parser, Made)
    assert "How many (default: 3)" in parser.format_help()
    assert "Some (default: 1 2)" in parser.format_help()
    assert vars(parser.parse_args([])) == {}  # what is not given leaves no trace


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"count": 0}, "--count 0: 1 to 9 is needed"),
        ({"count": 10}, "--count 10: 1 to 9 is needed"),
        ({"rate": 0.0}, "--rate 0.0: must be positive"),
        ({"rate": math.nan}, "--rate nan: must be positive"),
        ({"rate": math.inf}, "--rate inf: must be positive"),
        ({"seed": -1}, "--seed -1: must not be negative, nor huge"),
        ({"seed": 2**63}, f"--seed {2**63}: must not be negative, nor huge"),
        ({"seed": 10**400}, "must not be negative, nor huge"),
        ({"kind": "c"}, "--kind c: not one of a, b"),
        ({"many": (1, -1)}, "--many -1: must not be negative, nor huge"),
    ],
)
def test_a_field_is_a_check(value, said):
    with pytest.raises(InputError) as err:
        Made(**value)
    assert said in str(err.value)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"cuont": 3}, "cuont: there is no such option; is count meant?"),
        ({"count": 2.5}, "count 2.5: int is needed"),
        ({"count": True}, "count True: int is needed"),
        ({"count": "3"}, "count '3': int is needed"),
        ({"rate": "fast"}, "rate 'fast': float is needed"),
        ({"loud": 1}, "loud 1: bool is needed"),
    ],
)
def test_a_field_is_a_keyword(keywords, said):
    with pytest.raises(InputError, match=said.replace("?", r"\?")):
        Made.of_keywords(keywords)


def test_numbers_of_numpy_are_numbers():
    given = {"count": np.int64(2), "rate": np.float32(0.25), "loud": np.bool_(True), "many": [7]}
    assert Made.of_keywords(given) == Made(count=2, rate=0.25, many=(7,))
    assert Made.of_keywords({"rate": 2}) == Made(rate=2)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_option_is_a_flag_with_help(kind):
    known = flags_of(kind)
    assert {f.name for f in fields(kind)} - known.keys() <= {"ignored", "extra"}
    assert all(one.of_host or one.help for one in known.values())
    names = [name for one in known.values() for name in one.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("kind", ALONE, ids=lambda kind: kind.__name__)
def test_without_flags_the_defaults_stand(kind):
    assert parsed(kind) == kind()


def test_defaults_of_the_host_s_flags_are_the_host_s(monkeypatch, plugins, stack, tmp_path):
    parser = argparse.ArgumentParser()
    host.add_train_vae_args(parser)
    theirs = {action.dest for action in actions_of(parser)} - {"help"}
    ours = {name for name, one in flags_of(TrainSettings).items() if one.of_host}
    assert ours == theirs - REPLACED.keys()
    retyped = {f.name for f in fields(TrainSettings) if f.name in ours and f.default is not MISSING}
    assert retyped == {"emb_type"}
    given = {"particles": stack.particles, "poses": stack.poses, "zdim": 2, "outdir": str(tmp_path)}
    assert settings_from_flags(given, plugins).lr == parser.get_default("lr")
    monkeypatch.setattr(host, "train_vae_defaults", lambda: {**dict.fromkeys(ours), **CHANGED})
    found = settings_from_flags(given, plugins)
    assert (found.lr, found.pdim, found.num_epochs) == (7.0, 5, 11)


CHANGED = {
    "lr": 7.0, "pdim": 5, "num_epochs": 11, "checkpoint": 1, "log_interval": 1, "window_r": 0.5,
    "shuffler_size": 0, "batch_size": 1, "wd": 0.0, "pretrain": 1, "pose_lr": 1.0, "ntilts": 1,
    "angle_per_tilt": 3.0, "t_emb_dim": 1, "tlayers": 1, "tdim": 1, "qlayers": 1, "qdim": 1,
    "players": 1, "feat_sigma": 1.0, "domain": "hartley", "pe_type": "none", "encode_mode": "resid",
}  # fmt: skip


@pytest.mark.parametrize("kind", [InferOptions, StudyOptions])
def test_a_positional_that_is_left_out_is_none(kind):
    given = ["-o", "out"] if kind is StudyOptions else []
    assert parsed(kind, *given).particles is None
