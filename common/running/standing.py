"""Whose a run folder is: its lock, and whether what it holds is the run that is asked for."""

import dataclasses
import errno
import json
import os
import socket
import time
import zipfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from common.running.config import differences, identity, identity_of
from common.running.errors import ConfigError, UserError, some
from common.running.folder import (
    CONFIG,
    LOCK,
    PROVENANCE,
    RESULT,
    SCORES,
    holds_work,
    read_json,
    write_config,
)
from common.running.progress import say, say_once
from common.running.provenance import csv_hashes, init_hash, once_a_file
from common.running.schema import read_yaml
from common.store import stored_hash

PARTS = ("train_rows", "train", "val", "val_offline", "label_free")  # of result.json: dicts
KEYS = ("method", "backbone", "seed", "train_defect_proportion", "epochs", "seconds", *PARTS)
OTHERWISE = "choose another run.name or run.output_dir, or delete the folder"

_saved_config = once_a_file(read_yaml)


def try_lock(kind, file, shared=False):
    """Take a lock without waiting; False where another process holds it.

    kind: `lockf`, of a process, or `flock`, which its children inherit. Where the file system or
    the operating system has no locks this says so once, and goes on as if it were taken.
    """
    why = "Windows"
    try:
        if fcntl is not None:
            how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            getattr(fcntl, kind)(file, how | fcntl.LOCK_NB)
            return True
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        why = error.strerror
    say_once(
        f"warning: this file system has no locks ({why}), so nothing keeps two processes from the "
        "same run: start each once only"
    )
    return True


def open_folder(folder, cfg):
    """Make or reopen a run folder and take its lock.

    Returns the lock, to be held for life, and whether the run is finished. Raises UserError where
    another process holds it, it holds another run (see `standing`), or it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (held for life)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); see run.output_dir and run.name"
        ) from None
    for wait in (0.1, 0.3, 0.6, None):  # somebody may only be asking whether it is held
        if try_lock("lockf", lock):
            break
        if wait:
            time.sleep(wait)
    else:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        raise UserError(f"{folder}: another process is running this run: {owner}")
    lock.truncate(0)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%c")}
    lock.write(json.dumps(owner))
    lock.flush()
    state, why = standing(folder, cfg)
    if state == "refused":
        raise UserError(why)
    if state is None and not holds_work(folder):
        write_config(folder, dataclasses.asdict(cfg))  # whose run this is from now on
    if why:
        say(f"{folder}: {why}")
    return lock, state == "finished"


def standing(folder, cfg, is_held=False):
    """What a run folder is to a config: (state, why).

    `finished`, with a note where its CSVs could not be compared; `refused` where it is another run
    or a damaged one, with a sentence that says what to do; None where there is nothing, or this run
    unfinished. is_held: whether a process is running there.
    """
    folder = Path(folder)
    is_done = os.path.lexists(folder / RESULT)
    try:
        if is_held or holds_work(folder):
            _check_config(folder, cfg, is_done)
        if not is_done:
            return None, None
        read_result(folder)
        return "finished", _compare_data(folder, cfg.data, cfg.run.init_from)
    except UserError as error:
        return "refused", str(error)


def _check_config(folder, cfg, is_done):
    """Raises UserError where the folder's run is not of this config."""
    try:
        saved = _saved_config(folder / CONFIG)
    except FileNotFoundError:
        if not is_done:
            return  # a checkpoint has its config in itself
        saved = None
    except ConfigError as error:
        raise UserError(f"{error}; {OTHERWISE}") from None
    if not isinstance(saved, dict):
        raise UserError(f"{folder}: no {CONFIG} says whose {RESULT} that is; {OTHERWISE}")
    # A checkpoint knows its data by hash, so they may have moved.
    changed = differences(identity_of(saved, is_done), identity(cfg, is_done))
    if changed:
        raise UserError(f"{folder} holds a run of another config ({some(changed)}); {OTHERWISE}")


def read_result(folder):
    """result.json of a finished run.

    Raises UserError where it is not whole, or the scores beside it are not there.
    """
    path, scores = Path(folder) / RESULT, Path(folder) / SCORES
    if not os.path.lexists(path):
        raise UserError(f"{folder}: no {RESULT}, so no finished run")
    result = read_json(path) or {}
    lacks = [key for key in KEYS if key not in result]
    lacks += [key for key in PARTS if not isinstance(result.get(key, {}), dict)]
    again = f"delete {path}, and the run's command makes it again"
    if lacks:
        what = f"lacks {', '.join(lacks)}" if result else "cannot be read"
        raise UserError(f"{path} is damaged: it {what}; {again}")
    if not scores.is_file() or not zipfile.is_zipfile(scores):
        raise UserError(f"{scores} is damaged or not there; {again}")
    return result


def _compare_data(folder, data, init_from):
    """None where CSVs, store and first weights are those that the run was made of, or a note on
    what was not compared.

    data: the section of the config. Raises UserError where one has changed.
    """
    made = read_json(folder / PROVENANCE) or {}
    if not isinstance(made.get("csv_sha256"), dict):
        return f"not compared with its CSVs: its {PROVENANCE} has no hash of them"
    now = csv_hashes(data)
    compared = [
        (f"data.{key}", getattr(data, key), made["csv_sha256"].get(key), now[key]) for key in now
    ]
    if data.packed is not None:
        kept = (made.get("data_sha256") or {}).get("packed")
        compared.append(("data.packed", data.packed, kept, stored_hash(data.packed)))
    if init_from is not None:
        kept = made.get("init_from_sha256")
        compared.append(("run.init_from", init_from, kept, init_hash(init_from)))
    for key, path, kept, found in compared:
        if None not in (kept, found) and kept != found:
            raise UserError(
                f"{folder} is finished, but {path} ({key}) has changed since; put it back as it "
                f"was, {OTHERWISE}"
            )
    unknown = [path for _, path, kept, found in compared if None in (kept, found)]
    return f"not compared with {', '.join(unknown)}: cannot be read" if unknown else None
