"""A run from start to finish, stopped, killed, refused: the same for all methods, shown by one."""

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATIENCE, on_ranks, python, write_set
from small import arguments, outcome, run, stop_at
from torch.utils.data import get_worker_info
from warm import Command, call

import common.data
import common.running.process
import simclr
from common.offline_probe import apply_probe
from common.running.checkpoint import TrainState, read_checkpoint
from common.running.config import load_config
from common.running.folder import read_json, write_config
from common.running.schema import read_yaml
from common.running.standing import open_folder

pytestmark = pytest.mark.usefixtures("narrow")

METHOD = "simclr"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_set):
    """A run that was never stopped."""
    return run(METHOD, tmp_path_factory.mktemp("runs"), tiny_set, "whole")


def test_a_run_leaves_what_the_design_says(finished, tiny_set):
    names = "config.yaml provenance.json train_subset.csv log.jsonl tensorboard last.pt"
    names += " val_scores.npz features_val.npz offline_probe.npz result.json status.json views.png"
    assert set(names.split()) <= set(os.listdir(finished))
    result = read_json(finished / "result.json")
    scores = "precision recall f1 f2 f2_ciw f2_ciw_strict f1_normal auroc average_precision"
    for part in ("train", "val", "val_offline", "val_offline_fixed"):
        assert set(f"{scores} threshold n n_defect".split()) <= set(result[part])
    assert list(result["val_at"]) == ["0.01", "0.02", "0.05", "0.15", "0.45"]
    assert result["method"] == "simclr" and result["epochs"] == 2
    assert result["val"]["n"] == 24 and result["val"]["n_defect"] == 8
    assert {"rankme", "std_embeddings", "std_features"} <= set(result["label_free"])
    # 64 rows, 8 of them unlabelled; p = 0.25 keeps 38 normals and 13 defects
    assert result["train_rows"] == {"normal": 37, "defect": 12, "unlabelled": 8}
    subset = (finished / "train_subset.csv").read_text().splitlines()
    assert len(subset) == 1 + 37 + 12 + 8
    assert Counter(line.split(",")[1] for line in subset[1:]) == {"0": 37, "1": 12, "": 8}
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [r["epoch"] for r in log if r["kind"] == "epoch"] == [0, 1]
    epoch = [r["loss"] for r in log if r["kind"] == "step" and r["epoch"] == 1]
    assert log[-1]["loss"] == pytest.approx(np.mean(epoch))
    with np.load(finished / "val_scores.npz") as stored:
        assert stored["filename"][0] == b"val_0000.png" and len(stored["logit"]) == 24
        assert stored["classes"].shape == (24, 2) and set(stored["label"]) == {0, 1}
    assert read_json(finished / "status.json")["state"] == "finished"


def test_a_finished_run_is_left_alone(finished, tmp_path, tiny_set, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.iterdir() if p.name != "lock"}
    run(METHOD, finished.parent, tiny_set, "whole")
    assert before == {p: p.stat().st_mtime_ns for p in finished.iterdir() if p.name != "lock"}
    assert "is finished" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run(METHOD, finished.parent, tiny_set, "whole", "optimization.lr=0.1")
    assert stop.value.code == 2 and "optimization.lr: 0.3 -> 0.1" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [(1,), (2, 3, 5)])
def test_a_stopped_run_goes_on_bit_for_bit(finished, tmp_path, tiny_set, monkeypatch, steps):
    """SIGTERM after given steps: in mid-epoch, at an epoch's last step; then the same command."""
    for step in steps:
        stop_at(monkeypatch, step)
        with pytest.raises(SystemExit) as stop:
            run(METHOD, tmp_path, tiny_set, "stopped")
        assert stop.value.code == 75
        assert read_json(tmp_path / "stopped/status.json")["state"] == "preempted"
        monkeypatch.undo()
    folder = run(METHOD, tmp_path, tiny_set, "stopped")
    for ours, whole in zip(outcome(folder), outcome(finished), strict=True):
        assert ours == whole


