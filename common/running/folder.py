"""The files of a run folder that say what a run is and how it stands: config, status, subset."""

import contextlib
import csv
import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
import yaml

from common.annotations import DEFECT, NORMAL, UNLABELLED
from common.running.checkpoint import LAST, PREVIOUS
from common.running.errors import regular
from common.running.schema import StrictLoader

CONFIG, STATUS, RESULT = "config.yaml", "status.json", "result.json"
PROVENANCE, LOCK, SCORES = "provenance.json", "lock", "val_scores.npz"


@contextlib.contextmanager
def atomically(path, newline=None):
    """A text file to write to, which in the end takes the place of the old one, or is not there."""
    path = Path(path)
    rank = os.environ.get("RANK", "0")  # another may write the same file at the same time
    new = path.with_name(f"{path.name}.new{'' if rank == '0' else rank}")
    try:
        with open(new, "w", encoding="utf-8", newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = error.filename or os.fspath(new)
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def write_atomically(path, text):
    """text to a file that is either the old one or the new one, whenever it is read."""
    with atomically(path) as file:
        file.write(text)


def write_json(path, content):
    """Plain types -> a JSON file, atomically; not-a-number is refused."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path):
    """A JSON file's keys and values, or None where there is none or it cannot be read."""
    try:
        content = json.loads(Path(regular(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def write_status(folder, state, why=None, retryable=None):
    """state: running, preempted, failed or finished."""
    content = {"state": state, "why": why, "retryable": retryable}
    content |= {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname()}
    write_json(Path(folder) / STATUS, {k: v for k, v in content.items() if v is not None})


def note_failure(folder, state, why, retryable):
    """Note how this rank ended, unless another was first and knows why. Returns its status."""
    now = read_json(folder / STATUS) or {}
    if now.get("state") == "running":
        write_status(folder, state, why, retryable)
        now = {}
    return now


def set_status(folder, state):
    """write_status, unless that is the state already and the run is at rest."""
    if state != "finished" or (read_json(Path(folder) / STATUS) or {}).get("state") != state:
        write_status(folder, state)


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


class _Dumper(yaml.SafeDumper):
    """Quotes what our own rules would read as a number, such as a folder named 1e-3."""

    yaml_implicit_resolvers = StrictLoader.yaml_implicit_resolvers


def write_config(folder, values):
    """The resolved config as nested dicts."""
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    write_atomically(Path(folder) / CONFIG, text)


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
