"""Files by somebody who means harm: no code of theirs runs, and nothing outside is read."""

import argparse
import ast
import contextlib
import functools
import io
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, exit_code, write_set
from PIL import Image
from small import arguments, make_up
from test_bad_checkpoints import Evil, of_torch, summed

import simclr
from common import annotate, export, predict, review
from common.study.__main__ import main as study
from common.study.grid import read_grid
from common.study.report import write_report


class Nested:
    def __init__(self, evil):
        self.evil = evil

    def __reduce__(self):
        return dict, ([("a", self.evil)],)


def evil_array(canary):
    """Bytes of an .npz whose array is a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in ("offline", "offline_fixed", "logit", "label", "features", "filename"):
            array = io.BytesIO()
            np.lib.format.write_array(
                array, np.array([Evil(canary)], dtype=object), allow_pickle=True
            )
            made.writestr(f"{name}.npy", array.getvalue())
    return file.getvalue()


def evil_script(canary):
    """A TorchScript archive: a program by definition."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("x/data.pkl", pickle.dumps(Evil(canary), 2))
        made.writestr("x/constants.pkl", pickle.dumps(Evil(canary), 2))
        made.writestr("x/version", "3\n")
        made.writestr("x/code/__torch__.py", "import os\n")
    return file.getvalue()


