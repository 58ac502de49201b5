"""Grids: which runs they are, and that these are started, stopped, gone on with and retried."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import PATIENCE, ROOT, TINY
from small import HEAD, PAIRS, make_up

from common.running.config import load_config, method_name
from common.running.errors import ConfigError
from common.running.folder import read_json, write_json
from common.study import launch
from common.study.__main__ import main
from common.study.cost import TimeLeft, cost_key
from common.study.grid import read_grid, state
from common.study.launch import log_path

PAPER = ROOT / "configs/grid/paper.yaml"


@pytest.fixture(autouse=True)
def in_the_projects_folder(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_papers_grid_has_the_papers_runs():
    runs = read_grid(PAPER)
    groups = Counter(group for run in runs for group in run.groups)
    assert groups == {"methods": 55, "random": 10, "resolution": 10, "augmentation": 35}
    assert len({run.name for run in runs}) == len(runs) == 110
    methods = [run for run in runs if run.groups == ("methods",)]
    assert len({(r.cfg.method, r.cfg.backbone) for r in methods}) == 11
    assert {r.cfg.data.train_defect_proportion for r in methods} == {0.01, 0.02, 0.05, 0.15, 0.45}
    assert all(r.cfg.run.frozen_encoder == ("random" in r.groups) for r in runs)
    assert all(r.cfg.data.fraction == (0.25 if "augmentation" in r.groups else 1) for r in runs)
    sizes = {r.cfg.data.image_size for r in runs if "resolution" in r.groups}
    assert sizes == {64, 128, 224, 384, 512}


def test_an_override_replaces_an_axis_or_sets_every_run():
    runs = read_grid(
        PAPER, ["seed=[1, 2]", "data.train_defect_proportion=0.05", "data.fraction=0.5"]
    )
    groups = Counter(group for run in runs for group in run.groups)
    assert groups == {"methods": 22, "random": 4, "resolution": 20, "augmentation": 70}
    with pytest.raises(ConfigError, match="data.fraction is no axis"):
        read_grid(PAPER, ["data.fraction=[0.5, 1]"])
    with pytest.raises(ConfigError, match="expected section.key=value"):
        read_grid(PAPER, ["seed"])
    assert {r.cfg.seed for r in runs} == {1, 2} and {r.cfg.data.fraction for r in runs} == {0.5}
    assert read_grid(PAPER, ["data.fraction=0.5"])[0].name != read_grid(PAPER)[0].name


def test_the_mini_grid_has_the_papers_shape():
    runs = read_grid(ROOT / "configs/grid/mini.yaml")
    groups = Counter(group for run in runs for group in run.groups)
    assert list(groups) == list(Counter(g for run in read_grid(PAPER) for g in run.groups))
    assert groups == {
        "methods": 22 + 4,
        "random": 4,
        "resolution": 6,
        "augmentation": 6,
    }  # LeJEPA, too
    assert {r.cfg.data.image_size for r in runs if "resolution" in r.groups} == {24, 48, 72}
    assert {r.cfg.data.image_size for r in runs if "resolution" not in r.groups} == {48}


def test_the_grid_of_boards_has_every_method_and_a_control_of_each_backbone():
    runs = read_grid(ROOT / "configs/grid/boards.yaml")
    on = {b: [r for r in runs if r.cfg.backbone == b] for b in ("resnet18", "vit_tiny")}
    first = {k: sum(r.cfg.seed == 42 for r in of) for k, of in on.items()}
    assert first == {"resnet18": 14, "vit_tiny": 6} and len(runs) == 46
    trained = {r.cfg.method for r in on["resnet18"] if not r.cfg.run.frozen_encoder}
    assert trained == {m for m, b in PAIRS if b == "resnet18"}
    assert all(any(r.cfg.run.frozen_encoder for r in of) for of in on.values())
    assert {r.cfg.data.subset_size for r in runs} == {6000}
    simclr = [r for r in on["vit_tiny"] if r.cfg.method == "simclr"]
    assert {r.cfg.optimization.optimizer for r in simclr} == {"adamw", "lars"}
    at = (0.05, "resnet18")
    few = [r.cfg for r in runs if (r.cfg.data.train_defect_proportion, r.cfg.backbone) == at]
    seeds = Counter(method_name(cfg) for cfg in few)
    assert seeds["simclr"] == seeds["supervised"] == seeds["random"] == 5  # which are compared


def test_the_label_free_grid_has_twelve_runs_a_method_at_one_proportion():
    runs = read_grid(ROOT / "configs/grid/label_free.yaml")
    assert Counter(r.cfg.method for r in runs) == {"simclr": 12, "lejepa": 12}
    assert len({r.cfg.data.train_defect_proportion for r in runs}) == 1


def test_the_grid_of_an_hour_on_a_gpu_has_all_pairs_proportions_and_seeds():
    runs = read_grid(ROOT / "configs/grid/gpu_hour.yaml")
    methods = [r for r in runs if "methods" in r.groups]
    assert {(r.cfg.method, r.cfg.backbone) for r in methods} == set(PAIRS)
    assert len(methods) == len(PAIRS) * 5 * 3
    groups = Counter(group for run in runs for group in run.groups)
    more = {"random": 30, "own_size": 6, "lars": 3, "label_free": 48}
    assert groups == {"methods": 195} | more


def test_the_nearer_override_wins(tmp_path):
    own = {"configs/byol_r18.yaml": {"optimization.lr": 3.0}, "configs/simclr_r18.yaml": {}}
    values = {
        "overrides": {"optimization.lr": 1.0, "optimization.epochs": 20, "seed": 7},
        "groups": {"a": group((), {"seed": [1]}, **{"optimization.lr": 2.0})},
    }
    values["groups"]["a"]["configs"] = own
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(values))
    byol, simclr = read_grid(tmp_path / "g.yaml")
    assert (byol.cfg.optimization.lr, simclr.cfg.optimization.lr) == (3, 2)
    assert {(r.cfg.seed, r.cfg.optimization.epochs) for r in (byol, simclr)} == {(1, 20)}
    byol, simclr = read_grid(tmp_path / "g.yaml", ["optimization.lr=0.5", "seed=4"])
    assert (byol.cfg.optimization.lr, simclr.cfg.optimization.lr) == (0.5, 0.5)
    assert byol.cfg.seed == simclr.cfg.seed == 4


AWKWARD = [
    "site #4",
    'it\'s "5"',
    "50% {a} $HOME `b`",
    "ü 😀 \\\\ \\n",
    "a: [b], {c}",
    "true",
    "x;y|&",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_what_a_grid_says_comes_back_from_the_scripts_command_line(tmp_path, text):
    axes = {"data.train_csv": [text], "seed": [1]}
    path = write_grid(tmp_path / "g.yaml", a=group(axes=axes, **{"data.image_root": text}))
    words = json.dumps(text, ensure_ascii=False)
    run = read_grid(path, [f"run.output_dir={words}", f"run.name={words.replace('/', '')}"])[0]
    cfg = importlib.import_module("simclr").Config
    back = load_config(cfg, run.command()[2:])
    assert back == run.cfg and back.data.image_root == back.data.train_csv == text
    assert back.run.output_dir == back.run.name == text
    plain = read_grid(path, ["run.output_dir=site #4", "seed=[1, 2]"])
    assert {r.cfg.run.output_dir for r in plain} == {"site #4"} and len(plain) == 2


@pytest.mark.parametrize("where", ["group", "config", "key", "value", "axis"])
def test_control_characters_in_a_grid_are_refused(tmp_path, where):
    text = "a\x1b[2J\nb"
    content = {
        "group": {text: group()},
        "config": {"a": group([text])},
        "key": {"a": group(**{text: 1})},
        "value": {"a": group(**{"run.name": text})},
        "axis": {"a": group(axes={"data.train_csv": [text]})},
    }[where]
    with pytest.raises(ConfigError) as error:
        read_grid(write_grid(tmp_path / "g.yaml", **content))
    assert "control character" in str(error.value) and "\x1b" not in str(error.value)
    with pytest.raises(ConfigError, match="control character"):
        read_grid(write_grid(tmp_path / "g.yaml", a=group()), [f"run.output_dir={text}"])


def test_a_home_folder_is_expanded_in_a_grids_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text((ROOT / "configs/simclr_r18.yaml").read_text())
    overrides = {"run.output_dir": "~/runs", "seed": 1}
    write_grid(tmp_path / "g.yaml", a=group(["~/c.yaml"], **overrides))
    main(["plan", "--grid", "~/g.yaml"])
    assert "--config" in capsys.readouterr().out
    assert read_grid("~/g.yaml")[0].folder.parent == tmp_path / "runs"
    for option in ("--grid", "--out"):
        with pytest.raises(SystemExit) as end:
            main(["report", option, "a\nb"])
        assert end.value.code == 2 and "control character" in capsys.readouterr().err


def write_grid(path, **groups):
    path.write_text(yaml.safe_dump({"groups": groups}))
    return path


def group(configs=("configs/simclr_r18.yaml",), axes=None, **overrides):
    return {"configs": list(configs), "axes": axes or {}, "overrides": overrides}


def test_a_run_of_two_groups_is_one_run(tmp_path):
    path = write_grid(
        tmp_path / "g.yaml", a=group(axes={"seed": [1, 2]}), b=group(axes={"seed": [2]})
    )
    assert [run.groups for run in read_grid(path)] == [("a",), ("a", "b")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"groups": {"a": group(["configs/none.yaml"])}}, ["configs/none.yaml"]),
        ({"groups": {"a": {"configs": [], "axes": {}}}}, ["groups.a.overrides"]),
        (
            {"groups": {"a": group(**{"optimization.lrr": 1})}},
            ["groups.a", "optimization.lrr", "lr"],
        ),
        (
            {"groups": {"a": {**group(), "configs": {"configs/simclr_r18.yaml": 3}}}},
            ["groups.a", "got configs/simclr_r18.yaml: 3"],
        ),
        (
            {"groups": {"a": {**group(), "configs": [{"x.yaml": {}}]}}},
            ["groups.a", "got {'x.yaml'"],
        ),
        ({"runs": []}, ["groups: missing", "runs: unknown"]),
    ],
)
def test_mistakes_are_told_by_group_and_key(tmp_path, content, words):
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as error:
        read_grid(tmp_path / "g.yaml")
    assert all(word in str(error.value) for word in [*words, "g.yaml"])


def test_the_time_left_comes_from_what_is_finished(tmp_path, tiny_set):
    overrides = [*tiny_set, *TINY, f"run.output_dir={tmp_path}"]
    path = write_grid(tmp_path / "g.yaml", a=group(axes={"seed": [1, 2, 3]}))
    runs = read_grid(path, overrides)
    assert TimeLeft(runs).seconds() == (0, 3, 3)
    assert TimeLeft(runs).text(1).startswith("3 left, 3 of unknown length")
    make_up(runs[0], np.random.default_rng(0))
    result = read_json(runs[0].folder / "result.json")
    write_json(runs[0].folder / "result.json", result | {"epochs": 2, "seconds": 114})
    assert [state(run)[0] for run in runs] == ["finished", "queued", "queued"]
    assert TimeLeft(runs).seconds() == (pytest.approx(2 * 114), 2, 0)
    assert "about 01:54 with 2 at a time" in TimeLeft(runs).text(2)
    runs[1].folder.mkdir()
    batch, images = runs[1].cfg.optimization.batch_size, 57 * 2
    (runs[1].folder / "log.jsonl").write_text('{"step": 3, "samples_per_second": 9}\n')
    left = 1 + (images - 3 * batch) / images
    assert TimeLeft(runs).seconds() == (pytest.approx(left * 114), 2, 0)
    assert cost_key(runs[0]) == "simclr resnet18  32 px"


def test_unlabelled_images_count_for_whoever_trains_on_them(tmp_path, tiny_set):
    overrides = [
        *tiny_set,
        *TINY,
        f"run.output_dir={tmp_path}",
        "data.train_defect_proportion=null",
    ]
    configs = ["configs/simclr_r18.yaml", "configs/supervised_r18.yaml"]
    path = write_grid(tmp_path / "g.yaml", a=group(configs=configs))
    runs = read_grid(path, overrides)
    left = TimeLeft(runs)
    epochs = runs[0].cfg.optimization.epochs
    assert [left._count(run) / epochs for run in runs] == [64, 56]
    assert [left._count(run) / epochs for run in runs[::-1]] == [56, 64]
    frozen = read_grid(path, [*overrides, "run.frozen_encoder=true"])  # sees what has no label, too
    for left in (TimeLeft(frozen), TimeLeft(runs + frozen)):
        assert [left._count(run) / epochs for run in frozen] == [64, 64]


def door(*args, **kwargs):
    """./run_grid.sh"""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    words = ["./run_grid.sh", *map(str, args)]
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def small_grid(tmp_path, tiny_set, seeds, **more):
    settings = dict(o.split("=", 1) for o in [*tiny_set, *TINY, *HEAD])
    settings = {key: yaml.safe_load(value) for key, value in settings.items()}
    settings["run.output_dir"] = str(tmp_path / "runs")
    configs = ["configs/simclr_vit_tiny.yaml"]  # of few patches: quicker than a ResNet
    return write_grid(
        tmp_path / "g.yaml", a=group(configs, axes={"seed": seeds}, **settings | more)
    )


# A checkpoint an epoch takes longer than its steps: many steps, few epochs.
LONGER = {"optimization.batch_size": 3, "optimization.epochs": 3, "run.val_every_epochs": 3}


class Child:
    """A process that ends at once; what it was started with is kept."""

    started: list = []
    meeting = None  # a threading.Barrier: it ends where as many run at once

    def __init__(self, words, env, **_):
        self.words, self.env, self.pid = words, env, os.getpid()
        Child.started.append(self)

    def wait(self):
        if self.meeting:
            self.meeting.wait(PATIENCE)
        return 3


@pytest.fixture
def pretended(monkeypatch, tmp_path, tiny_set):
    """(runs of a small grid, processes that the launcher would have started)."""
    monkeypatch.setattr(Child, "started", [])
    monkeypatch.setattr(launch.subprocess, "Popen", Child)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    return read_grid(small_grid(tmp_path, tiny_set, [1, 2])), Child.started


def test_a_fault_is_tried_again_and_then_told(pretended, capfd):
    runs, started = pretended
    log_path(runs[0]).parent.mkdir(parents=True)
    log_path(runs[0]).write_text("out of memory\n")
    runs[1].folder.mkdir()
    write_json(runs[1].folder / "status.json", {"state": "failed", "retryable": False})
    os.utime(runs[1].folder / "status.json", (0, 0))  # of an earlier start: tells nothing
    assert launch.Launcher(runs).run() == 3
    assert len(started) == 2 * launch.TRIES
    said = capfd.readouterr().err
    assert "out of memory" in said and all(f"failed: {run.name}" in said for run in runs)


def test_a_status_is_of_this_start_where_it_has_changed(pretended, monkeypatch):
    """Its time may be another machine's, whose clock is behind."""
    runs, started = pretended

    def wait(self):
        path = runs[0].folder / "status.json"
        write_json(path, {"state": "failed", "retryable": False})
        os.utime(path, (1000, 1000))
        return 3

    monkeypatch.setattr(Child, "wait", wait)
    runs[0].folder.mkdir(parents=True)
    assert launch.Launcher(runs[:1]).run() == 3
    assert len(started) == 1


