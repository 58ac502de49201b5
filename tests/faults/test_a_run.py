"""A run that is stopped, refused, or meets a fault: the same for all methods, shown by one."""

import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import time

import pytest
import torch
from conftest import PATIENCE, on_ranks, python, write_set
from small import arguments, outcome, run, stop_at
from torch.utils.data import get_worker_info
from warm import Command, call

import common.data
import simclr
from common.running.checkpoint import TrainState, read_checkpoint
from common.running.config import load_config
from common.running.folder import read_json
from common.running.standing import open_folder

pytestmark = pytest.mark.usefixtures("narrow")


METHOD = "simclr"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_set):
    """A run that was never stopped."""
    return run(METHOD, tmp_path_factory.mktemp("runs"), tiny_set, "whole")


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


def test_a_worker_that_hangs_ends_the_run_and_is_ended(tmp_path, tiny_set):
    argv = arguments(METHOD, tiny_set, tmp_path, "hang", "data.num_workers=1")
    done = call(tmp_path, METHOD, *argv, first=(hang,))
    assert done.poll() == 3, done.err
    assert "a batch of more than 9.0 s ends the run" in done.err  # 1 s, and .5 s an image of 16
    assert read_json(tmp_path / "hang/status.json")["retryable"] is True


def open_files():
    return len(os.listdir("/proc/self/fd"))


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
