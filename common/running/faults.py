"""Faults of a machine, each told in one sentence: a full disk, too little memory, too few files."""

import contextlib
import errno
import os
import shutil

import torch

from common.running.errors import FaultError, UserError

FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
TOO_MANY_FILES = ("Too many open files", "received 0 items of ancdata")
SHARED_MEMORY = ("shared memory", "Bus error", "(shm)")
DEAD = ("is killed by signal", "exited unexpectedly")  # torch's words of a loader's worker
TIMED_OUT = ("Timed out waiting",)  # gloo's words; a loader has others
NO_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


def _full(error):
    """A disk without space, or beyond a quota."""
    path = error.filename or "a file of this run"
    text = f"{path}: {error.strerror}"
    with contextlib.suppress(OSError, TypeError):
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
        needed = f"{error.needed} bytes are needed, " if hasattr(error, "needed") else ""
        text += f" ({needed}{free} bytes are free)"
    return FaultError(f"{text}. What is saved stays; the same command goes on from there")


def explain(error):
    """An exception as the UserError or FaultError that says what to do; None where it is no fault
    of the machine. Only this rank knows of it.
    """
    text, told = str(error), None
    if isinstance(error, OSError) and error.errno in FULL:
        told = _full(error)
    elif isinstance(error, torch.OutOfMemoryError):
        asked = ". ".join(text.split(". ")[:2])  # that it was, and how much was asked for
        told = UserError(f"{asked}: lower optimization.batch_size, or use more GPUs")
    elif any(part in text for part in TOO_MANY_FILES):
        told = UserError(
            f"too many open files ({text[:120]}): raise the limit with `ulimit -n 4096`, or lower "
            "data.num_workers"
        )
    elif isinstance(error, RuntimeError) and any(part in text for part in SHARED_MEMORY):
        told = UserError(
            "the shared memory of the loader's workers, /dev/shm, is too small: give it more (of a "
            "container: --shm-size=8g), or use data.num_workers=0"
        )
    elif isinstance(error, (ConnectionError, EOFError)) or any(part in text for part in DEAD):
        told = FaultError(
            f"a loader worker has died ({text[:120] or 'in the midst of a batch'}). Where memory "
            "ran out: lower data.num_workers, or give the job more"
        )
    elif isinstance(error, RuntimeError) and any(part in text for part in TIMED_OUT):
        told = FaultError(
            f"another rank hangs, or is gone: this one has waited for it in vain ({text[:120]}). "
            "The same command goes on from the last checkpoint"
        )
    elif isinstance(error, MemoryError) or any(part in text for part in NO_MEMORY):
        told = UserError(
            f"no memory holds that ({text[:200] or 'out of memory'}): lower data.image_size, "
            "optimization.batch_size or the sizes in ssl_settings"
        )
    if told is not None:
        told.one_rank = True
    return told
