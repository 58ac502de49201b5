"""What a run is made with: code, script, machine, versions and the files of its data."""

import contextlib
import functools
import hashlib
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from common.running.errors import regular
from common.running.folder import PROVENANCE, read_json, versions, write_json
from common.running.progress import say
from common.running.weights import weights_file

SCRIPT, DIFF = "script.py", "git.diff"
LARGEST_DIFF = 1 << 20  # bytes


def add(folder, cfg, place, step, data_sha, init_sha=None):
    """Note one start of a run: what code, on what, with which versions, from which step on.

    Keeps the script that is running and what differs from the last commit. place: rank, world size
    and device; step: above 0 where a run is gone on with, and another script gets a warning;
    init_sha: of the weights that it started from.
    """
    folder = Path(folder)
    commit = modified = None
    diff = b""
    with contextlib.suppress(OSError):  # no git on this machine
        commit = _git("rev-parse", "HEAD").decode().strip() or None
        modified = bool(_git("status", "--porcelain", "-uno")) if commit else None
        diff = _git("diff", "--no-ext-diff", "--no-color", "HEAD")
    if len(diff) > LARGEST_DIFF:
        diff = diff[:LARGEST_DIFF]
        say(f"{folder / DIFF}: cut at 1 MB, git diff HEAD is longer")
    before = read_json(folder / PROVENANCE) or {}
    earlier = before.pop("earlier_starts", []) + ([before] if before else [])
    script, other = _keep(folder / SCRIPT, _running_script(cfg))
    if other and step:
        say(f"warning: this run was begun by another script, kept as {other}; it goes on by this")
    device = torch.cuda.get_device_name() if place.device.type == "cuda" else platform.machine()
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "argv": sys.argv,
        "python": sys.version.split()[0],
        "git_commit": commit,
        "git_modified": modified,
        "git_diff_sha256": _keep(folder / DIFF, diff)[0],
        "script_sha256": script,
        "versions": versions(),
        "device": device,
        "world_size": place.world_size,
        "seed": cfg.seed,
        "step": step,
        "data_sha256": data_sha,
        "csv_sha256": csv_hashes(cfg.data),
        "init_from": cfg.run.init_from,
        "init_from_sha256": init_sha,
    }
    write_json(folder / PROVENANCE, start | {"earlier_starts": earlier})


def _git(*words):
    """What git prints in this project's folder, as bytes; none where it fails."""
    done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True)
    return done.stdout if done.returncode == 0 else b""


def _running_script(cfg):
    """The file whose Config that is, as bytes; none where there is no such file."""
    main = sys.modules["__main__"]
    is_main = getattr(main, "Config", None) is type(cfg)
    path = getattr(main if is_main else sys.modules.get(type(cfg).__module__), "__file__", None)
    with contextlib.suppress(OSError):
        return Path(path).read_bytes() if path else b""
    return b""


def _keep(path, content):
    """Write bytes to a file, none where they are empty; what it held before gets another name.

    Returns the content's sha256, or None, and where another content is kept now, or None.
    """
    sha, other = hashlib.sha256(content).hexdigest() if content else None, None
    kept = path.read_bytes() if path.exists() else b""
    if kept == content:
        return sha, None
    if kept:
        other = path.with_name(f"{path.stem}_{hashlib.sha256(kept).hexdigest()[:8]}{path.suffix}")
        os.replace(path, other)
    if content:
        path.write_bytes(content)
    return sha, other


def csv_hashes(data):
    """{train_csv: sha256 of its bytes, val_csv: ...}; None for one that cannot be read."""
    hashes = {}
    for key in ("train_csv", "val_csv"):
        try:
            hashes[key] = _sha256(getattr(data, key))
        except OSError:
            hashes[key] = None
    return hashes


def init_hash(path):
    """sha256 of the file of a `run.init_from`; None without, or where it cannot be read."""
    with contextlib.suppress(OSError):
        return path and _sha256(weights_file(path))
    return None


def once_a_file(read):
    """read(path), called again only after the file's time or size has changed."""

    @functools.lru_cache(maxsize=512)
    def cached(path, modified, size):
        return read(path)

    def call(path):
        at = os.stat(path)
        return cached(os.path.abspath(path), at.st_mtime_ns, at.st_size)

    return call


@once_a_file
def _sha256(path):
    digest = hashlib.sha256()
    with open(regular(path), "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
