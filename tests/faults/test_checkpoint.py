import errno
import os
import pickle
import stat

import pytest
import torch

from common.running import checkpoint
from common.running.checkpoint import (
    LAST,
    PREVIOUS,
    check_finite,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from common.running.errors import UserError


def content(step):
    return {"model": {"w": torch.full((50,), float(step))}, "step": step, "note": "x"}


def no_warning(text):
    raise AssertionError(text)


def test_round_trip_and_the_previous_one_is_kept(tmp_path):
    assert load_checkpoint(tmp_path, no_warning) == (None, None)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, content(step))
    assert sorted(os.listdir(tmp_path)) == [LAST, PREVIOUS]
    assert read_checkpoint(tmp_path / PREVIOUS)["step"] == 2
    found, name = load_checkpoint(tmp_path, no_warning)
    assert (
        name == LAST
        and found["step"] == 3
        and torch.equal(found["model"]["w"], torch.full((50,), 3.0))
    )


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    save_checkpoint(tmp_path, content(1))
    whole = (tmp_path / LAST).read_bytes()
    other = tmp_path / "other.pt"
    for i in range(0, len(whole), 23):
        flipped = bytearray(whole)
        flipped[i] ^= 1 << (i % 8)
        for damaged in (bytes(flipped), whole[:i]):
            other.write_bytes(damaged)
            with pytest.raises(UserError, match="other.pt"):
                read_checkpoint(other)


def test_damage_falls_back_to_the_previous_one_and_says_so(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, content(step))
    (tmp_path / LAST).write_bytes(b"junk")
    said = []
    found, name = load_checkpoint(tmp_path, said.append)
    assert found["step"] == 1 and name == PREVIOUS
    assert len(said) == 1 and LAST in said[0] and PREVIOUS in said[0]
    (tmp_path / LAST).unlink()
    assert load_checkpoint(tmp_path, said.append)[0]["step"] == 1
    (tmp_path / PREVIOUS).write_bytes(b"junk")
    with pytest.raises(UserError, match="afresh"):
        load_checkpoint(tmp_path, said.append)


def test_a_foreign_file_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    import hashlib
    import io

    for data in (pickle.dumps(Evil()), None):
        if data is None:
            buffer = io.BytesIO()
            torch.save({"format": 1, "model": Evil()}, buffer)
            data = buffer.getvalue()
        (tmp_path / LAST).write_bytes(hashlib.sha256(data).digest() + data)
        with pytest.raises(UserError, match=LAST):
            read_checkpoint(tmp_path / LAST)
    assert not (tmp_path / "canary").exists()


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    save_checkpoint(tmp_path, content(1))
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 99"):
        read_checkpoint(tmp_path / LAST)


def test_what_is_not_finite_is_named():
    check_finite("state", {"a": 1.0, "b": torch.ones(3), "c": None, "d": {"e": 3}})
    for bad in (float("nan"), torch.tensor([1.0, float("inf")])):
        with pytest.raises(UserError, match="state.d.e is not finite"):
            check_finite("state", {"a": 1.0, "d": {"e": bad}})


CALLS = ("fsync", "link", "replace")


def test_a_failing_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, count):
    """Fail at the n-th operating-system call of a save, n = 1, 2, ... until the save completes."""
    for name in CALLS:
        monkeypatch.setattr(checkpoint.os, name, _failing(getattr(os, name)))
    for step in (1, 2):
        save_checkpoint(tmp_path, content(step))
    for n in range(1, 20):
        _failing.left = n
        try:
            save_checkpoint(tmp_path, content(2 + n))
        except OSError as error:
            assert "No space" in str(error)
            _failing.left = 0
            found = load_checkpoint(tmp_path, no_warning)[0]["step"]
            assert found in (1 + n, 2 + n) and not (tmp_path / (LAST + ".new")).exists()
            read_checkpoint(tmp_path / PREVIOUS)
            count("crash points in a save", tried=1, lost=0)
            save_checkpoint(tmp_path, content(2 + n))
        else:
            break
    assert 4 < n < 19  # it failed a few times, and then completed
    _failing.left = 0


def _failing(call):
    def wrapper(*args, **kwargs):
        if _failing.left:
            _failing.left -= 1
            if not _failing.left:
                raise OSError(28, "No space left on device")
        return call(*args, **kwargs)

    return wrapper


_failing.left = 0


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(tmp_path, damaged, count):
    """damaged: last.pt is, so that the previous one must outlive the next save."""
    for n in range(1, 20):
        for step in (n, 1 + n):
            save_checkpoint(tmp_path, content(step))
        if damaged:
            (tmp_path / LAST).write_bytes(b"junk")
        pid = os.fork()
        if pid == 0:
            for name in CALLS:
                setattr(checkpoint.os, name, _killing(getattr(os, name)))
            _killing.left = n
            save_checkpoint(tmp_path, content(2 + n), keep_last=not damaged)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        found = load_checkpoint(tmp_path, lambda text: None)[0]["step"]
        assert found in ((n, 2 + n) if damaged else (1 + n, 2 + n))
        count("crash points in a save", tried=status != 0, lost=0)
        if status == 0:
            break
    assert 3 < n < 19 and found == 2 + n


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_hard_links_the_previous_one_is_a_copy(tmp_path, monkeypatch, number):
    """exFAT, cloud drives and shares have no link, and may not sync a folder."""

    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    fsync = os.fsync

    def of_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused()
        fsync(descriptor)

    monkeypatch.setattr(checkpoint.os, "link", refused)
    monkeypatch.setattr(checkpoint.os, "fsync", of_files)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, content(step))
    assert sorted(os.listdir(tmp_path)) == [LAST, PREVIOUS]
    assert [read_checkpoint(tmp_path / name)["step"] for name in (LAST, PREVIOUS)] == [3, 2]


def _killing(call):
    def wrapper(*args, **kwargs):
        _killing.left -= 1
        if not _killing.left:
            os.kill(os.getpid(), 9)
        return call(*args, **kwargs)

    return wrapper
