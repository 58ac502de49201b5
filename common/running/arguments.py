"""Kinds of words of a command line, for argparse's `type`."""

import argparse
import os

from common.running.errors import CONTROL
from common.running.schema import NO_CONTROL


def path_argument(text):
    """A path: `~` is expanded, control characters are refused."""
    if CONTROL.search(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} {NO_CONTROL}")
    return os.path.expanduser(text)


def share(text):
    """A number inside 0 to 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number inside 0 to 1, got {text}")
    return value


def at_least(least):
    """A whole number."""

    def whole(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return value

    return whole
