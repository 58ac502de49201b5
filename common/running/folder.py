"""The files of a run folder that say what a run is and how it stands: config, status, lock."""

import contextlib
import csv
import fcntl
import json
import os
import platform
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
from common.running.checkpoint import LAST, PREVIOUS
from common.running.config import differences
from common.running.errors import UserError
from common.running.schema import read_yaml

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
    """A JSON file's keys and values, or None where there is none or it cannot be read."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_status(folder, state, why=None, retryable=None, **more):
    """state: queued, running, preempted, failed or finished."""
    content = {"state": state, "why": why, "retryable": retryable}
    content |= {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname(), **more}
    write_json(Path(folder) / STATUS, {k: v for k, v in content.items() if v is not None})


def set_status(folder, state):
    """write_status, unless that is the state already and the run is at rest."""
    if state != "finished" or (read_json(Path(folder) / STATUS) or {}).get("state") != state:
        write_status(folder, state)


def open_folder(folder, identity, with_paths):
    """Make or reopen a run folder and take its lock.

    identity: the config as nested dicts, without the keys in which a run may be continued;
    with_paths: the same with the paths of the data. Returns the lock, to be held for life, and
    whether the run is finished. Raises UserError where another process holds it, it holds another
    config's run, or a finished one of other files, or it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (held for life)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); see run.output_dir"
        ) from None
    for wait in (0.1, 0.3, 0.6, None):  # somebody may only be asking whether it is held
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: workers inherit that
            break
        except OSError:
            if wait:
                time.sleep(wait)
    else:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        raise UserError(f"{folder}: another process is running this run: {owner}") from None
    lock.truncate(0)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
    lock.write(json.dumps(owner))
    lock.flush()

    path, finished = folder / CONFIG, (folder / RESULT).exists()
    if path.exists() and holds_work(folder):
        new = with_paths if finished else identity  # a checkpoint knows its data by hash
        changed = differences(_like(read_yaml(path), new), new)
        if changed:
            raise UserError(
                "\n  ".join([f"{folder} holds a run of another config:", *changed])
                + "\nchoose another run.name, or delete the folder"
            )
    return lock, finished


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
    if not (isinstance(parent, str) and isinstance(name, str) and name == Path(name).name != ".."):
        return
    folder = Path(os.path.expanduser(parent)) / name
    state = (read_json(folder / STATUS) or {}).get("state", "queued")
    if not holds_work(folder) and state in ("queued", "failed"):
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


def add_provenance(folder, place, seed, step, data_sha):
    """Note one start of the run: what code, on what, with which versions, from which step on.

    place: rank, world size and device.
    """

    def git(*args):
        here = Path(__file__).parent
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = modified = None
    with contextlib.suppress(OSError):  # no git on this machine
        commit = git("rev-parse", "HEAD")
        modified = bool(git("status", "--porcelain", "-uno")) if commit else None
    device = torch.cuda.get_device_name() if place.device.type == "cuda" else platform.machine()
    path = Path(folder) / PROVENANCE
    before = read_json(path) or {}
    earlier = before.pop("earlier_starts", []) + ([before] if before else [])
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "argv": sys.argv,
        "python": sys.version.split()[0],
        "git_commit": commit,
        "git_modified": modified,
        "versions": versions(),
        "device": device,
        "world_size": place.world_size,
        "seed": seed,
        "step": step,
        "data_sha256": data_sha,
    }
    write_json(path, start | {"earlier_starts": earlier})


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
