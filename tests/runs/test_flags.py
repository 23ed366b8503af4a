"""Every command line that train_vae takes is taken, or a line says what of it is not."""

import argparse

import numpy as np
import pytest
import torch
from helpers import read_pickles

from cryodrgn_amort.cli import train_amort
from cryodrgn_amort.core import InputError
from cryodrgn_amort.runs import settings_from_flags

BASE = ["p.mrcs", "-o", "out", "--zdim", "3", "--poses", "poses.pkl"]


def hosts_parser():
    from cryodrgn.commands import train_vae

    parser = argparse.ArgumentParser()
    train_vae.add_args(parser)
    return parser


def ours():
    parser = argparse.ArgumentParser()
    train_amort.add_args(parser)
    return parser


def given(argv):
    """Return the flags as ``train_amort`` hands them on."""
    return vars(ours().parse_args([str(a) for a in argv]))


VALUES = {  # of each flag of train_vae, ordinary and extreme ones
    "--ctf": ["ctf.pkl"], "--load": ["latest", "w.pkl"], "--checkpoint": [0, 1, 5, 1000],
    "--log-interval": [1, 1000], "--seed": [0, 2**31], "--shuffle-seed": [0, 5],
    "--ind": ["ind.pkl"], "--window-r": [0, 0.5, 0.85, 0.99], "--datadir": ["."],
    "--shuffler-size": [0, 64], "--num-workers": [0, 1, 16], "--max-threads": [1, 16],
    "--ntilts": [10], "--t-emb-dim": [64], "--tlayers": [3], "--tdim": [1024],
    "--dose-per-tilt": [2.9], "--angle-per-tilt": [3], "--num-epochs": [1, 50],
    "--batch-size": [1, 8], "--wd": [0, 0.1], "--lr": [1e-4], "--beta": [0, 0.125, "a"],
    "--beta-control": [1.0], "--pretrain": [0, 1], "--emb-type": ["s2s2", "quat"],
    "--pose-lr": [3e-4], "--enc-layers": [0, 3], "--enc-dim": [1024],
    "--encode-mode": ["conv", "resid", "mlp", "tilt"], "--enc-mask": [-1, 5],
    "--dec-layers": [1, 3], "--dec-dim": [1024], "--feat-sigma": [0.5], "--pe-dim": [4],
    "--pe-type": ["geom_ft", "geom_full", "geom_lowf", "geom_nohighf", "linear_lowf", "gaussian",
                  "none"],
    "--domain": ["hartley", "fourier"], "--activation": ["relu", "leaky_relu"],
}  # fmt: skip
IGNORED = {  # by the flag, or flag and value: what is said of it
    "--multigpu": "torchrun", "--shuffler-size 64": "without effect but with --lazy",
    "--num-workers 1": "but with --lazy", "--num-workers 16": "but with --lazy",
    "--ntilts": "is for tilt series", "--random-tilts": "is for tilt series",
    "--t-emb-dim": "is for tilt series", "--tlayers": "is for tilt series",
    "--tdim": "is for tilt series", "--dose-per-tilt": "is for tilt series",
    "--angle-per-tilt": "is for tilt series",
    "--pretrain": "needs --do-pose-sgd", "--emb-type": "needs --do-pose-sgd",
    "--pose-lr": "needs --do-pose-sgd",
}  # fmt: skip
OF_NETWORKS = ("--enc-layers", "--enc-dim", "--enc-mask", "--use-real", "--encode-mode")
REFUSED = {  # what would change the result, and is not what was asked for
    "--beta a": "a schedule needs --beta-control",  # train_vae stops there, too
    "--pe-type none": "the host's Fourier decoder cannot take it",
}
REFUSED_OF_NETWORKS = {
    "--use-real": "real-space encoders are not supported",
    "--encode-mode conv": "real-space encoders are not supported",
}