def wait_for(condition, process):
    """Until condition() holds, while the process runs."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(finished, tmp_path, tiny_set):
    """SIGKILL a few times, after whatever the log says was reached; other worker counts too."""
    argv = [*arguments(METHOD, tiny_set, tmp_path, "killed"), "run.checkpoint_every_steps=1"]
    log = tmp_path / "killed/log.jsonl"
    for lines in (2, 5):
        process = Command(tmp_path, METHOD, *argv)
        wait_for(lambda n=lines: log.exists() and log.read_text().count("\n") >= n, process)
        process.kill()
    folder = run(METHOD, tmp_path, tiny_set, "killed", "data.num_workers=1")
    for ours, whole in zip(outcome(folder), outcome(finished), strict=True):
        assert ours == whole


@pytest.mark.parametrize(
    "part", ["optimizer", "probe", "scores", "loss_sum", "loss_steps", "train_scores"]
)
def test_each_part_of_the_checkpoint_is_needed(finished, tmp_path, tiny_set, monkeypatch, part):
    """The control of the two tests above: without one part, the outcome differs."""
    if part == "train_scores":  # needed where only the finish is left to do
        monkeypatch.setattr(simclr.Run, "finish", lambda self, result: sys.exit(75))
    else:
        stop_at(monkeypatch, 5)
    with pytest.raises(SystemExit):
        run(METHOD, tmp_path, tiny_set, "part")
    monkeypatch.undo()
    restore = TrainState.restore
    plain = ("loss_sum", "loss_steps", "train_scores")

    def forgetful(self, saved, rank):
        kept = {p: getattr(self, p) for p in (part,) if p in plain}
        fresh = TrainState(self.model, self.optimizer, self.probe, self.scaler).capture()
        restore(self, saved | ({part: fresh[part]} if part not in kept else {}), rank)
        for name, value in kept.items():
            setattr(self, name, value)

    monkeypatch.setattr(TrainState, "restore", forgetful)
    folder = run(METHOD, tmp_path, tiny_set, "part")
    assert outcome(folder) != outcome(finished)


def torchrun(*args):
    return python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *args)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train_csv=none.csv", ["none.csv"]),
        ("data.train_defect_proportion=0.001", ["data.train_defect_proportion", "0.001"]),
        ("optimization.batch_size=500", ["optimization.batch_size", "500"]),
        ("data.image_root=none", ["data.image_root", "none"]),
    ],
)
def test_a_users_mistake_is_one_sentence_and_a_status(tmp_path, tiny_set, capsys, override, words):
    with pytest.raises(SystemExit) as stop:
        run(METHOD, tmp_path, tiny_set, "wrong", override)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and said.count("error:") == 1
    status = read_json(tmp_path / "wrong/status.json")
    assert status["state"] == "failed" and status["retryable"] is False
    assert words[0] in status["why"]
    assert (run(METHOD, tmp_path, tiny_set, "wrong") / "result.json").exists()  # mended: it goes on


def test_under_torchrun_one_rank_speaks_and_all_exit_2(tmp_path, tiny_set):
    argv = ["simclr.py", *arguments(METHOD, tiny_set, tmp_path, "wrong")]
    for override in ("data.train_csv=none.csv", "optimization.lrr=1"):
        done = torchrun(*argv, override)
        assert done.returncode == 1  # torchrun's own
        assert done.stderr.count("error: ") == 1 and "exitcode  : 2" in done.stderr, done.stderr
        assert read_json(tmp_path / "wrong/status.json")["state"] == "failed"


def test_the_resolved_config_is_read_back_as_it_was(tmp_path):
    texts = ["1e-3", "010", "yes", "null", "~", "1", "a: b # c", "\u00e9'\"", "-", "#"]
    values = {"data": dict(zip("abcdefghij", texts, strict=True)), "x": [1e-6, 0.5, 3, True, None]}
    write_config(tmp_path, values)
    assert read_yaml(tmp_path / "config.yaml") == values


def test_two_processes_do_not_share_a_folder(tmp_path, tiny_set):
    argv = arguments(METHOD, tiny_set, tmp_path, "locked")
    cfg = load_config(simclr.Config, argv)
    lock, _ = open_folder(tmp_path / "locked", cfg)
    done = call(tmp_path, "simclr", *argv)
    lock.close()
    assert done.poll() == 2 and f'"pid": {os.getpid()}' in done.err


def unfinished(tmp_path, tiny_set, monkeypatch, name):
    """A run with a checkpoint behind its last epoch, but without a result."""
    monkeypatch.setattr(simclr.Run, "finish", lambda self, result: sys.exit(75))
    with pytest.raises(SystemExit):
        run(METHOD, tmp_path, tiny_set, name)
    monkeypatch.undo()
    return tmp_path / name


def files_of(folder):
    files = [p for p in folder.iterdir() if p.is_file() and p.name not in ("lock", "status.json")]
    return {p.name: p.read_bytes() for p in files}


def test_other_data_in_the_same_folder_is_refused(tmp_path, tiny_set, monkeypatch, capsys):
    other = write_set(tmp_path / "other", seed=1, n_train=80)
    folder = unfinished(tmp_path, tiny_set, monkeypatch, "data")
    before = files_of(folder)
    with pytest.raises(SystemExit) as stop:
        run(METHOD, tmp_path, other, "data")
    assert stop.value.code == 2 and "data_sha" in capsys.readouterr().err
    assert files_of(folder) == before
    run(METHOD, tmp_path, tiny_set, "data")  # finished: known by the paths
    with pytest.raises(SystemExit) as stop:
        run(METHOD, tmp_path, other, "data")
    assert stop.value.code == 2 and "data.train_csv" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused(tmp_path, tiny_set, monkeypatch, capsys):
    folder = unfinished(tmp_path, tiny_set, monkeypatch, "mine")
    (tmp_path / "copy").mkdir()
    for name in ("last.pt", "log.jsonl"):
        shutil.copy(folder / name, tmp_path / "copy")
    with pytest.raises(SystemExit) as stop:
        run(METHOD, tmp_path, tiny_set, "copy", "optimization.lr=0.1")
    assert stop.value.code == 2 and "optimization.lr: 0.3 -> 0.1" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(
    tmp_path, tiny_set, monkeypatch, capsys
):
    loss = simclr.nt_xent_loss
    calls = []

    def failing(z0, z1, temperature):
        calls.append(1)
        return loss(z0, z1, temperature) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(simclr, "nt_xent_loss", failing)
    for log_every in (1, 50):  # noticed where it is logged, or where features are scored
        calls.clear()
        overrides = [f"run.log_every={log_every}", "run.checkpoint_every_steps=2"]
        with pytest.raises(SystemExit) as stop:
            run(METHOD, tmp_path, tiny_set, f"nan{log_every}", *overrides)
        assert stop.value.code == 2 and "not finite" in capsys.readouterr().err
        assert read_checkpoint(tmp_path / f"nan{log_every}/last.pt")["step"] == 2


def test_a_fault_is_worth_retrying(tmp_path, tiny_set, monkeypatch, capsys):
    def failing(z0, z1, temperature):
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(simclr, "nt_xent_loss", failing)
    with pytest.raises(SystemExit) as stop:
        run(METHOD, tmp_path, tiny_set, "fault")
    assert stop.value.code == 3 and "Traceback" in capsys.readouterr().err
    status = read_json(tmp_path / "fault/status.json")
    assert status["state"] == "failed" and status["retryable"] is True
    assert "the device fell off" in status["why"]


def test_without_any_label_there_are_features_but_no_scores(tmp_path):
    nothing_known = write_set(tmp_path / "set", unlabelled=64)
    overrides = [*nothing_known, "data.train_defect_proportion=null"]
    result = read_json(run(METHOD, tmp_path, overrides, "blind", *overrides) / "result.json")
    assert result["train_rows"]["unlabelled"] == 64 and result["val"]["n"] == 24
    assert set(result["val_offline"]) >= {"auroc", "f1", "undefined", "n"}
    assert result["val_offline"]["auroc"] is None and result["train"]["auroc"] is None
    assert "too few" in result["val_offline"]["undefined"]["auroc"]
    assert result["label_free"]["rankme"] > 1


def test_the_offline_probes_are_kept_and_the_fixed_one_is_of_all_labels(finished):
    result = read_json(finished / "result.json")
    assert result["val_offline"]["fit_rows"] == 49 and result["val_offline"]["fit_defects"] == 12
    fixed = result["val_offline_fixed"]
    assert fixed["fit_rows"] == 56 and fixed["fit_defects"] == 19  # 64 rows less 8 without a label
    with (
        np.load(finished / "offline_probe.npz") as probes,
        np.load(finished / "features_val.npz") as features,
        np.load(finished / "val_scores.npz") as scores,
    ):
        assert list(features["filename"]) == list(scores["filename"])
        for name in ("offline", "offline_fixed"):
            weight = torch.from_numpy(probes[name])
            logits = apply_probe(weight, torch.from_numpy(features["features"])).numpy()
            spread = scores[f"logit_{name}"].std()
            assert (
                np.abs(logits - scores[f"logit_{name}"]).max() < 0.05 * spread
            )  # float16 features


def test_the_fixed_probe_is_the_same_for_every_proportion_and_seed(tmp_path, tiny_set):
    """Of equal features: a random ViT has no statistics, and its weights are the seed's."""
    found = []
    for i, p in enumerate((0.1, 0.25)):
        overrides = [f"data.train_defect_proportion={p}", "run.frozen_encoder=true", "patch_size=8"]
        folder = run(METHOD, tmp_path, tiny_set, f"p{i}", *overrides, backbone="vit_tiny")
        found.append(read_json(folder / "result.json"))
    assert found[0]["val_offline_fixed"] == found[1]["val_offline_fixed"]
    assert found[0]["val_offline"] != found[1]["val_offline"]