def test_what_goes_wrong_in_the_launcher_is_a_failure(pretended, monkeypatch, capfd):
    runs, _ = pretended

    def refuse(*_, **__):
        raise OSError("no more processes")

    monkeypatch.setattr(launch.subprocess, "Popen", refuse)
    assert launch.Launcher(runs).run() == 3
    assert capfd.readouterr().err.count("no more processes") == 2


def test_each_run_gets_its_own_gpus_of_those_that_are_there(pretended, monkeypatch):
    runs, started = pretended
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(Child, "meeting", threading.Barrier(2))
    launch.Launcher(runs, jobs=2, nproc=2, gpus=launch.gpu_ids()).run()
    assert {child.env["CUDA_VISIBLE_DEVICES"] for child in started} == {"4,5", "6,7"}
    assert all("--nproc_per_node=2" in child.words for child in started)
    assert started[0].words[:3] == [sys.executable, "-m", "torch.distributed.run"]


def test_runs_side_by_side_on_a_cpu_share_its_cores(pretended, monkeypatch):
    runs, started = pretended
    monkeypatch.setattr(launch, "cores", lambda: 8)
    launch.Launcher(runs, jobs=2).run()
    assert {child.env["OMP_NUM_THREADS"] for child in started} == {"4"}


def test_a_run_that_another_door_holds_is_left_to_it(pretended, capfd):
    runs, started = pretended
    with launch.claim(runs[0]) as mine:
        assert mine and launch.Launcher(runs[:1]).run() == 75
    assert not started and "left to others" in capfd.readouterr().err