def command_lines():
    parser = hosts_parser()
    for action in parser._actions:
        if not action.option_strings or action.dest in ("help", "outdir", "zdim", "poses"):
            continue
        flag = action.option_strings[-1]
        if action.nargs == 0:
            yield [flag]
        elif flag == "--norm":
            yield [flag, "0", "12.5"]
        else:
            yield from ([flag, str(value)] for value in VALUES[flag])  # KeyError: a new flag


@pytest.mark.parametrize("encoder", [None, "vlt"])
@pytest.mark.parametrize("line", list(command_lines()), ids=" ".join)
def test_what_train_vae_takes_is_taken_or_refused_for_a_reason(line, encoder, plugins):
    hosts_parser().parse_args([*BASE, *line])
    flags = given([*BASE, *line, *(["--encoder", encoder] if encoder else [])])
    text, name = " ".join(line), line[0]
    refused = {**REFUSED, **({} if encoder else REFUSED_OF_NETWORKS)}
    if reason := refused.get(text):
        with pytest.raises(InputError, match=reason) as refusal:
            settings_from_flags(flags, plugins)
        assert name in str(refusal.value)
        assert "\n" not in str(refusal.value)
        return
    ignored = settings_from_flags(flags, plugins).ignored
    said = IGNORED.get(text, IGNORED.get(name))
    if encoder and name in OF_NETWORKS and text != "--encode-mode tilt":
        said = "does not apply to --encoder vlt, ignored"
    assert len(ignored) == (said is not None)
    assert all(one.startswith(name) and said in one and "\n" not in one for one in ignored)


# As the host's own tutorials and older versions have it, but for paths and sizes
TUTORIALS = {
    "EMPIAR-10076, pilot": """particles.128.mrcs --poses pose.pkl --ctf ctf.pkl --zdim 8 -n 50
        -o out --enc-dim 256 --enc-layers 3 --dec-dim 256 --dec-layers 3""",
    "with --multigpu": """particles.256.mrcs --poses pose.pkl --ctf ctf.pkl --zdim 8 -n 25 -o out
        --ind ind.pkl --enc-dim 1024 --dec-dim 1024 --multigpu -b 24""",
    "version 0.3": """particles.256.txt --poses poses.pkl --ctf ctf.pkl --ind ind.pkl -o out
        --zdim 10 --enc-dim 1024 --dec-dim 1024 --amp -n 50 --domain hartley""",
    "version 0.2": """particles.mrcs --poses poses.pkl --ctf ctf.pkl --zdim 1 -n 200 -o out
        --qdim 256 --qlayers 3 --pdim 256 --players 3 --amp --relion31""",
    "EMPIAR-10180, lazily": """particles.star --datadir . --poses pose.pkl --ctf ctf.pkl --zdim 8
        -n 20 -o out --lazy --num-workers 4 --max-threads 8 --uninvert-data --seed 0 --beta 0.5
        --shuffler-size 1000""",
    "tilt series": """particles.star --datadir . --encode-mode tilt --ntilts 10
        --dose-per-tilt 2.93 --angle-per-tilt 3 --poses pose.pkl --ctf ctf.pkl --zdim 8 -n 50
        -o out --t-emb-dim 64 --tdim 1024 --tlayers 3 --enc-dim 1024 --enc-layers 3
        --dec-dim 1024 --dec-layers 3 -b 8 --beta .025""",
    "pose refinement": """particles.mrcs --poses pose.pkl --ctf ctf.pkl --zdim 8 -n 20 -o out
        --do-pose-sgd --domain hartley --emb-type quat --pretrain 5 --pose-lr 1e-3""",
}


@pytest.mark.parametrize("encoder", [None, "vlt", "alternate"])
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorials_command_takes_one_changed_word(name, encoder, plugins):
    argv = TUTORIALS[name].split()
    if encoder == "alternate" and {"tilt", "--do-pose-sgd"} & set(argv):
        with pytest.raises(InputError, match="--encoder alternate"):
            settings_from_flags(given([*argv, "--encoder", encoder]), plugins)
        return
    more = ["--encoder", encoder] if encoder else []
    found = settings_from_flags(given([*argv, *more]), plugins)
    assert found.encoder == (encoder or ("tilt" if "tilt" in argv else "resid"))
    if "--pdim" in argv:
        assert (found.pdim, found.players) == (256, 3)
    said = [one.split(":")[0].split()[0] for one in found.ignored]
    assert len(said) == len(set(said))
    assert set(said) <= {*OF_NETWORKS, *IGNORED, "--emb-type", "--relion31", "--t-emb-dim"}


