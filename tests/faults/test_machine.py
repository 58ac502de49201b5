"""Faults of a machine: a sentence, the right exit code, and nothing lost."""

import errno
import os
import sys

import pytest
import torch
from PIL import Image
from small import run, stop_at

import simclr
from common import pack
from common.running import checkpoint, folder
from common.running.errors import FaultError, UserError
from common.running.faults import explain
from common.running.folder import read_json, write_json
from common.running.progress import say
from common.sets import deeppcb

pytestmark = pytest.mark.usefixtures("narrow")

COMMANDS = {"pack": pack.main, "deeppcb": deeppcb.main}
CASES = {  # what is raised: part of what is said, whether the same command may help
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "/tmp/x/y"), "/tmp/x/y", True),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "/tmp/x"), "Disk quota exceeded", True),
    "files": (OSError(errno.EMFILE, "Too many open files"), "ulimit -n", False),
    "files, by a worker": (RuntimeError("received 0 items of ancdata"), "ulimit -n", False),
    "/dev/shm": (
        RuntimeError("DataLoader worker is killed by signal: Bus error. It is possible that ..."),
        "--shm-size",
        False,
    ),
    "/dev/shm, asked": (
        RuntimeError("unable to write to file </torch_1> (shm)"),
        "/dev/shm",
        False,
    ),
    "a worker": (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        "pid 7",
        True,
    ),
    "a worker, of a pipe": (EOFError(), "in the midst of a batch", True),
    "a worker, reset": (ConnectionResetError(104, "Connection reset by peer"), "has died", True),
    "a rank": (
        RuntimeError("Timed out waiting 8000ms for recv operation to complete"),
        "another rank hangs, or is gone",
        True,
    ),
    "memory": (MemoryError("Unable to allocate 8.00 TiB for an array"), "8.00 TiB", False),
    "memory of torch": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
        "data.image_size",
        False,
    ),
    "memory of a GPU": (torch.OutOfMemoryError("CUDA out of memory. A. B."), "batch_size", False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_one_sentence(case, tiny_set, tmp_path, monkeypatch, capsys):
    error, part, retryable = CASES[case]

    def failing(*_):
        raise error

    monkeypatch.setattr(simclr, "nt_xent_loss", failing)
    with pytest.raises(SystemExit) as stop:
        run("simclr", tmp_path, tiny_set, "run")
    said = capsys.readouterr().err
    assert stop.value.code == (3 if retryable else 2)
    assert part in said and "Traceback" not in said and said.count("error: ") == 1
    status = read_json(tmp_path / "run" / "status.json")
    assert (
        status["state"] == "failed" and status["retryable"] is retryable and part in status["why"]
    )


def test_other_errors_are_left_alone():
    for error in (
        RuntimeError("shapes do not match"),
        OSError(errno.EIO, "x"),
        ValueError("memory"),
    ):
        assert explain(error) is None
    for word in ("Timed out waiting", "shared memory"):  # of whoever says so, but not of torch
        assert explain(ValueError(f"the words {word}")) is None
    assert isinstance(explain(CASES["quota"][0]), FaultError)
    assert isinstance(explain(CASES["memory"][0]), UserError)


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_disk_that_fills_up_loses_nothing(call, tiny_set, tmp_path, monkeypatch, capsys):
    """In a save, and while that is reported, too; then the same command ends as if nothing was."""
    whole = run("simclr", tmp_path, tiny_set, "whole", "run.checkpoint_every_steps=2")
    full = {"at": None}

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    save = checkpoint.save_checkpoint

    def saving(*how, **more):
        full["at"] = full["at"] or "now"
        with monkeypatch.context() as broken:
            if call == "write":
                broken.setattr("builtins.open", fail)
            else:
                broken.setattr(os, call, fail)
            save(*how, **more)

    with monkeypatch.context() as patched:
        patched.setattr("common.running.run.checkpoint.save_checkpoint", saving)
        patched.setattr(folder, "write_atomically", fail)  # so that no status can be written
        patched.setattr(folder, "write_config", lambda *_: None)
        with pytest.raises(SystemExit) as stop:
            run("simclr", tmp_path, tiny_set, "run", "run.checkpoint_every_steps=2")
    said = capsys.readouterr().err
    assert stop.value.code == 3 and "No space left on device" in said and "bytes are free" in said
    assert "Traceback" not in said
    again = run("simclr", tmp_path, tiny_set, "run", "run.checkpoint_every_steps=2")
    pick = [read_json(f / "result.json")["val_offline"] for f in (whole, again)]
    assert pick[0] == pick[1]


@pytest.mark.parametrize("command", ["pack", "deeppcb"])
def test_a_disk_that_fills_up_under_a_command(command, tiny_set, tmp_path, monkeypatch, capsys):
    """It is worth another try, and that ends with the whole."""
    boards, out = tmp_path / "PCBData/group00041/00041", tmp_path / "out"
    boards.mkdir(parents=True)
    (boards.parent / "00041_not").mkdir()
    Image.new("L", (640, 640)).save(boards / "00041000_test.jpg")
    (boards.parent / "00041_not/00041000.txt").write_text("")
    images, train, _ = (override.split("=")[1] for override in tiny_set)
    words = {
        "pack": ["--image-root", images, "--annotations", train],
        "deeppcb": [tmp_path / "PCBData"],
    }[command]
    words = [str(word) for word in (*words, "--out", out)]

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(SystemExit) as stop:
            COMMANDS[command](words)
    said = capsys.readouterr().err
    assert stop.value.code == 3 and "the same command goes on" in said
    assert f"error: {out}" in said and "bytes are free" in said and "Traceback" not in said
    COMMANDS[command](words)
    assert "error" not in capsys.readouterr().err


def test_a_closed_or_full_standard_error_ends_nothing(tiny_set, tmp_path, monkeypatch):
    class Full:
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

        def isatty(self):
            return False

    for broken in (Full(), None):
        monkeypatch.setattr(sys, "stderr", broken)
        say("lost")
    closed = open(os.devnull, "w")  # noqa: SIM115
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    assert (run("simclr", tmp_path, tiny_set, "run") / "result.json").exists()


def test_ranks_that_write_the_same_file_do_not_meet(tmp_path, monkeypatch):
    names, write = [], os.replace
    monkeypatch.setattr(os, "replace", lambda new, path: (names.append(str(new)), write(new, path)))
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        write_json(tmp_path / "status.json", {"rank": rank})
    assert len(set(names)) == 3 and read_json(tmp_path / "status.json") == {"rank": "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_stop_is_no_fault(tiny_set, tmp_path, monkeypatch):
    stop_at(monkeypatch, 2)
    with pytest.raises(SystemExit) as stop:
        run("simclr", tmp_path, tiny_set, "run")
    assert stop.value.code == 75