def test_runs_that_cannot_be_told_apart_are_refused(tmp_path):
    axes = {"run.output_dir": ["a", "b"]}
    for more in (group(axes=axes), group(axes={"seed": [1, 2]}, **{"run.name": "x"})):
        with pytest.raises(ConfigError, match="two different runs are named"):
            read_grid(write_grid(tmp_path / "g.yaml", a=more))
    for axis in (42, [], "text"):
        with pytest.raises(ConfigError, match="axes.seed: expected a list"):
            read_grid(write_grid(tmp_path / "g.yaml", a=group(axes={"seed": axis})))


def test_only_some_runs_by_a_pattern(capsys):
    main(["plan", "--only", "simclr_resnet18_*", "--only", "mae_*_p45_*", "seed=[1, 2]"])
    said = capsys.readouterr().out
    assert "# 12 runs; 12 left" in said and said.count("mae.py --config") == 2
    with pytest.raises(SystemExit) as end:
        main(["plan", "--only", "nothing_*"])
    assert end.value.code == 2 and "no run is named nothing_*" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--jobs", "0"])


def test_only_a_second_ctrl_c_kills(monkeypatch, capfd):
    sent = []
    monkeypatch.setattr(launch.os, "killpg", lambda pid, number: sent.append((pid, number)))
    launcher = launch.Launcher([])
    child = SimpleNamespace(pid=7, send_signal=lambda number: sent.append(("child", number)))
    launcher._children["a run"] = child
    launcher._stop(signal.SIGHUP, None)
    launcher._stop(signal.SIGTERM, None)
    assert sent == [("child", signal.SIGTERM)]
    assert "SIGHUP: waiting for 1 to save; Ctrl-C again kills" in capfd.readouterr().err
    launcher._stop(signal.SIGINT, None)
    assert sent[1:] == [(7, signal.SIGKILL)]


