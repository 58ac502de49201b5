"""Errors that are told in one clear sentence, without a traceback: of the user, or the machine."""

import errno
import os
import re
import stat

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # no path and no name may hold one
SHOWN = 5  # of many problems, in a message
REMEDY = "Lower optimization.lr, or use optimization.precision=bf16 or fp32"  # of what overflows


class UserError(Exception):
    """The user's to mend, exit code 2: names the file, key or row and what is allowed.

    `one_rank`: only this rank knows of it.
    """

    one_rank = False


class FaultError(UserError):
    """A fault of the machine that may be gone when the same command is given again: exit code 3."""


class ConfigError(UserError):
    """A config file or override that cannot be used. `values`: what was read of it, if anything."""

    def __init__(self, message, values=None):
        super().__init__(message)
        self.values = values or {}


class ImageError(UserError):
    """An image that cannot be used; found by the one rank that read it."""

    one_rank = True


def listed(where, problems):
    """Many problems as one message: the first few, a line each, and how many there are."""
    more = f" {len(problems)} problems, the first {SHOWN}:" if len(problems) > SHOWN else ""
    return "\n  ".join([f"{where}:{more}", *problems[:SHOWN]])


def some(names):
    """Many names as one text: the first few, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def regular(path):
    """The path of a file that can be read to its end; OSError where there is none.

    Opening a pipe waits for whoever writes to it, and a device may have no end.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    return path