def only(overrides, folder, keep):
    """The overrides of a set with a train.csv of those rows that keep(cells) is true of."""
    lines = Path(overrides[1].partition("=")[2]).read_text().splitlines()
    kept = [line for line in lines[1:] if keep(line.split(","))]
    path = folder / "some.csv"
    path.write_text("\n".join([lines[0], *kept]) + "\n")
    return [overrides[0], f"data.train_csv={path}", overrides[2]]


@pytest.mark.parametrize("label", ["0", "1"])
def test_training_on_one_class_is_no_mistake_but_gives_no_scores(tmp_path, tiny_set, label):
    one_class = only(tiny_set, tmp_path, lambda cells: cells[-1] == label)
    overrides = [*one_class, "data.train_defect_proportion=null"]
    folder = run(METHOD, tmp_path, overrides, "one", *overrides)
    result = read_json(folder / "result.json")
    parts = {**result["val_at"], **{k: result[k] for k in ("train", "val")}}
    for scores in (*parts.values(), result["val_offline"], result["val_offline_fixed"]):
        known = {k for k, v in scores.items() if v is not None}
        assert known <= {"n", "n_defect", "undefined"}
        why = scores["undefined"]["auroc"]
        assert ("0 defect" if label == "0" else "0 normal") in why
    assert result["val"]["n"] == 24 and result["label_free"]["rankme"] > 1
    with np.load(folder / "val_scores.npz") as stored:
        assert all(np.isnan(stored[name]).all() for name in stored.files if "logit" in name)
        assert np.isfinite(stored["score_knn"]).all() == (label == "0")
    distances = result["val_normal_only"]["knn"]
    if label == "0":
        assert distances["auroc"] > 0.5 and distances["undefined"] == {}
    else:
        assert "0 normal training images" in distances["undefined"]["auroc"]
    with pytest.raises(SystemExit) as stop:
        run("supervised", tmp_path, overrides, "supervised", *overrides)
    assert stop.value.code == 2


