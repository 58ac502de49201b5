"""A pipe, a socket, a device or a folder where a file belongs: a sentence at once, never a wait."""

import contextlib
import json
import os
import signal
import socket

import pytest
from small import ABOUT_SCORES, build

from common.annotations import read_annotations
from common.inspection.listing import list_images
from common.inspection.scores_file import Part, read_scores, sidecar
from common.normal_only import NormalReference
from common.running.checkpoint import load_checkpoint, read_checkpoint
from common.running.config import read_config
from common.running.errors import UserError, regular
from common.running.folder import read_json
from common.running.provenance import csv_hashes
from common.running.standing import read_result
from common.running.weights import init_encoder
from common.store import PackedStore
from common.study.evaluate import load_scores
from common.study.grid import read_grid
from simclr import Config


def make(path, kind):
    """Something at a path that is no regular file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):
            made.bind(path.name)  # a long path does not fit
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


class Waits(BaseException):
    """No Exception: of damaged bytes readers expect any, and would tell it as one."""


@contextlib.contextmanager
def at_once(seconds=60):
    """Fails what waits: it would for ever, so any limit does."""

    def fail(*_):
        raise Waits

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _part(path):
    return Part(path.with_suffix(""), {"run": "x"})


READERS = {  # what is read, by a function of its path; the name that it has there
    "csv": (read_annotations, "x.csv"),
    "names": (lambda path: list_images([str(path)]), "x.csv"),
    "config": (lambda path: read_config(Config, path), "x.yaml"),
    "grid": (read_grid, "x.yaml"),
    "checkpoint": (read_checkpoint, "last.pt"),
    "newest checkpoint": (lambda path: load_checkpoint(path.parent, print), "last.pt"),
    "result": (lambda path: read_result(path.parent), "result.json"),
    "scores": (lambda path: load_scores(path.parent), "val_scores.npz"),
    "normal features": (NormalReference.load, "normal_features.npz"),
    "store": (lambda path: PackedStore(path.parent), "store.json"),
    "weights": (lambda path: init_encoder(build("simclr", "resnet18")[0], path), "x.pt"),
    "safetensors": (
        lambda path: init_encoder(build("simclr", "resnet18")[0], path),
        "x.safetensors",
    ),
    "scores.csv": (read_scores, "s.csv"),
}


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
@pytest.mark.parametrize("reader", READERS)
def test_where_a_file_belongs(reader, kind, tmp_path):
    read, name = READERS[reader]
    make(tmp_path / name, kind)
    if reader == "scores.csv":
        sidecar(tmp_path / name).write_text(json.dumps(ABOUT_SCORES))
    with at_once(), pytest.raises(UserError) as error:
        read(tmp_path / name)
    shown = (
        tmp_path
        if name in ("result.json", "store.json") or "weights" in reader
        else tmp_path / name
    )
    assert str(shown) in str(error.value)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_read_on_the_side(kind, tmp_path):
    make(tmp_path / "x.csv.part", kind)
    with at_once():
        with pytest.raises(OSError, match="no regular file"):
            _part(tmp_path / "x.csv.part")
        assert read_json(tmp_path / "x.csv.part") is None
        data = type("Data", (), {"train_csv": tmp_path / "x.csv.part", "val_csv": "/none"})
        assert csv_hashes(data) == {"train_csv": None, "val_csv": None}


def test_what_waits_is_seen(tmp_path):
    make(tmp_path / "x.csv", "pipe")
    with pytest.raises(Waits), at_once(1), contextlib.suppress(Exception):
        open(tmp_path / "x.csv", "rb")
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_regular_file_is_one(tmp_path):
    (tmp_path / "x").write_text("")
    (tmp_path / "y").symlink_to(tmp_path / "x")
    assert regular(tmp_path / "y") == tmp_path / "y"
    with pytest.raises(FileNotFoundError):
        regular(tmp_path / "none")
