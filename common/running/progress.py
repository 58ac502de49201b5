"""Progress with time left: a bar on a terminal, else a plain line every half minute."""

import functools
import os
import re
import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30
SECONDS_BEFORE_BAR = 2  # what ends sooner shows nothing
_ESCAPES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # to a terminal; not UTF-8


def speaks():
    """Whether this process prints: rank 0 does, the others are silent.

    A RANK without a WORLD_SIZE is no torchrun's, but was left in the environment.
    """
    return os.environ.get("RANK", "0") == "0" or not os.environ.get("WORLD_SIZE")


def write_error(text):
    """Lines to standard error, above any bar. Where it is closed or its disk is full they are lost,
    and so is what comes after: no run ends for it.
    """
    text = _ESCAPES.sub(lambda found: repr(found[0])[1:-1], str(text))  # of a file's name, maybe
    try:
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (held for life)


def say(text):
    """A line to the terminal, above any bar; rank 0 only."""
    if speaks():
        write_error(text)


@functools.cache
def say_once(text):
    """`say`, the first time that a process has to say it."""
    say(text)


def clock(seconds):
    """Seconds as 1:02:03 or 2:03."""
    return tqdm.format_interval(seconds)


class Stopwatch:
    """Seconds of a run over all its starts; `training`: of those in training steps."""

    def __init__(self, before=0.0, training=0.0):
        self._started, self.training = time.monotonic() - before, training

    def seconds(self):
        """In this run so far."""
        return time.monotonic() - self._started

    def start_step(self):
        """What lies before it, such as a validation, is no training."""
        self._mark = time.monotonic()

    def end_step(self):
        """The next step starts here."""
        now = time.monotonic()
        self.training, self._mark = self.training + now - self._mark, now


class Progress:
    """Counts towards a total; use `update` after each piece and `close` at the end."""

    def __init__(self, total, label, unit, done=0):
        """done: how much of the total was done before this process started."""
        self.total, self.label, self.unit = total, label, unit
        self.done = self.first = done
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if speaks() and sys.stderr.isatty():
            self.bar = tqdm(
                total=total,
                initial=done,
                desc=label,
                unit=f" {unit}",
                delay=SECONDS_BEFORE_BAR,
                leave=False,
                dynamic_ncols=True,
            )

    def update(self, n=1, note=""):
        """n more are done; note: shown behind the count, such as the loss."""
        self.done += n
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif speaks() and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            rate = (self.done - self.first) / (self.last_line - self.started)
            left = clock((self.total - self.done) / rate) if rate else "?"
            note = f", {note}" if note else ""
            say(
                f"{self.label}: {self.done}/{self.total} {self.unit}, "
                f"{rate:.3g} {self.unit}/s, {left} left{note}"
            )

    def close(self):
        if self.bar is not None:
            self.bar.close()