def test_abbreviations_mean_what_they_mean_to_train_vae():
    """Every beginning of a flag that train_vae understands, although ours begin like it."""
    parser, own = hosts_parser(), ours()
    tried = 0
    for action in parser._actions:
        for flag in (s for s in action.option_strings if s.startswith("--")):
            value = {0: [], 2: ["1", "2"]}.get(action.nargs, ["1"])
            value = [next(iter(action.choices))] if action.choices else value
            for end in range(3, len(flag)):
                line = [*BASE, flag[:end], *value]
                try:
                    theirs = parser.parse_args(line)
                except SystemExit:  # ambiguous, or help
                    continue
                found = {k: v for k, v in vars(own.parse_args(line)).items() if k != "particles"}
                assert found.items() <= vars(theirs).items(), line
                tried += 1
    assert tried > 150
    assert own.parse_args([*BASE, "--encode", "tilt"]).encode_mode == "tilt"
    assert own.parse_args([*BASE, "--encode=tilt", "--encoder=vlt"]).encoder == "vlt"
    assert own.parse_args([*BASE, "--encode-m", "mlp"]).encode_mode == "mlp"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"num_workers": 3}, "--num-workers 3: without effect but with --lazy"),
        ({"do_pose_sgd": True, "emb_type": "quat"}, "--emb-type quat: without effect, as in"),
        ({"encoder": "vlt", "qdim": 64}, "--enc-dim 64: does not apply to --encoder vlt, ignored"),
        ({"encoder": "vlt", "enc_mask": 5}, "--enc-mask 5: does not apply to --encoder vlt"),
        ({"encoder": "vlt", "encode_mode": "mlp"}, "--encode-mode mlp: does not apply to"),
    ],
)
def test_flags_without_effect_are_said_to_have_none(more, says, train, flags, tmp_path):
    train(flags, **more)
    log = (tmp_path / "run" / "run.log").read_text()
    assert says in log
    plain = {k: v for k, v in more.items() if k in ("encoder", "do_pose_sgd")}
    train(flags, **plain, outdir=str(tmp_path / "plain"))
    for name in ("z.pkl", "config.yaml"):
        a, b = ((tmp_path / run / name).read_bytes() for run in ("run", "plain"))
        if name == "config.yaml":
            a, b = ([line for line in text.splitlines() if b"outdir" not in line and
                     b"time:" not in line] for text in (a, b))  # fmt: skip
        assert a == b


def test_checkpoint_0_writes_the_last_epoch_alone(train, flags, tmp_path):
    train(flags, checkpoint=0, num_epochs=3)
    names = {p.name for p in (tmp_path / "run").glob("weights*")}
    assert names == {"weights.3.pkl", "weights.pkl"}
    train(flags, checkpoint=3, num_epochs=3, outdir=str(tmp_path / "other"))
    a, b = (read_pickles(tmp_path / run / "z.pkl") for run in ("run", "other"))
    np.testing.assert_array_equal(a, b)


def test_a_window_that_falls_from_the_centre_is_the_hosts(stack, tmp_path):
    """``--window-r 0``: images as the host's own data set has them."""
    from cryodrgn.dataset import ImageDataset

    from cryodrgn_amort.data import ParticleSource, load_particles

    source = ParticleSource(stack.particles, stack.poses, stack.ctf, window_r=0.0)
    particles = load_particles(source)
    theirs = ImageDataset(stack.particles, lazy=False, invert_data=True, window_r=0.0)[[0, 1, 2]]
    own = particles.hartley(particles.raw(torch.arange(3)))
    torch.testing.assert_close(own, theirs["y"])
