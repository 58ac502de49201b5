"""The files of a run folder that say what a run is and how it stands: config, status, lock, log."""

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

from common.config import differences, identity
from common.errors import UserError
from common.schema import read_yaml

CONFIG, STATUS, RESULT, LOG = "config.yaml", "status.json", "result.json", "log.jsonl"
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


def open_folder(folder, cfg):
    """Make or reopen a run folder and take its lock. Returns the lock, to be held for life.

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
    if path.exists():
        saved, new = read_yaml(path), identity(cfg, with_paths=False)
        changed = differences(_like(saved, new), new)
        if changed:
            raise UserError(
                "\n  ".join([f"{folder} holds a run of another config:", *changed])
                + "\nchoose another run.name, or delete the folder"
            )
    return lock


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
        **facts,
    }
    write_json(path, {"starts": [*starts, start]})


class JsonLines:
    """log.jsonl: one record a line. Opened at the byte where the checkpoint left it."""

    def __init__(self, folder, size):
        """size: bytes to keep; what a killed process wrote after its last checkpoint goes."""
        self._file = open(Path(folder) / LOG, "ab")  # noqa: SIM115 (held for life)
        if self._file.tell() < size:
            raise UserError(f"{Path(folder) / LOG}: shorter than when the checkpoint was written")
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, record):
        """One record, at once on its way to the disk."""
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def size(self):
        """Bytes so far."""
        return self._file.tell()