def test_nohup_is_respected(pretended, monkeypatch):
    runs, _ = pretended
    handled = []
    monkeypatch.setattr(launch.signal, "signal", lambda number, _: handled.append(number))
    ignored = {signal.SIGHUP: signal.SIG_IGN}
    monkeypatch.setattr(launch.signal, "getsignal", ignored.get)
    launch.Launcher(runs[:0]).run()
    assert handled == [signal.SIGINT, signal.SIGTERM]


def test_a_run_whose_result_was_taken_away_is_made_again(tmp_path, tiny_set):
    run = read_grid(small_grid(tmp_path, tiny_set, [1]))[0]
    run.folder.mkdir(parents=True)
    write_json(run.folder / "status.json", {"state": "finished"})
    assert state(run) == ("preempted", "no result.json")


def test_more_processes_a_run_than_gpus_are_refused(tmp_path, tiny_set, monkeypatch, capsys):
    path = str(small_grid(tmp_path, tiny_set, [1]))
    monkeypatch.setattr(launch.Launcher, "run", lambda self: 0)
    for gpus, nproc, code in ((2, 4, 2), (2, 2, 0), (0, 4, 0), (1, 2, 2)):
        monkeypatch.setattr(launch.torch.cuda, "device_count", lambda n=gpus: n)
        with pytest.raises(SystemExit) as end:
            main(["run", "--grid", path, "--nproc", str(nproc)])
        assert end.value.code == code
        if code:
            assert f"--nproc {nproc}: this machine has {gpus} GPU" in capsys.readouterr().err


def test_the_time_left_comes_from_a_runs_own_log_where_none_is_finished(tmp_path, tiny_set):
    overrides = [*tiny_set, *TINY, f"run.output_dir={tmp_path}"]
    runs = read_grid(write_grid(tmp_path / "g.yaml", a=group(axes={"seed": [1, 2]})), overrides)
    runs[0].folder.mkdir()
    images, batch = 57 * 2, runs[0].cfg.optimization.batch_size
    log = runs[0].folder / "log.jsonl"
    for line in ("", "{", '{"step": 3}\n', '{"step": 3, "samples_per_second": 0}\n', "[]\n"):
        log.write_text(line)
        assert TimeLeft(runs).seconds() == (0, 2, 2)
    log.write_text('{"step": 1, "samples_per_second": 9}\n{"step": 3, "samples_per_second": 4}\n')
    seconds = (2 * images - 3 * batch) / 4
    assert TimeLeft(runs).seconds() == (pytest.approx(seconds), 2, 0)
    assert "2 left, about" in TimeLeft(runs).text(1)
