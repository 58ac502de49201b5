"""Killed at a moment of its own choosing, and started again: the same run, bit for bit."""

import itertools
import os
import random
import signal

import pytest
from small import METHODS, PAIRS, arguments, outcome, run
from warm import Command

from common.running import checkpoint
from common.running.folder import read_json
from common.running.run import Run
from common.scoring import Scoring

pytestmark = pytest.mark.usefixtures("narrow")

HOW = ["run.checkpoint_every_steps=2", "patch_size=8", "optimization.batch_size=12"]
STEPS = 8  # of both epochs
MOMENTS = {  # what is called at that moment
    "step": (Run, "end_step"),
    "fsync": (os, "fsync"),
    "link": (os, "link"),
    "replace": (os, "replace"),
    "resume": (checkpoint.TrainState, "restore"),
    "scoring": (Scoring, "validate"),
    "finish": (Run, "finish"),
}


def kill_at(moment, n, number=signal.SIGKILL):
    """In this process: a signal to itself at the n-th such moment."""
    owner, name = MOMENTS[moment]
    original, calls = getattr(owner, name), itertools.count(1)

    def killing(*args, **kwargs):
        if next(calls) == n:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, killing)


def how(backbone):
    return HOW if backbone == "vit_tiny" else [HOW[0], HOW[2]]


def tried(
    folder,
    tiny_set,
    method,
    backbone,
    moments,
    number=signal.SIGKILL,
    code=None,
    more=(),
    last=None,
):
    """A run that is killed at each moment in turn, and then left alone; its folder.

    more: overrides of every start; last: of the last one instead, which no resume may notice.
    """
    last = more if last is None else last
    argv = arguments(method, tiny_set, folder, "killed", *how(backbone), *more, backbone=backbone)
    for moment, n in moments:
        ended = Command(folder, method, *argv, first=(kill_at, moment, n, number)).wait()
        assert ended == (-signal.SIGKILL if code is None else code), (moment, n)
    run(method, folder, tiny_set, "killed", *how(backbone), *last, backbone=backbone)
    return folder / "killed"


def same(killed, whole, count):
    ours, theirs = outcome(killed), outcome(whole)
    identical = all(a == b for a, b in zip(ours, theirs, strict=True))
    count("kill and resume", tried=1, identical=identical)
    for a, b in zip(ours, theirs, strict=True):
        assert a == b


def moments_of(method, backbone, trial):
    """A random step, the same at every run of this test."""
    return [("step", random.Random(f"{method} {backbone} {trial}").randint(1, STEPS))]


def kills(tmp_path, tiny_set, method, backbone, trials, count):
    whole = run(method, tmp_path, tiny_set, "whole", *how(backbone), backbone=backbone)
    for trial in trials:
        (tmp_path / str(trial)).mkdir()
        moments = moments_of(method, backbone, trial)
        killed = tried(tmp_path / str(trial), tiny_set, method, backbone, moments)
        same(killed, whole, count)


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_at_a_random_step(method, backbone, tmp_path, tiny_set, count):
    kills(tmp_path, tiny_set, method, backbone, range(2), count)


@pytest.mark.long
@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_at_ten_more_random_steps(method, backbone, tmp_path, tiny_set, count):
    kills(tmp_path, tiny_set, method, backbone, range(2, 13), count)


@pytest.fixture(scope="module")
def whole(tiny_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run("byol", folder, tiny_set, "whole", *how("resnet18"))


CASES = {  # moments, one a start
    "before the first checkpoint": [("step", 1)],
    "while a checkpoint is written": [("fsync", 3)],
    "between the two names": [("replace", 5)],
    "at the end of an epoch": [("step", STEPS // 2)],
    "while validation is scored": [("scoring", 1)],
    "after the last step": [("finish", 1)],
    "three times, once while it resumes": [("step", 5), ("resume", 1), ("step", 2)],
    "at every second step": [("step", 2)] + [("step", 3)] * 3,
    "and gone on with by other workers": [("step", 5)],
}


@pytest.mark.parametrize("case", CASES)
def test_at_a_moment(case, whole, tmp_path, tiny_set, count):
    last = ["data.num_workers=2"] if "workers" in case else []
    killed = tried(tmp_path, tiny_set, "byol", "resnet18", CASES[case], last=last)
    same(killed, whole, count)


@pytest.mark.parametrize("method", METHODS)
def test_asked_to_stop(method, tmp_path, tiny_set, count):
    """In mid-epoch and at an epoch's last step; no step is done again."""
    backbone = "vit_tiny" if method == "mae" else "resnet18"
    whole = run(method, tmp_path, tiny_set, "whole", *how(backbone))
    moments = [("step", STEPS // 2 - 1), ("step", 1)]
    killed = tried(tmp_path, tiny_set, method, backbone, moments, number=signal.SIGTERM, code=75)
    assert read_json(killed / "provenance.json")["step"] == STEPS // 2
    same(killed, whole, count)


@pytest.mark.long
@pytest.mark.parametrize("more", ["optimization.precision=bf16", "run.compile=true"])
def test_in_another_arithmetic(more, tmp_path, tiny_set, count):
    whole = run("simclr", tmp_path, tiny_set, "whole", *how("resnet18"), more)
    moments = [("step", STEPS // 2 + 1)]
    same(tried(tmp_path, tiny_set, "simclr", "resnet18", moments, more=[more]), whole, count)