def legacy(canary):
    """torch.save of before its zips: pickles one after another."""
    file = io.BytesIO()
    torch.save({"model": Evil(canary)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def evil_argument(canary):
    """A Namespace is allowed in weights; what it holds is not."""
    return of_torch({"args": argparse.Namespace(a=Evil(canary)), "model": {}})


EVAL = "__import__('os').mkdir({!r})"
PICKLES = {  # what it is: its bytes, by the folder that it makes where it runs
    "a pickle": lambda c: pickle.dumps(Evil(c)),
    "a pickle of eval": lambda c: pickle.dumps(Evil(EVAL.format(str(c)), eval)),
    "a pickle of exec": lambda c: pickle.dumps(Evil(EVAL.format(str(c)), exec)),
    "a pickle of system": lambda c: pickle.dumps(Evil(f"mkdir {c}", os.system)),
    "in a tensor's place": lambda c: of_torch({"format": 3, "model": Evil(c)}),
    "deep inside": lambda c: of_torch({"format": 3, "state": {"optimizer": [Nested(Evil(c))]}}),
    "in torch's older form": legacy,
    "in a program of TorchScript": evil_script,
    "in a Namespace": evil_argument,
}
PLACES = ("checkpoint", "weights", "prediction", "export")


def no_canary(canary, count):
    count("malicious files", tried=1, ran=canary.exists())
    assert not canary.exists()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", PICKLES)
def test_weights_are_data(case, place, finished, tiny_set, tmp_path, count, capsys):
    canary = tmp_path / "canary"
    data = PICKLES[case](canary)
    shutil.copytree(finished, tmp_path / "runs/run")
    evil = tmp_path / "runs/run/last.pt"
    evil.write_bytes(summed(data))
    if place == "checkpoint":
        (evil.parent / "result.json").unlink()
        (evil.parent / "prev.pt").unlink(missing_ok=True)
        argv = arguments("simclr", tiny_set, tmp_path / "runs", "run")
        found = exit_code(simclr.main, *argv)
    elif place == "weights":
        (tmp_path / "evil.pth").write_bytes(data)
        argv = arguments("simclr", tiny_set, tmp_path / "runs", "new")
        found = exit_code(simclr.main, *argv, f"run.init_from={tmp_path / 'evil.pth'}")
    elif place == "prediction":
        words = "--run", evil.parent, finished / "views.png", "--out", tmp_path / "s.csv"
        found = exit_code(predict.main, *words)
    else:
        found = exit_code(export.main, "--run", evil.parent, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    no_canary(canary, count)
    assert found == 2 and "Traceback" not in said and said.count("error: ") == 1, said


@pytest.mark.parametrize("name", ["offline_probe.npz", "val_scores.npz", "normal_features.npz"])
def test_arrays_are_numbers(name, finished, tmp_path, count, capsys):
    canary = tmp_path / "canary"
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(evil_array(canary))
    if name == "normal_features.npz":
        np.savez(tmp_path / "run/offline_probe.npz")  # without a probe they are what scores
    words = "--run", tmp_path / "run", finished / "views.png", "--out", tmp_path / "s.csv"
    found = exit_code(predict.main, *words, "--workers", 0)
    no_canary(canary, count)
    assert found == 2 and "Traceback" not in capsys.readouterr().err


YAML = ["!!python/object/apply:os.mkdir ['{}']", "!!python/object/new:os.mkdir ['{}']"]


@pytest.mark.parametrize("which", ["config", "grid", "override", "a run's config"])
@pytest.mark.parametrize("text", YAML)
def test_yaml_is_text(text, which, finished, tiny_set, tmp_path, count, capsys):
    canary = tmp_path / "canary"
    text = text.format(canary)
    (tmp_path / "x.yaml").write_text(f"method: {text}\n")
    if which == "config":
        found = exit_code(simclr.main, "--config", tmp_path / "x.yaml")
    elif which == "grid":
        found = exit_code(study, "plan", "--grid", tmp_path / "x.yaml")
    elif which == "override":
        found = exit_code(
            simclr.main, *arguments("simclr", tiny_set, tmp_path, "r", f"run.name={text}")
        )
    else:
        shutil.copytree(finished, tmp_path / "run")
        shutil.copy(tmp_path / "x.yaml", tmp_path / "run/config.yaml")
        found = exit_code(export.main, "--run", tmp_path / "run", "--out", tmp_path / "out")
    no_canary(canary, count)
    assert found == 2 and "Traceback" not in capsys.readouterr().err


_listeners = []  # lists to which the paths of what this process opens are added


def _hear(event, args):
    if event == "open" and _listeners and isinstance(args[0], (str, bytes, os.PathLike)):
        _listeners[-1].append(os.path.realpath(os.fsdecode(args[0])))


@functools.cache
def _listen():
    sys.addaudithook(_hear)  # for good: Python has no way to remove it


@contextlib.contextmanager
def opened():
    """Real paths of the files that are opened meanwhile, by whatever function of Python."""
    _listen()
    _listeners.append([])
    try:
        yield _listeners[-1]
    finally:
        _listeners.pop()


def test_nothing_outside_the_folder_of_images_is_read(tmp_path, count, finished):
    """Names that lead out, links that lead out, in CSVs, folders and scores."""
    Image.new("RGB", (40, 40)).save(tmp_path / "secret.png")
    words = write_set(tmp_path / "set", n_train=16, n_val=4)
    images, secret = tmp_path / "set/images", os.path.realpath(tmp_path / "secret.png")
    (images / "out.png").symlink_to(tmp_path / "secret.png")
    (images / "up").symlink_to(tmp_path)
    for name in ("../../secret.png", "up/secret.png", "out.png", str(tmp_path / "secret.png")):
        (tmp_path / "t.csv").write_text(f"Filename,Defect\n{name},1\ntrain_0001.png,0\n")
        quick = [words[0], f"data.train_csv={tmp_path / 't.csv'}", words[2]]
        argv = arguments("simclr", quick, tmp_path, "r", "data.train_defect_proportion=null")
        with opened() as paths:
            assert exit_code(simclr.main, *argv, "optimization.batch_size=2") == 2
        assert str(tmp_path / "t.csv") in paths and secret not in paths
        out = tmp_path / "o.csv"
        how = "--image-root", images, "--out", out, "--force", "--workers", 0
        with opened() as paths:
            assert exit_code(predict.main, "--run", finished, tmp_path / "t.csv", *how) in (1, 2)
        assert str(tmp_path / "t.csv") in paths and secret not in paths
        count("malicious files", tried=2, ran=0)
    with opened() as paths:
        (tmp_path / "set/images/out.png").read_bytes()
    assert secret in paths  # which is how it would look


NAME = "<img src=x onerror=document.title='owned'>\"'&$x_1$`id`;.png"


def test_names_are_text_on_every_page(finished, tiny_set, tmp_path, count, monkeypatch):
    """In review's page, the report and an exported card."""
    (tmp_path / "new").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "new" / NAME)
    words = "--run", finished, tmp_path / "new", "--out", tmp_path / "s.csv", "--workers", 0
    assert exit_code(predict.main, *words) == 0
    assert exit_code(review.main, tmp_path / "s.csv", "--out", tmp_path / "r.html") == 0
    page = (tmp_path / "r.html").read_text()
    assert "<img src=x" not in page and "onerror" in page
    monkeypatch.chdir(ROOT)
    own = [*tiny_set, f"run.output_dir={tmp_path / 'runs'}", "data.train_defect_proportion=[0.05]"]
    runs = [r for r in read_grid(ROOT / "configs/grid/mini.yaml", own) if r.cfg.method == "simclr"]
    for i, run in enumerate(runs):
        make_up(run, np.random.default_rng(i))
    path = runs[0].folder / "val_scores.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    names = np.array(["<b>x", "$y"][: len(arrays["class_names"])])
    np.savez(path, **arrays | {"class_names": names})
    write_report(runs, tmp_path / "report")
    text = (tmp_path / "report/index.html").read_text()
    assert "<b>x" not in text
    count("malicious files", tried=2, ran=0)


def test_the_source_has_no_door():
    """No eval, no pickle, no shell with text of a user's, no loading of code."""
    forbidden = {"eval", "exec", "compile"}
    for path in [*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            how = {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path.name}:{node.lineno}: {ast.unparse(node)}"
            assert called not in forbidden, where
            assert called not in ("pickle.load", "pickle.loads", "yaml.load_all", "os.system"), (
                where
            )
            assert how.get("shell") != "True" and how.get("allow_pickle") != "True", where
            if called == "torch.load":
                assert how.get("weights_only") == "True", where
            if called == "yaml.load":
                assert how.get("Loader") == "StrictLoader", where


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shell_scripts_pass_shellcheck():
    scripts = [*ROOT.glob("*.sh"), *(ROOT / "tests").glob("*.sh"), ROOT / ".ci/run"]
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_name_of_a_folder_is_no_command(finished, tmp_path, capsys):
    """annotate on folders whose names are options, patterns and markup."""
    for name in ("-rf", "$(touch canary)", "a;b", "<i>", "%s"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 20), (i, len(name), 9)).save(tmp_path / "in" / name / f"{i}.png")
    how = tmp_path / "in", "--out", tmp_path / "out", "--normal=-rf"
    assert exit_code(annotate.main, *how) == 0
    header = (tmp_path / "out/train.csv").read_text().splitlines()[0]
    assert all(name in header for name in ("$(touch canary)", "a;b", "<i>", "%s"))
    assert not (tmp_path / "canary").exists() and not (ROOT / "canary").exists()
