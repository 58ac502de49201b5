"""The files of a run folder that say what a run is and how it stands: config, status, lock."""

import contextlib
import csv
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
import yaml

from common.annotations import DEFECT, NORMAL, UNLABELLED
from common.checkpoint import LAST, PREVIOUS
from common.config import differences
from common.errors import UserError
from common.schema import read_yaml

CONFIG, STATUS, RESULT = "config.yaml", "status.json", "result.json"
PROVENANCE, LOCK = "provenance.json", "lock"


def write_atomically(path, text):
    """text to a file that is either the old one or the new one, whenever it is read."""
    path = Path(path)
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def write_json(path, content):
    """Plain types -> a JSON file, atomically; not-a-number is refused."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path):
    """A JSON file, or None where there is none or it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_status(folder, state, why=None, retryable=None, **more):
    """state: queued, running, preempted, failed or finished."""
    content = {"state": state, "why": why, "retryable": retryable}
    content |= {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname(), **more}
    write_json(Path(folder) / STATUS, {k: v for k, v in content.items() if v is not None})


def open_folder(folder, identity):
    """Make or reopen a run folder and take its lock. Returns the lock, to be held for life.

    identity: the config as nested dicts, without the keys in which a run may be continued.
    Raises UserError where another process holds it, it holds another config's run, or it cannot be
    written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (held for life)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); see run.output_dir"
        ) from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loader workers inherit that
    except OSError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        raise UserError(f"{folder}: another process is running this run: {owner}") from None
    lock.truncate(0)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
    lock.write(json.dumps(owner))
    lock.flush()

    path = folder / CONFIG
    if path.exists() and holds_work(folder):
        changed = differences(_like(read_yaml(path), identity), identity)
        if changed:
            raise UserError(
                "\n  ".join([f"{folder} holds a run of another config:", *changed])
                + "\nchoose another run.name, or delete the folder"
            )
    return lock


def holds_work(folder):
    """Whether a run folder has anything that another run must not overwrite."""
    return any(os.path.lexists(Path(folder) / name) for name in (LAST, PREVIOUS, RESULT))


def note_refused_config(values, why):
    """A config with an error has no run; where it names one without work, its status says so.

    values: nested dicts as read, right or wrong.
    """
    options = values.get("run")
    if not isinstance(options, dict):
        return
    parent, name = options.get("output_dir"), options.get("name")
    if not (isinstance(parent, str) and isinstance(name, str) and Path(name).name == name):
        return
    folder = Path(parent) / name
    if not holds_work(folder):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_status(folder, "failed", why, False)


def _like(saved, new):
    """The part of a saved config that a new one's identity has keys for."""
    if not isinstance(new, dict) or not isinstance(saved, dict):
        return saved
    return {key: _like(saved.get(key), value) for key, value in new.items()}


def write_config(folder, values):
    """The resolved config as nested dicts."""
    write_atomically(Path(folder) / CONFIG, yaml.safe_dump(values, sort_keys=False))


def add_provenance(folder, **facts):
    """Note one start of the run: what code, where, with which versions."""

    def git(*args):
        here = Path(__file__).parent
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = None
    with contextlib.suppress(OSError):  # no git on this machine
        commit = git("rev-parse", "HEAD")
        facts["git_modified"] = bool(git("status", "--porcelain", "-uno")) if commit else None
    path = Path(folder) / PROVENANCE
    starts = (read_json(path) or {}).get("starts", [])
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "argv": sys.argv,
        "python": sys.version.split()[0],
        "git_commit": commit,
        "versions": versions(),
        **facts,
    }
    write_json(path, {"starts": [*starts, start]})


def write_subset(folder, annotations, rows):
    """train_subset.csv: file names and labels of the rows that are trained on."""
    text = {NORMAL: "0", DEFECT: "1", UNLABELLED: ""}
    with open(Path(folder) / "train_subset.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Filename", "Defect"])
        writer.writerows([annotations.name(r), text[int(annotations.defect[r])]] for r in rows)


def versions():
    """Of what can change a number."""
    modules = {"torch": torch, "torchvision": torchvision, "timm": timm, "numpy": np}
    return {name: str(module.__version__) for name, module in modules.items()}