def test_one_image_a_rank_is_too_few_for_batchnorm_and_for_contrast(tmp_path, tiny_set, capsys):
    for method, backbone in (("simclr", "resnet18"), ("dino", "resnet18"), ("simclr", "vit_tiny")):
        quick = [
            "optimization.batch_size=1",
            "patch_size=8" if backbone == "vit_tiny" else "seed=1",
        ]
        with pytest.raises(SystemExit) as stop:
            run(method, tmp_path, tiny_set, f"{method}_{backbone}", *quick, backbone=backbone)
        assert stop.value.code == 2 and "optimization.batch_size" in capsys.readouterr().err
    quick = ["optimization.batch_size=1", "optimization.epochs=1", "data.subset_size=4"]
    quick += ["run.log_every=100", "patch_size=8"]
    folder = run("supervised", tmp_path, tiny_set, "vit", *quick, backbone="vit_tiny")
    assert (folder / "result.json").exists()  # a ViT needs no second image


@pytest.mark.parametrize(
    "left", [{"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}]
)
def test_a_part_of_torchruns_environment_is_one_sentence(tmp_path, tiny_set, left):
    done = call(tmp_path, METHOD, *arguments(METHOD, tiny_set, tmp_path, "left"), env=left)
    assert done.poll() == 2, done.err
    assert done.err.count("error: ") == 1 and "Traceback" not in done.err
    assert all(f"{name}={value}" in done.err for name, value in left.items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("how", ["fork", "spawn", "forkserver"])
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_run(tmp_path, tiny_set, how, number):
    """As timeout, Slurm, torchrun and a terminal's Ctrl-C send it; then the same command."""
    argv = arguments(METHOD, tiny_set, tmp_path, "group", "data.num_workers=2")
    argv = [*argv, "optimization.epochs=60", "run.val_every_epochs=60"]
    first = multiprocessing.set_start_method, how, True
    process = Command(tmp_path, METHOD, *argv, group=True, first=first)
    log = tmp_path / "group/log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2, process)
    process.send(number, group=True)
    assert process.wait() == 75, process.err
    assert "Traceback" not in process.err and "killed" not in process.err
    assert read_json(tmp_path / "group/status.json")["state"] == "preempted"


def hang():
    """A worker stops at its 41st image, and hears no signal."""
    read, seen = common.data.TrainImages.__getitem__, []

    def hanging(self, key):
        seen.append(key)
        if get_worker_info() and len(seen) > 40:
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
            time.sleep(10000)
        return read(self, key)

    common.data.TrainImages.__getitem__ = hanging
    common.data.LOADER_TIMEOUT, common.data.SECONDS_AN_IMAGE = 1, 0.5
    common.running.process.SECONDS_FOR_WORKERS = 2


def test_a_worker_that_hangs_ends_the_run_and_is_ended(tmp_path, tiny_set):
    argv = arguments(METHOD, tiny_set, tmp_path, "hang", "data.num_workers=1")
    done = call(tmp_path, METHOD, *argv, first=(hang,))
    assert done.poll() == 3, done.err
    assert "longer than 9.0 s ends the run" in done.err  # 1 s, and .5 s an image of 16
    assert read_json(tmp_path / "hang/status.json")["retryable"] is True


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_one_pass_of_the_loader_serves_all_epochs(tmp_path, tiny_set, monkeypatch):
    """So that an epoch's first batch is made while the last ones of the epoch before are used."""
    begun, start = [], common.data.start_iteration

    def counting(loader):
        begun.append(type(loader.dataset).__name__)
        return start(loader)

    monkeypatch.setattr(common.data, "start_iteration", counting)
    run("simclr", tmp_path, tiny_set, "a", "optimization.epochs=3", "run.val_every_epochs=3")
    assert begun.count("TrainImages") == 1


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc")
def test_the_number_of_open_files_does_not_grow_with_the_batches(tmp_path, tiny_set, monkeypatch):
    counts = []
    original = simclr.Run.end_step

    def counting(self, *args, **kwargs):
        counts.append(open_files())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(simclr.Run, "end_step", counting)
    quick = ["data.num_workers=1", "optimization.batch_size=4", "optimization.epochs=1"]
    run(METHOD, tmp_path, tiny_set, "files", *quick, "run.log_every=100")
    assert len(counts) == 14 and max(counts[4:]) <= counts[4] + 2, counts


def three_ranks(method, argv, stop):
    if stop:
        original = simclr.Run.end_step

        def stopping(self, *args, **kwargs):
            if self.step == 1 and self.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *args, **kwargs)

        simclr.Run.end_step = stopping
    try:
        importlib.import_module(method).main(argv)
    except SystemExit as end:
        return [torch.tensor(end.code)]
    finally:
        if stop:
            simclr.Run.end_step = original
    return [torch.tensor(0)]


@pytest.mark.parametrize(
    ("method", "log_every"), [("simclr", 100), ("byol", 1), ("dino", 1)]
)  # the last two keep more than weights
def test_three_ranks_stop_together_and_go_on_bit_for_bit(method, log_every, tmp_path, tiny_set):
    how = ["optimization.batch_size=18", f"run.log_every={log_every}"]

    def ranks(name, stop):
        argv = arguments(method, tiny_set, tmp_path, name, *how)
        codes = on_ranks(3, tmp_path / "r", three_ranks, method, argv, stop)
        return [int(code[0]) for code in codes]

    assert ranks("whole", stop=False) == [0, 0, 0]
    assert ranks("stopped", stop=True) == [75, 75, 75]
    assert ranks("stopped", stop=False) == [0, 0, 0]
    for ours, whole in zip(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole"), strict=True):
        assert ours == whole


def test_an_image_that_one_rank_cannot_read_is_one_message(tmp_path):
    overrides = write_set(tmp_path / "set", n_train=32)
    path = tmp_path / "set/images/train_0007.png"
    path.write_bytes(path.read_bytes()[:-100])  # its header is whole: found when it is decoded
    argv = ["simclr.py", *arguments(METHOD, overrides, tmp_path, "bad")]
    done = torchrun(*argv, "data.train_defect_proportion=null")
    assert done.stderr.count("error: ") == 1 and "train_0007.png" in done.stderr
    assert "simclr.py" not in done.stderr.replace("simclr.py FAILED", "")  # no traceback of ours
    status = read_json(tmp_path / "bad/status.json")
    assert status["state"] == "failed" and "train_0007.png" in status["why"]
